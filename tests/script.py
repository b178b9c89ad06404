"""Runs the scripts that look after checkpoints in this process, as the command line would."""

import importlib.util
import io
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from drive import ROOT, TINY, environment
from drive import train as trained_in

import training
from milepost import ckpt, config
from milepost.ckpt import Checkpoint
from milepost.run import text as run_text
from milepost.runtime.progress import Log

NOTHING_OF_TRAINING = dict.fromkeys([*TINY, "TRAINING_DATA_SOURCE"]) | {"DEVICE": "cpu"}


class Said(NamedTuple):
    """The result of a command: exit code, stdout and stderr."""

    code: int
    out: str
    err: str


def script(name: str) -> ModuleType:
    """A script as a module; it does nothing until its main is called."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module: ModuleType, folder: Path, **changes: str | Path | None) -> Said:
    """Return what the script prints; only the folders of `folder` and `changes` are set."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True), io.StringIO()
    texts = {name: None if value is None else str(value) for name, value in changes.items()}
    try:
        settings = config.read(environment(folder, **NOTHING_OF_TRAINING | texts), reads=module.READS)
    except config.ConfigError as error:
        return Said(2, "", str(error))
    with redirect_stdout(out):
        code = training.guarded(module.main, settings, log=Log(err))
    return Said(code, out.buffer.getvalue().decode(), err.getvalue())


def train_family(folder: Path) -> Path:
    """A run with checkpoints at steps 2, 4, 6 and 8, and a child of step 4 with another batch, with checkpoints at 5
    and 6.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_text, "CACHE_FOLDER", folder / "cache")
        assert trained_in(folder, CHECKPOINT_INTERVAL="2", SAMPLE_INTERVAL="0")[0] == 0
        (start,) = (folder / "checkpoints").glob("*step0004*")
        changes = {
            "CHECKPOINT_PATH": start,
            "MODE": "resume",
            "RESUME_TRAINING_STEPS": "2",
            "RESUME_LEARNING_RATE": "1e-4",
        }
        said = call(
            script("load_checkpoint"), folder, **changes, BATCH_SIZE="2", CHECKPOINT_INTERVAL="5", SAMPLE_INTERVAL="0"
        )
        assert said.code == 0, said.err
    return folder


def copied(folder: Path, to: Path) -> Path:
    """The family's checkpoints and text in a folder of one's own; the text stays where it was."""
    shutil.copytree(folder / "checkpoints", to / "checkpoints")
    return to


def family(folder: Path) -> dict[int, Path]:
    """The checkpoints of the first run of a family by step."""
    found = [one for one in ckpt.find(folder / "checkpoints") if not one.problem and not one.metadata["parent"]]
    return {one.step: one.path for one in found}


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Of a table of checks: how each went, and more about it."""
    lines = [
        line.split(None, 2)
        for line in text.replace("resumes exactly", "exactly").splitlines()
        if line.startswith(CHECKS)
    ]
    return {words[0]: (words[1], words[2] if len(words) > 2 else "") for words in lines}


CHECKS = ("bytes", "opens", "shapes", "numbers", "tokenizer", "exactly", "replay")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every visible file below a folder, with its bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def same_tensors(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether both hold the same bytes under the same names; the optimizer's by index and kind."""

    def everything(record: Checkpoint) -> dict[str, bytes]:
        state = (record.optimizer_state or {"state": {}})["state"]
        moments = {f"{index} {kind}": value for index, kinds in state.items() for kind, value in kinds.items()}
        return {name: tensor.contiguous().numpy().tobytes() for name, tensor in (record.model_state | moments).items()}

    return everything(one) == everything(other)
