"""MODE=resume of scripts/load_checkpoint.py: a child run that resumes from a checkpoint for a number of added steps."""

import importlib.util
import io
import math
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from drive import ROOT, TINY, at_step, command, environment, small_text, tensor_bytes
from drive import train as trained_in
from records import flipped

import training
from milepost import ckpt, config
from milepost.resume import resumed
from milepost.run import text as run_text
from milepost.runtime.progress import Log, read_metrics
from milepost.runtime.schedule import Schedule, lr_at
from milepost.text.batches import Batches

SCRIPT = ROOT / "scripts" / "load_checkpoint.py"
SPEC = importlib.util.spec_from_file_location("load_checkpoint", SCRIPT)
load_checkpoint = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(load_checkpoint)

NOTHING = dict.fromkeys([*TINY, "TRAINING_DATA_SOURCE", "CHECKPOINT_DIR"]) | {"DEVICE": "cpu"}


class Said(NamedTuple):
    """The exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str

    def row(self, part: str) -> str:
        """A row of the table, its columns separated by two spaces."""
        (line,) = [line for line in self.out.splitlines() if line.startswith(f"{part}  ")]
        return re.sub(" {2,}", "  ", line)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A run of 8 steps, saved at 4 and 8; its rate falls from 1e-3 to a quarter.

    Schedule and optimizer are not the defaults.
    """
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_text, "CACHE_FOLDER", folder / "cache")
        code, said = trained_in(
            folder, OPTIMIZER="adamw", LR_SCHEDULE="cosine", MIN_LEARNING_RATE="2.5e-4", SAMPLE_INTERVAL="0"
        )
    assert code == 0, said
    return folder


@pytest.fixture
def trained(trained_once, tmp_path):
    """A copy of the run for one test; its text stays where it was."""
    folder = tmp_path / "trained"
    shutil.copytree(trained_once, folder, ignore=shutil.ignore_patterns("cache"))
    return folder


@pytest.fixture
def resume(trained, capsys):
    """Resume in this process from `path` (step 4 of `trained`) with only RUNS_DIR and `changes` set."""

    def resume(path: Path | None = None, **changes: str | None) -> Said:
        wanted = {"MODE": "resume", "CHECKPOINT_PATH": str(path or at_step(trained, 4)), "RESUME_TRAINING_STEPS": "4"}
        settings = config.read(environment(trained, **NOTHING | wanted | changes))
        capsys.readouterr()
        err = io.StringIO()
        code = training.guarded(load_checkpoint.main, settings, log=Log(err))
        return Said(code, capsys.readouterr().out, err.getvalue())

    return resume


def child_of(folder: Path, checkpoints: str = "checkpoints") -> ckpt.Checkpoint:
    """Return the newest checkpoint, of a child run, with all bytes verified."""
    found = ckpt.latest(ckpt.find(folder / checkpoints))
    assert found is not None
    record = ckpt.load(found.path, verify=True)
    assert record.parent is not None
    return record


def files(folder: Path) -> dict[Path, bytes]:
    """Return every visible file and its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}


def rates(folder: Path, run_id: str | None) -> dict[int, float]:
    """Return the learning rate of each step of a run."""
    lines = read_metrics(folder / "runs" / str(run_id) / "metrics.jsonl")
    return {line["step"]: line["lr"] for line in lines if line["split"] == "train"}


# Steps and rates


def test_the_steps_are_added_to_those_of_the_checkpoint(resume, trained):
    said = resume(RESUME_TRAINING_STEPS="3")
    assert said.code == 0, said.err
    record = child_of(trained)
    assert (record.step, record.windows_seen, record.tokens_seen) == (7, 7 * 4, 7 * 4 * 16)
    assert list(rates(trained, record.run_id)) == [5, 6, 7]
    assert said.row("step") == "step  restored  4; 3 more, to 7"
    assert "done: 7 steps" in said.err


def cosine(peak: float, floor: float, steps: int) -> list[float]:
    return [floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


def test_a_new_schedule_covers_the_added_steps(resume, trained):
    """There is no second warm-up, though the model's default has one, and the floor stays a quarter of the peak."""
    said = resume(RESUME_LEARNING_RATE="4e-4", MODEL_TYPE="gpt2")
    assert list(rates(trained, child_of(trained).run_id).values()) == pytest.approx(cosine(4e-4, 1e-4, 4))
    wanted = "learning rate  overridden  cosine, peak 0.0004, floor 0.0001, 0 warm-up steps from step 4"
    assert said.row("learning rate") == wanted
    assert said.row("group 1").startswith("group 1  next learning rate 0.0004, weight decay 0.1, ")
    assert said.row("group 2").startswith("group 2  next learning rate 0.0004, weight decay 0, ")


