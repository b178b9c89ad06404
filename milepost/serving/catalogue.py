"""The checkpoints that are served, by name, and following those that a run in training still writes."""

import glob
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.generation.conversation import NO_TEMPLATE
from milepost.generation.decoder import Decoder
from milepost.mirror.following import Source
from milepost.runtime.progress import Log
from milepost.samples import Loaded

LOOK_EVERY: Final = 2.0  # seconds between two looks for a newer checkpoint in a folder
LOOK_SHARE: Final = 20  # a look takes at most one part in so many of the time
LONGEST_WAIT: Final = 60.0  # seconds to the next look after one that took long
MOST_TIMES: Final = 8  # as long as otherwise between two looks that fail

Result = TypeVar("Result")
Open = Callable[[str, Iterable[Checkpoint]], Loaded]  # a checkpoint by what CHECKPOINT_PATH takes, over bases in memory


@dataclass(frozen=True)
class Served:
    """A model that requests name. `together` is whether texts are read together without a change of their bits."""

    name: str
    loaded: Loaded
    together: bool
    created: int

    @property
    def fingerprint(self) -> str:
        """What tells the weights from others of the same name: run and step."""
        record = self.loaded.record
        return f"{record.run_id or 'weights'}-step{record.step}"

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self.loaded.template != NO_TEMPLATE


def on_disk(part: str, folder: Path) -> tuple[str, Source]:
    """Return the name that a part of CHECKPOINT_PATH is served by, and its source; `folder` is that of latest and best."""
    name, source = named(part)
    find = (lambda: ckpt.resolve(source, folder)[0]) if selects(source) else None
    return name, Source(source, find, LOOK_EVERY)


class Catalogue:
    """The models by name. `look` replaces those whose name selects another checkpoint by now; requests keep theirs.

    Each name that may change is followed by a thread of its own, so that a store that does not answer holds up no other.
    """

    def __init__(self, sources: Mapping[str, Source], *, open_one: Open, rows: int, log: Log) -> None:
        """Open all `sources` by their names. `rows` is how many texts may be read together."""
        self._open, self._rows, self._log = open_one, rows, log
        self._sources = sources
        self._seen: dict[str, Path] = {}
        self._problems: dict[str, str] = {}
        self._failures: dict[str, int] = {}
        self._opening, self._stopped = threading.Lock(), threading.Event()
        self.models: dict[str, Served] = {}
        for name, source in sources.items():
            if source.find is not None:
                self._seen[name] = source.find()
            self._put(name, source.first)
        self.threads = [
            threading.Thread(target=self._follow, args=[name], name=f"follows {name}", daemon=True)
            for name in self._seen
        ]

    def start(self) -> None:
        """Follow what the names select, until `stop`."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Follow no further; a look that has begun ends, or the process ends it."""
        self._stopped.set()

    def _follow(self, name: str) -> None:
        seconds = self._sources[name].every
        while not self._stopped.wait(seconds):
            seconds = self.look(name)

    def look(self, name: str) -> float:
        """Open what a followed name selects by now; return the seconds to wait before the next look.

        What cannot be opened is reported once, and the earlier weights stay.
        """
        began, every = time.monotonic(), self._sources[name].every
        try:
            self._renew(name)
        except Exception as error:  # one that went further would end the thread, and nobody would notice
            self._failures[name] = self._failures.get(name, 0) + 1
            if self._problems.get(name) != str(error):
                self._problems[name] = str(error)
                self._log(f"{name} stays at {self.models[name].fingerprint}: {error or type(error).__name__}")
            return every * min(2.0 ** self._failures[name], MOST_TIMES)
        return max(every, min(LOOK_SHARE * (time.monotonic() - began), LONGEST_WAIT))

    def _renew(self, name: str) -> None:
        find = self._sources[name].find
        assert find is not None
        path = find()
        self._failures[name] = 0
        if path != self._seen[name]:
            self._problems.pop(name, None)
            self._seen[name] = path  # first: what cannot be opened is not tried again
            self._put(name, str(path))

    def _put(self, name: str, source: str) -> None:
        with self._opening:
            loaded, together = in_passing_thread(lambda: self._opened(source))
        self.models[name] = Served(name, loaded, together, int(time.time()))
        steps = "together" if together else "in turn"
        where = loaded.record.path
        self._log(f"serving {name}: {where}, {self.models[name].fingerprint}, in {loaded.dtype}, requests {steps}")

    def _opened(self, source: str) -> tuple[Loaded, bool]:
        loaded = self._open(source, [served.loaded.base for served in self.models.values()])
        decoder = loaded.generator if isinstance(loaded.generator, Decoder) else None
        if decoder is None or not decoder.together or loaded.lookup or self._rows == 1:
            return loaded, False
        return loaded, decoder.agrees(self._rows)


def in_passing_thread(function: Callable[[], Result]) -> Result:
    """Return what the function returns, which a thread of its own computes. A signal does not wait for it.

    OpenMP keeps threads for each thread that has computed. With more of them than cores, they no longer wait for work actively,
    and every token takes half as long again; those of a thread that has ended are gone.
    """
    found: Future[Result] = Future()

    def compute() -> None:
        try:
            found.set_result(function())
        except BaseException as error:
            found.set_exception(error)

    thread = threading.Thread(target=compute, name="opens a checkpoint", daemon=True)
    thread.start()
    try:
        return found.result()
    finally:
        if found.done():
            thread.join()


def selects(source: str) -> bool:
    """Return whether what CHECKPOINT_PATH takes selects one of several checkpoints, so that a newer one may replace it."""
    if source in ("latest", "best") or ckpt.whole_folder(source) is not None:
        return True
    return glob.has_magic(source) and not os.path.lexists(os.path.expanduser(source))


def parts(paths: str) -> list[str]:
    """Return the parts of CHECKPOINT_PATH, each a source or `name=source`."""
    return [paths] if os.path.lexists(paths) else paths.split(",")


def named(part: str) -> tuple[str, str]:
    """Return the name by which a part is served, and its source: of `name=source`, of latest and best, or the name of the file."""
    name, _, source = part.partition("=") if not os.path.isabs(part) else (_stem(part), "", part)
    return name, source or name


def _stem(path: str) -> str:
    name = os.path.basename(path)
    return name if os.path.isdir(path) else os.path.splitext(name)[0]
