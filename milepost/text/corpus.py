"""Where training text comes from: a source string names files, and files are read as pieces of documents."""

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.text.download import DOWNLOAD_LIMIT, fetch, open_https, tiny_shakespeare
from milepost.text.errors import DataError
from milepost.text.readers import READERS, SUPPORTED, Piece, listed, suffix_of


@dataclass(frozen=True)
class Corpus:
    """The files of a text: `source` as the user wrote it, `name` safe for file names, `paths` in order."""

    source: str
    name: str
    paths: tuple[Path, ...]

    def pieces(self) -> Iterator[Piece]:
        """Yield all text in order, as pieces. Raise DataError naming file and position where a file cannot be read."""
        for path in self.paths:
            yield from READERS[suffix_of(path.name)](path)


def open_corpus(
    source: str,
    *,
    data_dir: Path,
    cache_dir: Path | None = None,
    max_download_bytes: int = DOWNLOAD_LIMIT,
    open_url: Callable[[str], Any] = open_https,
) -> Corpus:
    """Return the corpus that `source` names: a file, folder, glob, https URL or `tinyshakespeare`, or several joined by commas.

    Downloads are cached in `cache_dir/downloads/`, by default below `data_dir/.cache`. `open_url` opens a URL for reading. Raise DataError if a part of the
    source does not exist.
    """
    whole = os.path.lexists(os.path.expanduser(source))  # a file name may contain a comma
    parts = [source] if whole else [part.strip() for part in source.split(",") if part.strip()]
    paths: list[Path] = []
    for part in parts:
        if part == "tinyshakespeare":
            paths.append(tiny_shakespeare(data_dir, cache_dir=cache_dir, open_url=open_url))
        elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", part):
            paths.append(
                fetch(part, data_dir=data_dir, cache_dir=cache_dir, max_bytes=max_download_bytes, open_url=open_url)
            )
        else:
            paths.extend(_local(part))
    if not paths:
        raise DataError(f"the data source {source!r} names nothing: expected a file, folder, glob or https URL")
    name = "_".join(_stem(part) for part in parts)[:40].strip("_")
    return Corpus(source=source, name=name, paths=tuple(paths))


def _stem(part: str) -> str:
    """Return a part of a source as [a-z0-9_]: the file's name without suffix, else the folder's name."""
    path = Path(re.split("[?#]", part)[0] if "://" in part else os.path.abspath(os.path.expanduser(part)))
    base = path.name.lower().removesuffix(".gz")
    base = os.path.splitext(base)[0] if suffix_of(base) in READERS else base
    words = (re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_") for word in (base, path.parent.name))
    return next(filter(None, words), "text")


def _local(part: str) -> list[Path]:
    """Return the files of a path or glob, in a fixed order."""
    path = os.path.expanduser(part)
    if os.path.isdir(path):
        return _in_folder(Path(path))
    if os.path.isfile(path):
        if suffix_of(path) not in READERS:
            raise DataError(f"{part}: unsupported file type: expected {SUPPORTED}")
        return [Path(path)]
    if os.path.exists(path):
        raise DataError(f"{part} is neither a file nor a folder")
    if glob.has_magic(path):
        return _matching(path)
    raise DataError(f"{part} does not exist: {_nearest(path)}")


def _in_folder(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and suffix_of(path.name) in READERS]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not found:
        raise DataError(f"{folder} has no supported file: expected {SUPPORTED}; {_nearest(str(folder / '*'))}")
    return found


def _matching(pattern: str) -> list[Path]:
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(match)]
    found = [path for path in matches if suffix_of(path.name) in READERS]
    if not found and matches:
        raise DataError(f"{pattern}: no matching file has a supported type: expected {SUPPORTED}")
    if not found:
        raise DataError(f"no file matches {pattern}: {_nearest(pattern)}")
    return found


def _nearest(path: str) -> str:
    """Return a listing of the nearest existing folder above `path`."""
    folder = next(parent for parent in Path(os.path.abspath(path)).parents if parent.is_dir())
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        return f"{folder} holds {listed(names)}"
    return f"{folder} cannot be listed"
