"""One machine trains a run: the lease of a run in a store, taken by creating an object that must not exist yet.

    <run_id>/lease/00000003.json    # who took the lease as the third; never changed
    <run_id>/lease/00000003.beat    # a number that its owner changes while it lives, and at the end RELEASED

The highest number holds the lease. An owner whose beat stays the same for EXPIRY seconds counts as dead, and the next
number may be taken. Only the watcher's own clock measures that, because clocks of machines differ.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from milepost.files.owner_file import started
from milepost.locks import RunHeldElsewhereError
from milepost.mirror.retrying import attempted
from milepost.mirror.store import Store, StoreError

HEARTBEAT = 15.0  # seconds between two beats
EXPIRY = 90.0  # seconds without a beat after which an owner counts as dead
SELDOM = 8  # times as long where each beat is a commit: the hub takes so many an hour, and keeps them
POLL = 3.0  # seconds between two looks at another owner's beat
TRIES = 5  # numbers that others may take first
LIMIT = 2**12  # bytes of an object
RELEASED = b"released"
FOLDER = "lease"
NAME = re.compile(r"([0-9]{8})\.(?:json|beat)")
# Owners of this process whose leases have ended, also where the store did not hear of it.
GIVEN_BACK: set[bytes] = set()
Say = Callable[[str], object]


def machine() -> str:
    """Return a name for where the numbers of processes are those that this process sees: a hash, without the host's name."""
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):
        known += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]


