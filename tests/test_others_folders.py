"""Folders from other people: links in them never lead to writes or deletions outside, and nothing blocks."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from drive import TINY, command, train
from records import snapshot
from script import call, script

from milepost import ckpt
from milepost.ckpt.finding import scan

QUICK = {"TRAINING_STEPS": "6", "CHECKPOINT_INTERVAL": "2", "SAMPLE_INTERVAL": "2", "EVAL_INTERVAL": "2"}
NOTHING = dict.fromkeys(TINY)


LAYOUTS = ("unified", "stepfiles")


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(request, tmp_path_factory):
    """A run with checkpoints at 2, 4 and 6, in a layout without and in one with run folders."""
    folder = tmp_path_factory.mktemp(request.param)
    assert train(folder, CHECKPOINT_LAYOUT=request.param, **QUICK)[0] == 0
    return folder


@pytest.fixture
def theirs(trained, tmp_path):
    """The run as a kill after step 4 left it, with valuable files outside its folders."""
    folder = tmp_path / "theirs"
    shutil.copytree(trained, folder)
    for one in scan(folder / "checkpoints"):
        if one.step == 6:
            for file in ckpt.layouts.known_layout(one.path).files(one.path):
                file.unlink()
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    for name in ("file", "folder/a.txt", "folder/events.out.tfevents.1"):
        (outside / name).write_text("of value")
    return folder


def run_id(folder: Path) -> str:
    (path,) = (folder / "runs").iterdir()
    return path.name


def put(place: Path, make: Callable[[Path], object]) -> None:
    """Replace whatever is there."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    make(place)


FILES = [
    "checkpoints/.lock", "checkpoints/.owner", "checkpoints/.run-{run}.lock", "checkpoints/.run-{run}.owner",
    "runs/{run}/.lock", "runs/{run}/.owner", "runs/{run}/.run-{run}.lock", "runs/{run}/.run-{run}.owner",
    "runs/{run}/metrics.jsonl", "runs/{run}/training.log", "runs/{run}/config.env", "runs/{run}/run.json",
    "runs/{run}/samples/step000006.txt",
]  # fmt: skip
FOLDERS = ["checkpoints/best", "checkpoints/{run}", "checkpoints/{run}/best", "runs/{run}", "runs/{run}/samples"]


KINDS = ("link", "link to nothing", "pipe")
# Every name with every kind, by turns in a run of either layout: no layout changes what stands at these places.
PLACED = [
    (LAYOUTS[(row + column) % 2], name, kind) for row, name in enumerate(FILES) for column, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("trained", "name", "kind"), PLACED, indirect=["trained"])
def test_links_and_pipes_in_place_of_run_files_are_never_written_through(name, kind, theirs, tmp_path):
    """RESUME=auto resumes, or refuses with an error that names the path;
    it neither blocks nor changes files outside.
    """
    place = theirs / name.format(run=run_id(theirs))
    makers = {
        "link": lambda path: path.symlink_to(tmp_path / "outside" / "file"),
        "link to nothing": lambda path: path.symlink_to(tmp_path / "outside" / "new"),
        "pipe": os.mkfifo,
    }
    put(place, makers[kind])
    before = snapshot(tmp_path / "outside")
    code, said = train(theirs, RESUME="auto", **NOTHING | {"DEVICE": "cpu"})
    assert snapshot(tmp_path / "outside") == before
    assert code in (0, 2)
    assert code == 0 or str(place) in said.splitlines()[-1], said
    assert ckpt.load(at_step_anywhere(theirs, 4), verify=True).step == 4


def at_step_anywhere(folder: Path, step: int) -> Path:
    return next(one.path for one in ckpt.find(folder / "checkpoints") if one.step == step)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_link_in_place_of_a_run_folder_is_refused_by_name(name, theirs, tmp_path):
    place = theirs / name.format(run=run_id(theirs))
    if place.is_dir():  # what the run has there is where the link leads
        shutil.move(place, tmp_path / "outside" / "moved")
        put(place, lambda path: path.symlink_to(tmp_path / "outside" / "moved"))
    else:
        put(place, lambda path: path.symlink_to(tmp_path / "outside" / "folder"))
    before = snapshot(tmp_path / "outside")
    code, said = train(theirs, RESUME="auto", **NOTHING | {"DEVICE": "cpu"})
    if code == 0:  # the run's own checkpoints were in that folder, and a new run began beside it
        assert "this run starts fresh" in said
    else:
        assert code == 2
        assert str(place) in said.splitlines()[-1], said
    assert snapshot(tmp_path / "outside") == before


