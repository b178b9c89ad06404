"""Where this program may write: its own files and folders, never through a link that lies in a folder.

A folder of checkpoints may come from somebody else. The user names it, and it or a folder above it may be a link. What lies inside
decides nothing about other places: a link, a pipe or a device in the place of a file or folder of ours is refused.
"""

import errno
import os
import stat
from pathlib import Path


def check_file(path: Path) -> None:
    """Raise OSError if something other than a regular file lies at `path`, or a second name of a file that holds something.

    An empty lock may have a second name in a backup made of hard links; emptying it again harms nothing.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode) or (status.st_nlink > 1 and status.st_size):
        problem = "is a link, a pipe or a device where Milepost writes a file of its own: remove it"
        raise OSError(errno.EINVAL, problem, str(path))


def check_inside(base: Path, folder: Path) -> None:
    """Raise OSError if a part of `folder` below `base` is there and is a link or no folder. `base` itself may be a link."""
    for place in [*(above for above in folder.parents if above.is_relative_to(base) and above != base), folder]:
        if place != base and os.path.lexists(place) and not is_real_folder(place):
            problem = "is a link or a file where Milepost keeps a folder of its own: remove it, or set another folder"
            raise OSError(errno.ENOTDIR, problem, str(place))


def is_real_folder(path: Path) -> bool:
    """Whether `path` is a folder and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_real_file(path: Path) -> bool:
    """Whether `path` is a regular file and no link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False
