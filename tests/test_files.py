"""Whole or not there: files appear at once and durably, a disk that refuses harms nothing, and locks end with their holders."""

import contextlib
import errno
import io
import os
import resource
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drive import tensor_bytes
from filelock import FileLock, Timeout
from records import in_child, record, walkable_folder

import ckpt
from ckpt import files
from ckpt.files import (
    FOLDER_LOCK,
    RunLock,
    RunLockedError,
    folder_lock,
    new_file,
    prepare_folder,
    remove_leftovers,
    sync_folder,
)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def temporaries(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".tmp-*")]


def name_of(descriptor: int) -> str:
    return Path(f"/proc/self/fd/{descriptor}").resolve().name


# ---------------------------------------------------------------------------------------------------------------------
# Write, then reveal.


def test_written_then_synced_then_revealed_then_the_folder_synced(tmp_path, monkeypatch):
    path, calls = tmp_path / "new", []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append(("fsync folder" if is_folder else "fsync", os.fstat(descriptor).st_size, path.exists()))
        fsync(descriptor)

    def recorded_replace(source, target):
        calls.append(("replace", os.stat(source).st_size, path.exists()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with new_file(path) as file:
        file.write(b"x" * 100_000)
        assert visible(tmp_path) == []
        assert len(temporaries(tmp_path)) == 1
    assert [(name, size if name != "fsync folder" else 0, there) for name, size, there in calls] == [
        ("fsync", 100_000, False),  # every byte was handed to the system before it was asked to keep them
        ("replace", 100_000, False),
        ("fsync folder", 0, True),
    ]
    assert path.read_bytes() == b"x" * 100_000
    assert temporaries(tmp_path) == []


def test_a_save_is_synced_before_it_is_seen_and_the_best_before_the_earlier_one_goes(tmp_path, monkeypatch):
    worse, better = record(1, validation_loss=2.0), record(2, validation_loss=1.0)
    ckpt.keep_best(worse, tmp_path, saved=ckpt.save(worse, tmp_path))
    (earlier,) = visible(tmp_path / "best")
    calls = []
    for name, action in {name: getattr(os, name) for name in ("fsync", "replace", "link", "unlink")}.items():

        def recorded(*arguments, _name=name, _action=action, **named):
            first = arguments[0]
            calls.append((_name, name_of(first) if isinstance(first, int) else Path(first).name))
            return _action(*arguments, **named)

        monkeypatch.setattr(os, name, recorded)
    saved = ckpt.save(better, tmp_path)
    ckpt.keep_best(better, tmp_path, saved=saved)
    (temporary,) = {name for call, name in calls if call == "replace"}
    assert calls == [
        ("fsync", temporary),
        ("replace", temporary),
        ("fsync", tmp_path.name),
        ("link", saved.name),
        ("fsync", "best"),
        ("fsync", tmp_path.name),
        ("unlink", earlier),
    ]


def test_the_mode_is_what_umask_says(tmp_path):
    with new_file(tmp_path / "new") as file:
        file.write(b"x")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask


def test_a_visible_name_is_never_replaced(tmp_path):
    path = tmp_path / "there"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError), new_file(path) as file:
        file.write(b"new")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError), new_file(dangling) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert visible(tmp_path) == ["dangling", "there"]
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_what_ends_the_writing_leaves_nothing(error, tmp_path):
    def write():
        with new_file(tmp_path / "new") as file:
            file.write(b"x" * 100_000)
            raise error

    with pytest.raises(type(error)):
        write()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# A disk that refuses: OSError, the old files intact, the temporary one gone.


