"""Checkpoints of mirrors on this disk, within a bound: the least recently used are deleted first.

    <folder>/<key>/           a checkpoint, and the base that its adapters need; the key is of its bytes
    <folder>/<key>/.origin    the address of each, without what may be secret in it
    <folder>/.<key>.lock      held shared by each process that uses it; its time is that of the last use

What is visible in an entry was compared with the sha256 of its manifest, and is compared again at each use. A killed
download leaves hidden names, which nobody takes for a checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from milepost.ckpt.bases import OWN_NOTE
from milepost.ckpt.manifest import sha256
from milepost.ckpt.record import CheckpointError
from milepost.files import TEMPORARY, below, discard, hidden_name, make_folder, replace_content
from milepost.locks import folder_lock
from milepost.mirror.contents import CHECKPOINTS, Save
from milepost.mirror.fetching import Pause, Say, fetch
from milepost.mirror.naming import address_of
from milepost.mirror.store import Store

KEY = re.compile(r"[0-9a-f]{32}")
ORIGIN = ".origin"
# By entry, the locks of what this process uses: one for each `take`, held until `let_go` or the end of the process.
_in_use: dict[Path, list[IO[bytes]]] = {}


class CacheFullError(Exception):
    """What is asked for is larger than the cache may be."""

    def __init__(self, need: int) -> None:
        self.need = need  # bytes
        super().__init__(f"{need} bytes are needed")


@dataclass(frozen=True)
class Cache:
    """A folder and the bytes that it may take."""

    folder: Path
    limit: int


def take(cache: Cache, store: Store, saves: Sequence[Save], *, say: Say, pause: Pause) -> Path:
    """Return the path of the first of `saves` in the cache, with the others beside it, downloaded where they are missing.

    No process deletes them until this one ends, or calls `let_go` with the path. Raise CacheFullError, and what `fetch` raises.
    """
    entry = cache.folder / _key(saves)
    make_folder(cache.folder)
    with contextlib.ExitStack() as until_whole:
        lock = until_whole.enter_context(_held(lock_of(entry)))
        _complete(entry, cache, store, saves, say=say, pause=pause)
        until_whole.pop_all()
    _in_use.setdefault(entry, []).append(lock)
    return entry / saves[0].checkpoint


def let_go(path: Path) -> None:
    """Undo the `take` that returned this path: others may delete it, unless it was taken again."""
    for entry in [entry for entry in path.parents if entry in _in_use]:
        _in_use[entry].pop().close()
        if not _in_use[entry]:
            del _in_use[entry]


def _complete(entry: Path, cache: Cache, store: Store, saves: Sequence[Save], *, say: Say, pause: Pause) -> None:
    """Download what an entry lacks of `saves`."""
    make_folder(entry)
    with folder_lock(entry):
        for leftover in [path for path in below(entry) if path.name.startswith(TEMPORARY)]:
            discard(leftover)
        missing = [save for save in saves if not _is_whole(entry, save, say)]
    if missing:
        make_room(cache, need=sum(save.size for save in missing))
    for save in missing:
        say(f"downloading {store.shown}/{save.checkpoint} ({save.size / 1e6:,.1f} MB)")
        fetch(store, save, entry, pause=pause)
    with folder_lock(entry):
        addresses = {save.checkpoint: address_of(save, store.shown) for save in saves}
        replace_content(entry / ORIGIN, json.dumps(addresses).encode())


def origin(path: Path) -> str | None:
    """Return the address of a checkpoint in a cache, without what may be secret in it; None for any other path."""
    path = path.absolute()
    entry = next((folder for folder in path.parents if KEY.fullmatch(folder.name)), None)
    if entry is None:
        return None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        address = json.loads((entry / ORIGIN).read_bytes()).get(path.relative_to(entry).as_posix())
        return address if isinstance(address, str) else None
    return None


def _key(saves: Sequence[Save]) -> str:
    """Return the name of an entry, which follows from the bytes in it, so that no other mirror can bring other bytes."""
    parts = sorted((part.place, part.size, part.sha256) for save in saves for part in save.checkpoint_parts)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _is_whole(entry: Path, save: Save, say: Say) -> bool:
    """Whether the checkpoint in an entry has the bytes of its manifest; delete it if not. The caller holds the entry's lock."""
    target = entry / save.checkpoint
    paths = {entry / PurePosixPath(part.place).relative_to(CHECKPOINTS): part for part in save.checkpoint_parts}
    if os.path.lexists(target):
        with contextlib.suppress(OSError, CheckpointError):
            if all((path.stat().st_size, sha256(path)) == (part.size, part.sha256) for path, part in paths.items()):
                return True
        say(f"the copy of {save.checkpoint} in the cache is damaged; it is downloaded again")
    for path in (target, *paths):
        discard(path)
    return False


def lock_of(entry: Path) -> Path:
    """Return the lock file of an entry."""
    return entry.with_name(f".{entry.name}.lock")


def make_room(cache: Cache, *, need: int) -> None:
    """Delete entries, the least recently used first, until `need` more bytes fit. What a process uses stays.

    Raise CacheFullError if they would not fit into an empty cache.
    """
    if need > cache.limit:
        raise CacheFullError(need)
    with folder_lock(cache.folder):
        for leftover in cache.folder.glob(f"{TEMPORARY}*"):
            discard(leftover)
        sizes = {path: _size(path) for path in cache.folder.iterdir() if KEY.fullmatch(path.name) and path.is_dir()}
        free = cache.limit - sum(sizes.values())
        for entry in sorted(sizes, key=_last_use):
            if free >= need:
                return
            if _delete(entry):
                free += sizes[entry]


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in below(entry) if path.is_file())


def _last_use(entry: Path) -> float:
    with contextlib.suppress(OSError):
        return lock_of(entry).stat().st_mtime
    return 0.0


def _delete(entry: Path) -> bool:
    """Delete an entry; return False if a process uses it, or other adapters need it as their base."""
    if any(OWN_NOTE.fullmatch(path.name) for path in below(entry)):
        return False
    with _alone(lock_of(entry)) as alone:
        if not alone:
            return False
        hidden = hidden_name(entry)
        try:
            entry.rename(hidden)
        except OSError:
            return False
        discard(hidden)
        with contextlib.suppress(OSError):
            lock_of(entry).unlink(missing_ok=True)
    return True


# ---------------------------------------------------------------------------------------------------------------------


def _held(path: Path) -> IO[bytes]:
    """Return the lock file of an entry, open and locked so that others may use the entry too; note the use."""
    while True:
        file = open(path, "ab")  # noqa: SIM115  (held until this process ends)
        with contextlib.suppress(OSError):  # without locks, nothing is deleted
            _flock(file, "LOCK_SH")
        with contextlib.suppress(FileNotFoundError):  # deleted with its entry meanwhile
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                os.utime(path)
                return file
        file.close()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Yield whether no process uses the entry of this lock, and keep others from it meanwhile."""
    with open(path, "ab") as file:
        try:
            _flock(file, "LOCK_EX", "LOCK_NB")
        except OSError:
            yield False
            return
        yield True


def _flock(file: IO[bytes], *operations: str) -> None:
    """Lock a file, as fcntl names it; not on Windows, which renames no folder of which a file is open."""
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(file, sum(getattr(fcntl, each) for each in operations))
