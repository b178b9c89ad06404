"""What is said of a wrong name, wherever it stands, and of a setting that has no effect."""

import io
import re
import sys
from pathlib import Path

import pytest
from drive import ROOT, TINY, command, environment
from script import script

import training
from milepost import config
from milepost.config import Config, ConfigError
from milepost.config.names import refuse_arguments

ALONE = {"PYTHON_DOTENV_DISABLED": "1"}

# A wrong name, the variable it is meant for, and whether it can be meant for nothing else in a process environment.
WRONG = [
    ("N_EMBED", "N_EMBD", True), ("N_HEADS", "N_HEAD", True), ("N_LAYERS", "N_LAYER", True), ("LORA_R", "LORA_RANK", True),
    ("LR", "LEARNING_RATE", False), ("BATCHSIZE", "BATCH_SIZE", False), ("BLOCKSIZE", "BLOCK_SIZE", False), ("DEVCE", "DEVICE", False),
    ("TOKENISER", "TOKENIZER", False), ("OPTIMISER", "OPTIMIZER", False), ("ENABLE_CHECKPOINTING", "ENABLE_CHECKPOINTS", True),
    ("CHECKPOINTS", "ENABLE_CHECKPOINTS", False), ("CHECKPOINT_EVERY", "CHECKPOINT_INTERVAL", True), ("RESUME_FROM", "RESUME", True),
    ("DATA", "TRAINING_DATA_SOURCE", False), ("DATASET", "TRAINING_DATA_SOURCE", False), ("DATA_SOURCE", "TRAINING_DATA_SOURCE", False),
    ("TRAINING_DATA", "TRAINING_DATA_SOURCE", False), ("MODEL", "MODEL_TYPE", False), ("MAX_ITERS", "TRAINING_STEPS", False),
    ("MAX_STEPS", "TRAINING_STEPS", False), ("EPOCHS", "TRAINING_STEPS", False), ("RESUME_LR", "RESUME_LEARNING_RATE", True),
    ("CHECKPOINT_FILE", "CHECKPOINT_PATH", True), ("MAX_TOKENS", "MAX_NEW_TOKENS", False), ("TEMPERATUR", "TEMPERATURE", False),
    ("PROMTP", "PROMPT", False), ("SAVE_MODEL_ONLY", "CHECKPOINT_MODEL_ONLY", False), ("OUT_DIR", "CHECKPOINT_DIR", False),
    ("INIT_STATE_DIR", "INIT_FROM", False), ("NUM_CKPT_KEEP", "CHECKPOINT_KEEP_LAST", False),
    ("SAVE_ADAPTERS", "CHECKPOINT_ADAPTERS_ONLY", False), ("TTT_ENABLE", "TTT_LAYERS", True), ("SEEDS", "SEED", False),
    ("TOP_KK", "TOP_K", True), ("seed", "SEED", False), ("batch_size", "BATCH_SIZE", True),
]  # fmt: skip
CASES = pytest.mark.parametrize(("name", "meant", "only_ours"), WRONG, ids=[name for name, _, _ in WRONG])
# The value means something else, or the word may be a letter too far: as options these are compared, not translated.
COMPARED = {"EPOCHS", "TTT_ENABLE", "TOKENISER", "OPTIMISER", "ENABLE_CHECKPOINTING", "PROMTP", "SEEDS"}


@CASES
def test_a_wrong_name_in_the_environment_is_reported_or_refused(name: str, meant: str, only_ours: bool) -> None:
    if only_ours:
        with pytest.raises(ConfigError) as caught:
            config.read(ALONE | {name: "1"})
        (said,) = caught.value.problems
    else:
        settings = config.read(ALONE | {name: "1"})
        assert settings == config.read(ALONE)
        (said,) = settings.notes
    assert re.search(rf"\b{name}\b.* did you mean {meant}\b", said)


@CASES
def test_a_wrong_name_in_the_env_file_is_refused(name: str, meant: str, only_ours: bool, tmp_path: Path) -> None:
    (tmp_path / "s.env").write_text(f"{name}=1\n")
    with pytest.raises(ConfigError) as caught:
        config.read({"ENV_FILE": "s.env"}, cwd=tmp_path)
    (said,) = caught.value.problems
    assert re.search(rf"s\.env: {name}\b.* did you mean {meant}\b", said)


@CASES
def test_a_wrong_name_as_an_option_is_refused_with_the_variable(name: str, meant: str, only_ours: bool) -> None:
    said = refuse_arguments("training.py", [f"--{name.lower()}", "1"])
    if name in COMPARED:
        assert said.endswith(f"(unknown: --{name.lower()} (compare {meant})): python3 training.py --help lists them")
    elif name == "RESUME_FROM":  # a yes or no becomes a word of RESUME
        assert said.endswith("use RESUME=auto python3 training.py")
    else:
        assert said.endswith(f"use {meant}=1 python3 training.py")


