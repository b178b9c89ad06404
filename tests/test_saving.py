"""Saving: numbers and names of saves, and the best checkpoints."""

import datetime
import os
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
from drive import tensor_bytes
from filelock import FileLock, Timeout
from hypothesis import given
from hypothesis import strategies as st
from records import NOON, assert_same, better, hugging_face_folder, newest, record, save, set_clock

from milepost import ckpt
from milepost.ckpt import finding, retention
from milepost.ckpt.names import file_word
from milepost.locks import FOLDER_LOCK

LAYOUTS = sorted(ckpt.WRITERS)


def best(folder: Path) -> Path | None:
    found = ckpt.best(ckpt.find(folder))
    return found.path if found else None


# ---------------------------------------------------------------------------------------------------------------------
# Save numbers and names


def test_save_numbers_increase_over_all_runs_and_best(tmp_path):
    save(tmp_path, 1, run_id="a")
    ckpt.keep_best(record(2, run_id="b"), tmp_path, saved=None)
    path = save(tmp_path, 3, run_id="c")
    assert [one.metadata["save_number"] for one in ckpt.find(tmp_path)] == [1, 2, 3]
    path.unlink()
    save(tmp_path, 4, run_id="a")
    assert [one.step for one in ckpt.find(tmp_path)] == [1, 2, 4]


def test_every_save_has_its_own_id_and_time(tmp_path, monkeypatch):
    set_clock(monkeypatch, NOON)
    one = record()
    for _ in range(2):
        ckpt.save(one, tmp_path)
    first, second = (found.metadata for found in ckpt.find(tmp_path))
    assert first["saved_at"] == "2025-11-10T12:00:00.000000+00:00"
    assert re.fullmatch("[0-9a-f]{16}", first["save_id"])
    assert first["save_id"] != second["save_id"]


NAMES = [
    ({}, "checkpoint_bigram_letters_step0007_11102025_120000.pt"),
    ({"step": 12345}, "checkpoint_bigram_letters_step12345_11102025_120000.pt"),
    ({"data": {"name": "carolyn_hax"}}, "checkpoint_bigram_carolyn_hax_step0007_11102025_120000.pt"),
    ({"data": {}}, "checkpoint_bigram_text_step0007_11102025_120000.pt"),
    ({"data": {"name": "../É /x" + "y" * 50}}, f"checkpoint_bigram_x{'y' * 39}_step0007_11102025_120000.pt"),
    (
        {"hyperparameters": {"GPT2_MODEL_NAME": "openai-community/gpt2-medium"}},
        "checkpoint_bigram_letters_gpt2medium_step0007_11102025_120000.pt",
    ),
    (
        {"hyperparameters": {"GPT2_MODEL_NAME": "/models/My GPT/"}},
        "checkpoint_bigram_letters_mygpt_step0007_11102025_120000.pt",
    ),
    ({"hyperparameters": {"GPT2_MODEL_NAME": "日本"}}, "checkpoint_bigram_letters_step0007_11102025_120000.pt"),
    ({"model_type": "../../x"}, "checkpoint_x_letters_step0007_11102025_120000.pt"),
]


@pytest.mark.parametrize(("changes", "name"), NAMES, ids=str)
def test_names_match_the_documentation(changes, name, tmp_path, monkeypatch):
    set_clock(monkeypatch, NOON)
    folder = tmp_path / "inner"
    assert save(folder, **({"step": 7} | changes)) == folder / name
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


@given(st.text())
def test_file_words_hold_only_safe_characters(text):
    assert re.fullmatch("[a-z0-9_]{1,40}", file_word(text))


