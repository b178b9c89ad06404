"""A run's log, files and refusals, from its first line to its exit code."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch
from drive import ROOT, command, environment, logged, newest, small_text, train
from transformers import GPT2Config, GPT2LMHeadModel

import training
from milepost import ckpt, config, run, run_checkpoints, run_files
from milepost.ckpt import finding
from milepost.ckpt.layouts import unified
from milepost.ckpt.layouts.archive_layout import ArchiveLayout
from milepost.ckpt.writer import Writer
from milepost.runtime.progress import Log, read_metrics
from milepost.text.batches import validation_windows


def metrics(folder):
    (path,) = (folder / "runs").glob("*/metrics.jsonl")
    return read_metrics(path)


NOT_OF_BIGRAM = ["N_LAYER", "N_HEAD", "N_EMBD", "DROPOUT"]


def test_a_run_describes_itself_in_at_most_15_lines(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("r")  # short, as a user's: the line of settings folds at long paths
    done = command(
        "training.py",
        tmp_path,
        **dict.fromkeys(["ENABLE_CHECKPOINTS", "MODEL_TYPE", "SAMPLE_INTERVAL", "EVAL_INTERVAL", *NOT_OF_BIGRAM]),
        TRAINING_STEPS="20",
    )
    assert done.returncode == 0, done.stderr
    before, _ = done.stderr.split("done:")
    assert len(before.splitlines()) <= 15
    for part in (
        "bigram on cpu",
        "float32",
        "letters.txt",
        "parameters",
        "tokens",
        "plan: 20 steps",
        "checkpoints are OFF",
        "ENABLE_CHECKPOINTS=true",
        "BLOCK_SIZE=16 (environment)",
    ):
        assert part in " ".join(before.split())
    assert "about" in before or "under 1 s" in before  # how long it will take
    assert len(done.stdout) > 100  # a sample, and nothing else, goes to stdout
    assert "run " not in done.stdout
    assert not (tmp_path / "checkpoints").exists()


def test_a_resume_that_will_find_nothing_is_named(tmp_path):
    """A resumed run saves as its checkpoint did; a first run with RESUME=auto does not save by itself."""
    off = {"ENABLE_CHECKPOINTS": None, "CHECKPOINT_INTERVAL": "4", "CHECKPOINT_KEEP_LAST": "2"}
    for changes, named in (
        ({"RESUME": "auto"}, {"RESUME=auto", "CHECKPOINT_INTERVAL", "CHECKPOINT_KEEP_LAST", "ENABLE_CHECKPOINTS=true"}),
        ({}, {"ENABLE_CHECKPOINTS=true"}),
    ):
        code, said = train(tmp_path, **off, **changes)
        (line,) = [line for line in said.splitlines() if line.startswith("checkpoints are OFF")]
        assert code == 0
        assert set(re.findall(r"[A-Z_]{4,}(?:=\w+)?", line)) == named
    assert train(tmp_path)[0] == 0
    assert "checkpoints are OFF" not in train(tmp_path, **off, RESUME="auto")[1]


def test_metrics_are_strict_json_with_equal_names_in_every_line(tmp_path):
    assert train(tmp_path)[0] == 0
    (path,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    names = {"run_id", "step", "time", "split", "loss", "lr", "grad_norm", "tokens", "tok_s"}
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert all(set(line) == names for line in lines)
    training_lines = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in training_lines] == list(range(1, 9))
    assert [line["tokens"] for line in training_lines] == [step * 4 * 16 for step in range(1, 9)]
    assert [line["step"] for line in lines if line["split"] == "validation"] == [0, 4, 8]
    assert {line["run_id"] for line in lines} == {path.parent.name}


def test_a_model_learns(tmp_path):
    """The loss ends far below that of a uniform guess and below the first validation."""
    assert (
        train(
            tmp_path,
            MODEL_TYPE="bigram",
            LEARNING_RATE="0.05",
            TRAINING_STEPS="300",
            LOG_INTERVAL="100",
            BATCH_SIZE="16",
        )[0]
        == 0
    )
    losses = [line["loss"] for line in metrics(tmp_path) if line["split"] == "validation"]
    assert losses[0] == pytest.approx(math.log(newest(tmp_path).model_settings["vocab_size"]), rel=0.05)
    assert losses[-1] < 0.75 * losses[0]


def test_accumulation_equals_the_larger_batch(tmp_path):
    """Two micro-batches of 4 have the sequences of one batch of 8, and take the same step up to rounding."""
    for name, rows in (("one", {"BATCH_SIZE": "8"}), ("two", {"BATCH_SIZE": "4", "GRADIENT_ACCUMULATION_STEPS": "2"})):
        (tmp_path / name).mkdir()
        assert train(tmp_path / name, DROPOUT="0", **rows)[0] == 0
    one, two = newest(tmp_path / "one").model_state, newest(tmp_path / "two").model_state
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)


def test_the_run_folder_holds_log_settings_and_samples(tmp_path):
    code, said = train(tmp_path)
    assert code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "training.log").read_text() == said
    assert [path.name for path in sorted((folder / "samples").iterdir())] == ["step000004.txt", "step000008.txt"]
    again = config.read({"ENV_FILE": str(folder / "config.env")})
    assert again.n_embd == 16
    assert again.training_steps == 8


def test_config_env_reproduces_the_run(tmp_path):
    """runs/<run_id>/config.env as ENV_FILE trains a bit-identical model."""
    train(tmp_path)
    first = newest(tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    settings = config.read({"ENV_FILE": str(folder / "config.env"), "CHECKPOINT_DIR": str(tmp_path / "second")})
    assert training.guarded(training.main, settings) == 0
    found = ckpt.latest(ckpt.find(tmp_path / "second"))
    assert found is not None
    second = ckpt.load(found.path)
    assert all(torch.equal(second.model_state[name], tensor) for name, tensor in first.model_state.items())


def test_checkpoint_names_and_the_best_checkpoint(tmp_path):
    assert train(tmp_path)[0] == 0
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("[!.]*") if path.is_file())
    assert [re.fullmatch(r"checkpoint_gpt2_letters_step(\d{4})_\d{8}_\d{6}\.pt", name).group(1) for name in names] == [
        "0004",
        "0008",
    ]
    (best,) = (tmp_path / "checkpoints" / "best").glob("[!.]*")
    losses = {
        line["step"]: line["loss"] for line in metrics(tmp_path) if line["split"] == "validation" and line["step"]
    }
    record = ckpt.load(best)
    assert record.step == min(losses, key=losses.get)
    assert record.validation_loss == min(losses.values())


def poisoned(monkeypatch, *, step: int, value: float) -> None:
    """Make the loss `value` from `step` on."""
    learn = training.accumulate_gradients

    def gradients(run):
        metrics = learn(run)
        return metrics | {"loss": metrics["loss"] * value} if run.state.step >= step else metrics

    monkeypatch.setattr(training, "accumulate_gradients", gradients)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(value, tmp_path, monkeypatch):
    poisoned(monkeypatch, step=5, value=value)
    code, said = train(tmp_path)
    assert code == 1
    assert "step 6 was not taken" in said
    assert "windows 20 to 23" in said
    assert "Traceback" not in said
    record = newest(tmp_path)
    assert record.step == 4  # the last good one, and nothing newer
    assert all(tensor.isfinite().all() for tensor in record.model_state.values())
    assert str(record.path.name) in said


def test_a_divergence_names_its_step_and_is_never_saved(tmp_path):
    """A far too high learning rate: whichever check finds it first, the message names the step."""
    for number, looks in enumerate(
        [
            {"EVAL_INTERVAL": "1"},
            {"EVAL_INTERVAL": "0", "SAMPLE_INTERVAL": "1"},
            {"EVAL_INTERVAL": "0", "SAMPLE_INTERVAL": "0"},
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        code, said = train(
            folder,
            LEARNING_RATE="1e38",
            GRAD_CLIP="0",
            WARMUP_STEPS="0",
            CHECKPOINT_INTERVAL="1",
            WEIGHT_DECAY="0",
            **looks,
        )
        assert code == 1, said
        assert "step" in said.splitlines()[-1]
        assert "unexpected" not in said
        for one in ckpt.find(folder / "checkpoints"):
            assert all(tensor.isfinite().all() for tensor in ckpt.load(one.path).model_state.values())


def test_gradients_that_are_not_finite_stop_too(tmp_path, monkeypatch):
    norm = training.gradient_norm
    monkeypatch.setattr(training, "gradient_norm", lambda optimizer: norm(optimizer) * math.inf)
    code, said = train(tmp_path)
    assert code == 1
    assert "step 1 was not taken" in said


def test_float16_skips_overflows_and_stops_after_20(tmp_path):
    """An overflow skips the update and halves the scale, a good step resets the count,
    20 overflows in a row stop the run.
    """
    run = training.fresh(config.read(environment(tmp_path, TRAINING_STEPS="100", DROPOUT="0")), Log())
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = run.model.wte.weight.detach().clone()
    overflow = run.model.wte.weight.register_hook(lambda gradient: gradient * math.inf)
    for _ in range(3):
        training.training_step(run, 1e-3)
    assert run.state.skipped_updates == 3
    assert run.scaler.get_scale() == 2.0**13
    assert torch.equal(run.model.wte.weight, before)
    overflow.remove()
    training.training_step(run, 1e-3)
    assert run.state.skipped_updates == 0
    assert not torch.equal(run.model.wte.weight, before)
    run.model.wte.weight.register_hook(lambda gradient: gradient * math.inf)
    for _ in range(19):
        training.training_step(run, 1e-3)
    with pytest.raises(training.TrainingError, match="20 float16 updates in a row"):
        training.training_step(run, 1e-3)


def test_out_of_memory_names_three_variables(tmp_path, monkeypatch):
    def hungry(run):
        return torch.empty(2**45)

    monkeypatch.setattr(training, "accumulate_gradients", hungry)
    code, said = train(tmp_path)
    assert code == 1
    last = said.splitlines()[-1]
    assert all(name in last for name in ("out of memory", "BATCH_SIZE", "BLOCK_SIZE", "N_LAYER"))


def test_an_estimate_above_free_memory_is_a_warning_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(training.hardware, "free_memory", lambda device: 1000)
    code, said = train(tmp_path)
    assert code == 0
    assert "warning: a step needs about" in said


def test_a_failed_save_does_not_stop_training(tmp_path, monkeypatch):
    """Training continues, a failed last save is exit code 5, and the earlier checkpoint stays."""
    write = unified.LAYOUT.write

    def full(layout, record, folder, stem):
        if record.step == 8:
            raise OSError(28, "No space left on device")
        return write(record, folder, stem)

    monkeypatch.setattr(ArchiveLayout, "write", full)
    monkeypatch.setattr(run_checkpoints, "PAUSES", ())  # nobody makes room
    code, said = train(tmp_path)
    assert code == 5
    assert "the disk is full" in said
    assert "bytes are needed" in said
    assert logged(tmp_path)[-1][0] == 8
    assert newest(tmp_path).step == 4


def test_an_interrupt_without_checkpoints_logs_that_nothing_was_saved(tmp_path, monkeypatch):
    learn = training.training_step

    def interrupted(run, lr):
        os.kill(os.getpid(), signal.SIGINT)
        return learn(run, lr)

    monkeypatch.setattr(training, "training_step", interrupted)
    code, said = train(tmp_path, ENABLE_CHECKPOINTS="false")
    assert code == 130
    assert "nothing was saved, because ENABLE_CHECKPOINTS is false" in said
    assert not (tmp_path / "checkpoints").exists()


REFUSALS = [
    ({"BLOCK_SIZE": "5000"}, 4, "set BLOCK_SIZE=599 or less"),
    ({"VALIDATION_FRACTION": "0.001"}, 4, "set a larger VALIDATION_FRACTION, use more text"),
    ({"VALIDATION_FRACTION": "0.999"}, 4, "set a smaller VALIDATION_FRACTION, use more text"),
    (
        {"MODEL_TYPE": "llama", "N_HEAD": "3", "N_EMBD": "9"},
        2,
        "so the size of a head must be even, and it is 3: n_embd=12 fits.",
    ),
    ({"TRAINING_DATA_SOURCE": "nothing-here.txt"}, 4, "nothing-here.txt"),
    ({"DEVICE": "cuda"}, 2, "available: cpu"),
    ({"DTYPE": "float16"}, 2, "DTYPE=float16 is for cuda and mps"),
    ({"GPT2_MODEL_NAME": "./no-such-folder"}, 3, "no-such-folder"),
    ({"INIT_FROM": "no-such-file.pt"}, 3, "Checkpoint not found"),
    ({"MODEL_TYPE": "bigram", "TOKENIZER": "gpt2"}, 2, "TOKENIZER"),
    ({"RESUME": "some-path.pt"}, 3, "Checkpoint not found"),
]


@pytest.mark.parametrize(("changes", "code", "sentence"), REFUSALS, ids=str)
def test_errors_are_one_sentence_and_an_exit_code(changes, code, sentence, tmp_path):
    got, said = train(tmp_path, **changes)
    assert (got, said.count("\n")) == (code, 1), said
    assert said.startswith("error: ")
    assert sentence in said


def test_a_checkpoint_folder_that_cannot_be_written_fails_before_step_1(tmp_path):
    small_text(tmp_path)
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    code, said = train(tmp_path)
    assert code == 2
    assert "cannot be written" in said
    assert "a file is where a folder must be, or set another CHECKPOINT_DIR" in said
    assert list((tmp_path / "runs").glob("*/metrics.jsonl")) == []


@pytest.mark.parametrize("name", ["latest", "best"])
def test_weights_that_are_not_in_the_folder_of_this_run_are_asked_for_by_path(name, tmp_path):
    small_text(tmp_path)
    code, said = train(tmp_path, INIT_FROM=name)
    assert code == 3
    assert said.count("checkpoints") == 2
    assert f"INIT_FROM={name} looks in CHECKPOINT_DIR: set INIT_FROM to a checkpoint or its folder" in said
    assert "was ENABLE_CHECKPOINTS" not in said


def test_mistakes_are_reported_before_torch_is_imported(tmp_path):
    """In a separate process: exit code 2, both mistakes, and torch is not loaded yet."""
    code = (
        "import sys, runpy\nsys.argv=['training.py']\ntry: runpy.run_path('training.py', "
        "run_name='__main__')\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    env = programs.LEAST | {"MODEL_TYPE": "gtp2", "CHECKPOINT_INTERVALS": "5", "PYTHON_DOTENV_DISABLED": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "False"]
    assert "did you mean gpt2?" in done.stderr
    assert "did you mean CHECKPOINT_INTERVAL?" in done.stderr


def test_unexpected_errors_have_no_traceback_unless_debug_is_1(tmp_path, monkeypatch):
    def broken(settings, log):
        raise ZeroDivisionError("by design")

    settings = config.read(environment(tmp_path))
    monkeypatch.delenv("DEBUG", raising=False)
    assert training.guarded(broken, settings) == 1
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        training.guarded(broken, settings)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A tiny GPT-2 with the published vocabulary, written by transformers, without tokenizer files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "tiny-GPT2.v1"
    shape = {"vocab_size": 50257, "n_positions": 32, "n_embd": 8, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=50256, eos_token_id=50256)).save_pretrained(folder)
    return folder


def test_fine_tuning_pretrained_weights(pretrained, tmp_path, capsys):
    """Sizes, weights and tokenizer come from the folder, the file is named after the source,
    and a resume is bit-exact.
    """
    bare = dict.fromkeys(["N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE"])
    code, said = train(tmp_path, GPT2_MODEL_NAME=str(pretrained), TRAINING_STEPS="4", CHECKPOINT_INTERVAL="2", **bare)
    assert code == 0, said
    assert "GPT-2's own is used" in said
    record = newest(tmp_path)
    assert record.path is not None
    assert re.fullmatch(r"checkpoint_gpt2_letters_tinygpt2v1_step0004_\d{8}_\d{6}\.pt", record.path.name)
    assert record.tokenizer == {"kind": "gpt2"}
    assert (record.model_settings["block_size"], record.model_settings["n_layer"]) == (32, 2)
    straight = {name: tensor.clone() for name, tensor in record.model_state.items()}
    record.path.unlink()
    for path in (tmp_path / "checkpoints" / "best").glob("*step0004*"):
        path.unlink()
    code, said = train(tmp_path, RESUME="auto", GPT2_MODEL_NAME=str(pretrained), TRAINING_STEPS="4", **bare)
    assert code == 0, said
    assert "bit-exact" in capsys.readouterr().out
    assert all(torch.equal(newest(tmp_path).model_state[name], tensor) for name, tensor in straight.items())


def test_the_command_that_adapters_end_with_opens_them(pretrained, tmp_path):
    """Their checkpoint brings the model's type; only their base has to be named."""
    bare = dict.fromkeys(["N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE"])
    lora = {"LORA_RANK": "2", "CHECKPOINT_ADAPTERS_ONLY": "true", "TRAINING_STEPS": "2"}
    code, said = train(tmp_path, GPT2_MODEL_NAME=str(pretrained), **lora, **bare)
    assert code == 0, said
    (line,) = [line.removeprefix("next: ") for line in said.splitlines() if line.startswith("next: ")]
    assert f"GPT2_MODEL_NAME={pretrained}" in line
    alone = programs.LEAST | {"PYTHON_DOTENV_DISABLED": "1", "MAX_NEW_TOKENS": "3"}
    done = subprocess.run(["bash", "-c", line], env=alone, capture_output=True, text=True, check=False)
    assert (done.returncode, bool(done.stdout.strip())) == (0, True), done.stderr


