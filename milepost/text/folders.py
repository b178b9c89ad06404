"""The files of a path, folder or glob, in a fixed order, and what is left out of them, in words."""

import contextlib
import functools
import glob
import importlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from milepost.text.blocks import decoded
from milepost.text.errors import DataError
from milepost.text.prepared import is_prepared
from milepost.text.readers import (
    CODE,
    READERS,
    SUPPORTED,
    VERBATIM,
    Reading,
    is_first_type,
    listed,
    suffix_of,
    unpacked_name,
)

IGNORE = ".gitignore"
# Of the datasets library (save_to_disk): a data set's splits, each in a folder of its name, and the files of the rows of one.
SPLITS, STATE, JSON_LIMIT = "dataset_dict.json", "state.json", 1 << 20
INDICES = ("_indices_files", "_indices_data_files")  # of versions before 2.0: which of the rows are meant
CODE_LIMIT = 1 << 20  # bytes; longer files of source code are generated
AMONG_CODE = (*CODE, ".md", ".txt")  # what is read of a folder of source code

Found = tuple[list[Path], list[str]]  # files, and lines on what is left out


def files_of(place: str, reading: Reading) -> Found:
    """Return the files of a path or glob. Raise DataError if there are none that can be read."""
    path = os.path.expanduser(place)
    if os.path.isdir(path):
        return _in_folder(place, Path(path), reading)
    if os.path.isfile(path):
        if suffix_of(path) not in (VERBATIM if reading.verbatim else READERS) and not is_prepared(path):
            raise DataError(
                f"{place}: unsupported file type: expected {SUPPORTED}, source code, or .bin of nanoGPT or llm.c"
            )
        return [Path(path)], []
    if os.path.exists(path):
        raise DataError(f"{place} is neither a file nor a folder")
    if glob.has_magic(path):
        return _matching(place, path, reading)
    raise DataError(f"{place} does not exist: {_nearest(path)}")


def _in_folder(place: str, folder: Path, reading: Reading) -> Found:
    files, links = _visible(folder)
    rest = _beside_saved_rows(files)
    found, others = _by_type([path for path in files if path not in rest], reading)
    others += sorted(rest)
    if not found:
        raise DataError(f"{folder} has no supported file: expected {SUPPORTED}; {_nearest(str(folder / '*'))}")
    return found, [*_skipped(place, others), *_not_followed(place, links, "link", "name what it points to")]


def _beside_saved_rows(files: list[Path]) -> set[Path]:
    """Return what the datasets library keeps beside the rows of a data set that it saved (save_to_disk): its state and caches.

    Raise DataError for a folder of several splits, which are not to be trained on together.
    """
    rest: set[Path] = set()
    for path in files:
        if path.name == SPLITS and (names := _json_member(path, "splits")):
            splits = list(map(str, names))
            remedy = f"name the folder of one, such as {path.parent / splits[0]}"
            raise DataError(f"{path.parent} holds the splits {listed(splits)} of a data set: {remedy}")
        if path.name == STATE and any(_json_member(path, name) for name in INDICES):
            remedy = "save it again with a newer version of the datasets library"
            raise DataError(
                f"{path.parent}: its rows are those that another file selects, as old versions saved it: {remedy}"
            )
        if path.name == STATE and (rows := _json_member(path, "_data_files")):
            named = {path.parent / str(each.get("filename")) for each in rows if isinstance(each, dict)}
            rest |= {other for other in files if other.parent == path.parent and other not in named}
    return rest


def _json_member(path: Path, name: str) -> list[Any]:
    """Return the list under a name in a JSON file of at most JSON_LIMIT bytes; empty if there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_bytes()) if path.stat().st_size <= JSON_LIMIT else {}
        found = values.get(name) if isinstance(values, dict) else None
        return found if isinstance(found, list) else []
    return []


def _visible(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files below a folder, in order, and the links there that lead to a folder or to nothing.

    Raise DataError if a folder in it cannot be listed: its files would be missing from the text.
    """
    files: list[Path] = []
    links: list[Path] = []
    try:
        for place, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            there = [Path(place, name) for name in (*folders, *names) if not name.startswith(".")]
            files += [path for path in there if path.is_file()]
            links += [path for path in there if path.is_symlink() and not path.is_file()]
    except OSError as error:
        problem = f"{error.filename or folder} cannot be read ({error.strerror or error})"
        raise DataError(f"{problem}: allow that, or name the files to read") from error
    return sorted(files), sorted(links)


def _raise(error: OSError) -> None:
    raise error


def _matching(place: str, pattern: str, reading: Reading) -> Found:
    every = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    matches = [path for path in every if path.is_file()]
    folders = [] if "**" in pattern else [path for path in every if path.is_dir()]
    if suffix_of(pattern) in CODE and not reading.verbatim:  # a glob that names the type
        return _of_code(place, [path for path in matches if suffix_of(path.name) in CODE])
    if is_prepared(pattern):
        return matches, []
    found, others = _by_type(matches, reading)
    if not found and matches:
        raise DataError(f"{pattern}: no matching file has a supported type: expected {SUPPORTED}")
    if not found:
        raise DataError(f"no file matches {pattern}: {_nearest(pattern)}")
    return found, [*_skipped(place, others), *_not_followed(place, folders, "folder", "name it too")]


