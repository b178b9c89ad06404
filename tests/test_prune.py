"""scripts/prune_checkpoints.py deletes what the policy expires, only with DRY_RUN=false,
and nothing needed or in use.
"""

import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from drive import at_step, small_text, train
from foreign_programs import golden_nano, nanogpt
from records import WEIGHT, flipped, in_child, record, walkable_folder
from script import call, files_of, script

import training
from milepost import api, ckpt
from milepost.ckpt import retention
from milepost.ckpt.layouts import WRITERS
from milepost.ckpt.tensors import digest
from milepost.locks import RunLock

pruner = script("prune_checkpoints")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def save(folder, *steps, run_id="one", layout="unified", **changes):
    return [ckpt.save(record(step, run_id=run_id, **changes), folder / "checkpoints", layout=layout) for step in steps]


def left(folder, run_id="one"):
    """Return the steps of a run in the folder with whether each is resumable."""
    return {one.step: one.resumable for one in ckpt.find(folder / "checkpoints") if one.run_id == run_id}


def disk(folder):
    """Return the bytes of all files, counting hard links once."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({one.st_ino: one.st_size for one in stats}.values())


def test_keep_last_must_be_set(folder):
    save(folder, 1, 2)
    said = call(pruner, folder)
    assert (said.code, said.out) == (2, "")
    assert "CHECKPOINT_KEEP_LAST=0 keeps all: set how many" in said.err
    assert left(folder) == {1: True, 2: True}


def test_a_dry_run_only_reports(folder):
    paths = save(folder, *range(1, 7))
    before = files_of(folder / "checkpoints")
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="2", CHECKPOINT_KEEP_EVERY="4")
    assert said.code == 0
    head, *lines, total = said.out.splitlines()
    assert head.split() == ["step", "frees", "run", "path"]
    assert [(line.split("  ")[0], line.split("  ")[-1]) for line in lines] == [
        ("remove", str(paths[0])), ("remove", str(paths[1])), ("remove", str(paths[2])),
        ("to model-only", str(paths[3])),
    ]  # fmt: skip
    freed = sum(path.stat().st_size for path in paths[:3]) + sum(
        value.nbytes for value in ckpt.load(paths[3]).optimizer_state["state"][0].values()
    )
    assert total == f"{freed:,} bytes would be freed; DRY_RUN=false does it"
    assert files_of(folder / "checkpoints") == before


def everything(folder):
    """Return every path below a folder, hidden files too, with its modification time."""
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_a_dry_run_writes_and_locks_nothing(folder):
    """So that it works in a read-only folder and while the run is training."""
    save(folder, 1, 2, 3)
    before = everything(folder / "checkpoints")
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1")
    assert (said.code, said.out.count("remove ")) == (0, 2)
    assert everything(folder / "checkpoints") == before
    assert call(pruner, folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false").code == 0
    assert everything(folder / "checkpoints") != before  # the control
    lock = RunLock(folder / "checkpoints", "one")
    lock.acquire()
    try:
        again = call(pruner, folder, CHECKPOINT_KEEP_LAST="1")
    finally:
        lock.release()
    assert (again.code, again.out, again.err) == (0, "nothing to delete\n", "")


def test_a_dry_run_works_in_a_read_only_folder():
    with walkable_folder() as reachable:
        (reachable / "checkpoints").mkdir()
        save(reachable, 1, 2, 3)
        small_text(reachable)
        os.chmod(reachable / "checkpoints", 0o555)
        asked, done = (
            in_child(lambda dry=dry: call(pruner, reachable, CHECKPOINT_KEEP_LAST="1", DRY_RUN=dry), as_nobody=True)
            for dry in ("true", "false")
        )
        os.chmod(reachable / "checkpoints", 0o755)
        assert (asked[0], asked[1].count("remove "), asked[2]) == (0, 2, "")
        assert (done[0], done[1]) == (1, "0 bytes freed\n")  # the control
        assert "Permission denied" in done[2]


def test_the_report_lists_actual_and_not_planned_deletions(folder, monkeypatch):
    """One checkpoint cannot be deleted, and a damaged one is not rewritten."""
    first, second, third, *_ = save(folder, 1, 2, 4, 5, 6, size=32)
    size = second.stat().st_size
    weight = ckpt.load(third).model_state[WEIGHT].numpy().tobytes()
    flipped(third, third.read_bytes().find(weight) + 5)
    remove = retention.remove

    def stuck(files):
        if first in files:
            raise PermissionError(1, "Operation not permitted", str(first))
        remove(files)

    monkeypatch.setattr(retention, "remove", stuck)
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="2", CHECKPOINT_KEEP_EVERY="4", DRY_RUN="false")
    assert said.code == 1
    assert str(first) in said.err
    _, *lines, total = said.out.splitlines()
    assert [(line.split()[0], line.split("  ")[-1]) for line in lines] == [("removed", str(second))]
    assert total == f"{size:,} bytes freed"
    assert left(folder) == {1: True, 4: True, 5: True, 6: True}


@pytest.mark.parametrize("layout", WRITERS)
def test_pruning_does_what_the_dry_run_reported(folder, layout):
    save(folder, *range(1, 7), layout=layout, size=64)
    save(folder, 1, 2, run_id="two", layout=layout)
    policy = {"CHECKPOINT_KEEP_LAST": "2", "CHECKPOINT_KEEP_EVERY": "4"}
    said = call(pruner, folder, **policy)
    before, removed = disk(folder / "checkpoints"), int(said.out.splitlines()[-1].split()[0].replace(",", ""))
    done = call(pruner, folder, **policy, DRY_RUN="false")
    assert done.out.splitlines()[-1] == f"{removed:,} bytes freed"
    assert left(folder) == {4: False, 5: True, 6: True}
    assert left(folder, "two") == {1: True, 2: True}
    assert before - disk(folder / "checkpoints") == pytest.approx(removed, rel=0.05)
    assert call(pruner, folder, **policy, DRY_RUN="false").out == "nothing to delete\n"


def test_best_and_final_checkpoints_stay(folder):
    one = record(1, validation_loss=0.1)
    (folder / "checkpoints").mkdir(exist_ok=True)
    saved = ckpt.save(one, folder / "checkpoints")
    best = ckpt.keep_best(one, folder / "checkpoints", saved=saved)
    save(folder, 2, hyperparameters={"TRAINING_STEPS": 2})
    save(folder, 3, 4)
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert said.code == 0
    assert left(folder) == {1: True, 2: True, 4: True}
    assert best.exists()
    assert not saved.exists()
    (line,) = [line for line in said.out.splitlines() if str(saved) in line]
    assert line.split()[2] == "0B"  # it has a second name in best/


@pytest.mark.parametrize("by", ["script", "api"])
def test_a_best_step_that_a_full_disk_kept_out_of_best_stays_until_a_resume_copies_it(by, tmp_path, monkeypatch):
    """Making room must not cost the best step, which is older than what the policy keeps."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", lambda run, stop: 1.0 if run.state.step == 2 else 2.0)
        code, said = train(tmp_path, EVAL_INTERVAL="2", CHECKPOINT_INTERVAL="2")
    assert code == 0, said
    (best,) = (tmp_path / "checkpoints" / "best").glob("*.pt")
    regular, content = tmp_path / "checkpoints" / best.name, best.read_bytes()
    best.unlink()
    if by == "script":
        said = call(pruner, tmp_path, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
        assert said.code == 0, said.err
        assert f"{regular}, the best step of run" in said.err
    else:
        api.prune(tmp_path / "checkpoints", keep_last=1)
    assert {each.path for each in ckpt.find(tmp_path / "checkpoints")} == {regular, at_step(tmp_path, 8)}
    assert train(tmp_path, RESUME="auto")[0] == 0
    assert best.read_bytes() == content
    said = call(pruner, tmp_path, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")  # control: now it is in best/
    assert (said.code, regular.exists(), best.exists()) == (0, False, True)


def test_the_latest_valid_checkpoint_stays(folder):
    *_, third, fourth = save(folder, 1, 2, 3, 4, size=32)
    data = fourth.read_bytes()
    weight = ckpt.load(fourth).model_state[WEIGHT].numpy().tobytes()
    flipped(fourth, data.find(weight) + 5)
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert "do not match their checksum" in said.err
    assert third.exists()
    assert left(folder) == {3: True, 4: True}


@pytest.mark.parametrize("harm", ["flipped", "emptied", "deleted"])
@pytest.mark.parametrize("layout", [name for name in WRITERS if WRITERS[name].optimizer_file(Path("x"))])
def test_the_latest_checkpoint_that_resumes_stays_whatever_happened_to_a_newer_optimizer(layout, harm, folder):
    """The newer one has valid weights; RESUME=auto takes the older one all the same."""
    *_, third, fourth = save(folder, 1, 2, 3, 4, size=32, layout=layout)
    optimizer = WRITERS[layout].optimizer_file(fourth)
    size = optimizer.stat().st_size
    {
        "flipped": lambda: flipped(optimizer, size * 3 // 4),
        "emptied": lambda: optimizer.write_bytes(b""),
        "deleted": optimizer.unlink,
    }[harm]()
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert said.code == 0, said.err
    assert str(fourth if harm == "deleted" else optimizer) in said.err
    assert ckpt.load(third, verify=True).optimizer_state is not None
    assert fourth.exists()
    assert len(list(ckpt.find(folder / "checkpoints"))) == 2


@pytest.mark.parametrize(
    "changes",
    [{"hyperparameters": {"CHECKPOINT_MODEL_ONLY": True}}, {"hyperparameters": {"TRAINING_STEPS": 4}}, {}],
    ids=str,
)
def test_control_models_that_are_meant_to_be_without_optimizer_are_pruned(changes, folder):
    """As their run left it out, as it is finished, or as every checkpoint lacks it."""
    paths = save(folder, 1, 2, 3, 4, layout="separated", **changes)
    for path in paths if not changes else paths[-1:]:
        WRITERS["separated"].optimizer_file(path).unlink()
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert said.code == 0, said.err
    assert list(left(folder)) == [4]


def test_nan_weights_are_not_the_latest_valid_checkpoint(folder):
    save(folder, 1, 2)
    bad = record(3)
    bad.model_state[WEIGHT][0, 0] = math.nan
    ckpt.save(bad, folder / "checkpoints")
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert f"NaN or Inf in {WEIGHT}" in said.err
    assert left(folder) == {2: True, 3: True}


def test_a_run_without_a_valid_checkpoint_is_not_pruned(folder):
    bad = [record(step) for step in (1, 2)]
    for one in bad:
        one.model_state[WEIGHT][0, 0] = math.inf
        ckpt.save(one, folder / "checkpoints")
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert (said.code, said.out) == (0, "nothing to delete\n")
    assert "left alone: no checkpoint of run one is known to be whole" in said.err
    assert left(folder) == {1: True, 2: True}


def test_damaged_checkpoints_are_reported_and_stay(folder):
    first, *_ = save(folder, 1, 2, 3)
    os.truncate(first, 900)
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert f"left alone: {first}: " in said.err
    assert first.exists()
    assert left(folder) == {3: True}


def test_a_run_in_training_is_not_pruned(folder):
    save(folder, 1, 2, 3)
    save(folder, 1, 2, 3, run_id="two")
    lock = RunLock(folder / "checkpoints", "one")
    lock.acquire()
    try:
        said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    finally:
        lock.release()
    assert said.code == 0
    assert f"left alone: run one is being trained by process {os.getpid()}" in said.err
    assert left(folder) == {1: True, 2: True, 3: True}
    assert left(folder, "two") == {3: True}


def test_an_empty_folder_is_refused(tmp_path):
    said = call(pruner, tmp_path, CHECKPOINT_KEEP_LAST="1")
    assert (said.code, said.out) == (3, "")
    assert "there is no folder" in said.err


def copies_of(path):
    """Return copies of a file as users make them: beside it, in a folder, with another suffix."""
    names = [
        f"{path.stem}-my-favourite.pt",
        f"{path.stem}_keep_me.pt",
        f"my_{path.name}",
        f"copy of {path.name}",
        f"{path.stem} (1).pt",
        f"{path.stem} - Copy.pt",
        f"{path.stem} copy.pt",
        f"{path.name}.bak",
        path.name.upper(),
        f"backup/{path.name}",
    ]
    (path.parent / "backup").mkdir(exist_ok=True)
    return [Path(shutil.copy(path, path.parent / name)) for name in names]


def test_copies_by_the_user_stay(folder):
    paths = save(folder, 1, 2, 3)
    copies = copies_of(paths[0])
    shown_first = call(pruner, folder, CHECKPOINT_KEEP_LAST="1")
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert said.code == 0
    assert not any(str(copy) in text for copy in copies for text in (shown_first.out, said.out))
    assert [copy for copy in copies if not copy.exists()] == []
    assert [path.exists() for path in paths] == [False, False, True]


def test_a_copy_does_not_count_as_the_latest_valid_checkpoint(folder):
    """The last save is damaged: the latest valid checkpoint must be a save, although a copy is as new."""
    paths = save(folder, 1, 2, size=32)
    shutil.copy(paths[0], paths[0].with_name("a copy.pt"))
    data = paths[1].read_bytes()
    flipped(paths[1], data.find(ckpt.load(paths[1]).model_state[WEIGHT].numpy().tobytes()) + 5)
    assert call(pruner, folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false").code == 0
    assert all(path.exists() for path in paths)


def test_pruning_during_a_resume_keeps_copies(tmp_path):
    """Also copies in best/, which the resumed run improves on."""
    assert train(tmp_path, CHECKPOINT_INTERVAL="2", EVAL_INTERVAL="2", CHECKPOINT_KEEP_BEST="0")[0] == 0
    for step in (6, 8):
        at_step(tmp_path, step).unlink()
    first = at_step(tmp_path, 4)
    best = ckpt.keep_best(ckpt.load(first), tmp_path / "checkpoints", saved=first)
    copies = [*copies_of(first), Path(shutil.copy(best, best.with_name(f"{best.stem}_keep_me.pt")))]
    code, said = train(tmp_path, RESUME="auto", CHECKPOINT_KEEP_LAST="1", CHECKPOINT_KEEP_BEST="1")
    assert code == 0, said
    assert [copy for copy in copies if not copy.exists()] == []
    assert not first.exists()
    assert not best.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Other programs' checkpoints


def foreign(folder: Path, name: str, step: int) -> Path:
    """Write a nanoGPT checkpoint of a step."""
    path = folder / "checkpoints" / name
    torch.save(nanogpt(golden_nano(), step=step), path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith("."))


def test_other_programs_checkpoints_are_counted_by_the_beginning_of_their_names(folder):
    save(folder, 1, 2)
    for name, step in (("ckpt_100.pt", 100), ("ckpt_200.pt", 200), ("model-best.pt", 150)):
        foreign(folder, name, step)
    before = names(folder)
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert "3 of other programs" in said.err
    assert "ckpt_: 2" in said.err
    assert "model-best.pt: 1" in said.err
    assert set(before) - set(names(folder)) == {name for name in before if "step0001" in name}


def test_the_policy_applies_to_names_that_are_asked_for(folder):
    """In the order of steps, not of names; what has another word in its name is a person's copy."""
    steps = {"ckpt_1.pt": 900, "ckpt_2.pt": 100, "ckpt_10.pt": 200, "ckpt_0300.pt": 300}
    for name, step in steps.items():
        foreign(folder, name, step)
    mine = [
        "ckpt_2_mine.pt",
        "ckpt_2 (1).pt",
        "ckpt_2.pt.bak",
        "my ckpt_2.pt",
        "ckpt_best.pt",
        "ckpt_.pt",
        "other_2.pt",
    ]
    for name in mine:
        shutil.copy(folder / "checkpoints" / "ckpt_2.pt", folder / "checkpoints" / name)
    asked = {"CHECKPOINT_KEEP_LAST": "1", "PRUNE_OTHERS": "ckpt_, absent_"}
    said = call(pruner, folder, **asked)
    assert sorted(names(folder)) == sorted([*steps, *mine])
    assert said.out.count("remove ") == 3
    done = call(pruner, folder, **asked, DRY_RUN="false")
    assert done.code == 0, done.err
    assert names(folder) == sorted(["ckpt_1.pt", *mine])


@pytest.mark.parametrize("begin", ["run2_ckpt_", "epoch=", "model.v1.", "my ckpt"])
def test_the_beginning_that_is_named_can_be_set(begin, folder):
    for number in (1, 2):
        foreign(folder, f"{begin}{number}.pt", number)
    foreign(folder, "2024 best.pt", 3)
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1")
    (variable,) = re.findall("PRUNE_OTHERS=(.*) applies", said.err)
    assert variable == begin
    assert "remove" in call(pruner, folder, CHECKPOINT_KEEP_LAST="1", PRUNE_OTHERS=variable).out


@pytest.mark.parametrize("names", [("1.pt", "2.pt"), ("best.pt", "other.pt"), ("my 1.pt", "my 2.pt")])
def test_no_beginning_is_named_that_cannot_be_set(names, folder):
    for number, name in enumerate(names, 1):
        foreign(folder, name, number)
    said = call(pruner, folder, CHECKPOINT_KEEP_LAST="1")
    assert "2 of other programs" in said.err
    assert "PRUNE_OTHERS" not in said.err


def test_of_other_programs_multiples_bases_links_equal_steps_and_readable_files_stay(folder):
    paths = {step: foreign(folder, f"ckpt_{step}.pt", step) for step in (100, 200, 300, 400, 500, 600, 700)}
    twin = foreign(folder, "ckpt_301.pt", 300)
    (folder / "checkpoints" / "favourite").symlink_to(paths[200])
    base = {"sha256": digest(ckpt.load(paths[400]).model_state), "source": str(paths[400]), "step": 400}
    ckpt.save(record(1, run_id="tuned", parts=["adapters"], base=base), folder / "checkpoints")
    weight = max(golden_nano().state_dict().values(), key=torch.numel)
    flipped(paths[700], paths[700].read_bytes().index(weight.numpy().tobytes()) + 5)
    asked = {"CHECKPOINT_KEEP_LAST": "1", "CHECKPOINT_KEEP_EVERY": "500", "PRUNE_OTHERS": "ckpt_", "DRY_RUN": "false"}
    assert call(pruner, folder, **asked).code == 0
    assert [step for step, path in paths.items() if path.exists()] == [200, 300, 400, 500, 600, 700]
    assert twin.exists()