def test_a_taken_name_moves_to_the_next_free_second(tmp_path, monkeypatch):
    set_clock(monkeypatch, NOON.replace(minute=59, second=58))
    stamps = [save(tmp_path, 1).stem[-15:] for _ in range(3)]
    assert stamps == ["11102025_125958", "11102025_125959", "11102025_130000"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_saves_in_the_same_second_get_two_names(layout, tmp_path, monkeypatch):
    set_clock(monkeypatch, NOON)
    paths = [save(tmp_path, 1, layout=layout, validation_loss=loss) for loss in (2.0, 1.0)]
    assert [one.path for one in ckpt.find(tmp_path)] == paths
    assert [ckpt.load(path, verify=True).validation_loss for path in paths] == [2.0, 1.0]
    kept = ckpt.keep_best(record(1, validation_loss=0.5), tmp_path, saved=None, layout=layout)
    assert len({path.name for path in (*paths, kept)}) == 3


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu", "America/Los_Angeles"])
def test_the_time_zone_changes_neither_order_nor_names(zone, tmp_path, monkeypatch):
    """Times are UTC: neither another time zone nor daylight saving changes the order."""
    first = save(tmp_path, 1)
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        set_clock(monkeypatch, NOON)
        second = save(tmp_path, 2)
        assert second.stem.endswith("11102025_120000")
        assert ckpt.load(second).saved_at == "2025-11-10T12:00:00.000000+00:00"
        assert [one.path for one in ckpt.find(tmp_path)] == [first, second]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_clock_set_back_changes_neither_the_latest_nor_any_file(tmp_path, monkeypatch):
    set_clock(monkeypatch, NOON)
    first = save(tmp_path, 1)
    before = first.read_bytes()
    set_clock(monkeypatch, NOON - datetime.timedelta(days=400))
    second = save(tmp_path, 1)
    assert second.name < first.name
    assert newest(tmp_path) == second
    assert first.read_bytes() == before


def test_the_last_name_in_order_names_a_checkpoint(tmp_path):
    """As people find it in a shell: CHECKPOINT=$(ls checkpoints/ | sort | tail -1)."""
    ckpt.keep_best(record(1), tmp_path, saved=save(tmp_path, 1))
    save(tmp_path, 2)
    (tmp_path / ".tmp-zzz").write_bytes(b"half")
    command = f"ls '{tmp_path}' | sort | tail -1"
    name = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout.strip()
    assert ckpt.load(tmp_path / name).model_type == "bigram"
    assert sorted(path.name for path in tmp_path.glob("[!.]*"))[0] == "best"


# ---------------------------------------------------------------------------------------------------------------------
# keep_best


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))


def test_best_is_a_hard_link_and_replaces_the_previous_best_of_the_run(tmp_path):
    first, second = ckpt.save(better(1), tmp_path), ckpt.save(better(2), tmp_path)
    ckpt.keep_best(better(1), tmp_path, saved=first)
    kept = ckpt.keep_best(better(2), tmp_path, saved=second)
    assert names(tmp_path / "best") == [second.name]
    assert kept.samefile(second)  # a hard link: no second copy of the bytes
    assert first.exists()
    assert [one.path for one in ckpt.find(tmp_path)] == [first, second]  # one save is listed once
    second.unlink()
    assert tensor_bytes(ckpt.load(kept, verify=True)) == tensor_bytes(record(2))
    assert newest(tmp_path) == kept


def fails_without_links(source: Path, target: Path) -> None:
    raise PermissionError(1, "no hard links here")


def test_without_hard_links_best_is_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", fails_without_links)
    saved = save(tmp_path)
    kept = ckpt.keep_best(better(1), tmp_path, saved=saved)
    assert kept.read_bytes() == saved.read_bytes()
    assert not kept.samefile(saved)
    assert list(tmp_path.rglob(".tmp-*")) == []


def test_best_is_copied_under_the_lock_of_the_folder(tmp_path, monkeypatch):
    """Otherwise another run's save would delete the incomplete copy as a leftover."""
    saved, copy, looked = save(tmp_path), shutil.copyfileobj, []

    def watched(source, target, *size):
        with pytest.raises(Timeout):
            FileLock(tmp_path / FOLDER_LOCK).acquire(timeout=0)
        looked.append(source.name)
        copy(source, target, *size)

    monkeypatch.setattr(os, "link", fails_without_links)
    monkeypatch.setattr(shutil, "copyfileobj", watched)
    ckpt.keep_best(better(1), tmp_path, saved=saved)
    assert looked == [str(saved)]


