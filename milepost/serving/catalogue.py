"""The checkpoints that are served, by name, and following those that a run in training still writes."""

import glob
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.generation.conversation import NO_TEMPLATE
from milepost.generation.decoder import Decoder
from milepost.runtime.progress import Log
from milepost.samples import Loaded

LOOK_EVERY: Final = 2.0  # seconds between two looks for a newer checkpoint
LOOK_SHARE: Final = 20  # a look takes at most one part in so many of the time

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


class Catalogue:
    """The models by name. `look` replaces those whose name selects another checkpoint by now; requests keep theirs."""

    def __init__(self, sources: Mapping[str, str], folder: Path, *, open_one: Open, rows: int, log: Log) -> None:
        """Open all `sources`, each what CHECKPOINT_PATH takes, by their names. `rows` is how many texts may be read together."""
        self._folder, self._open, self._rows, self._log = folder, open_one, rows, log
        self._followed = {name: source for name, source in sources.items() if selects(source)}
        self._seen: dict[str, Path] = {}
        self.models: dict[str, Served] = {}
        for name, source in sources.items():
            if name in self._followed:
                self._seen[name], _ = ckpt.resolve(source, folder)
            self._put(name, source)

    def look(self) -> float:
        """Open what the followed names select by now; return the seconds to wait before the next look.

        What cannot be opened is reported once, and the earlier weights stay.
        """
        began = time.monotonic()
        for name, source in self._followed.items():
            try:
                path, _ = ckpt.resolve(source, self._folder)
                if path != self._seen[name]:
                    self._seen[name] = path
                    self._put(name, str(path))
            except CheckpointError as error:
                self._log(f"{name} stays at {self.models[name].fingerprint}: {error}")
        return max(LOOK_EVERY, LOOK_SHARE * (time.monotonic() - began))

    def _put(self, name: str, source: str) -> None:
        # In a thread that ends: OpenMP keeps threads for each thread that has computed. With more of them than cores, they no
        # longer wait for work actively, and every token takes half as long again.
        with ThreadPoolExecutor(1) as passing:
            loaded, together = passing.submit(self._opened, source).result()
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


def selects(source: str) -> bool:
    """Return whether what CHECKPOINT_PATH takes selects one of several checkpoints, so that a newer one may replace it."""
    if source in ("latest", "best") or ckpt.whole_folder(source) is not None:
        return True
    return glob.has_magic(source) and not os.path.lexists(os.path.expanduser(source))


def named(paths: str) -> list[tuple[str, str]]:
    """Return the pairs of name and source in CHECKPOINT_PATH: of `name=path`, of latest and best, or the name of the file."""
    parts = [paths] if os.path.lexists(paths) else paths.split(",")
    pairs = (part.partition("=") if not os.path.isabs(part) else (_stem(part), "", part) for part in parts)
    return [(name, source or name) for name, _, source in pairs]


def _stem(path: str) -> str:
    name = os.path.basename(path)
    return name if os.path.isdir(path) else os.path.splitext(name)[0]
