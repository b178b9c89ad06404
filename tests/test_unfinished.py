"""The same command again after a crash, without RESUME: the unfinished run is named, and nothing else is."""

import pytest
from drive import at_step, small_text, train
from test_last_step import stop, trained

from milepost import ckpt
from milepost.locks import RunLock

LINE = "an unfinished run of these settings is at step"


@pytest.fixture
def stopped(tmp_path):
    """A folder with a run stopped after step 6 of 8."""
    assert trained(tmp_path, {6: stop})[0] == 130
    return tmp_path


def test_the_unfinished_run_is_named_and_the_advice_resumes_it(stopped):
    run_id = ckpt.load(at_step(stopped, 6)).run_id
    said = trained(stopped, {1: stop})[1]
    assert f"{LINE} 6 " in said
    assert str(at_step(stopped, 6)) in said
    forget_all_but(stopped, run_id)
    assert train(stopped, RESUME="auto")[0] == 0
    assert ckpt.latest(ckpt.find(stopped / "checkpoints")).run_id == run_id


def forget_all_but(folder, run_id):
    """Delete what the second run saved: a user who follows the advice at once has nothing of it."""
    for found in ckpt.find(folder / "checkpoints"):
        if found.run_id != run_id:
            found.path.unlink()


def silent(folder, **changes):
    code, said = trained(folder, {1: stop}, **changes)
    assert code == 130
    return LINE not in said


def test_resume_never_silences_the_line(stopped):
    assert silent(stopped, RESUME="never")
    assert not silent(stopped)  # the control


@pytest.mark.parametrize(
    "changes",
    [{"SEED": "2"}, {"LEARNING_RATE": "2e-3"}, {"N_LAYER": "1"}, {"TRAINING_STEPS": "6"}, {"DTYPE": "bfloat16"}],
)
def test_a_run_of_other_settings_is_not_named(changes, stopped):
    assert silent(stopped, **changes)


def test_a_run_of_another_text_is_not_named(stopped):
    small_text(stopped, characters=7000, name="other.txt")
    assert silent(stopped, TRAINING_DATA_SOURCE=str(stopped / "other.txt"))


def test_the_same_text_under_another_name_is_the_same_text(stopped):
    small_text(stopped, name="same.txt")
    assert not silent(stopped, TRAINING_DATA_SOURCE=str(stopped / "same.txt"))


def test_a_finished_run_is_not_named(tmp_path):
    assert train(tmp_path)[0] == 0
    assert silent(tmp_path)


def test_a_run_that_is_being_trained_is_not_named(stopped):
    run_id = ckpt.load(at_step(stopped, 6)).run_id
    lock = RunLock(stopped / "checkpoints", run_id)
    lock.acquire()
    try:
        assert silent(stopped)
    finally:
        lock.release()


def test_with_checkpoints_off_nothing_is_said(stopped):
    assert silent(stopped, ENABLE_CHECKPOINTS="false")