class Lease:
    """The lease of one run. `hold` takes it, a thread keeps it fresh, `release` gives it back."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        *,
        say: Say,
        host: str | None = None,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`host` replaces the name of this machine; `pause` waits some seconds, `clock` returns seconds."""
        self._store, self._folder, self._run_id = store, f"{run_id}/{FOLDER}", run_id
        self._say, self.pause, self._clock = say, pause, clock
        self._pace = SELDOM if store.commits else 1
        self.expiry = EXPIRY * self._pace  # seconds without a beat after which an owner of this run counts as dead
        owner = {"machine": host or machine(), "process": os.getpid(), "started": started(os.getpid())}
        self._owner = json.dumps(owner | {"draw": os.urandom(8).hex()}).encode()
        self._number = 0  # 0: not held
        self._beats = 0
        self._lost = ""  # to whom
        self._busy = threading.Lock()
        self._ended = threading.Event()
        self.exclusive = True  # whether the store lets only one of two machines create an object

    @property
    def owner(self) -> str:
        """The name of this process that others see."""
        return _shown(self._owner)

    def hold(self) -> None:
        """Take the lease, or check that it still is this process's.

        Wait while another owner seems dead. Raise RunHeldElsewhereError if another process holds it or this one has released
        it, StoreError.
        """
        with self._busy:
            if self._ended.is_set():
                raise RunHeldElsewhereError(f"run {self._run_id} has ended here")
            self._check()
            if not self._number:
                if not any(self._taken() for _ in range(TRIES)):
                    raise StoreError(self._store.shown, "does not show what was just written there", "passing")
                threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def release(self) -> None:
        """Give the lease back, if it is held. A store that does not answer twice lets it expire: an end does not wait for it,
        and this process may take it again at once.
        """
        self._ended.set()
        GIVEN_BACK.add(self._owner)
        with self._busy:
            for _ in range(2 if self._number and not self._lost else 0):
                with contextlib.suppress(StoreError):
                    self._store.put(self._name("beat", self._number), RELEASED)
                    break
            self._number = 0

    def _check(self) -> None:
        """Raise RunHeldElsewhereError if another process has taken the lease from this one."""
        if self._number and not self._lost and (newest := self._newest()) > self._number:
            self._lost = self._shown(newest)
            self._say(
                f"warning: {self._lost} has taken over run {self._run_id} in {self._store.shown}, after {self.expiry:.0f} s "
                "without a sign of life from here: nothing more is copied there, and one of the two should be stopped"
            )
        if self._lost:
            raise RunHeldElsewhereError(f"{self._lost} has taken over the run in the mirror")

    def _taken(self) -> bool:
        """Try to take the number after the newest; return False if another process was faster."""
        number = self._newest()
        if not number or self._read(self._name("json", number)) != self._owner:  # else an earlier attempt broke off
            if number and not self._is_free(number):
                holder = f"{self._shown(number)}, says {self._store.shown}"
                raise RunHeldElsewhereError(
                    f"run {self._run_id} is being trained by {holder}: wait for it or stop it first"
                )
            number += 1
            if not self._created(number) or self._newest() > number:
                return False
        self._beat(number)
        self._number = number
        with contextlib.suppress(StoreError):  # what is older is only in the way
            for old in (name for name in self._names() if int(name[:8]) < number):
                self._store.delete(f"{self._folder}/{old}")
        return True

    def _created(self, number: int) -> bool:
        """Create the object of a number; return whether it is this process's, also if the answer to that was lost."""
        name = self._name("json", number)
        if self._store.create(name, self._owner):
            self.exclusive = not self._store.create(name, self._owner)  # it is there, so it must not be created again
            if not self.exclusive:
                self._say(
                    f"warning: {self._store.shown} writes over objects that exist, so two machines that start this run at the "
                    "same moment would both train it"
                )
        elif not self._read(name):  # who began to create it may have died: the number is watched like one that is held
            self._store.put(self._name("beat", number), b"")
        return self._read(name) == self._owner

    def _is_free(self, number: int) -> bool:
        """Whether the owner of a number has released the lease or is dead; watch it if this machine cannot know."""
        holder = self._read(self._name("json", number))
        owner, here = _parsed(holder), _parsed(self._owner)
        name = self._name("beat", number)
        beat = self._read(name)
        if beat == RELEASED or holder in GIVEN_BACK:
            return True
        process = owner.get("process")
        if owner.get("machine") == here["machine"] and here["started"] and isinstance(process, int):
            return started(process) != owner.get("started")
        self._say(
            f"{self._shown(number)} holds run {self._run_id} in the mirror: waiting up to {self.expiry:.0f} s to see whether it lives"
        )
        until = self._clock() + self.expiry
        while self._clock() < until:
            self.pause(POLL)
            if (now := self._read(name)) != beat:
                return now == RELEASED
        return True

    def _keep(self) -> None:
        """Beat until the lease is released or lost. A store that does not answer is asked again."""
        while not self._ended.wait(HEARTBEAT * self._pace):
            try:
                with self._busy:
                    self._check()
                    if self._number:
                        self._beat(self._number)
            except RunHeldElsewhereError:
                return
            except StoreError:  # the uploads report it
                continue

    def _beat(self, number: int) -> None:
        self._beats += 1
        self._store.put(self._name("beat", number), str(self._beats).encode())

    def _names(self) -> list[str]:
        names = (name.rpartition("/")[2] for name in self._store.names(self._folder))
        return [name for name in names if NAME.fullmatch(name)]

    def _newest(self) -> int:
        return max((int(name[:8]) for name in self._names()), default=0)

    def _name(self, kind: str, number: int) -> str:
        return f"{self._folder}/{number:08d}.{kind}"

    def _read(self, name: str) -> bytes:
        """Return the content of an object, nothing if it is missing."""
        try:
            return self._store.read(name, limit=LIMIT)
        except StoreError as error:
            if error.kind != "missing":
                raise
            return b""

    def _shown(self, number: int) -> str:
        return _shown(self._read(self._name("json", number)))


def _parsed(content: bytes) -> dict[str, object]:
    """Return the owner that an object names; empty if it is damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        owner = json.loads(content)
        if isinstance(owner, dict):
            return owner
    return {}


def _shown(content: bytes) -> str:
    owner = _parsed(content)
    return f"process {str(owner.get('process'))[:12]} on machine {str(owner.get('machine'))[:12]}"


@contextlib.contextmanager
def holding(lease: Lease) -> Iterator[None]:
    """Hold a lease in the block, also if the store does not answer at first. Raise as `hold` does."""
    try:
        attempted(lease.hold, pause=lease.pause)
        yield
    finally:
        lease.release()
