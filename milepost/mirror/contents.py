"""What a mirror holds: saves, each a folder of objects with a manifest that is written last. Pure functions.

    <run_id>/<save number>-<save id>/checkpoints/checkpoint_gpt2_letters_step0100_11102026_120000.pt
    <run_id>/<save number>-<save id>/run/metrics.jsonl, run.json, config.env, training.log, samples/
    <run_id>/<save number>-<save id>/manifest.json
    <run_id>/lease/ # which process trains the run: lease.py
    latest.json     # names the newest manifest, for stores whose listings come late

No object is written over by another content, but for latest.json and the beat of a lease. A file that has not changed since an earlier save is
named in the manifest as that save's object.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from milepost.ckpt.finding import BEST_FOLDER
from milepost.ckpt.index import Found
from milepost.ckpt.manifest import JSON_LIMIT, parse_json
from milepost.ckpt.record import CheckpointError, Json, check_metadata

MANIFEST, LATEST = "manifest.json", "latest.json"
CHECKPOINTS, RUN = "checkpoints", "run"  # where the files of a save go back to
FORMAT = 1
SAVE_NAME = re.compile(r"[0-9]{8,19}-[0-9a-f]{16}")
EARLIER = "an earlier one is taken"


@dataclass(frozen=True)
class Part:
    """A file of a save: its place when it is restored, the object that holds it, and what its bytes must be."""

    place: str  # checkpoints/... or run/...
    object: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Save:
    """A checkpoint in the mirror, with the files of its run as they were then."""

    run_id: str
    name: str  # its folder in the mirror, which sorts by save number
    checkpoint: str  # path below the checkpoint folder
    layout: str
    metadata: Mapping[str, Json]  # without the tokenizer
    bests: tuple[str, ...]  # names of the saves that were in best/ then
    parts: tuple[Part, ...]

    @property
    def manifest(self) -> str:
        """The name of its manifest."""
        return f"{self.run_id}/{self.name}/{MANIFEST}"

    @property
    def found(self) -> Found:
        """Its step, time and other metadata, as of a checkpoint in a folder."""
        return Found(Path(self.checkpoint), dict(self.metadata), layout=self.layout)

    @property
    def size(self) -> int:
        """Bytes of its checkpoint."""
        return sum(part.size for part in self.checkpoint_parts)

    @property
    def checkpoint_parts(self) -> list[Part]:
        """The files of its checkpoint."""
        return [part for part in self.parts if part.place.startswith(f"{CHECKPOINTS}/")]

    @property
    def run_parts(self) -> list[Part]:
        """The files of its run."""
        return [part for part in self.parts if part.place.startswith(f"{RUN}/")]


def save_name(metadata: Mapping[str, Json]) -> str:
    """Return the name of a save in the mirror. It is no other save's, whatever machine wrote it."""
    return f"{metadata.get('save_number') or 0:08d}-{metadata['save_id']}"


def as_bytes(save: Save) -> bytes:
    """Return the manifest of a save."""
    values = {"format": FORMAT, **asdict(save), "metadata": dict(save.metadata)}
    return (json.dumps({**values, "sha256": _own_sum(values)}, indent=1, allow_nan=False) + "\n").encode()


def parsed(content: bytes, where: str) -> Save:
    """Return the save of a manifest; raise CheckpointError if it is a half, damaged, or names a place outside its own."""
    values = parse_json(content[: JSON_LIMIT + 1], where)
    if values.pop("sha256", None) != _own_sum(values):
        raise CheckpointError(where, "is damaged: it disagrees with its own sha256", EARLIER, kind="damaged")
    if values.pop("format", None) != FORMAT:
        raise CheckpointError(where, "is of a newer version", "update milepost", kind="not understood")
    try:
        parts = tuple(Part(**part) for part in values.pop("parts"))
        save = Save(**{**values, "parts": parts, "bests": tuple(values["bests"])})
        _check(save)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(where, f"is damaged: {error!s:.120}", EARLIER, kind="damaged") from error
    check_metadata(save.metadata, where)
    return save


def _own_sum(values: Mapping[str, Json]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()


def _check(save: Save) -> None:
    """Raise ValueError if a name in a manifest leads out of the folders that it is about."""
    names = (save.name, *save.bests)
    if not _is_folder(save.run_id) or not all(map(SAVE_NAME.fullmatch, names)) or save.name != save_name(save.metadata):
        raise ValueError(f"it is of {save.run_id!r:.60}, {names!r:.60}")
    for part in save.parts:
        inside = part.place.startswith((f"{CHECKPOINTS}/", f"{RUN}/")) and part.object.startswith(f"{save.run_id}/")
        if not (inside and is_plain(part.place) and is_plain(part.object)):
            raise ValueError(f"it names {part.place!r:.60}, {part.object!r:.60}")
        if type(part.size) is not int or part.size < 0 or not isinstance(part.sha256, str):
            raise ValueError(f"{part.place:.60} has no size or sha256")
    if not is_plain(save.checkpoint) or not save.checkpoint_parts:
        raise ValueError("it has no checkpoint")


def _is_folder(run_id: str) -> bool:
    return is_plain(run_id) and "/" not in run_id and run_id[0] != "."


def is_plain(name: str) -> bool:
    """Whether a name with slashes stays below the folder that it is relative to, on every system."""
    steps = name.split("/")
    return not any(step in ("", ".", "..") or re.search(r"[\\:\x00-\x1f]", step) for step in steps)


# ---------------------------------------------------------------------------------------------------------------------


def newest_first(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the manifests among the names of objects, by run, the newest save first."""
    by_run: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        run_id, _, rest = name.partition("/")
        save, _, file = rest.partition("/")
        if file == MANIFEST and _is_folder(run_id) and SAVE_NAME.fullmatch(save):
            by_run.setdefault(run_id, []).append(name)
    for own in by_run.values():
        own.sort(key=lambda name: (save_number(name), name), reverse=True)
    return by_run


def save_number(manifest: str) -> int:
    """Return the save number in the name of a manifest."""
    return int(manifest.split("/")[1].partition("-")[0])


def is_best(save: Save) -> bool:
    """Whether its checkpoint was saved into best/ only."""
    return PurePosixPath(save.checkpoint).parent.name == BEST_FOLDER


def expired(saves: Sequence[Save], *, keep_last: int, needed: Collection[str] = ()) -> list[Save]:
    """Return the saves of a run that the policy expires: all but the newest `keep_last` (0: all stay), what was in best/
    when those were saved, the final one, and those `needed`, by name.
    """
    ordered = sorted(saves, key=lambda save: save.found.save_order)
    if not keep_last or not ordered:
        return []
    newest = [save for save in ordered if not is_best(save)][-keep_last:]
    kept = {name for save in (*newest, ordered[-1]) for name in (save.name, *save.bests)} | {*needed}
    return [save for save in ordered if save.name not in kept and not save.found.is_final]


def objects_to_delete(gone: Iterable[Save], kept: Iterable[Save]) -> list[str]:
    """Return the objects that only the saves `gone` name, each manifest before what it names."""
    shared = {part.object for save in kept for part in save.parts}
    gone = list(gone)
    parts = {part.object: None for save in gone for part in save.parts if part.object not in shared}
    return [*(save.manifest for save in gone), *parts]


def without_tokenizer(metadata: Mapping[str, Any]) -> dict[str, Json]:
    """Return metadata as a manifest holds it: a vocabulary takes megabytes."""
    return {name: value for name, value in metadata.items() if name != "tokenizer"}
