"""The save at the end of a run: on a full disk, in a folder that is gone, and what is reported then."""

import contextlib
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from drive import at_step, newest, small_text, tensor_bytes, train
from test_last_step import stop, trained

from milepost import ckpt, locks, run_checkpoints
from milepost.runtime.progress import read_metrics


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(folder)[0] == 0
    return folder


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder of checkpoints on a file system of two megabytes, of which other files can take what is free."""
    disk = tmp_path / "checkpoints"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def await_save() -> None:
    """Wait for the save in the background, which a slow machine would let run into what comes next."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":
            thread.join()


def fill(disk: Path) -> None:
    await_save()
    (disk / ".filler").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 20_000)))


class Pauses:
    """Stands in for time.sleep: counts the pauses, and makes room in the n-th."""

    def __init__(self, disk: Path, *, room_in: int) -> None:
        self.disk, self.room_in, self.seconds = disk, room_in, []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if len(self.seconds) == self.room_in:
            (self.disk / ".filler").unlink()


@pytest.mark.parametrize("background", ["true", "false"])
def test_the_last_save_is_tried_again_until_there_is_room(background, small_disk, uninterrupted, tmp_path, monkeypatch):
    pauses = Pauses(small_disk, room_in=3)
    monkeypatch.setattr(run_checkpoints.time, "sleep", pauses)
    code, said = trained(tmp_path, {7: lambda: fill(small_disk)}, CHECKPOINT_ASYNC=background)
    assert code == 0, said
    assert pauses.seconds == list(run_checkpoints.PAUSES[:3])
    assert said.count("step 8 could not be saved") == 3
    assert "training continues" not in said  # it was the last step
    assert tensor_bytes(newest(tmp_path)) == tensor_bytes(newest(uninterrupted))
    best = [each.step for each in ckpt.finding.scan(small_disk) if each.path.parent.name == "best"]
    assert best == [8]


def test_the_attempts_end_after_some_minutes(small_disk, tmp_path, monkeypatch):
    pauses = Pauses(small_disk, room_in=0)
    monkeypatch.setattr(run_checkpoints.time, "sleep", pauses)
    code, said = trained(tmp_path, {7: lambda: fill(small_disk)}, CHECKPOINT_ASYNC="false")
    assert code == 5, said
    assert 120 <= sum(pauses.seconds) == sum(run_checkpoints.PAUSES) <= 600
    assert newest(tmp_path).step == 4


