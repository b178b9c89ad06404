"""RESUME in training.py: which checkpoint is gone on with, when it refuses, and what it says."""

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch
from drive import ROOT, TINY, at_step, command, environment, logged, newest, small_text, tensor_bytes, train
from test_exact_resume import KILLED
from transformers import GPT2Config, GPT2LMHeadModel

import training
from milepost import ckpt, config, resume_choice
from milepost.ckpt.finding import scan
from milepost.locks import RunLock
from milepost.runtime.progress import Log


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A finished run of 8 steps with a checkpoint at 4 and one at 8."""
    folder = tmp_path_factory.mktemp("straight")
    assert train(folder)[0] == 0
    return folder


@pytest.fixture
def stopped(straight, tmp_path):
    """The same run as a crash after step 4 leaves it."""
    shutil.copytree(straight, tmp_path / "run")
    at_step(tmp_path / "run", 8).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "best")
    return tmp_path / "run"


def damage(path: Path) -> None:
    """Flip one bit in the middle of the file: in a tensor, where torch does not notice it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_an_empty_folder_starts_fresh_and_logs_it(tmp_path):
    code, said = train(tmp_path, RESUME="auto")
    assert code == 0
    assert "so this run starts fresh" in said
    assert newest(tmp_path).step == 8


def test_settings_that_are_not_set_come_from_the_checkpoint(stopped, straight, capsys):
    """Only the folder is set; model, sizes, intervals and text come from the checkpoint."""
    bare = dict.fromkeys(
        ["MODEL_TYPE", "N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE", "BATCH_SIZE", "DROPOUT", "TRAINING_STEPS",
        "WARMUP_STEPS", "EVAL_INTERVAL", "EVAL_STEPS",
         "SAMPLE_INTERVAL", "LOG_INTERVAL", "ENABLE_CHECKPOINTS", "CHECKPOINT_INTERVAL"]
    )  # fmt: skip
    code, _ = train(stopped, RESUME="auto", **bare)
    assert code == 0
    assert tensor_bytes(newest(stopped)) == tensor_bytes(newest(straight))
    assert "bit-exact" in capsys.readouterr().out


def test_the_table_names_every_part_and_the_next_rates(stopped, capsys):
    assert train(stopped, RESUME="auto")[0] == 0
    rows = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines() if "  " in line}
    for part in ("run", "weights", "optimizer", "step", "learning rate", "data position", "random draws", "tokenizer"):
        assert "restored" in rows[part], part
    assert "moments of 28 of 28 parameters" in rows["optimizer"]
    assert "4; 4 more, to 8" in rows["step"]
    assert "next learning rate 0.0006667" in rows["group 1"]  # linear from 1e-3 to 0, 2 of 6 steps after the warm-up
    assert "linear, peak 0.001, floor 0, 2 warm-up steps from step 0" in rows["learning rate"]
    assert "yes" in rows["bit-exact"]


