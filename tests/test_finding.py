"""Finding checkpoints by the metadata inside the files: find, latest, best, resolve, several."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import NOON, flipped, hugging_face_folder, in_child, newest, record, save, set_clock, walkable_folder
from work import calls, opened

from milepost import ckpt
from milepost.ckpt import CheckpointError, Found, finding, resolving, retention


def best(folder: Path) -> Path | None:
    found = ckpt.best(ckpt.find(folder))
    return found.path if found else None


# ---------------------------------------------------------------------------------------------------------------------
# find, latest, best


def test_an_empty_or_missing_folder_has_no_checkpoints(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert ckpt.find(folder) == []
    assert ckpt.latest([]) is None
    assert ckpt.best([]) is None


def test_find_returns_checkpoints_in_save_order_with_metadata(tmp_path):
    paths = [save(tmp_path, step) for step in (9500, 10000, 3)]
    found = ckpt.find(tmp_path)
    assert [(one.path, one.step, one.problem) for one in found] == [
        (path, step, None) for path, step in zip(paths, (9500, 10000, 3), strict=True)
    ]
    assert [one.metadata["save_number"] for one in found] == [1, 2, 3]
    assert newest(tmp_path) == paths[2]


def test_file_names_do_not_matter(tmp_path):
    """The save order stays although the files are renamed so that every order by name is wrong."""
    steps = {name: save(tmp_path, step).rename(tmp_path / name) for step, name in ((2, "z.pt"), (1, "a.pt"), (3, "m"))}
    assert [one.path.name for one in ckpt.find(tmp_path)] == list(steps)
    assert newest(tmp_path) == tmp_path / "m"  # known by its first bytes, not by a suffix


def test_file_times_do_not_matter(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    os.utime(first, (2e9, 2e9))
    os.utime(second, (1e9, 1e9))
    assert newest(tmp_path) == second


def test_hidden_and_other_files_are_ignored(tmp_path):
    path = save(tmp_path)
    for name in (".tmp-checkpoint.pt", ".hidden.pt"):
        shutil.copy(path, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no checkpoint")
    (tmp_path / "folder.pt").mkdir()
    assert [one.path for one in ckpt.find(tmp_path)] == [path]
    assert newest(tmp_path) == path


def test_a_damaged_file_is_listed_with_its_problem_and_never_the_latest(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    second.write_bytes(second.read_bytes()[:-30])
    damaged, whole = ckpt.find(tmp_path)
    assert (damaged.path, damaged.step) == (second, 0)
    assert damaged.problem is not None
    assert str(second) in damaged.problem
    assert whole.path == newest(tmp_path) == first


def test_checkpoints_of_other_programs_sort_before_all_saves(tmp_path):
    path = save(tmp_path, 1)
    foreign = hugging_face_folder(tmp_path / "zzz")
    assert [one.path for one in ckpt.find(tmp_path)] == [foreign, path]
    path.unlink()
    assert newest(tmp_path) == foreign


def found(name: str, **metadata) -> Found:
    return Found(Path(name), metadata)


def test_ties_go_to_the_later_time_and_without_numbers_to_the_higher_step():
    same_number = [found("a", save_number=3, saved_at="2025-11-10T12:00:01", step=1)]
    same_number.append(found("b", save_number=3, saved_at="2025-11-10T12:00:00", step=9))
    assert ckpt.latest(same_number) == same_number[0]
    no_number = [found("a", step=5), found("b", step=30), found("c", step=9)]
    assert ckpt.latest(no_number) == no_number[1]


def test_best_is_the_lowest_loss_in_the_run_of_the_latest(tmp_path):
    save(tmp_path, 1, run_id="other", validation_loss=0.1)
    lowest = save(tmp_path, 2, run_id="mine", validation_loss=2.0)
    save(tmp_path, 3, run_id="mine", validation_loss=2.5)
    save(tmp_path, 4, run_id="mine")
    assert best(tmp_path) == lowest


def test_best_without_losses_is_the_latest_and_with_equal_losses_the_earlier(tmp_path):
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
# Layouts, second names, and files that change

LAYOUTS = sorted(ckpt.WRITERS)
BY_STEP = ("consolidated", "stepfiles")  # whose names repeat from run to run, so that each run has a folder


def test_every_layout_is_found_in_save_order(tmp_path):
    paths = [save(tmp_path, step, layout=layout) for step, layout in enumerate([*LAYOUTS, *LAYOUTS], start=1)]
    assert [one.path for one in ckpt.find(tmp_path)] == paths
    assert [one.layout for one in ckpt.find(tmp_path)] == [*LAYOUTS, *LAYOUTS]
    assert newest(tmp_path) == paths[-1]
    for path, layout in zip(paths, LAYOUTS, strict=False):
        assert path.parent == (tmp_path / "one" if layout in BY_STEP else tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hard_link_in_best_is_listed_once(layout, tmp_path):
    saved = save(tmp_path, 1, layout=layout)
    kept = ckpt.keep_best(record(1), tmp_path, saved=saved, layout=layout)
    assert [one.path for one in ckpt.find(tmp_path)] == [saved]
    assert {one.path for one in finding.scan(tmp_path)} == {saved, kept}
    assert [one.path for one in finding.scan(tmp_path, bests=False)] == [saved]
    retention.remove(ckpt.WRITERS[layout].files(saved))
    assert [one.path for one in ckpt.find(tmp_path)] == [kept]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_name_with_the_optimizer_is_preferred(layout, tmp_path):
    saved = save(tmp_path, 1, layout=layout)
    kept = ckpt.keep_best(record(1), tmp_path, saved=saved, layout=layout)
    retention.strip(saved)
    (one,) = ckpt.find(tmp_path)
    assert (one.path, one.resumable) == (kept, True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_file_is_read_again(layout, tmp_path):
    """Metadata is cached by inode, size and time of every file."""
    home = save(tmp_path, 1, layout=layout)
    assert [one.problem for one in ckpt.find(tmp_path)] == [None]
    head = ckpt.WRITERS[layout].files(home)[-1]
    for path in sorted(head.rglob("*.pt")) + sorted(head.rglob("*.safetensors")) if head.is_dir() else [head]:
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        assert [bool(one.problem) for one in ckpt.find(tmp_path)] == [True], path
        path.write_bytes(whole)
        assert [one.problem for one in ckpt.find(tmp_path)] == [None]


def test_unchanged_files_are_not_read_again(tmp_path, monkeypatch):
    """A save every step must not open every file of the folder again."""
    for layout in LAYOUTS:
        save(tmp_path, 1, layout=layout)
    first, asked = ckpt.find(tmp_path), []
    for kind in {type(layout) for layout in ckpt.WRITERS.values()}:
        read = kind.read_metadata
        monkeypatch.setattr(
            kind, "read_metadata", lambda one, path, read=read: (asked.append(path), read(one, path))[1]
        )
    assert ckpt.find(tmp_path) == first
    assert asked == []
    os.utime(first[-1].path)
    assert len(ckpt.find(tmp_path)) == len(first)
    assert asked == [first[-1].path]


def test_run_folders_hold_only_layouts_that_are_written_there(tmp_path):
    """Any other folder may lie beside checkpoints, with any content."""
    seen = save(tmp_path, 1, layout="stepfiles")
    elsewhere = tmp_path / "one" / "mine"
    elsewhere.mkdir()
    for layout in LAYOUTS:
        save(elsewhere, 2, layout=layout)
    for place in (tmp_path / "one", tmp_path / "downloads"):
        save(place, 3)
        hugging_face_folder(place / "gpt2")
    assert [one.path for one in ckpt.find(tmp_path)] == [seen]


def test_a_checkpoint_folder_is_not_a_folder_of_checkpoints(tmp_path):
    home = save(tmp_path, 1, layout="directory")
    shutil.copy(save(tmp_path / "other", 2), home / "checkpoint.pt")
    assert [one.path for one in ckpt.find(tmp_path)] == [home]


def test_a_damaged_checkpoint_of_another_run_hides_nothing(tmp_path):
    first = save(tmp_path, 1, layout="consolidated")
    second = save(tmp_path, 2, layout="stepfiles")
    (second.parent / "step_000002_state.json").write_text("{")
    assert newest(tmp_path) == first
    path, notes = ckpt.resolve("latest", tmp_path)
    assert path == first
    assert notes[0].startswith(f"skipped: {second.parent / 'step_000002_state.json'}: ")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_to_name_a_checkpoint_in_every_layout(layout, tmp_path, monkeypatch):
    set_clock(monkeypatch, NOON)  # no name has these steps in its time
    paths = [
        save(tmp_path, step, layout=layout, validation_loss=loss) for step, loss in ((30, 2.0), (40, 1.0), (20, 3.0))
    ]
    place = paths[0].parent
    wishes = {"latest": 20, "best": 40, str(tmp_path): 20, f"{place}/*": 40, f"{place}/*30*": 30}
    for name, step in wishes.items():
        path, _ = ckpt.resolve(name, tmp_path)
        assert ckpt.load(path).step == step, name
        assert path in paths
    _, notes = ckpt.resolve(f"{place}/*", tmp_path)
    assert notes == [f"{place}/* matches 3: taking {paths[1]}"]  # of several files each is one checkpoint


def test_a_run_folder_is_a_folder_of_checkpoints(tmp_path):
    paths = [save(tmp_path, step, layout="stepfiles", run_id=run) for step, run in ((1, "a"), (2, "a"), (3, "b"))]
    assert ckpt.resolve(str(tmp_path / "a"), tmp_path)[0] == paths[1]
    assert ckpt.whole_folder(str(tmp_path / "a")) == tmp_path / "a"
    home = save(tmp_path, 4, layout="consolidated")
    assert ckpt.whole_folder(str(home)) is None
    assert ckpt.whole_folder(str(home / "consolidated")) is None
    assert ckpt.resolve(str(home / "consolidated"), tmp_path) == (
        home, [f"{home / 'consolidated'} is part of {home}, which is used"],
    )  # fmt: skip


def test_scanning_opens_a_file_as_often_and_works_as_little_among_200_as_among_20(tmp_path):
    path, work = save(tmp_path / "one", 1), {}
    for count in (2, 20, 200):  # the first has what is done once, like an import
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            shutil.copy(path, folder / f"copy{number}.pt")
        (found, openings), made = calls(lambda folder=folder: opened(lambda: list(finding.scan(folder)), folder))
        assert len(found) == count
        work[count] = openings, made
    assert (work[20][0], work[200][0]) == (20, 200)
    assert work[200][1] < 11 * work[20][1]


# ---------------------------------------------------------------------------------------------------------------------
# resolve: what CHECKPOINT_PATH means


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with steps 10000, 9500 and 20 of a run, saved in this order; step 9500 is the best."""
    folder = tmp_path / "checkpoints"
    for step, loss in ((10000, 2.0), (9500, 1.0), (20, 3.0)):
        save(folder, step, validation_loss=loss)
    return folder