def test_the_default_rate_is_3e_4(resume, trained):
    resume()
    assert list(rates(trained, child_of(trained).run_id).values()) == pytest.approx(cosine(3e-4, 7.5e-5, 4))


@pytest.mark.parametrize("asked", [{}, {"RESUME_LEARNING_RATE": "3e-4"}, {"OPTIMIZER": "adamw"}])
def test_the_default_rate_is_compared_with_the_peak_of_the_run(asked, resume, tmp_path):
    """Muon's rates are far from 3e-4; a rate that was set, or that of another optimizer, is not compared."""
    folder = tmp_path / "muon"
    folder.mkdir()
    assert trained_in(folder, SAMPLE_INTERVAL="0", OPTIMIZER="muon", LEARNING_RATE="1e-2")[0] == 0
    said = resume(at_step(folder, 4), RESUME_TRAINING_STEPS="0", **asked)
    assert said.code == 0, said.err
    assert ("RESUME_LEARNING_RATE=0.01" in said.row("learning rate")) is (not asked)
    said = resume(at_step(folder, 4), RESUME_TRAINING_STEPS="0", RESUME_LEARNING_RATE="0.01")  # what it advises
    assert "peak 0.01" in said.row("learning rate")


def test_warm_up_floor_and_kind_can_be_set(resume, trained):
    resume(RESUME_LEARNING_RATE="3e-4", WARMUP_STEPS="2", MIN_LEARNING_RATE="0", LR_SCHEDULE="linear")
    wanted = [1e-4, 2e-4, 3e-4, 1.5e-4]
    assert list(rates(trained, child_of(trained).run_id).values()) == pytest.approx(wanted)


def test_a_floor_above_the_rate_is_an_error(resume, trained):
    before = files(trained)
    said = resume(RESUME_LEARNING_RATE="1e-4", MIN_LEARNING_RATE="1e-2")
    assert said.code == 2
    assert "MIN_LEARNING_RATE=0.01 is above RESUME_LEARNING_RATE=0.0001" in said.err
    assert files(trained) == before


def test_keep_within_the_schedule_is_bit_identical_to_the_uninterrupted_run(resume, trained):
    straight = ckpt.load(at_step(trained, 8))
    said = resume(RESUME_LEARNING_RATE="keep")
    assert said.code == 0, said.err
    record = child_of(trained)
    assert record.run_id != straight.run_id
    assert record.step == straight.step == 8
    assert tensor_bytes(record) == tensor_bytes(straight)
    assert record.validation_loss == straight.validation_loss
    assert said.row("bit-exact").startswith("bit-exact  yes")
    assert said.row("learning rate").startswith("learning rate  restored  cosine, peak 0.001, floor 0.00025, 2 warm-up")


def test_keep_within_muons_schedule_is_bit_identical_to_the_uninterrupted_run(resume, tmp_path):
    """Muon's moments beside AdamW's, and a linear schedule to zero."""
    folder = tmp_path / "muon"
    folder.mkdir()
    assert trained_in(folder, SAMPLE_INTERVAL="0", OPTIMIZER="muon")[0] == 0
    said = resume(at_step(folder, 4), RESUME_LEARNING_RATE="keep")
    assert said.code == 0, said.err
    record = child_of(folder)
    assert record.hyperparameters["OPTIMIZER"] == "muon"
    assert tensor_bytes(record) == tensor_bytes(ckpt.load(at_step_of_parent(folder)))
    assert said.row("optimizer") == "optimizer  restored  moments of 28 of 28 parameters"
    assert said.row("learning rate").startswith("learning rate  restored  linear, peak 0.001, floor 0, 2 warm-up")
    assert said.row("bit-exact").startswith("bit-exact  yes")


def test_control_another_rate_gives_other_bytes(resume, trained):
    straight = ckpt.load(at_step(trained, 8))
    said = resume(RESUME_LEARNING_RATE="1e-3")
    assert tensor_bytes(child_of(trained)) != tensor_bytes(straight)
    assert said.row("bit-exact").startswith("bit-exact  no  the learning-rate schedule is a new one")


