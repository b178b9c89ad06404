"""The layout that processes write together: read by one, by PyTorch's own tools, after any of them died,
and out of bad hands.
"""

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import programs
import pytest
import shards
import torch
import torch.distributed.checkpoint
from folders import next_save_clears_up, steps_of, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from records import FULL, assert_same, bits, flipped, gpt2_record, record, refusal, refused, snapshot
from saver import of_step
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from work import HANGING, limited

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError, manifest, retention
from milepost.ckpt.dtypes import BY_SAFETENSORS
from milepost.ckpt.layouts import sharded
from milepost.ckpt.manifest import _own_sum
from milepost.ckpt.record import bytes_on_disk, named_tensors

SCRIPT = Path(shards.__file__)


def saved(folder: Path, one: Checkpoint | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return ckpt.save(one or gpt2_record(7, **FULL), folder, layout="sharded")


def only(folder: Path) -> Path:
    """The one checkpoint there, nothing hidden beside it."""
    (path,) = (path for path in folder.iterdir() if path.name != ".lock")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.soak)])
def folder(request, tmp_path_factory) -> Path:
    """Return what several processes under torchrun left, with their observations in {rank}.json."""
    place = tmp_path_factory.mktemp("together")
    launch = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={request.param}", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]  # fmt: skip
    done = subprocess.run(
        [*launch, str(SCRIPT), str(place)], capture_output=True, text=True, timeout=HANGING, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout + done.stderr == ""  # neither torch nor we have anything to say about it
    return place


def seen(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the observations of each process."""
    return [json.loads(file.read_text())[name] for file in sorted(folder.glob("?.json"))]


@pytest.mark.parametrize("background", ["False", "True"])
@pytest.mark.parametrize("name", shards.made())
def test_what_two_write_is_what_one_reads(folder, name, background):
    """Bit for bit, although each changed its tensors as soon as it might."""
    path, one = only(folder / name / background), shards.made()[name]()
    read = ckpt.load(path, verify=True)
    assert_same(read, one)
    assert (read.layout, read.notes, ckpt.verify(path)) == ("sharded", [], [])
    assert list(read.model_state) == list(one.model_state)
    files = [path / f"__{rank}_0.distcp" for rank in range(len(seen(folder, "bests")))]
    assert sorted(path.glob("*.distcp")) == files
    assert ckpt.load(path, optimizer=False).optimizer_state is None


def test_each_wrote_its_own_rows_and_what_all_have_was_written_once(folder):
    index = json.loads((only(folder / "uneven" / "False") / "tensors.json").read_text())
    rows = {name: [(file, rows) for file, _, rows in entry["pieces"]] for name, entry in index.items()}
    (step,) = (name for name in rows if name.endswith(".step"))
    assert len(rows.pop(step)) == 1
    assert len(rows) == 3
    parts = torch.arange(shards.UNEVEN).chunk(len(seen(folder, "bests")))
    assert set(map(tuple, rows.values())) == {
        tuple((f"__{rank}_0.distcp", len(part)) for rank, part in enumerate(parts))
    }


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
    leader, *others = (each["seen"] for each in seen(folder, "full_disk"))
    for told, left in (leader[:2], leader[2:4]):
        assert told[0] == errno.ENOSPC
        assert str(folder / "full disk") in told[1]
        assert left == []
    name = only(folder / "full disk").name
    assert leader[4:] == ["saved", [name]]
    for other in others:
        assert other == ["saved", [], "saved", [], "saved", [name]]  # it follows, and waits for nothing
    assert_same(ckpt.load(folder / "full disk" / name, verify=True), record(4))


def test_what_is_divided_by_columns_is_refused_and_nothing_of_it_is_left(folder):
    leader, *others = seen(folder, "by_columns")
    assert leader == {
        "seen": "model.token_embedding_table.weight is split along another dimension than its first",
        "left": [],
    }
    assert all(other == {"seen": "saved", "left": []} for other in others)


def test_a_bad_number_of_one_process_is_known_to_all(folder):
    first, second, *_ = seen(folder, "bad_numbers")
    assert first == {"good": [], "bad": ["wpe.weight"], "own": []}  # by its own rows it would not know
    assert second == {"good": [], "bad": ["wpe.weight"], "own": ["wpe.weight"]}


def test_the_bytes_that_are_asked_for_are_enough(folder):
    """Those that two need, by what each thinks, and those that one needs for the same tensors."""
    path = only(folder / "gpt2" / "True")
    taken = sum(map(len, snapshot(path).values()))
    (need,) = {each["bytes"] for each in seen(folder, "round_trips")}
    alone = ckpt.convert(path, folder / "alone", layout="sharded").target
    assert taken < need < 3 * taken
    assert sum(map(len, snapshot(alone).values())) < bytes_on_disk(ckpt.load(alone)) < need


# ---------------------------------------------------------------------------------------------------------------------
# One of them dies


Said = list[list[str]]
Command = Callable[..., list[Said]]


@pytest.fixture(scope="module")
def pair() -> Iterator[Command]:
    """Have two processes save step 2 and kill one before the n-th of its calls; return what each printed."""
    with script() as one, script() as other:

        def command(folder: Path, store: Path, *, killed: int, number: int, mode: str) -> list[Said]:
            for rank, process in enumerate((one, other)):
                assert process.stdin is not None
                process.stdin.write(f"{rank} {killed} {number} {mode} {quote(str(store))} {quote(str(folder))}\n")
                process.stdin.flush()
            with limited():  # a process that does not notice that the other is gone waits for ever
                return [answer(process) for process in (one, other)]

        try:
            yield command
        finally:
            for process in (one, other):
                os.killpg(process.pid, signal.SIGKILL)  # a child that hangs, too


def script() -> subprocess.Popen[str]:
    """Start tests/shards.py in a process group of its own."""
    return programs.start(
        [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


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
    noticed = []
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
        assert [words[0] for words in survivor] in (["failed", "ended"], ["forgotten", "ended"])
        assert survivor[-1][1] == "0"
        noticed.append(survivor[0][0] == "failed")
        newest.add(steps[-1])
        next_save_clears_up(place, "sharded", 3)
        shutil.rmtree(place)
    assert number > (3 if killed else 15)
    assert newest == ({1, 2} if killed == 0 else {1})
    assert sum(noticed) > number / 2  # see shards.FORGOTTEN


# ---------------------------------------------------------------------------------------------------------------------
# One process


def test_a_single_process_neither_leads_nor_follows():
    ckpt.follow(record(1))
    with pytest.raises(OSError, match="full"), ckpt.leading(record(1)):
        raise OSError("full")
    assert ckpt.not_finite(record(1)) == []


def test_torchs_checkpointing_is_imported_when_one_is_written_and_not_before(tmp_path):
    """It takes most of a second, as long as all of training's other imports but torch."""
    path = saved(tmp_path, record(3))
    asked = (
        "import sys; import pathlib; from milepost import ckpt; ckpt.load(pathlib.Path(sys.argv[1]), verify=True); "
        "print('torch.distributed.checkpoint' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked, str(path)], capture_output=True, text=True, cwd=shards.ROOT, check=True
    )
    assert done.stdout == "False\n"
    assert "torch.distributed.checkpoint" in sys.modules


def test_a_checkpoint_stripped_of_its_optimizer_keeps_the_whole_of_its_name(tmp_path):
    path = ckpt.save(gpt2_record(4), tmp_path, layout="sharded", prefix="v1.0")
    retention.strip(path)
    stripped = only(tmp_path)
    assert stripped.name == f"{path.name}_model"
    read = ckpt.load(stripped, verify=True)
    assert read.optimizer_state is None
    assert bits(read) == bits(dataclasses.replace(gpt2_record(4), optimizer_state=None))


def test_what_could_not_be_read_again_never_appears(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "PARTS_LIMIT", 200)
    with pytest.raises(CheckpointError, match="more than 200 values"):
        saved(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_of_any_number_of_processes_are_joined(data, tmp_path_factory):
    """Rows dealt out at random to files that are written here byte by byte."""
    folder = tmp_path_factory.mktemp("pieces")
    dtype = data.draw(st.sampled_from(sorted(BY_SAFETENSORS)))
    shape = data.draw(st.lists(st.integers(1, 5), max_size=3))
    whole = torch.randint(-9, 9, shape).to(getattr(torch, BY_SAFETENSORS[dtype]))
    files, pieces, row = {}, [], 0
    flat = whole.reshape(shape[0] if shape else 1, -1)
    while row < len(flat):
        rows, file = data.draw(st.integers(1, len(flat) - row)), f"__{data.draw(st.integers(0, 3))}_0.distcp"
        before = files.get(file, b"") + bytes(-len(files.get(file, b"")) % 64)
        files[file] = before + flat[row : row + rows].contiguous().view(torch.uint8).numpy().tobytes()
        pieces.append([file, len(before), rows])
        row += rows
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest = {"files": {name: {"size": len(content)} for name, content in files.items()}}
    (folder / "tensors.json").write_text(json.dumps({"model.one": {"dtype": dtype, "shape": shape, "pieces": pieces}}))
    (one,) = sharded._tensors(folder, manifest, sharded._index(folder, manifest), begin="model.").values()
    assert one.dtype == whole.dtype
    assert one.equal(whole)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


FILES = [".metadata", "__0_0.distcp", "tensors.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["gone", "cut", "emptied", "grown"])
def test_a_file_that_is_not_as_it_was_is_refused_by_name(harm, name, tmp_path):
    path = saved(tmp_path)
    data = (path / name).read_bytes()
    (path / name).unlink()
    if harm != "gone":
        (path / name).write_bytes({"cut": data[: len(data) // 2], "emptied": b"", "grown": data + b"}"}[harm])
    for text in (refused(path), refused(path, optimizer=False), refused(path, verify=True)):
        assert str(path / name) in text or (name == "manifest.json" and harm == "gone" and "manifest.json" in text)
    assert ckpt.verify(path) != []
    (one,) = ckpt.find(tmp_path)
    assert one.problem is not None


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(name, tmp_path):
    path, draw = saved(tmp_path), random.Random(name)
    size = (path / name).stat().st_size
    for _ in range(10):
        at, bit = draw.randrange(size), draw.randrange(8)
        flipped(path / name, at, bit)
        text = ckpt.verify(path)
        assert text, (at, bit)
        assert str(path / name) in text[0]
        with pytest.raises(CheckpointError):
            ckpt.load(path, verify=True)
        flipped(path / name, at, bit)
    assert ckpt.verify(path) == []


def test_a_piece_of_another_save_is_refused_without_reading_all(tmp_path):
    path, other = saved(tmp_path / "a"), saved(tmp_path / "b", gpt2_record(8))
    shutil.copy(other / "__0_0.distcp", path / "__0_0.distcp")
    assert (refusal(path).kind, refusal(path).path) == ("damaged", path / "__0_0.distcp")


def test_a_piece_that_the_manifest_does_not_name_is_refused(tmp_path):
    path = saved(tmp_path)
    shutil.copy(path / "__0_0.distcp", path / "__1_0.distcp")
    assert (refusal(path).kind, refusal(path).path) == ("refused", path / "__1_0.distcp")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_another_programs_folder_is_refused_naming_what_it_lacks(tmp_path):
    torch.distributed.checkpoint.save(
        {"model": record(1).model_state}, checkpoint_id=str(tmp_path / "theirs"), no_dist=True
    )
    error = refusal(tmp_path / "theirs")
    assert (error.kind, error.path) == ("lacking", tmp_path / "theirs")
    assert "manifest.json" in error.problem
    (one,) = ckpt.find(tmp_path)
    assert one.problem is not None


# ---------------------------------------------------------------------------------------------------------------------
# Bad hands: every checksum is right


def relisted(path: Path, name: str, data: bytes) -> None:
    """Puts `data` into the checkpoint's file as if it had been saved so."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"][name] = {"size": len(data), "sha256": digest, "begins_sha256": digest}
    manifest["sha256"] = _own_sum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.proof}'",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_asks_for_a_program_is_never_run(protocol, tmp_path):
    path, proof = saved(tmp_path / "one"), tmp_path / "proof"
    evil = pickle.dumps({"model.wte.weight": Evil(proof)}, protocol=protocol)
    (path / ".metadata").write_bytes(evil)
    assert str(path / ".metadata") in refused(path)
    relisted(path, ".metadata", evil)
    assert_same(ckpt.load(path), gpt2_record(7, **FULL))  # which needs nothing of it
    error = refusal(path, verify=True)
    assert (error.kind, error.path) == ("refused", path / ".metadata")
    assert ckpt.verify(path) == [str(error)]
    assert not proof.exists()


def test_control_torchs_own_reader_would_run_it(tmp_path):
    """Negative control: plain pickle runs the code in the file of the test above."""
    path, proof = saved(tmp_path / "one"), tmp_path / "proof"
    (path / ".metadata").write_bytes(pickle.dumps(Evil(proof)))
    with pytest.raises(AttributeError):
        FileSystemReader(path).read_metadata()
    assert proof.exists()


W = "model.wte.weight"
CLAIMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "more rows than the file has": lambda index: index[W].update(shape=[2**40, 8], pieces=[["__0_0.distcp", 0, 2**40]]),
    "more columns": lambda index: index[W].update(shape=[12, 2**40]),
    "a product beyond 64 bits": lambda index: index[W].update(shape=[12, 2**62, 2**62, 2**62]),
    "the same bytes in a thousand tensors": lambda index: index.update({f"model.{n}": index[W] for n in range(1000)}),
    "the same rows again and again": lambda index: index[W].update(shape=[12000, 8], pieces=index[W]["pieces"] * 1000),
    "rows that are missing": lambda index: index[W]["pieces"][0].__setitem__(2, 11),
    "rows below zero": lambda index: index[W].update(pieces=[["__0_0.distcp", 0, 24], ["__0_0.distcp", 0, -12]]),
    "a place before the file": lambda index: index[W]["pieces"][0].__setitem__(1, -64),
    "a place between two numbers": lambda index: index[W]["pieces"][0].__setitem__(1, 2),
    "a place behind the file": lambda index: index[W]["pieces"][0].__setitem__(1, 10**9),
    "a place that is no whole number": lambda index: index[W]["pieces"][0].__setitem__(1, 64.0),
    "another folder's file": lambda index: index[W]["pieces"][0].__setitem__(0, "../other"),
    "no file": lambda index: index[W]["pieces"][0].__setitem__(0, ["__0_0.distcp"]),
    "no tensor": lambda index: index.update({W: 3}),
    "no dtype of ours": lambda index: index[W].update(dtype="F8"),
    "a dtype that is none": lambda index: index[W].update(dtype=[1]),
    "no side at all": lambda index: index[W].update(shape=[0, 8], pieces=[]),
    "a shape of many sides": lambda index: index[W].update(shape=[12, 8, *[1] * 100]),
    "a shape that is none": lambda index: index[W].update(shape="12"),
    "pieces that are none": lambda index: index[W].update(pieces=None),
    "whole numbers for weights": lambda index: index[W].update(dtype="I32"),
    "a name that is none": lambda index: index.update({"model.\x1b[2J": index[W]}),
    "no weights": lambda index: index.clear(),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_an_index_that_claims_what_is_not_there_is_refused(claim, tmp_path):
    path = saved(tmp_path)
    index = json.loads((path / "tensors.json").read_text())
    CLAIMS[claim](index)
    relisted(path, "tensors.json", json.dumps(index).encode())
    assert str(path) in refused(path)
    assert str(path) in refused(path, verify=True)


def test_control_the_index_put_back_as_it_was_is_read(tmp_path):
    """Negative control: it is not for its line breaks that the others are refused."""
    path = saved(tmp_path)
    relisted(path, "tensors.json", json.dumps(json.loads((path / "tensors.json").read_text())).encode())
    assert_same(ckpt.load(path, verify=True), gpt2_record(7, **FULL))


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_names_a_file_outside_is_refused(name, tmp_path):
    path = saved(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["__0_0.distcp"]
    manifest["sha256"] = _own_sum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert (refusal(path).kind, refusal(path).path) == ("refused", path / "manifest.json")
