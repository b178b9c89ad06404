"""File systems that lack something, by refusing system calls in this process: what needs no mount and no root.

tests/picky.py mounts real ones.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from milepost import files

Set = Callable[[object, str, Any], None]


def refuse(patch: Set, module: object, name: str, code: int, when: Callable[..., bool] = lambda *_: True) -> None:
    """Make a call of `module` fail with `code` where `when` holds of its arguments."""
    action = getattr(module, name)

    def call(*arguments: Any, **named: Any) -> Any:
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return action(*arguments, **named)

    patch(module, name, call)


def take_away(patch: Set, lack: str) -> None:
    """Make this process's file systems lack `lack`, a name of LACKS."""
    files.forget()
    LACKS[lack](patch)


def _renames(code: int, when: Callable[..., bool] = lambda *_: True) -> Callable[[Set], None]:
    def take(patch: Set) -> None:
        refuse(patch, os, "replace", code, when)
        refuse(patch, os, "rename", code, when)

    return take


def _silent(patch: Set) -> None:
    zeros = dict.fromkeys(("f_bavail", "f_bfree", "f_blocks", "f_favail", "f_files"), 0)
    patch(os, "statvfs", lambda _: SimpleNamespace(f_bsize=512, f_frsize=512, **zeros))


LACKS: dict[str, Callable[[Set], None]] = {
    "rename": _renames(errno.ENOSYS),
    "rename of folders": _renames(errno.ENOTSUP, lambda source, _: os.path.isdir(source)),
    "rename onto a name": _renames(errno.EEXIST, lambda _, target: os.path.lexists(target)),
    "append": lambda patch: refuse(patch, os, "open", errno.ENOTSUP, lambda _, flags, *__: bool(flags & os.O_APPEND)),
    "hard links": lambda patch: refuse(patch, os, "link", errno.ENOSYS),
    "locks": lambda patch: refuse(patch, fcntl, "flock", errno.ENOLCK),
    "free space": _silent,
    "fsync": lambda patch: refuse(patch, os, "fsync", errno.EINVAL),
}


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that takes a lack; afterwards nothing lacks."""
    yield lambda lack: take_away(monkeypatch.setattr, lack)
    monkeypatch.undo()
    files.forget()
