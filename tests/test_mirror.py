"""The mirror: what is copied, in which order, and what a reader takes."""

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from mirrors import (
    Faulty,
    in_folder,
    in_memory,
    known,
    manifests,
    no_pause,
    path_of,
    saves_of,
    send,
    with_three,
)
from records import assert_same, record, save

from milepost import ckpt
from milepost.ckpt import CheckpointError
from milepost.mirror import Mirrored, Store, StoreError, contents, fetch, fetch_bests, fetch_run, readable

# ---------------------------------------------------------------------------------------------------------------------
# There and back.


@pytest.mark.parametrize("layout", ckpt.WRITERS)
@pytest.mark.parametrize("place", [in_folder, lambda _: in_memory()], ids=["file", "memory"])
def test_every_layout_comes_back_as_it_was(tmp_path, layout, place):
    store, folder = place(tmp_path / "mirror"), tmp_path / "checkpoints"
    path = save(folder, 3, layout=layout)
    saved = send(known(store, tmp_path), path, folder)
    original, again = ckpt.load(path, verify=True), tmp_path / "again"
    again.mkdir()
    (found,) = saves_of(store)
    assert found == saved
    back = fetch(store, found, again, pause=no_pause)
    assert back.relative_to(again) == path.relative_to(folder)
    assert_same(ckpt.load(back, verify=True), original, but=set())
    assert [each.name for each in again.rglob(".tmp-*")] == []


def test_the_manifest_comes_after_all_that_it_names(tmp_path):
    store = in_memory(fs := Faulty())
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "metrics.jsonl").write_text('{"step": 1}\n')
    saved = send(known(store, tmp_path), save(tmp_path / "checkpoints", 1), tmp_path / "checkpoints")
    names = [name.removeprefix("/mirror/") for name in fs.written]
    assert names == [*(part.object for part in saved.parts), saved.manifest, contents.LATEST]
    assert [part.place for part in saved.run_parts] == ["run/metrics.jsonl"]


def test_files_of_the_run_are_sent_again_only_if_they_changed(tmp_path):
    mirrored, folder = known(in_memory(fs := Faulty()), tmp_path), tmp_path / "checkpoints"
    metrics, log = mirrored.run_folder / "metrics.jsonl", mirrored.run_folder / "training.log"
    metrics.write_text("1\n")
    log.write_text("begun\n")
    send(mirrored, save(folder, 1), folder)
    metrics.write_text("1\n2\n")
    fs.written.clear()
    second = send(mirrored, save(folder, 2), folder)
    assert [name.rpartition("/")[2] for name in fs.written if "/run/" in name] == ["metrics.jsonl"]
    fetch_run(mirrored.store, second, tmp_path / "back", say=print, pause=no_pause)
    assert (tmp_path / "back" / "metrics.jsonl").read_text() == "1\n2\n"
    assert (tmp_path / "back" / "training.log").read_text() == "begun\n"


def test_lines_that_are_here_and_not_in_the_mirror_stay(tmp_path):
    mirrored, folder = known(in_memory(), tmp_path), tmp_path / "checkpoints"
    (mirrored.run_folder / "metrics.jsonl").write_text("1\n2\n")
    (mirrored.run_folder / "training.log").write_text("begun\nsaved\n")
    saved = send(mirrored, save(folder, 1), folder)
    (mirrored.run_folder / "metrics.jsonl").write_text("1\n2\n3\n")
    (mirrored.run_folder / "training.log").write_text("begun\n")
    fetch_run(mirrored.store, saved, mirrored.run_folder, say=print, pause=no_pause)
    assert (mirrored.run_folder / "metrics.jsonl").read_text() == "1\n2\n3\n"
    assert (mirrored.run_folder / "training.log").read_text() == "begun\nsaved\n"


