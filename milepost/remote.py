"""Checkpoints of a mirror that settings name by an address: brought into a cache on this disk, or looked at where they are.

docs/mirroring.md has the promises. A script that opens the checkpoints of CHECKPOINT_PATH begins with `local`, and sees paths
only. A checkpoint that another setting names is opened by its `local_path`, when it is needed.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from milepost import config
from milepost.ckpt import CheckpointError, Found
from milepost.config import Config, ConfigError
from milepost.mirror.cache import Cache, CacheFullError
from milepost.mirror.following import Following, Source
from milepost.mirror.headers import write_headers
from milepost.mirror.naming import WORDS, Named, answering, at_step, below, candidates, find, split
from milepost.mirror.opening import bring, bring_all, listed, looking_again
from milepost.runtime.progress import Log
from milepost.text.addresses import is_address, masked

GB = 10**9
# Seconds between two looks in a mirror that is followed: 120 listings an hour, which a store may charge for.
ASK_EVERY = 30.0


def address_of(name: str, settings: Config) -> str | None:
    """Return the address that a name of a checkpoint is; None for a name on this disk.

    latest and best are those of CHECKPOINT_DIR, which may be an address.
    """
    if is_address(name):
        return name
    return below(settings.checkpoint_dir, name) if name in WORDS and is_address(settings.checkpoint_dir) else None


def folder_here(settings: Config) -> None:
    """Raise ConfigError if CHECKPOINT_DIR is an address: what saves or deletes needs a folder."""
    if is_address(settings.checkpoint_dir):
        remedy = (
            "CHECKPOINT_MIRROR copies checkpoints to an address; CHECKPOINT_PATH and what only reads open them there"
        )
        shown = config.public(settings, "CHECKPOINT_DIR")
        raise ConfigError([f"CHECKPOINT_DIR={shown}: expected a folder of this computer: {remedy}"])


def local(settings: Config, log: Log, *, every: bool = False, certain: bool = False) -> Config:
    """Return the settings with paths in place of the addresses in CHECKPOINT_PATH: their checkpoints are in the cache then.

    With `every`, the address of a mirror or of a run stands for all its checkpoints, else for the latest. A damaged
    checkpoint is skipped where the name leaves a choice, and refused otherwise and if `certain`. CHECKPOINT_DIR becomes a
    folder, and counts as set.
    """
    if not is_remote(settings):
        return settings
    paths = []
    for part in settings.checkpoint_path.split(","):
        label, name = _labelled(part)
        if (address := address_of(name, settings)) is None:
            paths.append(part)
            continue
        paths += [f"{label}{path}" for path in _brought(address, settings, log, every=every, certain=certain)]
    here = with_folder(settings)
    values = {"CHECKPOINT_PATH": ",".join(paths), "CHECKPOINT_DIR": here.checkpoint_dir}
    return config.with_values(here, values, source="the mirror")


def with_folder(settings: Config) -> Config:
    """Return the settings with the folder that CHECKPOINT_DIR is by default, if it is an address. Then latest and best of a
    base become addresses there.
    """
    there = settings.checkpoint_dir
    if not is_address(there):
        return settings
    bases = {name: getattr(settings, name.lower()) for name in ("INIT_FROM", "BASE_CHECKPOINT")}
    values = {name: below(there, word) for name, word in bases.items() if word in WORDS}
    values["CHECKPOINT_DIR"] = config.without(settings, ["CHECKPOINT_DIR"]).checkpoint_dir
    return config.with_values(settings, values, source="the mirror")


def is_remote(settings: Config) -> bool:
    """Whether CHECKPOINT_PATH names a checkpoint of a mirror, or several."""
    return any(address_of(_labelled(part)[1], settings) for part in settings.checkpoint_path.split(","))


def local_path(name: str, settings: Config, log: Log, *, step: int | None = None) -> str:
    """Return a name of a checkpoint, or the path in the cache if it is an address: with `step`, of that step of the same run.

    Raise ConfigError if the address cannot be opened, CheckpointError if no checkpoint is there that can be used.
    """
    address = address_of(name, settings)
    return name if address is None else str(_brought(address, settings, log, step=step)[0])


def followed(part: str, settings: Config, log: Log) -> tuple[str, Source] | None:
    """Return the name that a part of CHECKPOINT_PATH is served by and its source in the cache, if it is an address. None for a
    part on this disk.

    This call and the source's `find` raise CheckpointError, ConfigError or OSError if nothing can be used.
    """
    label, name = _labelled(part)
    if (address := address_of(name, settings)) is None:
        return None
    named = _found(address)
    if not named.leaves_choice:
        path = _brought(address, settings, log)[0]
        return label.removesuffix("=") or path.stem, Source(str(path))
    following = Following(named, _cache(settings), say=log, pause=time.sleep)

    def find() -> Path:
        with _bounded(address, settings):
            return following.find()

    return label.removesuffix("=") or split(address)[1], Source(str(find()), find, ASK_EVERY)


def _labelled(part: str) -> tuple[str, str]:
    """Return a part of CHECKPOINT_PATH as what stands before an address, `name=` or nothing, and the rest."""
    label, mark, name = part.partition("=")
    return (f"{label}=", name) if mark and is_address(name) else ("", part)


def _brought(
    address: str, settings: Config, log: Log, *, every: bool = False, certain: bool = False, step: int | None = None
) -> list[Path]:
    named, cache = _found(address), _cache(settings)
    with _bounded(address, settings):
        if step is not None:
            named = at_step(named, step, say=log, pause=time.sleep)
        if every and not named.name:
            return bring_all(named, cache, certain=certain, say=log, pause=time.sleep)
        return [bring(named, cache, certain=certain, say=log, pause=time.sleep)]


def _cache(settings: Config) -> Cache:
    return Cache(config.user_caches() / "milepost" / "checkpoints", int(settings.cache_gb * GB))


@contextlib.contextmanager
def _bounded(address: str, settings: Config) -> Iterator[None]:
    """Raise ConfigError if a checkpoint is larger than the cache may be."""
    try:
        yield
    except CacheFullError as error:
        problem = f"CACHE_GB={settings.cache_gb:g}: {masked(address)} takes {error.need / GB:.3g} GB in the cache"
        raise ConfigError([f"{problem} ({_cache(settings).folder}): set as much or more"]) from error


def _found(address: str) -> Named:
    """Return what an address names; raise ConfigError if it cannot be opened, CheckpointError if nothing is there."""
    try:
        return find(address, pause=time.sleep)
    except (ValueError, ImportError) as error:
        raise ConfigError([f"{masked(address)}: {error}"]) from error


# ---------------------------------------------------------------------------------------------------------------------
# Looked at where they are.


@contextlib.contextmanager
def headers(address: str, log: Log) -> Iterator[tuple[Path, str]]:
    """Yield a checkpoint of a mirror without its tensors, in a folder that is deleted afterwards, and its address."""
    named = _found(address)
    with tempfile.TemporaryDirectory(prefix="milepost-") as folder:

        def taken(named: Named) -> tuple[Path, str]:
            return _headers(named, Path(tempfile.mkdtemp(dir=folder)), log)

        yield looking_again(taken, named, certain=False, pause=time.sleep)


def _headers(named: Named, folder: Path, log: Log) -> tuple[Path, str]:
    problems: list[CheckpointError] = []
    for number, save in enumerate(candidates(named, say=log, pause=time.sleep)):
        where = f"{named.store.shown}/{save.checkpoint}"
        if problems:
            log(f"skipped: {problems[-1]}")
        if named.leaves_choice:
            log(f"taking {where}")
        try:
            with answering():
                return write_headers(named.store, save, folder / str(number), pause=time.sleep), where
        except CheckpointError as error:
            if error.kind == "unreachable" or not named.leaves_choice:
                raise
            problems.append(error)
    raise problems[0]


def listing(settings: Config) -> tuple[str, list[Found]] | None:
    """Return the address of the mirror to list and its checkpoints; None if a folder of this disk is to be listed."""
    if not settings.is_set("CHECKPOINT_PATH") or settings.checkpoint_path == "latest":
        address = settings.checkpoint_dir
    else:
        address = settings.checkpoint_path
    if not is_address(address):
        return None
    named = _found(address)
    if named.name:
        problem = f"{masked(address)}: is not a mirror or a run of one"
        raise ConfigError([f"{problem}; show a single checkpoint with scripts/inspect_checkpoint.py"])
    return named.store.shown, listed(named, pause=time.sleep)