@pytest.mark.exchange
def test_a_tensorboard_folder_that_is_a_link_loses_no_events(theirs, tmp_path):
    place = theirs / "runs" / run_id(theirs) / "tensorboard"
    place.symlink_to(tmp_path / "outside" / "folder")
    before = snapshot(tmp_path / "outside")
    code, said = train(theirs, RESUME="auto", TRACKER="tensorboard", **NOTHING | {"DEVICE": "cpu"})
    assert (code, str(place) in said) == (2, True)
    assert snapshot(tmp_path / "outside") == before


def test_links_set_by_the_user_are_followed(theirs, tmp_path):
    """Control: CHECKPOINT_DIR, RUNS_DIR and the folder above them may be links."""
    (tmp_path / "above").symlink_to(theirs)
    for name in ("checkpoints", "runs"):
        (tmp_path / name).symlink_to(tmp_path / "above" / name)
    places = {"CHECKPOINT_DIR": str(tmp_path / "checkpoints"), "RUNS_DIR": str(tmp_path / "runs")}
    code, said = train(theirs, RESUME="auto", **NOTHING | places | {"DEVICE": "cpu"})
    assert code == 0, said
    assert max(one.step for one in ckpt.find(theirs / "checkpoints")) == 6


def test_a_run_folder_that_is_a_link_is_not_pruned(theirs, tmp_path):
    """Nor listed: listed checkpoints may be deleted."""
    moved = tmp_path / "outside" / "checkpoints"
    shutil.move(theirs / "checkpoints", moved)
    (theirs / "checkpoints").mkdir()
    (theirs / "checkpoints" / "linked").symlink_to(moved)
    before = snapshot(tmp_path / "outside")
    said = call(script("prune_checkpoints"), theirs, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert said.code in (0, 3)
    assert snapshot(tmp_path / "outside") == before


def test_a_linked_lock_is_not_emptied_by_any_script_that_locks(theirs, tmp_path):
    put(theirs / "checkpoints" / ".lock", lambda path: path.symlink_to(tmp_path / "outside" / "file"))
    before = snapshot(tmp_path / "outside")
    source = at_step_anywhere(theirs, 4)
    for name, changes in {
        "prune_checkpoints": {"CHECKPOINT_KEEP_LAST": "1", "DRY_RUN": "false"},
        "convert_checkpoint": {"CHECKPOINT_PATH": source, "CHECKPOINT_LAYOUT": "directory"},
    }.items():
        said = call(script(name), theirs, **changes)
        assert said.code == (2 if name == "convert_checkpoint" else 1)  # the one blames its OUTPUT
        assert str(theirs / "checkpoints" / ".lock") in said.err
    assert snapshot(tmp_path / "outside") == before


def test_pipes_in_place_of_checkpoints_do_not_block(theirs):
    """Listing, resuming and opening by name, in a process that a time limit would end."""
    checkpoints = theirs / "checkpoints"
    for name in (
        "checkpoint_a_b_step0009_11262026_120000.pt",
        "x-model.pt",
        "x-optimizer.pt",
        "y.safetensors",
        "y_state.json",
        "z.ckpt",
        ".base-other.json",
    ):
        os.mkfifo(checkpoints / name)
    (checkpoints / "pair").mkdir()
    for name in ("config.json", "model.pt", "manifest.json", "model.safetensors", "tensors.json", ".metadata"):
        os.mkfifo(checkpoints / "pair" / name)
    done = command("scripts/list_checkpoints.py", theirs, **NOTHING)
    assert done.returncode in (0, 3), done.stderr
    done = command("training.py", theirs, RESUME="auto", **NOTHING | {"DEVICE": "cpu"})
    assert done.returncode == 0, done.stderr
    asked = {"CHECKPOINT_KEEP_LAST": "1", "DRY_RUN": "false"}
    done = command("scripts/prune_checkpoints.py", theirs, **NOTHING | asked)
    assert done.returncode == 0, done.stderr
    assert [found.step for found in ckpt.find(checkpoints) if found.run_id and found.path.parent.name != "best"] == [6]
    done = command("scripts/load_checkpoint.py", theirs, CHECKPOINT_PATH=str(checkpoints / "z.ckpt"), **NOTHING)
    assert done.returncode == 3


def test_a_conversion_that_fails_leaves_what_another_process_put_into_the_new_folder(theirs, tmp_path, monkeypatch):
    source, output = at_step_anywhere(theirs, 4), tmp_path / "new"
    writer = ckpt.WRITERS["directory"]

    def fails(*_):
        (output / "theirs").mkdir()
        (output / "theirs" / "kept").write_text("of value")
        raise OSError("no")

    monkeypatch.setattr(type(writer), "write", fails)
    with pytest.raises(OSError, match="no"):
        ckpt.convert(source, output, layout="directory")
    assert (output / "theirs" / "kept").read_text() == "of value"
