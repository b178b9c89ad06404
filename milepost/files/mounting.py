"""Folders whose file system is unmounted while the process runs.

Their path then leads to the disk below: what is written there is hidden once the file system is mounted again, and fills
another disk meanwhile. So such a folder counts as one that does not answer.
"""

import contextlib
import errno
import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")  # Linux: proc(5)
ESCAPED = re.compile(rb"\\([0-7]{3})")

_points: dict[str, Path] = {}  # folder -> where its file system was mounted


def note_mount(folder: Path) -> None:
    """Remember where the file system of `folder` is mounted, for `check_mounted`. The root cannot be unmounted."""
    real = Path(os.path.realpath(folder))
    point = next(filter(_is_mounted, (real, *real.parents)), None)
    if point is not None and point != point.parent:
        _points[os.path.abspath(folder)] = point


def check_mounted(folder: Path) -> None:
    """Raise OSError with ENOTCONN if `folder` is in one that `note_mount` was told of, and no file system is mounted there
    any more. Another one in its place is taken.
    """
    path = Path(os.path.abspath(folder))
    for point in filter(None, (_points.get(str(place)) for place in (path, *path.parents))):
        with contextlib.suppress(OSError):
            os.stat(os.path.join(point, "."))  # an automounter mounts it now
        if not _is_mounted(point):
            raise OSError(errno.ENOTCONN, "no file system is mounted here any more: mount it again", str(point))


def forget_mounts() -> None:
    """Forget every folder."""
    _points.clear()


def _is_mounted(place: Path) -> bool:
    """Whether a file system is mounted at `place`, also a folder of the same disk, which os.path.ismount does not see."""
    try:
        lines = MOUNTS.read_bytes().splitlines()
    except OSError:
        return os.path.ismount(place)
    return os.fsencode(place) in (ESCAPED.sub(_unescape, line.split()[4]) for line in lines)


def _unescape(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 8)])
