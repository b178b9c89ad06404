"""Saving in the background: the written record is the one submitted, one save at a time, and no error is lost."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drive import tensor_bytes, train
from records import WEIGHT, record
from work import HANGING

from milepost import ckpt
from milepost.ckpt import Checkpoint, writer
from milepost.ckpt.writer import Writer

PLENTY = 10**12
WAITING = ("wait", "join", "_wait_for_tstate_lock")  # functions of `threading`


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def background(said) -> Writer:
    return Writer(background=True, free_memory=lambda: PLENTY, say=said.append)


def bytes_seen(seen: list[Any]):
    return lambda one: seen.append((one.step, tensor_bytes(one)))


@pytest.mark.parametrize("in_background", [True, False])
def test_the_job_sees_the_state_of_its_moment(in_background, said):
    writer, seen, expected = Writer(background=in_background, free_memory=lambda: PLENTY, say=said.append), [], []
    one = record(1, size=64)
    one.model_state["half"] = torch.ones(3, dtype=torch.bfloat16)
    for step in range(1, 5):
        one.step = step
        expected.append((step, tensor_bytes(one)))
        writer.submit(one, bytes_seen(seen))
        writer.settle()
        one.model_state[WEIGHT].add_(1)  # as the optimizer does
        one.optimizer_state["state"][0]["step"].add_(1)
    writer.wait()
    assert seen == expected
    assert said == []


def test_control_what_changes_before_it_is_settled_is_not_kept(background, monkeypatch):
    """Negative control: the same comparison sees a change that comes too early."""
    gate, copy, seen, one = threading.Event(), writer._copy, [], record(1, size=64)

    def late(tensor: torch.Tensor, buffer: torch.Tensor) -> None:
        gate.wait()
        copy(tensor, buffer)

    monkeypatch.setattr(writer, "_copy", late)
    before = tensor_bytes(one)
    background.submit(one, bytes_seen(seen))
    one.model_state[WEIGHT].add_(1)
    gate.set()
    background.wait()
    assert seen != [(1, before)]
    assert seen == [(1, tensor_bytes(one))]


def start(action: Callable[[], None]) -> tuple[threading.Thread, threading.Event]:
    """Do `action` in a thread of its own, which nobody has to wait for; the event is set when it has come back."""
    back = threading.Event()
    thread = threading.Thread(target=lambda: (action(), back.set()), daemon=True)
    thread.start()
    return thread, back


def waits(thread: threading.Thread, back: threading.Event) -> bool:
    """Return whether the thread stands in a wait, once it does or has come back."""
    while not back.is_set():
        frame = sys._current_frames().get(thread.ident or 0)
        if frame is not None and frame.f_code.co_filename == threading.__file__ and frame.f_code.co_name in WAITING:
            return True
    return False


def test_settle_waits_for_the_copy_and_not_for_the_job(background, monkeypatch):
    copying, copied, written, copy, seen = *(threading.Event() for _ in range(3)), writer._copy, []

    def slow(tensor: torch.Tensor, buffer: torch.Tensor) -> None:
        copying.set()
        copied.wait(HANGING)
        copy(tensor, buffer)
        seen.append("copied")

    def job(_: Checkpoint) -> None:
        written.wait(HANGING)
        seen.append("written")

    background.submit(record(1), lambda _: None)
    background.wait()  # that one is copied, and the next is not yet
    monkeypatch.setattr(writer, "_copy", slow)
    try:
        background.submit(record(1, optimizer_state=None), job)
        assert copying.wait(HANGING)
        thread, back = start(lambda: (background.settle(), seen.append("settled")))
        assert waits(thread, back)
        copied.set()
        assert back.wait(HANGING)  # although the job is not done
        assert seen == ["copied", "settled"]
    finally:
        copied.set()
        written.set()
        background.wait()
    assert seen == ["copied", "settled", "written"]


def test_one_save_is_in_flight_and_the_next_waits(background):
    begun, free = threading.Event(), threading.Event()
    events: list[str] = []

    def first(_: Checkpoint) -> None:
        events.append("first begins")
        begun.set()
        free.wait(HANGING)
        events.append("first ends")

    def submit_second() -> None:
        background.submit(record(2), lambda _: events.append("second"))

    try:
        background.submit(record(1), first)
        assert begun.wait(HANGING)
        thread, back = start(submit_second)
        assert waits(thread, back)
        assert events == ["first begins"]
        free.set()
        assert back.wait(HANGING)
    finally:
        free.set()
        background.wait()
    assert events == ["first begins", "first ends", "second"]


def test_buffers_are_kept_and_follow_a_record_that_grows(background):
    places: list[dict[str, int]] = []

    def job(one: Checkpoint) -> None:
        places.append({name: tensor.data_ptr() for name, tensor in writer.named_tensors(one).items()})

    small = record(1, optimizer_state=None)
    for one in (small, small, record(1), record(2)):
        background.submit(one, job)
    background.wait()
    assert places[0] == places[1]
    assert places[2] == places[3]
    assert places[0].items() <= places[2].items()
    assert len(places[2]) == 4


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("bad"), KeyboardInterrupt()])
def test_what_a_job_raises_is_raised_once_by_who_waits(error, background):
    def fail(_: Checkpoint) -> None:
        raise error

    background.submit(record(1), fail)
    background.settle()
    with pytest.raises(type(error)):
        background.wait()
    background.wait()
    background.submit(record(1), fail)
    with pytest.raises(type(error)):
        background.submit(record(2), lambda _: None)


@pytest.mark.parametrize("free", [lambda: 100, "torch"])
def test_without_memory_for_a_copy_it_saves_at_once_and_warns_once(free, said, monkeypatch):
    if free == "torch":

        def refused(*_: Any, **__: Any) -> None:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")

        monkeypatch.setattr(torch, "empty", refused)
        free = lambda: None  # noqa: E731  (a system that does not tell)
    one, threads = Writer(background=True, free_memory=free, say=said.append), []
    for step in (1, 2):
        one.submit(record(step), lambda _: threads.append(threading.current_thread()))
    assert threads == [threading.main_thread()] * 2
    assert len(said) == 1
    assert "no memory for a copy of" in said[0]


def test_training_in_the_background_leaves_the_same_files(tmp_path):
    """Each checkpoint of a run that saves after every step, by both ways."""
    seen = {}
    for mode in ("true", "false"):
        folder = tmp_path / mode
        folder.mkdir()
        code, told = train(folder, CHECKPOINT_ASYNC=mode, CHECKPOINT_INTERVAL="1", OPTIMIZER="muon")
        assert code == 0, told
        found = ckpt.find(folder / "checkpoints")
        seen[mode] = [(one.step, tensor_bytes(ckpt.load(one.path, verify=True))) for one in found]
    assert [step for step, _ in seen["true"]] == list(range(1, 9))
    assert seen["true"] == seen["false"]


def test_control_training_that_does_not_settle_saves_nothing(tmp_path, monkeypatch):
    """Negative control: without the call before the update, a copy that is late has the next step's weights, which are not
    what its step left.
    """
    late, copy, wait = threading.Event(), writer._copy, Writer.wait
    seen = {}

    def copied(tensor: torch.Tensor, buffer: torch.Tensor) -> None:
        late.wait(HANGING)
        copy(tensor, buffer)

    def waited(self: Writer) -> None:
        late.set()  # the next save asks for this, after its update
        wait(self)
        late.clear()

    for mode in ("settled", "not"):
        folder = tmp_path / mode
        folder.mkdir()
        if mode == "not":
            monkeypatch.setattr(writer, "_copy", copied)
            monkeypatch.setattr(Writer, "wait", waited)
            monkeypatch.setattr(Writer, "settle", lambda self: None)
        code, told = train(folder, TRAINING_STEPS="2", CHECKPOINT_INTERVAL="1", N_LAYER="1", WARMUP_STEPS="0")
        saved = [found.step for found in ckpt.find(folder / "checkpoints")]
        seen[mode] = code, saved, "changed in memory" in told
    assert seen == {"settled": (0, [1, 2], False), "not": (7, [], True)}