def test_pretrained_weights_start_with_the_loss_of_transformers(pretrained, tmp_path):
    """The first validation loss is that of the transformers model on the same windows."""
    code, said = train(
        tmp_path,
        GPT2_MODEL_NAME=str(pretrained),
        EVAL_STEPS="0",
        TRAINING_STEPS="1",
        WARMUP_STEPS="0",
        **dict.fromkeys(["N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE"]),
    )
    assert code == 0, said
    first = next(line for line in metrics(tmp_path) if line["split"] == "validation")
    run = training.fresh(
        config.read(
            environment(
                tmp_path,
                GPT2_MODEL_NAME=str(pretrained),
                **dict.fromkeys(["N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE"]),
            )
        ),
        Log(),
    )
    windows = torch.cat(
        [x for x, _ in validation_windows(run.text.split.validation, block_size=32, batch_size=4, steps=0)]
    )
    targets = torch.cat(
        [y for _, y in validation_windows(run.text.split.validation, block_size=32, batch_size=4, steps=0)]
    )
    reference = GPT2LMHeadModel.from_pretrained(pretrained).eval()
    with torch.no_grad():
        logits = reference(windows).logits
    assert first["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), abs=1e-5
    )


def test_a_hub_name_without_a_network_names_the_folder_form(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code, said = train(tmp_path, GPT2_MODEL_NAME="gpt2", **dict.fromkeys(["N_LAYER", "N_HEAD", "N_EMBD"]))
    assert code == 3
    assert "folder that holds config.json" in said


# ---------------------------------------------------------------------------------------------------------------------
# Retention.


def test_retention_leaves_what_the_policy_names(tmp_path):
    """Of steps 1 to 8: the last two whole, those at multiples of 3 without their optimizer, and the best two."""
    policy = {"CHECKPOINT_KEEP_LAST": "2", "CHECKPOINT_KEEP_EVERY": "3", "CHECKPOINT_KEEP_BEST": "2"}
    code, said = train(tmp_path, CHECKPOINT_INTERVAL="1", EVAL_INTERVAL="1", CHECKPOINT_PREFIX="my-run", **policy)
    assert code == 0, said
    folder = tmp_path / "checkpoints"
    ordinary = {one.step: one.resumable for one in finding.scan(folder, bests=False)}
    assert ordinary == {3: False, 6: False, 7: True, 8: True}
    losses = {
        line["step"]: line["loss"]
        for line in read_metrics(next((tmp_path / "runs").glob("*/metrics.jsonl")))
        if line["split"] == "validation" and line["step"]
    }
    bests = {
        one.step: one.metadata["validation_loss"] for one in finding.scan(folder) if one.path.parent.name == "best"
    }
    running = [step for step in losses if losses[step] == min(losses[other] for other in losses if other <= step)]
    assert bests == {step: losses[step] for step in sorted(running, key=losses.__getitem__)[:2]}
    assert all(path.name.startswith("my-run_gpt2_letters_step000") for path in folder.glob("*.pt"))


def test_without_bests_there_is_no_best_folder(tmp_path):
    assert train(tmp_path, CHECKPOINT_KEEP_BEST="0")[0] == 0
    assert not (tmp_path / "checkpoints" / "best").exists()


@pytest.mark.parametrize(("keep_best", "waits"), [("0", False), ("1", True)])
def test_a_new_best_waits_for_the_save_in_flight_only_if_bests_are_kept(keep_best, waits, tmp_path, monkeypatch):
    events = []

    def recorded(name, action):
        return lambda *arguments: (events.append(name), action(*arguments))[1]

    monkeypatch.setattr(training, "training_step", recorded("step", training.training_step))
    monkeypatch.setattr(Writer, "wait", recorded("wait", Writer.wait))
    code, said = train(tmp_path, CHECKPOINT_INTERVAL="0", EVAL_INTERVAL="1", CHECKPOINT_KEEP_BEST=keep_best)
    assert code == 0, said
    assert events.count("step") == 8
    while events[-1] != "step":  # the end waits in any case
        events.pop()
    assert ("wait" in events) is waits


def test_another_run_in_the_folder_is_never_pruned(tmp_path):
    assert train(tmp_path, CHECKPOINT_INTERVAL="2")[0] == 0
    assert train(tmp_path, CHECKPOINT_INTERVAL="1", CHECKPOINT_KEEP_LAST="1", SEED="2")[0] == 0
    steps = [one.step for one in ckpt.find(tmp_path / "checkpoints") if one.path.parent.name != "best"]
    assert steps == [2, 4, 6, 8, 8]


def test_a_disk_too_small_for_the_policy_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_checkpoints, "PAUSES", ())  # nobody makes room
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    code, said = train(tmp_path, CHECKPOINT_KEEP_LAST="3", CHECKPOINT_INTERVAL="1")
    assert code == 2
    assert "CHECKPOINT_KEEP_LAST=3: 5 checkpoints of " in said
    assert "20,000 are free" in said
    code, said = train(tmp_path, CHECKPOINT_INTERVAL="4")
    assert "warning: 4 checkpoints of " in said
    assert code == 5  # every save failed, and training continued
    assert said.count("could not be saved (the disk is full: about ") == 2  # best/, on the same disk, is not tried
    assert not list((tmp_path / "checkpoints").glob("*.pt"))


