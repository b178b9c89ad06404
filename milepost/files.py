"""Atomic, durable writing: write under a temporary dot-name, fsync, reveal by one rename, fsync the folder.

A checkpoint is one file, one folder, or a group of files of which the last, its head, makes it visible.
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

TEMPORARY = ".tmp-"  # nothing that begins so is ever read; what a crash leaves is removed under the folder's lock
CHUNK = 4 * 2**20  # bytes handed to the system at once
BEGINNING = 2**20  # bytes of a file whose hash tells at every load that it is the one of this save
BLOCK = 4096  # what a device that is written past the page cache wants addresses and sizes to be multiples of


class NewFile(io.RawIOBase):
    """A file written once, front to back, past the page cache where the system can.

    A checkpoint is not read again soon: through the cache it would cost a second copy and push out what training needs.
    """

    def __init__(self, path: Path, *, hashed: bool = False) -> None:
        """Creates `path`; raises FileExistsError if it is there. `hashed` keeps the sha256 of what is written."""
        super().__init__()
        self._descriptor, self._direct = _create(path)
        self._buffer, self._filled = mmap.mmap(-1, CHUNK), 0  # memory of its own begins at a block
        self._sha256 = hashlib.sha256() if hashed else None
        self._begins = hashlib.sha256()
        self.size = 0

    @property
    def entry(self) -> dict[str, Any]:
        """Size and sha256 of all that was written, and sha256 of its first BEGINNING bytes, for a manifest."""
        assert self._sha256 is not None
        return {"size": self.size, "sha256": self._sha256.hexdigest(), "begins_sha256": self._begins.hexdigest()}

    def writable(self) -> bool:
        """That it is."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def write(self, data: Any) -> int:
        """Takes all of `data`, any buffer; returns its bytes. Raises OSError if the disk refuses."""
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
                self._stop_direct()  # the end of a file is seldom a whole block
            while len(view):
                view = view[self._hand_over(view) :]
                if self._direct and len(view) % BLOCK:
                    self._stop_direct()  # a short write
        finally:
            view.release()
        self._filled = 0

    def _hand_over(self, view: memoryview) -> int:
        """Bytes that the system took. Some file systems open a file for direct writing and then refuse each such write."""
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
        """Returns when all of it is on the device."""
        self._drain()
        flush_to_disk(self._descriptor)

    def close(self) -> None:
        """Gives the descriptor back; without `finish`, what was last written may be lost."""
        if not self.closed:
            super().close()  # first: a descriptor is gone though its close fails, and its number may soon be another file's
            os.close(self._descriptor)


def _create(path: Path) -> tuple[int, bool]:
    """A descriptor of the new file, and whether its writes go past the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without it; some have made the file by then
                raise
            path.unlink(missing_ok=True)
    return os.open(path, flags, 0o666), False


@contextlib.contextmanager
def written(path: Path, *, hashed: bool = False) -> Iterator[NewFile]:
    """Yields a new file in a folder that nobody sees yet; it is durable when the block ends."""
    with NewFile(path, hashed=hashed) as file:
        yield file
        file.finish()


def write_json(path: Path, values: Any) -> NewFile:
    """Writes `values` as a JSON file that people read too; returns it for its size and sha256."""
    with written(path, hashed=True) as file:
        text = json.dumps(values, allow_nan=False, indent=2, ensure_ascii=False) + "\n"
        file.write(
            text.encode(errors="backslashreplace")
        )  # half a character, as a setting may hold, becomes JSON's own escape
    return file


@contextlib.contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[NewFile]:
    """Yields a file that appears as `path`, whole and durable, when the block ends; on an error nothing appears.

    Raises FileExistsError if `path` is there already: a visible name is never replaced, except with `replace`, which is for
    caches. Raises OSError if the disk refuses.
    """
    temporary = hidden_name(path)
    try:
        with told_by_name(path), written(temporary) as file:
            yield file
        (os.replace if replace else reveal)(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Yields a hidden name for a library that opens its file itself; the file appears as `path` when the block ends, or not at all.

    Raises as `new_file` does.
    """
    hidden = hidden_name(path)
    try:
        with told_by_name(path):
            yield hidden
            with open(hidden, "rb+") as file:
                flush_to_disk(file.fileno())
        reveal(hidden, path)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a hidden folder to write into; it appears as `path`, whole and durable, when the block ends, or not at all.

    Raises as `new_file` does.
    """
    hidden = hidden_name(path)
    try:
        with told_by_name(path):
            hidden.mkdir()
            yield hidden
            for folder in [*(each for each in hidden.rglob("*") if each.is_dir()), hidden]:
                sync_folder(folder)
        reveal(hidden, path)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def new_group(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yields a hidden folder to write files of these `names` into; they appear in `folder` when the block ends, or none does.

    The last name appears last: it is the mark that all are there. Raises as `new_file` does. What a kill leaves visible is removed later
    if the layout's `parts_of` proves by the hidden head that it was of this save.
    """
    hidden, all_free = hidden_name(folder / names[-1]), False
    try:
        with told_by_name(folder / names[-1]):
            hidden.mkdir()
            yield hidden
            sync_folder(hidden)
            for name in names:
                _check_free(folder / name)  # all of them first: a head that is taken would leave the others without one
            all_free = True
            for name in names[:-1]:
                reveal(hidden / name, folder / name)
            sync_folder(folder)  # the others are durable before the head is seen
            reveal(hidden / names[-1], folder / names[-1])
    except BaseException:
        if all_free:
            _take_back(hidden, folder, names)
        discard(hidden)
        raise
    sync_folder(folder)
    discard(hidden)