def test_best_checkpoints_come_back_into_best(tmp_path):
    mirrored, folder = known(in_memory(), tmp_path), tmp_path / "checkpoints"
    folder.mkdir()
    best = ckpt.keep_best(record(1, validation_loss=1.0), folder, saved=save(folder, 1, validation_loss=1.0))
    later = save(folder, 2, validation_loss=2.0)
    send(mirrored, best, folder)
    saved = send(mirrored, later, folder)
    again = tmp_path / "again"
    fetch_bests(mirrored.store, saved, again, say=print, pause=no_pause)
    (found,) = ckpt.find(again)
    assert found.path.relative_to(again) == best.relative_to(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What a reader takes.


@pytest.fixture
def three(tmp_path) -> Mirrored:
    return with_three(tmp_path)


def test_a_half_manifest_is_skipped_and_reported(three):
    first = path_of(three.store, manifests(three.store)[0])
    first.write_bytes(first.read_bytes()[:-50])
    said: list[str] = []
    left = list(readable(three.store, manifests(three.store), say=said.append, pause=no_pause))
    assert [each.found.step for each in left] == [2, 1]
    assert len(said) == 1
    assert str(first) in said[0]


@pytest.mark.parametrize("how", ["missing", "shorter", "altered"])
def test_a_damaged_checkpoint_is_not_revealed(three, tmp_path, how):
    newest_save = saves_of(three.store)[0]
    file = path_of(three.store, newest_save.checkpoint_parts[0].object)
    content = file.read_bytes()
    file.unlink()
    if how != "missing":
        file.write_bytes(
            content[:-1] if how == "shorter" else content[:500] + bytes([content[500] ^ 1]) + content[501:]
        )
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(CheckpointError) as caught:
        fetch(three.store, newest_save, again, pause=no_pause)
    assert caught.value.kind == "damaged"
    assert [each.name for each in again.iterdir() if each.name != ".lock"] == []


def test_a_store_that_lists_late_gives_the_newest(three, monkeypatch):
    names = three.store.names()
    late = [name for name in names if "/00000003-" not in name]
    monkeypatch.setattr(Store, "names", lambda store, under="": [name for name in late if name.startswith(under)])
    assert [each.found.step for each in saves_of(three.store)] == [3, 2, 1]
    path_of(three.store, contents.LATEST).unlink()  # control: the listing alone
    assert [each.found.step for each in saves_of(three.store)] == [2, 1]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    """A disk or a connection that fails there would look like a mirror without checkpoints, and a new run would begin."""
    store, ls = in_folder(tmp_path), LocalFileSystem.ls

    def failing(fs: LocalFileSystem, path: str, **named: Any) -> list[Any]:
        if path.rstrip("/").endswith("/one"):
            raise OSError(errno.EIO, "Input/output error")
        return ls(fs, path, **named)

    for name in ("one/x", "two/x"):
        store.put(name, b"1")
    monkeypatch.setattr(LocalFileSystem, "ls", failing)
    assert [Path(path).parent.name for path in store.fs.find(store.root)] == [
        "two"
    ]  # the control: fsspec leaves it out
    for ask in (store.names, store.sizes, lambda: store.names("one")):
        with pytest.raises(StoreError, match="Input/output error") as caught:
            ask()
        assert caught.value.kind == "passing"
    assert (store.names("two"), store.names("absent")) == (["two/x"], [])


HOSTILE = [
    {"run_id": ".."}, {"run_id": "a/b"}, {"name": "../00000001-" + "0" * 16}, {"checkpoint": "/etc/passwd"},
    {"checkpoint": "a/../../b"}, {"bests": ["../x"]}, {"parts": []}, {"name": "00000009-" + "0" * 16}, {"metadata": []},
    {"more": 1},
]  # fmt: skip
HOSTILE_PARTS = [
    {"place": "checkpoints/../../x"}, {"place": "/x"}, {"place": "elsewhere/x"}, {"place": "run/a\\b"}, {"object": "two/x"},
    {"object": "one/../two"}, {"size": -1}, {"size": "1"}, {"sha256": None}, {"place": "run/c:x"},
]  # fmt: skip


@pytest.mark.parametrize("change", [*HOSTILE, *HOSTILE_PARTS], ids=str)
def test_a_manifest_that_leads_elsewhere_is_refused(three, change):
    """With a sha256 of its own that agrees."""
    values = json.loads(json.dumps(dataclasses.asdict(saves_of(three.store)[0])))
    if set(change) <= {"place", "object", "size", "sha256"}:
        values["parts"][0] |= change
    else:
        values |= change
    values = json.loads(json.dumps({"format": contents.FORMAT, **values}))
    content = json.dumps({**values, "sha256": contents._own_sum(values)}).encode()
    with pytest.raises(CheckpointError) as caught:
        contents.parsed(content, "here")
    assert caught.value.kind == "damaged"


def test_the_same_manifest_is_read_without_the_change(three):
    saved = saves_of(three.store)[0]
    assert contents.parsed(contents.as_bytes(saved), "here") == saved