def test_keep_past_the_schedule_holds_the_last_rate_above_zero(resume, trained, tmp_path):
    """A linear schedule to zero: its eighth and last step has a sixth of the peak, and so have all later steps."""
    folder = tmp_path / "linear"
    folder.mkdir()
    trained_in(folder, LR_SCHEDULE="linear", MIN_LEARNING_RATE="0", LEARNING_RATE="6e-3")
    said = resume(
        at_step(folder, 4),
        RESUME_TRAINING_STEPS="7",
        RESUME_LEARNING_RATE="keep",
        CHECKPOINT_DIR=str(trained / "child"),
    )
    assert said.code == 0, said.err
    wanted = [4e-3, 3e-3, 2e-3, 1e-3, 1e-3, 1e-3, 1e-3]
    assert list(rates(trained, child_of(trained, "child").run_id).values()) == pytest.approx(wanted)
    resume(at_step(folder, 8), RESUME_TRAINING_STEPS="2", RESUME_LEARNING_RATE="keep")
    assert list(rates(trained, child_of(folder).run_id).values()) == pytest.approx([1e-3, 1e-3])


def test_zero_steps_print_the_plan_and_write_nothing(resume, trained):
    before = files(trained)
    said = resume(RESUME_TRAINING_STEPS="0", RESUME_LEARNING_RATE="4e-4")
    assert said.code == 0
    assert files(trained) == before
    assert said.row("checkpoint") == f"checkpoint  {at_step(trained, 4)}"
    assert said.row("step") == "step  restored  4; 0 more, to 4"
    assert "peak 0.0004, floor 0.0001" in said.row("learning rate")
    assert "RESUME_TRAINING_STEPS=0: nothing is trained" in said.err


def test_the_first_line_says_how_to_look_only(resume, trained):
    said = resume()
    assert said.code == 0
    assert "RESUME_TRAINING_STEPS=0" in said.err.splitlines()[0]
    assert "4 more steps" in said.err.splitlines()[0]
    assert said.err.index("RESUME_TRAINING_STEPS=0") < said.err.index("plan: 4 steps")
    assert "stop and set" not in resume(RESUME_TRAINING_STEPS="0").err  # the control


# The text


def other_text(folder: Path, *, added: str = "") -> Path:
    """The start of the bundled text, longer than the training text, with `added` in its middle."""
    path = small_text(folder, characters=9000, name="others.txt")
    content = path.read_text(encoding="utf-8")
    known = set(small_text(folder, name="known.txt").read_text(encoding="utf-8"))
    path.write_text("".join(c for c in content if c in known).replace("\n\n", f"\n\n{added}", 1), encoding="utf-8")
    return path


def test_new_data_starts_at_its_beginning(resume, trained, tmp_path):
    said = resume(TRAINING_DATA_SOURCE=str(other_text(tmp_path)), RESUME_TRAINING_STEPS="3")
    assert said.code == 0, said.err
    record = child_of(trained)
    assert (record.step, record.windows_seen) == (7, 3 * 4)
    assert record.data["source"] == str(tmp_path / "others.txt")
    assert said.row("data position") == "data position  reset  window 0, epoch 0.00"
    assert "the training text differs" in said.row("bit-exact")


def test_the_first_batch_of_new_data_is_that_of_window_0(trained, tmp_path):
    """The run itself, built as the command builds it."""
    wanted = {"MODE": "resume", "TRAINING_DATA_SOURCE": str(other_text(tmp_path)), "SEED": "5"}
    settings = config.read(environment(trained, **NOTHING | wanted))
    record = ckpt.load(at_step(trained, 4))
    plan = load_checkpoint.plan(settings, record)
    child, _ = resumed(settings, record, Log(io.StringIO()), schedule=plan, end=8)
    fresh = Batches(child.text.split.train, block_size=16, batch_size=4, seed=5)
    assert [torch.equal(*pair) for pair in zip(child.batches.at(4), fresh.at(0), strict=True)] == [True, True]
    assert [torch.equal(*pair) for pair in zip(child.batches.at(6), fresh.at(2), strict=True)] == [True, True]


def test_the_same_text_elsewhere_is_the_same_data(resume, trained, tmp_path):
    moved = tmp_path / "moved.txt"
    shutil.copy(trained / "letters.txt", moved)
    said = resume(TRAINING_DATA_SOURCE=str(moved), RESUME_LEARNING_RATE="keep")
    assert said.row("data position").startswith("data position  restored  window 16,")
    assert tensor_bytes(child_of(trained)) == tensor_bytes(ckpt.load(at_step_of_parent(trained)))


