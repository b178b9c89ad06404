"""Signals: the first asks for a stop, the second stops at once, and afterwards everything is as it was."""

import os
import signal
import subprocess
import sys

import pytest
from drive import ROOT, environment

import training
from milepost.runtime.interrupt import INTERRUPTED, Interrupt

# It says when it is ready and when it was asked to stop, and then goes on for ever; only an orderly end would say "cleaned up".
CHILD = """
import atexit, signal
from milepost.runtime.interrupt import Interrupt
atexit.register(print, "cleaned up", flush=True)
with Interrupt() as stop:
    print("ready", stop.requested, flush=True)
    while not stop.requested:
        signal.pause()
    print("asked to stop", flush=True)
    while True:
        signal.pause()
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_a_flag_and_the_second_ends_the_process_at_once(first, second):
    with subprocess.Popen([sys.executable, "-c", CHILD], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready False\n"
        child.send_signal(first)
        assert child.stdout.readline() == "asked to stop\n"
        assert child.poll() is None
        child.send_signal(second)
        assert child.wait(timeout=30) == INTERRUPTED == 130
        assert child.stdout.read() == ""  # no "cleaned up": nothing may delay it


# Both signals arrive in the third step of a training.
TWICE = """
import os, signal, sys
sys.argv = ["training.py"]
from milepost import config
settings = config.from_command_line(__name__, __doc__, [])
import training
learn = training.training_step
def interrupted(run, lr):
    if run.step == 2:
        os.kill(os.getpid(), signal.SIGINT)
        run.log("still here")
        os.kill(os.getpid(), signal.SIGINT)
        run.log("still here after the second")
    return learn(run, lr)
training.training_step = interrupted
training.guarded(training.main, settings)
"""


def test_a_second_signal_ends_a_training_without_its_last_save(tmp_path):
    # Not in the background, where the save of step 2 may not be done by then.
    env = {"PATH": os.environ["PATH"]} | environment(tmp_path, CHECKPOINT_INTERVAL="2", CHECKPOINT_ASYNC="false")
    done = subprocess.run(
        [sys.executable, "-c", TWICE], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 130
    assert "still here\n" in done.stderr
    assert "after the second" not in done.stderr
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt"))
    assert [name.split("_step")[1][:4] for name in names] == ["0002"]


def handler(number, frame):
    """One that is neither the system's nor Python's."""


@pytest.fixture
def handlers_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, each in before.items():
        signal.signal(number, each)


@pytest.mark.parametrize("before", [handler, signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler])
def test_the_handlers_of_before_come_back(before, handlers_as_before):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, before)
    with Interrupt():
        assert signal.getsignal(signal.SIGINT) not in (before, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) not in (before, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGINT) == before
    assert signal.getsignal(signal.SIGTERM) == before


def fails_inside() -> None:
    with Interrupt():
        raise RuntimeError("inside")


def test_they_come_back_after_an_error_too(handlers_as_before):
    signal.signal(signal.SIGINT, handler)
    with pytest.raises(RuntimeError, match="inside"):
        fails_inside()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_raises_nothing(number, handlers_as_before):
    with Interrupt() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    with Interrupt() as again:  # one training after another begins without a request
        assert not again.requested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_loop_one_signal_is_enough(number, tmp_path, handlers_as_before, capsys):
    def reading_text(settings, log):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was not heard")

    assert training.guarded(reading_text, None) == INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