def _take_back(hidden: Path, folder: Path, names: Sequence[str]) -> None:
    """Removes what is visible of a group whose head is not; its names were free before."""
    if not os.path.lexists(folder / names[-1]):
        for name in names[:-1]:
            if not os.path.lexists(hidden / name):
                (folder / name).unlink(missing_ok=True)


def remove(files: Sequence[Path]) -> None:
    """Removes the checkpoint that consists of these files, its head last of them, or of one folder: at any moment it is whole or gone.

    The head is hidden first: after a kill it proves which of the other files were of its save.
    """
    head = files[-1]
    if len(files) == 1 and not head.is_dir():
        head.unlink(missing_ok=True)
        return
    hidden = hidden_name(head)
    if len(files) == 1:
        os.replace(head, hidden)
        discard(hidden)
        return
    try:
        hidden.mkdir()
    except OSError:  # a full disk, which removing is to help: the head still goes first
        head.unlink(missing_ok=True)
        sync_folder(head.parent)
    else:
        os.replace(head, hidden / head.name)
    for file in files[:-1]:
        file.unlink(missing_ok=True)
    discard(hidden)


def second_name(files: Sequence[Path], place: Path) -> Path:
    """The same checkpoint once more in the folder `place`: tensors are the same bytes where the file system can, else copies.

    Returns its head.
    """
    head = files[-1]
    if head.is_dir():
        with new_folder(place / head.name) as hidden:
            for one in sorted(head.rglob("*")):  # a folder comes before what is in it
                copy = hidden / one.relative_to(head)
                copy.mkdir() if one.is_dir() else _link_or_copy(one, copy)
    elif len(files) == 1:
        temporary = hidden_name(place / head.name)
        try:
            with told_by_name(place / head.name):
                _link_or_copy(head, temporary)
            reveal(temporary, place / head.name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(place)
    else:
        with new_group(place, [file.name for file in files]) as hidden:
            for file in files:
                _link_or_copy(file, hidden / file.name)
    return place / head.name


def _link_or_copy(source: Path, target: Path) -> None:
    if source.suffix != ".json":  # which a hand may edit: in one place, not in both
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    with open(source, "rb") as old, written(target) as new:
        shutil.copyfileobj(old, new, CHUNK)


def hidden_name(path: Path) -> Path:
    """A new temporary name beside `path`: its name, this process's number and eight random digits."""
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{os.urandom(4).hex()}")


def discard(hidden: Path) -> None:
    """Removes a hidden folder or file, following no link. What cannot be removed now is left to the next time."""
    with contextlib.suppress(OSError):
        if is_real_folder(hidden):
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            hidden.unlink(missing_ok=True)


@contextlib.contextmanager
def told_by_name(path: Path) -> Iterator[None]:
    """Names `path` in what the disk refuses, also where the writer hid that behind an error of its own."""
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
    """Returns when the file's bytes are on the device. macOS needs F_FULLFSYNC: its fsync stops at the drive's cache."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined]
        return
    os.fsync(descriptor)


def reveal(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`, which must not exist; the caller holds the folder's lock."""
    _check_free(path)
    os.replace(temporary, path)


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already")


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable. Windows has no such call, and some file systems answer EINVAL."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # The new name is visible but not proved durable: worse than hoped, yet no reason to lose the file.
        if error.errno != errno.EINVAL:
            raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes the folder, and those above it that are missing, so that they outlast a power cut like what is put there."""
    missing = [each for each in (folder, *folder.parents) if not each.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)
