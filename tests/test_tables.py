"""Tables: aligned where they fit, folded where the terminal is too narrow, and never with a word cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost.runtime.tables import is_wider, table, without_common

PATH = "checkpoints/checkpoint_gpt2_dear_wren_step0300_11272026_014632.pt"
LISTED = [
    ("step", "loss", "run", "path", ""),
    ("100", "2.5", "alpha", PATH, ""),
    ("2000", "2.25", "beta", PATH, "best"),
]


def test_rows_are_aligned_on_one_line_each_where_they_fit() -> None:
    rows = [("part", "what", "more"), ("weights", "restored", "28 tensors"), ("x", "", "")]
    expected = "part     what      more\nweights  restored  28 tensors\nx"
    assert table(rows) == table(rows, columns=80) == table(rows, columns=29) == expected
    assert table(rows, columns=28) != expected


def test_what_does_not_fit_stands_on_lines_of_its_own() -> None:
    assert table(LISTED, columns=80).splitlines() == [
        "step  loss  run",
        "    path",
        "100   2.5   alpha",
        f"    {PATH}",
        "2000  2.25  beta",
        f"    {PATH}  best",
    ]
    assert table(LISTED, columns=72).splitlines()[-2:] == [f"    {PATH}", "    best"]


def test_a_sentence_in_the_last_column_is_wrapped_in_it() -> None:
    rows = [("bytes", "ok", "1 file"), ("bit-exact", "no", "LEARNING_RATE was 0.003, is 0.0001")]
    assert table(rows, columns=40).splitlines() == [
        "bytes      ok  1 file",
        "bit-exact  no  LEARNING_RATE was 0.003,",
        "               is 0.0001",
    ]


def test_a_path_that_is_longer_than_the_line_stays_whole() -> None:
    assert f"    {PATH}" in table(LISTED, columns=40).splitlines()
    assert PATH in table([("checkpoint", PATH)], columns=40)


CELLS = st.text("ab ", max_size=60).map(str.split).map(" ".join)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=6), st.integers(40, 200))
def test_every_word_is_there_in_order_and_lines_fit(rows: list[tuple[str, ...]], columns: int) -> None:
    text = table(rows, columns=columns)
    assert text.split() == [word for row in rows for cell in row for word in cell.split()]
    longest = max((len(word) for word in text.split()), default=0)
    first = max(len(row[0]) for row in rows)
    assert all(len(line) <= max(columns, longest + 4, first) for line in text.splitlines())
    assert is_wider(rows, columns) == any(len(line) > columns for line in table(rows).splitlines())


@pytest.mark.parametrize("columns", [None, 200])
def test_a_pipe_and_a_wide_terminal_get_a_line_per_row(columns: int | None) -> None:
    assert len(table(LISTED, columns=columns).splitlines()) == len(LISTED)


def test_columns_that_are_alike_are_named_once() -> None:
    rows = [("step", "layout", "", "resumable"), ("1", "unified", "", "yes"), ("2", "unified", "", "yes")]
    assert without_common(rows, ("layout", "resumable")) == (
        [("step", ""), ("1", ""), ("2", "")],
        "layout unified, resumable yes",
    )
    assert without_common(rows, ("layout",))[1] == "layout unified"
    assert without_common(rows[:2], ("layout",)) == (rows[:2], "")
