"""The same on real mounted file systems, by whole runs: train, lose the last checkpoint, resume, open and list.

They need /dev/fuse, libfuse and mfusepy: `make test-filesystems`.
"""

import shutil
import threading
import time
from pathlib import Path

import pytest
from drive import command, small_text
from picky import mounted

from milepost import ckpt
from milepost.runtime.progress import read_metrics

pytestmark = pytest.mark.mounted

LACKS = [
    "rename",
    "rename-dir",
    "rename-over",
    "append",
    "fsync",
    "fsync-dir",
    "lock",
    "lock-nosys",
    "statfs",
    "late",
    "link,chmod",
    "rename,append,lock,statfs",
]
NOISE = ("Traceback", "UserWarning", "[Errno")


def run(script: str, folder: Path, place: Path, **changes: str) -> str:
    """Run a script with its output on the mounted file system; return what it said."""
    small_text(folder)
    places = {"CHECKPOINT_DIR": str(place / "checkpoints"), "RUNS_DIR": str(place / "runs")}
    policy = {"CHECKPOINT_INTERVAL": "2", "CHECKPOINT_KEEP_LAST": "2", "N_LAYER": "1", "N_HEAD": "1"}
    done = command(script, folder, **(places | policy | changes))
    assert done.returncode == 0, done.stderr
    assert not any(word in done.stdout + done.stderr for word in NOISE), done.stderr
    return done.stdout + done.stderr


def lines_of(folder: Path) -> list[int]:
    (path,) = (folder / "back" / "runs").glob("*/metrics.jsonl")
    return [line["step"] for line in read_metrics(path) if line["split"] == "train"]


def a_life_on(folder: Path, layout: str, *lacking: str) -> None:
    with mounted(folder, *lacking) as place:
        said = run("training.py", folder, place, CHECKPOINT_LAYOUT=layout)
        assert ("lacks something" in said) == (lacking != ("late",))
        back = folder / "back" / "checkpoints"
        for path in [path for path in back.rglob("*0008*") if not path.name.startswith(".")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        time.sleep(2.5 if "late" in lacking else 0)  # the listing of the file system is two seconds late
        assert "restored" in run("training.py", folder, place, CHECKPOINT_LAYOUT=layout, RESUME="auto")
        time.sleep(2.5 if "late" in lacking else 0)
        for which in ("latest", "best"):
            run("scripts/load_checkpoint.py", folder, place, CHECKPOINT_PATH=which, MAX_NEW_TOKENS="3")
        run("scripts/list_checkpoints.py", folder, place)
    found = ckpt.find(back)
    ordinary = [one for one in found if one.path.parent.name != "best"]
    assert [one.problem for one in found if one.problem] == []
    assert 1 <= len(ordinary) <= 3
    assert ckpt.verify(ordinary[-1].path) == []
    assert list(back.rglob(".tmp-*")) == []
    assert lines_of(folder) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("lacking", LACKS)
def test_a_life_without(lacking, tmp_path):
    a_life_on(tmp_path / "fs", "unified", *lacking.split(","))


IN_LAYOUTS = [("rename", layout) for layout in ckpt.WRITERS if layout not in ("unified", "sharded")]


@pytest.mark.parametrize(
    ("lacking", "layout"), [*IN_LAYOUTS, ("rename-dir", "directory"), ("late", "directory"), ("late", "separated")]
)
def test_a_life_in_every_layout_without(lacking, layout, tmp_path):
    a_life_on(tmp_path / "fs", layout, lacking)


def test_a_folder_that_goes_away_and_comes_back_costs_neither_a_line_nor_the_last_step(tmp_path):
    folder = tmp_path / "fs"
    with mounted(folder, "gone") as place:
        gone = folder / "back" / ".gone"

        def leave() -> None:
            until = time.monotonic() + 60
            while time.monotonic() < until and not list((folder / "back" / "checkpoints").glob("*step0020*")):
                time.sleep(0.02)
            gone.touch()
            time.sleep(3)
            gone.unlink(missing_ok=True)

        away = threading.Thread(target=leave)
        away.start()
        said = command(
            "training.py", folder, CHECKPOINT_DIR=str(place / "checkpoints"), RUNS_DIR=str(place / "runs"),
            CHECKPOINT_INTERVAL="20", TRAINING_STEPS="400", TRAINING_DATA_SOURCE=str(small_text(tmp_path)),
            EVAL_INTERVAL="0", SAMPLE_INTERVAL="0",
        )  # fmt: skip
        away.join()
    assert said.returncode == 0, said.stderr
    assert "could not be written" in said.stderr  # the control: it was away
    assert lines_of(folder) == list(range(1, 401))
    last = ckpt.latest(ckpt.find(folder / "back" / "checkpoints"))
    assert last is not None
    assert last.step == 400
