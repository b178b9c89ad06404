"""What a run reports: lines in stderr and training.log, a bar on a terminal, metrics in strict JSON."""

import io
import json
import math
import os
import re
import resource
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import drive
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import training
from milepost import config
from milepost.runtime import progress
from milepost.runtime.progress import Log, Metrics, Progress, amount, duration, read_metrics, shown
from milepost.runtime.tables import table


def on_a_terminal(action: Callable[[TextIO], None], *, columns: int = 100) -> str:
    """Return what `action` sent to a real terminal."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    received = bytearray()

    def listen() -> None:
        while True:
            try:
                received.extend(os.read(ours, 4096))
            except OSError:  # Linux's end of a terminal that nobody holds open any more
                return

    listener = threading.Thread(target=listen)
    listener.start()
    with open(theirs, "w", encoding="utf-8") as stream:
        action(stream)
    listener.join()
    os.close(ours)
    return received.decode("utf-8")


def counts(text: str) -> list[tuple[int, int]]:
    """Return the steps and totals that a bar showed, in order."""
    return [(int(step), int(total)) for step, total in re.findall(r"(\d+)/(\d+)(?:,| \[)", text)]


# Log


def test_training_log_holds_what_stderr_showed_in_order(tmp_path, capsys):
    log = Log()
    log("before the run has a folder")
    log("two lines\nin one")
    log.open(tmp_path / "runs" / "one" / "training.log")
    log("é, and later")
    log.close()
    expected = "before the run has a folder\ntwo lines\nin one\né, and later\n"
    assert capsys.readouterr() == ("", expected)
    assert (tmp_path / "runs" / "one" / "training.log").read_text(encoding="utf-8") == expected


def test_a_line_is_in_training_log_at_once(tmp_path, capsys):
    log = Log()
    log.open(tmp_path / "training.log")
    log("now")
    assert (tmp_path / "training.log").read_text() == "now\n"
    log.close()


def test_a_resumed_run_appends_to_its_training_log(tmp_path, capsys):
    for line in ("first", "second"):
        log = Log()
        log.open(tmp_path / "training.log")
        log(line)
        log.close()
    assert (tmp_path / "training.log").read_text() == "first\nsecond\n"


def test_a_closed_stderr_does_not_stop_the_run(tmp_path):
    """As with `python3 training.py 2>&1 | head`: the lines still reach training.log."""
    reader, writer = os.pipe()
    with open(writer, "w", encoding="utf-8") as stream:
        log = Log(stream)
        os.close(reader)
        log("unheard")
        log.open(tmp_path / "training.log")
        log("unheard too")
        log.close()
        assert (tmp_path / "training.log").read_text() == "unheard\nunheard too\n"
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # what the stream still holds goes nowhere when it is closed


def test_training_log_equals_stderr(tmp_path):
    code, said = drive.train(tmp_path)
    assert code == 0
    (path,) = tmp_path.glob("runs/*/training.log")
    assert path.read_text(encoding="utf-8") == said
    assert "\r" not in said


# The bar


def test_the_bar_starts_at_the_resumed_step_and_its_total_never_grows():
    def show(stream: TextIO) -> None:
        log = Log(stream)
        bar = Progress(log, start=40, total=50, plain=False)
        for step in range(41, 51):
            bar.advance(step)
            bar.show(step, loss=f"{step / 10:.4f}", tok_s="12k")
            log(f"line {step}")  # a line shows the bar anew below it
        bar.close()

    text = on_a_terminal(show)
    steps = [step for step, _ in counts(text)]
    assert counts(text)[0] == (40, 50)
    assert counts(text)[-1] == (50, 50)
    assert {total for _, total in counts(text)} == {50}
    assert steps == sorted(steps)
    assert set(range(40, 51)) == set(steps)
    for step in range(41, 51):
        assert f"line {step}\r\n" in text  # above the bar, not mixed into it
        assert f"loss {step / 10:.4f}" in text
    assert " left, tok_s 12k" in text


FIGURES = {"validation": "3.2345", "loss": "3.1234", "tok_s": "12.3k"}


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (30, ["loss"]),
        (50, ["loss"]),
        (65, ["loss", "validation"]),
        (80, ["loss", "validation", "left"]),
        (100, [*FIGURES, "left"]),
    ],
)
def test_a_narrow_terminal_shows_the_step_and_the_loss_first(columns: int, shown: list[str]) -> None:
    def show(stream: TextIO) -> None:
        bar = Progress(Log(stream), start=0, total=100_000, plain=False)
        for step in range(1, 30):
            bar.show(step, **FIGURES)
            bar.advance(step)
        bar.close()

    *_, last = on_a_terminal(show, columns=columns).strip().split("\r")
    assert "29/100000, loss 3.1234" in last
    assert ("%|" in last) == (columns > 40)
    assert len(last) <= columns
    words = [f"{name} {value}" for name, value in FIGURES.items()] + [" left"]
    assert [word.split()[0] for word in words if word in last] == [name for name in (*FIGURES, "left") if name in shown]


def test_a_resumed_run_on_a_terminal(tmp_path, capsys):
    """A bar from step 4 of 8, and a training.log with the lines but without the bar."""
    drive.train(tmp_path)
    for path in [drive.at_step(tmp_path, 8), *(tmp_path / "checkpoints" / "best").iterdir()]:
        path.unlink()
    wanted = config.read(drive.environment(tmp_path, RESUME="auto"))
    text = on_a_terminal(lambda stream: training.guarded(training.main, wanted, log=Log(stream)))
    assert counts(text)[0] == (4, 8)
    assert counts(text)[-1] == (8, 8)
    assert {total for _, total in counts(text)} == {8}
    (path,) = tmp_path.glob("runs/*/training.log")
    again = path.read_text(encoding="utf-8").split("\ndone: ")[1].splitlines()[2:]  # what follows the first run's end
    assert again[0].startswith("run ")
    assert all(f"{line}\r\n" in text for line in again)
    assert "\r" not in path.read_text(encoding="utf-8")
    assert not counts(path.read_text(encoding="utf-8"))


def plain_lines(tmp_path: Path, **figures: str) -> str:
    with open(tmp_path / "stderr", "w+", encoding="utf-8") as stream:
        bar = Progress(Log(stream), start=40, total=50, plain=False)
        for step in range(41, 44):
            bar.advance(step)
            bar.show(step, seconds_left=200.0, **figures)
        bar.close()
        stream.seek(0)
        return stream.read()


def test_without_a_terminal_there_are_plain_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    said = plain_lines(tmp_path, loss="1.25", tok_s="12k")
    assert said.splitlines() == [f"step {step}/50: loss 1.25, tok_s 12k, 3 min left" for step in (41, 42, 43)]


def test_plain_lines_are_rate_limited(tmp_path):
    assert plain_lines(tmp_path, loss="1.25") == ""
    assert progress.QUIET_SECONDS >= 5


def test_values_stay_until_they_are_updated(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    with open(tmp_path / "stderr", "w+", encoding="utf-8") as stream:
        bar = Progress(Log(stream), start=0, total=9, plain=False)
        bar.show(1, validation="2.0")
        bar.show(2, loss="1.9")
        stream.seek(0)
        assert stream.read() == "step 1/9: validation 2.0\nstep 2/9: validation 2.0, loss 1.9\n"


def test_a_disabled_bar_does_not_show_on_a_terminal():
    def show(stream: TextIO) -> None:
        bar = Progress(Log(stream), start=0, total=3, plain=True)
        bar.advance(1)
        bar.show(1, loss="1")
        bar.close()

    assert on_a_terminal(show) == ""


def test_a_figure_that_becomes_empty_is_left_out():
    bar = Progress(Log(io.StringIO()), start=0, total=3, plain=True)
    bar.show(1, loss="1.0", not_mirrored="2")
    assert bar.figures == {"loss": "1.0", "not_mirrored": "2"}
    bar.show(2, not_mirrored="")
    assert bar.figures == {"loss": "1.0"}
    bar.close()


# Metrics


def strict(line: str) -> dict:
    """Return the line's object; refuse NaN and Infinity, which json.loads accepts."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(line, parse_constant=refuse)


