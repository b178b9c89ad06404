"""The thread that generates: it gives every running text a step in turn, and waiting texts a slot.

Requests come from the event loop and pieces go back to it; neither waits for the other. The lock is held only to move
texts, never while something is computed.
"""

import asyncio
import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from milepost.generation.decoder import Decoder
from milepost.generation.prefixes import Prefixes
from milepost.serving.faults import queue_full, stopping
from milepost.serving.pieces import Next, Piece, Work, pieces_by_text

MOST_ROWS: Final = 32  # texts that are read together in one pass


class Job:
    """A request from its arrival to its end. The event loop reads what `take` returns whenever `ready` is set."""

    def __init__(self, work: Work, prefixes: Prefixes, *, together: bool, streams: bool) -> None:
        self.work, self.together, self.streams = work, together, streams
        self.cancelled = False
        self.ready = asyncio.Event()
        self.error: Exception | None = None
        self.done = False
        self.first_token: float | None = None  # when it was generated, by time.monotonic
        self._loop = asyncio.get_running_loop()
        self._made: deque[Piece] = deque()
        self._told = False
        self._texts = pieces_by_text(work, prefixes)
        self._to_begin = self._to_end = len(work.prompts) * work.n

    def begin(self) -> "Text":
        """Return the next of its texts, for which there is a slot."""
        self._to_begin -= 1
        return Text(self, next(self._texts))

    @property
    def waits(self) -> bool:
        """Whether texts of the request have not begun."""
        return not self.done and self._to_begin > 0

    def add(self, piece: Piece) -> None:
        """Hand a piece to the event loop, which may see it only once the request has ended."""
        if piece.tokens and self.first_token is None:
            self.first_token = time.monotonic()
        self._made.append(piece)
        if self.streams:
            self._tell()

    def text_ended(self) -> None:
        """End the request with the last of its texts."""
        self._to_end -= 1
        if not self._to_end:
            self.end(None)

    def end(self, error: Exception | None) -> None:
        """End the request, with an error or without."""
        self.error, self.done = error, True
        self._tell()

    def take(self) -> tuple[list[Piece], bool]:
        """Return the pieces since the last call, and whether the request has ended, perhaps with an `error`."""
        self.ready.clear()
        self._told = False
        done = self.done  # first: no piece follows it
        return [self._made.popleft() for _ in range(len(self._made))], done

    def _tell(self) -> None:
        """Wake the event loop, unless it has been woken and has not looked yet."""
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self.ready.set)


class Text:
    """A text of a request while it has a slot. `next` is what it reads next, if that can be read with others."""

    def __init__(self, job: Job, steps: Iterator[tuple[Piece, Next | None]]) -> None:
        self.job, self._steps = job, steps
        self.next: Next | None = None

    def step(self) -> bool:
        """Take a step; return whether the text has ended."""
        try:
            piece, self.next = next(self._steps)
        except StopIteration:
            self.job.text_ended()
            return True
        self.job.add(piece)
        return False


class Generating:
    """The running texts, the requests with texts that wait, and the thread that generates.

    All but the thread is for the event loop.
    """

    def __init__(self, *, slots: int, queue: int) -> None:
        self.slots, self.queue = slots, queue
        self.prefixes = Prefixes(most=slots)  # for the thread
        self.running: list[Text] = []
        self.waiting: deque[Job] = deque()
        self.stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="generating", daemon=True)  # ends with the process

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Give the job's texts slots as they are free. Raise ApiError if the queue is full or the server stops."""
        with self._changed:
            self.check_room()
            self.waiting.append(job)
            self._changed.notify()

    def check_room(self) -> None:
        """Raise ApiError if a further request would find the queue full, or the server stopping."""
        if self.stopping:
            raise stopping()
        running, waiting = self.requests()
        if running + waiting >= self.slots + self.queue:
            raise queue_full(waiting)

    def requests(self) -> tuple[int, int]:
        """Return how many requests have a text that runs, and how many wait for their first.

        One whose end the event loop has been told of is in neither, though its texts keep their slots to the next step.
        """
        running = {text.job for text in self.running if not text.job.done}
        waiting = {job for job in self.waiting.copy() if not job.done}
        return len(running), len(waiting - running)

    def cancel(self, job: Job) -> None:
        """Take the job's place in the queue, or its slots before their next steps."""
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
                self.running += self._begun()
            self.running = [text for text in self.running if not take_step(text, self.running)]

    def _begun(self) -> Iterator[Text]:
        """Begin texts while there are slots: one of each request in turn, so that one with many holds nobody up."""
        for _ in range(self.slots - len(self.running)):
            while self.waiting and not self.waiting[0].waits:  # it failed
                self.waiting.popleft()
            if not self.waiting:
                return
            job = self.waiting.popleft()
            yield job.begin()
            if job.waits:
                self.waiting.append(job)


def take_step(text: Text, running: Sequence[Text]) -> bool:
    """Take a step of the text; return whether it has ended. What others read next is read with what it reads, in one pass.

    An error ends the request, not the others.
    """
    job = text.job
    try:
        if job.done:
            return True
        if job.cancelled:
            job.end(None)
            return True
        if job.together and text.next is not None and text.next.cache.ahead is None:
            same = (other for other in running if other is not text and other.job.work.generator is job.work.generator)
            read_together([text, *same])
        return text.step()
    except Exception as error:
        job.end(error)
        return True


def read_together(texts: Sequence[Text]) -> None:
    """Read what the texts of one decoder read next in one pass, as far as their contexts are not full."""
    decoder = texts[0].job.work.generator
    assert isinstance(decoder, Decoder)
    room = decoder.max_length
    found = (text.next for text in texts if not text.job.cancelled and text.next is not None)
    due = (each for each in found if each.cache.ahead is None and 0 < each.cache.length < room)
    chosen = list(itertools.islice(due, MOST_ROWS))
    if len(chosen) > 1:
        decoder.read_ahead([each.token for each in chosen], [each.cache for each in chosen])