def test_warnings_stand_beside_mistakes() -> None:
    with pytest.raises(ConfigError) as caught:
        config.read(ALONE | {"LR": "1", "SEED": "x"})
    assert len(caught.value.problems) == 2


def test_the_run_itself_reports_a_near_name(tmp_path: Path) -> None:
    done = command("training.py", tmp_path, LR="1", TRAINING_STEPS="1", EVAL_INTERVAL="0", WARMUP_STEPS="0")
    assert done.returncode == 0
    assert "LEARNING_RATE" in next(line for line in done.stderr.splitlines() if line.startswith("LR "))


# ---------------------------------------------------------------------------------------------------------------------
# Settings without effect


def unused(name: str, **variables: str) -> list[str]:
    """The sentences on settings without effect of a script."""
    module = training if name == "training" else script(name)
    return config.no_effect(config.read(ALONE | variables, reads=module.READS), f"{name}.py")


@pytest.mark.parametrize(
    ("name", "variables", "named", "remedy"),
    [
        ("training", {"CHECKPOINT_PATH": "x", "MODE": "resume"}, ["CHECKPOINT_PATH", "MODE"], "RESUME=path"),
        ("training", {"RESUME_TRAINING_STEPS": "5"}, ["RESUME_TRAINING_STEPS"], "TRAINING_STEPS is the total"),
        ("training", {"RESUME_LEARNING_RATE": "1"}, ["RESUME_LEARNING_RATE"], "LEARNING_RATE is"),
        ("training", {"OUTPUT": "x", "PROMPT": "a"}, ["OUTPUT", "PROMPT"], "CHECKPOINT_DIR"),
        ("training", {"N_LAYER": "6", "N_EMBD": "96"}, ["N_LAYER", "N_EMBD"], "needs MODEL_TYPE=gpt2"),
        ("training", {"DROPOUT": "0.1"}, ["DROPOUT"], "needs MODEL_TYPE=gpt2 or llama"),
        ("training", {"BIAS": "false"}, ["BIAS"], "needs MODEL_TYPE=gpt2"),
        ("training", {"N_HEAD": "3", "MODE": "resume"}, ["N_HEAD"], "needs MODEL_TYPE=gpt2"),  # MODE is not read there
        ("training", {"CHECKPOINT_INTERVAL": "500"}, ["CHECKPOINT_INTERVAL"], "needs ENABLE_CHECKPOINTS=true"),
        ("training", {"CHECKPOINT_DIR": "x"}, ["CHECKPOINT_DIR"], "needs ENABLE_CHECKPOINTS=true or RESUME or INIT_FROM"),
        ("training", {"CHECKPOINT_KEEP_LAST": "1", "INIT_FROM": "x"}, ["CHECKPOINT_KEEP_LAST"], "needs ENABLE_CHECKPOINTS=true"),
        ("training", {"ENABLE_CHECKPOINTS": "true", "CHECKPOINT_KEEP_BEST": "3", "VALIDATION_FRACTION": "0"}, ["CHECKPOINT_KEEP_BEST"], "needs VALIDATION_FRACTION other than 0 or VALIDATION_DATA"),
        ("training", {"TEMPERATURE": "0", "TOP_P": "0.5"}, ["TOP_P"], "needs TEMPERATURE other than 0"),
        ("training", {"TOKENIZER": "byte", "BPE_VOCAB_SIZE": "300"}, ["BPE_VOCAB_SIZE"], "needs TOKENIZER=auto or bpe"),
        ("training", {"LR_SCHEDULE": "constant", "MIN_LEARNING_RATE": "1e-4"}, ["MIN_LEARNING_RATE"], "needs LR_SCHEDULE other than constant"),
        ("load_checkpoint", {"TEMPERATURE": "0", "SAMPLE_SEED": "3", "PROMPT": "a"}, ["SAMPLE_SEED"], "needs TEMPERATURE other than 0 or no PROMPT"),
        ("load_checkpoint", {"OUTPUT": "x", "RESUME": "auto"}, ["OUTPUT", "RESUME"], "CHECKPOINT_PATH"),
        ("load_checkpoint", {"RESUME_TRAINING_STEPS": "5"}, ["RESUME_TRAINING_STEPS"], "needs MODE=resume"),
        ("load_checkpoint", {"MODE": "resume", "PROMPT": "a", "NUM_SAMPLES": "2"}, ["PROMPT", "NUM_SAMPLES"], "needs MODE=inference"),
        ("load_checkpoint", {"SEED": "3", "BATCH_SIZE": "2"}, ["SEED", "BATCH_SIZE"], "needs MODE=resume"),
        ("evaluate_checkpoint", {"BENCHMARK_DATA": "x"}, ["BENCHMARK_DATA"], "needs EVAL_TYPE=benchmark or both"),
        ("convert_checkpoint", {"GGUF_TYPE": "f32"}, ["GGUF_TYPE"], "needs CONVERT_TO=gguf"),
        ("convert_checkpoint", {"CHECKPOINT_LAYOUT": "directory", "CONVERT_TO": "gguf"}, ["CHECKPOINT_LAYOUT"], "needs no CONVERT_TO"),
        ("list_checkpoints", {"SEED": "4", "DEVICE": "cpu", "RUNS_DIR": "x"}, ["SEED"], "--help lists"),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_without_effect_is_named_with_what_it_needs(
    name: str, variables: dict[str, str], named: list[str], remedy: str
) -> None:
    said = unused(name, **variables)
    told = [line for line in said if remedy in line]
    assert len(told) == 1, said
    about = told[0].split(": no effect" if "no effect" in told[0] else "; ")[0]
    assert set(re.findall(r"\b([A-Z_0-9]+)=", about)) == set(named)


def test_what_a_request_or_a_command_may_change_switches_nothing_off() -> None:
    settings = {"TEMPERATURE": "0", "TOP_K": "3", "TOP_P": "0.5"}
    assert unused("serve_checkpoint", **settings) == unused("chat", **settings) == []
    assert len(unused("load_checkpoint", **settings)) == 1


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("training", {"MODEL_TYPE": "gpt2", "N_LAYER": "2", "BIAS": "false", "BLOCK_SIZE": "8"}),
        ("training", {"BLOCK_SIZE": "8", "SEED": "1", "DEVICE": "cpu", "RUNS_DIR": "x", "TEMPERATURE": "0"}),
        ("training", {"ENABLE_CHECKPOINTS": "true", "CHECKPOINT_INTERVAL": "5", "CHECKPOINT_DIR": "x"}),
        ("training", {"RESUME": "auto", "CHECKPOINT_INTERVAL": "5", "N_LAYER": "2"}),  # the checkpoint may enable both
        ("training", {"INIT_FROM": "x", "N_LAYER": "2", "CHECKPOINT_DIR": "x"}),
        ("load_checkpoint", {"CHECKPOINT_PATH": "x", "PROMPT": "a", "TOP_K": "3", "N_HEAD": "2", "DTYPE": "float32"}),
        ("load_checkpoint", {"MODE": "resume", "RESUME_TRAINING_STEPS": "2", "SEED": "2", "CHECKPOINT_INTERVAL": "3"}),
        ("load_checkpoint", {"TEMPERATURE": "0", "SAMPLE_SEED": "3"}),  # which draws the first token of a text without a prompt
        ("prune_checkpoints", {"CHECKPOINT_KEEP_LAST": "1", "DRY_RUN": "false"}),
        ("list_checkpoints", {"CHECKPOINT_PATH": "x", "DEVICE": "cpu", "RUNS_DIR": "x"}),
    ],
    ids=str,
)  # fmt: skip
def test_settings_with_an_effect_are_not_named(name: str, variables: dict[str, str]) -> None:
    assert unused(name, **variables) == []


