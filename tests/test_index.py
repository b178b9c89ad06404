"""What is remembered of a folder's checkpoints: equal to what a first look finds, whatever was done to the folder."""

import contextlib
import dataclasses
import functools
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from foreign_programs import CHARS, golden_lecture, golden_nano, nanogpt, write_lecture_folder
from records import bits, record, save
from work import calls, opened

from milepost import ckpt
from milepost.ckpt import index, retention
from milepost.ckpt.finding import scan
from milepost.ckpt.layouts import LAYOUTS, WRITERS
from milepost.ckpt.saving import save as save_record
from milepost.ckpt.tensors import digest
from milepost.files import watching


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> list[Path]:
    """Return checkpoints of every layout that is written, of other programs, and files that are none."""
    folder = tmp_path_factory.mktemp("pool")
    paths = []
    for layout in WRITERS:
        path = save(folder / layout, 3, layout=layout, run_id="run")
        paths += [each for each in path.parent.iterdir() if not each.name.startswith(".")]
    (folder / "others").mkdir()
    torch.save(nanogpt(golden_nano()), folder / "others" / "ckpt.pt")
    write_lecture_folder(folder / "others" / "dante", golden_lecture(), {"token_kind": "char", "chars": CHARS}, step=7)
    (folder / "others" / "notes.txt").write_text("a note")
    (folder / "others" / "empty").mkdir()
    return paths + sorted((folder / "others").iterdir())


def put(source: Path, target: Path) -> None:
    """Copy it; in the place of a file it is a new file."""
    if source.is_dir() and not target.exists():
        shutil.copytree(source, target)
    elif source.is_file() and not target.is_dir():
        shutil.copy(source, target.with_name(".new"))
        target.with_name(".new").replace(target)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def change(draw: random.Random, folder: Path, pool: list[Path], *, in_place: bool) -> str:
    """Do one thing to the folder that people and programs do; return what."""
    places = [folder, folder / "best", folder / "run", folder / "run" / "best"]
    source, place, inside = draw.choice(pool), draw.choice(places), sorted(folder.rglob("*"))
    inside = inside if in_place else [path for path in inside if path.parent in places]  # none in a checkpoint's folder
    chosen = draw.choice(inside) if inside else None
    other = draw.choice(["model.safetensors", "manifest.json", "latest.pt", "X-model.pt", "X-optimizer.pt", "copy.pt"])
    action = draw.choice(["put", "put", "put", "name", "remove", "rename", "link", "folder", *["rewrite"] * in_place])
    place.mkdir(exist_ok=True, parents=True)
    if action in ("put", "name"):
        put(source, place / (source.name if action == "put" else other))
    elif action == "folder":
        (place / draw.choice(["run", "sub", ".hidden"])).mkdir(exist_ok=True)
    elif chosen is None or not chosen.exists():
        return "nothing"
    elif action == "remove":
        remove(chosen)
    elif action == "rename" and not (place / chosen.name).exists() and chosen not in (place, *place.parents):
        chosen.rename(place / chosen.name)
    elif action == "link" and not (place / f"link{other}").is_symlink():
        (place / f"link{other}").symlink_to(chosen)
    elif action == "rewrite" and chosen.is_file():
        chosen.write_bytes(chosen.read_bytes()[: draw.choice([10, 100])] + b"x")
    return action


def seen(folder: Path, *, fresh: bool) -> list[tuple]:
    found = sorted(scan(folder, looks=None if fresh else {}), key=lambda each: each.path)
    return [dataclasses.astuple(each) for each in found]


@pytest.fixture(params=["watched", "listed"])
def is_watched(request, monkeypatch) -> bool:
    """Whether the system reports what changes in a folder, or it is listed at each look."""
    if request.param == "listed":
        monkeypatch.setattr(watching, "WATCHED", ())
    return request.param == "watched"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fresh", [True, False])
def test_a_second_look_finds_what_a_first_look_would(tmp_path, pool, seed, fresh, is_watched):
    draw, folder, kinds = random.Random(seed), tmp_path / "checkpoints", set()
    folder.mkdir()
    for _ in range(40):
        done = change(draw, folder, pool, in_place=fresh)
        remembered = seen(folder, fresh=fresh)
        index._last_listing.cache_clear()
        first = seen(folder, fresh=True)
        assert remembered == first, done
        kinds |= {found[3] for found in first}
        index._last_listing.cache_clear()
        assert seen(folder, fresh=False) == first  # what the next look knows
    assert len(kinds) > 3
    assert kinds <= {layout.name for layout in LAYOUTS}


def test_control_a_file_rewritten_in_place_is_seen_by_a_fresh_look_or_where_the_folder_is_watched(tmp_path, is_watched):
    path = save(tmp_path, 3)
    before = seen(tmp_path, fresh=True)
    path.write_bytes(b"no checkpoint any more")
    assert (seen(tmp_path, fresh=False) != before) == is_watched
    assert seen(tmp_path, fresh=True) != before


def test_what_was_rewritten_in_place_is_not_pruned(tmp_path, is_watched):
    """A save takes known files as they were, but looks again at what it is about to delete."""
    paths = [save(tmp_path, step, run_id="run") for step in (1, 2, 3, 4)]
    list(scan(tmp_path))
    paths[0].write_bytes(paths[3].read_bytes())  # the first is now a copy of the last
    gone = retention.prune(tmp_path, run_id="run", keep_last=2, keep_every=0, latest_valid=paths[3])
    assert [found.path for found in gone.remove] == [paths[1]]
    assert [path.exists() for path in paths] == [True, False, True, True]


LISTED: list[str] | None = None


def _note_listing(event: str, arguments: tuple) -> None:
    if LISTED is not None and event in ("os.scandir", "os.listdir"):
        LISTED.append(str(arguments[0]))


