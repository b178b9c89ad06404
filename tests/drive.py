"""Drives training as the command line would, in this process or in one of its own, and reads back what it left."""

import io
import os
import subprocess
import sys
from pathlib import Path

import programs
import torch
from work import HANGING

import training
from milepost import ckpt, config
from milepost.ckpt.archive import bytes_of
from milepost.ckpt.record import named_tensors
from milepost.runtime.progress import Log, read_metrics

ROOT = Path(__file__).resolve().parent.parent

# A model of a few thousand weights, evaluated and sampled in between, on the beginning of the bundled text.
TINY = {
    "MODEL_TYPE": "gpt2", "N_LAYER": "2", "N_HEAD": "2", "N_EMBD": "16", "BLOCK_SIZE": "16", "BATCH_SIZE": "4",
    "DROPOUT": "0.1",
    "TRAINING_STEPS": "8", "LEARNING_RATE": "1e-3", "WARMUP_STEPS": "2", "EVAL_INTERVAL": "4", "EVAL_STEPS": "2",
    "SAMPLE_INTERVAL": "4", "LOG_INTERVAL": "1",
    "ENABLE_CHECKPOINTS": "true", "CHECKPOINT_INTERVAL": "4", "DEVICE": "cpu",
}  # fmt: skip


def small_text(folder: Path, *, characters: int = 6000, name: str = "letters.txt") -> Path:
    """A file with the beginning of the bundled text."""
    path = folder / name
    path.write_text((ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8")[:characters], encoding="utf-8")
    return path


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """TINY with its output below `folder`, and `changes` on top; a value of None takes a variable away."""
    text = folder / "letters.txt"
    if not text.exists():
        small_text(folder)
    places = {
        "TRAINING_DATA_SOURCE": str(text),
        "CHECKPOINT_DIR": str(folder / "checkpoints"),
        "RUNS_DIR": str(folder / "runs"),
    }
    values = TINY | places | {"PYTHON_DOTENV_DISABLED": "1"} | changes
    return {name: value for name, value in values.items() if value is not None}


def train(folder: Path, **changes: str) -> tuple[int, str]:
    """Trains in this process; returns the exit code and what stderr showed."""
    torch._dynamo.reset()  # one process trains many models here, and dynamo would give up compiling after eight
    said = io.StringIO()
    settings = config.read(environment(folder, **changes))
    code = training.guarded(training.main, settings, log=Log(said))
    return code, said.getvalue()


def command(
    script: str, folder: Path, *, cwd: Path = ROOT, stdin: str = "", **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, as a user would."""
    return programs.run(
        [sys.executable, script], cwd=cwd, env=child_environment(folder, **changes), input=stdin, capture_output=True,
        text=True, timeout=HANGING, check=False
    )  # fmt: skip


def child_environment(folder: Path, **changes: str) -> dict[str, str]:
    """Return the variables of a process of its own: those of `environment` and what it needs of this one's."""
    names = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names if name in os.environ} | environment(folder, **changes)


def newest(folder: Path) -> ckpt.Checkpoint:
    """The newest checkpoint of a run driven in `folder`, all its bytes checked."""
    found = ckpt.latest(ckpt.find(folder / "checkpoints"))
    assert found is not None
    return ckpt.load(found.path, verify=True)


def at_step(folder: Path, step: int) -> Path:
    """The ordinary checkpoint of a step."""
    (path,) = (
        one.path
        for one in ckpt.find(folder / "checkpoints")
        if one.step == step and one.path.parent.name == "checkpoints"
    )
    return path


def tensor_bytes(record: ckpt.Checkpoint) -> dict[str, bytes]:
    """The bytes of every weight and of every optimizer tensor, by name."""
    return {name: bytes_of(tensor).tobytes() for name, tensor in named_tensors(record).items()}


def logged(folder: Path) -> list[tuple[object, ...]]:
    """Every logged figure that a resume must repeat, in order, of the one run in `folder`."""
    (path,) = (folder / "runs").glob("*/metrics.jsonl")
    return [
        (line["step"], line["split"], line["loss"], line["lr"], line["grad_norm"], line["tokens"])
        for line in read_metrics(path)
    ]
