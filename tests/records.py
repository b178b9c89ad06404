"""Small checkpoints for the tests of ckpt/, the members of their archives, and children that see what a test cannot."""

import contextlib
import datetime
import encodings.cp437  # noqa: F401  (zipfile's; a child that is nobody may not reach the files of root's Python)
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import models
from milepost import ckpt
from milepost.ckpt import Checkpoint, saving
from milepost.ckpt.record import metadata
from milepost.runtime.optim import build_optimizer

WEIGHT = "token_embedding_table.weight"
NOBODY = 65534
NOON = datetime.datetime(2025, 11, 10, 12, 0, 0, tzinfo=datetime.UTC)
GIVEN_BY_THE_STORE = {"save_id", "save_number", "saved_at"}

# Every field of a record with a value of its own, beside those that `record` has.
FULL: dict[str, Any] = {
    "windows_seen": 12,
    "tokens_seen": 4800,
    "epoch": 0.75,
    "schedule": {"kind": "cosine", "peak": 3e-4, "floor": 1e-5, "warmup_steps": 2, "start_step": 0, "end_step": 9},
    "scaler": {"scale": 65536.0, "growth_factor": 2.0},
    "observed_step": 6,
    "validation_loss": 2.25,
    "best_loss": 2.125,
    "best_step": 4,
    "hyperparameters": {"BATCH_SIZE": 2, "LEARNING_RATE": 3e-4, "STOP": None, "ODD": "é\u2028\n\x00"},
    "data": {"name": "letters", "sha256": "ab" * 32},
    "runtime": {"dtype": "float32", "compile": False, "threads": 2},
    "run_id": "20251110-120000-bigram-letters-1f2e",
    "parent": {"run_id": "earlier", "step": 3, "changed": {"SEED": [0, 1]}},
}


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


GPT2 = {"vocab_size": 12, "block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 8}


def gpt2_record(
    step: int = 3, *, optimizer: str = "adamw", settings: Mapping[str, Any] | None = None, **changes: Any
) -> Checkpoint:
    """A tiny GPT-2's checkpoint after one update by random gradients; `changes` replace its fields."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step)
        model = models.build("gpt2", GPT2 | dict(settings or {}))
        updates = build_optimizer(model, optimizer, lr=0.05, weight_decay=0.1, betas=(0.9, 0.95))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        updates.step()
    if model.settings.tied is False:
        torch.nn.init.zeros_(model.lm_head.bias)  # transformers has none
    fields = {
        "model_state": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "optimizer_state": updates.state_dict(),
        "model_type": "gpt2",
        "model_settings": models.plain(model.settings),
        "tokenizer": {"kind": "char", "chars": list("abcdefghijk ")},
        "step": step,
        "hyperparameters": {"BATCH_SIZE": 2},
        "data": {"name": "letters"},
        "run_id": "one",
    }
    return Checkpoint(**(fields | changes))


def bits(record: Checkpoint) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a record, the optimizer's by parameter name and kind."""
    named = dict(record.model_state)
    for group in record.optimizer_state["param_groups"] if record.optimizer_state else ():
        for index, name in zip(group["params"], group["param_names"], strict=True):
            moments = record.optimizer_state["state"].get(index, {})  # type: ignore[index]
            named |= {f"optimizer {name} {kind}": tensor for kind, tensor in moments.items()}
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in named.items()
    }


def plain(record: Checkpoint, *, but: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    """A record's metadata and its optimizer's groups as JSON has them, without the fields named in `but`."""
    groups = record.optimizer_state["param_groups"] if record.optimizer_state else None
    values = metadata(record) | {"param_groups": groups}
    return {name: value for name, value in json.loads(json.dumps(values)).items() if name not in but}


def assert_same(one: Checkpoint, other: Checkpoint, *, but: set[str] = GIVEN_BY_THE_STORE) -> None:
    """Assert that all tensors are bit-identical, and all metadata equal except what differs between saves."""
    assert bits(one) == bits(other)
    assert plain(one, but=but) == plain(other, but=but)


def save(folder: Path, step: int = 1, *, layout: str = "unified", **changes: Any) -> Path:
    """Saves `record(step, **changes)` in `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    return ckpt.save(record(step, **changes), folder, layout=layout)


def newest(folder: Path) -> Path | None:
    """The path of the latest checkpoint in `folder`."""
    found = ckpt.latest(ckpt.find(folder))
    return found.path if found else None


def set_clock(monkeypatch: pytest.MonkeyPatch, now: datetime.datetime) -> None:
    """The clock by which saves are named and dated stands at `now`."""
    clock = SimpleNamespace(now=lambda zone: now.astimezone(zone))
    words = SimpleNamespace(datetime=clock, UTC=datetime.UTC, timedelta=datetime.timedelta)
    monkeypatch.setattr(saving, "datetime", words)


def hugging_face_folder(path: Path) -> Path:
    """Looks like a GPT-2 of another program: it has no save number."""
    path.mkdir(parents=True)
    sizes = {"vocab_size": 9, "n_positions": 8, "n_layer": 1, "n_head": 1, "n_embd": 4}
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes))
    return path


def refusal(path: Path, **options: Any) -> ckpt.CheckpointError:
    """Return the error that loading `path` must raise: one printable sentence."""
    with pytest.raises(ckpt.CheckpointError) as caught:
        ckpt.load(path, **options)
    text = str(caught.value)
    assert text.isprintable()
    assert "weights_only" not in text  # torch's advice is to turn the safety off
    return caught.value


def refused(path: Path, **options: Any) -> str:
    """Return the sentence in which loading `path` is refused."""
    return str(refusal(path, **options))


def snapshot(folder: Path) -> dict[str, bytes]:
    """The bytes of every visible file below `folder`, by its place there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    places = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        place: path.read_bytes()
        for place, path in places.items()
        if not any(part.startswith(".") and part != ".metadata" for part in place.split("/"))
    }


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
    """A folder that every user can reach, with all that is made in it meanwhile; pytest's own are closed to others."""
    before = os.umask(0o022)
    try:
        with tempfile.TemporaryDirectory() as name:
            os.chmod(name, 0o755)
            yield Path(name)
    finally:
        os.umask(before)


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


def mapped_and_touched(path: Path) -> tuple[int, int]:
    """Bytes of `path` that are mapped into this process, and that have been touched there."""
    mapped = touched = 0
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith(("Size:", "Rss:")):
            size = int(line.split()[1]) * 1024
            mapped, touched = mapped + size * line.startswith("Size"), touched + size * line.startswith("Rss")
    return mapped, touched


def better(step: int, **changes: Any) -> Checkpoint:
    """Return a record whose validation loss falls with the step."""
    return record(step, **({"validation_loss": 1 / step} | changes))
