"""Write one file, durably: past the page cache where the system supports it, hashed, and flushed to the device."""

import contextlib
import errno
import hashlib
import io
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milepost.files.file_system import FSYNC_FOLDERS, lacks, not_offered
from milepost.files.reaching import remember

CHUNK = 4 * 2**20  # bytes of a write
BEGINNING = 2**20  # bytes of a file whose hash every load compares with the manifest
BLOCK = 4096  # bytes; direct writes need addresses and sizes that are multiples of it


class NewFile(io.RawIOBase):
    """A file written once from start to end, with direct I/O where the system supports it.

    A checkpoint is not read again soon: in the page cache it would cost a second copy and evict what training needs.
    """

    def __init__(self, path: Path, *, hashed: bool = False) -> None:
        """Create `path`; raise FileExistsError if it exists. `hashed` computes the sha256 of the content."""
        super().__init__()
        self._descriptor, self._direct = _create(path)
        remember(path)
        self._buffer, self._filled = mmap.mmap(-1, CHUNK), 0  # anonymous memory is aligned to a block
        self._sha256 = hashlib.sha256() if hashed else None
        self._begins = hashlib.sha256()
        self.size = 0

    @property
    def entry(self) -> dict[str, Any]:
        """Size and sha256 of the content, and sha256 of its first BEGINNING bytes, for a manifest."""
        assert self._sha256 is not None
        return {"size": self.size, "sha256": self._sha256.hexdigest(), "begins_sha256": self._begins.hexdigest()}

    def writable(self) -> bool:
        """Return True, as io.RawIOBase requires."""
        return True

    def tell(self) -> int:
        """Return the bytes written so far."""
        return self.size

    def write(self, data: Any) -> int:
        """Write all of `data`, any buffer; return its size in bytes. Raise OSError on a write error."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            self._take(view[start : start + CHUNK])
        return len(view)

    def _take(self, piece: memoryview) -> None:
        if self._sha256 is not None:
            self._sha256.update(piece)
            self._begins.update(piece[: max(0, BEGINNING - self.size)])
        self.size += len(piece)
        while len(piece):
            fits = piece[: CHUNK - self._filled]
            self._buffer[self._filled : self._filled + len(fits)] = fits
            self._filled, piece = self._filled + len(fits), piece[len(fits) :]
            if self._filled == CHUNK:
                self._drain()

    def _drain(self) -> None:
        view = memoryview(self._buffer)[: self._filled]
        try:
            if self._direct and self._filled % BLOCK:
                self._stop_direct()  # the end of a file is seldom a full block
            while len(view):
                view = view[self._hand_over(view) :]
                if self._direct and len(view) % BLOCK:
                    self._stop_direct()  # a short write
        finally:
            view.release()
        self._filled = 0

    def _hand_over(self, view: memoryview) -> int:
        """Write, and return the bytes written. Some file systems accept O_DIRECT at open and refuse every write."""
        try:
            return os.write(self._descriptor, view)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
            self._stop_direct()
            return os.write(self._descriptor, view)

    def _stop_direct(self) -> None:
        import fcntl

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False

    def finish(self) -> None:
        """Flush; return when the content is on the device."""
        self._drain()
        flush_to_disk(self._descriptor)

    def close(self) -> None:
        """Close the descriptor; without `finish`, the last writes may be lost."""
        if not self.closed:
            super().close()  # first: a failed close frees the descriptor too, and another file may get its number
            os.close(self._descriptor)


def _create(path: Path) -> tuple[int, bool]:
    """Create the file; return its descriptor and whether it uses direct I/O."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # no direct I/O on this file system; some have created the file by then
                raise
            path.unlink(missing_ok=True)
    return os.open(path, flags, 0o666), False


@contextlib.contextmanager
def written(path: Path, *, hashed: bool = False) -> Iterator[NewFile]:
    """Yield a new file in a hidden folder; it is durable when the block ends."""
    with NewFile(path, hashed=hashed) as file:
        yield file
        file.finish()


def write_json(path: Path, values: Any) -> NewFile:
    """Write `values` as an indented JSON file; return it for its size and sha256."""
    with written(path, hashed=True) as file:
        text = json.dumps(values, allow_nan=False, indent=2, ensure_ascii=False) + "\n"
        file.write(text.encode(errors="backslashreplace"))  # a lone surrogate becomes its JSON escape
    return file


def flush_to_disk(descriptor: int) -> None:
    """Return when the file's bytes are on the device. macOS needs F_FULLFSYNC: its fsync stops at the drive's cache."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined]
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not not_offered(error):  # a file system without fsync: whether the bytes last rests on it
            raise


def sync_file(path: Path) -> None:
    """Return when the bytes of a closed file are on the device."""
    descriptor = os.open(
        path, os.O_RDWR if os.name == "nt" else os.O_RDONLY
    )  # some systems open no file again to write
    try:
        flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, as far as its file system can: Windows has no such call, others refuse it."""
    if os.name == "nt" or FSYNC_FOLDERS in lacks(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Without fsync the new name is visible but perhaps not durable: no reason to lose the file.
        if not not_offered(error):
            raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create the folder and its missing parents durably."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        remember(path)
        sync_folder(path.parent)
