"""The lease of a run in a mirror: one machine trains it, another takes over when the first has gone silent."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from drive import newest, train
from mirrors import RUN, SMALL, Faulty, in_folder, in_memory, known, lose, saves_of, send, steps, taken, uploader
from records import save
from test_last_step import trained
from work import HANGING

from milepost.locks import RunHeldElsewhereError
from milepost.mirror import Lease, Store, StoreError, lease
from milepost.mirror.lease import EXPIRY, HEARTBEAT, POLL

PLACES = pytest.mark.parametrize("place", [in_folder, lambda _: in_memory()], ids=["file", "memory"])


class Clock:
    """Seconds that pass only in pauses; at each of them the other machine does what `meanwhile` says."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.now, self.meanwhile = 0.0, meanwhile

    def pause(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def leased(monkeypatch) -> Callable[..., tuple[Lease, list[str]]]:
    """Return leases of machines by their name, whose threads do not beat: a test does."""
    monkeypatch.setattr(Lease, "_keep", lambda lease: None)

    def one(store: Store, host: str, clock: Clock | None = None) -> tuple[Lease, list[str]]:
        clock, said = clock or Clock(), []
        return Lease(store, RUN, say=said.append, host=host, pause=clock.pause, clock=clock), said

    return one


def lease_names(store: Store) -> list[str]:
    return [name.rpartition("/")[2] for name in store.names(f"{RUN}/lease")]


@PLACES
def test_a_second_machine_is_refused_while_the_first_one_beats(tmp_path, leased, place):
    store = place(tmp_path / "mirror")
    first, _ = leased(store, "one")
    first.hold()
    clock = Clock(lambda: first._beat(1))
    second, said = leased(store, "two", clock)
    with pytest.raises(RunHeldElsewhereError):
        second.hold()
    assert clock.now <= POLL
    assert len(said) == 1
    first.hold()  # it still has it
    assert lease_names(store) == ["00000001.beat", "00000001.json"]


@PLACES
def test_a_silent_owner_is_replaced_and_notices_it(tmp_path, leased, place):
    store = place(tmp_path / "mirror")
    first, told = leased(store, "one")
    first.hold()
    clock = Clock()
    second, _ = leased(store, "two", clock)
    second.hold()
    assert EXPIRY <= clock.now <= EXPIRY + POLL
    for _ in range(2):
        with pytest.raises(RunHeldElsewhereError):
            first.hold()
    assert len(told) == 1
    assert second.owner in told[0]
    first.release()  # what it no longer has
    second.hold()
    assert lease_names(store) == ["00000002.beat", "00000002.json"]


def test_an_owner_that_beats_slowly_is_not_dead(leased):
    """Control of the expiry: a beat at any time before it counts, whatever the clocks of the machines say."""
    store = in_memory()
    first, _ = leased(store, "one")
    first.hold()
    late = Clock()
    late.meanwhile = lambda: first._beat(1) if late.now >= EXPIRY - POLL else None
    with pytest.raises(RunHeldElsewhereError):
        leased(store, "two", late)[0].hold()
    assert late.now > EXPIRY - 2 * POLL
    assert EXPIRY >= 4 * HEARTBEAT  # some beats may fail


@PLACES
def test_what_was_released_is_free_at_once(tmp_path, leased, place):
    store, clock = place(tmp_path / "mirror"), Clock()
    first, _ = leased(store, "one")
    first.hold()
    first.release()
    second, said = leased(store, "two", clock)
    second.hold()
    assert (clock.now, said) == (0, [])


def test_a_release_that_the_store_did_not_hear_of_locks_this_process_not_out(leased):
    store, clock = in_memory(fs := Faulty()), Clock()
    first, _ = leased(store, "one")
    first.hold()
    fs.faults.extend([ConnectionResetError("reset by peer")] * 2)
    first.release()
    assert store.read(f"{RUN}/lease/00000001.beat", limit=100) != b"released"
    again, said = leased(store, "one", clock)
    again.hold()
    assert (clock.now, said) == (0, [])


def test_released_while_another_watches(leased):
    store = in_memory()
    first, _ = leased(store, "one")
    first.hold()
    clock = Clock(lambda: first.release())
    leased(store, "two", clock)[0].hold()
    assert clock.now == POLL


@pytest.mark.skipif(lease.started(1) is None, reason="this system does not list processes as Linux does")
def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(leased):
    store, clock = in_memory(), Clock()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(HANGING)
    first, _ = leased(store, "one")
    first._owner = json.dumps(json.loads(first._owner) | {"process": dead.pid}).encode()
    first.hold()
    leased(store, "one", clock)[0].hold()
    assert clock.now == 0
    with pytest.raises(RunHeldElsewhereError):  # control: this process lives
        leased(store, "one", clock)[0].hold()
    assert clock.now == 0


@PLACES
def test_of_many_that_start_at_once_one_gets_it(tmp_path, leased, place):
    store, ready = place(tmp_path / "mirror"), threading.Barrier(8)
    won, beaten = [], []

    def start(number: int) -> None:
        own, _ = leased(store, f"machine {number}")
        own._is_free = lambda number: False  # the others live
        ready.wait(HANGING)
        try:
            own.hold()
            won.append(own)
        except RunHeldElsewhereError:
            beaten.append(own)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGING)
    assert (len(won), len(beaten)) == (1, 7)
    assert won[0].exclusive


