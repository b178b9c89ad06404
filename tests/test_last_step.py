"""What becomes known after a save, and what fails beside it: the last step's validation loss, and a best that could not
be saved.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest
from drive import ROOT, at_step, environment, newest, tensor_bytes, train

import training
from milepost import ckpt
from milepost.ckpt.finding import scan

LAYOUTS = sorted(ckpt.WRITERS)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A finished run of 8 steps, evaluated and saved at 4 and at 8, which is its best."""
    folder = tmp_path_factory.mktemp("straight")
    assert train(folder)[0] == 0
    return folder


def before_step(number: int, action: Callable[[], Any], patch: pytest.MonkeyPatch) -> None:
    """Run `action` while the step is taken."""
    learn = training.training_step

    def acting(run, lr):
        if run.state.step == number - 1:
            action()
        return learn(run, lr)

    patch.setattr(training, "training_step", acting)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def trained(folder: Path, at: dict[int, Callable[[], Any]], **changes: str) -> tuple[int, str]:
    """Train with an action in the middle of some steps."""
    with pytest.MonkeyPatch.context() as patch:
        for number, action in at.items():
            before_step(number, action, patch)
        return train(folder, **changes)


def bests(folder: Path) -> list[int]:
    return sorted(one.step for one in scan(folder / "checkpoints") if one.path.parent.name == "best")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in (folder / "checkpoints").rglob("[!.]*"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_signal_in_the_last_step_loses_neither_its_loss_nor_the_best(layout, straight, tmp_path):
    """The step is saved at once; the resume evaluates it, saves it again with its loss,
    and then the run is finished.
    """
    code, said = trained(tmp_path, {8: stop}, CHECKPOINT_LAYOUT=layout)
    assert code == 130, said
    assert (newest(tmp_path).step, newest(tmp_path).validation_loss) == (8, None)
    code, said = train(tmp_path, RESUME="auto")
    assert code == 0, said
    last, expected = newest(tmp_path), newest(straight)
    assert (last.step, last.validation_loss, last.best_step) == (8, expected.validation_loss, 8)
    assert tensor_bytes(last) == tensor_bytes(expected)
    chosen = ckpt.best(ckpt.find(tmp_path / "checkpoints"))
    assert (chosen.step, chosen.metadata["validation_loss"]) == (8, expected.validation_loss)
    assert bests(tmp_path) == [8]
    before = names(tmp_path)
    for _ in range(2):
        code, said = train(tmp_path, RESUME="auto")
        assert (code, "is finished: 8 of 8 steps are done" in said) == (0, True)
        assert names(tmp_path) == before


def test_a_last_step_that_is_not_the_best_has_its_loss(tmp_path):
    changes = {"LEARNING_RATE": "10", "WARMUP_STEPS": "0", "LR_SCHEDULE": "constant", "EVAL_INTERVAL": "1"}
    code, said = trained(tmp_path, {8: stop}, **changes)
    assert code == 130, said
    code, said = train(tmp_path, RESUME="auto", **changes)
    assert code == 0, said
    last = newest(tmp_path)
    assert (last.step, last.validation_loss is None) == (8, False)
    assert last.best_step == 7  # the control
    assert "is finished" in train(tmp_path, RESUME="auto", **changes)[1]


def test_an_uninterrupted_run_saves_its_last_step_once(straight):
    assert [one.step for one in scan(straight / "checkpoints", bests=False)] == [4, 8]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resume_of_a_finished_run_restores_a_missing_best(layout, tmp_path):
    assert train(tmp_path, CHECKPOINT_LAYOUT=layout)[0] == 0
    best = next(one.path for one in scan(tmp_path / "checkpoints") if one.path.parent.name == "best")
    shutil.rmtree(best.parent)
    before = names(tmp_path)
    code, said = train(tmp_path, RESUME="auto")
    assert (code, "is finished" in said) == (0, True)
    assert bests(tmp_path) == [8]
    (kept,) = (one.path for one in scan(tmp_path / "checkpoints") if one.path.parent.name == "best")
    assert tensor_bytes(ckpt.load(kept, verify=True)) == tensor_bytes(newest(tmp_path))
    assert [name for name in names(tmp_path) if "best" not in name] == [name for name in before if "best" not in name]


KILLED = """
import os, signal, sys
sys.argv = ["training.py"]
from milepost import config
settings = config.from_command_line("__main__", "", ())
from milepost import ckpt; import training
keep_best = ckpt.keep_best
def killed(record, *rest, **words):
    if record.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return keep_best(record, *rest, **words)
ckpt.keep_best = killed
training.guarded(training.main, settings)
"""


def test_killed_between_the_last_save_and_its_copy_in_best(tmp_path):
    env = programs.LEAST | environment(tmp_path)
    done = programs.run([sys.executable, "-c", KILLED], cwd=ROOT, env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (newest(tmp_path).step, bests(tmp_path)) == (8, [4])
    code, said = train(tmp_path, RESUME="auto")
    assert (code, "is finished" in said) == (0, True)
    assert bests(tmp_path) == [8]


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_best_that_could_not_be_written_is_retried_at_the_next_save(layout, background, tmp_path):
    """A file blocks best/ until step 6. Step 4 is copied there at a later save, and pruning keeps it until then."""
    places: list[Path] = []

    def block() -> None:
        place = tmp_path / "checkpoints"
        if ckpt.WRITERS[layout].run_stem:
            place = place / next((tmp_path / "runs").iterdir()).name
            place.mkdir(exist_ok=True)
        places.append(place / "best")
        places[0].write_text("in the way")

    def unblock() -> None:
        places[0].unlink()

    policy = {
        "CHECKPOINT_INTERVAL": "1",
        "CHECKPOINT_KEEP_LAST": "1",
        "CHECKPOINT_ASYNC": background,
        "EVAL_INTERVAL": "4",
    }
    actions = {2: block, 6: unblock, 7: stop}
    code, said = trained(tmp_path, actions, CHECKPOINT_LAYOUT=layout, **policy)
    assert code == 130, said
    assert "step 4, the best so far, could not be saved" in said
    assert bests(tmp_path) == [4]
    assert [one.step for one in scan(tmp_path / "checkpoints", bests=False)] == [7]


def blocking(folder: Path) -> Callable[[], object]:
    """Return an action that puts a file where best/ would be: as a fault that comes after the start,
    which looks at that place.
    """
    return lambda: (folder / "checkpoints" / "best").write_text("in the way")


def test_a_best_that_could_never_be_written_is_restored_by_a_later_resume(tmp_path):
    code, said = trained(tmp_path, {1: blocking(tmp_path)}, CHECKPOINT_INTERVAL="2", CHECKPOINT_KEEP_LAST="1")
    assert code == 0, said
    assert [one.step for one in scan(tmp_path / "checkpoints")] == [8]
    (tmp_path / "checkpoints" / "best").unlink()
    assert "is finished" in train(tmp_path, RESUME="auto")[1]
    assert bests(tmp_path) == [8]


def test_a_best_step_is_not_pruned_before_it_is_in_best(tmp_path):
    policy = {"CHECKPOINT_INTERVAL": "1", "CHECKPOINT_KEEP_LAST": "1", "EVAL_INTERVAL": "4"}
    code, said = trained(tmp_path, {1: blocking(tmp_path), 7: stop}, **policy)
    assert code == 130, said
    assert [one.step for one in scan(tmp_path / "checkpoints")] == [4, 7]
    best = at_step(tmp_path, 4)
    (tmp_path / "checkpoints" / "best").unlink()
    code, said = trained(tmp_path, {8: stop}, RESUME="auto", **policy)
    assert code == 130, said
    assert bests(tmp_path) == [4]
    assert not best.exists()


def test_a_resume_of_a_finished_run_clears_what_a_kill_after_its_last_save_left(tmp_path):
    code, said = train(tmp_path)
    assert code == 0, said
    checkpoints, last = tmp_path / "checkpoints", newest(tmp_path)
    folder = tmp_path / "runs" / last.run_id
    ended = subprocess.Popen(["true"])
    ended.wait()
    hidden = f".tmp-{last.path.name}-{{}}-0123abcd"
    left = [
        checkpoints / hidden.format(ended.pid),
        checkpoints / "best" / hidden.format(ended.pid),
        checkpoints / ".owner",
    ]
    left += [place / f".run-{last.run_id}.owner" for place in (checkpoints, folder)]
    living = checkpoints / hidden.format(os.getppid())  # another process writes it at this moment
    for path in (*left, living):
        path.write_text("{}")
    code, said = train(tmp_path, RESUME="auto")
    assert (code, "is finished" in said) == (0, True)
    assert [path for path in left if path.exists()] == []
    assert living.exists()
