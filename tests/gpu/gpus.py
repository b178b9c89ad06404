"""What the tests of a GPU share: the device, and runs on it in this process and in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import drive
import programs
from drive import ROOT, at_step, environment, logged, newest, tensor_bytes
from work import HANGING

DEVICE = os.environ.get("GPU_DEVICE", "cuda")  # "cpu" runs the same code on the CPU, to try the tests themselves
ON_GPU = DEVICE == "cuda"
SECONDS = int(os.environ.get("GPU_TEST_SECONDS", "220"))  # of all tests together
MOST_SECONDS = 120 if ON_GPU else HANGING  # of a single test: more is hanging

STEPS = 8
# Heads of 64 and the vocabulary of GPT-2: flash attention, the chunked head with rows added, tensors of some size.
WIDE = {
    "TOKENIZER": "gpt2", "TRAINING_DATA_SOURCE": str(ROOT / "data" / "dear_wren.md"), "DROPOUT": "0",
    "N_EMBD": "256" if ON_GPU else "32", "N_HEAD": "4" if ON_GPU else "2", "BLOCK_SIZE": "1024" if ON_GPU else "32",
}  # fmt: skip


def train(folder: Path, **changes: str) -> tuple[int, str]:
    """Train on the device in this process; return the exit code and what stderr showed."""
    folder.mkdir(parents=True, exist_ok=True)
    return drive.train(folder, **{"DEVICE": DEVICE} | changes)


def trained(folder: Path, **changes: str) -> Path:
    """Train on the device to the end; return the folder."""
    code, said = train(folder, **changes)
    assert code == 0, said
    return folder


def resume_elsewhere(straight: Path, folder: Path, step: int, **changes: str) -> Path:
    """Resume in `folder` from nothing but the straight run's checkpoint of `step` and its metrics; return the folder."""
    prepare_resume(straight, folder, step)
    return trained(folder, RESUME="auto", **changes)


def prepare_resume(straight: Path, folder: Path, step: int) -> None:
    """Copy into `folder` what a resume needs of the straight run's `step`."""
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(at_step(straight, step), folder / "checkpoints")
    shutil.copytree(straight / "runs", folder / "runs")
    if (straight / "letters.txt").exists():
        shutil.copy(straight / "letters.txt", folder)


def assert_same(one: Path, other: Path) -> None:
    """Assert that two runs ended with the same bits and logged the same figures."""
    assert tensor_bytes(newest(one)) == tensor_bytes(newest(other))
    assert logged(one) == logged(other)


def child(words: list[str], folder: Path, **changes: str) -> subprocess.Popen[str]:
    """Start a process of its own on the device, fresh: what a fork takes over knows no CUDA."""
    wanted = (
        "CUDA_",
        "NVIDIA_",
        "TRITON_",
        "TORCHINDUCTOR_",
        "NCCL_",
        "LD_LIBRARY_PATH",
        "PATH",
        "HOME",
        "TMPDIR",
        "USER",
    )
    env = {name: value for name, value in os.environ.items() if name.startswith(wanted)}
    folder.mkdir(parents=True, exist_ok=True)
    return programs.start(
        [sys.executable, *words], fresh=True, cwd=ROOT, env=env | environment(folder, **{"DEVICE": DEVICE} | changes),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a process; return its exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=MOST_SECONDS)
    finally:
        process.kill()
    return process.returncode, out, err
