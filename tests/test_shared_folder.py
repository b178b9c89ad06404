"""The `consolidated/` folder of a checkpoint, described as the part to share, opens alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from records import FULL, gpt2_record, record

from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.restore import build_model, build_tokenizer, logits, with_base
from milepost.ckpt.tensors import digest


def shared(one: Checkpoint, folder: Path) -> Path:
    """Save the record, and return its consolidated/ copied away from the rest."""
    path = ckpt.save(one, folder / "from", layout="consolidated")
    return Path(shutil.copytree(path / "consolidated", folder / "received"))


def adapted(settings: dict[str, Any]) -> Checkpoint:
    """A GPT-2 with adapters of its own."""
    base = gpt2_record()
    torch.manual_seed(3)
    model = build_model(base, device=torch.device("cpu"), adapters=settings)
    state = {
        name: torch.randn_like(tensor) if "lora" in name else tensor for name, tensor in model.state_dict().items()
    }
    base.model_state, base.model_settings = state, base.model_settings | settings
    base.optimizer_state = None
    return base


LORA = {"lora": {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "c_attn"}}
TTT = {"ttt": {"layers": "0", "base_lr": 1.0, "mini_batch_size": 4, "initial_gating_alpha": 0.1}}
RECORDS = {
    "bigram": lambda: record(7, **FULL),
    "gpt2": gpt2_record,
    "LoRA": lambda: adapted(LORA),
    "TTT": lambda: adapted(TTT),
    "both": lambda: adapted(LORA | TTT),
}


@pytest.mark.parametrize("name", RECORDS)
def test_it_computes_the_same_and_has_the_tokenizer(name: str, tmp_path: Path) -> None:
    one = RECORDS[name]()
    folder = shared(one, tmp_path)
    assert ckpt.verify(folder) == []
    for asked in (folder, folder / "consolidated.safetensors"):
        read = ckpt.load(ckpt.resolve(str(asked), tmp_path)[0], verify=True)
        assert torch.equal(logits(read), logits(one))
        assert read.model_settings == one.model_settings
        assert read.parts == ["model"]
        if one.tokenizer:
            assert build_tokenizer(read).digest == build_tokenizer(one).digest
    (found,) = ckpt.find(tmp_path / "received")
    assert (found.problem, found.layout) == (None, "shared_folder")


@pytest.mark.parametrize("name", ["gpt2", "both"])
def test_it_opens_under_its_own_name_too(name: str, tmp_path: Path) -> None:
    one = RECORDS[name]()
    path = ckpt.save(one, tmp_path / "from", layout="consolidated")
    (tmp_path / "downloads").mkdir()
    folder = shutil.copytree(path / "consolidated", tmp_path / "downloads" / "consolidated")
    for asked in (folder, folder / "consolidated.safetensors"):
        read = ckpt.load(ckpt.resolve(str(asked), tmp_path)[0])
        assert torch.equal(logits(read), logits(one))


def adapters_only(base: Checkpoint) -> Checkpoint:
    whole = adapted(LORA)
    whole.model_state = {name: tensor for name, tensor in whole.model_state.items() if "lora" in name}
    whole.parts = ["adapters"]
    whole.base = {"sha256": digest(base.model_state), "source": "/home/ann/secret/base.pt", "step": 3}
    return whole


def test_adapters_alone_ask_for_their_base(tmp_path: Path) -> None:
    base = gpt2_record()
    folder = shared(adapters_only(base), tmp_path)
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors") == ["lora.safetensors"]
    assert "secret" not in (folder / "config.json").read_text()  # where the base lies is nobody else's matter
    read = ckpt.load(folder)
    assert read.parts == ["adapters"]
    with pytest.raises(ckpt.CheckpointError) as caught:
        build_model(read, device=torch.device("cpu"))
    assert caught.value.kind == "lacking"
    assert "base.pt" in str(caught.value)
    assert torch.equal(logits(with_base(read, base)), logits(adapted(LORA)))
    other = gpt2_record()
    other.model_state["wte.weight"] = other.model_state["wte.weight"] + 1
    with pytest.raises(ckpt.CheckpointError):  # negative control: another base
        with_base(read, other)


def test_a_base_that_is_not_recorded_is_taken_from_the_user_and_named(tmp_path: Path) -> None:
    base = gpt2_record()
    folder = shared(adapters_only(base), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["base"]
    (folder / "config.json").write_text(json.dumps(config))
    read = ckpt.load(folder)
    whole = with_base(read, base)
    assert any("does not record its base" in note for note in whole.notes)
    assert torch.equal(logits(whole), logits(adapted(LORA)))


def test_what_lies_in_a_whole_checkpoint_is_that_checkpoint(tmp_path: Path) -> None:
    path = ckpt.save(record(7, **FULL), tmp_path, layout="consolidated")
    for asked in (path / "consolidated", path / "consolidated" / "consolidated.safetensors"):
        assert ckpt.resolve(str(asked), tmp_path)[0] == path
    assert known_layout(path).name == "consolidated"
    assert [found.path for found in ckpt.find(tmp_path)] == [path]


def test_settings_that_its_weights_contradict_are_refused(tmp_path: Path) -> None:
    folder = shared(gpt2_record(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for change in ({"n_layer": 9}, {"vocab_size": 0}, {"n_head": 7}, {"lora": {"rank": 2}}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ckpt.CheckpointError):
            build_model(ckpt.load(folder), device=torch.device("cpu"))
