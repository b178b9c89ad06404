"""The same on real mounted file systems, by whole runs: train, lose the last checkpoint, resume, open and list.

They need /dev/fuse, libfuse and mfusepy: `make test-filesystems`.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from drive import ROOT, command, small_text, tensor_bytes
from lives import figures, live, said_by, undisturbed
from mounts import MOUNTS, await_that, missing, ssh_server, sshfs_of, unmount
from picky import mounted
from records import record
from work import HANGING

from milepost import ckpt, files
from milepost.runtime.progress import read_metrics
from milepost.text.corpus import open_corpus
from milepost.text.scan import scan
from milepost.text.token_files import prepare
from milepost.text.tokenization import ByteTokenizer

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
    "case,chmod",  # as WSL shows a disk of Windows
    "rename,append,lock,statfs",
]
UNTOLD = {"late", "stale", "case", "chmod"}  # nothing is done differently
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
        assert ("lacks something" in said) == bool(set(lacking) - UNTOLD)
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


ALONE = ["link", "chmod", "stale", *(each for each in LACKS if "," not in each)]
REST = [
    (lack, layout)
    for lack in ALONE
    for layout in ckpt.WRITERS
    if layout != "sharded" and (lack, layout) not in IN_LAYOUTS
]


@pytest.mark.soak
@pytest.mark.parametrize(("lacking", "layout"), REST)
def test_every_lack_in_every_layout(lacking, layout, tmp_path):
    a_life_on(tmp_path / "fs", layout, lacking)


# Pairs of lacks, drawn once: each lack and each layout is in one.
PAIRS = [
    ("append,rename-dir", "directory"),
    ("lock,rename", "separated"),
    ("fsync,append", "stepfiles"),
    ("statfs,lock", "consolidated"),
    ("rename-over,append", "huggingface"),
    ("fsync-dir,late", "unified"),
    ("rename,rename-over", "directory"),
]


@pytest.mark.soak
@pytest.mark.parametrize(("lacking", "layout"), PAIRS)
def test_a_life_without_two_things(lacking, layout, tmp_path):
    a_life_on(tmp_path / "fs", layout, *lacking.split(","))


def test_a_folder_that_goes_away_and_comes_back_costs_neither_a_line_nor_the_last_step(tmp_path):
    folder = tmp_path / "fs"
    with mounted(folder, "gone") as place:
        gone = folder / "back" / ".gone"

        def leave() -> None:
            until = time.monotonic() + HANGING
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


READ = """
import sys
from pathlib import Path
from milepost import ckpt
from milepost.ckpt.record import named_tensors
back, path = map(Path, sys.argv[1:])
record = ckpt.load(path)
(back / ".unread").write_text("1400000 1500000")
kind = "none"
try:
    record = ckpt.load(path)
    sum(float(tensor.double().sum()) for tensor in named_tensors(record).values())
except ckpt.CheckpointError as error:
    kind = error.kind