def _by_type(paths: list[Path], reading: Reading) -> tuple[list[Path], list[Path]]:
    """Return the files that a folder or glob is read from, and the others."""

    def is_read(path: Path) -> bool:
        if reading.verbatim or reading.first_types:
            return is_first_type(path.name) and (not reading.verbatim or suffix_of(path.name) in VERBATIM)
        return suffix_of(path.name) in READERS and suffix_of(path.name) not in CODE

    return list(filter(is_read, paths)), list(itertools.filterfalse(is_read, paths))


def _skipped(place: str, paths: Iterable[Path]) -> list[str]:
    """Return a line on the files of a folder or glob that are not read: their number and their suffixes."""
    kinds = Counter(os.path.splitext(path.name)[1].lower() or "no suffix" for path in paths)
    if not kinds:
        return []
    common = listed([kind for kind, _ in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))])
    count = kinds.total()
    return [f"{place}: {count} file{'s' * (count > 1)} skipped: {common}"]


def _not_followed(place: str, paths: list[Path], kind: str, remedy: str) -> list[str]:
    """Return a line on links in a folder, or on folders among the matches of a glob, which are not read."""
    if not paths:
        return []
    names = listed([path.name for path in paths])
    return [f"{place}: {len(paths)} {kind}{'s' * (len(paths) > 1)} not read: {names}; to read one, {remedy}"]


def repeated(paths: Iterable[Path]) -> list[str]:
    """Return lines on files that are read twice, and on those that stand beside their packed copy."""
    places: dict[str, list[Path]] = {}
    for path in paths:
        places.setdefault(os.path.realpath(path), []).append(path)
    texts: dict[Path, list[str]] = {}
    for place in map(Path, places):
        texts.setdefault(place.with_name(unpacked_name(place.name)), []).append(place.name)
    twice = [str(same[0]) for same in places.values() if len(same) > 1]
    copies = [
        f"{name.parent}: {' and '.join(names)}" for name, names in texts.items() if len({*map(str.lower, names)}) > 1
    ]
    lines = [f"read more than once: {listed(twice)}"] * bool(twice)
    return lines + [f"read one after the other, though they may be the same text: {listed(copies)}"] * bool(copies)


def _nearest(path: str) -> str:
    """Return a listing of the nearest existing folder above `path`."""
    folder = next(parent for parent in Path(os.path.abspath(path)).parents if parent.is_dir())
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        return f"{folder} holds {listed(names)}"
    return f"{folder} cannot be listed"


# Source code


def code_in(place: str) -> Found:
    """Return the source code of a folder with its .md and .txt files, without what its .gitignore files leave out."""
    folder = Path(os.path.expanduser(place))
    if not folder.is_dir():
        raise DataError(f"{place} is not a folder: expected one with source code, {_nearest(str(folder))}")
    every, _ = _visible(folder)
    files = [path for path in every if suffix_of(path.name) in AMONG_CODE]
    ignored = _ignored(files, folder)
    found, notes = _of_code(place, [path for path in files if path not in ignored], ignored=len(ignored))
    return found, [*notes, *_skipped(place, [path for path in every if suffix_of(path.name) not in AMONG_CODE])]


def _of_code(place: str, files: list[Path], *, ignored: int = 0) -> Found:
    """Return those of `files` that are text of a usual length, and a line on the others. Raise DataError if there are none."""
    large = {path for path in files if path.stat().st_size > CODE_LIMIT}
    binary = {path for path in files if path not in large and not _is_text(path)}
    counts = {f"in {IGNORE}": ignored, f"above {CODE_LIMIT:,} bytes": len(large), "not text": len(binary)}
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    found = [path for path in files if path not in large | binary]
    if not found:
        raise DataError(
            f"{place} has no source code{f' ({reasons})' * bool(reasons)}: expected {', '.join(AMONG_CODE)}"
        )
    left_out = f"; left out: {reasons}" if reasons else ""
    return found, [f"{place}: {len(found)} files of source code{left_out}"]


def _is_text(path: Path) -> bool:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return "\0" not in decoded(path.read_bytes())
    return False


def _ignored(files: list[Path], folder: Path) -> set[Path]:
    """Return the files that .gitignore files leave out: those from the top of the repository down, of which the deepest decides.

    As git does, nothing below a folder that is left out comes back. A folder that is left out itself, and named all the same, is
    read by the .gitignore files in it.
    """
    start = folder.resolve()
    top = next((place for place in (start, *start.parents) if (place / ".git").exists()), start)

    @functools.cache
    def rules_in(place: Path) -> Any:
        return _rules(place / IGNORE) if (place / IGNORE).is_file() else None

    def verdict(path: Path, end: str, top: Path) -> bool:
        for place in path.parents if path != top else ():
            rules = rules_in(place)
            found = rules.check_file(path.relative_to(place).as_posix() + end).include if rules else None
            if found is not None or place == top:
                return bool(found)
        return False

    if verdict(start, "/", top):
        top = start

    @functools.cache
    def is_ignored(path: Path, end: str) -> bool:
        return (path.parent != start and is_ignored(path.parent, "/")) or verdict(path, end, top)

    return {path for path in files if is_ignored(start / path.relative_to(folder), "")}


def _rules(path: Path) -> Any:
    """Return the patterns of a .gitignore. Raise DataError if pathspec, which reads them, is not installed."""
    try:
        spec = importlib.import_module("pathspec").GitIgnoreSpec
    except ImportError as error:
        raise DataError(f"{path} is read with pathspec, which is not installed: pip install pathspec") from error
    return spec.from_lines(path.read_text(encoding="utf-8", errors="replace").splitlines())
