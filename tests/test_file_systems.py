"""File systems that lack something: what a look finds, and that nothing is lost without it."""

import builtins
import contextlib
import errno
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import pytest
from drive import newest, train
from folders import make_before, next_save_clears_up, steps_of, tidy, whole
from lacking import LACKS, lacking, refuse  # noqa: F401  (a fixture)
from records import record
from saver import of_step, save_keep_prune
from test_faults import fault
from test_kill import Said, last, saver  # noqa: F401  (a fixture)
from work import limited

from milepost import ckpt, files, run_checkpoints
from milepost.ckpt import CheckpointError, index, saving
from milepost.ckpt.index import look
from milepost.ckpt.layouts import known_layout
from milepost.files import GrowingFile, file_system, growing, owner_file, reaching
from milepost.locks import RunLock, RunLockedError, folder_lock

LAYOUTS = list(ckpt.WRITERS)
# What is written in place, by each mechanism: a file, a group of two kinds, a folder.
IN_PLACE = [
    ("rename", "unified"),
    ("rename", "separated"),
    ("rename", "stepfiles"),
    ("rename", "directory"),
    ("rename of folders", "directory"),
]

# ---------------------------------------------------------------------------------------------------------------------
# The look.


@pytest.mark.parametrize("lack", LACKS)
def test_a_look_finds_what_is_lacking_and_leaves_nothing(lack, lacking, tmp_path):  # noqa: F811
    assert files.look(tmp_path) == frozenset()  # the control
    lacking(lack)
    found = files.look(tmp_path)
    assert found == ({lack, "fsync of folders"} if lack == "fsync" else {lack})
    assert file_system.INSTEAD[lack] in files.instead(found)
    assert list(tmp_path.iterdir()) == []


def test_a_look_is_taken_once_for_a_file_system(tmp_path, monkeypatch):
    files.look(tmp_path)
    monkeypatch.setattr(file_system, "_tried", lambda folder: pytest.fail("it looked again"))
    (tmp_path / "below").mkdir()
    assert files.look(tmp_path / "below") == frozenset()


def test_a_folder_where_nothing_lasts_is_refused(tmp_path, monkeypatch):
    """What is written is gone when it is read back: training must not begin."""
    files.forget()
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data))
    with pytest.raises(OSError, match="cannot be read back"):
        files.look(tmp_path)


def test_a_full_disk_is_no_lack(tmp_path, monkeypatch):
    files.forget()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert files.lacks(tmp_path) == frozenset()
        with pytest.raises(OSError, match="No space"):
            files.look(tmp_path)
    assert files.look(tmp_path) == frozenset()  # and it was not remembered


@pytest.mark.parametrize(("name", "lack"), [("link", "hard links"), ("rename", "rename")])
def test_what_is_refused_with_eio_is_lacking_if_the_folder_takes_a_file_afterwards(name, lack, tmp_path, monkeypatch):
    """As rclone refuses links. Of a folder that is away, nothing is known."""
    files.forget()
    with monkeypatch.context() as patch:
        refuse(patch.setattr, os, name, errno.EIO)
        assert files.look(tmp_path) == {lack}
        files.forget()
        write, done = os.write, []

        def once(descriptor: int, data: bytes) -> int:
            done.append(data)
            if len(done) > 2:  # of the first trial and of append
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return write(descriptor, data)

        patch.setattr(os, "write", once)
        with pytest.raises(OSError, match="Input/output"):
            files.look(tmp_path)
    assert files.look(tmp_path) == frozenset()  # and it was not remembered
    assert list(tmp_path.iterdir()) == []


def test_what_a_kind_of_file_system_lacks_is_known_where_timing_decides(tmp_path, monkeypatch):
    files.forget()
    monkeypatch.setattr(file_system, "kind_of", lambda folder: "fuse.rclone")
    assert files.look(tmp_path) == {"rename of folders"}
    files.forget()


def test_fat_is_known_by_its_mount():
    mounts = "36 35 98:0 / /mnt rw,noatime - ext3 /dev/root rw\n40 35 8:17 / /usb rw shared:3 - vfat /dev/sdb1 rw\n"
    assert [file_system._kind_in(mounts, device) for device in ("8:17", "98:0", "1:1")] == ["vfat", "ext3", None]
    assert "vfat" in file_system.FAT


