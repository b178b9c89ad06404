"""Checkpoints of a mirror, by what an address names: brought into the cache, or listed by their manifests."""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import NoReturn, TypeVar

from milepost.ckpt.bases import base_in
from milepost.ckpt.index import Found
from milepost.ckpt.record import CheckpointError
from milepost.mirror.cache import Cache, CacheFullError, let_go, take
from milepost.mirror.contents import Save
from milepost.mirror.fetching import Pause, Say, check_not_deleted
from milepost.mirror.naming import Named, answering, bases_of, candidates, find_again, latest_first
from milepost.mirror.retrying import attempted
from milepost.mirror.store import Store, StoreError
from milepost.mirror.uploading import read_save

Result = TypeVar("Result")


def looking_again(taken: Callable[[Named], Result], named: Named, *, certain: bool, pause: Pause) -> Result:
    """Return what `taken` returns for a name; if nothing can be used and the mirror has changed since, for what it names now.

    A run deletes its old checkpoints when newer ones are there, also while a reader downloads them. Raise as `taken` does.
    """
    try:
        return taken(named)
    except CheckpointError as error:
        other_may_be_taken = named.leaves_choice and not certain and error.kind != "unreachable"
        if not (other_may_be_taken or error.kind == "not found"):
            raise
        now = find_again(named, pause=pause)
        if now.runs == named.runs:
            raise
    return taken(now)


def bring(named: Named, cache: Cache, *, certain: bool, say: Say, pause: Pause) -> Path:
    """Return the path in the cache of the checkpoint that a name stands for.

    Where the name leaves a choice, a damaged one is reported and the next is taken, unless `certain`. Raise CheckpointError
    if none can be used, CacheFullError, OSError.
    """

    def brought(named: Named) -> Path:
        return _brought(named, cache, certain=certain, say=say, pause=pause)

    return looking_again(brought, named, certain=certain, pause=pause)


def _brought(named: Named, cache: Cache, *, certain: bool, say: Say, pause: Pause) -> Path:
    problems: list[CheckpointError] = []
    for save in candidates(named, say=_refuse if certain else say, gone=say, pause=pause):
        if problems:
            say(f"skipped: {problems[-1]}")
        if named.leaves_choice:
            say(f"taking {named.store.shown}/{save.checkpoint}")
        try:
            return with_base(named, save, cache, say=say, pause=pause)
        except CheckpointError as error:
            if certain or error.kind == "unreachable" or not named.leaves_choice:
                raise
            problems.append(error)
    raise problems[0]


def bring_all(named: Named, cache: Cache, *, certain: bool, say: Say, pause: Pause) -> list[Path]:
    """Return the paths in the cache of all checkpoints that a mirror or its run holds, the oldest save first.

    Damaged ones are reported and left out, or raised at the end if `certain`. Raise as `bring` does.
    """

    def brought(named: Named) -> list[Path]:
        return _all_brought(named, cache, certain=certain, say=say, pause=pause)

    return looking_again(brought, named, certain=certain, pause=pause)


def _all_brought(named: Named, cache: Cache, *, certain: bool, say: Say, pause: Pause) -> list[Path]:
    problems: list[str] = []
    with answering():
        saves = list(latest_first(named, say=problems.append, gone=say, pause=pause))
    if (need := sum(save.size for save in saves)) > cache.limit:
        raise CacheFullError(need)
    paths = []
    for save in sorted(saves, key=lambda save: save.found.save_order):
        try:
            paths.append(with_base(named, save, cache, say=say, pause=pause))
        except CheckpointError as error:
            if error.kind == "unreachable":
                raise
            (say if error.kind == "not found" else problems.append)(f"skipped: {error}")
    if problems and (certain or not paths):
        raise CheckpointError("; ".join(line.removeprefix("skipped: ") for line in problems), kind="damaged")
    if not paths:
        raise CheckpointError(named.store.shown, "its checkpoints were deleted", "try again", kind="not found")
    for line in problems:
        say(line)
    return paths


def with_base(named: Named, save: Save, cache: Cache, *, say: Say, pause: Pause) -> Path:
    """Return the path in the cache of a save, with the base of its adapters beside it if the mirror has that.

    Of several that may be the base, it is the one with the recorded sha256. Raise CheckpointError, CacheFullError or OSError.
    """
    with answering():
        bases = bases_of(save, named, pause=pause)
        for base in bases if len(bases) > 1 else ():
            path = take(cache, named.store, [save, base], say=say, pause=pause)
            entry = path.parents[len(PurePosixPath(save.checkpoint).parts) - 1]
            if base_in(save.metadata["base"], (entry / base.checkpoint).parent):
                return path
            let_go(path)
        return take(cache, named.store, [save, *bases[:1]], say=say, pause=pause)


def _refuse(line: str) -> NoReturn:
    raise CheckpointError(line.removeprefix("skipped: "), kind="damaged")


# ---------------------------------------------------------------------------------------------------------------------


def listed(named: Named, *, pause: Pause) -> list[Found]:
    """Return the checkpoints of a mirror or a run without reading any: damaged ones first, the run that saved last at the
    end, and of each run the oldest save first.

    Damaged is one whose manifest cannot be read, and one of which an object is missing or has another size; those that are
    deleted meanwhile are left out. Raise CheckpointError if the store does not answer.
    """
    with answering():
        sizes = attempted(named.store.sizes, pause=pause)
        manifests = [manifest for own in named.runs.values() for manifest in own]
        looked_at = [_found(named.store, manifest, sizes, pause=pause) for manifest in manifests]
    found = [each for each in looked_at if each]
    times = {each.run_id: "" for each in found}
    for each in found:
        times[each.run_id] = max(times[each.run_id], str(each.metadata.get("saved_at") or ""))
    return sorted(
        found, key=lambda each: (each.problem is None, times[each.run_id], each.run_id or "", each.save_order)
    )


def _found(store: Store, manifest: str, sizes: dict[str, int], *, pause: Pause) -> Found | None:
    """Return what a manifest says of its checkpoint; None if it has been deleted since it was listed."""
    try:
        save = attempted(lambda: read_save(store, manifest), pause=pause)
    except CheckpointError as error:
        return Found(Path(manifest), {}, str(error), kind=error.kind)
    except StoreError as error:
        if error.kind != "missing":
            raise
        return None
    path, bad = Path(save.checkpoint), missing_part(store, save, sizes, pause=pause)
    if bad:
        try:
            check_not_deleted(store, save, pause=pause)
        except CheckpointError:
            return None
        return Found(path, dict(save.metadata), bad, layout=save.layout, size=save.size, kind="damaged")
    return Found(path, dict(save.metadata), layout=save.layout, size=save.size)


def missing_part(store: Store, save: Save, sizes: Mapping[str, int], *, pause: Pause) -> str | None:
    """Return what is missing of a save; None if each object is there in its size, by a listing, which may come late, or by
    the store. Raise StoreError.
    """
    for part in save.checkpoint_parts:
        size = sizes.get(part.object)
        if size != part.size:
            try:
                size = attempted(lambda part=part: store.size(part.object), pause=pause)  # type: ignore[misc]
            except StoreError as error:
                if error.kind != "missing":
                    raise
                return str(error)
        if size != part.size:
            return f"{store.shown}/{part.object}: has {size} bytes, {part.size} were sent"
    return None
