"""Uploads that several processes share: each copies what it wrote, once, and rank 0 copies what another one cannot."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from drive import logged, newest, tensor_bytes
from mirrors import Faulty, halves, in_folder, in_memory, known, lose, no_pause, taken
from test_distributed import WORKER, torchrun
from torch.distributed import HashStore

from milepost.ckpt.layouts import sharded
from milepost.mirror import Helper, Sharing, Store
from milepost.mirror.contents import Part
from milepost.mirror.sharing import STALLED

NAME = "00000001-" + "0" * 16


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """Two files of rank 1, by place."""
    paths = [tmp_path / "here" / f"{number}.bin" for number in (1, 2)]
    paths[0].parent.mkdir()
    for number, path in enumerate(paths):
        path.write_bytes(os.urandom(1000 + number))
    return {f"checkpoints/{path.name}": path for path in paths}


@pytest.fixture
def board() -> HashStore:
    return HashStore()


@pytest.fixture
def helping(board, tmp_path) -> Iterator[object]:
    """Return a helper on a store, of rank 1."""
    begun = []

    def begin(store: Store) -> Helper:
        begun.append(Helper(board, known(store, tmp_path), rank=1, pause=no_pause))
        return begun[-1]

    yield begin
    for helper in begun:
        helper.leave()


def parts_of(board: HashStore, files: dict[str, Path], **named: object) -> dict[str, Part]:
    return Sharing(board, size=2, **named).ask(NAME, {0: {}, 1: files, 7: {"x": Path("x")}}, lambda size: None)()


def test_a_file_is_copied_by_the_process_that_wrote_it(board, files, helping):
    store = in_memory()
    helper = helping(store)
    parts = parts_of(board, files)
    assert parts.keys() == files.keys()
    assert {part.object: store.read(part.object, limit=2000) for part in parts.values()} == {
        f"one/{NAME}/{place}": path.read_bytes() for place, path in files.items()
    }
    Sharing(board, size=2).close()
    helper.finish()


def test_one_that_has_left_is_not_waited_for(board, files, helping):
    helping(in_memory()).leave()
    assert parts_of(board, files, pause=lambda seconds: pytest.fail("it waits")) == {}


def test_one_that_stands_still_is_not_waited_for_long(board, files):
    now = iter(range(0, 10**6, 50))
    asked: list[float] = []
    assert parts_of(board, files, pause=asked.append, clock=lambda: float(next(now))) == {}
    assert 1 <= len(asked) <= STALLED / 50 + 1


def test_what_another_process_cannot_copy_is_left_to_rank_0(board, files, helping):
    store = in_memory(fs := Faulty())
    fs.faults.extend([PermissionError("denied")])
    helping(store)
    (part,) = parts_of(board, files).values()
    assert part.place == list(files)[1]


@pytest.mark.parametrize(
    ("name", "rank"), [("__0_0.distcp", 0), ("__13_0.distcp", 13), ("tensors.json", 0), (".metadata", 0)]
)
def test_a_file_of_a_sharded_folder_names_its_writer(name, rank):
    assert sharded.LAYOUT.rank_of(Path("checkpoint") / name) == rank


def test_two_processes_mirror_what_each_of_them_wrote_and_resume_from_there(tmp_path):
    mirror, straight = tmp_path / "mirror", tmp_path / "straight"
    straight.mkdir()
    variables = {
        "DISTRIBUTED": "fsdp", "CHECKPOINT_MIRROR": f"file://{mirror}", "CHECKPOINT_ASYNC": "false",
        "WORKER_PUTS": str(straight),
    }  # fmt: skip
    done = torchrun(straight, 2, script=WORKER, **variables)
    assert done.returncode == 0, done.stderr
    store = in_folder(mirror)
    assert halves(store) == []
    assert taken(store)[0].found.step == 8
    puts = [json.loads(f"[{(straight / f'{rank}.puts').read_text()[:-1]}]") for rank in (0, 1)]
    assert sorted({name.rpartition("/")[2] for name in puts[1]}) == ["__1_0.distcp"]
    pieces = [name for name in [*puts[0], *puts[1]] if name.endswith(".distcp")]
    assert len(pieces) == len(set(pieces)) > 0  # none twice
    assert not any(name.endswith("__1_0.distcp") for name in puts[0])
    whole = tensor_bytes(newest(straight)), logged(straight)
    kept = taken(store)[0]
    store.delete(kept.manifest)  # so that the run resumes from an earlier checkpoint
    store.delete("latest.json")
    lose(straight)
    done = torchrun(straight, 2, **variables, RESUME="auto")
    assert done.returncode == 0, done.stderr
    assert "from the mirror" in done.stderr
    assert (tensor_bytes(newest(straight)), logged(straight)) == whole
    lose(straight)
    named = {"RESUME": f"file://{mirror}/4", "XDG_CACHE_HOME": str(tmp_path / "caches"), "DISTRIBUTED": "fsdp"}
    done = torchrun(straight, 2, **named)
    assert done.returncode == 0, done.stderr
    assert tensor_bytes(newest(straight)) == whole[0]
    assert done.stderr.count("downloading") == 1
