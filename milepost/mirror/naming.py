"""Which checkpoints of a mirror an address names: `<mirror>`, `<mirror>/<name>` or `<mirror>/<run>/<name>`. Reads manifests only.

A name is latest, best, a step, the name of a checkpoint with or without its ending, or a glob of names.
"""

import contextlib
import fnmatch
import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from milepost.ckpt.finding import loss_of
from milepost.ckpt.names import ENDS
from milepost.ckpt.record import CheckpointError
from milepost.mirror.contents import Save, newest_first
from milepost.mirror.fetching import Pause, Say, readable, runs_in
from milepost.mirror.retrying import attempted
from milepost.mirror.store import Store, StoreError, opened
from milepost.text.addresses import is_address, masked

WORDS = ("latest", "best")
LISTED = 8  # names in a message


@dataclass(frozen=True)
class Named:
    """What an address names: a mirror, the manifests of its runs or of one of them, and a name; empty for the whole mirror."""

    store: Store
    runs: Mapping[str, list[str]]  # the newest save first
    name: str
    run_id: str = ""  # of the only run that it is about; empty for all of them

    @property
    def leaves_choice(self) -> bool:
        """Whether another checkpoint may be taken in place of a damaged one."""
        return self.name in ("", *WORDS) or glob.has_magic(self.name)


def split(address: str) -> tuple[str, str]:
    """Return an address without the last part of its path, and that part. A query stays with the address."""
    path, mark, query = address.partition("?")
    above, _, last = path.rstrip("/").rpartition("/")
    return f"{above}{mark}{query}", last


def below(address: str, name: str) -> str:
    """Return the address of `name` below an address."""
    path, mark, query = address.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def address_of(save: Save, mirror: str) -> str:
    """Return the address of a checkpoint in the mirror at an address."""
    return below(mirror, f"{save.run_id}/{PurePosixPath(save.checkpoint).name}")


def find(address: str, *, pause: Pause) -> Named:
    """Return what an address names.

    Raise CheckpointError if no mirror is there or the store does not answer, ValueError or ImportError as `opened` does.
    """
    for store, name in _readings(address):
        with answering():
            named = _named(store, name, pause=pause)
        if named.runs:
            return named
    raise CheckpointError(masked(address), "no checkpoint of a mirror is there", "check the address", kind="not found")


def _readings(address: str) -> list[tuple[Store, str]]:
    """Return the stores and names that an address may mean, the likelier first. Raise as `opened` does.

    A mirror may be called as a checkpoint is, 2026 or best, so neither reading rules the other out.
    """
    whole, (above, last) = opened(address), split(address)
    try:
        part = (opened(above), last)
    except ValueError:  # nothing is above it
        return [(whole, "")]
    return [part, (whole, "")] if _is_name(last) else [(whole, ""), part]


def _is_name(word: str) -> bool:
    """Whether the last part of an address reads as the name of a checkpoint."""
    return word in WORDS or word.isdecimal() or glob.has_magic(word) or PurePosixPath(word).suffix in ENDS


def find_again(named: Named, *, pause: Pause) -> Named:
    """Return what the address of `named` names by now. Raise CheckpointError if the store does not answer."""
    with answering():
        return replace(named, runs=runs_in(named.store, named.run_id, pause=pause))


