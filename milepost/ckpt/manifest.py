"""The JSON files beside tensors: read with care, and the manifest, which is written last and says what belongs together.

A manifest carries the record's metadata, size and sha256 of every file, and the optimizer's param_groups.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from milepost.ckpt.record import Checkpoint, CheckpointError, Json, check_metadata, metadata, without_optimizer
from milepost.files import BEGINNING, CHUNK, NewFile, write_json

JSON_LIMIT = 16 * 2**20  # bytes; a 50,000-piece BPE vocabulary takes about 3 MB
PARTS_LIMIT = 1_000_000  # values in it; such a vocabulary has 200,000. An object of 8 bytes takes 200 in memory


def is_regular(path: Path) -> bool:
    """Whether `path` is a regular file; a pipe or a device is never opened, because it could wait for ever."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def read_json(path: Path) -> dict[str, Json]:
    """The object in a JSON file. Raises CheckpointError for anything else, for doubled names and for numbers JSON does not have."""
    if not is_regular(path):
        raise CheckpointError(
            f"{path}: {'is no regular file' if os.path.lexists(path) else 'is missing'}, expected JSON"
        )
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path}: is larger than {JSON_LIMIT} bytes, expected a small JSON file")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def parse_json(data: bytes, where: str) -> dict[str, Json]:
    """The object in JSON text; raises CheckpointError as `read_json` does."""
    if sum(map(data.count, (b",", b"[", b"{"))) > PARTS_LIMIT:
        raise CheckpointError(f"{where}: has more than {PARTS_LIMIT} values, expected a small JSON file")
    try:
        values = json.loads(data, parse_constant=_refuse_constant, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: is no sound JSON ({str(error) or 'nested too deep'!s:.120}): it is damaged"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: holds {type(values).__name__}, expected an object")
    return values


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _no_doubles(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is there twice")
    return values


def plain_metadata(record: Checkpoint) -> dict[str, Json]:
    """The record's metadata through JSON and back: a str that is secretly of another class would be pickled as that class."""
    return json.loads(json.dumps(metadata(record), allow_nan=False))


def write_manifest(
    path: Path,
    record: Checkpoint,
    files: Mapping[str, NewFile | dict[str, Json]],
    *,
    first: Mapping[str, Json],
    groups: list[Json] | None,
) -> None:
    """Writes the manifest at `path`: `first`, which people read, then metadata, param_groups and the files by their place beside it.

    Of a file that another process wrote, `files` has the `entry` alone.
    """
    listed = {name: file.entry if isinstance(file, NewFile) else file for name, file in files.items()}
    rest = {"metadata": plain_metadata(record), "optimizer_groups": groups, "files": listed}
    write_json(path, {**first, **rest, "sha256": _own_sum(rest)})


def _own_sum(values: Mapping[str, Json]) -> str:
    """Of what a manifest says for programs, as JSON text; people may add line breaks, and edit what stands before it."""
    bound = [values.get(name) for name in ("metadata", "optimizer_groups", "files")]
    return hashlib.sha256(json.dumps(bound).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Json]:
    """The manifest at `path`, its metadata checked, its files inside its folder; raises CheckpointError.

    `problem` is None, or says that it does not agree with its own sha256.
    """
    values = read_json(path)
    listed = values.get("files")
    if not isinstance(listed, dict) or "metadata" not in values:
        raise CheckpointError(f"{path}: is no manifest of milepost's, expected metadata and files")
    agrees = values.get("sha256") in (None, _own_sum(values))
    values["problem"] = (
        None if agrees else f"{path}: is damaged: it does not agree with its own sha256: take an earlier checkpoint"
    )
    values["metadata"] = check_metadata(values["metadata"], str(path))
    values.setdefault("optimizer_groups", None)
    for name, entry in listed.items():
        if not name or os.path.isabs(name) or {"", ".", ".."} & set(name.split("/")) or "\\" in name:
            raise CheckpointError(f"{path}: names {name!r:.80}, which lies outside its folder")
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise CheckpointError(f"{path}: {name}: expected size and sha256: the file is damaged")
    return values


def file_problems(
    folder: Path, manifest: Mapping[str, Any], *, hashed: bool, begins: Iterable[str] = (), optional: Iterable[str] = ()
) -> list[str]:
    """What is wrong with the manifest's files in `folder`, one sentence each.

    Sizes always; of the files in `begins` the first bytes too, so that one of another save is seen; with `hashed` every byte, and the
    manifest's own.
    """
    problems = [manifest["problem"]] if hashed and manifest.get("problem") else []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not is_regular(path):
            problems += [] if name in optional else [f"{path}: is missing, but its manifest names it"]
        elif path.stat().st_size != entry["size"]:
            size = path.stat().st_size
            problems.append(f"{path}: has {size} bytes instead of {entry['size']}: take an earlier checkpoint")
        elif name in begins and entry.get("begins_sha256") not in (None, sha256(path, most=BEGINNING)):
            problems.append(f"{path}: is damaged, or of another save than the files beside it: put the right one back")
        elif hashed and sha256(path) != entry["sha256"]:
            problems.append(f"{path}: is damaged: its bytes do not agree with their sha256: take an earlier checkpoint")
    return problems


def manifest_metadata(
    folder: Path, manifest: Mapping[str, Any], *, optimizer: str, optional: Iterable[str] = ()
) -> dict[str, Json]:
    """The manifest's metadata, as that of a checkpoint which only generates if the file `optimizer` is gone.

    Raises CheckpointError if another file of `folder` is missing or of another size, but for the `optional` ones.
    """
    check_files(folder, manifest, optional=[optimizer, *optional])
    values = manifest["metadata"]
    return values if is_regular(folder / optimizer) else without_optimizer(values)


def check_files(
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    hashed: bool = False,
    begins: Iterable[str] = (),
    optional: Iterable[str] = (),
) -> None:
    """Raises CheckpointError for the first of `file_problems`."""
    for problem in file_problems(folder, manifest, hashed=hashed, begins=begins, optional=optional):
        raise CheckpointError(problem)


def sha256(path: Path, *, most: int | None = None) -> str:
    """Of the file's bytes, or of the first `most` of them, in hex; raises CheckpointError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            if most is not None:
                digest.update(file.read(most))
                return digest.hexdigest()
            while piece := file.read(CHUNK):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()
