"""A real file system that lacks what one names: FOLDER, mounted with FUSE at PLACE.

    python3 picky.py FOLDER PLACE rename,append      # until SIGTERM, or `fusermount3 -u PLACE`

It passes every call on to FOLDER, and refuses some as other file systems do. `REFUSALS` has what can be lacking; the
rest is `append` (a file is written once from its beginning to its end), `statfs` (all zeros), `late` (a name is
listed two seconds after it was made), `gone` (nothing answers while FOLDER/.gone exists), `unread` (bytes between the two
offsets in FOLDER/.unread cannot be read while that exists), `stale` (the first opening of each file to read is refused) and `case`
(names that differ in case are one name).
"""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# lack -> the error that a call gets
REFUSALS = {
    "rename": errno.ENOSYS,
    "rename-dir": errno.ENOTSUP,
    "rename-over": errno.EEXIST,
    "link": errno.ENOSYS,
    "chmod": errno.ENOSYS,
    "append": errno.ENOTSUP,
    "fsync": errno.EINVAL,
    "fsync-dir": errno.EINVAL,
    "lock": errno.ENOLCK,
    "lock-nosys": errno.ENOSYS,
}
LISTED_AFTER = 2.0  # seconds
WRITES = os.O_WRONLY | os.O_RDWR


def mount(folder: str, place: str, lacking: set[str]) -> None:
    """Serve the file system until it is unmounted."""
    import mfusepy

    opened: set[str] = set()

    class Picky(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def real(self, path: str) -> str:
            if "gone" in lacking and os.path.exists(f"{folder}/.gone"):
                raise mfusepy.FuseOSError(errno.ENOTCONN)
            return folder + (path if "case" not in lacking else self.named(path))

        def named(self, path: str) -> str:
            """Return the path with each name as it is on disk."""
            found = ""
            for name in filter(None, path.split("/")):
                inside = os.listdir(folder + found) if os.path.isdir(folder + found) else []
                same = [each for each in inside if each.casefold() == name.casefold()]
                found += f"/{name if name in inside or not same else same[0]}"
            return found or "/"

        def refuse(self, *lacks: str) -> None:
            for lack in lacks:
                if lack in lacking:
                    raise mfusepy.FuseOSError(REFUSALS[lack])

        def access(self, path: str, mode: int) -> int:
            if not os.access(self.real(path), mode):
                raise mfusepy.FuseOSError(errno.EACCES)
            return 0

        def getattr(self, path: str, handle: Any = None) -> dict[str, int]:
            status = os.lstat(self.real(path))
            plain = ("st_gid", "st_mode", "st_nlink", "st_size", "st_uid", "st_blocks")
            times = {name: getattr(status, f"{name}_ns") for name in ("st_atime", "st_ctime", "st_mtime")}
            return times | {name: getattr(status, name) for name in plain}

        def readdir(self, path: str, handle: int) -> list[str]:
            real, names = self.real(path), os.listdir(self.real(path))
            if "late" in lacking:
                names = [name for name in names if time.time() - os.lstat(f"{real}/{name}").st_ctime > LISTED_AFTER]
            return [".", "..", *names]

        def mkdir(self, path: str, mode: int) -> None:
            os.mkdir(self.real(path), mode)

        def rmdir(self, path: str) -> None:
            os.rmdir(self.real(path))

        def unlink(self, path: str) -> None:
            os.unlink(self.real(path))

        def rename(self, old: str, new: str) -> None:
            self.refuse("rename", *(["rename-dir"] if os.path.isdir(self.real(old)) else []))
            if os.path.lexists(self.real(new)):
                self.refuse("rename-over")
            os.rename(self.real(old), self.real(new))

        def link(self, new: str, old: str) -> None:
            self.refuse("link")
            os.link(self.real(old), self.real(new))

        def chmod(self, path: str, mode: int) -> None:
            self.refuse("chmod")
            os.chmod(self.real(path), mode)

        def utimens(self, path: str, times: Any = None) -> None:
            self.refuse("chmod")
            os.utime(self.real(path), ns=times)

        def statfs(self, path: str) -> dict[str, int]:
            status = os.statvfs(self.real(path))
            names = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_frsize")
            return {name: 0 if "statfs" in lacking else getattr(status, name) for name in names}

        def create(self, path: str, mode: int, info: Any = None) -> int:
            return os.open(self.real(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

        def open(self, path: str, flags: int) -> int:
            real = self.real(path)
            if flags & os.O_APPEND or (flags & WRITES and os.path.getsize(real)):
                self.refuse("append")
            if "stale" in lacking and not flags & WRITES and real not in opened:
                opened.add(real)
                raise mfusepy.FuseOSError(errno.ESTALE)
            return os.open(real, flags & ~os.O_APPEND)

        def read(self, path: str, size: int, offset: int, handle: int) -> bytes:
            self.real(path)
            if "unread" in lacking and os.path.exists(f"{folder}/.unread"):
                with open(f"{folder}/.unread", encoding="utf-8") as control:
                    begin, end = map(int, control.read().split())
                    if offset < end and offset + size > begin:
                        raise mfusepy.FuseOSError(errno.EIO)
            return os.pread(handle, size, offset)

        def write(self, path: str, data: bytes, offset: int, handle: int) -> int:
            self.real(path)
            if offset != os.fstat(handle).st_size:
                self.refuse("append")
            return os.pwrite(handle, data, offset)

        def truncate(self, path: str, length: int, handle: Any = None) -> None:
            if length:
                self.refuse("append")
            os.truncate(self.real(path), length)

        def flush(self, path: str, handle: int) -> int:
            return 0

        def release(self, path: str, handle: int) -> None:
            os.close(handle)

        def fsync(self, path: str, only_data: int, handle: int) -> None:
            self.refuse("fsync")
            os.fsync(handle)

        def fsyncdir(self, path: str, only_data: int, handle: int) -> int:
            self.refuse("fsync", "fsync-dir")
            return 0

    # Without `flock` of its own the kernel keeps the locks.
    if {"lock", "lock-nosys"} & lacking:
        Picky.flock = lambda self, path, info, operation: self.refuse("lock", "lock-nosys") or 0  # type: ignore[attr-defined]
    mfusepy.FUSE(Picky(), place, foreground=True, nothreads=True, attr_timeout=0, entry_timeout=0)


@contextlib.contextmanager
def mounted(folder: Path, *lacking: str) -> Iterator[Path]:
    """Yield a new folder below `folder` whose file system lacks these; what it holds is in `folder`/back."""
    back, place = folder / "back", folder / "mount"
    back.mkdir(parents=True)
    place.mkdir()
    words = [sys.executable, __file__, str(back), str(place), ",".join(lacking)]
    with open(folder / "mount.log", "wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as server:
        try:
            while not os.path.ismount(place):
                assert server.poll() is None, (folder / "mount.log").read_text()
                time.sleep(0.05)
            yield place
        finally:
            (back / ".gone").unlink(missing_ok=True)
            subprocess.run([shutil.which("fusermount3") or "fusermount", "-uz", str(place)], check=False)
            server.terminate()


if __name__ == "__main__":
    mount(sys.argv[1], sys.argv[2], set(sys.argv[3].split(",")))