def metrics_of(path: Path, *lines: dict) -> Metrics:
    metrics = Metrics(path)
    for line in lines:
        metrics.write(**line)
    return metrics


def test_a_metrics_line_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = metrics_of(path, {"step": 1, "loss": 2.5, "split": "train", "lr": None})
    assert path.read_text() == '{"step": 1, "loss": 2.5, "split": "train", "lr": null}\n'
    metrics.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_becomes_null(value, tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics_of(path, {"step": 1, "loss": value, "grad_norm": 1e300}).close()
    (line,) = path.read_text().splitlines()
    assert strict(line) == {"step": 1, "loss": None, "grad_norm": 1e300}


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(), VALUES), max_size=5))
def test_metrics_round_trip(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    metrics_of(path, {"step": 0}, *lines).close()
    assert [strict(line) for line in path.read_text().split("\n")[1:-1]] == lines
    assert read_metrics(path) == [{"step": 0}, *lines]


def test_rewinding_leaves_no_duplicate_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics_of(path, *({"step": step, "loss": step / 2} for step in range(1, 7))).close()
    metrics = Metrics(path)
    metrics.rewind(lambda line: line["step"] <= 3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    metrics.write(step=4, loss=0.25)
    metrics.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 0.25)]
    assert [line["step"] for line in read_metrics(metrics.set_aside)] == [4, 5, 6]
    assert {each.name for each in tmp_path.iterdir()} == {"metrics.jsonl", "metrics.set-aside.jsonl"}