def step_of(answer: tuple[Path, list[str]]) -> int:
    return ckpt.load(answer[0]).step


@pytest.mark.parametrize(
    ("name", "step"),
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
def test_every_way_to_name_a_checkpoint(name, step, folder):
    path, notes = ckpt.resolve(name.format(folder=folder), folder)
    assert ckpt.load(path).step == step
    assert any(f"taking {path}" in note for note in notes)


def test_a_file_resolves_to_itself(folder):
    for path in folder.glob("*.pt"):
        assert ckpt.resolve(str(path), Path("elsewhere")) == (path, [])


def test_a_glob_reports_its_matches_and_ties_go_to_the_later_save(folder):
    second = save(folder, 10000)
    path, notes = ckpt.resolve(f"{folder}/*step10000*", folder)
    assert path == second
    assert notes == [f"{folder}/*step10000* matches 2: taking {second}"]


def test_a_folder_and_a_name_with_glob_characters(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert step_of(ckpt.resolve("~/checkpoints", Path("elsewhere"))) == 20
    assert step_of(ckpt.resolve("~/checkpoints/*", Path("elsewhere"))) == 10000
    odd = folder.parent / "odd[1]*.pt"
    shutil.copy(next(folder.glob("*step9500*")), odd)
    assert ckpt.resolve(str(odd), folder) == (odd, [])


def test_a_checkpoint_folder_resolves_to_itself(tmp_path):
    foreign = hugging_face_folder(tmp_path / "gpt2")
    assert ckpt.resolve(str(foreign), tmp_path) == (foreign, [])


def test_damaged_checkpoints_are_skipped_with_a_note(folder):
    damaged = ckpt.resolve("latest", folder)[0]
    flipped(damaged, damaged.stat().st_size - 20)
    path, notes = ckpt.resolve("latest", folder)
    assert ckpt.load(path).step == 9500
    assert notes[0].startswith(f"skipped: {damaged}: ")
    assert notes[-1] == f"taking {path}"


# What is requested, the folder that is searched, the path in the error, and what its remedy lists.
MISSING = [
    ("latest", "{empty}/none", "{empty}/none", "there is no folder {empty}/none"),
    ("latest", "{empty}", "{empty}", "{empty} holds no checkpoint"),
    ("best", "{empty}", "{empty}", "was ENABLE_CHECKPOINTS=true set when training?"),
    ("latest", "{empty}/file.txt", "{empty}/file.txt", "{empty}/file.txt is no folder: name the folder that holds"),
    ("{folder}/missing.pt", "{empty}", "{folder}/missing.pt", "{folder} holds checkpoint_"),
    ("{empty}/no/missing.pt", "{folder}", "{empty}/no/missing.pt", "{folder} holds checkpoint_"),
    ("{folder}/*step7*", "{empty}", "{folder}/*step7*", "{folder} holds checkpoint_"),
    ("{empty}", "{folder}", "{empty}", "{empty} holds no checkpoint"),
    ("{folder}/" + "x" * 300, "{folder}", "{folder}/" + "x" * 300, "{folder} holds checkpoint_"),
    ("~no-such-user-of-this-machine/x.pt", "{folder}", "~no-such-user-of-this-machine/x.pt", "{folder} holds "),
]


def missing_error(function, name: str, folder: Path, empty: Path, *, where: str) -> CheckpointError:
    """The error of `function` for a checkpoint that does not exist, with the folders put into `name` and `where`."""
    empty.mkdir()
    (empty / "file.txt").touch()
    with pytest.raises(CheckpointError) as caught:
        function(name.format(folder=folder, empty=empty), Path(where.format(folder=folder, empty=empty)))
    assert caught.value.kind == "not found"
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(("name", "where", "path", "listed"), MISSING)
def test_a_missing_checkpoint_is_refused_with_a_listing(name, where, path, listed, folder, tmp_path):
    empty = tmp_path / "empty"
    error = missing_error(ckpt.resolve, name, folder, empty, where=where)
    assert error.path == Path(path.format(folder=folder, empty=empty))
    assert listed.format(folder=folder, empty=empty) in error.remedy


def test_a_folder_of_damaged_checkpoints_is_not_called_empty(folder):
    for path in folder.glob("*.pt"):
        path.write_bytes(b"PK\x03\x04")
    for name in ("latest", str(folder), f"{folder}/*"):
        with pytest.raises(CheckpointError, match=r"skipped: .*is damaged") as caught:
            ckpt.resolve(name, folder)
        assert caught.value.kind == "damaged"
    assert ckpt.listing(folder).count("(damaged)") == 3


def test_a_folder_that_may_not_be_listed_is_not_called_empty():
    with walkable_folder() as outer:
        folder = outer / "checkpoints"
        save(folder)
        folder.chmod(0o311)
        for name in ("latest", str(folder), f"{folder}/missing.pt"):
            answer = in_child(lambda name=name: ckpt.resolve(name, folder), as_nobody=True)
            assert answer.startswith("CheckpointError")
            assert str(folder) in answer
            assert "cannot be listed (Permission denied)" in answer
        folder.chmod(0o755)


def test_a_listing_is_one_line_newest_first(tmp_path):
    for step in range(10):
        save(tmp_path, step)
    listing = ckpt.listing(tmp_path)
    assert listing.startswith(f"{tmp_path} holds checkpoint_bigram_letters_step0009_")
    assert listing.endswith(" and 2 more")
    assert listing.count("checkpoint_") == 8


def test_find_and_latest_in_a_checkpoint_folder_return_it(tmp_path):
    path = ckpt.save(record(3), tmp_path, layout="directory")
    assert [(one.path, one.step) for one in ckpt.find(path)] == [(path, 3)]
    assert ckpt.resolve("latest", path)[0] == path


def test_a_folder_that_cannot_be_listed_does_not_stop_a_save():
    """Like the lost+found of a file system."""
    with walkable_folder() as outer:
        folder = outer / "checkpoints"
        (folder / "lost+found").mkdir(parents=True)
        ckpt.save(record(1), folder)
        (folder / "lost+found").chmod(0)
        steps = in_child(lambda: [one.step for one in ckpt.find(folder)], as_nobody=True)
        (folder / "lost+found").chmod(0o755)
        assert steps == [1]


def test_a_close_match_is_suggested_for_a_misspelt_word(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        ckpt.resolve("lastest", tmp_path)
    assert caught.value.path == Path("lastest")
    assert "did you mean latest?" in caught.value.remedy


# ---------------------------------------------------------------------------------------------------------------------
# several: CHECKPOINT_PATH where many checkpoints are allowed


def steps_of(name: str, folder: Path) -> list[int]:
    """Return the steps of the checkpoints that `several` returns, in order."""
    return [ckpt.load(path).step for path in ckpt.several(name.format(folder=folder), folder)[0]]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("latest", [20]),
        ("best,latest", [9500, 20]),
        ("{folder}", [10000, 9500, 20]),  # as they were saved
        ("{folder}/*", [10000, 9500, 20]),
        ("{folder}/*step[12]*", [10000]),
        ("latest,{folder}/*step9500*,best,{folder}", [20, 9500, 10000]),  # as they were named, each once
    ],
)
def test_every_way_to_name_several_checkpoints(name, steps, folder):
    assert steps_of(name, folder) == steps


def test_several_files_by_name_and_one_whose_name_holds_a_comma(folder):
    oldest, _, newest = (one.path for one in ckpt.find(folder))
    assert ckpt.several(f"{newest},{oldest}", Path("elsewhere")) == ([newest, oldest], [])
    odd = folder.parent / "a,b.pt"
    shutil.copy(oldest, odd)
    assert ckpt.several(str(odd), Path("elsewhere")) == ([odd], [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_checkpoint_of_several_files_is_listed_once(layout, tmp_path):
    paths = [save(tmp_path, step, layout=layout) for step in (3, 1)]
    for name in (str(tmp_path), f"{paths[0].parent}/*", f"{paths[0]},{paths[1]}"):
        assert ckpt.several(name, tmp_path)[0] == paths, name


def test_damaged_checkpoints_among_several_are_skipped_and_a_folder_without_valid_ones_is_refused(folder):
    damaged = ckpt.resolve("latest", folder)[0]
    damaged.write_bytes(damaged.read_bytes()[:-30])
    for name in (str(folder), f"{folder}/*"):
        paths, notes = ckpt.several(name, folder)
        assert [ckpt.load(path).step for path in paths] == [10000, 9500]
        assert len(notes) == 1
        assert notes[0].startswith(f"skipped: {damaged}: ")
    for path in folder.glob("*.pt"):
        path.write_bytes(b"PK\x03\x04")
    for name in (str(folder), f"{folder}/*"):
        with pytest.raises(CheckpointError, match=r"skipped: .*is damaged"):
            ckpt.several(name, folder)


@pytest.mark.parametrize(("name", "where", "path", "listed"), MISSING)
def test_one_missing_checkpoint_among_several_is_refused(name, where, path, listed, folder, tmp_path):
    empty = tmp_path / "empty"
    error = missing_error(ckpt.several, f"{folder},{name}", folder, empty, where=where)
    assert error.path == Path(path.format(folder=folder, empty=empty))
    assert listed.format(folder=folder, empty=empty) in error.remedy


def test_several_checkpoints_are_refused_where_one_is_expected(folder):
    with pytest.raises(CheckpointError) as caught:
        ckpt.resolve(",".join(str(path) for path in folder.glob("*.pt")), folder)
    assert caught.value.kind == "not found"
    assert (caught.value.problem, caught.value.remedy) == ("not a single checkpoint", "name one of them here")


def test_a_misspelt_path_beside_many_folders_is_not_found_soon(tmp_path, monkeypatch):
    for number in range(300):
        (tmp_path / f"{number:03d}").mkdir()
    looked = []
    scan = resolving.scan

    def counted(place):
        looked.append(place)
        if len(looked) == 3:
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(resolving, "scan", counted)
    with pytest.raises(CheckpointError) as caught:
        resolving.resolve(str(tmp_path / "nope.pt"), tmp_path)
    assert caught.value.kind == "not found"
    assert len(looked) < 300
