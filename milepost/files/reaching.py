"""Folders that do not answer for a moment, as network folders do: try again, and know what one has just written.

An error of `UNREACHABLE` says nothing about the bytes of a file, so it never means damage.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

UNREACHABLE = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ENOTCONN", "ETIMEDOUT", "ECONNABORTED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN",
        "ENETUNREACH", "EREMOTEIO", "ESHUTDOWN",
    )
    if hasattr(errno, name)
)  # fmt: skip
PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds between the attempts
REST = 10.0  # seconds after a failure of all attempts in which one attempt is enough: a folder has many files
LATE = 300.0  # seconds for which this process remembers a name: listing caches are seldom older

Result = TypeVar("Result")
_failed: list[float] = []  # when all attempts last failed
_made: dict[str, dict[str, float]] = {}  # folder -> name -> when this process created it
_cleared = [0.0]  # when old names were last left out
_guard = threading.Lock()  # of `_made`: a writer saves in the background while the loop lists


def is_unreachable(error: BaseException | None) -> bool:
    """Whether the error is that of a file or folder that may answer later."""
    return isinstance(error, OSError) and error.errno in UNREACHABLE


@contextlib.contextmanager
def if_it_answers() -> Iterator[None]:
    """Suppress OSErrors of the block, except those of a folder that does not answer: what it holds is unknown."""
    try:
        yield
    except OSError as error:
        if is_unreachable(error):
            raise


def steadily(action: Callable[[], Result]) -> Result:
    """Return what `action` returns, trying again with growing pauses while the folder does not answer.

    Raise what the last attempt raised.
    """
    resting = bool(_failed) and time.monotonic() - _failed[-1] < REST
    for pause in () if resting else PAUSES:
        try:
            return action()
        except OSError as error:
            if not is_unreachable(error):
                raise
        time.sleep(pause)
    try:
        return action()
    except OSError as error:
        if is_unreachable(error):
            _failed[:] = [time.monotonic()]
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Names that this process made, which a listing may not show yet.


def remember(path: Path) -> None:
    """Note that this process has created `path`."""
    folder, name = os.path.split(os.path.abspath(path))
    now = time.monotonic()
    with _guard:
        if now - _cleared[-1] > LATE / 10:  # seldom: a save makes many names
            _clear(now)
        _made.setdefault(folder, {})[name] = now


def _clear(now: float) -> None:
    _cleared[:] = [now]
    for folder, names in list(_made.items()):
        recent = {name: when for name, when in names.items() if now - when <= LATE}
        if recent:
            _made[folder] = recent
        else:
            del _made[folder]


def moved(old: Path, new: Path) -> None:
    """Note that `old`, with what is below it, is now `new`."""
    before, after = os.path.abspath(old), os.path.abspath(new)
    with _guard:
        for place in [place for place in _made if f"{place}{os.sep}".startswith(f"{before}{os.sep}")]:
            _made[after + place[len(before) :]] = _made.pop(place)
        _made.get(os.path.dirname(before), {}).pop(os.path.basename(before), None)
    remember(new)


class MadeEntry:
    """A name that no listing gave, such as one that this process made, with what is needed of an os.DirEntry."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = path.name, str(path)

    def inode(self) -> int:
        """Return the inode; 0 if the name is gone."""
        with contextlib.suppress(OSError):
            return os.lstat(self.path).st_ino
        return 0

    def is_dir(self) -> bool:
        """Whether it is a folder, or a link to one."""
        return os.path.isdir(self.path)

    def is_symlink(self) -> bool:
        """Whether it is a link."""
        return os.path.islink(self.path)

    def stat(self) -> os.stat_result:
        """Return its status; raise OSError."""
        return os.stat(self.path)


Entry = os.DirEntry[str] | MadeEntry


def entries_with_made(folder: Path, listed: Iterable[os.DirEntry[str]]) -> Iterator[Entry]:
    """Yield the `listed` entries of `folder`, then the names in it that this process has just made."""
    names = set()
    for entry in listed:
        names.add(entry.name)
        yield entry
    yield from (MadeEntry(folder / name) for name in _made_in(folder, names))


def _made_in(folder: Path, listed: Container[str]) -> list[str]:
    """Return the names that this process has just made in `folder` and that are not `listed`."""
    with _guard:
        made = sorted(_made.get(os.path.abspath(folder), ()))
    return [name for name in made if name not in listed and os.path.lexists(folder / name)]


def entries(folder: Path) -> list[Path]:
    """Return the entries of `folder`, with those that this process has just made. Raise OSError if it has no listing."""
    found = list(steadily(lambda: list(folder.iterdir())))
    names = {path.name for path in found}
    return [*found, *(folder / name for name in _made_in(folder, names))]


def below(folder: Path) -> Iterator[Path]:
    """Yield everything below `folder`, each folder before its content. Links are not followed."""
    for path in sorted(entries(folder)):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from below(path)


def in_words(error: BaseException) -> str:
    """Return an error without its number: what is wrong, after the file that it is about."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
