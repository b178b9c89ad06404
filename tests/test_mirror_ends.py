"""The mirror at the ends of a run: how fast it may be, who waits for it, and the command that resumes with it."""

import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from drive import ROOT, child_environment, newest, train
from mirrors import SMALL, Faulty, halves, in_folder, in_memory, known, saves_of, steps, taken
from records import save
from test_last_step import stop, trained
from work import HANGING

from milepost.mirror import Store, StoreError, Uploader
from milepost.mirror.bandwidth import Bandwidth

RATE = 1000.0  # bytes per second
PLACES = pytest.mark.parametrize("place", [in_folder, lambda _: in_memory()], ids=["file", "memory"])


class Clock:
    """Seconds that pass only in pauses."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, []

    def pause(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)

    def __call__(self) -> float:
        return self.now


# ---------------------------------------------------------------------------------------------------------------------
# Bandwidth.


def test_a_rate_is_never_exceeded_and_idle_time_gives_no_credit():
    clock = Clock()
    bandwidth = Bandwidth(RATE, pause=clock.pause, clock=clock)
    for _ in range(5):
        bandwidth.sent(200)
    assert clock.now == pytest.approx(1.0)
    clock.now += 100  # nothing to send
    bandwidth.sent(500)
    assert clock.now == pytest.approx(101.5)


@PLACES
@pytest.mark.parametrize("rate", [RATE, 0.0])
def test_an_upload_takes_at_least_its_bytes_over_the_rate(tmp_path, place, rate):
    store, folder, clock = place(tmp_path / "mirror"), tmp_path / "checkpoints", Clock()
    copies = Uploader(known(store, tmp_path), keep_last=0, say=print, pause=clock.pause, clock=clock, rate=rate)
    path = save(folder, 1)
    copies.submit(path, folder, step=1)
    assert copies.finish() == 0
    assert (steps(saves_of(store)), halves(store)) == ([1], [])
    if rate:
        assert clock.now >= path.stat().st_size / RATE
        assert max(clock.pauses) <= 1.001  # so that the end of a run sees that something arrives
    else:
        assert clock.now == 0


def test_a_slow_upload_that_breaks_leaves_no_half_and_is_repeated(tmp_path):
    store, folder, clock = in_memory(Faulty()), tmp_path / "checkpoints", Clock()
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        clock.pause(seconds)
        pauses.append(seconds)
        if len(pauses) == 2:
            raise ConnectionResetError("reset")  # in the middle of the file

    copies = Uploader(known(store, tmp_path), keep_last=0, say=print, pause=pause, clock=clock, rate=RATE)
    copies.submit(save(folder, 1), folder, step=1)
    assert copies.finish() == 0
    assert (steps(saves_of(store)), halves(store)) == ([1], [])


# ---------------------------------------------------------------------------------------------------------------------
# A second signal.

# training.py, of which two signals at any distance are two.
IMPATIENT = """
import sys
sys.argv = ["training.py"]
from milepost import config
settings = config.from_command_line(__name__, __doc__, [])
import training
from milepost.runtime import interrupt
interrupt.SAME_REQUEST = 0.0
sys.exit(training.guarded(training.main, settings))
"""


def test_a_second_signal_at_the_end_does_not_wait_for_the_mirror(tmp_path):
    """At a hundred bytes per second the last upload would take minutes."""
    mirror = tmp_path / "mirror"
    environment = child_environment(
        tmp_path,
        **SMALL | {"CHECKPOINT_INTERVAL": "0", "CHECKPOINT_MIRROR": f"file://{mirror}", "MIRROR_MB_S": "0.0001"},
    )
    command = [sys.executable, "-c", IMPATIENT]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(HANGING, process.kill)
        timer.start()
        lines = []
        for line in process.stderr or ():
            lines.append(line)
            if "1 checkpoint not yet mirrored" in line:
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGTERM)
        timer.cancel()
        assert process.wait(HANGING) == 130, lines
    assert "waiting for the upload; press Ctrl-C twice" in "".join(lines)
    assert newest(tmp_path).step == 6
    assert taken(in_folder(mirror)) == []
    code, said = train(tmp_path, **SMALL | {"TRAINING_STEPS": "8"}, CHECKPOINT_MIRROR=f"file://{mirror}", RESUME="auto")
    assert code == 0, said  # the lease of the process that is gone does not hold it
    assert taken(in_folder(mirror))[0].found.step == 8


@pytest.mark.parametrize(("fault", "expected"), [("passing", 8), ("refused", 2)])
def test_a_finished_run_whose_mirror_cannot_be_read_says_so_by_its_exit_code(tmp_path, monkeypatch, fault, expected):
    """What asks until the exit code is 0 would stop with nothing copied."""
    values = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}", "RESUME": "auto"}
    assert train(tmp_path, **values)[0] == 0
    shutil.rmtree(tmp_path / "mirror")

    def fail(store: Store, below: str = "") -> list[str]:
        raise StoreError(store.shown, "no", fault)

    with monkeypatch.context() as away:
        away.setattr(Store, "names", fail)
        away.setattr("milepost.run_mirror.time.sleep", lambda seconds: None)
        code, said = train(tmp_path, **values)
    assert code == expected, said
    assert "try again when it answers" in said or "without CHECKPOINT_MIRROR" in said
    assert train(tmp_path, **values)[0] == 0
    assert taken(in_folder(tmp_path / "mirror"))[0].found.step == 6


# ---------------------------------------------------------------------------------------------------------------------
# The command that resumes.


def command_in(said: str) -> tuple[dict[str, str], str]:
    """Return the variables of the printed command, and what follows it."""
    command, _, more = said.partition("resume with: ")[2].partition("training.py")
    return dict(word.split("=", 1) for word in shlex.split(command) if "=" in word), more.splitlines()[0]


def test_the_printed_command_resumes_with_the_same_mirror(tmp_path):
    chosen = {
        "CHECKPOINT_MIRROR": f"file://{tmp_path / 'a-mirror'}", "MIRROR_KEEP_LAST": "2", "MIRROR_MB_S": "50.5",
        "CHECKPOINT_FALLBACK_DIR": str(tmp_path / "fall back"),
    }  # fmt: skip
    code, said = trained(tmp_path, {4: stop}, **SMALL | chosen)
    assert code == 130, said
    variables, more = command_in(said)
    assert variables.items() >= chosen.items()
    assert more == ""
    code, said = train(tmp_path, **SMALL | variables)
    assert code == 0, said
    assert taken(in_folder(tmp_path / "a-mirror"))[0].found.step == 6


def test_a_command_without_a_mirror_names_none(tmp_path):
    code, said = trained(tmp_path, {4: stop}, **SMALL | {"MIRROR_KEEP_LAST": None})
    assert code == 130
    assert "MIRROR" not in said


def test_a_secret_of_the_mirror_is_asked_for_again(tmp_path, monkeypatch):
    """With a store in memory behind an address that has a password."""
    store, address = in_memory(), "sftp://me:pass-word@host/mirror?token=a-secret"
    monkeypatch.setattr("milepost.run_mirror.opened", lambda _: store)
    code, said = trained(tmp_path, {4: stop}, **SMALL | {"CHECKPOINT_MIRROR": address})
    assert code == 130, said
    variables, more = command_in(said)
    assert "CHECKPOINT_MIRROR" not in variables
    assert "CHECKPOINT_MIRROR" in more
    assert not any(secret in said for secret in ("pass-word", "a-secret"))
