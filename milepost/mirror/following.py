"""A name in a mirror that is asked for again and again: the checkpoint that it stands for by now, none downloaded twice."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from milepost.ckpt.record import CheckpointError
from milepost.mirror.cache import Cache, let_go
from milepost.mirror.contents import EARLIER, Save
from milepost.mirror.fetching import Pause, Say
from milepost.mirror.naming import Named, answering, candidates, find_again
from milepost.mirror.opening import looking_again, missing_part, with_base


class Source(NamedTuple):
    """What a name of a checkpoint stands for: what to open at first, and what returns the path of the checkpoint that is selected by
    now, asked every `every` seconds; None if that cannot change. It may raise any exception; then the next look asks again.
    """

    first: str
    find: Callable[[], Path] | None = None
    every: float = 0.0


class Following:
    """What a name that leaves a choice stands for, in the cache, as its mirror grows. For one thread at a time."""

    def __init__(self, named: Named, cache: Cache, *, say: Say, pause: Pause) -> None:
        """`named` is what `find` returned. `say` gets each line once."""
        self._named, self._cache, self._pause = named, cache, pause
        self._say_any, self._said = say, {""}
        self._seen: object = None  # the manifests of the mirror from which `_taken` was chosen
        self._taken: str | None = None  # its manifest
        self._path: Path | None = None
        self._refused: dict[str, CheckpointError] = {}  # checkpoints that are damaged, by their manifests

    def find(self) -> Path:
        """Return the path of the checkpoint that the name stands for by now. The one before it may be deleted from then on.

        A damaged or incomplete checkpoint is reported, and the next is taken. Raise as `bring` does; the next call tries again.
        """
        if self._path is not None:
            self._named = find_again(self._named, pause=self._pause)
        if self._path is None or self._named.runs != self._seen:
            self._path = looking_again(self._chosen, self._named, certain=False, pause=self._pause)
        return self._path

    def _chosen(self, named: Named) -> Path:
        self._named = named
        problems: list[CheckpointError] = []
        for save in candidates(named, say=self._say, pause=self._pause):
            try:
                path = self._brought(save)
                break
            except CheckpointError as error:
                if error.kind == "unreachable":
                    raise
                self._say(f"skipped: {error}")
                problems.append(error)
        else:
            raise problems[0]
        may_come = [error for error in problems if error not in self._refused.values()]
        self._seen = None if may_come else named.runs
        return path

    def _brought(self, save: Save) -> Path:
        """Return the path of a save in the cache; raise CheckpointError if it cannot be used."""
        if self._path is not None and save.manifest == self._taken:
            return self._path
        if error := self._refused.get(save.manifest):
            raise error
        with answering():
            if problem := missing_part(self._named.store, save, {}, pause=self._pause):
                raise CheckpointError(problem, remedy=EARLIER, kind="lacking")  # it may come: a store may list late
        self._say(f"taking {self._named.store.shown}/{save.checkpoint}")
        try:
            path = with_base(self._named, save, self._cache, say=self._say, pause=self._pause)
        except CheckpointError as error:
            if error.kind != "unreachable":
                self._refused[save.manifest] = error
            raise
        if self._path is not None:
            let_go(self._path)
        self._taken = save.manifest
        return path

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say_any(line)
