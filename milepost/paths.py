"""Check where this program writes: its own files and folders, never through a link inside a folder.

A folder of checkpoints may come from another person. The folder itself, or one above it, may be a link, because the
user named it. A link, pipe or device inside it is refused where this program writes a file or folder of its own.
"""

import errno
import os
import stat
from pathlib import Path


def check_file(path: Path) -> None:
    """Raise OSError if `path` is not a regular file, or a non-empty file with another hard link.

    An empty lock file may have a hard link in a backup; emptying it again does no harm.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode) or (status.st_nlink > 1 and status.st_size):
        problem = "is a link, a pipe or a device where Milepost writes a file of its own: remove it"
        raise OSError(errno.EINVAL, problem, str(path))


def check_inside(base: Path, folder: Path) -> None:
    """Raise OSError if a part of `folder` below `base` exists and is a link or not a folder. `base` may be a link."""
    for place in [*(above for above in folder.parents if above.is_relative_to(base) and above != base), folder]:
        if place != base and os.path.lexists(place) and not is_real_folder(place):
            problem = "is a link or a file where Milepost keeps a folder of its own: remove it, or set another folder"
            raise OSError(errno.ENOTDIR, problem, str(place))


def is_real_folder(path: Path) -> bool:
    """Whether `path` is a folder and not a link."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_real_file(path: Path) -> bool:
    """Whether `path` is a regular file and not a link."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def without_home(source: str) -> str:
    """Return a path, or several joined by commas, with `~` in the place of this user's home folder.

    A file that is shared then names neither the user nor the layout of the disk.
    """
    home = os.path.expanduser("~").rstrip("/")
    parts = source.split(",")
    return ",".join(f"~{part[len(home) :]}" if home and part.startswith(f"{home}/") else part for part in parts)


def with_home(source: str) -> str:
    """Return what `without_home` returned with the home folder of the present user."""
    return ",".join(os.path.expanduser(part) if part.startswith("~/") else part for part in source.split(","))
