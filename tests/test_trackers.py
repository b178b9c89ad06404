"""A tracker mirrors metrics.jsonl, each step once; its absence or failure leaves training bit-identical."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from drive import ROOT, at_step, environment, newest, tensor_bytes, train

from milepost import config
from milepost.runtime import trackers
from milepost.runtime.progress import read_metrics
from milepost.runtime.tracking.base import Tracker
from milepost.runtime.tracking.mirror import Mirror
from milepost.runtime.tracking.wandb import mode_and_project

KINDS = [*trackers.TRACKERS]


class Recorder(Tracker):
    """A tracker that records its rows, of steps from `first` on, and raises at row number `fails_at`."""

    def __init__(self, first: int = 0, *, fails_at: int | None = None) -> None:
        self.first, self.fails_at = first, fails_at
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def next_step(self) -> int:
        return self.first

    def write(self, step: int, when: float, row: dict[str, float]) -> None:
        if len(self.rows) == self.fails_at:
            raise RuntimeError("the server\nis gone")
        self.rows.append((step, row))

    def close(self) -> None:
        self.closed += 1


def line(step: int, split: str = "train", **figures: float | None) -> dict[str, object]:
    return {"run_id": "one", "step": step, "time": 1.5, "split": split} | figures


# ---------------------------------------------------------------------------------------------------------------------
# The mirror.


def test_a_steps_lines_become_one_row_when_the_next_step_begins():
    theirs = Recorder()
    mirror = Mirror("trackio", lambda: theirs, log=pytest.fail)
    mirror.write(line(1, loss=4.0, lr=0.1, tok_s=None))
    assert theirs.rows == []
    mirror.write(line(1, "validation", loss=4.5))
    mirror.write(line(2, loss=float("nan"), lr=0.2))  # what is no number is left out
    assert theirs.rows == [(1, {"train/loss": 4.0, "train/lr": 0.1, "validation/loss": 4.5})]
    mirror.close(complete=True)
    assert theirs.rows[1:] == [(2, {"train/lr": 0.2})]
    mirror.write(line(3, loss=1.0))
    mirror.close(complete=True)
    assert (len(theirs.rows), theirs.closed) == (2, 1)


def test_recorded_steps_are_skipped_and_an_incomplete_step_is_left_to_the_resume():
    theirs = Recorder(first=3)
    mirror = Mirror("wandb", lambda: theirs, log=pytest.fail)
    for step in range(1, 6):
        mirror.write(line(step, loss=1.0 / step))
    mirror.close(complete=False)
    assert [step for step, _ in theirs.rows] == [3, 4]
    assert theirs.closed == 1


def test_a_failure_is_logged_once_and_ends_the_mirror():
    said: list[str] = []
    theirs = Recorder(fails_at=1)
    mirror = Mirror("wandb", lambda: theirs, log=said.append)
    for step in range(1, 6):
        mirror.write(line(step, loss=1.0))
    mirror.close(complete=True)
    assert [step for step, _ in theirs.rows] == [1]
    assert said == ["warning: wandb failed (the server is gone); training continues, and metrics.jsonl has every value"]


# ---------------------------------------------------------------------------------------------------------------------
# In training.


def test_a_missing_package_is_one_sentence_before_any_file_is_written(tmp_path, monkeypatch):
    for kind in KINDS:
        monkeypatch.setitem(sys.modules, kind, None)
        code, said = train(tmp_path, TRACKER=kind)
        sentence = f"error: TRACKER={kind}: {kind} is not installed: pip install {kind}, or set TRACKER=none"
        assert (code, said.splitlines()[-1]) == (2, sentence)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_a_folder_of_that_name_is_not_a_package(tmp_path, monkeypatch):
    """wandb leaves a folder `wandb` where it was used."""
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers.is_installed("no_such_tracker")
    assert trackers.is_installed("json")


FAILING = """
import contextlib
runs = []
class Run:
    _next_step = 0
    def log(self, values, step):
        runs.append(step)
        if step > 2:
            raise OSError("no space left on the server")
def init(**words):
    print("* hello")
    return Run()
def finish():
    raise OSError("still none")
"""


def test_a_tracker_that_fails_changes_no_bit_and_prints_nothing_to_stdout(tmp_path, monkeypatch, capsys):
    """A fake trackio whose third row fails: one warning, and the weights of a run without a tracker."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    plain, mirrored = tmp_path / "plain", tmp_path / "mirrored"
    for folder, kind in ((plain, "none"), (mirrored, "trackio")):
        folder.mkdir()
        code, said = train(folder, TRACKER=kind)
        assert code == 0
        assert said.count("warning: TRACKER=trackio failed (no space left on the server)") == (kind == "trackio")
        assert "* hello" not in capsys.readouterr().out
    assert sys.modules["trackio"].runs == [0, 1, 2, 3]
    assert tensor_bytes(newest(plain)) == tensor_bytes(newest(mirrored))


