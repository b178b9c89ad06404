"""Interrupted + resumed = uninterrupted, bit for bit: every weight, every optimizer tensor and every logged figure."""

import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import programs
import pytest
import torch
from drive import ROOT, at_step, command, environment, logged, newest, tensor_bytes, train

import training
from milepost import ckpt
from milepost.runtime.hardware import choose_compile

STEPS = 8
COMBINATIONS = {
    "bigram, char": {"MODEL_TYPE": "bigram"},
    "bigram, bpe, bfloat16, accumulation": {"MODEL_TYPE": "bigram", "TOKENIZER": "bpe", "BPE_VOCAB_SIZE": "300", "DTYPE": "bfloat16", "GRADIENT_ACCUMULATION_STEPS": "2"},
    "bigram, compiled": {"MODEL_TYPE": "bigram", "COMPILE": "true"},
    "gpt2, char, accumulation": {"GRADIENT_ACCUMULATION_STEPS": "2"},
    "gpt2, bpe, bfloat16": {"TOKENIZER": "bpe", "BPE_VOCAB_SIZE": "300", "DTYPE": "bfloat16"},
    "gpt2, gpt2 tokenizer": {"TOKENIZER": "gpt2"},
    "gpt2, gpt2 tokenizer, bfloat16, accumulation": {"TOKENIZER": "gpt2", "DTYPE": "bfloat16", "GRADIENT_ACCUMULATION_STEPS": "2"},
    # 48 x 16 rows of 50257 logits
    "gpt2, chunked head, bfloat16": {"TOKENIZER": "gpt2", "DTYPE": "bfloat16", "BATCH_SIZE": "48"},
    "gpt2, muon": {"OPTIMIZER": "muon"},
    "gpt2, adamw, cosine": {"OPTIMIZER": "adamw", "LR_SCHEDULE": "cosine"},
    "gpt2, byte, linear schedule to zero": {"TOKENIZER": "byte", "LR_SCHEDULE": "linear", "MIN_LEARNING_RATE": "0"},
    "gpt2, TTT layers, bfloat16": {"TTT_LAYERS": "0,1", "TTT_MINI_BATCH_SIZE": "5", "DTYPE": "bfloat16"},
    "gpt2, compiled": {"COMPILE": "true"},
    "gpt2, compiled, bfloat16, accumulation": {"COMPILE": "true", "DTYPE": "bfloat16", "GRADIENT_ACCUMULATION_STEPS": "2"},
}  # fmt: skip


def resume_from(straight: Path, folder: Path, step: int, **changes: str) -> tuple[int, str]:
    """Goes on in `folder` from nothing but the straight run's checkpoint of `step` and its metrics."""
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(at_step(straight, step), folder / "checkpoints")
    shutil.copy(straight / "letters.txt", folder)
    shutil.copytree(straight / "runs", folder / "runs")
    return train(folder, RESUME="auto", **changes)


def assert_same(one: Path, other: Path) -> None:
    assert tensor_bytes(newest(one)) == tensor_bytes(newest(other))
    assert logged(one) == logged(other)


# Each combination resumes from step 4, which ends with an evaluation, and by turns from the first, from one before an
# evaluation and from the last but one. tests/soak_exact.py draws settings and steps freely.
FROM = {name: (4, (1, 3, STEPS - 1)[number % 3]) for number, name in enumerate(COMBINATIONS)}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_resumed_equals_uninterrupted(name, tmp_path):
    changes = COMBINATIONS[name]
    if changes.get("COMPILE") == "true":
        compiles, reason = choose_compile("true", torch.device("cpu"), pays=True, steps=STEPS)
        if not compiles:
            pytest.skip(reason)
    straight = tmp_path / "straight"
    straight.mkdir()
    assert train(straight, CHECKPOINT_INTERVAL="1", REPLAY_CHECK_INTERVAL="0", **changes)[0] == 0
    final = newest(straight)
    assert final.step == STEPS
    assert final.runtime["compile"] == (changes.get("COMPILE") == "true")
    assert len(logged(straight)) == STEPS + 3  # a line a step, and validations at 0, 4 and 8
    for step in FROM[name]:
        again = tmp_path / f"from {step}"
        code, said = resume_from(straight, again, step, REPLAY_CHECK_INTERVAL="2", **changes)  # which changes no bit
        assert code == 0, said
        assert_same(straight, again)


def test_a_resume_of_a_resume(tmp_path):
    straight, first, second = (tmp_path / name for name in ("straight", "first", "second"))
    straight.mkdir()
    train(straight, CHECKPOINT_INTERVAL="1")
    resume_from(straight, first, 2, CHECKPOINT_INTERVAL="1")
    resume_from(first, second, 5)
    assert_same(straight, second)


