"""Signals: the first asks for a stop, a later one stops at once, and afterwards everything is as it was."""

import contextlib
import itertools
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from drive import ROOT, environment, newest, tensor_bytes, train
from pages import blocks
from test_last_step import trained
from work import HANGING

import training
from milepost import ckpt, config
from milepost.runtime import interrupt
from milepost.runtime.interrupt import INTERRUPTED, Interrupt

SETTINGS = config.read({"PYTHON_DOTENV_DISABLED": "1"})
ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2, signal.SIGXCPU]

# Prints when it is ready and when it was asked to stop, then runs for ever. Only an orderly exit would print "cleaned
# up". It waits at a pipe into which Python writes each signal: one that came just before pause() would not end that.
CHILD = """
import atexit, os, signal
from milepost.runtime import interrupt
from milepost.runtime.interrupt import Interrupt
interrupt.SAME_REQUEST = float("SAME_REQUEST")
atexit.register(print, "cleaned up", flush=True)
arrived, wakes = os.pipe()
os.set_blocking(wakes, False)
signal.set_wakeup_fd(wakes)
signal.signal(signal.SIGWINCH, lambda *_: os.write(1, b"alive\\n"))  # print() may not be interrupted by itself
with Interrupt() as stop:
    print("ready", stop.requested, flush=True)
    while not stop.requested:
        os.read(arrived, 1)
    print("asked to stop", flush=True)
    while True:
        signal.pause()
"""


def child_with(together: float) -> list[str]:
    """Return the command of CHILD, for which signals within `together` seconds count as one."""
    return [sys.executable, "-c", CHILD.replace('SAME_REQUEST")', f'{together}")')]


REPEATABLE = [number for number in ALL if number != signal.SIGXCPU]
PAIRS = [*zip(REPEATABLE, REPEATABLE, strict=True), *itertools.pairwise(REPEATABLE), (signal.SIGXCPU, signal.SIGINT)]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_first_signal_sets_a_flag_and_a_later_one_ends_the_process_at_once(first, second):
    with subprocess.Popen(child_with(0), cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready False\n"
        child.send_signal(first)
        assert child.stdout.readline() == "asked to stop\n"
        assert child.poll() is None
        child.send_signal(second)
        assert child.wait(timeout=HANGING) == INTERRUPTED == 130
        assert child.stdout.read() == ""  # no "cleaned up": nothing may delay it


@pytest.mark.parametrize("second", ALL)
def test_signals_close_together_count_as_one(second):
    """A double key press, or one signal each from terminal and launcher: the child still answers."""
    with subprocess.Popen(child_with(1e9), cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready False\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "asked to stop\n"
        child.send_signal(second)
        child.send_signal(signal.SIGWINCH)  # handled last: Python handles pending signals in the order of their numbers
        assert child.stdout.readline() == "alive\n"
        child.kill()


# Reaches its limit of CPU time, saves for longer than the system waits between two signals, and ends.
AT_THE_LIMIT = """
import resource, time
from milepost.runtime.interrupt import Interrupt
with Interrupt() as stop:  # before the limit, which imports alone may have reached
    resource.setrlimit(resource.RLIMIT_CPU, (1, 60))
    while not stop.requested:
        pass
    until = time.process_time() + 2.5
    while time.process_time() < until:
        pass
print("saved")
"""


def test_the_repeated_signals_of_a_limit_of_cpu_time_leave_time_to_save():
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_LIMIT], cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANGING
    )
    assert (done.returncode, done.stdout) == (0, "saved\n"), done.stderr


def test_signals_count_as_one_for_about_a_second():
    assert 0.5 <= interrupt.SAME_REQUEST <= 2


# Both signals arrive in the third step of a training.
TWICE = """
import os, signal, sys
sys.argv = ["training.py"]
from milepost import config
settings = config.from_command_line(__name__, __doc__, [])
import training
from milepost.runtime import interrupt
interrupt.SAME_REQUEST = float(os.environ["SAME_REQUEST"])
learn = training.training_step
def interrupted(run, lr):
    if run.state.step == 2:
        os.kill(os.getpid(), signal.SIGINT)
        run.log("still here")
        os.kill(os.getpid(), signal.SIGINT)
        run.log("still here after the second")
    return learn(run, lr)
training.training_step = interrupted
training.guarded(training.main, settings)
"""


def steps_saved(folder: Path) -> list[int]:
    return [one.step for one in ckpt.find(folder / "checkpoints")]


