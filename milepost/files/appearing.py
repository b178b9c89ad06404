"""What appears whole or not at all: written under a hidden name and renamed, or in place where nothing can be renamed.

A checkpoint is a file, a folder, or a group of files. The last file of a group, the primary file, makes it visible.

Where the file system cannot rename, files are written under their final names, and a mark beside them says meanwhile
that they are unfinished. Readers refuse what has a mark. The next save deletes what a killed process left under one, if it is
provably a half of a save.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from milepost.files.file_system import (
    RENAME,
    RENAME_FOLDERS,
    RENAME_ONTO,
    TEMPORARY,
    discard,
    hidden_name,
    lacks,
)  # fmt: skip
from milepost.files.reaching import below, moved, remember
from milepost.files.writing import CHUNK, NewFile, sync_file, sync_folder, write_json, written

UNFINISHED = ".unfinished"  # the end of a mark's name


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
        sync_file(hidden)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder; it appears as `path`, complete and durable, when the block ends, or not at all.

    Raise as `new_file` does.
    """
    with _appearing(path, folder=True) as hidden:
        hidden.mkdir()
        yield hidden
        for folder in [*(path for path in hidden.rglob("*") if path.is_dir()), hidden]:
            sync_folder(folder)


@contextlib.contextmanager
def _appearing(path: Path, *, replace: bool = False, folder: bool = False) -> Iterator[Path]:
    """Yield a hidden name. What has it when the block ends appears as `path`; on an error it is deleted."""
    lacking = lacks(path.parent)
    if replace and {RENAME, RENAME_ONTO} & lacking:
        path.unlink(missing_ok=True)
    if RENAME in lacking or (folder and RENAME_FOLDERS in lacking):
        with _in_place([path]):
            yield path
        return
    hidden = hidden_name(path)
    try:
        with naming_path(path):
            yield hidden
        (_replace if replace else reveal)(hidden, path)
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
    if RENAME in lacks(folder):
        with _in_place([folder / name for name in names]):
            yield folder
        return
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


# ---------------------------------------------------------------------------------------------------------------------
# In place.


def mark_of(path: Path) -> Path:
    """Return the name of the mark that says that `path` is unfinished."""
    return path.with_name(f"{TEMPORARY}{path.name}{UNFINISHED}")


def is_unfinished(path: Path) -> bool:
    """Whether `path` is being written in place, or was when its writer was killed."""
    return os.path.lexists(mark_of(path))


@contextlib.contextmanager
def _in_place(paths: Sequence[Path]) -> Iterator[None]:
    """Mark these paths, the primary one last, as unfinished while the block writes them; on an error, delete them."""
    for path in paths:
        _check_free(path)
    try:
        with naming_path(paths[-1]):
            _mark(paths)
            yield
    except FileExistsError:  # another process was faster: the file is not ours
        raise
    except BaseException:
        _delete_marked(paths)
        raise
    mark_of(paths[-1]).unlink()
    for path in paths:
        remember(path)
    sync_folder(paths[-1].parent)


def _mark(paths: Sequence[Path]) -> None:
    mark = mark_of(paths[-1])
    mark.unlink(missing_ok=True)
    write_json(mark, {"process": os.getpid(), "names": [path.name for path in paths]})


def _delete_marked(paths: Sequence[Path]) -> None:
    for path in reversed(paths):  # without its primary file a group is not visible
        discard(path)
    if not any(map(os.path.lexists, paths)):
        discard(mark_of(paths[-1]))


def unfinished(mark: Path) -> tuple[int, list[Path]] | None:
    """Return the process that wrote a mark, and the paths that it marks; None if the mark itself is incomplete.

    It may come from another person: what it names is for the caller to prove.
    """
    try:
        values = json.loads(mark.read_bytes())
        process, names = values["process"], values["names"]
        if type(process) is not int or not names or any(Path(name).name != name for name in names):
            return None
        paths = [mark.with_name(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return (process, paths) if mark_of(paths[-1]) == mark else None


def delete_marked(paths: Sequence[Path]) -> None:
    """Delete these paths, the primary one last in the list, so that a kill leaves no half without a mark.

    The caller holds the folder's lock.
    """
    with contextlib.suppress(OSError):  # the disk may be full, and deleting is the cure
        _mark(paths)
    _delete_marked(paths)


# ---------------------------------------------------------------------------------------------------------------------
# Delete, link and copy.


def remove(files: Sequence[Path]) -> None:
    """Delete a checkpoint: these files, the primary file last, or a folder. Readers see all of it or nothing.

    The primary file is hidden first: after a kill it proves which of the other files belong to its save.
    """
    if not files:  # somebody else was faster
        return
    primary, lacking = files[-1], lacks(files[-1].parent)
    if len(files) == 1 and not primary.is_dir():
        primary.unlink(missing_ok=True)
        return
    if RENAME in lacking or (len(files) == 1 and RENAME_FOLDERS in lacking):
        delete_marked(files)
        return
    hidden = hidden_name(primary)
    if len(files) == 1:
        os.replace(primary, hidden)
        moved(primary, hidden)
        discard(hidden)
        return
    try:
        hidden.mkdir()
    except OSError:  # the disk may be full, and deleting is the cure: unlink the primary file first
        primary.unlink(missing_ok=True)
        sync_folder(primary.parent)
    else:
        os.replace(primary, hidden / primary.name)
        moved(primary, hidden / primary.name)
    for file in files[:-1]:
        file.unlink(missing_ok=True)
    discard(hidden)


def link_or_copy(files: Sequence[Path], place: Path) -> Path:
    """Put a checkpoint into the folder `place` too, by hard links where possible; return its primary file.

    Raise OSError on a write error, or if no file is left of it.
    """
    if not files:
        raise FileNotFoundError(errno.ENOENT, "its files are gone", str(place))
    primary = files[-1]
    if primary.is_dir():
        with new_folder(place / primary.name) as hidden:
            for path in below(primary):
                copy = hidden / path.relative_to(primary)
                copy.mkdir() if path.is_dir() else _link_or_copy_file(path, copy)
    elif len(files) == 1:
        with _appearing(place / primary.name) as hidden:
            _link_or_copy_file(primary, hidden)
    else:
        with new_group(place, [file.name for file in files]) as hidden:
            for file in files:
                _link_or_copy_file(file, hidden / file.name)
    return place / primary.name


def _link_or_copy_file(source: Path, target: Path) -> None:
    if source.suffix != ".json":  # a user may edit it: copied, so that only one of the two changes
        with contextlib.suppress(OSError):
            os.link(source, target)
            remember(target)
            return
    with open(source, "rb") as old, written(target) as new:
        shutil.copyfileobj(old, new, CHUNK)


# ---------------------------------------------------------------------------------------------------------------------


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


def reveal(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, which must not exist; the caller holds the folder's lock."""
    _check_free(path)
    os.replace(temporary, path)
    moved(temporary, path)


def _replace(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    moved(temporary, path)


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already")