def test_the_optimizer_has_really_stepped(tmp_path):
    """Equal bytes of nothing would prove nothing."""
    train(tmp_path, OPTIMIZER="adamw")
    record = newest(tmp_path)
    assert record.optimizer_state is not None
    assert len(record.optimizer_state["state"]) == len(record.model_state)
    assert all(
        moments["step"] == STEPS and moments["exp_avg_sq"].abs().sum() > 0
        for moments in record.optimizer_state["state"].values()
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    assert train(folder)[0] == 0
    return folder


def stopped_after(step: int, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: str) -> str:
    """Trains in `folder` until a real signal comes in the middle of a step; that one is finished and saved,
    and the exit code is 130.
    """
    folder.mkdir()
    learn = training.training_step

    def interrupted(run, lr):
        if run.state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(run, lr)

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", interrupted)
        code, said = train(folder, **changes)
    assert code == 130
    assert newest(folder).step == step
    return said


@pytest.mark.parametrize("step", [2, 3, 4, 6])  # mid-interval, and 4 at an evaluation and a save
def test_after_sigterm(step, straight, tmp_path, monkeypatch):
    folder = tmp_path / "stopped"
    said = stopped_after(step, folder, monkeypatch)
    assert f"RESUME={shlex.quote(str(newest(folder).path))} " in said
    code, said = train(folder, RESUME="auto")
    assert code == 0, said
    assert_same(straight, folder)


KEEPING = {"CHECKPOINT_INTERVAL": "1", "CHECKPOINT_KEEP_LAST": "1"}


@pytest.fixture(scope="module", params=["gpt2", "bigram"])
def model_and_straight(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    assert train(folder, MODEL_TYPE=request.param, **KEEPING)[0] == 0
    return request.param, folder


@pytest.mark.parametrize("layout", ckpt.WRITERS)
def test_from_every_layout(layout, model_and_straight, tmp_path, monkeypatch):
    """The resume writes the layout it came from; what a policy of keeping leaves is enough to go on."""
    (model, straight), folder = model_and_straight, tmp_path / "stopped"
    stopped_after(3, folder, monkeypatch, CHECKPOINT_LAYOUT=layout, MODEL_TYPE=model, **KEEPING)
    code, said = train(folder, RESUME="auto", MODEL_TYPE=model)
    assert code == 0, said
    assert newest(folder).layout == layout
    assert newest(straight).layout == "unified"
    assert_same(straight, folder)
    code, said = train(folder, RESUME="auto", MODEL_TYPE=model, CHECKPOINT_LAYOUT="unified", TRAINING_STEPS="10")
    assert code == 0, said
    assert newest(folder).layout == "unified"


@pytest.mark.parametrize("layout", ckpt.WRITERS)
def test_control_model_only_resumes_and_reports_that_it_differs(layout, straight, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "stopped"
    changes = {"CHECKPOINT_LAYOUT": layout, "CHECKPOINT_MODEL_ONLY": "true"}
    assert "cannot resume bit-exactly" in stopped_after(3, folder, monkeypatch, **changes)
    capsys.readouterr()
    code, said = train(folder, RESUME="auto", CHECKPOINT_MODEL_ONLY="false")
    assert code == 0, said
    assert "have no optimizer state" in capsys.readouterr().out
    assert newest(folder).parent["step"] == 3  # a child: what it ends with is not what the run would have ended with
    assert newest(folder).parts == ["model", "optimizer"]
    assert tensor_bytes(newest(straight)) != tensor_bytes(newest(folder))


KILLED = """
import os, signal, sys
sys.argv = ["training.py"]
from milepost import config
settings = config.from_command_line(__name__, __doc__, [])
import training
learn = training.training_step
def killed(run, lr):
    loss = learn(run, lr)
    if run.state.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss
training.training_step = killed
training.guarded(training.main, settings)
"""


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.parametrize("step", [6, 7])
def test_after_sigkill(step, background, straight, tmp_path):
    """Killed between two saves: the steps since the last one are done again, and give the same bits and the same log.

    In the background, the save of step 4 may not be done by then; the run then begins again.
    """
    folder = tmp_path / "killed"
    folder.mkdir()
    env = programs.LEAST | environment(folder, CHECKPOINT_ASYNC=background)
    done = programs.run(
        [sys.executable, "-c", KILLED.format(step=step)], cwd=ROOT, env=env, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    steps = [one.step for one in ckpt.find(folder / "checkpoints")]
    assert steps == [4] or (background == "true" and steps == [])
    code, said = train(folder, RESUME="auto")
    assert code == 0, said
    if steps:
        assert_same(straight, folder)
    else:
        assert tensor_bytes(newest(straight)) == tensor_bytes(newest(folder))


def _saved_with(record: ckpt.Checkpoint, folder: Path) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    ckpt.save(record, folder / "checkpoints")


def test_control_without_the_optimizer_it_differs(straight, tmp_path):
    """Negative control: the comparison sees a resume that lost the moments."""
    record = ckpt.load(at_step(straight, 4))
    record.optimizer_state = None
    _saved_with(record, tmp_path / "control")
    shutil.copy(straight / "letters.txt", tmp_path / "control")
    code, _ = train(tmp_path / "control", RESUME="auto")
    assert code == 0
    assert tensor_bytes(newest(straight)) != tensor_bytes(newest(tmp_path / "control"))


def test_control_with_shifted_data_it_differs(straight, tmp_path):
    """Negative control: the comparison sees a resume whose data is one batch further on."""
    record = ckpt.load(at_step(straight, 4))
    record.windows_seen += 4
    _saved_with(record, tmp_path / "control")
    shutil.copy(straight / "letters.txt", tmp_path / "control")
    assert train(tmp_path / "control", RESUME="auto")[0] == 0
    assert tensor_bytes(newest(straight)) != tensor_bytes(newest(tmp_path / "control"))


def test_control_the_comparison_sees_a_doubled_step(straight, tmp_path):
    """Negative control: a log with one line twice is not equal to the log without."""
    shutil.copytree(straight, tmp_path / "doubled")
    (path,) = (tmp_path / "doubled" / "runs").glob("*/metrics.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], *lines[4:]]) + "\n")
    assert logged(tmp_path / "doubled") != logged(straight)


def test_a_compiled_run_resumes_bit_exactly_in_another_process(tmp_path):
    """Compiled anew by another process, from another state of every cache in memory."""
    straight, again = tmp_path / "straight", tmp_path / "again"
    straight.mkdir()
    assert train(straight, COMPILE="true", CHECKPOINT_INTERVAL="1")[0] == 0
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(at_step(straight, 3), again / "checkpoints")
    shutil.copy(straight / "letters.txt", again)
    shutil.copytree(straight / "runs", again / "runs")
    done = command("training.py", again, RESUME="auto", COMPILE="true")
    assert done.returncode == 0, done.stderr
    assert_same(straight, again)


# Whatever is only looked at or kept must not change what is learned.

HABITS = [
    {"EVAL_INTERVAL": "3"},
    {"EVAL_STEPS": "0"},
    {"SAMPLE_INTERVAL": "1"},
    {"LOG_INTERVAL": "5"},
    {"CHECKPOINT_INTERVAL": "1"},
    {"CHECKPOINT_INTERVAL": "0"},
    {"EVAL_INTERVAL": "1", "SAMPLE_INTERVAL": "2", "LOG_INTERVAL": "3", "CHECKPOINT_INTERVAL": "3"},
]


@pytest.mark.parametrize("habit", HABITS, ids=str)
def test_habits_do_not_change_the_weights(habit, straight, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    assert train(folder, **habit)[0] == 0
    assert tensor_bytes(newest(folder)) == tensor_bytes(newest(straight))


def final_weights(folder: Path, monkeypatch, **changes: str) -> dict[str, bytes]:
    """The weights at the end of a run, taken from the run itself, so that it need not save."""
    kept = {}

    def finished(run):
        kept.update({name: tensor.numpy().tobytes() for name, tensor in run.model.state_dict().items()})
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(training, "end", finished)
        assert train(folder, **changes)[0] == 0
    return kept


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_saving_at_all_does_not_change_the_weights(compiled, tmp_path, monkeypatch):
    saving, silent = tmp_path / "saving", tmp_path / "silent"
    saving.mkdir()
    silent.mkdir()
    with_checkpoints = final_weights(saving, monkeypatch, COMPILE=compiled, EVAL_INTERVAL="2", SAMPLE_INTERVAL="3")
    without = final_weights(
        silent, monkeypatch, COMPILE=compiled, ENABLE_CHECKPOINTS="false", EVAL_INTERVAL="0", LOG_INTERVAL="7"
    )
    assert with_checkpoints == without
    assert not (silent / "checkpoints").exists()


def test_control_another_seed_changes_the_weights(straight, tmp_path):
    """Negative control for the tests above."""
    folder = tmp_path / "other"
    folder.mkdir()
    assert train(folder, SEED="1")[0] == 0
    assert tensor_bytes(newest(folder)) != tensor_bytes(newest(straight))