@contextlib.contextmanager
def size_limit(limit: int) -> Iterator[None]:
    """The kernel itself refuses to let any file grow past `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FailingFile(io.BufferedRandom):
    """A file whose n-th write finds the disk full."""

    def __init__(self, path: str | Path, fail_at: int) -> None:
        super().__init__(io.FileIO(path, "x+"))
        self.left = fail_at

    def write(self, data: Any) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.fixture
def saved_once(tmp_path) -> Path:
    """A folder that holds one checkpoint, of step 1."""
    ckpt.save(record(1, size=100), tmp_path)
    return tmp_path


def assert_unharmed(folder: Path) -> None:
    """The one checkpoint of `saved_once` is whole and alone."""
    assert len(visible(folder)) == 1
    assert temporaries(folder) == []
    newest = ckpt.latest(ckpt.find(folder))
    assert newest is not None
    assert tensor_bytes(ckpt.load(newest.path, verify=True)) == tensor_bytes(record(1, size=100))


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_full_disk_is_an_oserror_and_harms_nothing(share, saved_once):
    whole = next(saved_once.glob("*.pt")).stat().st_size
    with size_limit(int(whole * share)), pytest.raises(OSError, match="File too large") as caught:
        ckpt.save(record(2, size=100), saved_once)
    assert caught.value.errno == errno.EFBIG
    assert_unharmed(saved_once)
    words = ckpt.why_not_saved(caught.value, saved_once, need=123_456)
    assert words.startswith("the disk is full: about 123,456 bytes are needed")
    assert str(saved_once) in words


def errno_of_a_save(folder: Path) -> int | None:
    """None if the save succeeds; a full disk is the only error allowed."""
    try:
        ckpt.save(record(2, size=100), folder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return error.errno
    return None


def test_a_disk_full_at_every_single_write_harms_nothing(saved_once, monkeypatch):
    """The n-th write fails, for every n until a save passes untouched. torch hides some of these behind a RuntimeError."""
    for fail_at in range(1000):
        monkeypatch.setattr(files, "open", lambda path, mode, n=fail_at: FailingFile(path, n), raising=False)
        if errno_of_a_save(saved_once) is None:
            break
        assert_unharmed(saved_once)
    assert fail_at > 20
    assert [one.step for one in ckpt.find(saved_once)] == [1, 2]


def fails(action: Callable[..., Any], *, when: Callable[..., bool]) -> Callable[..., Any]:
    """`action`, but an input/output error where `when` holds of its arguments."""

    def failing(*arguments: Any) -> Any:
        if when(*arguments):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return action(*arguments)

    return failing


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.mark.parametrize(
    ("call", "when"),
    [("fsync", lambda descriptor: not is_folder(descriptor)), ("replace", lambda *_: True)],
    ids=["fsync", "replace"],
)
def test_an_io_error_before_the_reveal_harms_nothing(call, when, saved_once, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails(getattr(os, call), when=when))
        with pytest.raises(OSError, match="Input/output error"):
            ckpt.save(record(2, size=100), saved_once)
    assert_unharmed(saved_once)


def test_an_io_error_after_the_reveal_is_told_and_the_new_file_stays(saved_once, monkeypatch):
    """Visible but not proved durable: nobody must think it safe, and nobody must delete it."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails(os.fsync, when=is_folder))
        with pytest.raises(OSError, match="Input/output error"):
            ckpt.save(record(2, size=100), saved_once)
    assert [one.step for one in ckpt.find(saved_once) if one.problem is None] == [1, 2]


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path, monkeypatch):
    def refusing(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refusing)
    assert sync_folder(tmp_path) is None
    with open(tmp_path / "file", "wb") as file, pytest.raises(OSError, match="Invalid argument"):  # for a file it is
        files.flush_to_disk(file)


