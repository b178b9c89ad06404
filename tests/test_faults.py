"""The fault table, for every layout: a disk that refuses at any call, files that are cut, flipped,
or of another kind than expected.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import stat
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import (
    every_file,
    files_of,
    in_best,
    make_before,
    next_save_clears_up,
    opened,
    same_or_said,
    steps_of,
    whole,
)
from records import FULL, NOON, flipped, in_child, record, set_clock, walkable_folder
from saver import CHANGING, of_step, save_keep_prune
from work import limited

from milepost import ckpt
from milepost.ckpt import Checkpoint, manifest, retention
from milepost.ckpt.finding import scan
from milepost.files import writing
from milepost.locks import FOLDER_LOCK

LAYOUTS = list(ckpt.WRITERS)
ALLOCATING = ("open", "write", "mkdir", "link")  # the calls that a full disk refuses


@pytest.fixture(params=LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture
def home(layout, tmp_path) -> Path:
    """A complete checkpoint with every field, in a folder without others."""
    return ckpt.save(record(7, **FULL), tmp_path / "checkpoints", layout=layout)


# ---------------------------------------------------------------------------------------------------------------------
# A disk that refuses: the old checkpoints stay, nothing half is seen, and the error says what and where.


class Fault:
    """Refuses the n-th call that changes the disk: for good if the disk is full, else once."""

    def __init__(self, number: int, code: int) -> None:
        self.left, self.code = number, code
        self.met: tuple[str, bool] | None = None  # the call that was refused, and whether it was about a folder

    def wrap(self, name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not concerns_checkpoints(name, *arguments):
                return action(*arguments, **named)
            again = self.code == errno.ENOSPC and self.left < 0 and name in ALLOCATING
            if self.left == 0 and self.code == errno.ENOSPC and name not in ALLOCATING:
                return action(*arguments, **named)  # a full disk still renames and removes
            self.left -= 1
            if self.left != -1 and not again:
                return action(*arguments, **named)
            self.met = self.met or (name, is_folder(arguments[0]))
            if name == "close":
                action(*arguments)
            names = [str(each) for each in arguments[:1] if not isinstance(each, int)]
            raise OSError(self.code, os.strerror(self.code), *names)

        return call


def concerns_checkpoints(name: str, first: Any, *rest: Any) -> bool:
    """Leave out locks, and of opened files all that are only read."""
    if name == "open":
        return bool(rest[0] & os.O_CREAT) and Path(first).name != FOLDER_LOCK
    if name == "close":
        return ".tmp-" in os.readlink(f"/proc/self/fd/{first}") and not is_folder(first)
    return True


def is_folder(place: Any) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISDIR(os.stat(place).st_mode)
    return False


@contextlib.contextmanager
def fault(number: int, code: int) -> Iterator[Fault]:
    """Every changing call is counted as long as the block lasts. A sync that is not refused is only counted: a disk
    takes milliseconds for each of 30,000, and nothing here cuts the power.
    """
    one = Fault(number, code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor))
        for name in (*CHANGING, "close"):
            patch.setattr(os, name, one.wrap(name, getattr(os, name)))
        yield one


def told(error: OSError, folder: Path, code: int) -> None:
    assert error.errno == code
    assert os.strerror(code) in str(error)
    assert str(folder) in str(error)
    if code == errno.ENOSPC:
        assert ckpt.why_not_saved(error, folder, need=123_456).startswith("the disk is full: about 123,456 bytes")


def refused_once(folder: Path, layout: str, number: int, code: int) -> bool:
    """Save, keep the best and prune with the n-th call refused; check the folder afterwards; return whether a call was
    refused.
    """
    error = None
    with fault(number, code) as one:
        try:
            save_keep_prune(of_step(4), folder, layout, keep_last=1, keep_every=2)
        except OSError as caught:
            error = caught
    if error:
        told(error, folder, code)
    found = whole(folder)
    ordinary = steps_of(found, best=False)
    assert 2 in ordinary
    assert max(steps_of(found, best=True)) >= 2
    assert error or 4 in ordinary
    next_save_clears_up(folder, layout, 7)
    return one.met is not None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_refused_at_every_call_that_changes_the_disk_nothing_is_harmed(code, layout, tmp_path):
    """Refuse the n-th call for n = 0, 1, 2, ... until none is left."""
    make_before(tmp_path / "before", layout)
    for number in range(1000):
        shutil.copytree(tmp_path / "before", tmp_path / "now")
        if not refused_once(tmp_path / "now", layout, number, code):
            break
        shutil.rmtree(tmp_path / "now")
    assert number >= (6 if code == errno.ENOSPC else 14)


def visible(folder: Path) -> list[Path]:
    return [
        path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_a_save_that_is_refused_leaves_no_trace(code, layout, tmp_path):
    """No visible name, no hidden one: at every write and file sync, and where the new name is to appear."""
    make_before(tmp_path, layout)
    before = sorted(visible(tmp_path))
    for number in range(1000):
        with fault(number, code) as one:
            try:
                ckpt.save(of_step(4), tmp_path, layout=layout)
            except OSError as error:
                told(error, tmp_path, code)
        if one.met is None:
            break
        if 4 not in steps_of(whole(tmp_path), best=False):
            assert sorted(visible(tmp_path)) == before
            assert list(tmp_path.rglob(".tmp-*")) == []
        else:  # seen, though perhaps not for good: nobody must delete it
            assert one.met in (("fsync", True), ("mkdir", True), ("unlink", False), ("rmdir", True))
            shutil.rmtree(tmp_path)
            make_before(tmp_path, layout)
            before = sorted(visible(tmp_path))
    assert number >= 2


@contextlib.contextmanager
def size_limit(limit: int) -> Iterator[None]:
    """The kernel itself refuses to let any file grow past `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 1, 4095, 4096, 50_000, 65_600])
def test_a_file_that_may_not_grow_is_an_error_and_harms_nothing(limit, layout, tmp_path):
    make_before(tmp_path, layout)
    before = sorted(visible(tmp_path))
    with size_limit(limit), pytest.raises(OSError, match="File too large") as caught:
        ckpt.save(of_step(4), tmp_path, layout=layout)
    told(caught.value, tmp_path, errno.EFBIG)
    assert sorted(visible(tmp_path)) == before
    whole(tmp_path)
    next_save_clears_up(tmp_path, layout, 7)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk; the kernel's limit on a file's size is tested in its place")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_keeps_what_it_has(layout, small_disk):
    """1 MB, three saves of 200 kB in it, one of them twice by a link: the next does not fit until there is room."""
    make_before(small_disk, layout)
    filler = small_disk / ".filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    before = sorted(visible(small_disk))
    with pytest.raises(OSError, match="No space left") as caught:
        ckpt.save(of_step(4), small_disk, layout=layout)
    told(caught.value, small_disk, errno.ENOSPC)
    assert ckpt.free_space_problem(small_disk, need=200_000) is not None
    assert sorted(visible(small_disk)) == before
    assert list(small_disk.rglob(".tmp-*")) == []
    whole(small_disk)
    filler.unlink()
    next_save_clears_up(small_disk, layout, 7)


@pytest.mark.parametrize("most", [1, 7, 4096, 5000])
def test_a_disk_that_takes_a_little_at_a_time_gets_all(most, layout, tmp_path, monkeypatch):
    draw, write = random.Random(most), os.write

    def short(descriptor: int, data: Any) -> int:
        return write(descriptor, memoryview(data)[: 4096 if most == 4096 else draw.randint(1, most)])

    saved = record(7, size=16, tokenizer=None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        home = ckpt.save(saved, tmp_path, layout=layout)
    assert same_or_said(ckpt.load(home, verify=True), saved)
    assert ckpt.load(home).notes == []
    assert ckpt.verify(home) == []


def refusing_direct(action: Callable[..., Any], *, by: str) -> Callable[..., Any]:
    """os.open that refuses O_DIRECT, before or after it has made the file; or os.write on a descriptor that has it."""

    def call(first: Any, second: Any, *rest: Any, **named: Any) -> Any:
        direct = fcntl.fcntl(first, fcntl.F_GETFL) if by == "write" else second
        if not direct & os.O_DIRECT:
            return action(first, second, *rest, **named)
        if by == "open, late":
            os.close(action(first, second, *rest))
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    return call


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system always writes through its page cache")
@pytest.mark.parametrize("by", ["open", "open, late", "write"])
def test_a_disk_that_cannot_be_written_past_the_cache_is_written_through_it(by, layout, tmp_path, monkeypatch):
    name = by.split(",")[0]
    with monkeypatch.context() as patch:
        patch.setattr(writing, "CHUNK", 2**14)
        patch.setattr(os, name, refusing_direct(getattr(os, name), by=by))
        ckpt.save(of_step(4), tmp_path, layout=layout)
    assert [one.step for one in whole(tmp_path)] == [4]


def test_a_folder_that_may_not_be_written_is_an_error_and_harms_nothing(layout):
    new = of_step(4)
    with walkable_folder() as outer:
        folder = outer / "checkpoints"
        make_before(folder, layout)
        (folder / FOLDER_LOCK).chmod(0o666)
        before = sorted(visible(folder))
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            place.chmod(0o555)
        answer = in_child(lambda: str(ckpt.save(new, folder, layout=layout)), as_nobody=True)
        assert answer.startswith("PermissionError: [Errno 13] Permission denied: ")
        assert str(folder) in answer
        assert sorted(visible(folder)) == before
        whole(folder)
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            place.chmod(0o755)


def test_without_hard_links_and_without_room_for_a_copy_the_best_before_stays(layout, tmp_path, monkeypatch):
    make_before(tmp_path, layout)
    saved = ckpt.save(of_step(4), tmp_path, layout=layout)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refused)
        with fault(3, errno.ENOSPC), pytest.raises(OSError, match="No space left") as caught:
            ckpt.keep_best(of_step(4), tmp_path, saved=saved, layout=layout)
    told(caught.value, tmp_path, errno.ENOSPC)
    assert steps_of(whole(tmp_path), best=True) == [2]
    next_save_clears_up(tmp_path, layout, 7)


def test_a_damaged_file_is_never_written_anew_with_a_checksum_that_agrees(tmp_path):
    """When only its weights are to stay, a single file is copied; its damage must not become its content."""
    path = ckpt.save(of_step(1), tmp_path)
    flipped(path, path.read_bytes().index(next(iter(of_step(1).model_state.values())).numpy().tobytes()) + 5)
    retention.strip(path)
    assert visible(tmp_path) == [path]
    assert ckpt.verify(path) != []


def test_the_folders_that_a_save_makes_are_as_durable_as_what_is_in_them(layout, tmp_path, monkeypatch):
    """A power cut forgets a new folder whose name was never synced, with everything in it."""
    synced, fsync = [], os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    home = ckpt.save(of_step(1), tmp_path, layout=layout, best_only=True)
    assert home.parent.name == "best"
    places = [place for place in home.parents if place.is_relative_to(tmp_path)]
    assert set(places) <= set(synced)
    assert synced[-1] == home.parent  # in which its own name appears last


# ---------------------------------------------------------------------------------------------------------------------
# Files that are cut.


def regions(path: Path) -> set[int]:
    """Where something begins or ends in a file: its members, tensors and headers."""
    size = path.stat().st_size
    return {each for each in {0, 1, 4, 8, 64, size // 2, size - 22, size - 1, *parts_of(path)} if 0 <= each < size}


def parts_of(path: Path) -> Iterator[int]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            ends = [archive.start_dir]
            for member in archive.infolist():
                with open(path, "rb") as file:
                    file.seek(member.header_offset + 26)
                    start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                ends += [member.header_offset, start, start + member.file_size]
    elif path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        header = json.loads(path.read_bytes()[8 : 8 + length])
        offsets = (one["data_offsets"] for name, one in header.items() if name != "__metadata__")
        ends = [8 + length, *(8 + length + end for pair in offsets for end in pair)]
    else:
        ends = []
    yield from (end + by for end in ends for by in (-1, 0, 1))


def test_a_file_cut_anywhere_is_refused_and_the_checkpoint_before_is_taken(home, layout, tmp_path):
    whole_one = ckpt.load(home)
    older = ckpt.save(record(3, save_number=0), tmp_path / "older", layout=layout)
    for file in every_file(home):
        data = file.read_bytes()
        for size in sorted(regions(file)):
            file.write_bytes(data[:size])
            outcome = opened(home, verify=False)
            if file.suffix == ".json" and not isinstance(outcome, str):
                assert data[size:].isspace(), (file, size)  # the line break at the end
            else:
                assert isinstance(outcome, str), (file, size)
                assert str(file.parent) in outcome
                assert ckpt.verify(home) != []
        file.write_bytes(data)
    assert same_or_said(opened(home), whole_one)
    assert older.exists()


def test_a_truncated_latest_checkpoint_is_named_and_the_previous_is_taken(layout, tmp_path):
    older = ckpt.save(record(3), tmp_path, layout=layout)
    newest = ckpt.save(record(7), tmp_path, layout=layout)
    for file in every_file(newest):
        if file.name == "config.json" and layout == "directory":
            continue  # it is compared when it is opened: people may edit it
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
        path, notes = ckpt.resolve("latest", tmp_path)
        assert path == older
        assert notes[0].startswith("skipped: ")
        assert str(file.parent) in notes[0]
        file.write_bytes(data)
    assert ckpt.resolve("latest", tmp_path)[0] == newest


def test_a_file_that_has_grown_is_refused_or_is_the_same(home):
    whole_one = ckpt.load(home)
    for file in every_file(home):
        data = file.read_bytes()
        for tail in (b"\n", bytes(100), data[:4096], data):
            file.write_bytes(data + tail)
            assert same_or_said(opened(home), whole_one), (file, tail[:8])
        file.write_bytes(data)


# ---------------------------------------------------------------------------------------------------------------------
# Flipped bits.


def places_to_flip(path: Path) -> list[int]:
    """Around everything that begins or ends, and all over the file."""
    size = path.stat().st_size
    return sorted(regions(path) | {*range(3, size, 1 + size // 60)})


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(home):
    """verify finds every change that a load would read differently; in config.json, which may be edited, the load
    reports the change.
    """
    whole_one, found = ckpt.load(home), 0
    for file in every_file(home):
        data = file.read_bytes()
        for place in places_to_flip(file):
            flipped(file, place, place % 8)
            assert same_or_said(opened(home, verify=True), whole_one), (file, place)
            problems = ckpt.verify(home)
            assert all(problem.isprintable() for problem in problems)
            assert problems or same_or_said(opened(home, verify=False), whole_one), (file, place)
            found += bool(problems)
            file.write_bytes(data)
    assert found > 50


def test_control_a_load_that_does_not_verify_takes_flipped_weights(layout, tmp_path, monkeypatch):
    """Negative control for the comparison above: it sees one bit,
    and beyond the beginning of a file only verify keeps it out.
    """
    for module in (writing, manifest):
        monkeypatch.setattr(module, "BEGINNING", 8)
    home = ckpt.save(record(7, **FULL), tmp_path, layout=layout)
    whole_one = ckpt.load(home)
    wanted = next(iter(whole_one.model_state.values())).numpy().tobytes()
    (file,) = (file for file in every_file(home) if wanted in file.read_bytes())
    whole_one.model_state = {name: tensor.clone() for name, tensor in whole_one.model_state.items()}
    flipped(file, file.read_bytes().index(wanted) + 2)
    assert not same_or_said(opened(home, verify=False), whole_one)
    assert isinstance(opened(home, verify=True), str)
    assert any(str(file) in problem for problem in ckpt.verify(home))


# ---------------------------------------------------------------------------------------------------------------------
# Something else where a file should be.


def linked_outside(file: Path, outside: Path) -> None:
    shutil.copy(file, outside)
    file.unlink()
    file.symlink_to(outside)


INSTEAD: dict[str, Callable[[Path, Path], None]] = {
    "nothing": lambda file, _: file.unlink(),
    "pipe": lambda file, _: (file.unlink(), os.mkfifo(file))[0],
    "folder": lambda file, _: (file.unlink(), file.mkdir())[0],
    "dangling link": lambda file, _: (file.unlink(), file.symlink_to("nowhere"))[0],
    "looping link": lambda file, _: (file.unlink(), file.symlink_to(file.name))[0],
    "link to a device": lambda file, _: (file.unlink(), file.symlink_to("/dev/zero"))[0],
    "link to a pipe": lambda file, outside: (file.unlink(), os.mkfifo(outside), file.symlink_to(outside))[0],
    "link out of the folder": linked_outside,
}


def asked_in_every_way(home: Path, file: Path, original: Checkpoint) -> None:
    folder = home.parent
    assert same_or_said(opened(home), original)
    with contextlib.suppress(ckpt.CheckpointError):
        assert same_or_said(opened(ckpt.resolve(str(file), folder)[0]), original)
    assert all(problem.isprintable() for problem in ckpt.verify(home))
    for one in ckpt.find(folder):
        assert one.problem is None or one.problem.isprintable()
    for wish in ("latest", "best", str(folder), f"{folder}/*"):
        with contextlib.suppress(ckpt.CheckpointError):
            ckpt.resolve(wish, folder)


@pytest.mark.parametrize("kind", INSTEAD)
def test_another_kind_of_file_never_hangs_and_never_misleads(kind, layout, tmp_path):
    saved = record(7, **FULL)
    first = ckpt.save(saved, tmp_path / "checkpoints", layout=layout)
    names = [file.relative_to(first.parent) for file in every_file(first)]
    for number, name in enumerate(names):
        place = tmp_path / str(number)  # copied, so that nothing is remembered of it
        shutil.copytree(first.parent, place)
        INSTEAD[kind](place / name, tmp_path / f"outside-{number}")
        with limited():  # opening a pipe that nobody writes to waits for ever
            asked_in_every_way(place / first.name, place / name, saved)


def test_what_is_linked_into_a_folder_is_never_pruned(layout, tmp_path):
    """It is another place's; through a link its optimizer's file would go there."""
    outside = ckpt.save(of_step(1), tmp_path / "outside", layout=layout)
    folder = tmp_path / "checkpoints"
    newest = [ckpt.save(of_step(step), folder, layout=layout) for step in (4, 5)][-1]
    for file in files_of(outside):
        (newest.parent / file.name).symlink_to(file)
    before = sorted(visible(tmp_path / "outside"))
    ckpt.prune(folder, run_id="one", keep_last=1, keep_every=1, latest_valid=newest)
    assert sorted(visible(tmp_path / "outside")) == before
    assert all((newest.parent / file.name).is_symlink() for file in files_of(outside))
    assert [one.resumable for one in scan(folder) if one.step == 4] == [False]
    whole(tmp_path / "outside")


# ---------------------------------------------------------------------------------------------------------------------
# Clocks.


def test_a_clock_set_back_changes_neither_the_latest_nor_any_file(layout, tmp_path, monkeypatch):
    paths = []
    for step, hours in enumerate((0, -1, -1, -100, 0), start=1):
        set_clock(monkeypatch, NOON + datetime.timedelta(hours=hours))
        paths.append(ckpt.save(of_step(step), tmp_path, layout=layout))
        newest = ckpt.latest(ckpt.find(tmp_path))
        assert newest is not None
        assert newest.path == paths[-1]
    assert len(set(paths)) == 5
    assert steps_of(whole(tmp_path), best=False) == [1, 2, 3, 4, 5]
    assert not any(in_best(one) for one in scan(tmp_path))
