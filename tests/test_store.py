"""What a folder of checkpoints holds is read from inside the files: find, latest, best, resolve, names and numbers."""

import datetime
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from drive import tensor_bytes
from filelock import FileLock, Timeout
from hypothesis import given
from hypothesis import strategies as st
from records import flipped, in_child, record, walkable_folder

import ckpt
from ckpt import Checkpoint, CheckpointError, Found, store
from ckpt.files import FOLDER_LOCK
from ckpt.store import file_word

NOON = datetime.datetime(2025, 11, 10, 12, 0, 0, tzinfo=datetime.UTC)


def set_clock(monkeypatch: pytest.MonkeyPatch, now: datetime.datetime) -> None:
    """The store's clock stands at `now`."""
    clock = SimpleNamespace(now=lambda zone: now.astimezone(zone))
    monkeypatch.setattr(
        store, "datetime", SimpleNamespace(datetime=clock, UTC=datetime.UTC, timedelta=datetime.timedelta)
    )


def save(folder: Path, step: int = 1, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    return ckpt.save(record(step, **changes), folder)


def newest(folder: Path) -> Path | None:
    found = ckpt.latest(ckpt.find(folder))
    return found.path if found else None


def best(folder: Path) -> Path | None:
    found = ckpt.best(ckpt.find(folder))
    return found.path if found else None


def hugging_face_folder(path: Path) -> Path:
    """Looks like a GPT-2 of another program: it has no save number."""
    path.mkdir()
    sizes = {"vocab_size": 9, "n_positions": 8, "n_layer": 1, "n_head": 1, "n_embd": 4}
    (path / "config.json").write_text(str({"model_type": "gpt2"} | sizes).replace("'", '"'))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# find, latest, best


def test_an_empty_or_missing_folder_holds_nothing(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert ckpt.find(folder) == []
    assert ckpt.latest([]) is None
    assert ckpt.best([]) is None


def test_found_in_the_order_of_saving_with_what_is_inside(tmp_path):
    paths = [save(tmp_path, step) for step in (9500, 10000, 3)]
    found = ckpt.find(tmp_path)
    assert [(one.path, one.step, one.problem) for one in found] == [
        (path, step, None) for path, step in zip(paths, (9500, 10000, 3), strict=True)
    ]
    assert [one.metadata["save_number"] for one in found] == [1, 2, 3]
    assert newest(tmp_path) == paths[2]


def test_a_name_means_nothing(tmp_path):
    """Renamed so that every order by name is wrong, the order of saving stays."""
    steps = {name: save(tmp_path, step).rename(tmp_path / name) for step, name in ((2, "z.pt"), (1, "a.pt"), (3, "m"))}
    assert [one.path.name for one in ckpt.find(tmp_path)] == list(steps)
    assert newest(tmp_path) == tmp_path / "m"  # known by its first bytes, not by a suffix


def test_times_of_files_mean_nothing(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    os.utime(first, (2e9, 2e9))
    os.utime(second, (1e9, 1e9))
    assert newest(tmp_path) == second


def test_dot_names_and_other_files_are_never_seen(tmp_path):
    path = save(tmp_path)
    for name in (".tmp-checkpoint.pt", ".hidden.pt"):
        shutil.copy(path, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no checkpoint")
    (tmp_path / "folder.pt").mkdir()
    assert [one.path for one in ckpt.find(tmp_path)] == [path]
    assert newest(tmp_path) == path


def test_a_damaged_file_is_seen_with_its_problem_and_never_the_latest(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    second.write_bytes(second.read_bytes()[:-30])
    damaged, whole = ckpt.find(tmp_path)
    assert (damaged.path, damaged.step) == (second, 0)
    assert damaged.problem is not None
    assert str(second) in damaged.problem
    assert whole.path == newest(tmp_path) == first


def test_another_programs_files_rank_below_everything_with_a_number(tmp_path):
    path = save(tmp_path, 1)
    foreign = hugging_face_folder(tmp_path / "zzz")
    assert [one.path for one in ckpt.find(tmp_path)] == [foreign, path]
    path.unlink()
    assert newest(tmp_path) == foreign


def found(name: str, **metadata) -> Found:
    return Found(Path(name), metadata)


def test_ties_go_to_the_later_time_and_without_numbers_to_the_step():
    same_number = [found("a", save_number=3, saved_at="2025-11-10T12:00:01", step=1)]
    same_number.append(found("b", save_number=3, saved_at="2025-11-10T12:00:00", step=9))
    assert ckpt.latest(same_number) == same_number[0]
    no_number = [found("a", step=5), found("b", step=30), found("c", step=9)]
    assert ckpt.latest(no_number) == no_number[1]


def test_best_is_the_lowest_loss_of_the_run_that_the_latest_belongs_to(tmp_path):
    save(tmp_path, 1, run_id="other", validation_loss=0.1)
    lowest = save(tmp_path, 2, run_id="mine", validation_loss=2.0)
    save(tmp_path, 3, run_id="mine", validation_loss=2.5)
    save(tmp_path, 4, run_id="mine")
    assert best(tmp_path) == lowest


def test_best_without_any_loss_is_the_latest_and_of_equal_losses_the_earlier(tmp_path):
    save(tmp_path, 1)
    second = save(tmp_path, 2)
    assert best(tmp_path) == second
    third = save(tmp_path, 3, validation_loss=1.5)
    save(tmp_path, 4, validation_loss=1.5)
    assert best(tmp_path) == third


@given(st.permutations(range(5)))
def test_latest_does_not_depend_on_the_order_of_listing(order):
    several = [found(str(number), save_number=number, saved_at="", step=100 - number) for number in order]
    assert ckpt.latest(several) == found("4", save_number=4, saved_at="", step=96)


@given(step=st.integers(0, 10**6), interval=st.integers(0, 1000), last=st.integers(0, 10**6))
def test_due_at_multiples_and_at_the_end(step, interval, last):
    multiple = interval > 0 and step in range(0, step + 1, interval)
    assert ckpt.due(step, interval, last=last) == (multiple or step == last)


# ---------------------------------------------------------------------------------------------------------------------
# Save numbers and names


def test_save_numbers_count_over_all_runs_and_over_best(tmp_path):
    save(tmp_path, 1, run_id="a")
    ckpt.keep_best(record(2, run_id="b"), tmp_path, saved=None)
    path = save(tmp_path, 3, run_id="c")
    assert [one.metadata["save_number"] for one in ckpt.find(tmp_path)] == [1, 2, 3]
    path.unlink()
    save(tmp_path, 4, run_id="a")
    assert [one.step for one in ckpt.find(tmp_path)] == [1, 2, 4]


def test_every_save_has_an_id_and_a_time_of_its_own(tmp_path, monkeypatch):
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
def test_names_are_as_documented(changes, name, tmp_path, monkeypatch):
    set_clock(monkeypatch, NOON)
    folder = tmp_path / "inner"
    assert save(folder, **({"step": 7} | changes)) == folder / name
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


@given(st.text())
def test_a_word_for_a_name_is_safe(text):
    assert re.fullmatch("[a-z0-9_]{1,40}", file_word(text))


def test_a_name_that_is_taken_leads_to_the_next_free_second(tmp_path, monkeypatch):
    set_clock(monkeypatch, NOON.replace(minute=59, second=58))
    stamps = [save(tmp_path, 1).stem[-15:] for _ in range(3)]
    assert stamps == ["11102025_125958", "11102025_125959", "11102025_130000"]


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
    """As document 001 has it: CHECKPOINT=$(ls checkpoints/ | sort | tail -1)."""
    ckpt.keep_best(record(1), tmp_path, saved=save(tmp_path, 1))
    save(tmp_path, 2)
    (tmp_path / ".tmp-zzz").write_bytes(b"half")
    command = f"ls '{tmp_path}' | sort | tail -1"
    name = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout.strip()
    assert ckpt.load(tmp_path / name).model_type == "bigram"
    assert sorted(path.name for path in tmp_path.glob("[!.]*"))[0] == "best"


# ---------------------------------------------------------------------------------------------------------------------
# keep_best


def better(step: int, **changes: Any) -> Checkpoint:
    """Its validation loss is the lower the higher the step."""
    return record(step, **({"validation_loss": 1 / step} | changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))


def test_the_best_is_a_second_name_and_takes_the_place_of_the_runs_earlier_one(tmp_path):
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


def test_without_hard_links_the_best_is_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", fails_without_links)
    saved = save(tmp_path)
    kept = ckpt.keep_best(better(1), tmp_path, saved=saved)
    assert kept.read_bytes() == saved.read_bytes()
    assert not kept.samefile(saved)
    assert list(tmp_path.rglob(".tmp-*")) == []


def test_a_copy_is_made_under_the_folders_lock(tmp_path, monkeypatch):
    """Otherwise another run's save would take the half-made copy for a leftover and remove it."""
    saved, copy, looked = save(tmp_path), shutil.copyfileobj, []

    def watched(source, target):
        with pytest.raises(Timeout):
            FileLock(tmp_path / FOLDER_LOCK).acquire(timeout=0)
        looked.append(target.name)
        copy(source, target)

    monkeypatch.setattr(os, "link", fails_without_links)
    monkeypatch.setattr(shutil, "copyfileobj", watched)
    ckpt.keep_best(better(1), tmp_path, saved=saved)
    assert len(looked) == 1


def test_a_best_between_two_saves_is_saved_of_itself(tmp_path):
    save(tmp_path, 1)
    kept = ckpt.keep_best(better(2), tmp_path, saved=None)
    assert kept.parent == tmp_path / "best"
    assert newest(tmp_path) == kept
    again = ckpt.keep_best(better(3), tmp_path, saved=None)
    assert names(tmp_path / "best") == [again.name]


def test_two_runs_in_one_folder_keep_a_best_each(tmp_path, monkeypatch):
    """Also in the same second, at the same step, of the same text."""
    set_clock(monkeypatch, NOON)
    one = ckpt.keep_best(better(5, run_id="a"), tmp_path, saved=None)
    saved = ckpt.save(better(5, run_id="b"), tmp_path)
    other = ckpt.keep_best(better(5, run_id="b"), tmp_path, saved=saved)
    assert one != other
    assert {ckpt.load(path).run_id for path in (tmp_path / "best").glob("*.pt")} == {"a", "b"}
    third = ckpt.keep_best(better(6, run_id="b"), tmp_path, saved=ckpt.save(better(6, run_id="b"), tmp_path))
    assert names(tmp_path / "best") == sorted([one.name, third.name])


def test_what_is_not_worse_stays_until_it_is(tmp_path):
    """A run that goes on from an earlier step has yet to reach again what it once was."""
    lower = ckpt.keep_best(better(5, validation_loss=1.0), tmp_path, saved=None)
    higher = ckpt.keep_best(better(3, validation_loss=2.0), tmp_path, saved=None)
    unknown = ckpt.keep_best(better(4, validation_loss=None), tmp_path, saved=None)
    assert all(path.exists() for path in (lower, higher, unknown))
    assert best(tmp_path) == lower
    ckpt.keep_best(better(6, validation_loss=1.5), tmp_path, saved=None)
    assert not higher.exists()
    assert lower.exists()


def test_whether_the_best_is_kept_goes_by_run_and_step(tmp_path):
    assert not ckpt.best_is_kept(tmp_path, better(2))
    ckpt.keep_best(better(2), tmp_path, saved=None)
    assert ckpt.best_is_kept(tmp_path, better(2))
    assert not ckpt.best_is_kept(tmp_path, better(3))
    assert not ckpt.best_is_kept(tmp_path, better(2, run_id="other"))


def test_what_belongs_to_no_run_is_never_removed_for_a_better_one(tmp_path):
    (tmp_path / "best").mkdir()
    strange = hugging_face_folder(tmp_path / "best" / "strange")
    damaged = tmp_path / "best" / "damaged.pt"
    damaged.write_bytes(b"PK")
    kept = [ckpt.keep_best(better(step, run_id=None), tmp_path, saved=None) for step in (1, 2)]
    assert all(path.exists() for path in (strange, damaged, *kept))


# ---------------------------------------------------------------------------------------------------------------------
# resolve: what CHECKPOINT_PATH means


@pytest.fixture
def folder(tmp_path) -> Path:
    """Steps 10000, 9500 and 20 of one run, saved in this order; step 9500 is its best."""
    folder = tmp_path / "checkpoints"
    for step, loss in ((10000, 2.0), (9500, 1.0), (20, 3.0)):
        save(folder, step, validation_loss=loss)
    return folder


def step_of(answer: tuple[Path, list[str]]) -> int:
    return ckpt.load(answer[0]).step


@pytest.mark.parametrize(
    ("wish", "step"),
    [
        ("latest", 20),
        ("best", 9500),
        ("{folder}", 20),
        ("{folder}/*", 10000),
        ("{folder}/checkpoint_*_step9500_*.pt", 9500),
        ("{folder}/checkpoint_bigram_letters_step[19]*", 10000),
        ("{folder}/checkpoint_*_step0020_????????_??????.pt", 20),
    ],
)
def test_every_form_of_a_wish(wish, step, folder):
    path, notes = ckpt.resolve(wish.format(folder=folder), folder)
    assert ckpt.load(path).step == step
    assert any(f"taking {path}" in note for note in notes)


def test_a_file_is_taken_as_it_is(folder):
    for path in folder.glob("*.pt"):
        assert ckpt.resolve(str(path), Path("elsewhere")) == (path, [])


def test_a_glob_says_how_many_match_and_ties_go_to_the_later_save(folder):
    second = save(folder, 10000)
    path, notes = ckpt.resolve(f"{folder}/*step10000*", folder)
    assert path == second
    assert notes == [f"{folder}/*step10000* matches 2: taking {second}"]


def test_a_home_and_a_name_with_glob_characters(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert step_of(ckpt.resolve("~/checkpoints", Path("elsewhere"))) == 20
    assert step_of(ckpt.resolve("~/checkpoints/*", Path("elsewhere"))) == 10000
    odd = folder.parent / "odd[1]*.pt"
    shutil.copy(next(folder.glob("*step9500*")), odd)
    assert ckpt.resolve(str(odd), folder) == (odd, [])


def test_a_checkpoint_that_is_a_folder_is_taken_itself(tmp_path):
    foreign = hugging_face_folder(tmp_path / "gpt2")
    assert ckpt.resolve(str(foreign), tmp_path) == (foreign, [])


def test_damaged_ones_are_skipped_loudly(folder):
    damaged = ckpt.resolve("latest", folder)[0]
    flipped(damaged, damaged.stat().st_size - 20)
    path, notes = ckpt.resolve("latest", folder)
    assert ckpt.load(path).step == 9500
    assert notes[0].startswith(f"skipped: {damaged}: ")
    assert notes[-1] == f"taking {path}"


REFUSED = [
    ("latest", "There is no folder {empty}/none", "{empty}/none"),
    ("latest", "No checkpoint can be read in {empty}. {empty} holds no checkpoint", "{empty}"),
    ("best", "was ENABLE_CHECKPOINTS=true set when training?", "{empty}"),
    ("{folder}/missing.pt", "Checkpoint not found: {folder}/missing.pt. {folder} holds checkpoint_", "{empty}"),
    ("{empty}/no/missing.pt", "Checkpoint not found: {empty}/no/missing.pt. {folder} holds ", "{folder}"),
    ("{folder}/*step7*", "nothing matches {folder}/*step7*. {folder} holds checkpoint_", "{empty}"),
    ("{empty}", "No checkpoint can be read in {empty}", "{folder}"),
    ("{folder}/" + "x" * 300, "Checkpoint not found: {folder}/xxx", "{folder}"),
    ("~no-such-user-of-this-machine/x.pt", "Checkpoint not found: ~no-such-user", "{folder}"),
]


@pytest.mark.parametrize(("wish", "message", "where"), REFUSED)
def test_what_is_not_there_is_refused_with_what_is(wish, message, where, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"folder": folder, "empty": tmp_path / "empty"}
    with pytest.raises(CheckpointError) as caught:
        ckpt.resolve(wish.format(**places), Path(where.format(**places)))
    assert message.format(**places) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_damaged_ones_is_not_called_empty(folder):
    for path in folder.glob("*.pt"):
        path.write_bytes(b"PK\x03\x04")
    for wish in ("latest", str(folder), f"{folder}/*"):
        with pytest.raises(CheckpointError, match=r"skipped: .*is damaged"):
            ckpt.resolve(wish, folder)
    assert ckpt.listing(folder).count("(damaged)") == 3


def test_a_folder_that_may_not_be_listed_is_not_called_empty():
    with walkable_folder() as outer:
        folder = outer / "checkpoints"
        save(folder)
        folder.chmod(0o311)
        for wish in ("latest", str(folder), f"{folder}/missing.pt"):
            answer = in_child(lambda wish=wish: ckpt.resolve(wish, folder), as_nobody=True)
            assert answer.startswith("CheckpointError")
            assert f"{folder} cannot be listed (Permission denied)" in answer
        folder.chmod(0o755)


def test_a_listing_is_one_line_newest_first(tmp_path):
    for step in range(10):
        save(tmp_path, step)
    listing = ckpt.listing(tmp_path)
    assert listing.startswith(f"{tmp_path} holds checkpoint_bigram_letters_step0009_")
    assert listing.endswith(" and 2 more")
    assert listing.count("checkpoint_") == 8
