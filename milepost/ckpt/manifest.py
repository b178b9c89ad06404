"""JSON files beside tensors, read defensively; and the manifest, which is written last and lists the files of a
checkpoint.

A manifest carries the record's metadata, size and sha256 of every file, and the optimizer's param_groups.
"""

import errno
import fnmatch
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from milepost.ckpt import strict_json
from milepost.ckpt.record import EARLIER, Checkpoint, CheckpointError, Json, Kind, check_metadata, metadata
from milepost.files import (
    BEGINNING,
    UNREACHABLE,
    NewFile,
    is_unfinished,
    is_unreachable,
    open_steadily,
    read_steadily,
    steadily,
    write_json,
)  # fmt: skip

JSON_LIMIT = 16 * 2**20  # bytes; a 50,000-token BPE vocabulary takes about 3 MB
PARTS_LIMIT = 1_000_000  # values in a file; such a vocabulary has 200,000. An object of 8 bytes takes 200 in memory


REMEDIES: dict[object, str] = {  # by the errno of what is not the file's fault
    errno.ENOMEM: "free memory, or raise the limit of this process (ulimit -v)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
}
AWAY = "try again when its folder answers; nothing is known of its bytes"  # the remedy for what is unreachable


def is_regular(path: Path) -> bool:
    """Whether `path` is a regular file. Never open anything else: reading a pipe or a device could block forever.

    Raise CheckpointError if it does not answer, which is not the same as being missing.
    """
    try:
        return stat.S_ISREG(steadily(path.stat).st_mode)
    except (OSError, ValueError) as error:
        if is_unreachable(error):
            raise unreadable(path, error) from error
        return False


def read_json(path: Path) -> dict[str, Json]:
    """Return the object in a JSON file.

    Raises CheckpointError if there is no such file, or it is too large, malformed or not an object, or repeats a name.
    """
    if not is_regular(path):
        if os.path.lexists(path):
            raise CheckpointError(path, "is not a regular file, expected JSON", kind="not understood")
        raise CheckpointError(path, "is missing, expected JSON", EARLIER, kind="not found")
    try:
        if steadily(path.stat).st_size > JSON_LIMIT:
            problem = f"is larger than {JSON_LIMIT} bytes, expected a small JSON file"
            raise CheckpointError(path, problem, kind="not understood")
        return parse_json(read_steadily(path), path)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    """Return the error for a file that exists but that the system does not let us read."""
    reason, code = getattr(error, "strerror", None) or error, getattr(error, "errno", None)
    if is_unreachable(error):
        return CheckpointError(path, f"could not be read ({reason})", AWAY, kind="unreachable")
    if code == errno.ENOENT and path.is_symlink():
        return CheckpointError(
            path,
            f"is a link to {os.readlink(path)}, which is missing",
            "restore that file, or delete the link",
            kind="not found",
        )
    kind: Kind = "lacking" if code in REMEDIES else "damaged"
    return CheckpointError(path, f"cannot be read ({reason})", REMEDIES.get(code, "check its disk"), kind=kind)


def unreachable_behind(error: Exception) -> OSError | None:
    """Return the error of a folder that does not answer, also one that a library put into words of its own."""
    if is_unreachable(error):
        return error  # type: ignore[return-value]
    found = (code for code in UNREACHABLE if os.strerror(code) in str(error))
    return next((OSError(code, os.strerror(code)) for code in found), None)


def check_finished(path: Path) -> None:
    """Raise CheckpointError if the checkpoint at `path` is being written in place, or was when its writer was killed."""
    if is_unfinished(path):
        problem = "is unfinished: it is being saved, or its save was killed"
        raise CheckpointError(path, problem, EARLIER, kind="lacking")


def refuse_pointer(begin: bytes, where: Path | str) -> None:
    """Raise CheckpointError if a file begins as what git keeps in place of a large file."""
    if begin.startswith(b"version https://git-lfs"):
        problem = "is a git-lfs pointer, not the file itself"
        raise CheckpointError(where, problem, "run `git lfs pull` in its folder, or download it again", kind="lacking")


def parse_json(data: bytes, where: Path | str, *, part: str = "") -> dict[str, Json]:
    """Return the object in JSON text, which is all of the file `where` or its `part`; raise as `read_json` does."""
    prefix = f"{part}: " if part else ""
    refuse_pointer(data[:32], where)
    if sum(map(data.count, (b",", b"[", b"{"))) > PARTS_LIMIT:
        problem = f"{prefix}has more than {PARTS_LIMIT} values, expected a small JSON file"
        raise CheckpointError(where, problem, kind="not understood")
    try:
        values = strict_json.loads(data)
    except (ValueError, RecursionError) as error:
        problem = f"{prefix}is damaged: not valid JSON ({str(error) or 'nested too deep':.120})"
        raise CheckpointError(where, problem, EARLIER, kind="damaged") from error
    if not isinstance(values, dict):
        problem = f"{prefix}holds {type(values).__name__}, expected an object"
        raise CheckpointError(where, problem, kind="not understood")
    return values