def test_a_resumed_run_mirrors_what_its_tracker_lacks(tmp_path, monkeypatch):
    """The tracker had reached step 5 when the run was killed.

    Resuming from step 4 adds 6 to 8, and does not double the evaluation of 4.
    """
    theirs: list[Recorder] = []

    class Remembering(Recorder):
        def __init__(self, **_: object) -> None:
            super().__init__(first=theirs[-1].rows[-1][0] + 1 if theirs else 0)
            theirs.append(self)

    monkeypatch.setitem(trackers.TRACKERS, "trackio", trackers.Entry(tracker=Remembering))
    assert train(tmp_path, TRACKER="trackio")[0] == 0
    del theirs[0].rows[6:]  # as after a kill
    at_step(tmp_path, 8).unlink()
    for best in (tmp_path / "checkpoints" / "best").iterdir():
        best.unlink()
    assert train(tmp_path, RESUME="auto")[0] == 0  # the tracker comes from the checkpoint
    rows = theirs[0].rows + theirs[1].rows
    assert [step for step, _ in rows] == list(range(9))
    (path,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    expected = [(one["step"], f"{one['split']}/loss", one["loss"]) for one in read_metrics(path)]
    mirrored = [(step, name, value) for step, row in rows for name, value in row.items() if name.endswith("/loss")]
    assert sorted(mirrored) == sorted(expected)


@pytest.mark.parametrize(("lost", "called"), [(0, "caught_up"), (2, "keep_earlier"), (99, "keep_earlier")])
def test_a_tracker_replaces_what_it_recorded_only_if_the_metrics_begin_where_the_run_did(
    lost, called, tmp_path, monkeypatch
):
    """Resuming from step 4 after the first `lost` lines of metrics.jsonl were deleted."""
    calls: list[str] = []

    class Calling(Recorder):
        def __init__(self, **_: object) -> None:
            super().__init__()

        def caught_up(self) -> None:
            calls.append("caught_up")

        def keep_earlier(self) -> None:
            calls.append("keep_earlier")

    monkeypatch.setitem(trackers.TRACKERS, "trackio", trackers.Entry(tracker=Calling))
    assert train(tmp_path, TRACKER="trackio", EVAL_INTERVAL="4")[0] == 0
    assert calls == ["caught_up"]  # a new run
    at_step(tmp_path, 8).unlink()
    for best in (tmp_path / "checkpoints" / "best").iterdir():
        best.unlink()
    (path,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[lost + 1 :] if lost else lines), encoding="utf-8")
    assert train(tmp_path, RESUME="auto")[0] == 0
    assert calls == ["caught_up", called]


# ---------------------------------------------------------------------------------------------------------------------
# The variables of W&B.


@pytest.mark.parametrize(
    ("variables", "mode", "project"),
    [
        ({}, "offline", "milepost"),
        ({"WANDB_API_KEY": "x"}, "online", "milepost"),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "offline", "milepost"),
        ({"WANDB_MODE": "online", "WANDB_PROJECT": "letters"}, "online", "letters"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": ""}, "disabled", "milepost"),
    ],
)
def test_wandb_is_offline_unless_its_own_variables_change_that(variables, mode, project, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert mode_and_project(config.environment(trackers.TRACKERS["wandb"].variables)) == (mode, project)


def test_a_resume_keeps_the_tracker(tmp_path):
    """TRACKER is saved in the checkpoint, so that a resume without it continues the same series."""
    settings = config.read(environment(tmp_path, TRACKER="wandb"))
    assert config.to_dict(settings)["TRACKER"] == "wandb"
    bare = config.read(environment(tmp_path))
    assert config.from_saved(bare, config.to_dict(settings)).tracker == "wandb"
    assert config.changes(config.read(environment(tmp_path, TRACKER="none")), config.to_dict(settings)) == {}


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a run.


def test_each_validation_has_its_sample_beside_the_metrics(tmp_path):
    assert train(tmp_path, SAMPLE_INTERVAL=None)[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    validated = [one["step"] for one in read_metrics(folder / "metrics.jsonl") if one["split"] == "validation"]
    samples = sorted(path.name for path in (folder / "samples").iterdir())
    assert validated == [0, 4, 8]
    assert samples == ["step000004.txt", "step000008.txt"]  # an untrained model has nothing to say
    assert all(len(path.read_text(encoding="utf-8")) > 100 for path in (folder / "samples").iterdir())


def test_run_json_names_the_origin_of_a_run(tmp_path):
    assert train(tmp_path, SAMPLE_INTERVAL="0")[0] == 0
    (first,) = (tmp_path / "runs").iterdir()
    assert origin(first) == {"run_id": first.name, "parent": None}
    assert (
        train(
            tmp_path,
            INIT_FROM=str(at_step(tmp_path, 4)),
            SAMPLE_INTERVAL="0",
            TRAINING_STEPS="2",
            WARMUP_STEPS="0",
            LEARNING_RATE="2e-3",
        )[0]
        == 0
    )
    (second,) = (path for path in (tmp_path / "runs").iterdir() if path != first)
    parent = origin(second)["parent"]
    assert (parent["run_id"], parent["step"]) == (first.name, 4)


def origin(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_training_imports_no_tracker():
    """Without a tracker, none is imported."""
    names = ", ".join(map(repr, KINDS))
    code = (
        f"import sys, training; print([name for name in ({names}, 'torch.utils.tensorboard') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
