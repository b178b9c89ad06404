"""Locks: who holds them is reported, waiting for them ends, several users can take them, and their files do not stay."""

import errno
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from drive import at_step, train
from records import in_child, walkable_folder
from test_files import holder
from test_last_step import trained

from milepost import ckpt, locks
from milepost.ckpt.leftovers import prepare_folder
from milepost.locks import FOLDER_LOCK, RunLock, folder_lock


@pytest.fixture
def impatient(monkeypatch) -> list[str]:
    """Every wait is reported at once into the list that this returns, and ends after a fifth of a second."""
    lines: list[str] = []
    monkeypatch.setattr(locks, "QUIET", 0.0)
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    monkeypatch.setattr(locks.Reports, "line", lines.append)
    return lines


def stopped_in(folder: Path) -> Callable[[], object]:
    """Return an action that takes the folder's lock; its process is then stopped, as by Ctrl-Z or kill -STOP."""

    def hold() -> object:
        lock = folder_lock(folder)
        lock.__enter__()
        return lock

    return hold


def test_a_wait_for_a_stopped_process_is_reported_and_ends(impatient, tmp_path):
    with holder(stopped_in(tmp_path)) as pid:
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(OSError, match=f"process {pid} on ") as caught, folder_lock(tmp_path):
            pass
        assert (caught.value.errno, caught.value.filename) == (errno.ETIMEDOUT, str(tmp_path))
        (line,) = impatient
        assert f"process {pid} on " in line
        assert str(tmp_path) in line
    with folder_lock(tmp_path):  # the way out: the process was ended
        pass
    assert len(impatient) == 1


def test_control_a_free_lock_reports_nothing(impatient, tmp_path):
    with folder_lock(tmp_path):
        pass
    assert impatient == []
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER_LOCK]


def test_the_limits_suit_a_slow_disk():
    assert 1 < locks.QUIET <= 10
    assert locks.PATIENCE >= 300


def test_training_continues_while_a_stopped_process_holds_the_folder(monkeypatch, tmp_path):
    """The save fails and names the process; the run ends as after any save that failed."""
    held = holder(stopped_in(tmp_path / "checkpoints"))

    def stop_another() -> None:
        os.kill(held.__enter__(), signal.SIGSTOP)
        monkeypatch.setattr(locks, "QUIET", 0.0)
        monkeypatch.setattr(locks, "PATIENCE", 0.1)

    try:
        code, said = trained(tmp_path, {6: stop_another}, CHECKPOINT_ASYNC="false")
    finally:
        held.__exit__(None, None, None)
    assert code == 5, said
    assert "step 8 could not be saved" in said
    assert "waiting for process" in said
    assert [one.step for one in ckpt.find(tmp_path / "checkpoints")] == [4]


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o755, 0o700])
def test_whoever_may_write_in_the_folder_may_lock_it(mode, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    with folder_lock(folder):
        assert stat.S_IMODE((folder / FOLDER_LOCK).stat().st_mode) == mode & 0o666
    (folder / FOLDER_LOCK).chmod(0o644)  # as an earlier version left it
    with folder_lock(folder):
        assert stat.S_IMODE((folder / FOLDER_LOCK).stat().st_mode) == mode & 0o666


def locked(folder: Path) -> str:
    with folder_lock(folder):
        run = RunLock(folder, "one")
        run.acquire()
        run.release()
        return "locked"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_a_second_user_can_save_in_a_shared_folder():
    with walkable_folder() as reachable:
        folder = reachable / "checkpoints"
        folder.mkdir()
        folder.chmod(0o777)
        assert locked(folder) == "locked"
        assert in_child(lambda: locked(folder), as_nobody=True) == "locked"
        folder.chmod(0o755)  # the control
        assert "PermissionError" in in_child(lambda: locked(folder), as_nobody=True)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".run-*"))


def test_the_lock_of_a_run_does_not_outlive_it(tmp_path):
    assert train(tmp_path)[0] == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert hidden(tmp_path / "checkpoints") == hidden(run) == []


def test_locks_of_killed_runs_are_deleted_at_the_next_start_and_others_stay(tmp_path):
    def hold(run_id: str) -> Callable[[], RunLock]:
        def action() -> RunLock:
            lock = RunLock(tmp_path, run_id)
            lock.acquire()
            return lock

        return action

    with holder(hold("killed")):
        pass
    (tmp_path / ".run-mine.lock").write_text("a file of the user")
    with holder(hold("alive")):
        assert ".run-killed.lock" in hidden(tmp_path)
        prepare_folder(tmp_path)
        assert hidden(tmp_path) == [".run-alive.lock", ".run-alive.owner", ".run-mine.lock"]


def test_a_lock_that_is_deleted_while_another_process_waits_still_excludes(tmp_path):
    """Both count in turn; the lock's file disappears at each release."""
    counter, times = tmp_path / "counter", 40
    counter.write_text("0")

    def count():
        for _ in range(times):
            lock = RunLock(tmp_path, "one")
            lock.acquire(patience=60)
            counter.write_text(str(int(counter.read_text()) + 1))
            lock.release()
        os._exit(0)

    children = [os.fork() or count() for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert counter.read_text() == str(2 * times)
    assert hidden(tmp_path) == []


def test_a_run_that_was_locked_can_be_resumed_after_its_lock_is_gone(tmp_path):
    assert train(tmp_path)[0] == 0
    at_step(tmp_path, 8).unlink()
    code, said = train(tmp_path, RESUME="auto")
    assert code == 0, said
