"""Atomic, durable writes: write to a temporary hidden name, fsync, rename, fsync the folder.

A checkpoint is a file, a folder, or a group of files. The last file of a group, the primary file, makes it visible.
"""

import contextlib
import errno
import hashlib
import io
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from milepost.paths import is_real_folder

TEMPORARY = ".tmp-"  # names that begin so are never read; leftovers of a crash are removed under the folder's lock
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


@contextlib.contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[NewFile]:
    """Yield a file that appears as `path`, complete and durable, when the block ends; on an error nothing appears.

    Raise FileExistsError if `path` exists: a visible name is never replaced, except with `replace`, which is for
    caches. Raise OSError on a write error.
    """
    with _appearing(path, replace=replace) as hidden, written(hidden) as file:
        yield file


@contextlib.contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Yield a hidden name for a library that opens the file itself; the file appears as `path` at the end.

    Raise as `new_file` does.
    """
    with _appearing(path) as hidden:
        yield hidden
        with open(hidden, "rb+") as file:
            flush_to_disk(file.fileno())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder; it appears as `path`, complete and durable, when the block ends, or not at all.

    Raise as `new_file` does.
    """
    with _appearing(path) as hidden:
        hidden.mkdir()
        yield hidden
        for folder in [*(path for path in hidden.rglob("*") if path.is_dir()), hidden]:
            sync_folder(folder)


@contextlib.contextmanager
def _appearing(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden name. What has it when the block ends appears as `path`; on an error it is deleted."""
    hidden = hidden_name(path)
    try:
        with naming_path(path):
            yield hidden
        (os.replace if replace else reveal)(hidden, path)
    except BaseException:
        discard(hidden)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def new_group(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield a hidden folder for files of these `names`; all appear in `folder` when the block ends, or none does.

    The last name, the primary file, appears last and marks the group as complete. Raise as `new_file` does. Files that
    a kill leaves visible are removed later if the layout's `parts_of` proves by the hidden primary file that they
    belong to this save.
    """
    hidden, all_free = hidden_name(folder / names[-1]), False
    try:
        with naming_path(folder / names[-1]):
            hidden.mkdir()
            yield hidden
            sync_folder(hidden)
            for name in names:
                _check_free(
                    folder / name
                )  # all first: if the primary name were taken, the others would be left without it
            all_free = True
            for name in names[:-1]:
                reveal(hidden / name, folder / name)
            sync_folder(folder)  # the other files are durable before the primary file appears
            reveal(hidden / names[-1], folder / names[-1])
    except BaseException:
        if all_free:
            _take_back(hidden, folder, names)
        discard(hidden)
        raise
    sync_folder(folder)
    discard(hidden)


def _take_back(hidden: Path, folder: Path, names: Sequence[str]) -> None:
    """Remove the visible files of a group whose primary file is not visible; their names were free before."""
    if not os.path.lexists(folder / names[-1]):
        for name in names[:-1]:
            if not os.path.lexists(hidden / name):
                (folder / name).unlink(missing_ok=True)


def remove(files: Sequence[Path]) -> None:
    """Delete a checkpoint: these files, the primary file last, or a folder. Readers see all of it or nothing.

    The primary file is hidden first: after a kill it proves which of the other files belong to its save.
    """
    primary = files[-1]
    if len(files) == 1 and not primary.is_dir():
        primary.unlink(missing_ok=True)
        return
    hidden = hidden_name(primary)
    if len(files) == 1:
        os.replace(primary, hidden)
        discard(hidden)
        return
    try:
        hidden.mkdir()
    except OSError:  # the disk may be full, and deleting is the cure: unlink the primary file first
        primary.unlink(missing_ok=True)
        sync_folder(primary.parent)
    else:
        os.replace(primary, hidden / primary.name)
    for file in files[:-1]:
        file.unlink(missing_ok=True)
    discard(hidden)


def link_or_copy(files: Sequence[Path], place: Path) -> Path:
    """Put a checkpoint into the folder `place` too, by hard links where possible; return its primary file."""
    primary = files[-1]
    if primary.is_dir():
        with new_folder(place / primary.name) as hidden:
            for path in sorted(primary.rglob("*")):  # a folder comes before its content
                copy = hidden / path.relative_to(primary)
                copy.mkdir() if path.is_dir() else _link_or_copy_file(path, copy)
    elif len(files) == 1:
        temporary = hidden_name(place / primary.name)
        try:
            with naming_path(place / primary.name):
                _link_or_copy_file(primary, temporary)
            reveal(temporary, place / primary.name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(place)
    else:
        with new_group(place, [file.name for file in files]) as hidden:
            for file in files:
                _link_or_copy_file(file, hidden / file.name)
    return place / primary.name


def _link_or_copy_file(source: Path, target: Path) -> None:
    if source.suffix != ".json":  # a user may edit it: copied, so that only one of the two changes
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    with open(source, "rb") as old, written(target) as new:
        shutil.copyfileobj(old, new, CHUNK)


def hidden_name(path: Path) -> Path:
    """Return a new temporary name beside `path`: its name, the process id and eight random digits."""
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{os.urandom(4).hex()}")


def discard(hidden: Path) -> None:
    """Delete a hidden folder or file without following links. On an error it stays for the next clean-up."""
    with contextlib.suppress(OSError):
        if is_real_folder(hidden):
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            hidden.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Raise OSErrors of the block with `path` as their file, also those that a library wrapped in its own error."""
    try:
        yield
    except FileExistsError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def flush_to_disk(descriptor: int) -> None:
    """Return when the file's bytes are on the device. macOS needs F_FULLFSYNC: its fsync stops at the drive's cache."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined]
        return
    os.fsync(descriptor)


def reveal(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, which must not exist; the caller holds the folder's lock."""
    _check_free(path)
    os.replace(temporary, path)


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable. Windows has no such call, and some file systems answer EINVAL."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Without fsync the new name is visible but perhaps not durable: no reason to lose the file.
        if error.errno != errno.EINVAL:
            raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create the folder and its missing parents durably."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)
