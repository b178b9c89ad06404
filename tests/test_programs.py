"""A program that is forked does what a fresh process does: what it prints, how it ends, every byte that it saves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
from drive import ROOT, child_environment, logged, newest, tensor_bytes, train
from programs import Forked
from script import NOTHING_OF_TRAINING
from work import HANGING

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every program is a fresh process")
BOTH = pytest.mark.parametrize("fresh", [False, True])
PLAIN = {
    name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH", "OMP_WAIT_POLICY") if name in os.environ
}


def pair(words: list[str], **options: Any) -> list[subprocess.CompletedProcess[Any]]:
    """Return what the program does as a fork, and as a fresh process."""
    words = [sys.executable, *words]
    return [programs.run(words, fresh=fresh, capture_output=True, **options) for fresh in (False, True)]


def same(words: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """Return what both do; assert that it is the same."""
    forked, real = pair(words, **options)
    assert (forked.returncode, forked.stderr) == (real.returncode, real.stderr)
    assert forked.stdout.splitlines() == real.stdout.splitlines()
    return forked


SEEN = """
import json, os, resource, signal, sys, threading
print(*map(json.dumps, [
    sys.argv, sys.path, [each for each in str(sys.flags).split() if "unbuffered" not in each], sys.executable, __name__,
    vars().get("__file__"), sorted(vars()), str(__builtins__),
    [getattr(sys.modules["__main__"], name, None) for name in ("__file__", "__spec__", "__package__", "__cached__")],
    sorted(os.environ.items()), os.getcwd(), os.umask(0), os.getpgid(0) == os.getpid(), os.getsid(0) == os.getpid(),
    sorted(os.listdir("/proc/self/fd"))[:-1], [resource.getrlimit(each) for each in range(16)],
    [str(signal.getsignal(each)) for each in sorted(signal.valid_signals())], sorted(signal.pthread_sigmask(0, [])),
    threading.active_count(), [name for name in sys.modules if name.startswith(("milepost", "models", "training"))],
    [[each.name, each.mode, each.encoding, each.errors, each.line_buffering, each.write_through, each.isatty(),
      each.fileno(), type(each.buffer).__name__, each.buffer.name] for each in (sys.stdin, sys.stdout, sys.stderr)],
    [sys.stdin is sys.__stdin__, sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__],
    sys.stdin.read(), [str(each) for each in sys.warnoptions],
]), sep=chr(10))
"""


@pytest.mark.parametrize("env", [{}, {"OMP_NUM_THREADS": "1"}, {"LANG": "C.UTF-8", "A": "\udcff=ü"}], ids=str)
@pytest.mark.parametrize("session", [False, True])
def test_a_fork_sees_what_a_fresh_process_sees(tmp_path, env, session):
    (tmp_path / "seen.py").write_text(SEEN)
    for words, argv in (
        (["seen.py", "one", "--two"], ["seen.py", "one", "--two"]), (["-u", "seen.py"], ["seen.py"]),
        ([f"../{tmp_path.name}/seen.py"], [f"../{tmp_path.name}/seen.py"]), (["-c", SEEN, "three"], ["-c", "three"]),
    ):  # fmt: skip
        done = same(words, cwd=tmp_path, env=PLAIN | env, input="ä\r\nb", text=True, start_new_session=session)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[0]) == argv


STREAMS = (
    "import sys; open('seen', 'w').write(repr([sys.stdin, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__]))"
)


@pytest.mark.parametrize("closed", [[0, 1, 2], [1]], ids=str)
def test_a_fork_without_streams_is_as_a_fresh_process_without(tmp_path, closed):
    (tmp_path / "streams.py").write_text(STREAMS)
    seen = []
    for fresh in (False, True):
        programs.run([sys.executable, "streams.py"], fresh=fresh, closed=closed, cwd=tmp_path, env=PLAIN, check=True)
        seen.append((tmp_path / "seen").read_text())
    assert seen[0].count("None") == len(closed) + len({1, 2} & set(closed))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"])
def test_a_fork_keeps_to_a_variable_of_python_that_containers_set(tmp_path, name):
    (tmp_path / "module.py").write_text("")
    code = "import module, os, sys; print(sys.dont_write_bytecode, sys.flags, os.path.exists('__pycache__'), flush=False); os._exit(0)"
    done = same(["-c", code], cwd=tmp_path, env=PLAIN | {name: "1"})
    assert (done.stdout == b"") == (name == "PYTHONDONTWRITEBYTECODE")


ENDS = {
    "nothing": "pass",
    "a code": "import sys; print('out'); sys.exit(3)",
    "a sentence": "raise SystemExit('a sentence')",
    "an exception": "def fail():\n    1 / 0\nfail()",
    "an exception of an exception": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    [][0]",
    "a mistake in the syntax": "print('first')\n)",
    "Ctrl-C": "raise KeyboardInterrupt",
    "SIGKILL": "import os; print('lost', end=''); os.kill(os.getpid(), 9)",
    "SIGTERM": "import os; os.kill(os.getpid(), 15)",
    "abort": "import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.abort()",
    "at once": "import os; print('lost', end=''); os._exit(7)",
    "handlers at exit": "import atexit; atexit.register(print, 'at exit'); print('end')",
    "threads": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.01), print('thread'))).start()",
    "a stdout that is closed": "import os; os.close(1); print('lost')",
    "a warning": "import warnings; warnings.warn('old', DeprecationWarning)",
}


@pytest.mark.parametrize("code", ENDS.values(), ids=ENDS)
def test_a_fork_ends_as_a_fresh_process_ends(tmp_path, code):
    (tmp_path / "ends.py").write_text(code)
    same(["ends.py"], cwd=tmp_path, env=PLAIN)


def test_control_another_end_is_seen(tmp_path):
    (tmp_path / "ends.py").write_text("import sys, programs")
    (tmp_path / "programs.py").write_text("import sys; sys.exit('torch' in sys.modules)")
    assert [done.returncode for done in pair(["ends.py"], cwd=tmp_path, env=PLAIN)] == [1, 0]


WAITS = "import sys; print('ready', flush=True); sys.stdin.read()"


@BOTH
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside_ends_it(fresh, number):
    with programs.start(
        [sys.executable, "-c", WAITS], fresh=fresh, env=PLAIN, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert isinstance(process, Forked) != fresh
        assert process.stdout.readline() == b"ready\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.001)
        process.send_signal(number)
        assert process.wait(timeout=HANGING) == process.poll() == -number
    with pytest.raises(ProcessLookupError):  # its number is free, as after os.waitpid
        os.kill(process.pid, 0)


@BOTH
def test_until_somebody_waits_it_is_a_zombie(fresh):
    process = programs.start([sys.executable, "-c", "pass"], fresh=fresh, env=PLAIN)
    while "Z" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]:
        assert process.returncode is None
    assert process.wait() == 0
    assert not Path(f"/proc/{process.pid}").exists()


def test_what_a_fork_could_not_do_faithfully_is_a_fresh_process(tmp_path):
    (tmp_path / "x.py").write_text("")
    x = [sys.executable, str(tmp_path / "x.py")]
    for words, options in (
        (["true"], {}), ([sys.executable, "-m", "this"], {}), ([sys.executable, str(tmp_path / "nowhere.py")], {}),
        (x, {"env": PLAIN | {"PYTHONPATH": "."}}), (x, {"env": PLAIN | {"MKL_NUM_THREADS": "1"}}), (x, {"umask": 7}),
        (x, {"preexec_fn": os.getpid}), (x, {"fresh": True}),
    ):  # fmt: skip
        with programs.start(
            words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **{"env": PLAIN} | options
        ) as process:
            assert not isinstance(process, Forked), (words, options)
    with programs.start(x, env=PLAIN) as process:
        assert isinstance(process, Forked)


# ---------------------------------------------------------------------------------------------------------------------
# The project's own programs.


@pytest.mark.parametrize("changes", [{}, {"MODEL_TYPE": "llama", "DTYPE": "bfloat16", "OMP_NUM_THREADS": "1"}], ids=str)
def test_a_training_is_the_same_in_every_bit(tmp_path, changes):
    left = []
    for fresh in (False, True):
        folder = tmp_path / str(fresh)
        folder.mkdir()
        env = child_environment(folder, **changes)
        done = programs.run(
            [sys.executable, "training.py"], fresh=fresh, cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        left.append(
            (tensor_bytes(newest(folder)), newest(folder).runtime, logged(folder), samples(folder), done.stdout)
        )
    assert left[0] == left[1]


def samples(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("runs/*/samples/*"))]


def test_scripts_print_the_same(tmp_path):
    code, said = train(tmp_path, SAMPLE_INTERVAL="0")
    assert code == 0, said
    for name, changes in (("list_checkpoints", {}), ("load_checkpoint", {"PROMPT": "Dear", "SAMPLE_SEED": "1"})):
        env = child_environment(tmp_path, **NOTHING_OF_TRAINING | changes)
        done = same([f"scripts/{name}.py"], cwd=ROOT, env=env)
        assert (done.returncode, done.stdout == b"") == (0, False), done.stderr
