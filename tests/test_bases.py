"""Retention and adapters: the base of saved adapters is never deleted, neither by its run nor by a policy."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from drive import at_step, train
from records import record
from script import call, script
from test_lora import SHAPE_OF_THE_BASE, WITH

import training
from milepost import ckpt
from milepost.ckpt import retention
from milepost.ckpt.layouts import WRITERS
from milepost.ckpt.tensors import digest

pruner, loader = script("prune_checkpoints"), script("load_checkpoint")
ADAPTERS = SHAPE_OF_THE_BASE | WITH | {"CHECKPOINT_ADAPTERS_ONLY": "true"}
LAYOUTS = sorted(WRITERS)


def base_run(folder: Path) -> dict[int, Path]:
    """Return the ordinary checkpoints, by step, of a run stopped after step 6."""
    folder.mkdir(exist_ok=True)
    assert train(folder, CHECKPOINT_INTERVAL="2", SAMPLE_INTERVAL="0", CHECKPOINT_KEEP_BEST="0")[0] == 0
    at_step(folder, 8).unlink()
    return {step: at_step(folder, step) for step in (2, 4, 6)}


def tuned(folder: Path, base: Path, **changes: str) -> str:
    """Train adapters from a base; return the log."""
    code, said = train(folder, INIT_FROM=str(base), **ADAPTERS | changes)
    assert code == 0, said
    return said


def opens(folder: Path, **changes: str | Path) -> bool:
    """Whether the newest adapters generate text with only their own path set."""
    return call(loader, folder, PROMPT="a", MAX_NEW_TOKENS="3", **changes).code == 0


@pytest.mark.parametrize("by", ["script", "run"])
def test_the_base_of_adapters_in_the_folder_stays(by, tmp_path):
    bases = base_run(tmp_path)
    tuned(tmp_path, bases[2])
    if by == "script":
        shown = call(pruner, tmp_path, CHECKPOINT_KEEP_LAST="1")
        said = call(pruner, tmp_path, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
        assert said.code == 0
        for text in (shown.out, said.out):
            (line,) = (line for line in text.splitlines() if line.startswith("kept: the base of "))
            place = str(tmp_path / "checkpoints")
            assert line.startswith(f"kept: the base of {place}")
            assert line.endswith(f" {bases[2]}")
    else:
        code, said = train(tmp_path, RESUME=str(bases[6]), CHECKPOINT_KEEP_LAST="1", CHECKPOINT_INTERVAL="1")
        assert code == 0, said
    assert bases[2].exists()
    assert not bases[4].exists()  # the control
    adapters = next(one for one in ckpt.find(tmp_path / "checkpoints") if "adapters" in one.metadata["parts"])
    assert opens(tmp_path, CHECKPOINT_PATH=adapters.path)


def test_adapters_in_another_folder_leave_a_note_beside_their_base(tmp_path):
    bases = base_run(tmp_path / "base")
    said = tuned(tmp_path, bases[2])
    (note,) = (tmp_path / "base" / "checkpoints").glob(".base-*.json")
    assert str(note) in said
    assert json.loads(note.read_text())["needed_by"] == str(tmp_path / "checkpoints")
    assert call(pruner, tmp_path / "base", CHECKPOINT_KEEP_LAST="1", DRY_RUN="false").code == 0
    assert [bases[step].exists() for step in (2, 4, 6)] == [True, False, True]
    assert opens(tmp_path)
    note.unlink()  # the control
    assert call(pruner, tmp_path / "base", CHECKPOINT_KEEP_LAST="1", DRY_RUN="false").code == 0
    assert not bases[2].exists()
    assert not opens(tmp_path)


def test_the_base_stays_while_its_adapters_are_not_saved_yet(tmp_path, monkeypatch):
    bases, said = base_run(tmp_path), []
    start = training.log_start

    def prune_first(run):
        said.append(call(pruner, tmp_path, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false").code)
        said.append([bases[step].exists() for step in (2, 4, 6)])
        start(run)

    monkeypatch.setattr(training, "log_start", prune_first)
    tuned(tmp_path, bases[2])
    assert said == [0, [True, False, True]]
    assert list(tmp_path.rglob(".base-*")) == []  # the saved adapters say it themselves
    assert opens(tmp_path)


def test_the_base_of_another_program_stays(tmp_path):
    whole = ckpt.load(base_run(tmp_path / "base")[2])
    folder = tmp_path / "old"
    folder.mkdir()
    for step in (100, 200, 300):
        config = {name: value for name, value in whole.model_settings.items() if isinstance(value, int)}
        content = {
            "model": whole.model_state,
            "model_args": config,
            "iter_num": step,
            "chars": whole.tokenizer["chars"],
        }
        torch.save(content, folder / f"ckpt_{step}.pt")
    tuned(tmp_path, folder / "ckpt_100.pt")
    asked = {"CHECKPOINT_KEEP_LAST": "1", "PRUNE_OTHERS": "ckpt_", "DRY_RUN": "false"}
    assert call(pruner, tmp_path, CHECKPOINT_DIR=folder, **asked).code == 0
    assert [path.name for path in sorted(folder.glob("*.pt"))] == ["ckpt_100.pt", "ckpt_300.pt"]
    assert opens(tmp_path)


def test_the_base_of_a_copy_of_adapters_in_a_folder_of_the_user_stays(tmp_path):
    bases = base_run(tmp_path)
    tuned(tmp_path, bases[2], CHECKPOINT_KEEP_BEST="0")
    own = [one.path for one in ckpt.find(tmp_path / "checkpoints") if "adapters" in one.metadata["parts"]]
    mine = tmp_path / "checkpoints" / "mine" / "2026"
    mine.mkdir(parents=True)
    shutil.move(own[-1], mine / "favourite.pt")
    for path in own[:-1]:
        path.unlink()
    assert call(pruner, tmp_path, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false").code == 0
    assert [bases[step].exists() for step in (2, 4, 6)] == [True, False, True]
    assert opens(tmp_path, CHECKPOINT_PATH=mine / "favourite.pt")


def test_a_base_that_retention_never_deletes_gets_no_note(tmp_path):
    bases = base_run(tmp_path / "base")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    tuned(tmp_path / "one", Path(shutil.copy(bases[2], tmp_path / "a base of mine.pt")))
    tuned(tmp_path / "two", bases[2], CHECKPOINT_ADAPTERS_ONLY="false")
    assert list(tmp_path.rglob(".base-*")) == []


def adapters_of(base: Path, **changes: object) -> ckpt.Checkpoint:
    """Return a record of adapters that records its base as a run does."""
    whole = ckpt.load(base)
    named = {"sha256": digest(whole.model_state), "source": str(base), "step": whole.step}
    return dataclasses.replace(record(1, run_id="tuned"), parts=["adapters"], base=named | changes)


def saved(folder: Path, layout: str) -> list[Path]:
    return [ckpt.save(record(step), folder, layout=layout) for step in (10, 20, 30)]


def pruned(folder: Path, newest: Path, *, keep_every: int = 0) -> retention.Expired:
    return ckpt.prune(folder, run_id="one", keep_last=1, keep_every=keep_every, latest_valid=newest)


@pytest.mark.parametrize("known", ["by path", "by weights", "by path alone"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_base_in_every_layout_is_recognised_by_its_path_or_weights(layout, known, tmp_path):
    paths = saved(tmp_path, layout)
    changes = {"by path": {}, "by weights": {"source": "/gone/base.pt"}, "by path alone": {"sha256": "0" * 64}}[known]
    adapters = ckpt.save(adapters_of(paths[0], **changes), tmp_path)
    assert pruned(tmp_path, paths[2]).kept == {paths[0]: adapters}
    assert [path.exists() for path in paths] == [True, False, True]
    adapters.unlink()
    pruned(tmp_path, paths[2])
    assert not paths[0].exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_base_that_loses_its_optimizer_is_still_found(layout, tmp_path):
    paths = saved(tmp_path, layout)
    before = adapters_of(paths[0])
    ckpt.save(before, tmp_path)
    pruned(tmp_path, paths[2], keep_every=10)
    assert digest(ckpt.load(paths[0]).model_state) == before.base["sha256"]
    assert not ckpt.find(tmp_path)[1].resumable  # the control: step 20, or the base, was stripped


def test_the_base_of_a_copy_of_adapters_and_of_adapters_in_best_stays(tmp_path):
    for place in ("renamed", "best"):
        folder = tmp_path / place
        paths = saved(folder, "unified")
        adapters = ckpt.save(adapters_of(paths[0]), folder, best_only=place == "best")
        if place == "renamed":
            adapters.rename(folder / "mine.pt")
        pruned(folder, paths[2])
        assert paths[0].exists()


def test_a_base_in_best_is_not_replaced_by_a_better_checkpoint(tmp_path):
    first, second = (record(step, validation_loss=1 / step) for step in (1, 2))
    base = ckpt.keep_best(first, tmp_path, saved=None)
    ckpt.save(adapters_of(base), tmp_path)
    ckpt.keep_best(second, tmp_path, saved=None)
    assert base.exists()


def test_a_base_whose_weights_cannot_be_read_stays(tmp_path):
    paths = saved(tmp_path, "unified")
    ckpt.save(adapters_of(paths[0], source="/gone/base.pt"), tmp_path)
    with open(paths[0], "r+b") as file:
        file.seek(paths[0].read_bytes().index(b"PK", 4) + 26)
        file.write(b"\xff\xff")
    pruned(tmp_path, paths[2])
    assert paths[0].exists()
    assert not paths[1].exists()


def test_a_note_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    bases = base_run(tmp_path / "base")

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("milepost.ckpt.bases.new_file", refused)
    said = tuned(tmp_path, bases[2])
    assert f"pruning may delete {bases[2]}" in said


# ---------------------------------------------------------------------------------------------------------------------
# A base that was moved


lister = script("list_checkpoints")


def listed_bases(folder: Path) -> list[list[str]]:
    """Return the rows of the list's table of bases, without its header."""
    out = call(lister, folder).out
    rows = out.split("\n\n")[-1].splitlines() if "need base" in out else []
    return [re.split(" {2,}", row.strip()) for row in rows[1:]]  # paths may have single spaces


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Return a folder with a base run in base/checkpoints, and adapters trained from its step 2 in
    adapters/checkpoints.
    """
    folder = tmp_path_factory.mktemp("project")
    bases = base_run(folder / "base")
    (folder / "adapters").mkdir()
    tuned(folder / "adapters", bases[2])
    return folder


@pytest.fixture
def gone(project, tmp_path) -> Iterator[Path]:
    """Return a copy of the project while the original is elsewhere."""
    hidden = tmp_path / "hidden"
    shutil.copytree(project, tmp_path / "moved")
    project.rename(hidden)
    yield tmp_path / "moved"
    hidden.rename(project)


def test_a_base_where_it_was_is_listed_as_found(project):
    ((_, source, state),) = listed_bases(project / "adapters")
    assert Path(source) == next((project / "base" / "checkpoints").glob("*step0002*"))
    assert state == "found"


def test_a_base_that_was_moved_together_with_its_adapters_is_found(gone):
    (base,) = (gone / "base" / "checkpoints").glob("*step0002*")
    ((_, _, state),) = listed_bases(gone / "adapters")
    assert state == f"found in {base}"
    assert opens(gone / "adapters")


def test_a_base_beside_the_adapters_is_found_by_its_weights_under_any_name(gone):
    (base,) = (gone / "base" / "checkpoints").glob("*step0002*")
    base.rename(gone / "adapters" / "checkpoints" / "a base of mine.pt")
    ((_, _, state),) = listed_bases(gone / "adapters")
    assert state == f"found in {gone / 'adapters' / 'checkpoints' / 'a base of mine.pt'}"
    assert opens(gone / "adapters", CHECKPOINT_PATH=newest_adapters(gone))


def test_a_resume_records_where_the_base_is_now(gone):
    """The command that it prints opens its checkpoints, and they open without naming the base."""
    archive = gone / "an archive"
    (gone / "base" / "checkpoints").rename(archive)
    (base,) = archive.glob("*step0002*")
    first = min((found for found in ckpt.find(gone / "adapters" / "checkpoints")), key=lambda found: found.step)
    code, said = train(gone / "adapters", RESUME=str(first.path), BASE_CHECKPOINT=str(archive), **ADAPTERS)
    assert code == 0, said
    (command,) = (line for line in said.splitlines() if line.startswith("next: "))
    assert f"BASE_CHECKPOINT='{base}'" in command
    saved = newest_adapters(gone)
    assert ckpt.load(saved).base["source"] == str(base)
    assert opens(gone / "adapters", CHECKPOINT_PATH=saved)
    assert not opens(gone / "adapters", CHECKPOINT_PATH=first.path)  # the control: it records where the base was


def newest_adapters(folder: Path) -> Path:
    found = ckpt.find(folder / "adapters" / "checkpoints")
    return [each.path for each in found if "adapters" in each.metadata["parts"]][-1]


def test_another_checkpoint_in_the_place_of_a_moved_base_is_not_taken(gone):
    (base,) = (gone / "base" / "checkpoints").glob("*step0002*")
    (other,) = (gone / "base" / "checkpoints").glob("*step0004*")
    other.replace(base)
    ((_, _, state),) = listed_bases(gone / "adapters")
    assert state == "missing"
    assert not opens(gone / "adapters")


def test_a_base_whose_place_another_step_has_taken_is_looked_for_elsewhere(project, tmp_path):
    """As after a program that saves each step to one name; the way out is named by what was there, not by the same path."""
    copied = tmp_path / "copy"
    shutil.copytree(project, copied)
    path = newest_adapters(copied)
    record = ckpt.load(path)
    (base,), (other,) = ((copied / "base" / "checkpoints").glob(f"*step000{step}*") for step in (2, 4))
    record.base = {**(record.base or {}), "source": str(base)}
    shutil.rmtree(path.parent)
    ckpt.save(record, copied / "adapters" / "checkpoints")
    kept = Path(shutil.move(base, tmp_path / "kept.pt"))
    other.replace(base)
    said = call(loader, copied / "adapters", PROMPT="a")
    assert (said.code, f"step 2, which was {base} when they were trained" in said.err) == (2, True), said.err
    assert [state for _, _, state in listed_bases(copied / "adapters")] == ["missing"]
    assert opens(copied / "adapters", BASE_CHECKPOINT=kept)
    beside = Path(shutil.move(kept, copied / "adapters" / "checkpoints" / "kept.pt"))
    assert opens(copied / "adapters")
    assert [state for _, _, state in listed_bases(copied / "adapters")] == [f"found in {beside}"]


def test_a_run_without_adapters_needs_no_base(project):
    assert listed_bases(project / "base") == []


def test_a_named_folder_is_searched_for_the_base_and_not_for_its_latest(tmp_path):
    """A base that was trained further: its folder holds newer checkpoints too."""
    bases = base_run(tmp_path / "base")
    (tmp_path / "adapters").mkdir()
    tuned(tmp_path / "adapters", bases[2])
    (tmp_path / "elsewhere").mkdir()
    elsewhere = Path(shutil.move(tmp_path / "base", tmp_path / "elsewhere" / "deep")) / "checkpoints"
    assert not opens(tmp_path / "adapters")
    assert opens(tmp_path / "adapters", BASE_CHECKPOINT=elsewhere)
    next(elsewhere.glob("*step0002*")).unlink()  # control: then no checkpoint of the folder is the base
    said = call(loader, tmp_path / "adapters", PROMPT="a", BASE_CHECKPOINT=elsewhere)
    assert said.code == 3
    assert "is not the base of" in said.err