def history_of(path: Path) -> list[tuple[int, float]]:
    """Return step and time of each line, which identify each time a step was taken."""
    return [(line["step"], line["time"]) for line in read_metrics(path)]


def logged_from(path: Path, steps: range, *, since: float) -> None:
    """Return the lines of a run at these steps, a second apart;
    the values of a step are equal each time it is taken.
    """
    metrics_of(path, *({"step": n, "split": "train", "loss": 1 / n, "time": since + n} for n in steps)).close()


def back_to(path: Path, step: int, *, saved: float = math.inf) -> None:
    Metrics(path).rewind(lambda line: line["step"] <= step, until=saved)


def test_lines_set_aside_return_with_their_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logged_from(path, range(1, 31), since=100)
    back_to(path, 10, saved=110)
    assert history_of(path) == [(n, 100 + n) for n in range(1, 11)]
    logged_from(path, range(11, 13), since=1000)
    back_to(path, 30, saved=130)
    assert history_of(path) == [(n, 100 + n) for n in range(1, 31)]


def test_a_branch_that_saved_keeps_its_own_lines(tmp_path):
    """Back to step 10, then to 20, saved there; the next resume is from 20, and the one after it from the old 30."""
    path = tmp_path / "metrics.jsonl"
    logged_from(path, range(1, 31), since=100)
    back_to(path, 10, saved=110)
    logged_from(path, range(11, 26), since=1000)
    back_to(path, 20, saved=1020)
    branch = [*((n, 100 + n) for n in range(1, 11)), *((n, 1000 + n) for n in range(11, 21))]
    assert history_of(path) == branch
    for _ in range(2):
        back_to(path, 30, saved=130)
        assert history_of(path) == [(n, 100 + n) for n in range(1, 31)]
        back_to(path, 20, saved=1020)
        assert [step for step, _ in history_of(path)] == list(range(1, 21))  # of two writings, both were there by then


def test_lines_of_another_branch_are_never_mixed_in(tmp_path):
    """A branch that logs less often has no line at the steps in between."""
    path = tmp_path / "metrics.jsonl"
    logged_from(path, range(1, 31), since=100)
    back_to(path, 10, saved=110)
    logged_from(path, range(15, 26, 5), since=1000)
    back_to(path, 20, saved=1020)
    assert [step for step, _ in history_of(path)] == [*range(1, 11), 15, 20]


@pytest.mark.parametrize("saved", [0.0, 50.0, 115.0, 1e9, math.inf])
def test_a_clock_that_was_set_back_loses_no_line(saved, tmp_path):
    path = tmp_path / "metrics.jsonl"
    logged_from(path, range(1, 11), since=500)
    logged_from(path, range(11, 31), since=100)
    back_to(path, 30, saved=saved)
    assert [step for step, _ in history_of(path)] == list(range(1, 31))


def test_a_failed_rewind_loses_no_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    logged_from(path, range(1, 31), since=100)
    replace = os.replace
    for refused in (1, 2):
        calls: list[object] = []

        def sometimes(source, target, *, refused=refused, calls=calls):
            calls.append(target)
            if len(calls) == refused:
                raise OSError(28, "No space left on device")
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", sometimes)
            with pytest.raises(OSError, match="No space"):
                back_to(path, 10, saved=110)
        assert history_of(path) == [(n, 100 + n) for n in range(1, 31)]
    back_to(path, 30, saved=130)
    assert history_of(path) == [(n, 100 + n) for n in range(1, 31)]