def at_step_of_parent(folder: Path) -> Path:
    """Return the end of the uninterrupted run; a child may have saved another step 8 beside it."""
    (path,) = (one.path for one in ckpt.find(folder / "checkpoints") if one.step == 8 and not one.metadata["parent"])
    return path


def test_characters_that_the_vocabulary_lacks_are_an_error_with_their_list(resume, trained, tmp_path):
    before = files(trained)
    said = resume(TRAINING_DATA_SOURCE=str(other_text(tmp_path, added="na\u00efve \u65e5\u672c")))
    assert said.code == 4
    for character in ("'\u00ef' (U+00EF)", "'\u65e5' (U+65E5)", "'\u672c' (U+672C)"):
        assert character in said.err
    assert "not in the vocabulary of" in said.err
    assert str(tmp_path / "others.txt") in said.err
    assert files(trained) == before


# Where the result goes


def test_the_result_is_saved_beside_the_checkpoint_without_being_asked_for(resume, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(trained)
    assert resume().code == 0
    after = files(trained)
    new = sorted(path.relative_to(trained).parts[0:2] for path in after.keys() - before.keys())
    record = child_of(trained)
    assert record.path.parent == trained / "checkpoints"
    assert ("checkpoints", record.path.name) in new
    assert {parts[0] for parts in new} == {"checkpoints", "runs"}
    assert {path: after[path] for path in before} == before  # the old ones stay, to the byte
    assert list(tmp_path.iterdir()) == [trained]


def test_from_best_the_result_is_saved_in_the_parent_folder(resume, trained):
    (best,) = (trained / "checkpoints" / "best").iterdir()
    before = files(trained)
    assert resume(best, RESUME_TRAINING_STEPS="2").code == 0
    assert child_of(trained).path.parent == trained / "checkpoints"
    assert not (trained / "checkpoints" / "best" / "best").exists()
    assert before.items() <= files(trained).items()


def test_the_result_is_saved_in_checkpoint_dir_if_set(resume, trained):
    before = files(trained / "checkpoints")
    said = resume(CHECKPOINT_DIR=str(trained / "child"))
    assert child_of(trained, "child").step == 8
    assert files(trained / "checkpoints") == before
    assert "to " + str(trained / "child") in said.err


def test_with_checkpoints_off_nothing_is_saved(resume, trained):
    before = files(trained / "checkpoints")
    said = resume(ENABLE_CHECKPOINTS="false")
    assert said.code == 0
    assert files(trained / "checkpoints") == before
    assert "checkpoints are OFF" in said.err
    assert "done: 8 steps" in said.err


# The child run


def test_the_child_names_its_parent(resume, trained):
    parent = ckpt.load(at_step(trained, 4))
    said = resume(RESUME_TRAINING_STEPS="2")
    record = child_of(trained)
    assert record.parent == {
        "run_id": parent.run_id,
        "step": 4,
        "save_id": parent.save_id,
        "file": parent.path.name,
        "changed": {"LEARNING_RATE": [1e-3, 3e-4]},
    }
    assert record.run_id != parent.run_id
    assert said.row("run") == f"run  reset  {record.run_id}, a child of {parent.run_id}"
    assert (trained / "runs" / str(record.run_id) / "config.env").exists()


def test_settings_that_are_not_set_come_from_the_checkpoint(resume, trained):
    parent = ckpt.load(at_step(trained, 4))
    resume(RESUME_LEARNING_RATE="keep")
    record = child_of(trained)
    assert record.model_settings == parent.model_settings
    assert record.tokenizer == parent.tokenizer
    # The first run had "auto" for these; its checkpoint says what that came to mean.
    resolved = {"TOKENIZER": "char", "DTYPE": parent.runtime["dtype"], "COMPILE": "false"}
    assert record.hyperparameters == parent.hyperparameters | resolved


def test_settings_override_and_are_in_the_table(resume, trained):
    said = resume(BATCH_SIZE="2", WEIGHT_DECAY="0.5", RESUME_LEARNING_RATE="keep", RESUME_TRAINING_STEPS="3")
    record = child_of(trained)
    assert said.row("BATCH_SIZE") == "BATCH_SIZE  overridden  4 -> 2"
    assert said.row("WEIGHT_DECAY") == "WEIGHT_DECAY  overridden  0.1 -> 0.5"
    assert "weight decay 0.5" in said.row("group 1")
    assert said.row("bit-exact") == "bit-exact  no  BATCH_SIZE was 4, is 2; WEIGHT_DECAY was 0.1, is 0.5"
    assert record.parent["changed"] == {"BATCH_SIZE": [4, 2], "WEIGHT_DECAY": [0.1, 0.5]}
    assert record.hyperparameters["BATCH_SIZE"] == 2
    assert (record.windows_seen, record.tokens_seen) == (4 * 4 + 3 * 2, (4 * 4 + 3 * 2) * 16)


def test_settings_equal_to_the_saved_ones_override_nothing(resume):
    said = resume(BATCH_SIZE="4", SEED="1337", RESUME_LEARNING_RATE="keep")
    assert "overridden" not in said.out
    assert said.row("bit-exact").startswith("bit-exact  yes")


def test_the_moments_are_restored(resume, trained):
    count = len(ckpt.load(at_step(trained, 4)).model_state)
    said = resume()
    assert said.row("optimizer") == f"optimizer  restored  moments of {count} of {count} parameters"
    assert all(state["step"] == 8 for state in child_of(trained).optimizer_state["state"].values())


def test_another_optimizer_restores_the_moments_that_both_have(resume, trained):
    """Muon leaves embeddings and vectors to AdamW; on the 4 matrices of each of the 2 blocks they share no moments."""
    count = len(ckpt.load(at_step(trained, 4)).model_state)
    said = resume(OPTIMIZER="muon", CHECKPOINT_DIR=str(trained / "muon"))
    assert said.code == 0, said.err
    assert said.row("optimizer") == f"optimizer  missing  moments of {count - 8} of {count} parameters"
    assert said.row("OPTIMIZER") == "OPTIMIZER  overridden  adamw -> muon"
    said = resume(child_of(trained, "muon").path, OPTIMIZER="adamw")
    assert said.code == 0, said.err
    assert said.row("optimizer") == f"optimizer  missing  moments of {count - 8} of {count} parameters"


def test_settings_that_name_no_optimizer_mean_adamw(resume, trained):
    """As in files of programs that only have AdamW: the moments are restored,
    though the model's default is Muon now.
    """
    record = ckpt.load(at_step(trained, 4))
    del record.hyperparameters["OPTIMIZER"]
    path = ckpt.save(record, trained / "old")
    said = resume(path, RESUME_LEARNING_RATE="keep")
    assert said.code == 0, said.err
    assert said.row("optimizer") == "optimizer  restored  moments of 28 of 28 parameters"
    child = child_of(trained, "old")
    assert child.hyperparameters["OPTIMIZER"] == "adamw"
    assert tensor_bytes(child) == tensor_bytes(ckpt.load(at_step(trained, 8)))
    said = resume(path, OPTIMIZER="muon", CHECKPOINT_DIR=str(trained / "muon"))
    assert said.code == 0, said.err
    assert said.row("OPTIMIZER") == "OPTIMIZER  overridden  adamw -> muon"
    assert child_of(trained, "muon").hyperparameters["OPTIMIZER"] == "muon"


def test_a_checkpoint_of_weights_only_resumes_and_reports_what_is_missing(resume, trained):
    record = ckpt.load(at_step(trained, 4))
    record.optimizer_state = None
    del record.hyperparameters["ENABLE_CHECKPOINTS"]
    path = ckpt.save(record, trained / "weights")
    count = len(record.model_state)
    said = resume(path, RESUME_LEARNING_RATE="keep")
    assert said.code == 0, said.err
    assert said.row("optimizer") == f"optimizer  missing  moments of 0 of {count} parameters"
    assert said.row("bit-exact") == f"bit-exact  no  {count} parameters have no optimizer state"
    child = child_of(trained, "weights")
    assert all(state["step"] == 4 for state in child.optimizer_state["state"].values())
    assert tensor_bytes(child) != tensor_bytes(ckpt.load(at_step(trained, 8)))


def test_a_damaged_checkpoint_is_an_error_before_training(resume, trained):
    path = at_step(trained, 4)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one bit of a tensor
    path.write_bytes(data)
    before = files(trained)
    said = resume(path)
    assert said.code == 3
    assert str(path) in said.err
    assert files(trained) == before


def test_an_architecture_set_in_the_environment_is_an_error(resume, trained):
    before = files(trained)
    said = resume(N_LAYER="3")
    assert said.code == 2
    assert "N_LAYER=3 (environment): the checkpoint has 2" in said.err
    assert files(trained) == before


def test_an_interrupted_child_resumes_bit_exactly(resume, trained, monkeypatch):
    """Interrupted and resumed with RESUME=auto, the child ends where it would have ended."""
    resume(CHECKPOINT_DIR=str(trained / "straight"), CHECKPOINT_INTERVAL="0")
    learn = training.training_step

    def interrupted(run, lr):
        if run.state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(run, lr)

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", interrupted)
        said = resume(CHECKPOINT_DIR=str(trained / "stopped"), CHECKPOINT_INTERVAL="0")
    assert said.code == 130
    first = child_of(trained, "stopped")
    assert f"RESUME={shlex.quote(str(first.path))} " in said.err
    assert first.step == 6

    again = environment(trained, **NOTHING | {"RESUME": "auto", "CHECKPOINT_DIR": str(trained / "stopped")})
    assert training.guarded(training.main, config.read(again), log=Log(io.StringIO())) == 0
    second, straight = child_of(trained, "stopped"), child_of(trained, "straight")
    assert second.run_id == first.run_id
    assert second.parent == first.parent
    assert tensor_bytes(second) == tensor_bytes(straight)
    assert rates(trained, second.run_id) == rates(trained, straight.run_id)


def test_a_changed_plan_of_a_child_begins_where_the_childs_began(resume, trained):
    """From step 0 it would be near its end already."""
    resume(WARMUP_STEPS="1", CHECKPOINT_DIR=str(trained / "child"))
    child = child_of(trained, "child")
    changed = {
        "RESUME": "auto",
        "CHECKPOINT_DIR": str(trained / "child"),
        "LEARNING_RATE": "2e-4",
        "TRAINING_STEPS": "12",
    }
    assert (
        training.guarded(training.main, config.read(environment(trained, **NOTHING | changed)), log=Log(io.StringIO()))
        == 0
    )
    more, began = Schedule(**child_of(trained, "child").schedule), Schedule(**child.schedule)
    assert (more.start_step, more.warmup_steps, more.end_step, more.peak) == (began.start_step, 1, 12, 2e-4)
    assert began.start_step == 4


def test_a_grandchild_starts_from_the_childs_schedule(resume, trained):
    resume(RESUME_TRAINING_STEPS="2", RESUME_LEARNING_RATE="8e-4", CHECKPOINT_DIR=str(trained / "child"))
    child = child_of(trained, "child")
    resume(child.path, RESUME_TRAINING_STEPS="2", RESUME_LEARNING_RATE="4e-4", CHECKPOINT_DIR=None)
    grandchild = child_of(trained, "child")
    assert grandchild.step == 8
    assert grandchild.parent["run_id"] == child.run_id
    plan = Schedule(**grandchild.schedule)
    assert (plan.start_step, plan.end_step, plan.peak, plan.floor) == (6, 8, 4e-4, pytest.approx(1e-4))
    assert list(rates(trained, grandchild.run_id).values()) == [lr_at(6, plan), lr_at(7, plan)]


def test_the_script_as_it_is_typed(trained):
    wanted = {
        "MODE": "resume",
        "CHECKPOINT_PATH": "checkpoints/checkpoint_gpt2_*_step0004_*.pt",
        "RESUME_TRAINING_STEPS": "2",
    }
    done = command(str(SCRIPT), trained, cwd=trained, **NOTHING | wanted | {"RESUME_LEARNING_RATE": "1e-4"})
    assert done.returncode == 0, done.stderr
    assert "bit-exact" in done.stdout
    assert "done: 6 steps" in done.stderr
    assert child_of(trained).step == 6


def test_latest_is_the_newest_checkpoint_that_verifies(tmp_path):
    """A resume notices one flipped bit, names the damaged checkpoint, leaves it there, and uses the previous one."""
    trained_in(tmp_path, CHECKPOINT_KEEP_BEST="0")
    older, newest_one = (one.path for one in ckpt.find(tmp_path / "checkpoints"))
    flipped(newest_one, newest_one.stat().st_size // 2)
    done = command("scripts/load_checkpoint.py", tmp_path, MODE="resume", RESUME_TRAINING_STEPS="2")
    assert done.returncode == 0, done.stderr
    assert f"skipped: {newest_one}: is damaged" in done.stderr
    assert f"taking {older}" in done.stderr
    assert newest_one.exists()
    done = command(
        "scripts/load_checkpoint.py",
        tmp_path,
        MODE="resume",
        RESUME_TRAINING_STEPS="2",
        CHECKPOINT_PATH=str(newest_one),
    )
    assert done.returncode == 3  # who names one means it