def test_a_save_in_between_is_not_waited_for(small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(run_checkpoints.time, "sleep", pauses := Pauses(small_disk, room_in=0))
    actions = {3: lambda: fill(small_disk), 6: (small_disk / ".filler").unlink}
    code, said = trained(tmp_path, actions, CHECKPOINT_ASYNC="false")
    assert (code, pauses.seconds) == (0, []), said
    assert [each.step for each in ckpt.find(small_disk)] == [8]


# ---------------------------------------------------------------------------------------------------------------------
# A file system that is unmounted: its path then leads to the disk below.


@pytest.fixture
def mounting(tmp_path, small_disk) -> Iterator[Callable[[], None]]:
    """Return a function that mounts a disk of its own at `small_disk`/place, which is then an empty folder again."""
    (tmp_path / "disk").mkdir()

    def mount() -> None:
        subprocess.run(["mount", "--bind", str(tmp_path / "disk"), str(small_disk / "place")], check=True)

    (small_disk / "place").mkdir()
    mount()
    yield mount
    subprocess.run(["umount", "-l", str(small_disk / "place")], capture_output=True, check=False)


def unmount(place: Path) -> None:
    await_save()
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("background", ["true", "false"])
def test_nothing_is_written_below_a_file_system_that_was_unmounted(
    background, mounting, small_disk, uninterrupted, tmp_path, monkeypatch
):
    below: list[list[Path]] = []

    def mount_again(_: float) -> None:
        below.append([*(small_disk / "place").rglob("*")])
        if len(below) == 2:
            mounting()

    monkeypatch.setattr(run_checkpoints.time, "sleep", mount_again)
    places = {name: str(small_disk / "place" / name) for name in ("CHECKPOINT_DIR", "RUNS_DIR")}
    actions = {6: lambda: unmount(small_disk / "place")}
    code, said = trained(tmp_path, actions, CHECKPOINT_ASYNC=background, **places)
    assert code == 0, said
    assert below == [[], []]
    assert said.count("no file system is mounted here any more") == 2
    last = ckpt.latest(ckpt.find(tmp_path / "disk" / "CHECKPOINT_DIR"))
    assert last is not None
    assert tensor_bytes(ckpt.load(last.path, verify=True)) == tensor_bytes(newest(uninterrupted))
    (path,) = (tmp_path / "disk" / "RUNS_DIR").glob("*/metrics.jsonl")
    assert [line["step"] for line in read_metrics(path) if line["split"] == "train"] == [*range(1, 9)]


def test_control_without_a_look_at_the_mount_the_last_step_is_hidden_below_it(
    mounting, small_disk, tmp_path, monkeypatch
):
    monkeypatch.setattr(locks, "check_mounted", lambda _: None)
    code, said = trained(
        tmp_path, {6: lambda: unmount(small_disk / "place")}, CHECKPOINT_DIR=str(small_disk / "place" / "checkpoints")
    )
    assert code == 0, said
    assert {each.step for each in ckpt.find(small_disk / "place" / "checkpoints")} == {8}
    mounting()
    assert {each.step for each in ckpt.find(tmp_path / "disk" / "checkpoints")} == {4}


@pytest.mark.parametrize("name", ["checkpoints", "link"])
def test_a_fallback_folder_that_is_the_first_one_is_refused(name, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "link").symlink_to("checkpoints")
    small_text(tmp_path)
    code, said = train(tmp_path, CHECKPOINT_FALLBACK_DIR=str(tmp_path / name))
    assert code == 2
    assert f"CHECKPOINT_FALLBACK_DIR={tmp_path / name} is CHECKPOINT_DIR: set a folder on another disk" in said
    assert ckpt.find(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("stopped", [False, True])
def test_the_last_step_goes_to_the_fallback_folder_and_resumes_from_there(
    stopped,
    small_disk,
    uninterrupted,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(run_checkpoints.time, "sleep", pauses := Pauses(small_disk, room_in=0))
    fallback = {"CHECKPOINT_FALLBACK_DIR": str(tmp_path / "fallback")}
    actions = {6: lambda: fill(small_disk)} | ({7: stop} if stopped else {})
    code, said = trained(tmp_path, actions, CHECKPOINT_KEEP_BEST="0", **fallback)
    (saved,) = ckpt.find(tmp_path / "fallback")
    assert (code, pauses.seconds) == (130 if stopped else 0, []), said
    assert saved.step == (7 if stopped else 8)
    assert str(saved.path) in said.splitlines()[-1]
    # In a mirror, which orders both by their numbers, it is the newest.
    assert saved.save_order > max(each.save_order for each in ckpt.find(small_disk))
    (small_disk / ".filler").unlink()
    code, said = train(tmp_path, RESUME="auto", **fallback)
    assert code == 0, said
    if stopped:
        assert newest(tmp_path).run_id == saved.run_id
        assert tensor_bytes(newest(tmp_path)) == tensor_bytes(newest(uninterrupted))
    else:
        assert "is finished" in said


def test_what_a_run_saves_after_an_earlier_step_is_newer_than_its_fallback(small_disk, tmp_path, capsys):
    fallback = {"CHECKPOINT_FALLBACK_DIR": str(tmp_path / "fallback"), "CHECKPOINT_KEEP_BEST": "0"}
    assert trained(tmp_path, {6: lambda: fill(small_disk), 7: stop}, **fallback)[0] == 130
    assert train(tmp_path, RESUME="auto", **fallback)[0] == 0
    assert [each.step for each in ckpt.find(tmp_path / "fallback")] == [7, 8]
    (small_disk / ".filler").unlink()
    assert trained(tmp_path, {5: stop}, RESUME="auto", RESUME_STEP="4", **fallback)[0] == 130
    code, said = train(tmp_path, RESUME="auto", **fallback)
    assert code == 0, said
    assert "step           restored  5; 3 more, to 8" in capsys.readouterr().out


def test_a_fallback_folder_is_resumed_from_though_the_mirror_has_its_checkpoint_too(small_disk, tmp_path, capsys):
    folders = {
        "CHECKPOINT_FALLBACK_DIR": str(tmp_path / "fallback"),
        "CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}",
    }
    assert trained(tmp_path, {6: lambda: fill(small_disk), 7: stop}, CHECKPOINT_KEEP_BEST="0", **folders)[0] == 130
    code, said = train(tmp_path, RESUME="auto", **folders | {"CHECKPOINT_FALLBACK_DIR": None})
    assert code == 1  # the control: the full disk does not take it from the mirror
    assert "step 7 could not be brought from the mirror (the disk is full: about " in said
    code, said = train(tmp_path, RESUME="auto", **folders)
    assert code == 0, said
    assert "from the mirror" not in said
    assert "step           restored  7; 1 more, to 8" in capsys.readouterr().out


def test_a_disk_that_holds_what_the_policy_keeps_does_so_after_a_resume(small_disk, tmp_path):
    policy = {"CHECKPOINT_INTERVAL": "1", "CHECKPOINT_KEEP_LAST": "9", "TRAINING_STEPS": "24"}
    assert trained(tmp_path, {13: stop}, **policy)[0] == 130
    code, said = train(tmp_path, RESUME="auto", **policy)
    assert code == 0, said
    assert [each.step for each in ckpt.find(small_disk)][-9:] == list(range(16, 25))
    code, said = train(tmp_path, SEED="2", **policy)  # the control: of another run nothing goes
    assert code == 2
    assert "CHECKPOINT_KEEP_LAST=9: 11 checkpoints of " in said


def test_a_fallback_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "fallback").write_text("a file")
    code, said = train(tmp_path, CHECKPOINT_FALLBACK_DIR=str(tmp_path / "fallback"))
    assert code == 2
    assert f"CHECKPOINT_FALLBACK_DIR: {tmp_path / 'fallback'}" in said


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_folder_of_checkpoints_that_cannot_be_written_at_the_end_is_a_failed_save(background, tmp_path):
    def replace_by_a_file() -> None:
        place = tmp_path / "checkpoints"
        while place.is_dir():  # a save in the background may still write there, and make it anew
            place.rename(tempfile.mkdtemp(dir=tmp_path))
            with contextlib.suppress(IsADirectoryError):
                place.write_text("a file")

    code, said = trained(tmp_path, {6: replace_by_a_file}, CHECKPOINT_ASYNC=background)
    assert code == 5, said
    assert "step 8 could not be saved" in said
    assert "done: 8 steps" in said


def test_a_deleted_folder_of_runs_is_reported_and_written_again(tmp_path):
    code, said = trained(tmp_path, {6: lambda: shutil.rmtree(tmp_path / "runs")})
    assert code == 0, said
    (path,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    assert [line["step"] for line in read_metrics(path)] == [6, 7, 8, 8]
    assert said.count("deleted while training") == 1
    assert str(path) in said


def test_control_a_folder_of_runs_that_stays_is_not_reported(tmp_path):
    assert "deleted while training" not in train(tmp_path)[1]


def test_the_hint_names_the_checkpoint_and_every_folder(tmp_path):
    code, said = trained(tmp_path, {6: stop})
    assert code == 130
    words = dict(word.split("=", 1) for word in shlex.split(said.splitlines()[-1].rpartition(": ")[2]) if "=" in word)
    expected = {
        "RESUME": at_step(tmp_path, 6),
        "CHECKPOINT_DIR": tmp_path / "checkpoints",
        "RUNS_DIR": tmp_path / "runs",
    }
    assert {name: Path(words[name]) for name in expected} == expected


def test_the_hint_of_one_run_does_not_resume_another_in_its_folder(tmp_path):
    """The other run is newer, and RESUME=auto would take it."""
    assert trained(tmp_path, {6: stop})[0] == 130
    first = at_step(tmp_path, 6)
    run_id = ckpt.load(first).run_id
    code, said = trained(tmp_path, {3: stop}, SEED="2")
    assert code == 130, said
    words = dict(word.split("=", 1) for word in shlex.split(said.splitlines()[-1].rpartition(": ")[2]) if "=" in word)
    assert Path(words["RESUME"]) != first
    code, said = train(tmp_path, RESUME=str(first), SEED=None)
    assert code == 0, said
    assert newest(tmp_path).run_id == run_id
