"""Whole or not there: files appear at once and durably, a disk that refuses harms nothing,
and locks end with their holders.
"""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drive import tensor_bytes
from filelock import FileLock, Timeout
from records import in_child, record, snapshot, walkable_folder

from milepost import ckpt
from milepost.ckpt import layouts
from milepost.ckpt.layouts import stepfiles
from milepost.ckpt.leftovers import prepare_folder, remove_leftovers
from milepost.ckpt.manifest import write_manifest
from milepost.files import (
    NewFile,
    flush_to_disk,
    link_or_copy,
    new_file,
    new_folder,
    new_group,
    new_path,
    remove,
    sync_folder,
    write_json,
    writing,
    written,
)
from milepost.locks import FOLDER_LOCK, RunLock, RunLockedError, folder_lock


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
            name = name_of(first) if isinstance(first, int) else Path(first).name
            if name != ".owner":  # the holder of the folder's lock
                calls.append((_name, "temporary" if name.startswith(".tmp-") else name))
            return _action(*arguments, **named)

        monkeypatch.setattr(os, name, recorded)
    saved = ckpt.save(better, tmp_path)
    ckpt.keep_best(better, tmp_path, saved=saved)
    assert calls == [
        ("fsync", "temporary"),
        ("replace", "temporary"),
        ("fsync", tmp_path.name),
        ("link", saved.name),
        ("replace", "temporary"),
        ("fsync", "best"),
        ("fsync", "best"),
        ("fsync", tmp_path.name),
        ("unlink", earlier),
    ]


def test_the_mode_follows_the_umask(tmp_path):
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