def test_a_best_step_between_two_saves_is_saved_into_best(tmp_path):
    save(tmp_path, 1)
    kept = ckpt.keep_best(better(2), tmp_path, saved=None)
    assert kept.parent == tmp_path / "best"
    assert newest(tmp_path) == kept
    again = ckpt.keep_best(better(3), tmp_path, saved=None)
    assert names(tmp_path / "best") == [again.name]


def test_two_runs_in_a_folder_keep_a_best_checkpoint_each(tmp_path, monkeypatch):
    """Also in the same second, at the same step, with the same text."""
    set_clock(monkeypatch, NOON)
    one = ckpt.keep_best(better(5, run_id="a"), tmp_path, saved=None)
    saved = ckpt.save(better(5, run_id="b"), tmp_path)
    other = ckpt.keep_best(better(5, run_id="b"), tmp_path, saved=saved)
    assert one != other
    assert {ckpt.load(path).run_id for path in (tmp_path / "best").glob("*.pt")} == {"a", "b"}
    third = ckpt.keep_best(better(6, run_id="b"), tmp_path, saved=ckpt.save(better(6, run_id="b"), tmp_path))
    assert names(tmp_path / "best") == sorted([one.name, third.name])


def test_checkpoints_that_are_not_worse_stay_in_best(tmp_path):
    """A run resumed from an earlier step may still need them."""
    lower = ckpt.keep_best(better(5, validation_loss=1.0), tmp_path, saved=None)
    higher = ckpt.keep_best(better(3, validation_loss=2.0), tmp_path, saved=None)
    unknown = ckpt.keep_best(better(4, validation_loss=None), tmp_path, saved=None)
    assert all(path.exists() for path in (lower, higher, unknown))
    assert best(tmp_path) == lower
    ckpt.keep_best(better(6, validation_loss=1.5), tmp_path, saved=None)
    assert not higher.exists()
    assert lower.exists()


def test_best_is_kept_compares_run_and_loss(tmp_path):
    assert not ckpt.best_is_kept(tmp_path, run_id="one", loss=0.5)
    ckpt.keep_best(better(2), tmp_path, saved=None)
    assert ckpt.best_is_kept(tmp_path, run_id="one", loss=0.5)
    assert not ckpt.best_is_kept(tmp_path, run_id="one", loss=0.25)
    assert not ckpt.best_is_kept(tmp_path, run_id="other", loss=0.5)


def test_checkpoints_without_a_run_stay_in_best(tmp_path):
    (tmp_path / "best").mkdir()
    strange = hugging_face_folder(tmp_path / "best" / "strange")
    damaged = tmp_path / "best" / "damaged.pt"
    damaged.write_bytes(b"PK")
    kept = [ckpt.keep_best(better(step, run_id=None), tmp_path, saved=None) for step in (1, 2)]
    assert all(path.exists() for path in (strange, damaged, *kept))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alone", [True, False], ids=["saved for it", "second name"])
def test_best_is_complete_in_every_layout_and_the_previous_best_is_deleted(alone, layout, tmp_path):
    kept = []
    for step in (1, 2):
        saved = None if alone else ckpt.save(better(step), tmp_path, layout=layout)
        kept.append(ckpt.keep_best(better(step), tmp_path, saved=saved, layout=layout))
    assert kept[1].parent.name == "best"
    assert_same(ckpt.load(kept[1], verify=True), better(2))
    in_best = [one.path for one in ckpt.find(tmp_path) if one.path.parent.name == "best"]
    assert in_best == ([kept[1]] if alone else [])  # the ordinary name of a save is listed before its second
    assert [one.step for one in ckpt.find(tmp_path)] == ([2] if alone else [1, 2])
    assert {path.parent for path in tmp_path.rglob("best/*")} == {kept[1].parent}
    leftover = [path for path in tmp_path.rglob("*") if "step0001" in path.name or "000001" in path.name]
    assert [path for path in leftover if "best" in path.parts] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deleting_or_stripping_a_hard_link_leaves_the_other_intact(layout, tmp_path):
    saved = ckpt.save(better(1), tmp_path, layout=layout)
    kept = ckpt.keep_best(better(1), tmp_path, saved=saved, layout=layout)
    ckpt.prune(tmp_path, run_id="one", keep_last=1, keep_every=0, latest_valid=None)
    retention.strip(saved)
    assert_same(ckpt.load(kept, verify=True), better(1))
    (one,) = ckpt.find(tmp_path)
    assert (one.path, one.resumable) == (kept, True)  # the fuller of two names


