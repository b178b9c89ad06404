"""An optimizer's file that is damaged or absent: it stops a resume, and nothing that needs only the model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drive import newest, train
from foreign_programs import SIZES, NanoGPT, nanogpt
from records import FULL, record, refused

from milepost import ckpt
from milepost.ckpt.layouts import known_layout

SEPARATE = ("separated", "directory", "stepfiles", "consolidated", "huggingface")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {"cut": cut, "flipped": flip, "empty": empty}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", SEPARATE)
def test_the_model_is_used_without_a_damaged_optimizer(layout: str, damage: str, tmp_path: Path) -> None:
    path = ckpt.save(record(7, **FULL), tmp_path, layout=layout)
    optimizer = known_layout(path).optimizer_file(path)
    assert optimizer is not None
    DAMAGES[damage](optimizer)
    message = refused(path, verify=True)  # a resume
    assert message.startswith(f"{optimizer}: ")
    for verify in (False, True):  # generating and evaluating, converting the model only
        one = ckpt.load(path, optimizer=False, verify=verify)
        assert torch.equal(
            one.model_state["token_embedding_table.weight"], record(7).model_state["token_embedding_table.weight"]
        )
    made = ckpt.convert(path, tmp_path / "converted", layout="unified", model_only=True)
    assert ckpt.load(made.target, verify=True).parts == ["model"]
    with pytest.raises(ckpt.CheckpointError):
        ckpt.convert(path, tmp_path / "full", layout="unified")


def flip_in(path: Path, tensor: torch.Tensor) -> None:
    """Flip a bit of the file where it holds the tensor."""
    data = bytearray(path.read_bytes())
    data[data.index(tensor.contiguous().numpy().tobytes()) + 5] ^= 1
    path.write_bytes(bytes(data))


def test_in_one_file_damaged_moments_stop_only_what_needs_them(tmp_path: Path) -> None:
    path = ckpt.save(record(7, **FULL), tmp_path)
    whole = ckpt.load(path)
    weights = whole.model_state["token_embedding_table.weight"].clone()
    moments = next(iter(whole.optimizer_state["state"].values()))["exp_avg"].clone()
    flip_in(path, moments)
    assert refused(path, verify=True).endswith("do not match their checksum: take an earlier checkpoint")
    one = ckpt.load(path, optimizer=False, verify=True)
    assert torch.equal(one.model_state["token_embedding_table.weight"], weights)
    flip_in(path, weights)
    assert "checksum" in refused(path, optimizer=False, verify=True)


@pytest.mark.parametrize("layout", SEPARATE)
def test_control_a_damaged_model_is_not_used(layout: str, tmp_path: Path) -> None:
    path = ckpt.save(record(7, **FULL), tmp_path, layout=layout)
    optimizer = known_layout(path).optimizer_file(path)
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file != optimizer]
    cut(max(files, key=lambda file: file.stat().st_size))
    refused(path, optimizer=False)


def test_a_renamed_model_file_claims_no_optimizer(tmp_path: Path) -> None:
    pair = ckpt.save(record(7, **FULL), tmp_path, layout="separated")
    alone = shutil.copy(pair, tmp_path / "favourite.pt")
    assert known_layout(alone).read_metadata(alone)["parts"] == ["model"]
    assert ckpt.load(alone).parts == ["model"]
    (found,) = ckpt.find(tmp_path)  # one save under two names: the full one counts
    assert (found.path, found.resumable) == (pair, True)


def test_a_renamed_optimizer_file_is_called_what_it_is(tmp_path: Path) -> None:
    pair = ckpt.save(record(7, **FULL), tmp_path, layout="separated")
    optimizer = known_layout(pair).optimizer_file(pair)
    assert optimizer is not None
    alone = shutil.copy(optimizer, tmp_path / "moments.pt")
    with pytest.raises(ckpt.CheckpointError) as caught:
        ckpt.load(Path(alone))
    assert caught.value.kind == "lacking"


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_flipped_bit_in_another_programs_file_is_found_without_its_optimizer_too(
    optimizer: bool, tmp_path: Path
) -> None:
    """Weights and optimizer are in one file there."""
    model = NanoGPT(**SIZES)
    path = tmp_path / "ckpt.pt"
    torch.save(nanogpt(model), path)
    data = bytearray(path.read_bytes())
    data[data.index(model.lm_head.weight.detach().numpy().tobytes()) + 5] ^= 1
    path.write_bytes(bytes(data))
    assert "checksum" in refused(path, optimizer=optimizer, verify=True)


def test_a_new_run_starts_from_no_damaged_weights(tmp_path: Path) -> None:
    """What RESUME=auto tells to do where no checkpoint is whole, INIT_FROM=latest, must not train on from flipped bits."""
    code, said = train(tmp_path, CHECKPOINT_INTERVAL="4", CHECKPOINT_KEEP_BEST="0")
    assert code == 0, said
    last = newest(tmp_path)
    weight = max(last.model_state.values(), key=torch.Tensor.numel)
    flip_in(last.path, weight.clone())
    code, said = train(tmp_path, INIT_FROM=str(last.path))
    assert (code, "do not match their checksum: take an earlier checkpoint" in said) == (3, True), said
    code, said = train(tmp_path, INIT_FROM="latest")
    assert code == 0, said
    assert f"skipped: {last.path}: is damaged" in said
    assert newest(tmp_path).parent["file"] != last.path.name
