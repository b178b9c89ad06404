"""Token ids in .npy files: a memory map, or where the folder of the file may go away, slices that are read when they are used.

A page of a map that cannot be read ends the process with SIGBUS.
"""

import os
import time
from pathlib import Path
from typing import IO, Any

import numpy as np

from milepost.files import in_words, is_unreachable, may_go_away, steadily
from milepost.text.errors import DataError

PATIENCE = 120.0  # seconds to wait for a folder that is away
PAUSE = 1.0  # between the attempts
HERE = "resume when its folder is back, or keep the cache on a disk of this computer (XDG_CACHE_HOME)"


class ReadArray:
    """A one-dimensional array in a file. Each slice is read from it, after a wait while its folder does not answer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
            shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
            self.offset = file.tell()
        (self._count,) = shape
        self.ndim, self.nbytes = 1, self._count * self.dtype.itemsize

    def __len__(self) -> int:
        """Return the number of elements."""
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return consecutive elements. Raise DataError if the folder does not come back, or the file was cut off."""
        start, stop, step = part.indices(self._count)
        size = max(0, stop - start) * self.dtype.itemsize
        data = self._patiently(self.offset + start * self.dtype.itemsize, size)
        if len(data) < size:
            raise DataError(f"{self._path}: is shorter than it was at the start: start again, and it is built anew")
        return np.frombuffer(data, self.dtype)[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all elements, as numpy asks for them."""
        return np.asarray(self[:], dtype)

    def _patiently(self, at: int, size: int) -> bytes:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return steadily(lambda: self._read(at, size))
            except OSError as error:
                if not _is_away(error) or time.monotonic() >= until:
                    raise DataError(f"{self._path}: the tokens cannot be read ({in_words(error)}): {HERE}") from error
            time.sleep(PAUSE)

    def _read(self, at: int, size: int) -> bytes:
        """Read from the open file; after an error from one that is opened anew, because the old one stays dead."""
        if self._file is None:
            self._file = open(self._path, "rb")  # noqa: SIM115  (it stays open)
        try:
            self._file.seek(at)
            return self._file.read(size)
        except OSError:
            file, self._file = self._file, None
            file.close()
            raise


def _is_away(error: OSError) -> bool:
    """Whether a file that was there may come back: where nothing is mounted for a while, its folder is empty."""
    return is_unreachable(error) or isinstance(error, FileNotFoundError)


Tokens = np.ndarray | ReadArray


def opened(path: Path) -> Tokens:
    """Return the array in a file of `write_array`, of which no page need stay in memory. Raise ValueError for another size."""
    array: Any = ReadArray(path) if may_go_away(path) else np.load(path, mmap_mode="r")
    if os.path.getsize(path) != array.offset + array.nbytes:
        raise ValueError("the file is longer or shorter than its array")
    return array  # type: ignore[no-any-return]


def plain(tokens: Tokens) -> Tokens:
    """Return a map as an ordinary array: slicing a memmap costs several times more."""
    return tokens if isinstance(tokens, ReadArray) else np.asarray(tokens)
