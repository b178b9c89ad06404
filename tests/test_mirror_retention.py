"""The mirror: what is deleted there, and what never is."""

import os
import shutil

import pytest
from mirrors import halves, in_folder, known, path_of, saves_of, send, steps, with_three
from records import record, save

from milepost import ckpt
from milepost.ckpt import CheckpointError
from milepost.mirror import Mirrored, contents
from milepost.mirror.contents import Part, Save, expired, objects_to_delete
from milepost.mirror.uploading import look_up, prune


@pytest.fixture
def three(tmp_path) -> Mirrored:
    return with_three(tmp_path)


def of_step(step: int, *, bests: tuple[int, ...] = (), end: int = 100, best: bool = False) -> Save:
    own = {"save_number": step, "save_id": f"{step:016x}", "step": step, "hyperparameters": {"TRAINING_STEPS": end}}
    name = contents.save_name(own)
    parts = (Part(f"checkpoints/{step}.pt", f"one/{name}/{step}.pt", 1, ""), Part("run/log", "one/shared", 1, ""))
    names = tuple(of_step(each).name for each in bests)
    return Save("one", name, f"{'best/' * best}{step}.pt", "unified", own, names, parts)


def test_the_newest_the_best_the_final_and_the_needed_stay():
    saves = [of_step(1), of_step(2, best=True), of_step(3, end=3), of_step(4), of_step(5, bests=(2,)), of_step(6)]
    assert steps(expired(saves, keep_last=0)) == []
    assert steps(expired(saves, keep_last=1)) == [1, 2, 4, 5]
    assert steps(expired(saves, keep_last=2)) == [1, 4]
    assert steps(expired(saves, keep_last=2, needed=[of_step(4).name])) == [1]


def test_objects_that_others_name_stay_and_manifests_go_first():
    gone, kept = of_step(1), of_step(2)
    assert objects_to_delete([gone], [kept]) == [gone.manifest, gone.parts[0].object]
    assert objects_to_delete([gone], []) == [gone.manifest, gone.parts[0].object, "one/shared"]


def test_only_what_our_manifests_name_is_deleted(three, tmp_path):
    foreign = [f"one/{saves_of(three.store)[-1].name}/checkpoints/mine.pt", "one/notes.txt", "two/00000001-mine/x.json"]
    for name in foreign:
        path_of(three.store, name).parent.mkdir(parents=True, exist_ok=True)
        path_of(three.store, name).write_text("mine")
    assert steps(prune(three, keep_last=1)) == [1, 2]
    assert set(foreign) <= set(three.store.names())
    assert halves(three.store) == []
    assert steps(saves_of(three.store)) == [3]


def test_what_is_in_best_stays_when_a_save_goes_elsewhere(tmp_path):
    """Into CHECKPOINT_FALLBACK_DIR, which has no best/, while CHECKPOINT_DIR may be away."""
    mirrored = known(in_folder(tmp_path / "mirror"), tmp_path)
    folder, fallback = tmp_path / "checkpoints", tmp_path / "fallback"
    fallback.mkdir()
    first = save(folder, 1)
    send(mirrored, first, folder)
    (folder / "best").mkdir()
    os.link(first, folder / "best" / first.name)
    send(mirrored, save(folder, 2), folder)
    away = tmp_path / "away"
    for step, gone in ((3, False), (4, True)):
        if gone:
            folder.rename(away)
        send(mirrored, ckpt.save(record(step), fallback, after=step - 1), fallback)
        deleted = prune(mirrored, keep_last=1)
        assert steps(deleted) == ([] if gone else [2])  # adapters that are away may need a base
    away.rename(folder)
    assert steps(prune(mirrored, keep_last=1)) == [3]
    assert steps(saves_of(mirrored.store)) == [4, 1]
    shutil.rmtree(folder / "best")  # the control: a better one is in best/
    (folder / "best").mkdir()
    fifth = ckpt.save(record(5), folder, after=4)
    os.link(fifth, folder / "best" / fifth.name)
    send(mirrored, fifth, folder)
    assert steps(prune(mirrored, keep_last=1)) == [1, 4]


def test_nothing_is_deleted_while_a_manifest_cannot_be_read(three, tmp_path):
    fresh = known(three.store, tmp_path)
    look_up(fresh)
    torn = path_of(three.store, f"one/00000009-{'0' * 16}/manifest.json")
    torn.parent.mkdir(parents=True)
    torn.write_text("{")
    before = three.store.names()
    with pytest.raises(CheckpointError):
        prune(fresh, keep_last=1)
    assert three.store.names() == before


def test_the_base_of_adapters_stays(three, tmp_path):
    folder = tmp_path / "checkpoints"
    (base,) = [each for each in ckpt.find(folder) if each.step == 1]
    uses = {"sha256": "0" * 64, "source": str(base.path), "step": 1}
    assert ckpt.note_use(uses, run_id="adapters", checkpoint_dir=tmp_path / "elsewhere")
    assert steps(prune(three, keep_last=1)) == [2]