def plain_metadata(record: Checkpoint) -> dict[str, Json]:
    """Return the record's metadata, converted to JSON and back: a subclass of str would be pickled as that class."""
    return json.loads(json.dumps(metadata(record), allow_nan=False))


def write_manifest(
    path: Path,
    record: Checkpoint,
    files: Mapping[str, NewFile | dict[str, Json]],
    *,
    first: Mapping[str, Json],
    groups: list[Json] | None,
) -> None:
    """Write the manifest at `path`: `first`, for people, then metadata, param_groups and `files` by their place beside
    it.

    For a file that another process wrote, `files` holds only its entry: size and checksums.
    """
    listed = {name: file.entry if isinstance(file, NewFile) else file for name, file in files.items()}
    rest = {"metadata": plain_metadata(record), "optimizer_groups": groups, "files": listed}
    write_json(path, {**first, **rest, "sha256": _own_sum(rest)})


def _own_sum(values: Mapping[str, Json]) -> str:
    """Return the sha256 of the fields that programs read, as JSON text: people may reformat the file and edit `first`."""
    bound = [values.get(name) for name in ("metadata", "optimizer_groups", "files")]
    return hashlib.sha256(json.dumps(bound).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Json]:
    """Return the manifest at `path`, its metadata checked and its files inside its folder.

    `problem` is None, or the CheckpointError that it disagrees with its own sha256. Raises CheckpointError for anything
    else wrong.
    """
    values = read_json(path)
    listed = values.get("files")
    if not isinstance(listed, dict) or "metadata" not in values:
        problem = "is not a manifest of milepost, expected metadata and files"
        raise CheckpointError(path, problem, EARLIER, kind="not understood")
    agrees = values.get("sha256") in (None, _own_sum(values))
    problem = "is damaged: it disagrees with its own sha256"
    values["problem"] = None if agrees else CheckpointError(path, problem, EARLIER, kind="damaged")
    values["metadata"] = check_metadata(values["metadata"], str(path))
    values.setdefault("optimizer_groups", None)
    for name, entry in listed.items():
        _check_entry(path, name, entry)
    return values


def _check_entry(path: Path, name: str, entry: Json) -> None:
    if not name or os.path.isabs(name) or {"", ".", ".."} & set(name.split("/")) or "\\" in name:
        raise CheckpointError(path, f"names {name!r:.80}, which lies outside its folder", kind="refused")
    if not isinstance(entry, dict) or type(entry.get("size")) is not int or not isinstance(entry.get("sha256"), str):
        raise CheckpointError(path, f"is damaged: {name}: expected size and sha256", EARLIER, kind="damaged")


def file_problems(
    locate: Callable[[str], Path],
    manifest: Mapping[str, Any],
    *,
    hashed: bool,
    begins: Iterable[str] = (),
    optional: Iterable[str] = (),
    remedy: str = EARLIER,
) -> list[CheckpointError]:
    """Return what is wrong with the files of a manifest, which `locate` maps to paths by their name in it.

    Compares sizes; for files that match a pattern in `begins` also the first bytes, to catch a file of another save; if
    `hashed`, every byte and the manifest itself. Files that match a pattern in `optional` may be missing.
    """
    problems = [manifest["problem"]] if hashed and manifest.get("problem") else []
    for name, entry in manifest["files"].items():
        path = locate(name)
        if not is_regular(path):
            if not matches(name, optional):
                problem = "is missing, but its manifest lists it"
                problems.append(CheckpointError(path, problem, remedy, kind="damaged"))
        elif damage := _damage(path, entry, hashed=hashed, begins=matches(name, begins)):
            problems.append(CheckpointError(path, f"is damaged: {damage}", remedy, kind="damaged"))
    return problems


def _damage(path: Path, entry: Mapping[str, Any], *, hashed: bool, begins: bool) -> str | None:
    size = path.stat().st_size
    if size != entry["size"]:
        return f"has {size} bytes instead of {entry['size']}"
    if begins and entry.get("begins_sha256") not in (None, sha256(path, most=BEGINNING)):
        return "its first bytes are those of another save, or altered"
    if hashed and sha256(path) != entry["sha256"]:
        return "its bytes disagree with their sha256"
    return None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name`, a place in a checkpoint's folder, matches one of the glob `patterns`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def sha256(path: Path, *, most: int | None = None) -> str:
    """Return the sha256 of the file, or of its first `most` bytes, in hex; raise CheckpointError."""
    try:
        with open_steadily(path) as file:
            digest = hashlib.file_digest(file, "sha256") if most is None else hashlib.sha256(file.read(most))
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()
