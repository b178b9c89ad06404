"""What killed writers leave: temporary names, each of which holds the number of its process."""

import contextlib
import os
import re
import time
from pathlib import Path

from milepost.files.file_system import TEMPORARY, discard

OWN_NAME = re.compile(re.escape(TEMPORARY) + r"(?P<name>.+)-(?P<process>[0-9]{1,10})-[0-9a-f]{8}")
QUIET = 600  # seconds without a write after which no process of another host is writing
ABANDONED = 24 * 3600  # and after which none is, though one has the number: numbers are used again


def has_writer(process: int) -> bool:
    """Whether another process of this number is alive on this host."""
    if os.name == "nt" or process == os.getpid():
        return False  # on Windows, asking would end the process
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def remove_abandoned(folder: Path) -> None:
    """Delete what killed processes left in a folder of a cache, where any number of processes of several hosts may write."""
    for path in folder.glob(f"{TEMPORARY}*"):
        named = OWN_NAME.fullmatch(path.name)
        if named is None:
            continue
        process = int(named["process"])
        alive = process == os.getpid() or has_writer(process)
        with contextlib.suppress(OSError):
            parts = path.iterdir() if path.is_dir() else ()
            newest = max(part.lstat().st_mtime for part in (path, *parts))
            if time.time() - newest > (ABANDONED if alive else QUIET):
                discard(path)
