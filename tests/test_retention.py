"""Retention: which checkpoints a policy expires, and pruning, which never deletes the user's files."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import NOON, assert_same, better, bits, hugging_face_folder, record, save, set_clock

from milepost import ckpt, files
from milepost.ckpt import CheckpointError, Found, finding, retention
from milepost.ckpt.layouts import unified
from milepost.ckpt.names import own_stem

LAYOUTS = sorted(ckpt.WRITERS)


# ---------------------------------------------------------------------------------------------------------------------
# expired


FOLDER = Path("checkpoints")


def seen(
    step: int, *, run: str | None = "mine", resumable: bool = True, problem: str | None = None, **more: Any
) -> Found:
    """Return the checkpoint of a step; a later step has a higher save number."""
    place = FOLDER / "best" if more.pop("best", False) else FOLDER
    values = {
        "step": step,
        "run_id": run,
        "save_number": step + 1,
        "parts": ["model", *(["optimizer"] if resumable else [])],
    }
    return Found(place / f"{run}-{step}", {} if problem else values | more, problem)


def policy(
    found: list[Found], *, keep_last: int, keep_every: int = 0, latest_valid: int | None = None
) -> tuple[list[int], list[int]]:
    """Return the steps that are deleted and the steps that are stripped."""
    good = None if latest_valid is None else FOLDER / f"mine-{latest_valid}"
    gone = retention.expired(found, run_id="mine", keep_last=keep_last, keep_every=keep_every, latest_valid=good)
    return [one.step for one in gone.remove], [one.step for one in gone.strip]


SIX = [seen(step) for step in (10, 20, 30, 40, 50, 60)]
FINAL = [seen(step, hyperparameters={"TRAINING_STEPS": 30}) for step in (10, 20, 30, 40, 50)]
POLICIES = [
    # found, policy -> removed, stripped
    ("none", [], {"keep_last": 1}, [], []),
    ("0 keeps all", SIX, {"keep_last": 0}, [], []),
    ("0 keeps all as they are", SIX, {"keep_last": 0, "keep_every": 20}, [], []),
    ("the last", SIX, {"keep_last": 1}, [10, 20, 30, 40, 50], []),
    ("the last three", SIX, {"keep_last": 3}, [10, 20, 30], []),
    ("as many as there are", SIX, {"keep_last": 6}, [], []),
    ("more than there are", SIX, {"keep_last": 99}, [], []),
    ("every twentieth", SIX, {"keep_last": 2, "keep_every": 20}, [10, 30], [20, 40]),
    ("every one", SIX, {"keep_last": 2, "keep_every": 10}, [], [10, 20, 30, 40]),
    ("every that no step is", SIX, {"keep_last": 2, "keep_every": 7}, [10, 20, 30, 40], []),
    ("step 0 is a multiple of all", [seen(0), *SIX], {"keep_last": 6, "keep_every": 1000}, [], [0]),
    ("stripped already", [seen(20, resumable=False), *SIX[2:]], {"keep_last": 1, "keep_every": 20}, [30, 50], [40]),
    ("the final one", FINAL, {"keep_last": 1}, [10, 20, 40], []),
    ("the final one as it is", FINAL, {"keep_last": 1, "keep_every": 30}, [10, 20, 40], []),
    ("known to be whole", SIX, {"keep_last": 1, "latest_valid": 30}, [10, 20, 40, 50], []),
    ("known to be whole as it is", SIX, {"keep_last": 1, "keep_every": 10, "latest_valid": 30}, [], [10, 20, 40, 50]),
    ("damaged", [seen(10), seen(20, problem="damaged"), seen(30)], {"keep_last": 1}, [10], []),
    ("damaged ones do not count", [seen(10), seen(20), seen(30, problem="damaged")], {"keep_last": 1}, [10], []),
    ("best/", [seen(10, best=True), seen(20), seen(30)], {"keep_last": 1}, [20], []),
    ("another run's", [seen(10, run="other"), seen(20), seen(30), seen(40, run="other")], {"keep_last": 1}, [20], []),
    ("of no run", [seen(10, run=None), seen(20), seen(30)], {"keep_last": 1}, [20], []),
    ("in any order", [SIX[3], SIX[0], SIX[5], SIX[1], SIX[4], SIX[2]], {"keep_last": 2}, [10, 20, 30, 40], []),
    ("by save, not by step", [seen(900, save_number=1), seen(5, save_number=2)], {"keep_last": 1}, [900], []),
]


@pytest.mark.parametrize(
    ("found", "words", "removed", "stripped"), [case[1:] for case in POLICIES], ids=[case[0] for case in POLICIES]
)
def test_a_policy_expires_exactly_these_checkpoints(found, words, removed, stripped):
    assert policy(found, **words) == (removed, stripped)


saves = st.lists(
    st.builds(
        seen,
        st.integers(0, 50),
        run=st.sampled_from(["mine", "other", None]),
        resumable=st.booleans(),
        problem=st.sampled_from([None, None, None, "damaged"]),
        best=st.booleans(),
        save_number=st.none() | st.integers(1, 9),
    ),
    max_size=12,
)


@given(saves, st.integers(0, 4), st.integers(0, 9), st.none() | st.integers(0, 50))
def test_no_policy_expires_the_newest_or_checkpoints_of_others(found, keep_last, keep_every, latest_valid):
    good = None if latest_valid is None else FOLDER / f"mine-{latest_valid}"
    before = list(found)
    gone = retention.expired(found, run_id="mine", keep_last=keep_last, keep_every=keep_every, latest_valid=good)
    assert found == before
    touched = [*gone.remove, *gone.strip]
    assert all(any(one is other for other in found) for one in touched)
    for one in touched:
        assert (one.run_id, one.problem, one.path.parent) == ("mine", None, FOLDER)
        assert one.path != good
    own = sorted(
        (one for one in found if one.run_id == "mine" and not one.problem and one.path.parent == FOLDER),
        key=lambda one: one.save_order,
    )
    assert not any(one is other for one in touched for other in (own[-keep_last:] if keep_last else own))
    assert all(keep_every and one.step % keep_every == 0 and one.resumable for one in gone.strip)
    assert not any(keep_every and one.step % keep_every == 0 for one in gone.remove)


# ---------------------------------------------------------------------------------------------------------------------
# prune


def saves_of(folder: Path, layout: str, *, steps: range = range(10, 70, 10), run_id: str = "one") -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [ckpt.save(record(step, run_id=run_id), folder, layout=layout) for step in steps]


def pruned(
    folder: Path, *, keep_last: int = 2, keep_every: int = 20, latest_valid: Path | None = None
) -> retention.Expired:
    return ckpt.prune(folder, run_id="one", keep_last=keep_last, keep_every=keep_every, latest_valid=latest_valid)


def held(folder: Path) -> dict[int, bool]:
    """Return each step in `folder` with whether it is resumable."""
    found = ckpt.find(folder)
    assert [one.problem for one in found] == [None] * len(found)
    return {one.step: one.resumable for one in found}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prune_deletes_expired_checkpoints_and_strips_multiples_of_keep_every(layout, tmp_path):
    saves_of(tmp_path, layout)
    before = sum(one.size for one in ckpt.find(tmp_path))
    gone = pruned(tmp_path)
    assert ([one.step for one in gone.remove], [one.step for one in gone.strip]) == ([10, 30], [20, 40])
    assert held(tmp_path) == {20: False, 40: False, 50: True, 60: True}
    for one in ckpt.find(tmp_path):
        read = ckpt.load(one.path, verify=True)
        expected = record(one.step)
        assert bits(read).items() <= bits(expected).items()
        assert read.model_state.keys() == expected.model_state.keys()
        assert (read.optimizer_state is not None) == one.resumable
        assert read.save_number == one.step // 10
        assert ckpt.verify(one.path) == []
    assert sum(one.size for one in ckpt.find(tmp_path)) < before * 0.7
    assert list(tmp_path.rglob(".tmp-*")) == []
    again = pruned(tmp_path)
    assert (again.remove, again.strip) == ([], [])
    assert held(tmp_path) == {20: False, 40: False, 50: True, 60: True}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prune_leaves_other_runs_and_best_unchanged(layout, tmp_path):
    other = saves_of(tmp_path, layout, run_id="two", steps=range(10, 40, 10))
    saves_of(tmp_path, layout)
    best = ckpt.keep_best(better(70), tmp_path, saved=None, layout=layout)
    (tmp_path / "notes.txt").write_text("mine")
    foreign = hugging_face_folder(tmp_path / "gpt2")
    pruned(tmp_path, keep_last=1, keep_every=0)
    assert [one.path for one in ckpt.find(tmp_path) if one.run_id == "two"] == other
    assert sorted(one.step for one in ckpt.find(tmp_path) if one.run_id == "one") == [60, 70]
    assert_same(ckpt.load(best, verify=True), better(70))
    assert foreign.exists()
    assert (tmp_path / "notes.txt").exists()


def test_layouts_mixed_in_a_folder_are_pruned_as_a_single_run(tmp_path):
    for number, layout in enumerate(LAYOUTS):
        saves_of(tmp_path, layout, steps=range(10 * number + 10, 10 * number + 20, 10))
    assert list(held(tmp_path)) == [10, 20, 30, 40, 50, 60, 70]
    pruned(tmp_path)
    assert held(tmp_path) == {20: False, 40: False, 60: True, 70: True}


def test_the_latest_valid_and_damaged_checkpoints_stay(tmp_path):
    paths = saves_of(tmp_path, "unified")
    paths[3].write_bytes(paths[3].read_bytes()[:-9])
    pruned(tmp_path, keep_last=1, keep_every=0, latest_valid=paths[1])
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == sorted(paths[n].name for n in (1, 3, 5))


def test_keep_last_zero_keeps_all_checkpoints_unchanged(tmp_path):
    saves_of(tmp_path, "unified")
    gone = pruned(tmp_path, keep_last=0)
    assert (gone.remove, gone.strip) == ([], [])
    assert held(tmp_path) == dict.fromkeys(range(10, 70, 10), True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_interrupted_strip_is_completed_by_the_next(layout, tmp_path):
    """A single file is rewritten before the old file is deleted: in between both exist and are the same save."""
    path = saves_of(tmp_path, layout, steps=range(10, 30, 10))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retention, "remove", lambda files: None)
        retention.strip(path)
    assert len(ckpt.find(tmp_path)) == 2
    pruned(tmp_path, keep_last=1, keep_every=10)
    assert held(tmp_path) == {10: False, 20: True}
    assert len(list(finding.scan(tmp_path))) == 2


def test_stripped_checkpoints_are_named_model(tmp_path):
    path = save(tmp_path)
    retention.strip(path)
    assert [file.name for file in tmp_path.glob("[!.]*")] == [f"{path.stem}_model.pt"]


def test_missing_disk_space_is_reported_before_a_save(tmp_path):
    assert ckpt.free_space_problem(tmp_path, need=1) is None
    words = ckpt.free_space_problem(tmp_path, need=2**60)
    assert words is not None
    assert words.startswith(f"the disk is full: about {2**60:,} bytes are needed in {tmp_path}")


def test_a_conversion_beside_its_source_does_not_count_as_a_save(tmp_path):
    paths = {step: save(tmp_path, step) for step in (2, 4, 6)}
    ckpt.convert(paths[6], None, layout="separated", model_only=True)
    paths[8] = save(tmp_path, 8)
    ckpt.prune(tmp_path, run_id="one", keep_last=2, keep_every=0, latest_valid=paths[8])
    assert [(one.step, one.resumable) for one in ckpt.find(tmp_path)] == [(6, False), (6, True), (8, True)]


# ---------------------------------------------------------------------------------------------------------------------
# Copies: only a checkpoint under the exact name of its save may be deleted


def renamed(name: str, new: Callable[[str], str]) -> str:
    """Return the name of a copy of a file; the part after the stem of a group stays."""
    ends = ("_optimizer.safetensors", "_state.json", ".safetensors", "-optimizer.pt", "-model.pt", ".pt")
    end = next((end for end in ends if name.endswith(end)), "")
    return new(name.removesuffix(end)) + end


COPIES: dict[str, Callable[[str], str]] = {
    "word after": lambda stem: f"{stem}-my-favourite",
    "underscored word after": lambda stem: f"{stem}_keep_me",
    "best": lambda stem: f"{stem}_best",
    "digits after": lambda stem: f"{stem}0",
    "number after": lambda stem: f"{stem}_02",
    "number far after": lambda stem: f"{stem} 2",
    "model": lambda stem: f"{stem}_model",  # the copy has an optimizer, what `strip` writes has not
    "model and number": lambda stem: f"{stem}_model_2",
    "Windows": lambda stem: f"{stem} - Copy",
    "Windows, again": lambda stem: f"{stem} - Copy (2)",
    "macOS": lambda stem: f"{stem} copy",
    "Linux": lambda stem: f"{stem} (1)",
    "GNOME": lambda stem: f"{stem} (copy)",
    "date after": lambda stem: f"{stem}_20251110",
    "another stamp after": lambda stem: f"{stem}_11102025_120001",
    "newline after": lambda stem: f"{stem}\n",
    "word before": lambda stem: f"my_{stem}",
    "copy of": lambda stem: f"copy of {stem}",
    "Copy_": lambda stem: f"Copy_{stem}",
    "another suffix": lambda stem: f"{stem}.bak",
    "hidden suffix": lambda stem: f"{stem}~",
    "space after": lambda stem: f"{stem} ",
    "letters that look alike": lambda stem: stem.replace("e", "\u0435"),
    "digit before": lambda stem: f"0_{stem}",
    "upper case": str.upper,
    "title": str.title,
    "other digits": lambda stem: stem.translate({ord("0") + n: chr(0x0660 + n) for n in range(10)}),
    "another step": lambda stem: stem.replace("step0001", "step0009").replace("000001", "000009"),
    "a longer step": lambda stem: stem.replace("step0001", "step00001").replace("000001", "0000001"),
}


def copied_as(path: Path, layout: str, new: Callable[[str], str], *, place: Path | None = None) -> list[Path]:
    """Copy all files of a checkpoint, as a user does; return the copies."""
    copies = []
    for file in ckpt.WRITERS[layout].files(path):
        copies.append((place or file.parent) / renamed(file.name, new))
        (shutil.copytree if file.is_dir() else shutil.copy2)(file, copies[-1])
    return copies


def content(paths: list[Path]) -> dict[Path, bytes]:
    files = [each for path in paths for each in ([path] if path.is_file() else path.rglob("*")) if each.is_file()]
    assert files
    return {file: file.read_bytes() for file in files}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_under_any_other_name_stays_unchanged(way, layout, tmp_path):
    """A copy beside the first of three saves is neither deleted nor counted among the last."""
    first, second, last = (save(tmp_path, step, layout=layout) for step in (1, 2, 3))
    before = content(copied_as(first, layout, COPIES[way]))
    newest_copy = content(copied_as(last, layout, COPIES["word after"]))
    for keep_every in (0, 1):  # the second would take the optimizer
        ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=keep_every, latest_valid=last)
        assert content(list(before)) == before
    assert content(list(newest_copy)) == newest_copy
    assert last.exists()
    assert not second.exists()
    assert not first.exists()  # the control: what retention is for still happens


@pytest.mark.parametrize("place", ["", "best", "one", "one/best", "favourites"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_that_a_link_in_the_folder_points_to_stays(layout, place, tmp_path):
    """`ln -s` is another way to name a checkpoint."""
    first, second, last = (save(tmp_path, step, layout=layout) for step in (1, 2, 3))
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    favourite = tmp_path / place / "favourite.pt"
    favourite.symlink_to(first)
    (tmp_path / place / "dangling").symlink_to(tmp_path / "gone")
    ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=last)
    assert [path.exists() for path in (favourite, first, second, last)] == [True, True, False, True]
    favourite.unlink()  # the control
    ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=last)
    assert not first.exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_best_that_a_link_in_the_folder_points_to_stays(layout, tmp_path):
    first = ckpt.keep_best(better(1), tmp_path, saved=None, layout=layout)
    (tmp_path / "mine").symlink_to(first)
    second = ckpt.keep_best(better(2), tmp_path, saved=None, layout=layout)
    ckpt.keep_best(better(3), tmp_path, saved=None, layout=layout)
    assert (first.exists(), second.exists()) == (True, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copied_folder_of_checkpoints_stays(layout, tmp_path):
    """Copied whole beside the original, into it, and back under another name."""
    folder = tmp_path / "checkpoints"
    paths = [save(folder, step, layout=layout) for step in (1, 2, 3)]
    ckpt.keep_best(better(3), folder, saved=None, layout=layout)
    shutil.copytree(folder, tmp_path / "checkpoints backup")
    shutil.copytree(tmp_path / "checkpoints backup", folder / "backup")
    for place in [path for path in folder.iterdir() if path.is_dir() and path not in paths]:
        shutil.copytree(place, place.with_name(f"{place.name} copy"))
    copies = [path for path in tmp_path.rglob("*") if {"backup", "copy"} & set(str(path).replace("/", " ").split())]
    before = content(copies)
    ckpt.prune(folder, run_id="one", keep_last=1, keep_every=0, latest_valid=paths[2])
    assert content(list(before)) == before
    assert not paths[0].exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_renamed_checkpoint_stays_and_does_not_count_as_the_last_save(layout, tmp_path):
    paths = [save(tmp_path, step, layout=layout) for step in (1, 2, 3)]
    before = content(copied_as(paths[2], layout, COPIES["word after"]))
    files.remove(ckpt.WRITERS[layout].files(paths[2]))
    ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=None)
    assert content(list(before)) == before
    assert [path.exists() for path in paths] == [False, True, False]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_under_a_possible_save_name_protects_both(layout, tmp_path, monkeypatch):
    """`step_000001_2`, or the next second: it is recognised as a copy only while the original exists."""
    set_clock(monkeypatch, NOON)
    paths = [save(tmp_path, step, layout=layout) for step in (1, 2, 3)]
    numbered = bool(ckpt.WRITERS[layout].run_stem)
    copies = copied_as(paths[0], layout, lambda stem: f"{stem}_2" if numbered else f"{stem[:-1]}9")
    before = content(copies)
    for _ in range(2):
        ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=paths[2])
        assert content(copies) == before
    assert [path.exists() for path in paths] == [True, False, True]


def test_a_second_save_of_a_step_is_not_a_copy(tmp_path):
    """The negative control of the test above: it has its own save id."""
    for layout in LAYOUTS:
        folder = tmp_path / layout
        paths = [save(folder, step, layout=layout) for step in (1, 1, 3)]
        ckpt.prune(folder, run_id="one", keep_last=1, keep_every=0, latest_valid=paths[2])
        assert [path.exists() for path in paths] == [False, False, True]


@pytest.mark.parametrize("layout", ["unified", "sharded"])
def test_copies_of_a_stripped_checkpoint_stay(layout, tmp_path):
    alone = {"optimizer_state": None, "hyperparameters": {"CHECKPOINT_MODEL_ONLY": True}}
    paths = [save(tmp_path, step, layout=layout, **alone) for step in (1, 2, 3)]
    full = [save(tmp_path, step, layout=layout) for step in (4, 5)]
    retention.strip(full[0])
    (stripped,) = tmp_path.glob("*step0004*")
    copies = copied_as(paths[0], layout, lambda stem: f"{stem}_model") + copied_as(
        stripped, layout, lambda stem: f"{stem}_2"
    )
    before = content(copies)
    for _ in range(2):
        ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=full[1])
        assert content(copies) == before
    assert not paths[1].exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["one copy", "backup", "Best", "best copy"])
def test_a_copied_run_folder_stays(place, layout, tmp_path):
    """In layouts that write run folders, a copy of a run folder is found and recognised by its name."""
    first, last = (save(tmp_path, step, layout=layout) for step in (1, 2))
    (tmp_path / place).mkdir()
    before = content(copied_as(first, layout, str, place=tmp_path / place))
    ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=last)
    assert content(list(before)) == before
    assert not first.exists()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("unified", "separated", "stepfiles")])
def test_a_checkpoint_folder_with_other_files_stays(layout, tmp_path):
    paths = [save(tmp_path, step, layout=layout) for step in (1, 2, 3)]
    (paths[0] / "README.md").write_text("my notes")
    (paths[1] / ".DS_Store").write_text("the system's")
    before = content([paths[0]])
    ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=paths[2])
    assert content([paths[0]]) == before
    assert not paths[1].exists()


@pytest.mark.parametrize("name", ["{}.bak", "{}.pt.bak", "{}.pt~", "{}.PT", "{}.pt.1", "old-{}.pt.txt"])
def test_a_copy_with_another_suffix_stays(name, tmp_path):
    first, last = (save(tmp_path, step) for step in (1, 2))
    copy = Path(shutil.copy(first, tmp_path / name.format(first.stem)))
    ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=last)
    assert copy.exists()
    assert not first.exists()


def test_the_prefix_is_compared_with_the_settings_of_the_run(tmp_path):
    """`my_checkpoint` may be a setting or a file renamed by the user."""
    own = {"hyperparameters": {"CHECKPOINT_PREFIX": "my_checkpoint"}}
    mine, theirs = record(1, **own), record(2)
    with_prefix = ckpt.save(mine, tmp_path, prefix="my_checkpoint")
    plain = ckpt.save(theirs, tmp_path)
    copies = [
        with_prefix.rename(tmp_path / f"my_{with_prefix.name}"),
        shutil.copy(plain, tmp_path / f"my_{plain.name}"),
    ]
    again = ckpt.save(mine, tmp_path, prefix="my_checkpoint")
    last = ckpt.save(record(3), tmp_path)
    ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=last)
    assert {path.name for path in tmp_path.glob("*.pt")} == {last.name, *(Path(copy).name for copy in copies)}
    assert not again.exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_in_best_stays_and_does_not_count(layout, tmp_path):
    kept = [ckpt.keep_best(better(step), tmp_path, saved=None, layout=layout, count=2) for step in (1, 2)]
    before = content(copied_as(kept[1], layout, COPIES["word after"]))
    kept.append(ckpt.keep_best(better(3), tmp_path, saved=None, layout=layout, count=2))
    assert content(list(before)) == before
    assert [path.exists() for path in kept] == [False, True, True]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_own_stem_accepts_only_the_exact_name_of_the_save(data):
    """Any insertion, deletion or replacement in a name makes it a name of the user."""
    layout = data.draw(st.sampled_from(LAYOUTS))
    values = {
        "model_type": "gpt2",
        "step": 350,
        "run_id": "one",
        "save_id": "ab",
        "parts": ["model", "optimizer"],
        "data": {"name": "letters"},
        "hyperparameters": {},
        "saved_at": "2025-11-10T12:00:00.500000+00:00",
    }
    numbered = {"stepfiles": "step_000350.safetensors", "consolidated": "checkpoint_000350"}
    stem = "checkpoint_gpt2_letters_step0350_11102025_120000"
    ends = {"unified": ".pt", "separated": "-model.pt"}
    name = numbered.get(layout, stem + ends.get(layout, ""))
    place = FOLDER / "one" if layout in numbered else FOLDER
    assert own_stem(Found(place / name, values, layout=layout)) is not None
    start = data.draw(st.integers(0, len(name)))
    end = data.draw(st.integers(start, min(len(name), start + 3)))
    text = st.text(st.characters(exclude_characters="/\0") | st.sampled_from("0123456789_-.() "), max_size=4)
    changed = name[:start] + data.draw(text) + name[end:]
    could_be_a_later_save = re.fullmatch(
        r"(checkpoint_gpt2_letters_step0350_11102025_1[23]\d{4}|step_000350_\d+|checkpoint_000350_\d+)(\.pt|-model\.pt|\.safetensors)?", changed, re.ASCII
    )  # fmt: skip
    if changed not in ("", ".", "..", name) and not could_be_a_later_save:
        assert own_stem(Found(place / changed, values, layout=layout)) is None


def test_renamed_and_copied_checkpoints_stay(tmp_path):
    """A copy, or a checkpoint that the user renamed to keep it."""
    first, second, last = (save(tmp_path, step) for step in (1, 2, 3))
    shutil.copy(first, tmp_path / "mybackup.pt")
    second.rename(tmp_path / "good.pt")
    ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=last)
    assert {path.name for path in tmp_path.glob("*.pt")} == {"mybackup.pt", "good.pt", last.name}


def test_a_number_at_the_limit_does_not_make_later_saves_unreadable(tmp_path):
    ckpt.save(record(1), tmp_path)
    path = unified.LAYOUT.write(
        record(2, save_number=2**53, save_id="x", saved_at="2000-01-01T00:00:00.000000+00:00"), tmp_path, "odd"
    )
    for step in (3, 4):
        ckpt.save(record(step), tmp_path)
    assert [one.step for one in ckpt.find(tmp_path)] == [1, 2, 3, 4]
    assert path.exists()


def test_editing_a_checkpoint_does_not_change_its_copy_in_best(tmp_path):
    saved = ckpt.save(record(1), tmp_path, layout="directory")
    kept = ckpt.keep_best(record(1), tmp_path, saved=saved, layout="directory")
    with open(saved / "config.json", "r+") as file:
        file.truncate(0)
    with pytest.raises(CheckpointError):
        ckpt.load(saved)
    assert ckpt.load(kept, verify=True).step == 1
    assert (saved / "model.pt").samefile(kept / "model.pt")


def test_a_deletion_error_does_not_stop_the_other_deletions(tmp_path, monkeypatch):
    paths = [save(tmp_path, step) for step in (10, 15, 20, 25, 30)]

    def refused(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(retention, "strip", refused)
    with pytest.raises(OSError, match="No space"):
        ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=10, latest_valid=paths[-1])
    assert [one.step for one in ckpt.find(tmp_path)] == [10, 20, 30]


@pytest.mark.parametrize("layout", ["separated", "stepfiles"])
def test_a_full_disk_does_not_prevent_pruning(layout, tmp_path, monkeypatch):
    first, last = (save(tmp_path, step, layout=layout) for step in (1, 2))

    def refused(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.appearing, "write_json", refused)
    ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=last)
    assert [one.step for one in ckpt.find(tmp_path)] == [2]
    assert not list(first.parent.glob("*0001*"))