def test_other_errors_of_the_writer_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="not the disk"), new_file(tmp_path / "new"):
        raise RuntimeError("not the disk")
    with pytest.raises(ValueError, match="not JSON compliant"):  # a NaN has no place in a record
        ckpt.save(record(1, validation_loss=float("nan")), tmp_path)
    assert visible(tmp_path) == []
    assert temporaries(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# What killed writers left.


def test_leftovers_go_and_nothing_else(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-folder" / "inner").mkdir(parents=True)
    (folder / ".tmp-file").write_bytes(b"half")
    (folder / ".tmp-link").symlink_to(outside)
    for name in (".lock", ".tm", "tmp-visible", "checkpoint.pt"):
        (folder / name).write_bytes(b"")
    removed = remove_leftovers(folder)
    assert sorted(path.name for path in removed) == [".tmp-file", ".tmp-folder", ".tmp-link"]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", ".tm", "checkpoint.pt", "tmp-visible"]
    assert (outside / "kept").read_bytes() == b"kept"
    assert remove_leftovers(tmp_path / "missing") == []


def test_a_save_removes_leftovers_of_the_folder_and_of_its_best(tmp_path):
    (tmp_path / "best").mkdir()
    for folder in (tmp_path, tmp_path / "best"):
        (folder / ".tmp-checkpoint-1-abc").write_bytes(b"half")
    ckpt.save(record(), tmp_path)
    assert temporaries(tmp_path) == []


def test_a_folder_is_made_and_proved_writable(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / ".tmp-old").write_bytes(b"half")
    prepare_folder(folder)
    prepare_folder(tmp_path / "c" / "d")
    assert visible(tmp_path / "c") == ["d"]
    assert visible(folder) == visible(tmp_path / "c" / "d") == []
    assert temporaries(tmp_path) == []


def test_a_folder_that_cannot_be_written_fails_at_once(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        prepare_folder(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        prepare_folder(tmp_path / "file" / "below")


def test_a_folder_without_permission_fails_at_once():
    with walkable_folder() as folder:
        folder.chmod(0o777)
        assert in_child(lambda: prepare_folder(folder), as_nobody=True) is None
        (folder / FOLDER_LOCK).unlink()
        folder.chmod(0o555)
        assert in_child(lambda: prepare_folder(folder), as_nobody=True).startswith("PermissionError")
        folder.chmod(0o755)
        assert list(folder.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Locks, between processes.


@contextlib.contextmanager
def holder(hold: Callable[[], Any]) -> Iterator[int]:
    """The pid of a child that has called `hold` and lives until it is killed, at the latest when the block ends."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        kept = hold()  # noqa: F841  (a lock is held as long as its object lives)
        os.write(writing, b"held")
        signal.pause()
        os._exit(0)
    try:
        assert os.read(reading, 4) == b"held"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)


def test_the_folder_lock_excludes_another_process_until_it_dies(tmp_path):
    def hold():
        lock = folder_lock(tmp_path)
        lock.__enter__()
        return lock

    with holder(hold), pytest.raises(Timeout):
        FileLock(tmp_path / FOLDER_LOCK).acquire(timeout=0)
    with folder_lock(tmp_path), pytest.raises(Timeout):  # the dead holder's is free, and now it is ours
        FileLock(tmp_path / FOLDER_LOCK).acquire(timeout=0)


def test_what_is_done_under_the_folder_lock_is_done_by_one_process_at_a_time(tmp_path):
    counter, times = tmp_path / "counter", 40
    counter.write_text("0")

    def count():
        for _ in range(times):
            with folder_lock(tmp_path):
                counter.write_text(str(int(counter.read_text()) + 1))
        os._exit(0)

    children = [os.fork() or count() for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert counter.read_text() == str(2 * times)


def run_holder(folder: Path, run_id: str) -> Callable[[], RunLock]:
    def hold() -> RunLock:
        lock = RunLock(folder, run_id)
        lock.acquire()
        return lock

    return hold


def test_a_run_is_refused_to_a_second_process_by_pid_and_host(tmp_path):
    with holder(run_holder(tmp_path, "one")) as pid:
        with pytest.raises(RunLockedError) as caught:
            RunLock(tmp_path, "one").acquire()
        message = str(caught.value)
        assert "run one" in message
        assert f"process {pid} on {socket.gethostname()}" in message
        RunLock(tmp_path, "two").acquire()  # another run is another matter
    assert visible(tmp_path) == []


def test_a_killed_process_frees_its_run(tmp_path):
    with holder(run_holder(tmp_path, "one")):
        pass  # killed at the block's end
    assert (tmp_path / ".run-one.owner").exists()  # it could not clear up, and need not
    lock = RunLock(tmp_path, "one")
    lock.acquire()
    with pytest.raises(RunLockedError, match=f"process {os.getpid()} on "):
        RunLock(tmp_path, "one").acquire()
    lock.release()
    RunLock(tmp_path, "one").acquire()


def test_a_holder_that_has_not_written_its_name_yet_is_another_process(tmp_path):
    with holder(run_holder(tmp_path, "one")):
        (tmp_path / ".run-one.owner").write_text("{")
        with pytest.raises(RunLockedError, match="being trained by another process"):
            RunLock(tmp_path, "one").acquire()
