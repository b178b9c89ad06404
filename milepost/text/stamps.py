"""Remember what was computed from files, so that unchanged files are not read again.

A file counts as unchanged if path, size, mtime, ctime and the hash of its first and last 64 KiB are equal. If a file was
modified less than two seconds before it was read, a later edit may carry the same times, so it is read again. An edit that
keeps the size and restores the mtime still changes the ctime, which no program can set. Windows has no ctime: there such an
edit is noticed only within the first or last 64 KiB.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from milepost.files import new_file

EDGE = 1 << 16  # bytes at the start and at the end of a file that are compared
RECENT = 2 * 10**9  # nanoseconds: the coarsest time stamps of a file system in use (FAT)

Json = Any


def file_sha256(path: Path) -> str:
    """Return the sha256 of a whole file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered(
    what: str,
    paths: Sequence[Path],
    folder: Path,
    compute: Callable[[], Json],
    *,
    now: Callable[[], int] = time.time_ns,
) -> Json:
    """Return `compute()`, a JSON value of the contents of `paths`, or its recorded value if the files are unchanged.

    The record is a file in `folder`. A record that is damaged or cannot be written costs only time.
    """
    record, started, before = _record(what, paths, folder), now(), _stamps(paths)
    saved = _read(record)
    if saved is not None and before is not None and saved["files"] == before and not _recent(before, saved["read_at"]):
        return saved["value"]
    value = compute()
    if before is not None and _stamps(paths) == before:
        _write(record, {"files": before, "read_at": started, "value": value})
    return value


def in_both(paths: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    """Return those of `paths` that are among the others, or copies of them: equal in size and in their first and last 64 KiB."""
    found = {_contents(stamp) for stamp in _stamps(others) or ()}
    return [path for path, stamp in zip(paths, _stamps(paths) or (), strict=False) if _contents(stamp) in found]


def _contents(stamp: dict[str, Json]) -> tuple[Json, Json]:
    return stamp["bytes"], stamp["edges_sha256"]


def forget(what: str, paths: Sequence[Path], folder: Path) -> None:
    """Delete the record, because it turned out to be wrong."""
    with contextlib.suppress(OSError):
        _record(what, paths, folder).unlink()


def _record(what: str, paths: Sequence[Path], folder: Path) -> Path:
    names = "\0".join(os.path.abspath(path) for path in paths)
    return folder / f"{what}-{hashlib.sha256(os.fsencode(names)).hexdigest()[:32]}.json"


def _stamps(paths: Sequence[Path]) -> list[dict[str, Json]] | None:
    """Return the stamp of each file; None if one cannot be read, which `compute` reports better."""
    try:
        return [_stamp(path) for path in paths]
    except OSError:
        return None


def _stamp(path: Path) -> dict[str, Json]:
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        edges = hashlib.sha256(file.read(EDGE))
        file.seek(max(EDGE, status.st_size - EDGE))
        edges.update(file.read(EDGE))
    return {
        "path": os.path.abspath(path),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "edges_sha256": edges.hexdigest(),
    }


def _recent(stamps: list[dict[str, Json]], read_at: int) -> bool:
    """Whether a file was modified so shortly before it was read that its times do not tell it from a later edit."""
    return any(max(stamp["mtime_ns"], stamp["ctime_ns"]) + RECENT >= read_at for stamp in stamps)


def _read(record: Path) -> dict[str, Json] | None:
    """Return the recorded values; None if there are none or their checksum is wrong."""
    try:
        values = json.loads(record.read_bytes())
        return values["record"] if values["sha256"] == _digest(values["record"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(record: Path, values: dict[str, Json]) -> None:
    with contextlib.suppress(OSError):  # a read-only checkout, a full disk
        record.parent.mkdir(parents=True, exist_ok=True)
        with new_file(record, replace=True) as file:
            file.write(json.dumps({"record": values, "sha256": _digest(values)}).encode())


def _digest(values: Json) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
