"""Small checkpoints for the tests of ckpt/, the members of their archives, and children that see what a test cannot."""

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ckpt import Checkpoint

WEIGHT = "token_embedding_table.weight"
NOBODY = 65534


def record(step: int = 1, *, size: int = 8, **changes: Any) -> Checkpoint:
    """A bigram model's checkpoint whose every number follows from `step`; `changes` replace its fields."""
    draw = torch.Generator().manual_seed(step)
    weight, first, second = (torch.randn(size, size, generator=draw) for _ in range(3))
    moments = {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second}
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "params": [0], "param_names": [WEIGHT]}
    fields = {
        "model_state": {WEIGHT: weight},
        "optimizer_state": {"state": {0: moments}, "param_groups": [group]},
        "model_type": "bigram",
        "model_settings": {"vocab_size": size, "block_size": 4},
        "tokenizer": {"kind": "char", "chars": [chr(ord("a") + one) for one in range(size)]},
        "step": step,
        "hyperparameters": {"BATCH_SIZE": 2},
        "data": {"name": "letters"},
        "run_id": "one",
    }
    return Checkpoint(**(fields | changes))


def members(path: Path) -> dict[str, bytes]:
    """The members of an archive by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path: Path, content: Mapping[str, bytes | str], *, compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive of these members at `path`, its checksums right."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def flipped(path: Path, position: int, bit: int = 0) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@contextlib.contextmanager
def walkable_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def in_child(action: Callable[[], Any], *, as_nobody: bool = False) -> Any:
    """What `action` returns in a forked process, or its error in words; as nobody, because root ignores permissions.

    The threads of OpenMP do not survive a fork, so `action` must not compute with tensors.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if as_nobody and os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            answer = action()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        answer = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return answer
