"""The runs of a folder, kept in memory and looked at again when somebody asks: what the page shows, by id."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from milepost import ckpt, config
from milepost.ckpt import Found
from milepost.ckpt.manifest import is_regular
from milepost.locks import seems_trained
from milepost.page.columns import Followed, as_columns
from milepost.page.runs import (
    Json,
    checkpoints,
    damaged,
    digest,
    labels,
    plain,
    resume_line,
    samples,
    settings_shown,
    state,
    summary,
)
from milepost.page.series import Window, curves
from milepost.plots.curves import METRICS, Drawn, last_step, parent_of, run_id_of

LEAST, SHARE = 1.0, 5  # seconds between two looks at least, and how many times as long as a look takes
State = tuple[Path, int, object]
BUDGET = 0.5  # seconds in which a look reads metrics; the rest is read by the next


@dataclass
class Watched:
    """A run, what was read of it, and the version of the library in which its figures last changed."""

    folder: Path
    file: Followed
    run_id: str  # from its run.json: its folder may have been renamed
    settings: dict[str, str] = field(default_factory=dict)
    parent: Json | None = None
    found: list[Found] = field(default_factory=list)  # its checkpoints
    beside: tuple[float, bool] = (0.0, False)  # when its samples changed, and whether a process trains it
    drawn: Window | None = None  # the part of its curves that a report shows; None for all
    stale: bool = True  # whether the figures are older than what was read
    version: int = 0
    figures: Json = field(default_factory=dict)


class Library:
    """The runs of RUNS_DIR and their checkpoints in CHECKPOINT_DIR. Safe to call from several threads."""

    def __init__(self, runs_dir: Path, checkpoint_dir: Path) -> None:
        self.runs_dir, self.checkpoint_dir = runs_dir, checkpoint_dir
        self.version = 0
        self.unread = 0  # runs whose metrics the next look reads
        self._runs: dict[str, Watched] = {}
        self._damaged: list[Found] = []
        self._verified: dict[State, list[str]] = {}
        self._verifying = threading.Lock()
        self._guard = threading.RLock()
        self._due = 0.0  # monotonic seconds
        self._held = False  # whether `hold` gave the runs, which no file changes any more

    def look(self) -> int:
        """Look at the disk if the last look is long enough ago; return the version, which a change raises."""
        with self._guard:
            began = time.monotonic()
            if began >= self._due:
                self._find_runs()
                self._find_checkpoints()
                self._read(time.monotonic() + BUDGET)
                self._due = began + max(LEAST, SHARE * (time.monotonic() - began))
                if self.unread:
                    self._due = 0.0
            return self.version

    def summaries(self, since: int = -1) -> Json:
        """Return the figures of the runs that changed after a version, the number of all, and what cannot be read."""
        with self._guard:
            return {
                "version": self.version,
                "unread": self.unread,
                "ids": len(self._runs),
                "runs": [each.figures for each in self._runs.values() if each.version > since],
                "damaged": damaged(self._damaged),
            }

    def curves(self, ids: Sequence[str], window: Window | None = None) -> Json:
        """Return the series of the runs, and the settings in which they differ; ids that are unknown are left out."""
        with self._guard:
            runs = self._known(ids)
            for each in runs.values():
                if not self._held and each.file.has_changed():
                    each.file.read_on()
                    each.stale = True
            return {
                "labels": labels({run: each.settings for run, each in runs.items()}),
                "curves": {run: curves(each.file.splits, window or each.drawn) for run, each in runs.items()},
            }

    def details(self, ids: Sequence[str]) -> Json:
        """Return checkpoints, samples and settings of the runs by id; ids that are unknown are left out."""
        with self._guard:
            return {run: {"checkpoints": checkpoints(each.found, self._problems), "samples": samples(each.folder),
                          "settings": settings_shown(each.settings)} for run, each in self._known(ids).items()}  # fmt: skip

    def verify(self, run: str, checkpoint: str) -> list[str] | None:
        """Read a checkpoint of a run, by their ids, and return what is wrong with it; None if there is no such one.

        The next look tells it to all pages. One is verified at a time.
        """
        with self._guard:
            own = self._runs[run].found if run in self._runs else []
            found = next((each for each in own if digest(os.fsencode(each.path)) == checkpoint), None)
        if found is None:
            return None
        with self._verifying:
            problems = [plain(problem, length=500) for problem in ckpt.verify(found.path)]
        with self._guard:
            self._verified[_state_of(found)] = problems
            if run in self._runs:
                self._runs[run].stale = True
        return problems

    def _problems(self, found: Found) -> list[str] | None:
        return self._verified.get(_state_of(found))

    def _known(self, ids: Iterable[str]) -> dict[str, Watched]:
        return {run: self._runs[run] for run in dict.fromkeys(ids) if run in self._runs}

    def hold(self, runs: Iterable[Drawn]) -> list[str]:
        """Take runs that were read before, in place of those of the folder; return their ids."""
        with self._guard:
            self._runs, self._held = {}, True
            for run in runs:
                file = Followed(run.folder / METRICS, splits=as_columns([*run.lines, *run.later]))
                run_id = run_id_of(run.folder)
                trained = seems_trained(run.folder, run_id)
                drawn = ("step", -math.inf, float(last_step(run))) if run.later else None
                self._runs[id_of(run.folder)] = Watched(run.folder, file, run_id, beside=(0.0, trained), drawn=drawn)
            self._find_checkpoints()
            for own_id, each in self._runs.items():
                self._describe(own_id, each)
            return list(self._runs)

    def _find_runs(self) -> None:
        """Add runs that are new in the folder, and forget those that are gone."""
        there: dict[str, Path] = {}
        with contextlib.suppress(OSError), os.scandir(self.runs_dir) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and is_regular((path := Path(entry.path)) / METRICS):
                    there[id_of(path)] = path
        for gone in self._runs.keys() - there.keys():
            del self._runs[gone]
            self.version += 1
        for new in there.keys() - self._runs.keys():
            self._runs[new] = Watched(there[new], Followed(there[new] / METRICS), run_id_of(there[new]))

    def _find_checkpoints(self) -> None:
        """Give each run its checkpoints. A folder that is not there, or may not be listed, has none."""
        found: list[Found] = []
        with contextlib.suppress(OSError):
            found = ckpt.find(self.checkpoint_dir) if self.checkpoint_dir.is_dir() else []
        by_run: dict[str, list[Found]] = {}
        for each in found:
            by_run.setdefault(each.run_id or "", []).append(each)
        problems = [each for each in found if each.problem]
        self.version += problems != self._damaged
        self._damaged = problems
        for run in self._runs.values():
            own = by_run.get(run.run_id, []) if self._is_of_run(run) else []
            if own != run.found:
                run.found, run.stale = own, True

    def _is_of_run(self, each: Watched) -> bool:
        """Return whether the folder is that of its run, and not a copy beside it under another name."""
        return each.folder.name == each.run_id or id_of(each.folder.with_name(each.run_id)) not in self._runs

    def _read(self, until: float) -> None:
        """Read what was added to the metrics, newest runs first, until the time is up, but of one run at least; describe the
        runs that changed.
        """
        changed = [each for each in self._runs.values() if each.file.has_changed()]
        changed.sort(key=lambda each: _changed_at(each.file.path), reverse=True)
        self.unread = len(changed)
        for each in changed:
            each.file.read_on()
            each.stale = True
            self.unread -= 1
            if time.monotonic() > until:
                break
        for run_id, each in self._runs.items():
            beside = _changed_at(each.folder / "samples"), seems_trained(each.folder, each.run_id)
            if each.stale or beside != each.beside:
                self.version += 1
                each.beside, each.stale, each.version = beside, False, self.version
                self._describe(run_id, each)

    def _describe(self, run_id: str, each: Watched) -> None:
        """Compute the figures of a run anew."""
        each.settings = config.env_values(each.folder / "config.env")
        each.parent = parent_of(each.folder)
        figures = summary(each.folder.name, each.file.splits, each.settings, each.parent)
        figures["id"], figures["state"] = run_id, state(figures, training=each.beside[1])
        if figures["parent"]:
            figures["parent"]["id"] = self._above(each)
        interrupted = figures["state"] == "interrupted"
        places = {"checkpoint_dir": self.checkpoint_dir, "runs_dir": self.runs_dir}
        figures["resume"] = resume_line(each.found, **places) if interrupted else None
        each.figures = figures | {"checkpoints": len(each.found), "sampled": each.beside[0]}

    def _above(self, each: Watched) -> str | None:
        """Return the id of the run that this one began with; None if it is not in the folder."""
        parent = Path(str((each.parent or {}).get("run_id"))).name
        of_parent = (own for own, run in self._runs.items() if run.run_id == parent and self._is_of_run(run))
        return next(of_parent, None)


def id_of(folder: Path) -> str:
    """Return the id of a run in addresses."""
    return digest(os.fsencode(folder.name))


def _state_of(found: Found) -> State:
    """Return what a checkpoint was verified as: another that is written in its place has not been."""
    return found.path, found.size, found.metadata.get("saved_at")


def _changed_at(path: Path) -> float:
    """Return when the file or folder changed, for comparison; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