LOSSES = [3.0, 1.0, 2.0, 4.0, 1.5, 0.5, 2.5]
KEPT_OF = [
    # What stays after each loss: the `count` best and whatever is not worse than the last.
    (1, [[3.0], [1.0], [1.0, 2.0], [1.0, 2.0, 4.0], [1.0, 1.5], [0.5], [0.5, 2.5]]),
    (2, [[3.0], [1.0, 3.0], [1.0, 2.0], [1.0, 2.0, 4.0], [1.0, 1.5], [0.5, 1.0], [0.5, 1.0, 2.5]]),
    (
        3,
        [
            [3.0],
            [1.0, 3.0],
            [1.0, 2.0, 3.0],
            [1.0, 2.0, 3.0, 4.0],
            [1.0, 1.5, 2.0],
            [0.5, 1.0, 1.5],
            [0.5, 1.0, 1.5, 2.5],
        ],
    ),
]


@pytest.mark.parametrize(("count", "after"), KEPT_OF)
def test_count_best_checkpoints_are_kept(count, after, tmp_path):
    for step, (loss, kept) in enumerate(zip(LOSSES, after, strict=True), start=1):
        ckpt.keep_best(better(step, validation_loss=loss), tmp_path, saved=None, count=count)
        assert sorted(one.metadata["validation_loss"] for one in ckpt.find(tmp_path)) == kept


def losses_in_best(folder: Path) -> list[float]:
    found = [each for each in finding.scan(folder) if each.path.parent.name == "best"]
    return sorted(each.metadata["validation_loss"] for each in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_saves_of_one_step_count_once_in_best(layout, tmp_path):
    """A run resumed from an earlier step saves a step a second time; the second best stays in best/."""
    for step in (1, 2, 2):
        ckpt.keep_best(better(step), tmp_path, saved=None, layout=layout, count=2)
    ckpt.keep_best(better(2), tmp_path, saved=None, layout=layout, count=2)
    assert losses_in_best(tmp_path) == [1 / 2, 1 / 2, 1 / 2, 1 / 1]
    ckpt.keep_best(better(3), tmp_path, saved=None, layout=layout, count=2)  # the control: step 1 is outdone
    assert losses_in_best(tmp_path) == [1 / 3, 1 / 2, 1 / 2, 1 / 2]


@pytest.mark.parametrize("layouts", [("unified", "stepfiles"), ("stepfiles", "unified"), ("separated", "consolidated")])
def test_a_resume_in_another_layout_replaces_the_best_of_the_earlier_layout(layouts, tmp_path):
    for step, layout in enumerate(layouts, 1):
        ckpt.keep_best(better(step), tmp_path, saved=None, layout=layout)
    assert losses_in_best(tmp_path) == [1 / 2]


@pytest.mark.parametrize("layouts", [("unified", "stepfiles"), ("stepfiles", "unified"), ("consolidated", "unified")])
def test_leftovers_of_the_earlier_layout_are_removed_by_a_save_in_another(layouts, tmp_path):
    places = [tmp_path, tmp_path / "best", tmp_path / "one", tmp_path / "one" / "best"]
    save(tmp_path, 1, layout=layouts[0])
    dead = subprocess.Popen(["true"])
    dead.wait()
    for place in places:
        place.mkdir(exist_ok=True)
        (place / f".tmp-checkpoint.pt-{dead.pid}-00000000").write_text("half a save")
    save(tmp_path, 2, layout=layouts[1])
    assert list(tmp_path.rglob(".tmp-*")) == []


@pytest.mark.parametrize("mode", [0o777, 0o755])
def test_whoever_may_write_in_the_folder_may_write_in_its_best(mode, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    kept = ckpt.keep_best(better(1), folder, saved=None)
    assert stat.S_IMODE(kept.parent.stat().st_mode) == mode
