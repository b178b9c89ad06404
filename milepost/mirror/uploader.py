"""A thread that copies each new checkpoint to the mirror. Training neither waits for it nor ends because of it."""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from milepost.ckpt.record import CheckpointError
from milepost.locks import RunLockedError
from milepost.mirror.bandwidth import Bandwidth
from milepost.mirror.retrying import attempted
from milepost.mirror.store import StoreError
from milepost.mirror.uploading import (
    GoneError,
    Mirrored,
    Sending,
    UnfitNameError,
    bests_to_upload,
    look_up,
    prune,
    upload,
)

STALLED = 900.0  # seconds in which no part of a file arrives, after which the end of a run waits no longer


@dataclass(frozen=True)
class _Job:
    checkpoint: Path
    folder: Path  # the checkpoint folder that it lies in
    step: int


class Uploader:
    """Copies checkpoints one at a time. Of those that come meanwhile, only the newest waits; the others are skipped.

    A checkpoint that could not be copied is tried again at the end, unless a newer one has taken its place.
    """

    def __init__(
        self,
        known: Mirrored,
        *,
        keep_last: int,
        say: Callable[[str], None],
        warn: Callable[[str], object] = lambda line: None,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        rate: float = 0.0,
    ) -> None:
        """`warn` gets why a checkpoint is not copied; `pause` waits some seconds, `clock` returns seconds, `rate` bounds the
        bytes per second (0: any).
        """
        self._known, self._keep_last, self._say, self._pause, self._clock = known, keep_last, say, pause, clock
        self._warn = warn
        self._bandwidth = Bandwidth(rate, pause=pause, clock=clock)
        self._changed = threading.Condition()
        self._waiting: _Job | None = None
        self._current: _Job | None = None
        self._failed: _Job | None = None
        self._thread: threading.Thread | None = None
        self._moved = clock()  # when a part of a file arrived last
        self._problems: dict[str, str] = {}  # that were reported last: of copying, of deleting
        self.skipped = 0  # checkpoints that a newer one overtook
        self.newest = ""  # the address of the newest checkpoint that is there

    def submit(self, checkpoint: Path, folder: Path, *, step: int) -> None:
        """Copy the checkpoint below `folder` soon; return at once."""
        with self._changed:
            self.skipped += (self._waiting is not None) + (self._failed is not None)
            self._waiting, self._failed = _Job(checkpoint, folder, step), None
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def in_use(self) -> set[Path]:
        """Return the checkpoints that are being copied or are to be, which must stay on the disk until then."""
        with self._changed:
            return {job.checkpoint for job in (self._waiting, self._current, self._failed) if job is not None}

    @property
    def behind(self) -> int:
        """How many checkpoints are not mirrored yet, without those that newer ones overtook."""
        return len(self.in_use())

    def finish(self) -> int:
        """Wait for the last checkpoint, and try it once more if it had failed; return how many are not mirrored.

        Give up if nothing arrives for STALLED seconds.
        """
        with self._changed:
            if self._waiting is None:
                self._waiting, self._failed = self._failed, None
            self._moved = self._clock()
            self._changed.notify_all()
            while (self._waiting or self._current) and self._clock() - self._moved < STALLED:
                self._changed.wait(1.0)
        return self.behind

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None:
                    self._changed.wait()
                job, self._current, self._waiting = self._waiting, self._waiting, None
            done = self._mirror(job)
            with self._changed:
                self._current = None
                if not done:
                    overtaken = self._waiting is not None
                    self.skipped += overtaken
                    self._failed = None if overtaken else job
                self._changed.notify_all()

    def _mirror(self, job: _Job) -> bool:
        """Copy a checkpoint, after those of best/ that the mirror lacks; return False if it may be tried again.

        Report why it is not there, once for each reason.
        """
        try:
            self._attempt(self._known.guard)
            if not self._known.looked_up:
                self._attempt(lambda: look_up(self._known))
            for best in bests_to_upload(self._known, besides=job.checkpoint):
                self._copy_best(best)
            self._copy(job.checkpoint, job.folder)
        except Exception as error:  # whatever it is, training continues
            self._report("copying", f"step {job.step} is not mirrored", error)
            return False
        if self._problems.pop("copying", None):
            self._say(f"the mirror works again: step {job.step} is there")
        if self._keep_last:
            self._prune()
        return True

    def _prune(self) -> None:
        """Delete what has expired in the mirror; report why that failed, once for each reason."""
        try:
            self._attempt(self._known.guard)
            self._attempt(lambda: prune(self._known, keep_last=self._keep_last))
            self._problems.pop("deleting", None)
        except Exception as error:
            self._report("deleting", "expired checkpoints could not be deleted", error)

    def _copy_best(self, checkpoint: Path) -> None:
        """Copy a checkpoint of best/, unless it is gone, because a better one is there, or has a name that cannot be brought back."""
        try:
            self._copy(checkpoint, self._known.checkpoints)
        except GoneError:
            self.skipped += 1
        except UnfitNameError as error:
            self._report("copying one of best/", f"{checkpoint.name} is not mirrored", error)

    def _copy(self, checkpoint: Path, folder: Path) -> None:
        save = upload(self._known, checkpoint, folder, Sending(self._attempt, self._sent, self._bandwidth.piece))
        self.newest = f"{self._known.store.shown}/{save.run_id}/{save.name}"

    def _attempt(self, action: Callable[[], object]) -> None:
        attempted(action, pause=self._pause)
        self._move()

    def _sent(self, size: int) -> None:
        self._move()
        self._bandwidth.sent(size)

    def _move(self) -> None:
        self._moved = self._clock()

    def _report(self, doing: str, what: str, error: Exception) -> None:
        """Report a problem, unless it is the last one of doing this again, whatever object it names."""
        known = isinstance(error, StoreError | OSError | CheckpointError | RunLockedError | GoneError | UnfitNameError)
        problem = re.sub(r"\S+://\S+", "", error.problem if isinstance(error, StoreError) else str(error))
        if problem != self._problems.get(doing):
            line = f"{what} ({error if known else f'{type(error).__name__}: {error}'})"
            self._say(f"mirror: {line}; training continues")
            if doing != "deleting":
                self._warn(line)
        self._problems[doing] = problem