def test_a_finished_run_is_reported(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    before = sorted((tmp_path / "run" / "checkpoints").rglob("*.pt"))
    code, said = train(tmp_path / "run", RESUME="auto")
    assert code == 0
    assert "is finished: 8 of 8 steps are done" in said
    assert sorted((tmp_path / "run" / "checkpoints").rglob("*.pt")) == before


def test_samples_of_a_resumed_run_are_drawn_as_before(straight, tmp_path):
    """The settings of its samples come back from the checkpoint; they change no weight, so it stays the same run."""
    how = {"TEMPERATURE": "2", "TOP_K": "5", "TOP_P": "0.9", "REPETITION_PENALTY": "1.5"}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    assert train(whole, **how)[0] == 0
    assert train(halves, **how)[0] == 0
    at_step(halves, 8).unlink()
    shutil.rmtree(halves / "checkpoints" / "best")
    samples = {folder: next((folder / "runs").glob("*/samples/step000008.txt")) for folder in (whole, halves, straight)}
    samples[halves].unlink()
    assert train(halves, RESUME="auto")[0] == 0
    assert samples[halves].read_text() == samples[whole].read_text()
    assert samples[whole].read_text() != samples[straight].read_text()  # control: the defaults draw another


@pytest.mark.parametrize("name", ["auto", "latest", "best", "checkpoints", "checkpoints/*.pt"])
def test_a_damaged_latest_checkpoint_is_skipped_logged_and_not_deleted(name, straight, tmp_path, monkeypatch):
    """Whatever leaves a choice takes the checkpoint before; only a single name does not."""
    folder = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    name = f"run/{name}" if name.startswith("checkpoints") else name
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoints" / "best")
    bad = at_step(folder, 8)
    damage(bad)
    code, said = train(folder, RESUME=name)
    assert code == 0, said
    assert f"skipped: {bad}: " in said
    assert bad.exists()
    assert newest(folder).step == 8
    assert tensor_bytes(newest(folder)) == tensor_bytes(newest(straight))
    code, said = train(folder, RESUME=str(bad))
    assert (code, "skipped" in said) == (3, False)


def test_fewer_steps_than_the_checkpoint_has_are_an_error(stopped):
    code, said = train(stopped, RESUME="auto", TRAINING_STEPS="3", WARMUP_STEPS="0")
    assert code == 2
    assert "TRAINING_STEPS=3: " in said
    assert "step 4" in said


def test_the_printed_commands_can_be_pasted(tmp_path, monkeypatch):
    """Quoted for a shell, with a path to the script that works in the current folder."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    code, said = train(folder)
    assert code == 0
    line = next(line for line in said.splitlines() if line.startswith("next: ")).removeprefix("next: ")
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env=programs.LEAST | {"PYTHON_DOTENV_DISABLED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200


@pytest.mark.parametrize("keep", [0, 1, 4, 64, 0.5, -22, -1])
def test_a_truncated_latest_checkpoint_is_skipped_and_logged(keep, straight, tmp_path):
    """Cut to nothing, after the first bytes, in the middle, in the archive's directory, before the last byte."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoints" / "best")
    bad = at_step(folder, 8)
    content = bad.read_bytes()
    bad.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    code, said = train(folder, RESUME="auto")
    assert code == 0
    assert f"skipped: {bad}" in said
    assert tensor_bytes(newest(folder)) == tensor_bytes(newest(straight))


def test_resuming_from_an_earlier_step_keeps_the_better_checkpoint(straight, tmp_path, monkeypatch):
    """The run had reached its best at step 8; a resume that stops at 6 must not delete it."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    (best,) = (folder / "checkpoints" / "best").glob("[!.]*")
    assert ckpt.load(best).step == 8
    learn = training.training_step

    def interrupted(run, lr):
        if run.state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(run, lr)

    monkeypatch.setattr(training, "training_step", interrupted)
    assert train(folder, RESUME=str(at_step(folder, 4)))[0] == 130
    assert best.exists()


def test_a_best_step_missing_from_best_after_a_kill_is_restored_first(stopped):
    """Killed between the save of step 4, the best so far, and its copy in best/."""
    record = newest(stopped)
    assert record.best_step == 4
    assert not (stopped / "checkpoints" / "best").exists()
    code, said = train(stopped, RESUME="auto", CHECKPOINT_INTERVAL="0", EVAL_INTERVAL="0", TRAINING_STEPS="8")
    assert code == 0, said
    steps = {one.step for one in ckpt.find(stopped / "checkpoints" / "best")}
    assert steps <= {4, 8}
    assert steps


def test_resume_from_a_folder_that_is_a_checkpoint_does_not_start_fresh(straight, tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        tmp_path / "weights"
    )
    code, said = train(tmp_path, RESUME=str(tmp_path / "weights"))
    assert code == 2
    assert f"cannot resume {tmp_path / 'weights'}: " in said
    assert "fresh" not in said


@pytest.mark.parametrize("changes", [{"ENABLE_CHECKPOINTS": "false"}, {"CHECKPOINT_DIR": "elsewhere"}], ids=str)
def test_a_running_run_is_also_locked_in_its_metrics_folder(changes, stopped, tmp_path):
    """Another process must not rewind the metrics of a running run, wherever it saves."""
    run_id = newest(stopped).run_id
    lock = RunLock(stopped / "runs" / run_id, run_id)
    lock.acquire()
    if "CHECKPOINT_DIR" in changes:
        changes = {"CHECKPOINT_DIR": str(tmp_path / "elsewhere")}
    metrics = (stopped / "runs" / run_id / "metrics.jsonl").read_bytes()
    code, said = train(stopped, RESUME=str(at_step(stopped, 4)), **changes)
    assert code == 1
    assert f"process {os.getpid()} on " in said
    assert (stopped / "runs" / run_id / "metrics.jsonl").read_bytes() == metrics
    lock.release()
    assert train(stopped, RESUME=str(at_step(stopped, 4)), **changes)[0] == 0


def test_only_damaged_checkpoints_are_an_error(stopped):
    damage(at_step(stopped, 4))
    code, said = train(stopped, RESUME="auto")
    assert code == 3
    assert "can be read" in said.splitlines()[-1]
    assert len(list((stopped / "runs").iterdir())) == 1  # no new run was begun


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"MODEL_TYPE": "bigram"}, "MODEL_TYPE"),
        ({"N_LAYER": "3"}, "N_LAYER"),
        ({"BLOCK_SIZE": "8"}, "BLOCK_SIZE"),
        ({"TOKENIZER": "byte"}, "TOKENIZER"),
        ({"VALIDATION_FRACTION": "0.2"}, "VALIDATION_FRACTION"),
    ],
    ids=str,
)
def test_checkpoints_that_do_not_fit_are_an_error(changes, difference, stopped):
    """Starting fresh would hide the run that the user wanted to resume."""
    code, said = train(stopped, RESUME="auto", **changes)
    assert code == 2
    assert difference in said
    assert newest(stopped).step == 4


def test_another_text_is_an_error(stopped):
    small_text(stopped, characters=5000)
    code, said = train(stopped, RESUME="auto")
    assert code == 2
    assert "is not the text that the checkpoint was trained on" in said


def test_for_a_text_that_has_grown_the_command_that_trains_on_is_printed(stopped):
    parent = newest(stopped)
    text = stopped / "letters.txt"
    text.write_text(text.read_text(encoding="utf-8") * 2, encoding="utf-8")
    code, said = train(stopped, RESUME="auto")
    assert code == 2
    command = said.split("as a run of its own: ")[1].strip()
    env = programs.LEAST | {"PYTHON_DOTENV_DISABLED": "1", "RESUME_TRAINING_STEPS": "2"}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    child = newest(stopped)
    assert (child.step, child.parent["run_id"]) == (parent.step + 2, parent.run_id)
    assert child.data["source"] == str(text)
    assert child.data["sha256"] != parent.data["sha256"]


@pytest.mark.parametrize(
    "changes", [{"LEARNING_RATE": "5e-4"}, {"BATCH_SIZE": "2"}, {"DROPOUT": "0"}, {"TRAINING_STEPS": "10"}], ids=str
)
def test_a_changed_setting_that_affects_the_result_starts_a_child_run(changes, stopped, capsys):
    parent = newest(stopped)
    assert train(stopped, RESUME="auto", **changes)[0] == 0
    record = newest(stopped)
    ((name, value),) = changes.items()
    assert record.run_id != parent.run_id
    assert record.parent is not None
    assert (record.parent["run_id"], record.parent["step"], record.parent["save_id"]) == (
        parent.run_id,
        4,
        parent.save_id,
    )
    assert record.parent["changed"][name][1] == float(value)
    assert record.step == int(changes.get("TRAINING_STEPS", 8))
    table = capsys.readouterr().out
    assert "child" in table
    assert f"{name} was" in next(line for line in table.splitlines() if line.startswith("bit-exact"))


def test_a_smaller_batch_continues_where_the_windows_end(stopped):
    parent = newest(stopped)
    train(stopped, RESUME="auto", BATCH_SIZE="2")
    assert parent.windows_seen == 16
    assert newest(stopped).windows_seen == 16 + 4 * 2


def test_resume_from_a_path_and_from_a_step(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    code, said = train(folder, RESUME=str(at_step(folder, 4)))
    assert code == 0, said
    assert tensor_bytes(newest(folder)) == tensor_bytes(newest(straight))
    code, said = train(folder, RESUME="auto", RESUME_STEP="4")
    assert code == 0, said
    assert (
        newest(folder).save_number == 4
    )  # of step 4, of 8, and twice 8 again; the best is a second name of one of them
    code, said = train(folder, RESUME="auto", RESUME_STEP="5")
    assert code == 2
    assert "RESUME_STEP=5" in said


def test_a_second_process_on_a_running_run_is_an_error(stopped):
    """Another process holds the run's lock: the error names its pid and host, and nothing is written."""
    run_id = newest(stopped).run_id
    holder = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from milepost.locks import RunLock
lock = RunLock(Path({str(stopped / "checkpoints")!r}), {run_id!r})
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""
    with programs.start(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        code, said = train(stopped, RESUME="auto")
        assert code == 1
        assert f"process {process.pid} on " in said
        assert newest(stopped).step == 4
        process.kill()
    code, said = train(stopped, RESUME="auto")  # a dead holder holds nothing
    assert code == 0, said


def test_runs_in_one_folder_do_not_affect_each_other(tmp_path):
    train(tmp_path)
    first = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.pt")}
    train(tmp_path, SEED="2")
    assert all(path.read_bytes() == content for path, content in first.items())
    found = ckpt.find(tmp_path / "checkpoints")
    numbers = [one.metadata["save_number"] for one in found]
    assert len({one.metadata["run_id"] for one in found}) == 2
    assert numbers == sorted(set(numbers))
    assert len(list((tmp_path / "checkpoints" / "best").glob("[!.]*"))) == 2


def test_init_from_takes_only_weights_and_tokenizer(straight, tmp_path):
    parent = newest(straight)
    small_text(tmp_path, characters=5000)
    code, said = train(
        tmp_path,
        INIT_FROM=str(straight / "checkpoints"),
        LEARNING_RATE="1e-9",
        TRAINING_STEPS="1",
        OPTIMIZER="muon",  # the default is adamw for so few tokens per step
        WARMUP_STEPS="0",
        **dict.fromkeys(["N_LAYER", "N_EMBD", "BLOCK_SIZE"]),
    )
    assert code == 0, said
    record = newest(tmp_path)
    assert record.step == 1
    assert record.tokenizer == parent.tokenizer
    assert record.windows_seen == 4
    assert record.parent is not None
    assert record.parent["save_id"] == parent.save_id
    assert all((tensor - parent.model_state[name]).abs().max() < 1e-6 for name, tensor in record.model_state.items())
    assert record.optimizer_state is not None
    states = record.optimizer_state["state"].values()
    assert [moments["step"].item() for moments in states if "step" in moments] == [1.0] * 20
    assert [set(moments) for moments in states if "step" not in moments] == [{"momentum_buffer"}] * 8  # Muon's matrices


def test_init_from_determines_the_model_and_its_defaults(straight, tmp_path):
    """Without MODEL_TYPE the model type comes from the weights, and the defaults are that model's."""
    bare = dict.fromkeys(["MODEL_TYPE", "N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE", "WARMUP_STEPS", "LEARNING_RATE"])
    code, said = train(tmp_path, INIT_FROM=str(straight / "checkpoints"), TRAINING_STEPS="1", BATCH_SIZE="64", **bare)
    assert code == 0, said
    record = newest(tmp_path)
    assert record.model_type == "gpt2"
    assert record.model_settings["block_size"] == 16
    defaults = {"LEARNING_RATE": 0.01, "OPTIMIZER": "muon", "LR_SCHEDULE": "linear"}
    assert {name: record.hyperparameters[name] for name in defaults} == defaults


@pytest.mark.parametrize("changes", [{"N_LAYER": "3"}, {"TOKENIZER": "byte"}, {"MODEL_TYPE": "bigram"}], ids=str)
def test_init_from_with_another_shape_is_an_error(changes, straight, tmp_path):
    code, said = train(tmp_path, INIT_FROM=str(straight / "checkpoints"), **changes)
    assert code == 2
    assert f"unset {next(iter(changes))}" in said


def test_settings_of_another_model_than_the_weights_are_told_to_have_no_effect(straight, tmp_path):
    """The weights bring a GPT-2 and its alphabet, which the settings alone do not show."""
    bare = dict.fromkeys(["MODEL_TYPE", "N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE"])
    unused = {"N_KV_HEAD": "2", "BPE_VOCAB_SIZE": "512"}
    code, said = train(
        tmp_path, INIT_FROM=str(straight / "checkpoints"), TRAINING_STEPS="1", WARMUP_STEPS="0", **bare, **unused
    )
    assert code == 0, said
    assert "N_KV_HEAD=2 (environment): no effect with MODEL_TYPE=gpt2 (checkpoint); needs MODEL_TYPE=llama" in said
    assert "BPE_VOCAB_SIZE=512 (environment): no effect with TOKENIZER=char (checkpoint)" in said
    assert said.count("no effect with") == 2


def test_within_a_run_bit_exact_resumes_come_before_newer_checkpoints(stopped):
    """Deleting the optimizer file of the latest checkpoint leaves the previous one to resume bit-exactly."""
    code, said = train(stopped, RESUME="auto", CHECKPOINT_LAYOUT="separated", CHECKPOINT_INTERVAL="1")
    assert code == 0, said
    run_id = newest(stopped).run_id
    for path in (stopped / "checkpoints").rglob("*step0008*-optimizer.pt"):
        path.unlink()
    code, said = train(stopped, RESUME="auto")
    assert code == 0, said
    assert newest(stopped).run_id == run_id
    assert newest(stopped).parts == ["model", "optimizer"]
    for path in (stopped / "checkpoints").rglob("*.pt"):
        if not path.name.endswith("-model.pt"):
            path.unlink()
    code, said = train(stopped, RESUME="auto", TRAINING_STEPS="9")
    assert code == 0, said
    assert newest(stopped).parent["run_id"] == run_id  # nothing is exact any more, and so it is a child


# ---------------------------------------------------------------------------------------------------------------------
# RESUME_STEP selects a step of one run.


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Run A has steps 4 and 8; the newer run B has 2, 4 and 6, and its own best/. Their weights differ."""
    folder = tmp_path_factory.mktemp("two")
    assert train(folder)[0] == 0
    assert train(folder, SEED="2", TRAINING_STEPS="6", CHECKPOINT_INTERVAL="2")[0] == 0
    return folder


def of_two(folder: Path, run: str, step: int) -> Path:
    """Return the checkpoint of a step of run `A` (seed 1337) or `B`."""
    seed = {"A": 1337, "B": 2}[run]
    found = [one for one in ckpt.find(folder / "checkpoints") if one.metadata["hyperparameters"]["SEED"] == seed]
    (path,) = (one.path for one in found if one.step == step)
    return path


def start_of(folder: Path, settings: dict[str, str]) -> ckpt.Checkpoint:
    """Return the record that `find_record` selects for these settings."""
    record = resume_choice.find_record(
        config.read(environment(folder, **dict.fromkeys(TINY) | settings)), Log(io.StringIO())
    )
    assert record is not None
    return record


@pytest.mark.parametrize("run", ["A", "B"])
@pytest.mark.parametrize("form", ["file", "other folder", "run folder", "best", "stem glob"])
@pytest.mark.parametrize("layout", ["unified", "stepfiles"])
def test_a_step_belongs_to_the_run_of_the_named_checkpoint(layout, form, run, two_runs, tmp_path):
    """However the checkpoint is named, RESUME_STEP=4 is step 4 of its run, in every folder."""
    shutil.copytree(two_runs, tmp_path / "two")
    folder, last = tmp_path / "two", {"A": 8, "B": 6}[run]
    if layout != "unified":
        for one in ckpt.find(two_runs / "checkpoints"):
            ckpt.convert(one.path, tmp_path / "new", layout=layout, in_best=form == "best" and one.step == last)
        shutil.rmtree(folder / "checkpoints")
        (tmp_path / "new").rename(folder / "checkpoints")
    named = of_two(folder, run, last)
    wanted = ckpt.load(of_two(folder, run, 4))
    changes = {}
    if form == "other folder":
        changes = {"CHECKPOINT_DIR": str(tmp_path / "elsewhere")}
    elif form == "run folder":
        (folder / "checkpoints" / "a_copy").mkdir()
        for path in map(Path, {*map(str, (folder / "checkpoints").glob("*.pt"))}):
            one = ckpt.load(path, optimizer=False)
            if one.run_id == wanted.run_id:
                path.rename(folder / "checkpoints" / "a_copy" / path.name)
        named = folder / "checkpoints" / "a_copy" if layout == "unified" else named.parent
    elif form == "best" and layout == "unified":
        (named,) = (
            one.path
            for one in scan(folder / "checkpoints")
            if one.path.parent.name == "best" and one.run_id == wanted.run_id
        )
    name = str(named) if form != "stem glob" else f"{named.parent}/{named.name[:-4]}*"
    record = start_of(folder, {"RESUME": name, "RESUME_STEP": "4"} | changes)
    assert (record.run_id, record.step) == (wanted.run_id, 4)
    assert tensor_bytes(record) == tensor_bytes(wanted)


@pytest.mark.parametrize("name", ["auto", "latest", "checkpoints"])
def test_without_a_name_the_step_belongs_to_the_newest_run(name, two_runs):
    name = name if name in ("auto", "latest") else str(two_runs / name)
    assert start_of(two_runs, {"RESUME": name, "RESUME_STEP": "4"}).path == of_two(two_runs, "B", 4)


def test_auto_selects_a_step_of_the_newest_run_that_fits(two_runs):
    """Control: the settings select the run, as without RESUME_STEP."""
    settings = {"RESUME": "auto", "SEED": "2"}
    assert start_of(two_runs, settings | {"RESUME_STEP": "2"}).path == of_two(two_runs, "B", 2)
    assert start_of(two_runs, {"RESUME": str(of_two(two_runs, "A", 8)), "RESUME_STEP": "8"}).step == 8


@pytest.mark.parametrize(
    ("name", "step", "has", "other"), [("A", 2, "4, 8", "B"), ("auto", 8, "2, 4, 6", "A"), ("B", 5, "2, 4, 6", None)]
)
def test_a_step_that_the_run_lacks_is_an_error_with_its_steps(name, step, has, other, two_runs):
    """Step 2 exists, but in the other run."""
    wish = str(of_two(two_runs, name, {"A": 8, "B": 6}[name])) if name != "auto" else name
    before = {path: path.read_bytes() for path in (two_runs / "checkpoints").rglob("*.pt")}
    done = command("training.py", two_runs, RESUME=wish, RESUME_STEP=str(step), TRAINING_STEPS=None)  # of either run
    assert done.returncode == 2
    runs = {run: ckpt.load(of_two(two_runs, run, 4), optimizer=False).run_id for run in ("A", "B")}
    mine = runs["B" if name == "auto" else name]
    assert f"RESUME_STEP={step}" in done.stderr
    assert f"run {mine} has the steps {has}" in done.stderr
    assert (
        (runs[other] in done.stderr) if other else all(run == mine or run not in done.stderr for run in runs.values())
    )
    assert {path: path.read_bytes() for path in (two_runs / "checkpoints").rglob("*.pt")} == before


def test_a_checkpoint_without_a_run_has_only_its_own_step(two_runs, tmp_path):
    """Another program's file beside our runs: step 4 of our runs is not its step 4."""
    shutil.copytree(two_runs, tmp_path / "two")
    record = ckpt.load(of_two(tmp_path / "two", "A", 8))
    record.run_id, record.step = None, 1
    path = ckpt.WRITERS["unified"].write(record, tmp_path / "two" / "checkpoints", "theirs")
    with pytest.raises(config.ConfigError, match="is at step 1 and records no run"):
        start_of(tmp_path / "two", {"RESUME": str(path), "RESUME_STEP": "4"})
    assert start_of(tmp_path / "two", {"RESUME": str(path), "RESUME_STEP": "1"}).path == path


def test_a_damaged_step_of_the_run_is_not_replaced_by_another_runs(two_runs, tmp_path):
    shutil.copytree(two_runs, tmp_path / "two")
    wanted = of_two(tmp_path / "two", "A", 4)
    for one in scan(tmp_path / "two" / "checkpoints"):
        if one.run_id == ckpt.load(wanted, optimizer=False).run_id and one.step == 4:
            damage(one.path)
    wish = {"RESUME": str(of_two(tmp_path / "two", "A", 8)), "RESUME_STEP": "4"}
    with pytest.raises(ckpt.CheckpointError, match="is damaged"):
        start_of(tmp_path / "two", wish)


def test_a_damaged_latest_falls_back_to_the_same_runs_previous_checkpoint(two_runs, tmp_path):
    """MODE=resume of CHECKPOINT_PATH=latest, where another run saved in between."""
    shutil.copytree(two_runs, tmp_path / "two")
    folder, checkpoints = tmp_path / "two", tmp_path / "two" / "checkpoints"
    newest = ckpt.load(of_two(folder, "A", 8))
    ckpt.save(newest, checkpoints)  # A's once more, after B's
    latest_one = ckpt.latest(ckpt.find(checkpoints))
    damage(latest_one.path)
    done = command(
        "scripts/load_checkpoint.py", folder, MODE="resume", RESUME_TRAINING_STEPS="0", CHECKPOINT_PATH="latest",
        **dict.fromkeys(TINY),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"taking {of_a_run(checkpoints, newest.run_id, besides=latest_one.path)}" in done.stderr


def of_a_run(checkpoints: Path, run_id: str, *, besides: Path) -> Path:
    """Return the second newest checkpoint of the run."""
    return [one.path for one in ckpt.find(checkpoints) if one.run_id == run_id and one.path != besides][-1]


def killed_at(step: int, folder: Path, **changes: str) -> None:
    """Train in a separate process that SIGKILL ends right after a step."""
    env = programs.LEAST | environment(folder, **changes)
    done = programs.run(
        [sys.executable, "-c", KILLED.format(step=step)], cwd=ROOT, env=env, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("end", [6, 8])
def test_metrics_of_later_steps_return_if_the_branch_saved_nothing(end, straight, tmp_path):
    """Back to step 4, killed at 5, then resumed from the latest: step 6, or 8, where the run is finished."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    before, policy = logged(folder), {"RESUME": "auto", "CHECKPOINT_KEEP_BEST": "0"}
    if end == 6:
        shutil.rmtree(folder / "checkpoints" / "best")
        at_step(folder, 8).unlink()
        assert train(folder, CHECKPOINT_INTERVAL="2", **policy)[0] == 0
        at_step(folder, 8).unlink()
    killed_at(5, folder, RESUME_STEP="4", CHECKPOINT_INTERVAL="0", **policy)
    assert logged(folder)[-1][0] <= 5  # the control: they were not in the way
    assert newest(folder).step == end
    code, said = train(folder, RESUME="auto")
    assert code == 0, said
    assert logged(folder) == before
