"""Where training text comes from: a source string names files, and files are read as pieces of documents."""

import contextlib
import dataclasses
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.text.addresses import masked
from milepost.text.conversations import Talk, as_pieces, conversations, described, form_of
from milepost.text.download import DOWNLOAD_LIMIT, fetch, open_https, tiny_shakespeare
from milepost.text.errors import DataError
from milepost.text.readers import (
    PLAIN,
    READERS,
    SUPPORTED,
    VERBATIM,
    Piece,
    Reading,
    is_first_type,
    listed,
    suffix_of,
    unpacked_name,
)


@dataclass(frozen=True)
class Corpus:
    """The files of a text: `source` as the user wrote it, without passwords, `name` safe for file names, `paths` in order.

    `reading` is how they are read, `skipped` tells which files of folders and globs have an unsupported type.
    """

    source: str
    name: str
    paths: tuple[Path, ...]
    reading: Reading = PLAIN
    skipped: tuple[str, ...] = ()

    def pieces(self, note: Callable[[str], None] = lambda _: None) -> Iterator[Piece]:
        """Yield all text in order, as pieces; remarks on files go to `note`.

        Raise DataError naming file and position where a file cannot be read.
        """
        reading = dataclasses.replace(self.reading, note=note)
        if reading.form:
            note(f"{self.source}: {described(reading.form, reading)}")
            yield from as_pieces(self.conversations())
            return
        for path in self.paths:
            yield from READERS[suffix_of(path.name)](path, reading)

    def conversations(self) -> Iterator[tuple[str, Talk]]:
        """Yield all conversations in order, each with its file and row. Raise DataError as `pieces` does."""
        for path in self.paths:
            yield from conversations(path, self.reading)


def open_corpus(
    source: str,
    *,
    data_dir: Path,
    cache_dir: Path | None = None,
    reading: Reading = PLAIN,
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
    skipped: list[str] = []
    for part in parts:
        if part == "tinyshakespeare":
            paths.append(tiny_shakespeare(data_dir, cache_dir=cache_dir, open_url=open_url))
        elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", part):
            paths.append(
                fetch(part, data_dir=data_dir, cache_dir=cache_dir, max_bytes=max_download_bytes, open_url=open_url)
            )
        else:
            found, others = _local(part, reading)
            paths.extend(found)
            skipped.extend(_skipped(part, others))
    if not paths:
        raise DataError(f"the data source {source!r} names nothing: expected a file, folder, glob or https URL")
    name = "_".join(map(_stem, map(masked, parts)))[:40].strip("_")
    shown = source if whole else masked(source)
    reading = dataclasses.replace(reading, form=form_of(paths, reading))
    return Corpus(source=shown, name=name, paths=tuple(paths), reading=reading, skipped=tuple(skipped))


def _skipped(part: str, paths: list[Path]) -> list[str]:
    """Return a line on the files of a folder or glob that are not read: their number and their suffixes."""
    kinds = Counter(os.path.splitext(path.name)[1].lower() or "no suffix" for path in paths)
    if not kinds:
        return []
    common = listed([kind for kind, _ in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))])
    return [f"{part}: {len(paths)} file{'s' * (len(paths) > 1)} skipped: {common}"]


def _stem(part: str) -> str:
    """Return a part of a source as [a-z0-9_]: the file's name without suffix, else the folder's name."""
    path = Path(re.split("[?#]", part)[0] if "://" in part else os.path.abspath(os.path.expanduser(part)))
    base = unpacked_name(path.name)
    base = os.path.splitext(base)[0] if suffix_of(base) in READERS else base
    words = (re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_") for word in (base, path.parent.name))
    return next(filter(None, words), "text")


def _local(part: str, reading: Reading) -> tuple[list[Path], list[Path]]:
    """Return the files of a path or glob, in a fixed order, and those of an unsupported type."""
    path = os.path.expanduser(part)
    if os.path.isdir(path):
        return _in_folder(Path(path), reading)
    if os.path.isfile(path):
        if suffix_of(path) not in (VERBATIM if reading.verbatim else READERS):
            raise DataError(f"{part}: unsupported file type: expected {SUPPORTED}")
        return [Path(path)], []
    if os.path.exists(path):
        raise DataError(f"{part} is neither a file nor a folder")
    if glob.has_magic(path):
        return _matching(path, reading)
    raise DataError(f"{part} does not exist: {_nearest(path)}")


def _in_folder(folder: Path, reading: Reading) -> tuple[list[Path], list[Path]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    found, others = _by_type(files, reading)
    if not found:
        raise DataError(f"{folder} has no supported file: expected {SUPPORTED}; {_nearest(str(folder / '*'))}")
    return found, others


def _matching(pattern: str, reading: Reading) -> tuple[list[Path], list[Path]]:
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(match)]
    found, others = _by_type(matches, reading)
    if not found and matches:
        raise DataError(f"{pattern}: no matching file has a supported type: expected {SUPPORTED}")
    if not found:
        raise DataError(f"no file matches {pattern}: {_nearest(pattern)}")
    return found, others


def _by_type(paths: list[Path], reading: Reading) -> tuple[list[Path], list[Path]]:
    """Return the files that a folder or glob is read from, and the others."""

    def is_read(path: Path) -> bool:
        if reading.verbatim or reading.first_types:
            return is_first_type(path.name) and (not reading.verbatim or suffix_of(path.name) in VERBATIM)
        return suffix_of(path.name) in READERS

    return list(filter(is_read, paths)), list(itertools.filterfalse(is_read, paths))


def _nearest(path: str) -> str:
    """Return a listing of the nearest existing folder above `path`."""
    folder = next(parent for parent in Path(os.path.abspath(path)).parents if parent.is_dir())
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        return f"{folder} holds {listed(names)}"
    return f"{folder} cannot be listed"
