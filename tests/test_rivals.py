"""Which checkpoint is the newest is known, or asked for: other programs number no saves, and keep a folder per model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from drive import TINY, train
from foreign_programs import SIZES, NanoGPT, nanogpt, shaken
from script import call, script

from milepost import api, ckpt
from milepost.ckpt import CheckpointError
from milepost.ckpt.rivals import rivals

ELEVEN = list("\n abcdefghi")
QUIET = dict.fromkeys(TINY) | {
    "DEVICE": "cpu",
    "ENABLE_CHECKPOINTS": "true",
    "TRAINING_STEPS": "1001",
    "EVAL_STEPS": "1",
}


def write(path: Path, *, step: int = 1000, seed: int = 1, **changes: Any) -> Path:
    """A file of nanoGPT; the seed decides its weights."""
    torch.manual_seed(seed)
    model = shaken(NanoGPT(**SIZES | {name: changes.pop(name) for name in SIZES.keys() & changes.keys()}))
    optimizer = model.configure_optimizers()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(nanogpt(model, optimizer, step=step) | {"chars": ELEVEN} | changes, path)
    (path.parents[1] / "text.txt").write_text("".join(ELEVEN) * 60)
    return path


def resumed(folder: Path, **changes: str | Path) -> tuple[int, str]:
    asked = {"CHECKPOINT_DIR": folder / "checkpoints", "TRAINING_DATA_SOURCE": folder / "text.txt"} | changes
    (folder / "text.txt").write_text("".join(ELEVEN) * 60)
    return train(folder, **QUIET | {name: value if value is None else str(value) for name, value in asked.items()})


def two_models(folder: Path, **second: Any) -> tuple[Path, Path]:
    """checkpoints/dante/latest.pt and checkpoints/milton/latest.pt."""
    one = write(folder / "checkpoints" / "dante" / "latest.pt")
    return one, write(folder / "checkpoints" / "milton" / "latest.pt", **{"seed": 2} | second)


@pytest.mark.parametrize("second", [{}, {"step": 2000}, {"n_embd": 24}, {"best_val_loss": 1.0}])
@pytest.mark.parametrize("name", ["auto", "latest", "best", "{}"])
def test_training_does_not_go_on_with_one_of_two_models(name: str, second: dict[str, Any], tmp_path: Path) -> None:
    paths = two_models(tmp_path, **second)
    folder = tmp_path / "checkpoints"
    code, said = resumed(tmp_path, RESUME=name.format(folder))
    assert code == (2 if name == "auto" else 3), said
    assert all(str(path) in said.splitlines()[-1] for path in paths)
    asked = {"CHECKPOINT_PATH": name.format(folder), "CHECKPOINT_DIR": folder}
    if name != "auto":
        done = call(script("load_checkpoint"), tmp_path, MODE="resume", **asked)
        assert done.code == 3
        done = call(script("load_checkpoint"), tmp_path, PROMPT="abc", MAX_NEW_TOKENS="2", SAMPLE_SEED="1", **asked)
        assert done.code == 0  # generating changes nothing: the choice is named
        assert all(str(path) in done.err for path in paths)
        code, said = resumed(tmp_path, INIT_FROM=name.format(folder), TRAINING_STEPS="1")
        assert code == 3, said
    code, said = resumed(tmp_path, RESUME=paths[0])  # what the message advises
    assert code == 0, said


def test_a_model_of_other_sizes_than_those_set_is_not_meant(tmp_path: Path) -> None:
    two_models(tmp_path, n_embd=24)
    code, said = resumed(tmp_path, RESUME="auto", N_EMBD="12")
    assert code == 0, said


@pytest.mark.parametrize("where", ["copy.pt", "best/ckpt.pt", "backup/latest.pt"])
def test_a_copy_is_not_another_model(where: str, tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints" / "ckpt.pt")
    copy = tmp_path / "checkpoints" / where
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(path, copy)
    assert [rivals(each, ckpt.find(tmp_path / "checkpoints")) for each in ckpt.find(tmp_path / "checkpoints")] == [
        [],
        [],
    ]
    code, said = resumed(tmp_path, RESUME="auto")
    assert code == 0, said


def test_the_steps_of_one_model_are_in_order(tmp_path: Path) -> None:
    for step in (1000, 500, 700):
        path = write(tmp_path / "checkpoints" / f"ckpt_{step}.pt", step=step, seed=step)
    write(tmp_path / "checkpoints" / "best" / "best.pt", step=600, seed=600)
    assert ckpt.resolve("latest", path.parent, certain=True)[0].name == "ckpt_1000.pt"
    assert api.latest(path.parent).name == "ckpt_1000.pt"
    code, said = resumed(tmp_path, RESUME="auto")
    assert code == 0, said


def test_two_files_of_one_step_in_a_folder(tmp_path: Path) -> None:
    chosen, one = (write(tmp_path / "checkpoints" / f"{name}.pt", seed=seed) for seed, name in enumerate("ab"))
    for name in ("latest", str(one.parent), f"{one.parent}/*.pt"):
        path, notes = ckpt.resolve(name, one.parent)
        assert (path, str(one) in notes[-1]) == (chosen, True)
        with pytest.raises(CheckpointError) as caught:
            ckpt.resolve(name, one.parent, certain=True)
        assert caught.value.kind == "refused"
    with pytest.raises(CheckpointError):
        api.latest(one.parent)
    said = call(script("list_checkpoints"), tmp_path, CHECKPOINT_DIR=one.parent)
    assert str(one) in said.out.splitlines()[-1]


def test_a_glob_takes_the_highest_step_also_of_several_folders(tmp_path: Path) -> None:
    _, other = two_models(tmp_path, step=2000)
    pattern = f"{tmp_path}/checkpoints/*/latest.pt"
    assert ckpt.resolve(pattern, tmp_path, certain=True)[0] == other


def test_our_own_saves_are_numbered(tmp_path: Path) -> None:
    """Negative control: two runs of equal step in one folder, of which the later save is known."""
    for seed in ("1", "2"):
        code, said = train(tmp_path, SEED=seed, TRAINING_STEPS="2", EVAL_STEPS="1", SAMPLE_INTERVAL="0")
        assert code == 0, said
    path, notes = ckpt.resolve("latest", tmp_path / "checkpoints", certain=True)
    assert notes == [f"taking {path}"]