def test_the_line_after_a_torn_line_is_complete(tmp_path):
    """Torn by a kill, and by a disk that was full for a while."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    metrics_of(path, {"step": 3}, {"step": 4}).close()
    assert [line["step"] for line in read_metrics(path)] == [1, 3, 4]
    metrics, limits = Metrics(path), resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics.write(step=5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            metrics.write(step=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    metrics.write(step=7)
    metrics.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 3, 4, 5, 6, 7]  # 6 waited


def test_a_complete_line_appended_to_a_torn_line_is_read(tmp_path):
    """As an earlier version left them. An object nested in a line is not a line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lo{"step": 2, "loss": 2.5}\n{"step": 3, "more": {"a": 1}\n{"step": 4}\n')
    assert read_metrics(path) == [{"step": 2, "loss": 2.5}, {"step": 4}]


def test_a_line_torn_at_any_byte_is_dropped_and_the_next_line_is_complete(tmp_path):
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "text": "é\n}"}, {"step": 3, "loss": None}]
    whole = tmp_path / "whole.jsonl"
    metrics_of(whole, *lines).close()
    data = whole.read_bytes()
    ends = [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(data[:cut])
        survived = lines[: sum(end - 1 <= cut for end in ends)]  # without its newline, a line is still whole
        assert read_metrics(path) == survived
        metrics = Metrics(path)
        metrics.rewind(lambda line: True)
        metrics.write(step=9)
        metrics.close()
        assert [strict(line) for line in path.read_text().splitlines()] == [*survived, {"step": 9}]


def test_lines_that_are_not_objects_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\x00\n[1, 2]\n7\n\n{"step": 2}\n{"step": 3')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_a_resume_keeps_what_it_cannot_read(tmp_path):
    """An editor or a shell saved the file as UTF-16: its text stays, while the resume begins a new file."""
    path = tmp_path / "metrics.jsonl"
    logged_from(path, range(1, 4), since=100)
    text = path.read_text()
    path.write_bytes(text.encode("utf-16"))
    metrics = Metrics(path)
    assert metrics.rewind(lambda line: True) == 3
    assert path.read_bytes() == b""
    assert metrics.unreadable.read_bytes() + b"\0" == text.encode("utf-16")  # half of the last newline
    path.write_bytes(b'{"step": 1}\n\xff\n' + b"\0" * 99 + b'\n{"step": 2}\n{"step": 3, "lo')
    assert metrics.rewind(lambda line: True) == 1
    assert metrics.unreadable.read_bytes().endswith(b"}\0\n\xff\n")
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert metrics.rewind(lambda line: True) == 0


def test_a_mark_at_the_beginning_of_the_file_hides_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n', encoding="utf-8-sig")
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_a_number_that_no_float_holds_does_not_stop_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1e999}\n')
    assert Metrics(path).rewind(lambda line: True) == 0
    assert strict(path.read_text()) == {"step": 1, "loss": None}


def test_a_hand_written_nan_does_not_stop_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.5}\n')
    Metrics(path).rewind(lambda line: True)
    assert list(map(strict, path.read_text().splitlines())) == [{"step": 1, "loss": None}, {"step": 2, "loss": 1.5}]


def test_rewinding_without_metrics_creates_no_file(tmp_path):
    Metrics(tmp_path / "metrics.jsonl").rewind(lambda line: True)
    assert list(tmp_path.iterdir()) == []


# Formatting

DURATIONS = [
    (0, "under 1 s"), (0.94, "under 1 s"), (0.96, "1 s"), (45, "45 s"), (89, "89 s"), (90, "2 min"), (100, "2 min"), (3600, "60 min"),
    (5340, "89 min"),
    (5400, "1 h 30 min"), (7199, "1 h 59 min"), (7200, "2 h 00 min"), (7500, "2 h 05 min"), (360000, "100 h 00 min"),
]  # fmt: skip


@pytest.mark.parametrize(("seconds", "expected"), DURATIONS)
def test_duration(seconds, expected):
    assert duration(seconds) == expected


AMOUNTS = [
    (0, "0"), (7, "7"), (499, "499"), (500, "0.5k"), (12_345, "12.3k"), (499_999, "500k"), (810_000, "0.81M"),
    (124_439_808, "124M"), (1_542_000_000, "1.54G"), (2e11, "200G"), (7.5e11, "0.75T"), (3e12, "3T"),
]  # fmt: skip


@pytest.mark.parametrize(("count", "expected"), AMOUNTS)
def test_amount(count, expected):
    assert amount(count) == expected
    assert amount(count, "B") == expected + "B"


def test_table_aligns_its_columns():
    rows = [("part", "what", "more"), ("weights", "restored", "28 tensors"), ("x", "", "")]
    assert table(rows) == "part     what      more\nweights  restored  28 tensors\nx"


def test_a_path_is_shown_relative_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "runs" / "one") == os.path.join("runs", "one")
    assert shown(tmp_path.parent / "elsewhere") == str(tmp_path.parent / "elsewhere")