def test_a_checkpoint_too_large_for_its_file_system_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("milepost.run_files.largest_file", lambda folder: 1000)
    code, said = train(tmp_path)
    assert code == 2
    assert "ends files at 1kB" in said
    assert ckpt.find(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("code", [None, errno.ENOSYS])
def test_space_that_is_unknown_is_not_zero(code, lacking, tmp_path, monkeypatch):  # noqa: F811
    lacking("free space")
    if code:
        monkeypatch.setattr(os, "statvfs", lambda _: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    assert files.free_space(tmp_path) is None
    assert ckpt.free_space_problem(tmp_path, need=10**18) is None
    assert "does not report its free space" in ckpt.why_not_saved(OSError(errno.ENOSPC, ""), tmp_path, need=5)
    ckpt.save(of_step(1), tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Saving, keeping the best and pruning.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lack", [*LACKS, "rename, append"])
def test_a_policy_is_kept_whatever_is_lacking(lack, layout, lacking, tmp_path):  # noqa: F811
    for one in lack.split(", "):
        lacking(one)
    for step in range(1, 7):
        save_keep_prune(of_step(step), tmp_path, layout, keep_last=2, keep_every=4)
    found = whole(tmp_path)
    assert steps_of(found, best=False) == [4, 5] if layout == "unified" else [2, 4, 5]
    assert steps_of(found, best=True) == [6]
    tidy(tmp_path)
    newest_one = ckpt.latest(ckpt.find(tmp_path))
    assert newest_one is not None
    assert set(lack.split(", ")) <= set(ckpt.load(newest_one.path).runtime[saving.LACKS])


def test_a_record_of_an_ordinary_disk_names_no_lack(tmp_path):
    assert saving.LACKS not in ckpt.load(ckpt.save(of_step(1), tmp_path)).runtime


@pytest.mark.parametrize(
    ("lack", "layout"),
    [*IN_PLACE[:2], IN_PLACE[-1], *(pytest.param(*pair, marks=pytest.mark.soak) for pair in IN_PLACE[2:-1])],
)
def test_refused_at_every_call_in_place_nothing_is_harmed(lack, layout, lacking, tmp_path):  # noqa: F811
    lacking(lack)
    make_before(tmp_path / "before", layout)
    for number in range(1000):
        shutil.copytree(tmp_path / "before", tmp_path / "now")
        with fault(number, errno.EIO) as one:
            try:
                save_keep_prune(of_step(4), tmp_path / "now", layout, keep_last=1, keep_every=2)
            except (OSError, CheckpointError) as caught:
                error: Exception | None = caught
            else:
                error = None
        found = whole(tmp_path / "now", in_place=True)
        assert 2 in steps_of(found, best=False)
        assert max(steps_of(found, best=True)) >= 2
        assert error or 4 in steps_of(found, best=False)
        next_save_clears_up(tmp_path / "now", layout, 7)
        shutil.rmtree(tmp_path / "now")
        if one.met is None:
            break
    assert number >= 10


@pytest.mark.parametrize(
    ("lack", "layout"),
    [IN_PLACE[0], IN_PLACE[-1], *(pytest.param(*pair, marks=pytest.mark.soak) for pair in IN_PLACE[1:-1])],
)
def test_killed_at_every_call_in_place_no_half_is_taken(lack, layout, saver, lacking, tmp_path):  # noqa: F811
    make_before(tmp_path / "before", layout)
    lacking(lack)  # in the process that clears up, as in the one that is killed
    halves = 0
    for number in range(1000):
        folder = tmp_path / "now"
        shutil.copytree(tmp_path / "before", folder)
        said: Said = saver(f"nth {quote(str(folder))} {layout} blocking {number} {quote(lack)}")
        found = whole(folder, in_place=True)
        done = max(2, last(said, "saved"), last(said, "kept"))
        assert done <= max(one.step for one in found) <= done + 2
        assert max(steps_of(found, best=True)) >= last(said, "kept", 2)
        assert 2 in steps_of(found, best=False)
        halves += len(list(folder.rglob("*.unfinished")))
        next_save_clears_up(folder, layout, 7)
        shutil.rmtree(folder)
        if ("untouched",) in said:
            break
    assert number > 30
    assert halves > 3  # the kills did come at the wrong time


def test_control_without_its_mark_a_half_is_taken_for_another_programs_folder(tmp_path):
    path = ckpt.save(record(1), tmp_path, layout="directory")
    (path / "manifest.json").unlink()
    assert look(path, known_layout(path)).problem is None
    (tmp_path / f".tmp-{path.name}.unfinished").write_text("{")
    assert look(path, known_layout(path)).kind == "lacking"
    with pytest.raises(CheckpointError) as caught:
        ckpt.load(path)
    assert caught.value.kind == "lacking"


def test_a_checkpoint_of_which_no_file_is_left_is_no_unexpected_error(tmp_path):
    """Some file systems lose a renamed file, and another process may have deleted it."""
    files.remove([])
    with pytest.raises(FileNotFoundError):
        files.link_or_copy([], tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Locks.


def test_without_locks_a_file_excludes_a_second_process(lacking, tmp_path):  # noqa: F811
    lacking("locks")
    first, second = RunLock(tmp_path, "one"), RunLock(tmp_path, "one")
    first.acquire()
    with pytest.raises(RunLockedError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".owner"]
    assert list(tmp_path.iterdir()) == []


def test_the_owner_file_of_a_dead_process_is_taken_over(lacking, tmp_path):  # noqa: F811
    lacking("locks")
    child = "import os, sys; sys.path.insert(0, '.'); from pathlib import Path; from milepost.files import OwnerFile; "
    child += f"assert OwnerFile(Path({str(tmp_path / '.run-one.owner')!r})).acquire(patience=0); os._exit(0)"
    subprocess.run([sys.executable, "-c", child], check=True, cwd=Path(__file__).parents[1])
    assert (tmp_path / ".run-one.owner").exists()
    lock = RunLock(tmp_path, "one")
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("age", "touched", "held"), [(5.0, False, True), (3600.0, False, False), (3600.0, True, True)])
def test_another_hosts_owner_file_counts_while_it_is_touched_whatever_its_clock_says(
    age,
    touched,
    held,
    lacking,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    lacking("locks")
    path = tmp_path / ".run-one.owner"
    path.write_text('{"pid": 1, "host": "elsewhere", "started": null, "number": "00"}')
    then, ended = time.time() - age, threading.Event()
    os.utime(path, (then, then))
    assert owner_file.FRESH * 5 < owner_file.STALE

    def touch_by_a_clock_that_is_late() -> None:
        for second in itertools.count(1):
            if ended.wait(0.05):
                return
            os.utime(path, (then + second, then + second))

    holder = threading.Thread(target=touch_by_a_clock_that_is_late if touched else ended.wait, daemon=True)
    holder.start()
    if not touched:
        monkeypatch.setattr(owner_file, "FRESH", 0.1)
    lock = owner_file.OwnerFile(path)
    assert lock.acquire(patience=0) is not held
    ended.set()
    holder.join()
    lock.release()
    assert path.exists() is held
    assert [each for each in tmp_path.iterdir() if each != path] == []


def test_a_file_that_stopped_being_ours_is_not_deleted(tmp_path):
    lock = owner_file.OwnerFile(tmp_path / "owner")
    assert lock.acquire(patience=0)
    (tmp_path / "owner").write_text("another's")
    lock.release()
    assert (tmp_path / "owner").read_text() == "another's"


# ---------------------------------------------------------------------------------------------------------------------
# Lines that wait.


def test_without_append_lines_are_written_at_each_flush_and_none_is_lost(lacking, tmp_path):  # noqa: F811
    lacking("append")
    file = GrowingFile(tmp_path / "lines")
    file.add(b"1\n")
    assert not file.path.exists()
    file.flush()
    file.add(b"2\n")
    assert file.path.read_bytes() == b"1\n"
    file.close()
    again = GrowingFile(tmp_path / "lines")
    again.add(b"3\n")
    again.close()
    assert file.path.read_bytes() == b"1\n2\n3\n"
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]


def test_lines_wait_while_the_folder_is_away(tmp_path, monkeypatch):
    file, away = GrowingFile(tmp_path / "lines"), True

    def opened(name: str, flags: int, *mode: int, open: Callable[..., int] = os.open) -> int:
        if away and str(name).endswith("lines"):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return open(name, flags, *mode)

    monkeypatch.setattr(os, "open", opened)
    for line in (b"1\n", b"2\n"):
        with pytest.raises(OSError, match="not connected"):
            file.add(line)
    assert not file.path.exists()
    away = False
    file.add(b"3\n")
    assert file.path.read_bytes() == b"1\n2\n3\n"


@pytest.mark.parametrize("lack", ["rename", "rename onto a name"])
def test_a_file_that_is_replaced_in_place_is_whole_whenever_its_writer_dies(lack, lacking, tmp_path):  # noqa: F811
    """Refuse the n-th writing for every n: a reader finds the old content or the new one, never a part."""
    lacking(lack)
    path, write = tmp_path / "lines", growing._write
    seen = set()
    for number in range(3):
        files.replace_content(path, b"old")
        left = number

        def dying(target: Path, content: bytes) -> None:
            nonlocal left
            if left == 0:
                target.write_bytes(content[: len(content) // 2])
                raise KeyboardInterrupt
            left -= 1
            write(target, content)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(growing, "_write", dying)
            with contextlib.suppress(KeyboardInterrupt):
                files.replace_content(path, b"new content")
        seen.add(files.content_of(path))
        growing.restore(path)
        assert path.read_bytes() in (b"old", b"new content")
    assert seen == {b"old", b"new content"}
    assert [each.name for each in tmp_path.iterdir()] == ["lines"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_a_killed_replacement_leaves_goes_with_the_next(call, tmp_path):
    path = tmp_path / "sample.txt"
    files.replace_content(path, b"old")
    if (child := os.fork()) == 0:  # a kill leaves no time to clean up
        setattr(os, call, lambda *_: os._exit(9))
        files.replace_content(path, b"new content")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (files.content_of(path), len(list(tmp_path.iterdir()))) == (b"old", 2)
    files.replace_content(path, b"newest")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("sample.txt", b"newest")]


# ---------------------------------------------------------------------------------------------------------------------
# Folders that do not answer.


@pytest.fixture
def stale(monkeypatch) -> dict[str, int]:
    """How often each opening for reading fails with ESTALE, by a part of the path; pauses are short."""
    times: dict[str, int] = {}
    opened: dict[tuple[str, str], int] = {}

    def refusing(action: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            for part, most in times.items():
                if part in str(file) and set(mode) <= set("rbt"):
                    opened[part, str(file)] = opened.get((part, str(file)), 0) + 1
                    if opened[part, str(file)] <= most:
                        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(file))
            return action(file, mode, *arguments, **named)

        return call

    monkeypatch.setattr(reaching, "PAUSES", (0.0,) * 3)
    monkeypatch.setattr(reaching, "_failed", [])
    monkeypatch.setattr(builtins, "open", refusing(builtins.open))
    monkeypatch.setattr(io, "open", refusing(io.open))
    return times


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_is_stale_once_is_read(layout, stale, tmp_path):
    path = ckpt.save(of_step(1), tmp_path, layout=layout)
    stale[path.name] = 1
    assert ckpt.load(path, verify=True).step == 1


@pytest.mark.parametrize("layout", ["unified", "stepfiles", "directory", "consolidated"])
def test_what_could_not_be_read_is_not_damaged_and_nothing_is_pruned_on_its_strength(layout, stale, tmp_path):
    paths = [ckpt.save(of_step(step), tmp_path, layout=layout) for step in (1, 2, 3)]
    before = {one.step for one in whole(tmp_path)}
    index._last_listing.cache_clear()
    stale[paths[1].stem] = 10**6
    found = {one.path: one for one in ckpt.find(tmp_path)}
    assert found[paths[1]].kind == "unreachable"
    with pytest.raises(CheckpointError) as caught:
        ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=paths[2])
    assert caught.value.kind == "unreachable"
    stale.clear()
    assert {one.step for one in whole(tmp_path)} == before  # and it is not remembered as unreadable
    ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=paths[2])  # the control
    assert {one.step for one in whole(tmp_path)} == {3}


def test_resuming_does_not_fall_back_on_an_older_checkpoint_because_the_newest_does_not_answer(stale, tmp_path):
    code, said = train(tmp_path)
    assert code == 0, said
    last_one = newest(tmp_path).path
    assert last_one is not None
    stale[last_one.name] = 10**6
    code, said = train(tmp_path, RESUME="auto", TRAINING_STEPS="12")
    assert code == 3
    assert "could not be read" in said
    assert "damaged" not in said


def test_nothing_older_goes_when_the_new_checkpoint_cannot_be_read_back(tmp_path):
    paths = [ckpt.save(of_step(step), tmp_path) for step in (1, 2, 3)]
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="nothing older was deleted"):
        ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=paths[2])
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTCONN], ids=errno.errorcode.get)
def test_a_failed_save_is_tried_again_as_soon_as_the_disk_takes_it_and_not_at_the_next_interval(
    code, tmp_path, monkeypatch
):
    real, refused = ckpt.save, []

    def full_once(record: Any, folder: Path, **form: Any) -> Path:
        if record.step == 4 and not refused:
            refused.append(record.step)
            raise OSError(code, os.strerror(code))
        return real(record, folder, **form)

    monkeypatch.setattr(ckpt, "save", full_once)
    monkeypatch.setattr(run_checkpoints, "FIRST_PAUSE", 0.0)
    status, said = train(tmp_path, CHECKPOINT_INTERVAL="4", TRAINING_STEPS="20", CHECKPOINT_ASYNC="false",
                         CHECKPOINT_KEEP_BEST="0")  # fmt: skip
    assert status == 0
    assert refused == [4]
    assert said.count("could not be saved") == 1
    steps = steps_of(list(ckpt.find(tmp_path / "checkpoints")), best=False)
    assert steps[0] == 5
    assert steps[1:] == [8, 12, 16, 20]