class Overwriting(Faulty):
    """A store that creates objects over others."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **named: object) -> None:
        """Write bytes, whatever is there."""
        super().pipe_file(path, value)


def test_a_store_that_writes_over_what_exists_is_noticed(leased):
    store = in_memory(Overwriting())
    own, said = leased(store, "one")
    own.hold()
    assert not own.exclusive
    assert len(said) == 1
    with pytest.raises(RunHeldElsewhereError):  # who lives is still seen
        leased(store, "two", Clock(lambda: own._beat(1)))[0].hold()


@pytest.mark.parametrize("broken", range(4))
def test_an_attempt_that_broke_off_is_continued(leased, broken):
    """The answer to a request is lost, whatever the store did."""
    store = in_memory(fs := Faulty())
    own, _ = leased(store, "one")
    fs.faults.extend([None] * broken + [ConnectionResetError("reset")])
    try:
        own.hold()
    except StoreError:
        own.hold()
    own.hold()
    assert lease_names(store) == ["00000001.beat", "00000001.json"]


def test_what_was_given_back_is_not_taken_again(leased):
    """As by an upload that still runs when the end has waited long enough."""
    store = in_memory()
    own, _ = leased(store, "one")
    own.hold()
    own.release()
    with pytest.raises(RunHeldElsewhereError):
        own.hold()
    assert store.read(f"{RUN}/lease/00000001.beat", limit=100) == lease.RELEASED


class Forgetful(Faulty):
    """A store that shows nothing of what it was given."""

    def find(self, path: str, *arguments: object, **named: object) -> list[str]:
        """Find nothing."""
        return []

    def info(self, path: str, **named: object) -> dict[str, object]:
        """Know of nothing."""
        raise FileNotFoundError(path)


def test_a_store_that_shows_nothing_is_not_asked_for_ever(leased):
    with pytest.raises(StoreError) as caught:
        leased(in_memory(Forgetful()), "one")[0].hold()
    assert caught.value.kind == "passing"


def test_a_damaged_lease_expires_too(leased):
    store, clock = in_memory(), Clock()
    store.put(f"{RUN}/lease/00000007.json", b"{")
    leased(store, "two", clock)[0].hold()
    assert clock.now >= EXPIRY
    assert lease_names(store) == ["00000008.beat", "00000008.json"]


def test_the_thread_beats_and_ends_with_the_lease(monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT", 0.001)
    store, beats = in_memory(), set()
    others = set(threading.enumerate())
    own = Lease(store, RUN, say=print)
    own.hold()
    while len(beats) < 3:
        beats.add(store.read(f"{RUN}/lease/00000001.beat", limit=100))
    own.release()
    for thread in set(threading.enumerate()) - others:
        if thread.name == "lease":
            thread.join(HANGING)
    assert store.read(f"{RUN}/lease/00000001.beat", limit=100) == lease.RELEASED


# ---------------------------------------------------------------------------------------------------------------------
# Uploads.


def test_a_machine_that_lost_its_lease_copies_nothing_and_deletes_nothing(tmp_path, leased):
    store, folder = in_memory(), tmp_path / "checkpoints"
    first, told = leased(store, "one")
    mirrored = known(store, tmp_path)
    mirrored.guard = first.hold
    copies, said = uploader(mirrored, keep_last=1)
    copies.submit(save(folder, 1), folder, step=1)
    assert copies.finish() == 0
    leased(store, "two")[0].hold()
    send(
        known(store, tmp_path / "other"),
        save(tmp_path / "other" / "checkpoints", 2),
        tmp_path / "other" / "checkpoints",
    )
    before = {name: store.read(name, limit=2**30) for name in store.names()}
    for step in (3, 4):
        copies.submit(save(folder, step), folder, step=step)
        assert copies.finish() == 1
    assert {name: store.read(name, limit=2**30) for name in store.names()} == before
    assert {*steps(saves_of(store))} == {1, 2}
    assert (len(told), len(said)) == (1, 1)


def test_a_lease_lost_during_an_upload_leaves_no_manifest(tmp_path, leased):
    store, folder = in_memory(fs := Faulty()), tmp_path / "checkpoints"
    first, _ = leased(store, "one")
    mirrored = known(store, tmp_path)
    mirrored.guard = first.hold
    first.hold()

    def take_over(path: str) -> None:
        fs.faults.clear()
        leased(store, "two")[0].hold()

    fs.faults.append(take_over)
    copies, said = uploader(mirrored)
    copies.submit(save(folder, 1), folder, step=1)
    assert copies.finish() == 1
    assert saves_of(store) == []
    assert "latest.json" not in store.names()
    assert len(said) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.


def test_a_run_that_another_process_trains_is_not_resumed(tmp_path):
    """The lease is held here, as by a run that trains; a run with an empty disk wants to resume."""
    mirror = f"file://{tmp_path / 'mirror'}"
    variables = SMALL | {"CHECKPOINT_MIRROR": mirror, "MIRROR_KEEP_LAST": "0"}
    (tmp_path / "one").mkdir()
    assert train(tmp_path / "one", **variables | {"TRAINING_STEPS": "4"})[0] == 0
    store = in_folder(tmp_path / "mirror")
    (run_id,) = {name.split("/")[0] for name in store.names() if "/" in name}
    holder = Lease(store, run_id, say=print)
    holder.hold()
    (tmp_path / "two").mkdir()
    code, said = train(tmp_path / "two", **variables, RESUME="auto")
    assert code == 10
    assert f"error: run {run_id} is being trained by {holder.owner}" in said
    assert not list((tmp_path / "two" / "checkpoints").glob("checkpoint*"))
    lose(tmp_path / "two")
    holder.release()
    assert train(tmp_path / "two", **variables | {"TRAINING_STEPS": "4"}, RESUME="auto")[0] == 0  # control


def test_what_arrives_until_the_lease_is_free_is_resumed(tmp_path, monkeypatch):
    """The machine that trained the run saves once more, and ends, while another one waits for it."""
    mirror, aside = tmp_path / "mirror", tmp_path / "aside"
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{mirror}", "MIRROR_KEEP_LAST": "0"}
    assert train(tmp_path, **variables)[0] == 0
    (last,) = mirror.glob("*/00000003-*")
    (mirror / "latest.json").unlink()
    last.rename(aside)
    hold = Lease.hold

    def held_later(lease: Lease) -> None:
        hold(lease)
        if aside.exists():
            aside.rename(last)

    monkeypatch.setattr(Lease, "hold", held_later)
    lose(tmp_path)
    code, said = train(tmp_path, **variables, RESUME="auto")
    assert code == 0
    assert re.search(r"from the mirror: .+_step0006_", said), said


def test_a_run_whose_lease_is_taken_trains_on_and_leaves_the_mirror_alone(tmp_path, monkeypatch):
    store, clock = in_folder(tmp_path / "mirror"), Clock()
    monkeypatch.setattr(lease, "HEARTBEAT", HANGING)  # cut off

    def take_over() -> None:
        (run_id,) = os.listdir(tmp_path / "runs")
        Lease(store, run_id, say=print, host="two", pause=clock.pause, clock=clock).hold()

    code, said = trained(tmp_path, {3: take_over}, **SMALL, CHECKPOINT_MIRROR=f"file://{tmp_path / 'mirror'}")
    assert code == 8
    assert said.count("has taken over run") == 1
    assert newest(tmp_path).step == 6
    assert max([0, *(each.found.step for each in taken(store))]) <= 2


def test_a_run_that_saves_nothing_needs_no_lease(tmp_path):
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}", "MIRROR_KEEP_LAST": "0"}
    assert train(tmp_path, **variables | {"TRAINING_STEPS": "4"})[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mirror").rglob("*")}
    lose(tmp_path)
    code, said = train(tmp_path, **variables | {"ENABLE_CHECKPOINTS": "false"}, RESUME="auto")
    assert (code, "from the mirror" in said) == (0, True), said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mirror").rglob("*")} == before


def test_a_run_gives_its_lease_back(tmp_path):
    assert train(tmp_path, **SMALL, CHECKPOINT_MIRROR=f"file://{tmp_path / 'mirror'}")[0] == 0
    beats = [path.read_bytes() for path in (tmp_path / "mirror").rglob("*.beat")]
    assert beats == [lease.RELEASED]