def _named(store: Store, name: str, *, pause: Pause) -> Named:
    """Return a mirror with the manifests in it. The store of one run's folder becomes that of the mirror above it."""
    if runs := runs_in(store, pause=pause):
        return Named(store, runs, name)
    above, run_id = split(store.address)
    own = newest_first(f"{run_id}/{each}" for each in attempted(store.names, pause=pause))
    return Named(opened(above), own, name, run_id) if own else Named(store, {}, name)


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Raise CheckpointError instead of the StoreError of a store that does not answer or refuses."""
    try:
        yield
    except StoreError as error:
        raise CheckpointError(str(error), kind="not found" if error.kind == "missing" else "unreachable") from error


# ---------------------------------------------------------------------------------------------------------------------


def candidates(named: Named, *, say: Say, pause: Pause, gone: Say | None = None) -> Iterator[Save]:
    """Yield the saves that the name stands for, the preferred one first; `say` gets a line on each manifest that is damaged,
    `gone`, by default `say`, on each that is missing.

    Raise CheckpointError if it stands for none, or the store does not answer.
    """
    with answering():
        found = latest_first(named, say=say, pause=pause, gone=gone)
        if named.name not in ("", "latest"):
            found = iter(preferred(list(found), named.name))
        first = next(found, None)
        if first is None:
            raise _not_found(named, pause=pause)
        yield first
        yield from found


def latest_first(named: Named, *, say: Say, pause: Pause, gone: Say | None = None) -> Iterator[Save]:
    """Yield the saves of each run, the newest first; the run that saved last first. Raise StoreError."""
    runs = {run: readable(named.store, own, say=say, pause=pause, gone=gone) for run, own in named.runs.items()}
    newest = [save for own in runs.values() if (save := next(own, None))]
    for save in sorted(newest, key=lambda save: str(save.found.metadata.get("saved_at") or ""), reverse=True):
        yield save
        yield from runs[save.run_id]


def preferred(saves: Sequence[Save], name: str) -> list[Save]:
    """Return those of `saves`, which are in the order of `latest_first`, that a name stands for, the preferred one first."""
    own = [save for save in saves if save.run_id == saves[0].run_id]
    if name == "best":
        return sorted((save for save in own if loss_of(save.found) is not None), key=_loss) or own
    if name.isdecimal():
        return [save for save in own if save.found.step == int(name)]
    matching = [save for save in saves if any(fnmatch.fnmatchcase(word, name) for word in names_of(save))]
    return sorted(matching, key=lambda save: save.found.step, reverse=True)


def _loss(save: Save) -> tuple[float, tuple[int, str, int]]:
    return loss_of(save.found) or 0.0, save.found.save_order


def names_of(save: Save) -> tuple[str, str]:
    """Return the names of a checkpoint: with and without its ending."""
    path = PurePosixPath(save.checkpoint)
    return path.name, path.name.removesuffix(path.suffix) if path.suffix in ENDS else path.name


def at_step(named: Named, step: int, *, say: Say, pause: Pause) -> Named:
    """Return what names a step of the run whose checkpoint a name stands for. Raise as `candidates` does."""
    run_id = next(candidates(named, say=say, pause=pause)).run_id
    return Named(named.store, {run_id: named.runs[run_id]}, str(step), run_id)


def bases_of(save: Save, named: Named, *, pause: Pause) -> list[Save]:
    """Return the saves in the mirror that may be the base of the adapters of `save`: those of the recorded place, else those
    of its file name, and of its step.

    Raise StoreError.
    """
    base = save.found.metadata.get("base")
    if not isinstance(base, dict) or "adapters" not in save.found.metadata.get("parts", ()):
        return []
    source = str(base.get("source"))
    path = PurePosixPath(source.partition("?")[0] if is_address(source) else source.replace("\\", "/"))
    every = Named(named.store, runs_in(named.store, pause=pause), "")
    saves = latest_first(every, say=lambda line: None, pause=pause)
    found = [each for each in saves if each.found.step == base.get("step") and path.name in names_of(each)]
    return [each for each in found if _is_at(each, path, source)] or found


def _is_at(save: Save, path: PurePosixPath, source: str) -> bool:
    """Whether a base was recorded in the folder of this save: in a mirror that of its run, on a disk that of its checkpoint.

    Names such as step_000100 are in every run.
    """
    folder = save.run_id if is_address(source) else str(PurePosixPath(save.checkpoint).parent)
    return folder == "." or f"/{path.parent}".endswith(f"/{folder}")


def _not_found(named: Named, *, pause: Pause) -> CheckpointError:
    """Return the error for a name that no checkpoint of the mirror has, with those that are there."""
    saves = list(latest_first(named, say=lambda line: None, pause=pause))
    problem, remedy = "Checkpoint not found", f"it holds {_listed([names_of(save)[0] for save in saves])}"
    if not saves:
        remedy = "none that can be read is there"
    elif named.name.isdecimal() and (runs := [save.run_id for save in saves if save.found.step == int(named.name)]):
        problem = f"step {named.name} is not in run {saves[0].run_id}, which saved last, but in {_listed(runs)}"
        remedy = f"put the run's name before the step, as in {runs[0]}/{named.name}"
    return CheckpointError(f"{named.store.shown}/{named.name}".rstrip("/"), problem, remedy, kind="not found")


def _listed(names: Sequence[str]) -> str:
    """Return names for a message, each once, not too many."""
    names = list(dict.fromkeys(names))
    return ", ".join([*names[:LISTED], "..."] if len(names) > LISTED else names)