sys.addaudithook(_note_listing)  # Python cannot remove it; it notes nothing outside of `listed`


def listed(action: Callable[[], object], folder: Path) -> int:
    """Return how often `action` lists the folder itself."""
    return with_listings(action, folder)[1]


def with_listings(action: Callable[[], Any], folder: Path) -> tuple[Any, int]:
    """Return the result of `action`, and how often it lists the folder itself."""
    global LISTED
    LISTED = []
    try:
        return action(), LISTED.count(str(folder))
    finally:
        LISTED = None


def saved_as_in_training(step: int, folder: Path, *, layout: str = "unified") -> Path:
    own = dataclasses.replace(record(step), run_id="run")
    path = save_record(own, folder, layout=layout)
    ckpt.keep_best(own, folder, saved=path, layout=layout)
    ckpt.prune(folder, run_id="run", keep_last=2, keep_every=0, latest_valid=path)
    return path


def test_an_operation_lists_a_folder_once_however_often_it_asks(tmp_path, monkeypatch):
    """Two listings more read the names of leftovers and of notes, one the links, and one the adapters below, which are
    looked for after it is known what expires.
    """
    monkeypatch.setattr(watching, "WATCHED", ())
    for step in range(1, 6):
        saved_as_in_training(step, tmp_path)
    assert 0 < listed(lambda: saved_as_in_training(6, tmp_path), tmp_path) <= 8
    looks: index.Looks = {}
    assert listed(lambda: [list(scan(tmp_path, looks=looks)) for _ in range(3)], tmp_path) == 1
    assert listed(lambda: [list(scan(tmp_path, looks={})) for _ in range(3)], tmp_path) == 3  # the control
    assert listed(lambda: [list(scan(tmp_path)) for _ in range(3)], tmp_path) == 3


def test_adapters_that_come_while_it_is_decided_what_expires_keep_their_base(tmp_path, monkeypatch, is_watched):
    """They are looked for after the decision, not in the listing that it was made from."""
    paths = [save(tmp_path, step, run_id="run") for step in (1, 2, 3)]
    decide = retention.expired

    def deciding(found, **policy):
        gone = decide(found, **policy)
        base = {"sha256": digest(ckpt.load(paths[0]).model_state), "source": str(paths[0]), "step": 1}
        save(tmp_path, 9, run_id="adapters", base=base, parts=["adapters"])
        return gone

    monkeypatch.setattr(retention, "expired", deciding)
    with monkeypatch.context() as patch:
        patch.setattr("milepost.ckpt.saving.folder_lock", contextlib.nullcontext)  # as on another machine without locks
        gone = retention.prune(tmp_path, run_id="run", keep_last=1, keep_every=0, latest_valid=paths[2])
    assert [found.path for found in gone.remove] == [paths[1]]
    assert [path.exists() for path in paths] == [True, False, True]


@pytest.mark.parametrize("layout", WRITERS)
def test_a_save_opens_no_other_checkpoint_and_costs_little_more_among_many(tmp_path, layout):
    work = {}
    for count in (2, 20, 200):  # the first has what is done once, like an import
        folder = tmp_path / str(count)
        one = save(folder, 1, layout=layout, run_id="other")
        for number in range(count):
            copied = one.with_name(f"copy{number}{one.name}")
            (shutil.copytree if one.is_dir() else shutil.copy)(one, copied)

        def action(step: int, folder: Path = folder) -> Path:
            own = dataclasses.replace(record(step), run_id="run")
            path = save_record(own, folder, layout=layout)
            ckpt.keep_best(own, folder, saved=path, layout=layout)
            ckpt.prune(folder, run_id="run", keep_last=2, keep_every=0, latest_valid=path)
            return path

        for step in range(2, 6):
            action(step)
        (path, openings), made = calls(lambda action=action, folder=folder: opened(lambda: action(6), folder))
        assert bits(ckpt.load(path)) == bits(record(6))
        work[count] = openings, made
    assert work[200][0] == work[20][0]
    assert work[200][1] - work[20][1] < 180 * 150  # function calls for each checkpoint that is not read


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports what changes in a folder")
@pytest.mark.parametrize("layout", WRITERS)
def test_a_save_after_the_first_does_the_same_work_among_ten_times_as_many(tmp_path, layout, is_watched):
    """It lists no folder that holds them, and takes the status of as many names and opens as many files."""
    work = {}
    for count in (2, 20, 200):  # the first has what is done once, like an import
        folder = tmp_path / str(count)
        one = save(folder, 1, layout=layout, run_id="other")
        for number in range(count):
            (shutil.copytree if one.is_dir() else shutil.copy)(one, one.with_name(f"copy{number}{one.name}"))
        for step in range(2, 8):
            saved_as_in_training(step, folder, layout=layout)

        work[count] = work_of(functools.partial(saved_as_in_training, 8, folder, layout=layout), one.parent)
    if is_watched:
        assert work[20] == work[200]
        assert work[200][2] == 0
    else:  # the control
        assert work[200][2] > 0


def work_of(action: Callable[[], object], folder: Path) -> tuple[int, int, int]:
    """Return how many names `action` takes the status of, how many files it opens, and how often it lists `folder`."""
    (taken, openings), listings = with_listings(lambda: opened(lambda: statuses_taken(action), folder), folder)
    return taken, openings, listings


def statuses_taken(action: Callable[[], object]) -> int:
    """Return how many names `action` takes the status of."""
    taken = 0

    def each(frame: FrameType, event: str, function: Any) -> None:
        nonlocal taken
        taken += event == "c_call" and function in (os.stat, os.lstat)

    before = sys.getprofile()
    sys.setprofile(each)
    try:
        action()
    finally:
        sys.setprofile(before)
    return taken