@pytest.mark.parametrize(("together", "saved"), [(0, [2]), (1e9, [2, 3])])
def test_a_later_signal_ends_training_without_its_last_save_and_a_double_press_saves(together, saved, tmp_path):
    # Not in the background, where the save of step 2 may not be done by then.
    env = programs.LEAST | {"SAME_REQUEST": str(together)}
    env |= environment(tmp_path, CHECKPOINT_INTERVAL="2", CHECKPOINT_ASYNC="false")
    done = programs.run([sys.executable, "-c", TWICE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "still here\n" in done.stderr
    assert ("after the second" in done.stderr) == (together > 0)
    assert steps_saved(tmp_path) == saved
    assert done.returncode == (130 if together == 0 else 0)  # TWICE does not pass on what guarded returns


# ---------------------------------------------------------------------------------------------------------------------
# Libraries that convert or swallow the exception of a signal.

# Python imports it at its start: a module that is about to be imported raises the signal first, and its exception meets
# what `MADE_OF_IT` says. No library is replaced.
HOOK = """
import os, signal, sys

class Hook:
    def find_spec(name, path=None, target=None):
        if name == os.environ.get("AT_IMPORT_OF") and not os.path.exists(os.environ["SAID"]):
            open(os.environ["SAID"], "w").close()
            try:
                os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
            except:
                if os.environ["MADE_OF_IT"] != "nothing":
                    raise ImportError("cannot import " + name) from None

sys.meta_path.insert(0, Hook)
"""


def hooked(
    folder: Path, script: str, *, at: str, number: str, made_of_it: str, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Return a script in which the signal arrives while it imports `at`."""
    hook = folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    env = programs.LEAST | {"HOME": str(folder), "PYTHONPATH": str(hook), "SAID": str(folder / "said")}
    env |= {"AT_IMPORT_OF": at, "SIGNAL": number, "MADE_OF_IT": made_of_it} | environment(folder, **changes)
    return subprocess.run(
        [sys.executable, script], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=HANGING
    )


# Modules imported before the script's own main begins, and one that is imported after: by torch, when a tracker is
# opened.
SWALLOWED = [
    ("SIGTERM", "torch.nn", "nothing"),
    ("SIGTERM", "torch.nn", "another exception"),
    pytest.param("SIGTERM", "torch.utils.tensorboard", "nothing", marks=pytest.mark.exchange),
    pytest.param("SIGTERM", "torch.utils.tensorboard", "another exception", marks=pytest.mark.exchange),
    ("SIGINT", "numpy", "nothing"),
    ("SIGHUP", "milepost.ckpt", "nothing"),
]


@pytest.mark.parametrize(("number", "at", "made_of_it"), SWALLOWED)
def test_a_signal_that_a_library_swallows_stops_before_the_first_step(number, at, made_of_it, tmp_path):
    done = hooked(tmp_path, "training.py", at=at, number=number, made_of_it=made_of_it, TRACKER="tensorboard")
    assert (tmp_path / "said").exists()  # the signal was sent
    assert done.returncode == INTERRUPTED, done.stderr
    assert "interrupted" in done.stderr
    assert list(tmp_path.glob("runs/*/metrics.jsonl")) == []
    assert not (tmp_path / "checkpoints").is_dir() or steps_saved(tmp_path) == []


def test_control_without_a_signal_the_same_training_trains(tmp_path):
    done = hooked(tmp_path, "training.py", at="no_such_module", number="SIGTERM", made_of_it="nothing")
    assert done.returncode == 0, done.stderr
    assert steps_saved(tmp_path) == [4, 8]


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_every_script_stops_on_a_signal_during_imports(script, tmp_path):
    """It ends before it reads its settings, so that they do not matter."""
    changes = {"MODE": "inference"} if script == "load_checkpoint.py" else {}
    done = hooked(tmp_path, f"scripts/{script}", at="torch", number="SIGTERM", made_of_it="nothing", **changes)
    if (tmp_path / "said").exists():
        assert done.returncode == INTERRUPTED, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# A signal to save.


def test_a_signal_to_save_saves_the_step_and_training_ends_where_it_would_have_ended(tmp_path):
    """Sent twice in one step it saves once."""
    for name in ("straight", "signalled"):
        (tmp_path / name).mkdir()
    assert train(tmp_path / "straight")[0] == 0

    def signal_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)

    code, said = trained(tmp_path / "signalled", {6: signal_twice})
    assert code == 0, said
    assert [steps_saved(tmp_path / name) for name in ("straight", "signalled")] == [[4, 8], [4, 6, 8]]
    assert tensor_bytes(newest(tmp_path / "signalled")) == tensor_bytes(newest(tmp_path / "straight"))


def test_with_checkpoints_off_a_signal_to_save_is_reported_and_training_continues(tmp_path):
    code, said = trained(tmp_path, {6: lambda: os.kill(os.getpid(), signal.SIGUSR1)}, ENABLE_CHECKPOINTS="false")
    assert code == 0
    assert "SIGUSR1" in said
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("at", ["torch.nn", "milepost.ckpt"])
def test_a_signal_to_save_during_imports_does_not_stop_the_program(at, tmp_path):
    done = hooked(tmp_path, "training.py", at=at, number="SIGUSR1", made_of_it="nothing")
    assert (tmp_path / "said").exists()
    assert done.returncode == 0, done.stderr
    assert steps_saved(tmp_path) == [4, 8]


def test_a_signal_to_save_is_no_signal_to_stop(handlers_as_before):
    with Interrupt() as stop:
        assert not stop.save_requested
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (stop.save_requested, stop.requested) == (True, False)
        stop.note_save()
        assert not stop.save_requested


# ---------------------------------------------------------------------------------------------------------------------
# A closed terminal.


def in_a_terminal(folder: Path, *, ignoring: bool) -> int:
    """Train in a terminal that is closed after the plan is shown; return the exit code."""
    env = programs.LEAST | environment(
        folder, TRAINING_STEPS="200", CHECKPOINT_INTERVAL="0", SAMPLE_INTERVAL="0", EVAL_INTERVAL="0"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignoring else signal.SIG_DFL)
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "training.py"], env)
    shown = b""
    while b"output:" not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_closed_terminal_saves_and_stops(tmp_path):
    assert in_a_terminal(tmp_path, ignoring=False) == INTERRUPTED
    steps = steps_saved(tmp_path)
    (log,) = tmp_path.glob("runs/*/training.log")
    (step,) = re.findall(r"interrupted after step (\d+)", log.read_text())
    assert steps == ([int(step)] if int(step) else [])


def test_under_nohup_training_continues(tmp_path):
    assert in_a_terminal(tmp_path, ignoring=True) == 0
    assert steps_saved(tmp_path) == [200]


def handler(number, frame):
    """A handler that is neither the system's nor Python's."""


@pytest.fixture
def handlers_as_before():
    """No signal has come yet, whatever the test before left; afterwards the handlers are as they were."""
    before = {number: signal.getsignal(number) for number in (*ALL, signal.SIGUSR1)}
    interrupt.raise_on_signal()
    yield
    for number, each in before.items():
        signal.signal(number, each)


@pytest.mark.parametrize("before", [handler, signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler])
def test_the_earlier_handlers_are_restored(before, handlers_as_before):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, before)
    with Interrupt():
        assert signal.getsignal(signal.SIGINT) not in (before, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) not in (before, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGINT) == before
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_ignored_hangup_stays_ignored(handlers_as_before):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupt() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def fails_inside() -> None:
    with Interrupt():
        raise RuntimeError("inside")


def test_the_earlier_handlers_are_restored_after_an_error(handlers_as_before):
    signal.signal(signal.SIGINT, handler)
    with pytest.raises(RuntimeError, match="inside"):
        fails_inside()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("number", ALL)
def test_a_signal_is_remembered_and_raises_nothing(number, handlers_as_before):
    with Interrupt() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    with Interrupt() as again:  # one training after another begins without a request
        assert not again.requested


@pytest.mark.parametrize("number", ALL)
def test_before_the_loop_one_signal_is_enough(number, tmp_path, handlers_as_before, capsys):
    def reading_text(settings, log):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was not heard")

    assert training.guarded(reading_text, SETTINGS) == INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("number", ALL)
def test_an_interrupt_that_a_library_converts_is_an_interrupt(number, handlers_as_before, capsys):
    def importing(settings, log):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise ImportError("no module") from None

    def failing(settings, log):
        raise ImportError("no module")

    assert training.guarded(importing, SETTINGS) == INTERRUPTED
    assert training.guarded(failing, SETTINGS) == 1  # control: of the one before nothing is remembered


def test_a_swallowed_interrupt_is_seen_when_training_begins(handlers_as_before):
    seen = []

    def swallows(settings, log):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with Interrupt() as stop:
            seen.append(stop.requested)
        return 0

    training.guarded(swallows, SETTINGS)
    training.guarded(lambda *_: seen.append(Interrupt().__enter__().requested), SETTINGS)
    assert seen == [True, False]


# ---------------------------------------------------------------------------------------------------------------------
# The Slurm script of docs/resuming.md


@pytest.mark.parametrize(("code", "queued"), [(130, True), (0, False), (3, False)])
def test_the_slurm_script_queues_a_job_again_only_if_it_was_stopped(code, queued, tmp_path):
    """Its commands are replaced by files that note how they are called: no Slurm is here."""
    (script,) = blocks((ROOT / "docs" / "resuming.md").read_text(encoding="utf-8"), "sh")
    for name, ending in (("srun", f"exit {code}"), ("scontrol", "")):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" $RESUME $ENABLE_CHECKPOINTS\n{ending}\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    again = ["scontrol requeue 7 auto true"] if queued else []
    assert done.stdout.splitlines() == ["srun python3 training.py auto true", *again]
    assert set(re.findall(r"([A-Z_]+)=", script.split("srun")[0])) <= config.VARIABLES.keys()
    (number,) = re.findall(r"--signal=(\w+)@", script)
    assert getattr(signal, f"SIG{number}") in interrupt.stopping_signals()
