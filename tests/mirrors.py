"""Stores for the tests of the mirror: in memory, with faults when they are asked for, and what must hold of any of them."""

import hashlib
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem
from records import save

from milepost.mirror import Mirrored, Store, Uploader, opened, readable, runs_in
from milepost.mirror.contents import Save, newest_first
from milepost.mirror.uploading import Sending, upload

ADDRESS = "memory://me:pass-word@host/mirror?token=a-secret"
SECRETS = ("pass-word", "a-secret")  # in it
RUN = "one"
# A whole run of three checkpoints, which keeps one here and one there.
SMALL = {
    "MODEL_TYPE": "bigram", "N_LAYER": None, "N_HEAD": None, "N_EMBD": None, "DROPOUT": None, "TRAINING_STEPS": "6",
    "CHECKPOINT_INTERVAL": "2", "EVAL_INTERVAL": "2", "SAMPLE_INTERVAL": "4", "CHECKPOINT_KEEP_LAST": "1",
    "MIRROR_KEEP_LAST": "1",
}  # fmt: skip


class Faulty(MemoryFileSystem):
    """A file system in memory that raises the next of `faults`, or calls it, when it is asked to write something."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]
        self.faults: deque[Exception | Callable[[str], None] | None] = deque()
        self.written: list[str] = []

    def _write(self, path: str) -> None:
        fault = self.faults.popleft() if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            fault(path)
        self.written.append(path)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **named: Any) -> None:
        """Write bytes, unless a fault is due."""
        self._write(path)
        super().pipe_file(path, value, mode=mode, **named)

    def put_file(self, lpath: str, rpath: str, **named: Any) -> None:
        """Write a file, unless a fault is due."""
        self._write(rpath)
        super().pipe_file(rpath, Path(lpath).read_bytes())


def in_memory(fs: MemoryFileSystem | None = None) -> Store:
    return Store(fs or Faulty(), "/mirror", ADDRESS)


def in_folder(folder: Path) -> Store:
    return opened(f"file://{folder}")


def known(store: Store, folder: Path, *, run_id: str = RUN) -> Mirrored:
    """What a process knows of a run that has saved nothing yet; its files lie in `folder`/runs."""
    (folder / "runs" / run_id).mkdir(parents=True, exist_ok=True)
    return Mirrored(store, run_id, folder / "runs" / run_id, folder / "checkpoints")


def send(mirrored: Mirrored, checkpoint: Path, folder: Path) -> Save:
    """Upload at the first attempt."""
    return upload(mirrored, checkpoint, folder, Sending(lambda action: action(), lambda size: None))


def manifests(store: Store) -> list[str]:
    return [name for names in newest_first(store.names()).values() for name in names]


def taken(store: Store) -> list[Save]:
    """Return the saves of which a reader takes the manifest: those whose manifest is whole."""
    return list(readable(store, manifests(store), say=lambda line: None, pause=lambda seconds: None))


def halves(store: Store) -> list[str]:
    """Return the objects that a manifest names and that are missing or not what it says."""
    there, bad = set(store.names()), []
    for saved in taken(store):
        for part in saved.parts:
            content = store.read(part.object, limit=2**30) if part.object in there else b""
            if (len(content), hashlib.sha256(content).hexdigest()) != (part.size, part.sha256):
                bad.append(part.object)
    return bad


def no_pause(seconds: float) -> None:
    """Another attempt follows at once."""


def saves_of(store: Store, run_id: str = RUN) -> list[Save]:
    return list(readable(store, runs_in(store, pause=no_pause).get(run_id, []), say=print, pause=no_pause))


def uploader(mirrored: Mirrored, *, keep_last: int = 0) -> tuple[Uploader, list[str]]:
    said: list[str] = []
    return Uploader(mirrored, keep_last=keep_last, say=said.append, pause=no_pause), said


def steps(saves: list[Save]) -> list[int]:
    return [each.found.step for each in saves]


def lose(folder: Path) -> None:
    """The disk is gone, the mirror is not."""
    for name in ("checkpoints", "runs"):
        shutil.rmtree(folder / name, ignore_errors=True)


def path_of(store: Store, name: str) -> Path:
    return Path(store.root) / name


def with_three(folder: Path) -> Mirrored:
    """A run with three checkpoints in a mirror that is a folder."""
    mirrored, folder = known(in_folder(folder / "mirror"), folder), folder / "checkpoints"
    for step in (1, 2, 3):
        (mirrored.run_folder / "metrics.jsonl").write_text("line\n" * step)
        send(mirrored, save(folder, step), folder)
    return mirrored