def test_a_file_that_a_library_opens_itself_appears_when_it_is_whole(tmp_path):
    with new_path(tmp_path / "new") as hidden:
        hidden.write_bytes(b"half")
        assert visible(tmp_path) == []
        hidden.write_bytes(b"whole")
    assert (tmp_path / "new").read_bytes() == b"whole"
    with pytest.raises(FileExistsError), new_path(tmp_path / "new") as hidden:
        hidden.write_bytes(b"other")
    with pytest.raises(ZeroDivisionError), new_path(tmp_path / "next") as hidden:
        hidden.write_bytes(b"half" * (1 // 0))
    with pytest.raises(OSError, match="next"), new_path(tmp_path / "next"):
        pass  # a library that wrote nothing
    assert (tmp_path / "new").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_a_library_wrote_when_it_was_killed_goes_with_the_next(tmp_path):
    pid = os.fork()
    if pid == 0:
        with new_path(tmp_path / "new") as hidden:
            hidden.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert visible(tmp_path) == []
    assert len(temporaries(tmp_path)) == 1
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_what_ends_the_writing_leaves_nothing(error, tmp_path):
    def write():
        with new_file(tmp_path / "new") as file:
            file.write(b"x" * 100_000)
            raise error

    with pytest.raises(type(error)):
        write()
    assert list(tmp_path.iterdir()) == []


SIZES = [0, 1, 4095, 4096, 4097, 8192, 3 * 4096 + 5]


def refuses_direct(monkeypatch: pytest.MonkeyPatch, *, makes_the_file: bool) -> list[Path]:
    """A file system without O_DIRECT, of which some have made the file by the time they say so.

    Returns what was asked for.
    """
    opened, asked = os.open, []

    def refusing(path, flags, *mode, **named):
        if flags & os.O_DIRECT:
            asked.append(Path(path))
            if makes_the_file:
                os.close(opened(path, flags & ~os.O_DIRECT, *mode))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *mode, **named)

    monkeypatch.setattr(os, "open", refusing)
    return asked


@pytest.mark.parametrize("pieces", [1, 3, 1000], ids=lambda pieces: f"{pieces} pieces")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direct", ["direct", "refused", "refused late"])
def test_a_file_of_any_size_in_writes_of_any_size_is_what_was_written(direct, size, pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "CHUNK", 8192)  # so that these sizes lie around its edges
    asked = refuses_direct(monkeypatch, makes_the_file=direct == "refused late") if direct != "direct" else []
    data = bytes(range(256)) * 60
    step = max(1, size // pieces)
    with written(tmp_path / "new", hashed=True) as file:
        for start in range(0, size, step):
            file.write(memoryview(data)[start : min(start + step, size)])
            assert file.tell() == min(start + step, size)
    assert (tmp_path / "new").read_bytes() == data[:size]
    whole = hashlib.sha256(data[:size]).hexdigest()
    assert file.entry == {"size": size, "sha256": whole, "begins_sha256": whole}
    assert asked == ([] if direct == "direct" else [tmp_path / "new"])


@pytest.mark.parametrize("most", [1, 1000, 4096, 5000])
def test_the_rest_of_a_short_write_is_written(most, tmp_path, monkeypatch):
    write, asked = os.write, []

    def short(descriptor: int, data: Any) -> int:
        asked.append(len(data))
        return write(descriptor, data[:most])

    monkeypatch.setattr(os, "write", short)
    data = os.urandom(11_000)
    with written(tmp_path / "new") as file:
        file.write(data)
    assert (tmp_path / "new").read_bytes() == data
    assert len(asked) >= 11_000 // most


def test_a_new_file_never_takes_the_place_of_another(tmp_path):
    (tmp_path / "there").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        NewFile(tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == b"old"


def test_json_is_written_for_people_and_without_what_json_has_not(tmp_path):
    file = write_json(tmp_path / "a.json", {"step": 1, "text": "é"})
    text = (tmp_path / "a.json").read_bytes()
    assert text == '{\n  "step": 1,\n  "text": "é"\n}\n'.encode()
    whole = hashlib.sha256(text).hexdigest()
    assert file.entry == {"size": len(text), "sha256": whole, "begins_sha256": whole}
    write_json(tmp_path / "half.json", {"\udc80": "\ud800x"})  # as os.environ gives bytes that are no UTF-8
    assert json.loads((tmp_path / "half.json").read_text(encoding="utf-8")) == {"\udc80": "\ud800x"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", {"loss": float("nan")})


# ---------------------------------------------------------------------------------------------------------------------
# Folders and groups of files


def recorded(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[tuple[str, str]]:
    """The calls of these functions of os from now on, each with the name of what it is about."""
    calls: list[tuple[str, str]] = []
    for name, action in {name: getattr(os, name) for name in names}.items():

        def call(*arguments, _name=name, _action=action, **named):
            first = arguments[0]
            calls.append((_name, name_of(first) if isinstance(first, int) else Path(first).name))
            return _action(*arguments, **named)

        monkeypatch.setattr(os, name, call)
    return calls


def fill(hidden: Path, *names: str) -> None:
    for name in names:
        (hidden / name).parent.mkdir(exist_ok=True)
        with written(hidden / name) as file:
            file.write(name.encode())


def test_a_folder_is_seen_when_all_in_it_is_durable(tmp_path, monkeypatch):
    calls = recorded(monkeypatch, "fsync", "replace")
    with new_folder(tmp_path / "new") as hidden:
        fill(hidden, "a", "inner/b", "manifest")
        assert visible(tmp_path) == []
    assert [name for call, name in calls if call == "fsync"] == [
        "a",
        "b",
        "manifest",
        "inner",
        hidden.name,
        tmp_path.name,
    ]
    assert [call for call, _ in calls][-2:] == ["replace", "fsync"]
    assert snapshot(tmp_path) == {"new/a": b"a", "new/inner/b": b"inner/b", "new/manifest": b"manifest"}


def test_the_head_of_a_group_is_seen_last_and_when_the_others_are_durable(tmp_path, monkeypatch):
    calls = recorded(monkeypatch, "fsync", "replace")
    with new_group(tmp_path, ["a", "b", "head"]) as hidden:
        fill(hidden, "a", "b", "head")
        assert visible(tmp_path) == []
        hidden_name = hidden.name
        calls.clear()
    assert calls == [
        ("fsync", hidden_name),
        ("replace", "a"),
        ("replace", "b"),
        ("fsync", tmp_path.name),
        ("replace", "head"),
        ("fsync", tmp_path.name),
    ]
    assert snapshot(tmp_path) == {"a": b"a", "b": b"b", "head": b"head"}
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_what_ends_the_writing_of_a_folder_or_a_group_leaves_nothing(error, tmp_path):
    def write(opened):
        with opened as hidden:
            fill(hidden, "a", "head")
            raise error

    for opened in (new_folder(tmp_path / "new"), new_group(tmp_path, ["a", "head"])):
        with pytest.raises(type(error)):
            write(opened)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["a", "head"])
def test_a_group_never_replaces_a_visible_name_and_leaves_no_part_of_itself(taken, tmp_path):
    (tmp_path / taken).write_bytes(b"old")
    with pytest.raises(FileExistsError), new_group(tmp_path, ["a", "b", "head"]) as hidden:
        fill(hidden, "a", "b", "head")
    assert snapshot(tmp_path) == {taken: b"old"}
    assert temporaries(tmp_path) == []


def test_a_folder_never_replaces_another(tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(FileExistsError), new_folder(tmp_path / "new") as hidden:
        fill(hidden, "a")
    assert snapshot(tmp_path) == {}
    assert temporaries(tmp_path) == []


def group(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    return [folder / name for name in names]


def test_the_head_of_a_group_goes_first(tmp_path, monkeypatch):
    paths = group(tmp_path, "a", "b", "head", "another")[:3]
    seen, replace, unlink = [], os.replace, os.unlink
    monkeypatch.setattr(os, "replace", lambda *paths: (replace(*paths), seen.append(visible(tmp_path)))[0])
    monkeypatch.setattr(
        os, "unlink", lambda *path, **named: (unlink(*path, **named), seen.append(visible(tmp_path)))[0]
    )
    remove(paths)
    assert seen[0] == ["a", "another", "b"]
    assert snapshot(tmp_path) == {"another": b"another"}
    assert temporaries(tmp_path) == []


def test_one_file_and_one_folder_are_removed_at_once(tmp_path):
    group(tmp_path, "file")
    group(tmp_path / "folder", "a", "b")
    remove([tmp_path / "file"])
    remove([tmp_path / "file"])  # it is gone already
    remove([tmp_path / "folder"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_a_second_name_for_a_file_a_folder_and_a_group(links, tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise PermissionError(1, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    place = tmp_path / "best"
    place.mkdir()
    group(tmp_path / "folder", "a", "inner")
    for paths in ([*group(tmp_path, "one")], [tmp_path / "folder"], group(tmp_path, "a", "head")):
        assert link_or_copy(paths, place) == place / paths[-1].name
    assert snapshot(place) == {"one": b"one", "folder/a": b"a", "folder/inner": b"inner", "a": b"a", "head": b"head"}
    for name in snapshot(place):
        assert (place / name).samefile(tmp_path / name) == links
    assert temporaries(tmp_path) == []
    with pytest.raises(FileExistsError):
        link_or_copy([tmp_path / "one"], place)


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


@pytest.fixture
def saved_once(tmp_path) -> Path:
    """A folder that holds one checkpoint, of step 1."""
    ckpt.save(record(1, size=100), tmp_path)
    return tmp_path


def assert_unharmed(folder: Path) -> None:
    """The one checkpoint of `saved_once` is whole and alone."""
    assert len(snapshot(folder)) == 1
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
    assert words.startswith("the file is too large: about 123,456 bytes are needed")
    assert str(saved_once) in words


def errno_of_a_save(folder: Path, layout: str) -> int | None:
    """None if the save succeeds; a full disk is the only error allowed."""
    try:
        ckpt.save(record(2, size=100), folder, layout=layout)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return error.errno
    return None


@pytest.mark.parametrize("layout", sorted(ckpt.WRITERS))
def test_a_disk_full_at_every_single_write_harms_nothing(layout, saved_once, monkeypatch):
    """The n-th write fails, for every n until a save passes untouched."""
    monkeypatch.setattr(writing, "CHUNK", 16 * 1024)  # otherwise each file is one write
    for fail_at in range(1000):
        left, write = iter(range(fail_at)), os.write

        def failing(descriptor: int, data: Any, *, left=left, write=write) -> int:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", failing)
            failed = errno_of_a_save(saved_once, layout)
        if failed is None:
            break
        assert_unharmed(saved_once)
    assert fail_at >= 8
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


def test_an_io_error_after_the_rename_is_raised_and_the_new_file_stays(saved_once, monkeypatch):
    """Visible but not proved durable: nobody must think it safe, and nobody must delete it."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails(os.fsync, when=is_folder))
        with pytest.raises(OSError, match="Input/output error"):
            ckpt.save(record(2, size=100), saved_once)
    assert [one.step for one in ckpt.find(saved_once) if one.problem is None] == [1, 2]


def test_a_file_system_without_fsync_is_no_error(tmp_path, monkeypatch):
    def refusing(code):
        def fsync(descriptor):
            raise OSError(code, os.strerror(code))

        return fsync

    with open(tmp_path / "file", "wb") as file:
        for code in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            monkeypatch.setattr(os, "fsync", refusing(code))
            assert sync_folder(tmp_path) is None
            assert flush_to_disk(file.fileno()) is None
        monkeypatch.setattr(os, "fsync", refusing(errno.EIO))  # the control: this one means lost bytes
        with pytest.raises(OSError, match="Input/output error"):
            flush_to_disk(file.fileno())
        with pytest.raises(OSError, match="Input/output error"):
            sync_folder(tmp_path)


def test_other_errors_of_the_writer_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="not the disk"), new_file(tmp_path / "new"):
        raise RuntimeError("not the disk")
    with pytest.raises(ckpt.CheckpointError) as caught:  # a NaN has no place in a record
        ckpt.save(record(1, validation_loss=float("nan")), tmp_path)
    assert caught.value.kind == "refused"
    assert visible(tmp_path) == []
    assert temporaries(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# What killed writers left.


DEAD = "99999999-0123abcd"  # the end of a temporary name: a process that cannot be, and random digits


def test_leftovers_go_and_nothing_else(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    folder = tmp_path / "checkpoints"
    (folder / f".tmp-folder-{DEAD}" / "inner").mkdir(parents=True)
    (folder / f".tmp-folder-{DEAD}" / "inner" / "link").symlink_to(outside)
    (folder / f".tmp-file-{DEAD}").write_bytes(b"half")
    os.mkfifo(folder / f".tmp-pipe-{DEAD}")
    (folder / f".tmp-link-{DEAD}").symlink_to(outside)
    theirs = [
        ".lock",
        ".tm",
        "tmp-visible",
        "checkpoint.pt",
        ".tmp-",
        ".tmp-notes",
        ".tmp-a-99999999-0123ABCD",
        ".tmp-a-b-0123abcd",
    ]
    living = f".tmp-file-{os.getppid()}-0123abcd"
    for name in (*theirs, living):
        (folder / name).write_bytes(b"")
    removed = remove_leftovers(folder)
    assert sorted(path.name for path in removed) == [f".tmp-{name}-{DEAD}" for name in ("file", "folder", "pipe")]
    left = [*theirs, living, f".tmp-link-{DEAD}"]  # a link is never made by this program
    assert sorted(path.name for path in folder.iterdir()) == sorted(left)
    assert (outside / "kept").read_bytes() == b"kept"
    assert remove_leftovers(tmp_path / "missing") == []


PARTS = {
    "separated": ["-optimizer.pt", "-model.pt"],
    "stepfiles": [".safetensors", "_optimizer.safetensors", "_state.json"],
}


def half_a_save(folder: Path, layout: str, hidden: list[int], seen: list[int]) -> tuple[list[str], Path]:
    """What a kill leaves of a checkpoint: of its files (the last is its head) these in its hidden folder and those
    visible.
    """
    path = ckpt.save(record(), folder / "made", layout=layout)
    whole = layouts.known_layout(path).files(path)
    place = folder / f".tmp-{whole[-1].name}-{DEAD}"
    place.mkdir()
    for number in hidden:
        os.link(whole[number], place / whole[number].name)
    for number in seen:
        os.link(whole[number], folder / whole[number].name)
    names = [file.name for file in whole]
    shutil.rmtree(folder / "made")
    return names, place


KILLED = [
    ("separated", [0], [], []),  # while it was written
    ("separated", [0, 1], [], []),
    ("separated", [1], [0], []),  # while it was shown, or removed
    ("separated", [], [0, 1], [0, 1]),  # all of it is there
    ("separated", [0], [1], [1]),
    ("stepfiles", [0, 1], [], []),
    ("stepfiles", [1, 2], [0], []),  # while it was shown
    ("stepfiles", [2], [0, 1], []),
    ("stepfiles", [2], [1], []),  # while it was removed
    ("stepfiles", [2], [], []),
    ("stepfiles", [], [0, 1, 2], [0, 1, 2]),
    ("stepfiles", [1, 2], [0, 2], [0, 2]),  # a head of this name is visible: nothing visible is touched
    ("stepfiles", [], [0, 1], [0, 1]),  # without a head nothing proves whose they are
    ("stepfiles", [0, 1], [1], [1]),
]


@pytest.mark.parametrize(("layout", "hidden", "seen", "left"), KILLED)
def test_of_a_save_whose_head_is_not_visible_nothing_stays(layout, hidden, seen, left, tmp_path):
    names, _ = half_a_save(tmp_path, layout, hidden, seen)
    group(tmp_path, "other.safetensors", "other-optimizer.pt")
    remove_leftovers(tmp_path)
    assert visible(tmp_path) == sorted([*(names[number] for number in left), "other.safetensors", "other-optimizer.pt"])
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize("layout", PARTS)
@pytest.mark.parametrize("harm", ["another save", "a link", "a living writer", "a linked hidden folder"])
def test_a_visible_file_that_the_hidden_head_does_not_prove_stays(harm, layout, tmp_path):
    """Negative control of the removal: each of these is like a killed save but for one thing."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    _, place = half_a_save(folder, layout, [-1], [0])
    part = folder / place.name.removeprefix(".tmp-").replace(f"-{DEAD}", "").replace(
        *{"separated": ("-model.pt", "-optimizer.pt"), "stepfiles": ("_state.json", ".safetensors")}[layout]
    )
    assert part.exists()
    if harm == "another save":
        other = ckpt.save(record(2), tmp_path / "other", layout=layout)
        part.unlink()
        os.link(layouts.known_layout(other).files(other)[0], part)
    elif harm == "a link":
        part.rename(tmp_path / "outside")
        part.symlink_to(tmp_path / "outside")
    elif harm == "a living writer":
        place.rename(place.with_name(place.name.replace("99999999", str(os.getppid()))))
    else:
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    before = part.read_bytes()
    remove_leftovers(folder)
    assert part.read_bytes() == before


def test_a_file_of_a_checkpoint_that_is_whole_stays_though_a_hidden_head_has_its_sha256(tmp_path):
    """Somebody else's CHECKPOINT_DIR, which is itself a checkpoint and holds a head that was made for its weights."""
    folder = ckpt.save(record(), tmp_path, layout="huggingface")
    with written(tmp_path / "copy", hashed=True) as copy:
        copy.write((folder / "model.safetensors").read_bytes())
    place = folder / f".tmp-model_state.json-{DEAD}"
    place.mkdir()
    write_manifest(place / "model_state.json", record(), {"model.safetensors": copy}, first={}, groups=None)
    assert stepfiles.LAYOUT.parts_of(place / "model_state.json", folder) == [folder / "model.safetensors"]  # control
    remove_leftovers(folder)
    assert not place.exists()
    assert ckpt.load(folder, verify=True).step == 1


@pytest.mark.parametrize("layout", ckpt.WRITERS)
def test_a_list_of_names_in_a_hidden_folder_removes_nothing(layout, tmp_path):
    """Somebody else's folder: earlier versions removed what `.names` listed."""
    path = ckpt.save(record(), tmp_path / "checkpoints", layout=layout)
    names = [file.name for file in layouts.known_layout(path).files(path)]
    place = path.parent / ".tmp-head-3999999-0123abcd"
    place.mkdir()
    (place / ".names").write_text(json.dumps([*names, "head"]))
    (place / "head").write_bytes(b"")
    before = snapshot(tmp_path)
    remove_leftovers(path.parent)
    assert temporaries(tmp_path) == []
    after = snapshot(tmp_path)
    assert after == {name: content for name, content in before.items() if ".tmp-head" not in name}
    assert ckpt.load(path, verify=True).step == 1


def test_a_save_removes_leftovers_of_the_folder_and_of_its_best(tmp_path):
    (tmp_path / "best").mkdir()
    for folder in (tmp_path, tmp_path / "best"):
        (folder / f".tmp-checkpoint-{DEAD}").write_bytes(b"half")
    ckpt.save(record(), tmp_path)
    assert temporaries(tmp_path) == []


def test_a_folder_is_made_and_proved_writable(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    for place in (folder, folder / "run", folder / "run" / "best"):  # also of runs that will never be resumed
        place.mkdir(exist_ok=True)
        (place / f".tmp-old-{DEAD}").write_bytes(b"half")
    prepare_folder(folder)
    prepare_folder(tmp_path / "c" / "d")
    assert visible(tmp_path / "c") == ["d"]
    assert visible(folder) == ["run"]
    assert visible(tmp_path / "c" / "d") == []
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


def test_a_lock_that_is_a_second_name_of_a_file_does_not_empty_it(tmp_path):
    (tmp_path / "valued").write_text("of value")
    os.link(tmp_path / "valued", tmp_path / FOLDER_LOCK)
    with pytest.raises(OSError, match="remove it"), folder_lock(tmp_path):
        pass
    assert (tmp_path / "valued").read_text() == "of value"
    (tmp_path / FOLDER_LOCK).unlink()
    with folder_lock(tmp_path):
        pass
    os.link(tmp_path / FOLDER_LOCK, tmp_path / "backup")  # as `cp -al` makes one
    with folder_lock(tmp_path):
        pass


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
