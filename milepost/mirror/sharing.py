"""An upload that several processes share: each copies the files that it wrote, and rank 0 asks for them and waits.

They write to a board, the store through which the processes of a training have found each other:

    job/<n>              from rank 0: the name of a save, and for each rank its files, {place: path}
    moved/<n>/<rank>     a count that changes while the files of that rank are sent
    done/<n>/<rank>      the parts that are there; files that are missing among them are left to rank 0
    gone/<rank>          this rank copies nothing more
    closed               rank 0 asks for nothing more
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from milepost.ckpt.record import CheckpointError
from milepost.mirror.bandwidth import Bandwidth
from milepost.mirror.contents import Part
from milepost.mirror.retrying import attempted
from milepost.mirror.store import StoreError
from milepost.mirror.uploading import GoneError, Mirrored, Sending, upload_file

POLL = 0.2  # seconds between two looks at the board
STALLED = 600.0  # seconds in which nothing of another rank arrives, after which rank 0 copies its files


class Board(Protocol):
    """Values by name that all processes see, as torch's stores have them."""

    def set(self, key: str, value: str) -> object:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Return a value that is there."""

    def check(self, keys: list[str]) -> bool:
        """Return whether these keys are there."""


class Sharing:
    """Rank 0's side."""

    def __init__(
        self,
        board: Board,
        *,
        size: int,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`size` is the number of processes; `pause` waits some seconds, `clock` returns seconds."""
        self._board, self._size, self._pause, self._clock = board, size, pause, clock
        self._jobs = 0

    def ask(
        self, name: str, files: Mapping[int, Mapping[str, Path]], moved: Callable[[int], None]
    ) -> Callable[[], dict[str, Part]]:
        """Ask each rank to copy its files of a save; return a function that waits for them and returns the parts that are
        there, by place. It calls `moved` whenever something has arrived.
        """
        asked = {rank: own for rank, own in files.items() if 0 < rank < self._size}
        job, self._jobs = self._jobs, self._jobs + 1
        named = {rank: {place: str(path.absolute()) for place, path in own.items()} for rank, own in asked.items()}
        try:
            self._board.set(f"job/{job}", json.dumps({"name": name, "files": named}))
        except RuntimeError:  # the board is gone
            return dict
        return lambda: {part.place: part for rank in asked for part in self._parts_of(job, rank, moved)}

    def _parts_of(self, job: int, rank: int, moved: Callable[[int], None]) -> list[Part]:
        """Wait for the parts of a rank, as long as something of it arrives."""
        count, since = b"", self._clock()
        with contextlib.suppress(RuntimeError):  # the board is gone
            while not self._board.check([f"done/{job}/{rank}"]):
                now = self._board.get(f"moved/{job}/{rank}") if self._board.check([f"moved/{job}/{rank}"]) else b""
                if now != count:
                    count, since = now, self._clock()
                    moved(0)
                if self._clock() - since > STALLED or self._board.check([f"gone/{rank}"]):
                    return []
                self._pause(POLL)
            return [Part(**part) for part in json.loads(self._board.get(f"done/{job}/{rank}"))]
        return []

    def close(self) -> None:
        """Let the other ranks end."""
        with contextlib.suppress(RuntimeError):
            self._board.set("closed", "")


class Helper:
    """The side of another rank: a thread that copies this rank's files when rank 0 asks for them."""

    def __init__(
        self,
        board: Board,
        known: Mirrored,
        *,
        rank: int,
        rate: float = 0.0,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`rate` bounds the bytes per second of this rank (0: any); `pause` waits some seconds, `clock` returns seconds."""
        self._board, self._known, self._rank, self._pause = board, known, rank, pause
        self._bandwidth = Bandwidth(rate, pause=pause, clock=clock)
        self._ended = threading.Event()
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def finish(self) -> None:
        """Wait until rank 0 asks for nothing more."""
        with contextlib.suppress(RuntimeError):
            while not (self._ended.is_set() or self._board.check(["closed"])):
                self._ended.wait(POLL)

    def leave(self) -> None:
        """Copy nothing more."""
        self._ended.set()
        with contextlib.suppress(RuntimeError):
            self._board.set(f"gone/{self._rank}", "")

    def _work(self) -> None:
        job = 0
        with contextlib.suppress(RuntimeError):
            while not self._ended.wait(POLL):
                while self._board.check([f"job/{job}"]):
                    asked = json.loads(self._board.get(f"job/{job}"))
                    files = asked["files"].get(str(self._rank), {})
                    parts = [asdict(part) for part in self._copied(job, asked["name"], files)]
                    self._board.set(f"done/{job}/{self._rank}", json.dumps(parts))
                    job += 1

    def _copied(self, job: int, name: str, files: Mapping[str, str]) -> Iterator[Part]:
        """Yield the parts of this rank's files that could be copied. Rank 0 copies the others, and reports what is wrong."""
        moved = iter(range(10**12))

        def sent(size: int) -> None:
            self._board.set(f"moved/{job}/{self._rank}", str(next(moved)))
            self._bandwidth.sent(size)

        sending = Sending(lambda action: attempted(action, pause=self._pause), sent, self._bandwidth.piece)
        for place, path in files.items():
            with contextlib.suppress(StoreError, GoneError, CheckpointError, OSError):
                yield upload_file(self._known, Path(path), place, name, sending)