def test_names_that_were_made_are_known_while_another_thread_makes_more(tmp_path):
    """A save in the background makes names while the loop lists folders."""
    made, problems = [tmp_path / str(number) for number in range(2000)], []

    def make() -> None:
        try:
            for path in made:
                reaching.remember(path)
                reaching.moved(path, path.with_name(f"new{path.name}"))
        except RuntimeError as error:
            problems.append(error)

    (tmp_path / "new7").touch()
    thread = threading.Thread(target=make)
    thread.start()
    while thread.is_alive():
        assert list(tmp_path.iterdir()) == reaching.entries(tmp_path)
    assert problems == []
    assert [entry.name for entry in reaching.entries_with_made(tmp_path, [])] == ["new7"]  # what a late listing lacks


@pytest.mark.parametrize("lack", [None, "rename"])
def test_a_mark_of_somebody_else_deletes_nothing(tmp_path, lack, lacking):  # noqa: F811
    """A folder may come from another person: no file in it decides what is deleted."""
    if lack:
        lacking(lack)
    folder = tmp_path / "checkpoints"
    good = [ckpt.save(of_step(step), folder) for step in (1, 2)]
    (folder / "notes.txt").write_text("mine")
    gone = f"checkpoint_bigram_letters_step0009_{good[0].stem[-15:]}.pt"
    for names in ([good[0].name, good[1].name], [good[0].name, "notes.txt"], ["notes.txt", gone], [good[0].name, gone]):
        values = {"process": 3999999, "names": names}
        (folder / f".tmp-{names[-1]}.unfinished").write_text(json.dumps(values))
    before = {path: path.read_bytes() for path in (*good, folder / "notes.txt")}
    ckpt.save(of_step(3), folder)
    assert {path: path.read_bytes() for path in before if path.exists()} == before


def test_a_pipe_beside_a_file_that_changes_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"one\n")
    os.mkfifo(tmp_path / ".metrics.jsonl.new")
    with limited():
        assert growing.content_of(tmp_path / "metrics.jsonl") == b"one\n"
