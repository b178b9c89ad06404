"""The layout that processes write together: read by one, by PyTorch's own tools, after any of them died, and out of bad hands."""

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import shards
import torch
from folders import next_save_clears_up, steps_of, whole
from records import FULL, assert_same, bits, flipped, gpt2_record, record, refused, snapshot
from saver import of_step
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckpt
from ckpt import Checkpoint, sidecar
from ckpt.layouts import sharded
from ckpt.record import bytes_on_disk, named_tensors

SCRIPT = Path(shards.__file__)
SECONDS = 5.0  # in which a process must notice that the other is gone
LONG = 120


def saved(folder: Path, one: Checkpoint | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return ckpt.save(one or gpt2_record(7, **FULL), folder, layout="sharded")


def only(folder: Path) -> Path:
    """The one checkpoint there, nothing hidden beside it."""
    (path,) = (path for path in folder.iterdir() if path.name != ".lock")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes under torchrun left, and in {rank}.json what they saw."""
    place = tmp_path_factory.mktemp("together")
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
    ]  # fmt: skip
    done = subprocess.run(
        [*launch, str(SCRIPT), str(place)], capture_output=True, text=True, timeout=LONG, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout + done.stderr == ""  # neither torch nor we have anything to say about it
    return place


def seen(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each process saw."""
    return [json.loads((folder / f"{rank}.json").read_text())[name] for rank in range(2)]


@pytest.mark.parametrize("background", ["False", "True"])
@pytest.mark.parametrize("name", shards.made())
def test_what_two_write_is_what_one_reads(folder, name, background):
    """Bit for bit, although each changed its tensors as soon as it might."""
    path, one = only(folder / name / background), shards.made()[name]()
    read = ckpt.load(path, verify=True)
    assert_same(read, one)
    assert (read.layout, read.notes, ckpt.verify(path)) == ("sharded", [], [])
    assert list(read.model_state) == list(one.model_state)
    assert sorted(path.glob("*.distcp")) == [path / "__0_0.distcp", path / "__1_0.distcp"]
    assert ckpt.load(path, optimizer=False).optimizer_state is None


def test_each_wrote_its_own_rows_and_what_all_have_was_written_once(folder):
    index = json.loads((only(folder / "uneven" / "False") / "tensors.json").read_text())
    rows = {name: [(file, rows) for file, _, rows in entry["pieces"]] for name, entry in index.items()}
    (step,) = (name for name in rows if name.endswith(".step"))
    assert len(rows.pop(step)) == 1
    assert len(rows) == 3
    assert set(map(tuple, rows.values())) == {(("__0_0.distcp", 4), ("__1_0.distcp", 3))}


def test_a_model_that_fully_shard_divided_is_what_torch_gathers(folder):
    expected = torch.load(folder / "trained.pt", weights_only=True)
    read = named_tensors(ckpt.load(only(folder / "trained"), verify=True))
    assert read.keys() == expected.keys()
    assert all(read[name].equal(tensor) and read[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if "exp_avg" in name)
    assert not all(read[name].equal(torch.zeros_like(tensor)) for name, tensor in expected.items())


def test_torchs_own_tool_reads_what_two_wrote(folder, tmp_path):
    path, one = only(folder / "gpt2" / "True"), shards.made()["gpt2"]()
    dcp_to_torch_save(path, tmp_path / "torch.pt")
    content = torch.load(tmp_path / "torch.pt", weights_only=True)
    moments = {
        f"optimizer {name} {kind}": value
        for name, kinds in content["optimizer"]["state"].items()
        for kind, value in kinds.items()
    }
    ours, theirs = bits(one), content["model"] | moments
    assert ours.keys() == theirs.keys()
    assert all(theirs[name].contiguous().numpy().tobytes() == data for name, (_, _, data) in ours.items())


@pytest.mark.parametrize("layout", [name for name in ckpt.WRITERS if name != "sharded"])
def test_what_two_wrote_becomes_any_layout_and_comes_back(folder, layout, tmp_path):
    path = only(folder / "gpt2" / "False")
    there = ckpt.convert(path, tmp_path / "there", layout=layout).target
    back = ckpt.convert(there, tmp_path / "back", layout="sharded").target
    assert_same(ckpt.load(back, verify=True), ckpt.load(path), but={"save_id"})


def test_two_saves_in_one_lead_and_a_second_name(folder):
    found = ckpt.find(folder / "bests")
    assert [one.problem for one in found] == [None, None]
    everywhere = [*(folder / "bests").glob("check*"), *(folder / "bests" / "best").iterdir()]
    assert len(everywhere) == 3
    for path in everywhere:
        assert_same(ckpt.load(path, verify=True), record(3, validation_loss=2.0))


def test_a_disk_that_is_full_for_one_leaves_nothing_and_the_next_save_is_whole(folder):
    leader, other = (each["seen"] for each in seen(folder, "full_disk"))
    for told, left in (leader[:2], leader[2:4]):
        assert told[0] == errno.ENOSPC
        assert str(folder / "full disk") in told[1]
        assert left == []
    name = only(folder / "full disk").name
    assert leader[4:] == ["saved", [name]]
    assert other == ["saved", [], "saved", [], "saved", [name]]  # it follows, and waits for nothing
    assert_same(ckpt.load(folder / "full disk" / name, verify=True), record(4))


def test_a_bad_number_of_one_process_is_known_to_all(folder):
    first, second = seen(folder, "bad_numbers")
    assert first == {"good": [], "bad": ["wpe.weight"], "own": []}  # by its own rows it would not know
    assert second == {"good": [], "bad": ["wpe.weight"], "own": ["wpe.weight"]}


def test_the_bytes_that_are_asked_for_are_enough(folder):
    for name in shards.made():
        path = only(folder / name / "True")
        assert sum(map(len, snapshot(path).values())) < bytes_on_disk(ckpt.load(path)) + 2 * 2048 * 200
    sizes = {each["bytes"] for each in seen(folder, "round_trips")}
    (need,) = sizes
    assert sum(map(len, snapshot(only(folder / "gpt2" / "True")).values())) < need


# ---------------------------------------------------------------------------------------------------------------------
# One of them dies


Said = list[list[str]]
Command = Callable[..., list[Said]]


@pytest.fixture(scope="module")
def pair() -> Iterator[Command]:
    """Has two processes save step 2, one of which is killed before the n-th of its calls; returns what each said."""
    with script() as one, script() as other:

        def command(folder: Path, store: Path, *, killed: int, number: int, mode: str) -> list[Said]:
            for rank, process in enumerate((one, other)):
                assert process.stdin is not None
                process.stdin.write(f"{rank} {killed} {number} {mode} {store} {folder}\n")
                process.stdin.flush()
            return [answer(process) for process in (one, other)]

        yield command
        for process in (one, other):
            assert process.stdin is not None
            process.stdin.close()


def script() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> Said:
    assert process.stdout is not None
    said: Said = []
    while not said or said[-1][0] != "ended":
        said.append(process.stdout.readline().split())
    return said


@pytest.mark.parametrize("mode", ["blocking", "background"])
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_at_every_call_that_changes_the_disk_the_newest_is_whole(pair, killed, mode, tmp_path):
    saved(tmp_path / "before", of_step(1))
    newest = set()
    for number in range(200):
        place = tmp_path / "now"
        shutil.copytree(tmp_path / "before", place)
        said = pair(place, tmp_path / f"store-{number}", killed=killed, number=number, mode=mode)
        steps = steps_of(whole(place), best=False)
        assert steps in ([1], [1, 2])
        survivor, victim = said[1 - killed], said[killed]
        if victim[-1][1] == "0":  # there was no such call
            assert [one[0][0] for one in said] == ["saved", "saved"]
            assert steps == [1, 2]
            break
        assert [words[0] for words in survivor] == ["failed", "ended"]
        assert survivor[-1][1] == "0"
        assert float(survivor[0][1]) - float(victim[-1][2]) < SECONDS
        newest.add(steps[-1])
        next_save_clears_up(place, "sharded", 3)
        shutil.rmtree(place)
    assert number > (4 if killed else 20)
    assert newest == ({1, 2} if killed == 0 else {1})
