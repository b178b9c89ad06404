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
    above, last = split(address)
    if _is_name(last):
        stores = [(opened(above), last)]
    else:
        stores = [(opened(address), "")]
        with contextlib.suppress(ValueError):  # there may be nothing above it
            stores.append((opened(above), last))
    for store, name in stores:
        with answering():
            named = _named(store, name, pause=pause)
        if named.runs:
            return named
    raise CheckpointError(masked(address), "no checkpoint of a mirror is there", "check the address", kind="not found")


def _is_name(word: str) -> bool:
    """Whether the last part of an address can only be the name of a checkpoint."""
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


def candidates(named: Named, *, say: Say, pause: Pause) -> Iterator[Save]:
    """Yield the saves that the name stands for, the preferred one first; `say` gets a line on each manifest that is damaged.

    Raise CheckpointError if it stands for none, or the store does not answer.
    """
    with answering():
        if named.name in ("", "latest"):
            found = latest_first(named, say=say, pause=pause)
        else:
            found = iter(preferred(list(latest_first(named, say=say, pause=pause)), named.name))
        first = next(found, None)
        if first is None:
            raise _not_found(named, pause=pause)
        yield first
        yield from found


def latest_first(named: Named, *, say: Say, pause: Pause) -> Iterator[Save]:
    """Yield the saves of each run, the newest first; the run that saved last first. Raise StoreError."""
    runs = {run: readable(named.store, manifests, say=say, pause=pause) for run, manifests in named.runs.items()}
    newest = [save for own in runs.values() if (save := next(own, None))]
    for save in sorted(newest, key=lambda save: str(save.found.metadata.get("saved_at") or ""), reverse=True):
        yield save
        yield from runs[save.run_id]


def preferred(saves: Sequence[Save], name: str) -> list[Save]:
    """Return those of `saves`, which are in the order of `latest_first`, that a name stands for, the preferred one first."""
    if name == "best":
        own = [save for save in saves if save.run_id == saves[0].run_id]
        return sorted((save for save in own if loss_of(save.found) is not None), key=_loss) or own
    if name.isdecimal():
        return [save for save in saves if save.found.step == int(name)]
    matching = [save for save in saves if any(fnmatch.fnmatchcase(own, name) for own in names_of(save))]
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
    return Named(named.store, {run_id: named.runs[run_id]}, str(step))


def base_of(save: Save, named: Named, *, pause: Pause) -> Save | None:
    """Return the save in the mirror that the adapters of `save` are over, by its file name and step; None if there is none.

    Raise StoreError.
    """
    base = save.found.metadata.get("base")
    if not isinstance(base, dict) or "adapters" not in save.found.metadata.get("parts", ()):
        return None
    source = str(base.get("source"))
    name = split(source)[1] if is_address(source) else PurePosixPath(source.replace("\\", "/")).name
    every = Named(named.store, runs_in(named.store, pause=pause), "")
    saves = latest_first(every, say=lambda line: None, pause=pause)
    return next((each for each in saves if each.found.step == base.get("step") and name in names_of(each)), None)


def _not_found(named: Named, *, pause: Pause) -> CheckpointError:
    """Return the error for a name that no checkpoint of the mirror has, with those that are there."""
    saves = latest_first(named, say=lambda line: None, pause=pause)
    names = [names_of(save)[0] for save, _ in zip(saves, range(LISTED + 1), strict=False)]
    more = ", ..." if len(names) > LISTED else ""
    held = f"it holds {', '.join(names[:LISTED])}{more}" if names else "none that can be read is there"
    return CheckpointError(
        f"{named.store.shown}/{named.name}".rstrip("/"), "Checkpoint not found", held, kind="not found"
    )