print(kind)
"""


@pytest.mark.parametrize("layout", ckpt.WRITERS)
def test_mapped_bytes_that_cannot_be_read_are_an_error_and_not_the_end_of_the_process(layout, tmp_path):
    with mounted(tmp_path / "fs", "unread") as place:
        path = ckpt.save(
            record(1, size=700), place, layout=layout
        )  # 6 MB, of which a load without `verify` reads no such byte
        words = [sys.executable, "-c", READ, str(tmp_path / "fs" / "back"), str(path)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # -7: SIGBUS
    assert done.stdout.strip() == "unreachable"


# ---------------------------------------------------------------------------------------------------------------------
# Debian's own.


def needs(name: str) -> None:
    if packages := missing(name):
        pytest.skip(f"needs {packages}")


ON = [("rclone", "directory"), ("rclone, writes", "directory"), ("sshfs", "unified")]
LONGER = [("rclone, writes", "separated"), ("exfat", "unified"), ("ntfs-3g", "directory"), ("overlay", "unified")]
LONGER += [("fusefat", "unified"), ("fusefat", "directory")]
ON += [pytest.param(*each, marks=pytest.mark.soak) for each in LONGER]


@pytest.mark.parametrize(("name", "layout"), ON)
def test_a_run_that_is_killed_there_ends_as_on_an_ordinary_disk(name, layout, tmp_path):
    needs(name)
    with MOUNTS[name](tmp_path / "fs") as place:
        live(tmp_path, place, layout)


def test_an_sshfs_that_dies_and_is_mounted_again_costs_neither_a_line_nor_the_last_step(tmp_path):
    needs("sshfs")
    own = tmp_path / "fs"
    with ssh_server(own) as port, contextlib.ExitStack() as second, contextlib.ExitStack() as first:
        place = first.enter_context(sshfs_of(own, port))

        def die_and_return() -> None:
            await_that(lambda: bool(list((own / "back" / "checkpoints").glob("*step0020*"))), lambda: "no save")
            os.kill(int((own / "pid").read_text()), signal.SIGKILL)
            time.sleep(2)
            unmount(place)
            second.enter_context(sshfs_of(own, port))

        away = threading.Thread(target=die_and_return)
        away.start()
        said = command(
            "training.py", own, CHECKPOINT_DIR=str(place / "checkpoints"), RUNS_DIR=str(place / "runs"),
            CHECKPOINT_INTERVAL="20", TRAINING_STEPS="400", TRAINING_DATA_SOURCE=str(small_text(tmp_path)),
            EVAL_INTERVAL="0", SAMPLE_INTERVAL="0",
        )  # fmt: skip
        away.join()
    assert said.returncode == 0, said.stderr
    assert "could not be written" in said.stderr  # the control: it was away
    assert lines_of(own) == list(range(1, 401))
    last = ckpt.latest(ckpt.find(own / "back" / "checkpoints"))
    assert last is not None
    assert last.step == 400
    assert ckpt.verify(last.path) == []


def fill_room(place: Path, filler: Path) -> None:
    """Leave room for what a run writes besides its checkpoints."""
    room = os.statvfs(place)
    (filler / "1").write_bytes(bytes(room.f_bavail * room.f_frsize - 100_000))


def fill_inodes(place: Path, filler: Path) -> None:
    """Leave the inodes that a run takes besides its checkpoints."""
    for number in range(os.statvfs(place).f_ffree - 12):
        (filler / str(number)).touch()


@pytest.mark.parametrize("fill", [fill_room, fill_inodes])
def test_a_disk_that_has_no_room_until_the_training_has_ended_gets_the_last_step(fill, tmp_path):
    expected = undisturbed("unified")
    with MOUNTS["small ext4"](tmp_path / "fs") as place:
        filler = place / "filler"
        filler.mkdir()
        fill(place, filler)

        def make_room() -> None:
            await_that(lambda: "trying again" in "".join(log.read_text() for log in place.rglob("training.log")), str)
            assert [path for path in (place / "checkpoints").iterdir() if path.name[0] != "."] == []  # the control
            shutil.rmtree(filler)

        later = threading.Thread(target=make_room)
        later.start()
        # With a policy the run would be refused at its start: its checkpoints do not fit.
        said = said_by("training.py", tmp_path, place, CHECKPOINT_KEEP_LAST="0", CHECKPOINT_KEEP_BEST="0")
        later.join()
        assert "could not be saved" in said
        (last,) = ckpt.find(place / "checkpoints")
        assert (tensor_bytes(ckpt.load(last.path, verify=True)), figures(place)) == expected
    files.forget()


# ---------------------------------------------------------------------------------------------------------------------
# What is no checkpoint, and names.


@pytest.mark.parametrize("lacking", ["append", "rename", "rename-dir", "append,rename,lock"])
def test_token_files_are_built_and_built_again_without(lacking, tmp_path):
    with mounted(tmp_path / "fs", *lacking.split(",")) as place:
        files.forget()
        corpus = open_corpus(str(small_text(tmp_path)), data_dir=tmp_path)

        def built() -> list[bytes]:
            split = prepare(corpus, scan(corpus), ByteTokenizer(), validation_fraction=0.1, cache_dir=place / "tokens")
            return [np.asarray(part).tobytes() for part in (split.train, split.validation)]

        expected = built()
        (folder,) = (place / "tokens").iterdir()
        next(folder.glob("*.npy")).unlink()  # as a killed process may leave it
        assert built() == expected
        assert len(expected[0]) > 1000
        assert [path.name for path in (place / "tokens").iterdir()] == [folder.name]
    files.forget()


def test_names_that_differ_in_case_are_one_name_there_and_no_checkpoint_is_lost(tmp_path):
    with mounted(tmp_path / "fs", "case") as place:
        files.forget()
        (place / "Name").touch()
        assert (place / "nAME").exists()  # the control
        (place / "Name").unlink()
        paths = [ckpt.save(record(1), place, prefix=prefix) for prefix in ("Check", "check", "CHECK")]
        assert len({path.name.casefold() for path in paths}) == 3
        assert [each.problem for each in ckpt.find(place)] == [None] * 3
    files.forget()