def test_the_env_file_is_judged_like_the_environment_but_for_defaults_that_it_repeats(tmp_path: Path) -> None:
    (tmp_path / "run.env").write_text("PROMPT=a\nN_LAYER=4\nCHECKPOINT_INTERVAL=500\n")
    settings = config.read({"ENV_FILE": "run.env"}, cwd=tmp_path, reads=training.READS)
    (said,) = config.no_effect(settings, "training.py")
    assert "PROMPT=a (run.env)" in said


def test_the_settings_that_a_run_wrote_are_all_used_when_it_is_repeated(tmp_path: Path) -> None:
    first = config.read(
        environment(tmp_path, MODEL_TYPE="bigram", **dict.fromkeys(["N_LAYER", "N_HEAD", "N_EMBD", "DROPOUT"]))
    )
    (tmp_path / "config.env").write_text(config.as_env(first, {}))
    again = config.read({"ENV_FILE": "config.env"}, cwd=tmp_path, reads=training.READS)
    assert config.no_effect(again, "training.py") == []


def test_a_script_without_declared_settings_judges_none() -> None:
    assert config.no_effect(Config(), "x.py") == []


def test_a_setting_that_is_not_used_is_shown_as_it_was_set() -> None:
    settings = config.read(ALONE | {"MODE": "resume", "CHECKPOINT_PATH": "latest"}, reads=training.READS)
    (said,) = config.no_effect(settings, "training.py")
    assert "MODE=resume" in said


def test_a_start_logs_what_has_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command-line entry, as a user would meet it."""
    log = training.Log(io.StringIO())
    monkeypatch.setattr(sys, "argv", [str(ROOT / "training.py")])
    settings = config.read(environment(tmp_path, OUTPUT="x"), reads=training.READS)
    assert training.guarded(lambda *_: 0, settings, log=log) == 0
    assert "not used by training.py: OUTPUT=" in log.stream.getvalue()
    assert TINY.keys() & set(re.findall(r"\w+", log.stream.getvalue())) == set()  # the control
