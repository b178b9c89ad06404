"""The thread that generates: it gives every running request a step in turn, and waiting requests a slot.

Requests come from the event loop and pieces go back to it; neither waits for the other. The lock is held only to move
requests, never while something is computed.
"""

import asyncio
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from milepost.generation.decoder import Decoder
from milepost.serving.faults import queue_full, stopping
from milepost.serving.pieces import Next, Piece, Work, pieces

MOST_ROWS: Final = 32  # texts that are read together in one pass


class Job:
    """A request from its arrival to its end. The event loop reads what `take` returns whenever `ready` is set."""

    def __init__(self, work: Work, *, together: bool, streams: bool) -> None:
        self.work, self.together, self.streams = work, together, streams
        self.cancelled = False
        self.next: Next | None = None
        self.ready = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._made: deque[Piece] = deque()
        self.error: Exception | None = None
        self._done = self._told = False
        self._steps: Iterator[tuple[Piece, Next | None]] = pieces(work)

    def step(self) -> bool:
        """Take a step; return whether the request has ended. Called by the generating thread."""
        try:
            piece, self.next = next(self._steps)
        except StopIteration:
            self.end(None)
        except Exception as error:
            self.end(error)
        else:
            self._made.append(piece)
            if self.streams:
                self._tell()
        return self._done

    def end(self, error: Exception | None) -> None:
        """End the request, with an error or without, and forget its cache."""
        self.next, self._steps = None, iter(())
        self.error, self._done = error, True
        self._tell()

    def take(self) -> tuple[list[Piece], bool]:
        """Return the pieces since the last call, and whether the request has ended, perhaps with an `error`."""
        self.ready.clear()
        self._told = False
        done = self._done  # first: no piece follows it
        return [self._made.popleft() for _ in range(len(self._made))], done

    def _tell(self) -> None:
        """Wake the event loop, unless it has been woken and has not looked yet."""
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self.ready.set)


class Generating:
    """The running and the waiting requests, and the thread that generates. All but the thread is for the event loop."""

    def __init__(self, *, slots: int, queue: int) -> None:
        self.slots, self.queue = slots, queue
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="generating", daemon=True)  # ends with the process

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Give the job a slot as soon as one is free. Raise ApiError if the queue is full or the server stops."""
        with self._changed:
            self.check_room()
            self.waiting.append(job)
            self._changed.notify()

    def check_room(self) -> None:
        """Raise ApiError if a further request would find the queue full, or the server stopping."""
        if self.stopping:
            raise stopping()
        if len(self.running) + len(self.waiting) >= self.slots + self.queue:
            raise queue_full(len(self.waiting))

    def cancel(self, job: Job) -> None:
        """Take the job's place in the queue, or its slot before its next step."""
        job.cancelled = True
        with self._changed:
            if job in self.waiting:
                self.waiting.remove(job)

    def stop(self) -> None:
        """Refuse further requests; those that were accepted go on."""
        self.stopping = True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self.running and not self.waiting:
                    self._changed.wait()
                while self.waiting and len(self.running) < self.slots:
                    self.running.append(self.waiting.popleft())
                running = list(self.running)
            ended = [job for job in running if take_step(job, running)]
            with self._changed:
                self.running = [job for job in self.running if job not in ended]


def take_step(job: Job, running: Sequence[Job]) -> bool:
    """Take a step of the job; return whether it has ended. What others read next is read with what it reads, in one pass."""
    try:
        if job.cancelled:
            job.end(None)
            return True
        if job.together and job.next is not None and job.next.cache.ahead is None:
            same = (other for other in running if other is not job and other.work.generator is job.work.generator)
            read_together([job, *same])
    except Exception as error:  # of this request only: the others are read alone
        job.end(error)
        return True
    return job.step()


def read_together(jobs: Sequence[Job]) -> None:
    """Read what the jobs of one decoder read next in one pass, as far as their contexts are not full."""
    decoder = jobs[0].work.generator
    assert isinstance(decoder, Decoder)
    room = decoder.max_length
    found = (job.next for job in jobs if not job.cancelled and job.next is not None)
    due = (each for each in found if each.cache.ahead is None and 0 < each.cache.length < room)
    chosen = list(itertools.islice(due, MOST_ROWS))
    if len(chosen) > 1:
        decoder.read_ahead([each.token for each in chosen], [each.cache for each in chosen])
