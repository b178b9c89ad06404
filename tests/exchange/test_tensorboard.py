"""TRACKER=tensorboard beside TensorBoard's own reader: every figure of metrics.jsonl, each step once,
whatever interrupted the run.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from drive import ROOT, at_step, environment, newest, tensor_bytes, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from milepost.runtime.progress import read_metrics

TAGS = {
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/tokens",
    "train/tok_s",
    "validation/loss",
    "validation/tokens",
}


def run_folder(folder: Path) -> Path:
    (place,) = (folder / "runs").iterdir()
    return place


def reader(folder: Path) -> EventAccumulator:
    """Return TensorBoard's own reader of the run."""
    events = EventAccumulator(str(run_folder(folder) / "tensorboard"), size_guidance={"scalars": 0})
    return events.Reload()


def shown_by_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every series, in the order in which TensorBoard has them."""
    events = reader(folder)
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.jsonl, in float32 as TensorBoard keeps it."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(run_folder(folder) / "metrics.jsonl"):
        for name in ("loss", "lr", "grad_norm", "tokens", "tok_s"):
            if line[name] is not None:
                series.setdefault(f"{line['split']}/{name}", []).append(
                    (line["step"], pytest.approx(line[name], rel=1e-6))
                )
    return series


def without_speed(series: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {tag: values for tag, values in series.items() if tag != "train/tok_s"}


def forget_after(folder: Path, step: int) -> None:
    """Leaves the checkpoints up to a step, as if the run had been killed before the next save."""
    for path in [*(folder / "checkpoints").glob("*.pt"), *(folder / "checkpoints" / "best").glob("*.pt")]:
        if path.parent.name == "best" or path not in {at_step(folder, one) for one in range(1, step + 1)}:
            path.unlink()


def test_every_figure_is_there_once(tmp_path):
    assert train(tmp_path, TRACKER="tensorboard")[0] == 0
    seen = shown_by_tensorboard(tmp_path)
    assert set(seen) == TAGS
    assert seen == logged(tmp_path)
    assert [step for step, _ in seen["train/loss"]] == list(range(1, 9))


@pytest.mark.parametrize("log_interval", ["1", "3"])
@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_a_run_resumed_from_an_earlier_step_doubles_and_loses_no_row(step, log_interval, tmp_path):
    changes = {"CHECKPOINT_INTERVAL": "1", "LOG_INTERVAL": log_interval, "TRACKER": "tensorboard"}
    assert train(tmp_path, **changes)[0] == 0
    straight = shown_by_tensorboard(tmp_path)
    forget_after(tmp_path, step)
    assert train(tmp_path, RESUME="auto", **changes)[0] == 0
    seen = shown_by_tensorboard(tmp_path)
    assert seen == logged(tmp_path)
    assert without_speed(seen) == without_speed(straight)
    assert len(list((run_folder(tmp_path) / "tensorboard").iterdir())) == 1


def test_a_tensorboard_that_is_looking_on_drops_what_was_undone(tmp_path, monkeypatch):
    """A running TensorBoard has read the first process's file; the second process's file, a minute later,
    replaces it.
    """
    assert train(tmp_path, CHECKPOINT_INTERVAL="1", TRACKER="tensorboard")[0] == 0
    live = reader(tmp_path)
    before = live.Scalars("train/loss")
    forget_after(tmp_path, 4)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: time.time() + 60))
    assert train(tmp_path, RESUME="auto")[0] == 0
    live.Reload()
    after = live.Scalars("train/loss")
    assert [one.step for one in after] == list(range(1, 9))
    assert [one.value for one in after] == [one.value for one in before]
    assert [one.wall_time for one in after][:4] == [one.wall_time for one in before][:4]


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import training
from drive import train
from pathlib import Path
report = training.report
def killed(run, *words, **more):
    report(run, *words, **more)
    if run.state.step == {step}:
        os.kill(os.getpid(), signal.{name})
training.report = killed
sys.exit(train(Path({folder!r}), TRACKER="tensorboard", CHECKPOINT_INTERVAL="3", RESUME="auto")[0])
"""


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGTERM", 130)])
@pytest.mark.parametrize("steps", [(5,), (4, 5), (2, 7, 8)])
def test_a_run_killed_and_resumed_has_the_rows_of_an_uninterrupted_run(steps, name, code, tmp_path):
    """In a process of its own, in the middle of a step's lines; each time anew from where its last checkpoint is."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
    assert train(straight, TRACKER="tensorboard", CHECKPOINT_INTERVAL="3")[0] == 0
    environment(broken)
    for step in steps:
        text = KILLED.format(tests=str(ROOT / "tests"), root=str(ROOT), folder=str(broken), step=step, name=name)
        done = subprocess.run(
            [sys.executable, "-c", text],
            env=os.environ | {"TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
    assert train(broken, RESUME="auto", CHECKPOINT_INTERVAL="3")[0] == 0
    newest_run = max((broken / "runs").iterdir())
    for other in (broken / "runs").iterdir():  # killed before its first checkpoint, a run has no successor
        if other != newest_run:
            other.rename(tmp_path / other.name)
    assert without_speed(shown_by_tensorboard(broken)) == without_speed(shown_by_tensorboard(straight))
    assert shown_by_tensorboard(broken) == logged(broken)


def test_turned_on_in_the_middle_the_series_is_whole(tmp_path):
    assert train(tmp_path, CHECKPOINT_INTERVAL="1")[0] == 0
    forget_after(tmp_path, 4)
    assert train(tmp_path, RESUME="auto", TRACKER="tensorboard")[0] == 0
    assert shown_by_tensorboard(tmp_path) == logged(tmp_path)


def test_events_that_metrics_lack_are_kept_as_a_run_of_their_own(tmp_path):
    """metrics.jsonl was deleted: nothing else has the figures of the first steps. A second resume adds nothing there."""
    assert train(tmp_path, CHECKPOINT_INTERVAL="1", TRACKER="tensorboard")[0] == 0
    before = shown_by_tensorboard(tmp_path)["train/loss"]
    forget_after(tmp_path, 4)
    (run_folder(tmp_path) / "metrics.jsonl").unlink()
    code, said = train(tmp_path, RESUME="auto", CHECKPOINT_INTERVAL="1")
    kept = run_folder(tmp_path) / "tensorboard" / "earlier"
    assert code == 0
    assert f"metrics.jsonl lacks the first steps of this run; the events so far are kept in {kept}" in said
    there = EventAccumulator(str(kept), size_guidance={"scalars": 0}).Reload()
    assert [(one.step, one.value) for one in there.Scalars("train/loss")] == before
    (own,) = (run_folder(tmp_path) / "tensorboard").glob("events*")
    new = EventAccumulator(str(own), size_guidance={"scalars": 0}).Reload()
    assert [one.step for one in new.Scalars("train/loss")] == [5, 6, 7, 8]
    forget_after(tmp_path, 6)
    assert train(tmp_path, RESUME="auto")[0] == 0
    assert len(list(kept.iterdir())) == len(list((run_folder(tmp_path) / "tensorboard").glob("events*"))) == 1


def test_it_changes_no_bit(tmp_path):
    for kind in ("none", "tensorboard"):
        (tmp_path / kind).mkdir()
        assert train(tmp_path / kind, TRACKER=kind, DROPOUT="0.2")[0] == 0
    assert tensor_bytes(newest(tmp_path / "none")) == tensor_bytes(newest(tmp_path / "tensorboard"))


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
    """A file lies where the folder of events should be."""
    assert train(tmp_path, CHECKPOINT_INTERVAL="1")[0] == 0
    forget_after(tmp_path, 4)
    (run_folder(tmp_path) / "tensorboard").write_text("in the way")
    code, said = train(tmp_path, RESUME="auto", TRACKER="tensorboard")
    assert code == 0
    assert said.count("warning: TRACKER=tensorboard failed (") == 1
    assert "training continues" in said