def test_models_that_keep_every_leaves_need_space_too(tmp_path, monkeypatch):
    """8 saves, of which the multiples of 2 stay without their optimizer, a third of the bytes."""
    policy = {"CHECKPOINT_INTERVAL": "1", "CHECKPOINT_KEEP_LAST": "1", "CHECKPOINT_KEEP_BEST": "0"}
    usage = shutil.disk_usage(tmp_path)
    needs = []
    monkeypatch.setattr(run_files.ckpt, "free_space_problem", lambda folder, *, need: needs.append(need))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for changes in (
        {},
        {"CHECKPOINT_KEEP_EVERY": "2"},
        {"CHECKPOINT_KEEP_EVERY": "3"},
        {"CHECKPOINT_KEEP_EVERY": "100"},
    ):
        assert train(tmp_path, **policy, **changes)[0] == 0
    full = needs[0] // 2  # the last and the one that is written before it is pruned
    assert [need - needs[0] for need in needs] == [0, 4 * full // 3, 2 * full // 3, 0]


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_disk_that_is_full_for_a_while_costs_one_save(background, tmp_path, monkeypatch):
    usage = shutil.disk_usage
    calls = []

    def sometimes_full(folder: Path):
        calls.append(folder)
        return usage(folder)._replace(free=10) if 2 <= len(calls) <= 5 else usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", sometimes_full)
    code, said = train(tmp_path, CHECKPOINT_INTERVAL="2", CHECKPOINT_ASYNC=background, CHECKPOINT_KEEP_BEST="0")
    assert code == 0, said
    assert "step 2 could not be saved" in said
    assert [one.step for one in ckpt.find(tmp_path / "checkpoints")][-1] == 8


@pytest.mark.parametrize("background", ["true", "false"])
def test_nan_weights_are_never_saved(background, tmp_path, monkeypatch):
    learn = training.training_step

    def spoiled(run, lr):
        loss = learn(run, lr)
        if run.state.step == 4:
            run.model.wte.weight.data[0, 0] = math.nan
        return loss

    monkeypatch.setattr(training, "training_step", spoiled)
    changes = {"CHECKPOINT_INTERVAL": "1", "EVAL_INTERVAL": "0", "SAMPLE_INTERVAL": "0", "CHECKPOINT_KEEP_LAST": "1"}
    code, said = train(tmp_path, CHECKPOINT_ASYNC=background, **changes)
    assert code == 1
    assert "step 3 is saved" in said
    assert [one.step for one in ckpt.find(tmp_path / "checkpoints")] == [3]


@pytest.mark.parametrize(
    ("given", "kind", "floor"),
    [
        ({"MODEL_TYPE": "gpt2"}, "linear", 0.0),
        ({"MODEL_TYPE": "gpt2", "MIN_LEARNING_RATE": "1e-4"}, "linear", 1e-4),
        ({"MODEL_TYPE": "gpt2", "LR_SCHEDULE": "cosine", "LEARNING_RATE": "3e-3"}, "cosine", 3e-4),
        ({"LR_SCHEDULE": "wsd", "MIN_LEARNING_RATE": "0"}, "wsd", 0.0),
        ({}, "cosine", 1e-3),
        ({"LR_SCHEDULE": "linear"}, "linear", 0.0),
    ],
    ids=str,
)
def test_the_default_floor_of_the_learning_rate_depends_on_the_schedule(given, kind, floor):
    plan = run.planned(config.read({"PYTHON_DOTENV_DISABLED": "1"} | given))
    assert (plan.kind, plan.floor) == (kind, floor)
