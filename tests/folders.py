"""Checks that hold for a folder of checkpoints at any time, and for a checkpoint that was changed."""

import dataclasses
from pathlib import Path

from records import bits, plain
from saver import of_step

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.finding import BEST_FOLDER, scan
from milepost.ckpt.index import Found, _last_listing
from milepost.ckpt.layouts import layout_of


def in_best(one: Found) -> bool:
    return one.path.parent.name == BEST_FOLDER


def steps_of(found: list[Found], *, best: bool) -> list[int]:
    """The steps in best/, or outside of it, each once."""
    return sorted({one.step for one in found if in_best(one) == best})


def whole(folder: Path, *, in_place: bool = False) -> list[Found]:
    """Return every checkpoint under each of its names; assert that each opens and is bit-identical to what `of_step`
    returns.

    `in_place`: a killed writer may have left halves, which must be refused as such.
    """
    if in_place:
        _last_listing.cache_clear()  # another process wrote marks
    found = list(scan(folder))
    if in_place:
        marked = {file.with_name(file.name[5:-11]) for file in folder.rglob(".tmp-*.unfinished")}
        halves = [one for one in found if marked & set(files_of(one.path))]
        assert {one.kind for one in halves} <= {"lacking"}
        found = [one for one in found if one not in halves]
    assert [one.problem for one in found if one.problem] == []
    for one in found:
        saved = of_step(one.step, str(one.run_id))
        if not one.resumable:
            saved.optimizer_state = None
        assert bits(ckpt.load(one.path, verify=True)) == bits(saved)
    return found


def tidy(folder: Path) -> None:
    """Nothing is hidden that a writer left, and nothing visible that belongs to no checkpoint."""
    assert list(folder.rglob(".tmp-*")) == []
    owned = {file for one in scan(folder) for file in files_of(one.path)}
    places = {folder, *(path for path in folder.rglob("*") if path.is_dir() and layout_of(path) is None)}
    seen = {path for place in places for path in place.iterdir() if not path.name.startswith(".")}
    assert {path for path in seen - owned - places if not any(above in owned for above in path.parents)} == set()


def files_of(home: Path) -> list[Path]:
    """The files, or the folder, that the checkpoint consists of."""
    layout = layout_of(home)
    assert layout is not None
    return layout.files(home)


def every_file(home: Path) -> list[Path]:
    """Each single file of the checkpoint, also those in its folder."""
    return sorted(
        file for one in files_of(home) for file in ([one] if one.is_file() else one.rglob("*")) if file.is_file()
    )


def next_save_clears_up(folder: Path, layout: str, step: int) -> None:
    ckpt.save(of_step(step), folder, layout=layout)
    tidy(folder)
    newest = ckpt.latest(ckpt.find(folder))
    assert newest is not None
    assert newest.step == step


def make_before(folder: Path, layout: str) -> None:
    """A folder with steps 1 and 2, of which 2 is also the best."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in (1, 2):
        path = ckpt.save(of_step(step), folder, layout=layout)
    ckpt.keep_best(of_step(2), folder, saved=path, layout=layout)


def sentence_of(error: BaseException) -> str:
    """The one sentence of a refusal; nothing but a CheckpointError may refuse,
    and never with torch's advice to turn the safety off.
    """
    assert type(error) is CheckpointError, repr(error)
    text = str(error)
    assert text.isprintable()
    assert "weights_only" not in text
    assert 0 < len(text) < 1500
    return text


def opened(path: Path, *, verify: bool = True) -> Checkpoint | str:
    """The record at `path` with every tensor, or the one sentence in which it is refused."""
    try:
        return ckpt.load(path, verify=verify)
    except Exception as error:
        return sentence_of(error)


def same_or_said(outcome: Checkpoint | str, original: Checkpoint) -> bool:
    """Return whether a changed checkpoint was refused; else assert that it is the original in every bit except those
    that its notes name.
    """
    if isinstance(outcome, str):
        return True
    foreign = outcome.written_by.startswith("another program")  # all that says that it is ours is gone
    if outcome.optimizer_state is None and (outcome.notes or foreign):
        original = dataclasses.replace(original, optimizer_state=None)
    return bits(outcome) == bits(original) and (bool(outcome.notes) or foreign or plain(outcome) == plain(original))
