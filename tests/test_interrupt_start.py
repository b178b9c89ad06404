"""A signal at any moment of a start stops the program: at any import, file or other call that Python reports."""

import signal
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from drive import ROOT, environment
from work import HANGING

from milepost import ckpt
from milepost.runtime.interrupt import INTERRUPTED

# Python imports it at its start. Once the program takes signals, it counts the events that Python reports to audit hooks
# (imports, files, processes, compiled code and more), and sends the signal at one of them. Before that Python itself
# starts, nothing has been done, and a signal ends it as it ends any program.
HOOK = """
import os, signal, sys

count, at, number = -1, int(os.environ["AT_EVENT"]), int(os.environ["SIGNAL"])

def hook(event, arguments):
    global count
    if count < 0 and signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL:  # the last that the program takes
        count = 0
    if count >= 0:
        count += 1
        if count == at:
            os.kill(os.getpid(), number)
        if event == "open" and str(arguments[0]).endswith("metrics.jsonl") and at == 0:
            os.write(1, b"%d\\n" % count)

sys.addaudithook(hook)
"""
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2, signal.SIGXCPU]


def start(folder: Path, *, at: int, number: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a training in which the signal arrives at event `at`; at 0 none does, and stdout has the count at the end of
    the start.
    """
    (folder / "hook").mkdir(parents=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    env = programs.LEAST | {"HOME": str(folder), "PYTHONPATH": str(folder / "hook")}
    env |= {"AT_EVENT": str(at), "SIGNAL": str(int(number))} | environment(folder, ENABLE_CHECKPOINTS="true")
    return subprocess.run(
        [sys.executable, "training.py"], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=HANGING
    )


@pytest.fixture(scope="module")
def events(tmp_path_factory) -> int:
    """Return the number of events of a start, which without a signal trains to its end."""
    done = start(tmp_path_factory.mktemp("whole"), at=0)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[0])


def stops(folder: Path, at: int, number: int) -> None:
    done = start(folder, at=at, number=number)
    assert done.returncode == INTERRUPTED, (at, number, done.stderr)
    assert "Traceback" not in done.stderr, (at, number, done.stderr)
    found = ckpt.find(folder / "checkpoints") if (folder / "checkpoints").exists() else []
    assert [one.problem for one in found if one.problem] == []


@pytest.mark.parametrize(("part", "number"), [*zip((0.001, 0.05, 0.3, 0.6, 0.9, 0.999), SIGNALS, strict=True)])
def test_a_signal_during_the_start_stops(tmp_path, events, part, number):
    stops(tmp_path, 1 + int(part * events), number)


@pytest.mark.soak
def test_a_signal_at_each_of_many_moments_of_the_start_stops(tmp_path, events):
    moments = range(1, events, max(1, events // 400))
    for place, at in enumerate(moments):
        stops(tmp_path / str(at), at, SIGNALS[place % len(SIGNALS)])
    assert len(moments) >= 400
