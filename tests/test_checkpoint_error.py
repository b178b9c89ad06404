"""CheckpointError: fields for programs, one sentence for people."""

import copy
from pathlib import Path

import pytest

from milepost.ckpt.record import EARLIER, LONGEST, CheckpointError


def test_fields_are_composed_into_one_sentence():
    error = CheckpointError(Path("a/b.pt"), "is damaged", EARLIER, kind="damaged")
    assert (error.path, error.problem, error.remedy, error.kind) == (Path("a/b.pt"), "is damaged", EARLIER, "damaged")
    assert str(error) == "a/b.pt: is damaged: take an earlier checkpoint"


@pytest.mark.parametrize("path", ["a/b.pt", Path("a/b.pt")])
def test_a_remedy_may_be_missing_and_the_path_is_a_path(path):
    error = CheckpointError(path, "is not JSON", kind="not understood")
    assert (str(error), error.path, error.remedy) == ("a/b.pt: is not JSON", Path("a/b.pt"), None)


def test_a_single_sentence_is_taken_as_it_is():
    error = CheckpointError("a.pt: is damaged: take another")
    assert (str(error), error.path, error.problem, error.kind) == (
        "a.pt: is damaged: take another", None, None, "unspecified",
    )  # fmt: skip


def test_text_of_a_file_neither_steers_nor_fills_a_terminal():
    error = CheckpointError("a.pt", "\x1b[2J\n" + "x" * 5000, EARLIER, kind="damaged")
    assert str(error).isprintable()
    assert len(str(error)) <= LONGEST
    assert str(error).endswith(EARLIER)


def test_a_copy_as_another_process_gets_it_has_the_same_fields():
    error = CheckpointError("a.pt", "is damaged", EARLIER, kind="damaged")
    again = copy.copy(error)  # by __reduce__, as a pickle is made
    assert (str(again), again.path, again.remedy, again.kind) == (str(error), error.path, EARLIER, "damaged")
