"""milepost/config: every variable, every limit, every message; values read back from everything that shows them."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import models
from milepost import config
from milepost.config import VARIABLES, Config, ConfigError
from milepost.config.names import refuse_arguments
from milepost.config.parse import kind_of
from milepost.config.variables import SECRET_FORMS

ALONE = {"PYTHON_DOTENV_DISABLED": "1"}  # the developer's own .env must not decide a test


def names(text: str) -> set[str]:
    return set(text.split())


# The contract of names: adding or renaming a variable has to change this list too.
IDENTITY = names(
    "TRAINING_DATA_SOURCE TEXT_FIELD DOCUMENT_SEPARATOR PROMPT_FIELD ANSWER_FIELD TOKENIZER BPE_VOCAB_SIZE VALIDATION_FRACTION VALIDATION_DATA MODEL_TYPE PRETRAINED GPT2_MODEL_NAME "
    "N_LAYER N_HEAD N_EMBD N_KV_HEAD N_INNER BLOCK_SIZE BIAS LORA_RANK LORA_ALPHA LORA_DROPOUT LORA_TARGETS CHECKPOINT_ADAPTERS_ONLY "
    "TTT_LAYERS TTT_BASE_LR TTT_MINI_BATCH_SIZE TTT_INITIAL_GATING_ALPHA"
)
MATH = names(
    "TRAINING_STEPS BATCH_SIZE GRADIENT_ACCUMULATION_STEPS LEARNING_RATE MIN_LEARNING_RATE WARMUP_STEPS LR_SCHEDULE "
    "LOSS_ON PACKING OPTIMIZER WEIGHT_DECAY BETA1 BETA2 GRAD_CLIP DROPOUT SEED DTYPE COMPILE DETERMINISTIC"
)
HABIT = names(
    "UNKNOWN_CHARACTERS EVAL_INTERVAL EVAL_STEPS SAMPLE_INTERVAL LOG_INTERVAL RUN_NOTE TRACKER ENABLE_CHECKPOINTS CHECKPOINT_INTERVAL CHECKPOINT_MODEL_ONLY "
    "CHECKPOINT_PREFIX CHECKPOINT_KEEP_LAST CHECKPOINT_KEEP_EVERY CHECKPOINT_KEEP_BEST REPLAY_CHECK_INTERVAL TEMPERATURE TOP_K TOP_P REPETITION_PENALTY"
)
SESSION = names(
    "ENV_FILE NOTIFY_URL DEVICE DEVICE_CHECK DISTRIBUTED BASE_CHECKPOINT CHECKPOINT_DIR CACHE_GB CHECKPOINT_FALLBACK_DIR CHECKPOINT_MIRROR MIRROR_KEEP_LAST MIRROR_MB_S RUNS_DIR RESUME RESUME_STEP INIT_FROM MODE CHECKPOINT_PATH PROMPT PROMPT_FILE RAW_PROMPT "
    "MAX_NEW_TOKENS STOP NUM_SAMPLES SAMPLE_SEED QUANTIZE SPECULATE STREAM "
    "EVAL_TYPE EVAL_DATA EVAL_STRIDE BENCHMARK_DATA "
    "FORMAT SORT RUN_NAME CHECKPOINT_LAYOUT CHECKPOINT_ASYNC COMPARE_WITH REPLAY CONVERT_TO GGUF_TYPE RUN OUTPUT DRY_RUN PUSH_TO_HUB HUB_PRIVATE PRUNE_OTHERS RESUME_TRAINING_STEPS RESUME_LEARNING_RATE "
    "PORT SERVE_HOST API_KEY SERVE_SLOTS SERVE_QUEUE SERVE_TIMEOUT"
)


def read(cwd: str | os.PathLike[str] | None = None, **variables: str) -> Config:
    return config.read(ALONE | variables, cwd=cwd)


def problems(**variables: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(**variables)
    return caught.value.problems


def of_file(folder: Path, text: str, **variables: str) -> Config:
    path = folder / "settings.env"
    path.write_bytes(text.encode())
    return config.read({"ENV_FILE": "settings.env", **variables}, cwd=folder)


def file_problems(folder: Path, text: str, **variables: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        of_file(folder, text, **variables)
    return caught.value.problems


# Declarations and defaults


def test_variables_and_their_scopes_are_the_contract() -> None:
    by_scope = {scope: {n for n, v in VARIABLES.items() if v.metadata["scope"] == scope} for scope in config.SCOPES}
    assert by_scope == {"identity": IDENTITY, "math": MATH, "habit": HABIT, "session": SESSION}
    assert all(each.metadata["doc"] and each.metadata["group"] for each in VARIABLES.values())


def test_documented_defaults() -> None:
    c = read()
    assert (c.model_type, c.training_steps, c.validation_fraction, c.deterministic) == ("bigram", 2000, 0.1, True)
    assert (c.enable_checkpoints, c.checkpoint_interval, c.resume, c.mode) == (False, 500, "never", "inference")
    assert (c.checkpoint_path, c.max_new_tokens, c.resume_training_steps) == ("latest", 300, 5000)
    assert (c.resume_learning_rate, c.device, c.dtype, c.compile, c.tokenizer) == (3e-4, *["auto"] * 4)
    assert (c.min_learning_rate, c.resume_step, c.init_from, c.prompt, c.sample_seed, c.stop) == (*[None] * 5, ())
    assert c.training_data_source == str(config.ROOT / "data" / "dear_wren.md")
    assert (c.checkpoint_dir, c.runs_dir) == (str(config.ROOT / "checkpoints"), str(config.ROOT / "runs"))
    assert set(c.sources) == set(VARIABLES)
    assert set(c.sources.values()) == {"default"}


def test_defaults_by_model() -> None:
    small = read(MODEL_TYPE="gpt2")
    sizes = (small.n_layer, small.n_head, small.n_embd, small.block_size, small.batch_size, small.dropout)
    assert sizes == (4, 4, 128, 128, 12, 0.0)
    assert (small.learning_rate, small.warmup_steps) == (1e-2, 100)
    assert (small.optimizer, small.lr_schedule, small.training_steps) == ("muon", "linear", 1000)
    # Fewer than 10 x N_EMBD tokens a step.
    for shape, rate in (({"N_EMBD": "384"}, 1e-3), ({"BATCH_SIZE": "9"}, 3e-3), ({"BLOCK_SIZE": "64"}, 3e-3)):
        other = read(MODEL_TYPE="gpt2", **shape)
        assert (other.optimizer, other.learning_rate) == ("adamw", rate)
    assert read(MODEL_TYPE="gpt2", BLOCK_SIZE="64", GRADIENT_ACCUMULATION_STEPS="2").optimizer == "muon"
    assert read(MODEL_TYPE="gpt2", N_EMBD="160", OPTIMIZER="muon").learning_rate == 1e-2
    bigram = read()
    assert (bigram.block_size, bigram.batch_size, bigram.learning_rate, bigram.dropout) == (64, 32, 1e-2, 0.0)
    assert (bigram.optimizer, bigram.lr_schedule, bigram.training_steps) == ("adamw", "cosine", 2000)
    large = read(MODEL_TYPE="gpt2", GPT2_MODEL_NAME="gpt2")
    assert (large.n_layer, large.n_embd, large.block_size, large.learning_rate) == (None, None, 256, 5e-5)
    assert (large.optimizer, large.lr_schedule, large.training_steps) == ("adamw", "cosine", 2000)
    assert read(MODEL_TYPE="gpt2", BATCH_SIZE="7").batch_size == 7
    assert read(MODEL_TYPE="gpt2", TRAINING_STEPS="20").warmup_steps == 2  # a short run is not all warm-up


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ({"MODEL_TYPE": "gpt2", "OPTIMIZER": "adamw"}, 3e-3),
        ({"MODEL_TYPE": "gpt2", "OPTIMIZER": "muon"}, 1e-2),
        ({"MODEL_TYPE": "gpt2", "OPTIMIZER": "adamw", "LEARNING_RATE": "2e-3"}, 2e-3),
        ({"MODEL_TYPE": "gpt2", "OPTIMIZER": "muon", "LEARNING_RATE": "2e-3"}, 2e-3),
        ({"OPTIMIZER": "adamw"}, 1e-2),  # a bigram's
        ({"MODEL_TYPE": "gpt2", "GPT2_MODEL_NAME": "gpt2", "OPTIMIZER": "adamw"}, 5e-5),
        ({"MODEL_TYPE": "gpt2", "GPT2_MODEL_NAME": "gpt2", "OPTIMIZER": "muon"}, 5e-5),
    ],
    ids=str,
)
def test_the_rate_of_a_gpt2_from_random_weights_follows_its_optimizer(given: dict[str, str], rate: float) -> None:
    c = read(**given)
    assert (c.learning_rate, c.is_set("LEARNING_RATE")) == (rate, "LEARNING_RATE" in given)


def test_config_is_frozen_and_knows_what_is_set() -> None:
    c = read(BATCH_SIZE="8")
    assert c.is_set("BATCH_SIZE")
    assert c.is_set("batch_size")
    assert not c.is_set("SEED")
    with pytest.raises(AttributeError):
        c.batch_size = 9  # type: ignore[misc]


# One value


@pytest.mark.parametrize("text", ["true", "1", "yes", "on", "TRUE", "Yes", " on "])
def test_true_words(text: str) -> None:
    assert read(ENABLE_CHECKPOINTS=text).enable_checkpoints is True
    assert read(COMPILE=text).compile == "true"


@pytest.mark.parametrize("text", ["false", "0", "no", "off", "False", "OFF"])
def test_false_words(text: str) -> None:
    assert read(STREAM=text).stream is False
    assert read(COMPILE=text).compile == "false"


@pytest.mark.parametrize("text", ["2", "t", "y", "enabled", "none", "tru e", "null"])
def test_other_words_are_not_booleans(text: str) -> None:
    assert problems(BIAS=text) == [f"BIAS={text!r} (environment): expected true or false"]


@pytest.mark.parametrize(
    ("text", "value"), [("5000", 5000), ("5_000", 5000), ("1e4", 10000), ("1.5e3", 1500), (" 7 ", 7), ("2.0", 2)]
)
def test_whole_numbers(text: str, value: int) -> None:
    steps = read(TRAINING_STEPS=text).training_steps
    assert (steps, type(steps)) == (value, int)


@pytest.mark.parametrize(
    "text", ["2k", "1.5", "0", "-3", "nan", "inf", "1e400", "5__0", "1e30", "5 0", "0x10", "٣", "9" * 5000, "1,000"]
)
def test_invalid_whole_numbers(text: str) -> None:
    (problem,) = problems(TRAINING_STEPS=text)
    assert problem.startswith("TRAINING_STEPS='")
    assert problem.removesuffix(" below 2**63").endswith(" (environment): expected a whole number at least 1")


@pytest.mark.parametrize("text", ["99999999999999999999", "1e30", "9" * 500, "10_000_000_000_000_000_000"])
def test_a_number_too_large_names_the_limit(text: str) -> None:
    (problem,) = problems(SEED=text)
    assert problem.endswith("expected a whole number at least 0 below 2**63")


def test_large_seeds_keep_every_digit() -> None:
    assert read(SEED="9007199254740993").seed == 9007199254740993
    assert read(SEED=str(2**63 - 1)).seed == 2**63 - 1
    assert len(problems(SEED=str(2**63))) == 1


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "1e-4x", "1e400", "ten", "1e-4 1"])
def test_invalid_learning_rates(text: str) -> None:
    assert problems(LEARNING_RATE=text) == [f"LEARNING_RATE={text!r} (environment): expected a number above 0"]


def test_limits_are_inside_or_outside_as_documented() -> None:
    assert read(VALIDATION_FRACTION="0", TOP_P="1", DROPOUT="0", GRAD_CLIP="0").top_p == 1.0
    found = problems(VALIDATION_FRACTION="1", TOP_P="0", DROPOUT="1", TOP_K="-1", BPE_VOCAB_SIZE="256", BETA2="1.0")
    assert [each.split("=")[0] for each in found] == sorted(
        ["VALIDATION_FRACTION", "BPE_VOCAB_SIZE", "TOP_P", "DROPOUT", "TOP_K", "BETA2"], key=list(VARIABLES).index
    )
    assert "VALIDATION_FRACTION='1' (environment): expected a number at least 0 and below 1" in found
    assert "TOP_P='0' (environment): expected a number above 0 and at most 1" in found
    zero = read(CHECKPOINT_INTERVAL="0", SAMPLE_INTERVAL="0", EVAL_INTERVAL="0", RESUME_TRAINING_STEPS="0")
    assert (zero.checkpoint_interval, zero.sample_interval, zero.resume_training_steps) == (0, 0, 0)


def test_words_besides_numbers_and_paths(tmp_path: Path) -> None:
    assert read(RESUME_LEARNING_RATE="keep").resume_learning_rate == "keep"
    assert read(RESUME_LEARNING_RATE="1e-4").resume_learning_rate == 1e-4
    assert problems(RESUME_LEARNING_RATE="kept") == [
        "RESUME_LEARNING_RATE='kept' (environment): expected keep or a number above 0; did you mean keep?"
    ]
    assert read(RESUME="Auto").resume == "auto"
    assert read(tmp_path, RESUME="a/b.pt").resume == str(tmp_path / "a" / "b.pt")
    assert "expected never, auto, latest, best or a path" in problems(RESUME="true")[0]
    assert read(PROMPT_FILE="-").prompt_file == "-"


def test_choices_take_any_case_and_suggest_the_closest() -> None:
    assert read(MODEL_TYPE="GPT2").model_type == "gpt2"
    assert problems(MODEL_TYPE="gtp2") == [
        "MODEL_TYPE='gtp2' (environment): expected one of bigram, gpt2, llama; did you mean gpt2?"
    ]
    assert problems(DEVICE="cuda:1") == [
        "DEVICE='cuda:1' (environment): expected one of auto, cpu, cuda, mps, gpu; did you mean cuda?"
    ]


@pytest.mark.parametrize("name", list(VARIABLES))
@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_empty_counts_as_unset(name: str, text: str) -> None:
    if text and name in ("PROMPT", "STOP"):  # texts that may well be white space
        assert getattr(read(**{name: text}), name.lower()) in (text, (text,))
    else:
        assert read(**{name: text}) == read()


def test_windows_own_prompt_counts_as_unset() -> None:
    for text in ("$P$G", "(base) $P$G", "(.venv) (base) $P$G", "[venv] $P$_$G", "$P$G$S", "$p$g"):
        assert read(PROMPT=text).prompt is None, text
    for text in ("$P$G ", "(base)", "$G", "It costs $P", "$PATH is $P$G"):
        assert read(PROMPT=text).prompt == text


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("END", ("END",)),
        (r"\n\n", ("\n\n",)),
        (r"a\tb\\n\x", ("a\tb\\n\\x",)),
        ('["a|b", "\\n", " é"]', ("a|b", "\n", " é")),
        ("a|b", ("a|b",)),
        ("[]", ()),
    ],
)
def test_stop(text: str, stops: tuple[str, ...]) -> None:
    assert read(STOP=text).stop == stops


@pytest.mark.parametrize("text", ["[END]", "[1]", '[""]', '["a"', '["\\ud800"]', '[["a"]]'])
def test_invalid_stop_lists(text: str) -> None:
    assert "expected text, or a JSON list" in problems(STOP=text)[0]


def test_free_text_is_taken_as_it_is_but_must_be_utf8() -> None:
    assert read(PROMPT=" Dear Wren, \n").prompt == " Dear Wren, \n"
    assert problems(PROMPT="a\udcffb") == [r"PROMPT='a\udcffb' (environment): expected text in UTF-8"]
    assert problems(PROMPT="a\0b") == [r"PROMPT='a\x00b' (environment): expected text in UTF-8"]


def test_messages_are_one_line_each_and_harmless_on_a_terminal() -> None:
    with pytest.raises(ConfigError) as caught:
        read(SEED="\x1b[31m\n\u202e" + "x" * 500, DEVICE="tpu", **{"TRAINING_STEP\x1b": "1"})
    lines = str(caught.value).split("\n")
    assert lines == caught.value.problems
    assert len(lines) == 3
    assert all(line.isprintable() and len(line) < 200 for line in lines)


# Paths and sources


def test_paths_that_are_set_start_at_the_current_folder(tmp_path: Path) -> None:
    c = read(
        tmp_path, CHECKPOINT_DIR="out/../ckpt", RUNS_DIR="/x/runs/", PROMPT_FILE="~/p", CHECKPOINT_PATH="c/*_2*.pt"
    )
    assert (c.checkpoint_dir, c.runs_dir) == (str(tmp_path / "ckpt"), os.path.abspath("/x/runs"))
    assert (c.prompt_file, c.checkpoint_path) == (os.path.expanduser("~/p"), str(tmp_path / "c" / "*_2*.pt"))
    assert read(tmp_path, CHECKPOINT_PATH="best", INIT_FROM="latest").checkpoint_path == "best"
    several = read(tmp_path, CHECKPOINT_PATH="c/*.pt, BEST,~/x,").checkpoint_path
    assert several == f"{tmp_path}/c/*.pt,best,{os.path.expanduser('~/x')}"
    (tmp_path / "a,b.pt").touch()
    assert read(tmp_path, CHECKPOINT_PATH="a,b.pt").checkpoint_path == str(tmp_path / "a,b.pt")
    with pytest.raises(ConfigError, match="CHECKPOINT_PATH=' ,'"):
        read(tmp_path, CHECKPOINT_PATH=" ,")


def test_a_glob_works_below_a_folder_with_brackets(tmp_path: Path) -> None:
    folder = tmp_path / "a[b]"
    folder.mkdir()
    (folder / "c1.pt").touch()
    (folder / "d[1].pt").touch()
    assert read(folder, CHECKPOINT_PATH="c*.pt").checkpoint_path == str(tmp_path / "a[[]b]" / "c*.pt")
    assert read(folder, CHECKPOINT_PATH="d[1].pt").checkpoint_path == str(folder / "d[1].pt")


def test_data_sources(tmp_path: Path) -> None:
    def source(text: str) -> str:
        return read(tmp_path, TRAINING_DATA_SOURCE=text).training_data_source

    (tmp_path / "a, b.txt").touch()
    assert source("a, b.txt") == str(tmp_path / "a, b.txt")
    assert source("x.md, https://example.org/a.txt,tinyshakespeare,,y/*.md") == ",".join(
        [str(tmp_path / "x.md"), "https://example.org/a.txt", "tinyshakespeare", str(tmp_path / "y" / "*.md")]
    )


def test_model_names_are_hub_names_unless_they_are_folders(tmp_path: Path) -> None:
    def name(text: str) -> str | None:
        return read(tmp_path, MODEL_TYPE="gpt2", GPT2_MODEL_NAME=text).gpt2_model_name

    (tmp_path / "mine").mkdir()
    assert name("openai-community/gpt2") == "openai-community/gpt2"
    assert name("mine") == str(tmp_path / "mine")
    assert name("./absent") == str(tmp_path / "absent")


def test_blocks_are_put_in_order() -> None:
    assert read(MODEL_TYPE="gpt2", N_LAYER="12", TTT_LAYERS=" 10, 1 ,5").ttt_layers == "1,5,10"
    assert read(MODEL_TYPE="gpt2", TTT_LAYERS="0").ttt_layers == "0"
    assert read(MODEL_TYPE="gpt2", TTT_LAYERS=" ").ttt_layers is None


@pytest.mark.parametrize("text", ["1,1", "-1", "1,,2", "all", "1.5", "1;2", "nan", "1,5,"])
def test_invalid_blocks_are_refused(text: str) -> None:
    expected = f"TTT_LAYERS={text!r} (environment): expected different whole numbers from 0, joined by commas"
    assert problems(MODEL_TYPE="gpt2", TTT_LAYERS=text) == [expected]


# Contradictions


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ("GPT2_MODEL_NAME=gpt2", "GPT2_MODEL_NAME=gpt2 (environment) needs MODEL_TYPE=gpt2, not MODEL_TYPE=bigram (default)"),
        ("MODEL_TYPE=gpt2 GPT2_MODEL_NAME=gpt2 INIT_FROM=latest", "GPT2_MODEL_NAME=gpt2 (environment) and INIT_FROM=latest (environment) both name the first weights: unset one"),
        ("MODEL_TYPE=gpt2 N_HEAD=3", "N_EMBD=128 (default) must be a multiple of N_HEAD=3 (environment): set N_HEAD=4 or N_EMBD=144"),
        ("MODEL_TYPE=llama N_KV_HEAD=3", "N_KV_HEAD=3 (environment) must divide N_HEAD=4 (default): set N_KV_HEAD=2, or none"),
        ("MODEL_TYPE=llama N_KV_HEAD=8", "N_KV_HEAD=8 (environment) must divide N_HEAD=4 (default): set N_KV_HEAD=4, or none"),
        ("TTT_LAYERS=1", "TTT_LAYERS=1 (environment) needs MODEL_TYPE=gpt2, not MODEL_TYPE=bigram (default)"),
        ("MODEL_TYPE=gpt2 TTT_LAYERS=0,4", "TTT_LAYERS=0,4 (environment) names a missing block: N_LAYER=4 (default) has blocks 0 to 3"),
        ("MODEL_TYPE=gpt2 TTT_LAYERS=3 N_LAYER=2", "TTT_LAYERS=3 (environment) names a missing block: N_LAYER=2 (environment) has blocks 0 to 1"),
        ("MODEL_TYPE=gpt2 TTT_LAYERS=1 CHECKPOINT_LAYOUT=huggingface", "TTT_LAYERS=1 (environment) and CHECKPOINT_LAYOUT=huggingface (environment): transformers has no TTT layers; train in another layout"),
        ("RUN_NAME=Latest", "RUN_NAME=Latest (environment): RUN=latest is the newest run: take another name"),
        ("WARMUP_STEPS=30 TRAINING_STEPS=20", "WARMUP_STEPS=30 (environment) is more than TRAINING_STEPS=20 (environment): set fewer WARMUP_STEPS"),
        ("MIN_LEARNING_RATE=0.1", "MIN_LEARNING_RATE=0.1 (environment) is above LEARNING_RATE=0.01 (default): set a lower MIN_LEARNING_RATE"),
        ("PROMPT=a PROMPT_FILE=-", "PROMPT=a (environment) and PROMPT_FILE=- (environment) are both set: unset one"),
        ("RESUME_STEP=5", "RESUME_STEP=5 (environment) needs RESUME=auto or RESUME=a path, not RESUME=never (default)"),
        ("MODE=resume RESUME_STEP=5", "RESUME_STEP=5 (environment) is for RESUME in training.py; with MODE=resume (environment) name the step in CHECKPOINT_PATH: checkpoints/*_step2000_*.pt"),
        ("INIT_FROM=latest RESUME_STEP=5", "RESUME_STEP=5 (environment) needs RESUME=auto or RESUME=a path, not RESUME=never (default)"),
    ],
)  # fmt: skip
def test_contradictions(variables: str, sentence: str) -> None:
    assert problems(**dict(each.split("=") for each in variables.split())) == [sentence]


@pytest.mark.parametrize(
    "variables",
    [
        "RESUME=auto N_HEAD=3 MODEL_TYPE=gpt2",  # the width may come from the checkpoint
        "RESUME=auto GPT2_MODEL_NAME=gpt2",  # and so may the model's type
        "MODE=resume WARMUP_STEPS=2500",  # of the 5000 added steps
        "INIT_FROM=latest RESUME=auto",
        "N_HEAD=3",  # a bigram has no heads
        "INIT_FROM=latest TTT_LAYERS=9",  # the weights bring type and blocks
        "MODEL_TYPE=gpt2 GPT2_MODEL_NAME=gpt2-xl TTT_LAYERS=47",
        "MODEL_TYPE=gpt2 GPT2_MODEL_NAME=gpt2 N_HEAD=5 N_EMBD=12",
    ],
)
def test_no_contradictions(variables: str) -> None:
    given_values = dict(each.split("=") for each in variables.split())
    c = read(**given_values)
    assert {name for name in VARIABLES if c.is_set(name)} == set(given_values)


OPENS_CHECKPOINTS = ("CHECKPOINT_PATH", "MODE", "GPT2_MODEL_NAME", "N_HEAD", "Generation if MODE=inference")


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({"GPT2_MODEL_NAME": "gpt2"}, False),  # the base of adapters: their checkpoint brings the model's type
        ({"GPT2_MODEL_NAME": "gpt2", "MODEL_TYPE": "bigram"}, True),
        ({"LORA_RANK": "8"}, False),  # the checkpoint has adapters, and is compared with it
        ({"PROMPT": "a", "PROMPT_FILE": "b"}, True),
        ({"MODE": "resume", "RESUME_STEP": "5"}, True),
        ({"RESUME_STEP": "5"}, True),  # no checkpoint brings it
    ],
)
def test_what_a_script_does_not_read_its_checkpoint_brings(variables: dict[str, str], refused: bool) -> None:
    for reads, expected in ((OPENS_CHECKPOINTS, refused), ((), True)):
        with pytest.raises(ConfigError) if expected else contextlib.nullcontext():
            config.read(ALONE | variables, reads=reads)


def test_a_bad_value_is_not_reported_twice() -> None:
    assert len(problems(MODEL_TYPE="gtp2", GPT2_MODEL_NAME="gpt2")) == 1


def test_everything_at_once(tmp_path: Path) -> None:
    text = "BATCH_SIZE=x\nLERNING_RATE=1\nbad line here\n"
    found = file_problems(tmp_path, text, SEED="-1", CHECKPOINT_INTERVALS="5", RESUME_STEP="3")
    assert found == [
        "settings.env, line 3: expected NAME=value",
        "CHECKPOINT_INTERVALS is not a variable; did you mean CHECKPOINT_INTERVAL?",
        "settings.env: LERNING_RATE is not a variable; did you mean LEARNING_RATE?",
        "BATCH_SIZE='x' (settings.env): expected a whole number at least 1",
        "SEED='-1' (environment): expected a whole number at least 0",
        "RESUME_STEP=3 (environment) needs RESUME=auto or RESUME=a path, not RESUME=never (default)",
    ]


# The env file


def test_the_environment_comes_before_the_file_and_the_file_before_defaults(tmp_path: Path) -> None:
    c = of_file(tmp_path, "BATCH_SIZE=5\nSEED=6\nPROMPT=\n", SEED="7", BLOCK_SIZE="")
    assert (c.batch_size, c.seed, c.block_size, c.prompt) == (5, 7, 64, None)
    assert (c.sources["BATCH_SIZE"], c.sources["SEED"], c.sources["PROMPT"]) == (
        "settings.env",
        "environment",
        "default",
    )
    assert c.env_file == str(tmp_path / "settings.env")
    assert c.is_set("BATCH_SIZE")


def test_an_empty_variable_leaves_the_value_of_the_file(tmp_path: Path) -> None:
    assert of_file(tmp_path, "BLOCK_SIZE=32\nPROMPT=hi", BLOCK_SIZE=" ", PROMPT="$P$G").prompt == "hi"


def test_an_env_file_of_the_current_folder_that_is_not_read_is_named(tmp_path: Path) -> None:
    """One of another program is not, though it shares names of one word."""
    file = tmp_path / ".env"
    file.write_text("export BATCH_SIZE=3\nSEED=4\nN_LAYER=1\n", encoding="utf-8")
    c = config.read({}, cwd=tmp_path)
    assert (c.batch_size, c.notes) == (32, (f"{file} (BATCH_SIZE, N_LAYER) is not read; ENV_FILE=.env reads it",))
    assert config.read({"ENV_FILE": ".env"}, cwd=tmp_path).notes == ()
    assert config.read({"PYTHON_DOTENV_DISABLED": "1"}, cwd=tmp_path).notes == ()
    file.write_text("API_KEY=x\nPORT=1\nDATABASE_URL=y\n", encoding="utf-8")
    assert config.read({}, cwd=tmp_path).notes == ()


def test_the_env_file_of_the_current_folder_that_is_read_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milepost.config.resolve.base_folder", lambda: tmp_path)
    (tmp_path / ".env").write_text("BATCH_SIZE=3\n", encoding="utf-8")
    c = config.read({}, cwd=tmp_path)
    assert (c.batch_size, c.notes) == (3, ())


def test_the_repositorys_env_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milepost.config.resolve.base_folder", lambda: tmp_path)
    assert config.read({}).seed == 1337
    (tmp_path / ".env").write_text("SEED=4\nCHECKPOINT_DIR=c\n")
    c = config.read({}, cwd=tmp_path / "elsewhere")
    assert (c.seed, c.sources["SEED"], c.env_file) == (4, ".env", None)
    assert c.checkpoint_dir == str(tmp_path / "elsewhere" / "c")
    for word in ("1", "true", "T", "yes", "Y"):
        assert config.read({"PYTHON_DOTENV_DISABLED": word}).seed == 1337
    for word in ("0", "", "on"):  # python-dotenv's own reading
        assert config.read({"PYTHON_DOTENV_DISABLED": word}).seed == 4
    assert config.read({"ENV_FILE": os.devnull}).seed == 1337


def test_a_folder_called_env_is_not_an_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milepost.config.resolve.base_folder", lambda: tmp_path)
    (tmp_path / ".env").mkdir()
    assert config.read({}).seed == 1337


def test_dotenv_syntax(tmp_path: Path) -> None:
    text = (
        "\ufeffSEED=3\r\n# a comment\r\nexport BATCH_SIZE = 9  # why\r\nPROMPT='a\r\nb'\r\n"
        'STOP="x\\ty"\r\nHF_BASE=/data\r\nRUNS_DIR=${HF_BASE}/runs\r\n'
    )
    c = of_file(tmp_path, text)
    assert (c.seed, c.batch_size, c.prompt, c.stop) == (3, 9, "a\nb", ("x\ty",))
    assert c.runs_dir == os.path.abspath("/data/runs")


def test_invalid_lines_are_named(tmp_path: Path) -> None:
    text = '\n\nSEED 5\nTRAINING_STEPS\n\nBATCH_SIZE=4\n\n\nPROMPT="open\nTOP_K=5\0\n'
    quote = {9: ', with the closing " at its end (\\" writes one inside)'}
    expected = [f"settings.env, line {n}: expected NAME=value{quote.get(n, '')}" for n in (3, 4, 9, 10)]
    assert file_problems(tmp_path, text) == expected
    assert of_file(tmp_path, "PROMPT='it\\'s'\nSTOP=\"a\\\"b\"\n").prompt == "it's"  # as the sentence says
    assert of_file(tmp_path, "PROMPT='it\\'s'\nSTOP=\"a\\\"b\"\n").stop == ('a"b',)


def test_a_name_has_one_value(tmp_path: Path) -> None:
    """Of two, the last would win in silence, wherever it stands in a long file."""
    text = "SEED=1\n\nHF_HOME=/a\nPROMPT=x\nSEED=2\nPROMPT=x\nexport HF_HOME=/b\n"
    assert file_problems(tmp_path, text) == [
        "settings.env, lines 1 and 5: SEED has two values; remove one of them",
        "settings.env, lines 3 and 7: HF_HOME has two values; remove one of them",
    ]
    assert of_file(tmp_path, "SEED=1\n# SEED=2\nSEED=1\n").seed == 1


def test_a_part_without_a_value_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would expand to nothing: checkpoints in a folder of the root."""
    monkeypatch.delenv("SCRATCH", raising=False)
    text = "CHECKPOINT_DIR=${SCRATCH}/c\nRUNS_DIR=${CHECKPOINT_DIR:-x}/${HF_BASE}\nHF_BASE=r\nPROMPT='${HF_BASE}'\n"
    assert file_problems(tmp_path, text) == [
        "settings.env, line 1: ${SCRATCH} has no value in the environment or in the lines above; set it, or write ${SCRATCH:-} for an empty text",
        "settings.env, line 2: ${HF_BASE} has no value in the environment or in the lines above; set it, or write ${HF_BASE:-} for an empty text",
    ]
    assert of_file(tmp_path, "PROMPT=a${SCRATCH:-}b\n").prompt == "ab"
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    assert of_file(tmp_path, "CHECKPOINT_DIR=${SCRATCH}/c\n").checkpoint_dir == str(tmp_path / "c")


def test_unknown_names_in_the_file(tmp_path: Path) -> None:
    found = file_problems(tmp_path, "SEEDS=1\ntop_k=1\nMAX_ITERS=5\nXYZZY=1\nENV_FILE=a\n")
    assert found == [
        "settings.env: SEEDS is not a variable; did you mean SEED?",
        "settings.env: top_k is not a variable; did you mean TOP_K?",
        "settings.env: MAX_ITERS is not a variable; did you mean TRAINING_STEPS?",
        "settings.env: XYZZY is not a variable; docs/configuration.md lists them",
        "settings.env: ENV_FILE can only be set in the process environment",
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, content, reason in (
        ("absent", None, "No such file"),
        ("latin", b"PROMPT=caf\xe9", "can't decode byte 0xe9"),
    ):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name} cannot be read .*{reason}"):
            config.read({"ENV_FILE": name}, cwd=tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        config.read({"ENV_FILE": "."}, cwd=tmp_path)
    with pytest.raises(ConfigError, match="ENV_FILE='x' is not read while PYTHON_DOTENV_DISABLED"):
        config.read({"ENV_FILE": "x", **ALONE}, cwd=tmp_path)


def test_values_of_a_file_called_default_count_as_set(tmp_path: Path) -> None:
    (tmp_path / "default").write_text("SEED=2")
    c = config.read({"ENV_FILE": "default"}, cwd=tmp_path)
    assert (c.sources["SEED"], c.is_set("SEED")) == ("./default", True)


FOREIGN = "HF_HOME=/h\nHF_TOKEN=secret\nWANDB_MODE=offline\nhttp_proxy=x\nOMP_NUM_THREADS=2\nNO_COLOR=1\nDEBUG=1\n"


def test_variables_of_other_programs_enter_the_process_environment(tmp_path: Path) -> None:
    (tmp_path / "f.env").write_text(FOREIGN + "SEED=1\n")
    code = "import os; from milepost import config; config.read(); print(*(os.environ.get(n) for n in " + repr(
        ["HF_HOME", "WANDB_MODE", "http_proxy", "OMP_NUM_THREADS", "SEED"]
    )
    done = run(code + "))", cwd=tmp_path, ENV_FILE="f.env", OMP_NUM_THREADS="1")
    assert (done.stdout, done.stderr) == ("/h offline x 1 None\n", "")


def test_an_environment_that_is_passed_in_leaves_the_process_alone(tmp_path: Path) -> None:
    before = dict(os.environ)
    of_file(tmp_path, FOREIGN)
    assert dict(os.environ) == before


# The process environment

# Nothing near a variable of ours: these must pass without a word.
SYSTEM = names("""
PATH HOME USER LOGNAME SHELL PWD OLDPWD TERM LANG LC_ALL LC_CTYPE LS_COLORS SSH_AUTH_SOCK SSH_CONNECTION SSH_CLIENT
XDG_RUNTIME_DIR XDG_SESSION_TYPE XDG_CONFIG_HOME XDG_DATA_DIRS CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_EXE CONDA_SHLVL
GIT_AUTHOR_NAME GIT_COMMITTER_EMAIL GIT_EDITOR VIRTUAL_ENV VIRTUAL_ENV_PROMPT MAX_JOBS BUILD_ID BUILD_NUMBER BUILD_URL
CI_COMMIT_SHA CI_JOB_ID CI_PROJECT_DIR GITHUB_ACTIONS GITHUB_RUN_ID GITLAB_CI JAVA_HOME NODE_ENV NODE_OPTIONS
NPM_CONFIG_PREFIX DBUS_SESSION_BUS_ADDRESS DESKTOP_SESSION GTK_MODULES QT_ACCESSIBILITY WAYLAND_DISPLAY PROMPT_COMMAND
HISTSIZE HISTFILESIZE BASH_ENV LESSOPEN MANPATH LD_LIBRARY_PATH LD_PRELOAD PKG_CONFIG_PATH CMAKE_PREFIX_PATH CFLAGS
DOCKER_HOST KUBERNETES_SERVICE_HOST SLURM_JOB_ID SLURM_STEP_ID SLURM_NTASKS_PER_NODE SLURM_MEM_PER_CPU PBS_JOBID
AWS_REGION AWS_ACCESS_KEY_ID AZURE_CONFIG_DIR GOOGLE_APPLICATION_CREDENTIALS CUDA_HOME CUDA_VISIBLE_DEVICES
NVIDIA_VISIBLE_DEVICES NCCL_DEBUG OMP_NUM_THREADS MKL_NUM_THREADS HF_HOME HF_TOKEN WANDB_API_KEY
TOKENIZERS_PARALLELISM MASTER_ADDR MASTER_PORT WORLD_SIZE LOCAL_RANK TORCHELASTIC_RUN_ID PYTHONPATH PYTHONHASHSEED
PIP_INDEX_URL PIP_CACHE_DIR UV_CACHE_DIR JUPYTER_CONFIG_DIR NUMBER_OF_PROCESSORS PROCESSOR_ARCHITECTURE SYSTEMROOT
COMMONPROGRAMFILES USERPROFILE TERM_PROGRAM TERM_SESSION_ID LOG_LEVEL LOG_FILE DATA_DIR CACHE_DIR MODEL_DIR
PID_FILE BATCH_JOB TEMP TMP COMPUTERNAME PATHEXT OS HOSTNAME SHLVL EDITOR PAGER DISPLAY MAIL BROWSER PROFILE CHECKPOINT_DISABLE BASH_FUNC_module%% MEMORY_PRESSURE_WATCH
SESSION_MANAGER GPG_AGENT_INFO INVOCATION_ID JOURNAL_STREAM
""")  # fmt: skip


def test_variables_of_other_programs_are_not_mistakes() -> None:
    assert len(SYSTEM) > 100
    passed = read(**dict.fromkeys(SYSTEM, "x"))
    assert passed == read()
    assert passed.notes == ()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("CHECKPOINT_INTERVALS", "CHECKPOINT_INTERVAL"),
        ("TRAINNG_STEPS", "TRAINING_STEPS"),
        ("TRAINING_STEP", "TRAINING_STEPS"),
        ("ENABLE_CHECKPOINT", "ENABLE_CHECKPOINTS"),
        ("LEARNIGN_RATE", "LEARNING_RATE"),
        ("WARM_UP_STEPS", "WARMUP_STEPS"),
        ("BATCH_SIZES", "BATCH_SIZE"),
        ("learning_rate", "LEARNING_RATE"),
        ("GRAD_ACCUMULATION_STEPS", "GRADIENT_ACCUMULATION_STEPS"),
    ],
)
def test_near_misses_in_the_environment(name: str, meant: str) -> None:
    assert problems(**{name: "1"}) == [f"{name} is not a variable; did you mean {meant}?"]


# Checkpoints


def test_saved_settings_fill_what_is_not_set() -> None:
    old = read(
        MODEL_TYPE="gpt2",
        N_EMBD="64",
        BATCH_SIZE="3",
        SEED="5",
        EVAL_INTERVAL="9",
        PROMPT="x",
        TOP_K="4",
        NUM_SAMPLES="7",
    )
    saved = json.loads(json.dumps(config.to_dict(old)))
    new = config.from_saved(read(SEED="6", TOP_P="0.5"), saved)
    assert (new.model_type, new.n_embd, new.batch_size, new.eval_interval) == ("gpt2", 64, 3, 9)
    assert (new.seed, new.top_p, new.prompt, new.top_k, new.num_samples) == (6, 0.5, None, 4, 1)
    sources = [new.sources[name] for name in ("N_EMBD", "SEED", "TOP_K", "PROMPT", "NUM_SAMPLES")]
    assert sources == ["checkpoint", "environment", "checkpoint", "default", "default"]
    assert not new.is_set("N_EMBD")


def test_what_a_checkpoint_stores() -> None:
    assert set(config.to_dict(read())) == IDENTITY | MATH | HABIT | {"DEVICE"}


def test_a_repository_that_moves_takes_its_data_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = config.to_dict(read(tmp_path, TRAINING_DATA_SOURCE=f"{config.ROOT}/data/a.md,b.txt,https://c.org/d.txt"))
    assert saved["TRAINING_DATA_SOURCE"] == f"data/a.md,{tmp_path / 'b.txt'},https://c.org/d.txt"
    current = read()
    monkeypatch.setattr("milepost.config.resolve.SHIPPED", tmp_path)
    assert config.from_saved(current, saved).training_data_source.split(",")[0] == str(tmp_path / "data" / "a.md")


def test_missing_saved_values_follow_the_saved_model() -> None:
    new = config.from_saved(read(), {"MODEL_TYPE": "gpt2"})
    assert (new.learning_rate, new.optimizer, new.block_size) == (1e-2, "muon", 128)
    old = config.from_saved(read(), {"MODEL_TYPE": "gpt2", "OPTIMIZER": "adamw"})
    assert (old.learning_rate, old.optimizer, old.sources["OPTIMIZER"]) == (3e-3, "adamw", "checkpoint")


def test_unknown_and_session_names_in_a_checkpoint_are_ignored() -> None:
    assert config.from_saved(read(), {"FUTURE": [1], "DEVICE": "tpu", "PROMPT": 3, "batch_size": 5}) == read()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("BATCH_SIZE", -4, "BATCH_SIZE=-4 (checkpoint): expected a whole number at least 1"),
        ("BATCH_SIZE", True, "BATCH_SIZE=True (checkpoint): expected a whole number at least 1"),
        ("BATCH_SIZE", None, "BATCH_SIZE=None (checkpoint): expected a whole number at least 1"),
        ("BATCH_SIZE", [4], "BATCH_SIZE=[4] (checkpoint): expected a whole number at least 1"),
        ("BATCH_SIZE", 10**80, "BATCH_SIZE=(a number of 266 bits) (checkpoint): expected a whole number at least 1"),
        ("DROPOUT", float("nan"), "DROPOUT=nan (checkpoint): expected a number at least 0 and below 1"),
        ("BIAS", 2, "BIAS=2 (checkpoint): expected true or false"),
        ("MODEL_TYPE", "gpt3", "MODEL_TYPE='gpt3' (checkpoint): expected one of bigram, gpt2, llama; did you mean gpt2?"),
        ("TRAINING_DATA_SOURCE", 5, None),
        ("TRAINING_DATA_SOURCE", "", None),
    ],
)  # fmt: skip
def test_saved_values_are_held_to_the_same_limits(name: str, value: Any, sentence: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        config.from_saved(read(), {name: value, "SEED": 3})
    (problem,) = caught.value.problems
    assert problem == sentence or (sentence is None and problem.startswith(f"{name}="))


def test_saved_values_that_contradict_set_values() -> None:
    with pytest.raises(ConfigError, match=r"^N_EMBD=96 \(checkpoint\) must be a multiple of N_HEAD=5 \(environment\)"):
        config.from_saved(read(RESUME="auto", N_HEAD="5"), {"MODEL_TYPE": "gpt2", "N_EMBD": 96})
    with pytest.raises(ConfigError, match=r"^WARMUP_STEPS=100 \(checkpoint\) is more than TRAINING_STEPS=50"):
        config.from_saved(read(TRAINING_STEPS="50"), {"WARMUP_STEPS": 100})
    # What the checkpoint says by itself is not the user's mistake.
    assert config.from_saved(read(), {"WARMUP_STEPS": 100, "TRAINING_STEPS": 50}).warmup_steps == 100


def test_contradictions_with_a_checkpoint() -> None:
    saved = config.to_dict(read(MODEL_TYPE="gpt2", N_EMBD="64")) | {"TOKENIZER": "char"}
    given_now = {"N_EMBD": "32", "N_HEAD": "4", "TOKENIZER": "auto", "TRAINING_DATA_SOURCE": "b.md", "SEED": "3"}
    assert config.contradictions(read(**given_now), saved) == [("N_EMBD", 32, 64)]
    assert config.contradictions(read(TOKENIZER="byte"), saved) == [("TOKENIZER", "byte", "char")]
    assert config.contradictions(read(), saved) == []  # a default is no wish
    assert config.contradictions(read(N_LAYER="9"), {}) == []  # a checkpoint that does not say cannot contradict


def test_changes_against_a_checkpoint() -> None:
    saved = config.to_dict(read(SEED="5")) | {"DTYPE": "float32", "MIN_LEARNING_RATE": None}
    now = read(SEED="6", BATCH_SIZE="32", DTYPE="auto", MIN_LEARNING_RATE="1e-4", EVAL_INTERVAL="3", N_EMBD="32")
    assert config.changes(now, saved) == {"MIN_LEARNING_RATE": [None, 1e-4], "SEED": [5, 6]}


def test_a_secret_is_never_shown_or_stored() -> None:
    key = "sk-very-secret"
    c = config.read(ALONE | {"API_KEY": key, "SEED": "5"}, reads=["SEED"])
    assert c.api_key == key
    shown = [config.as_env(c, {}), *config.describe(c), *config.no_effect(c, "x.py"), json.dumps(config.to_dict(c))]
    assert key not in "".join(shown)
    assert key not in str(config.public(c, "API_KEY"))
    (problem,) = problems(API_KEY=f"{key} two")
    assert key not in problem
    assert "API_KEY" in "".join(config.describe(c))  # that it is set is no secret
    assert "SEED=5" in config.as_env(c, {})


def test_names_are_taken_without_the_blanks_around_them() -> None:
    c = read(PUSH_TO_HUB=" me/letters ", RUN_NAME=" first ")
    assert (c.push_to_hub, c.run_name) == ("me/letters", "first")


def test_a_long_value_is_cut_to_sixty_characters_in_its_refusal() -> None:
    (problem,) = problems(MODEL_TYPE="x" * 100)
    assert f"MODEL_TYPE={'x' * 100!r:.57}... " in problem


def test_a_checkpoint_may_be_named(tmp_path: Path) -> None:
    """name=path, only where nothing is called so as it stands."""
    (tmp_path / "a.pt").touch()
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "lr=0.1" / "b.pt").touch()
    here = lambda text: read(cwd=tmp_path, CHECKPOINT_PATH=text).checkpoint_path  # noqa: E731
    assert here("base=a.pt,new=Latest") == f"base={tmp_path / 'a.pt'},new=latest"
    assert here("lr=0.1/b.pt") == str(tmp_path / "lr=0.1" / "b.pt")
    assert here("lr=0.1/*.pt") == str(tmp_path / "lr=0.1" / "*.pt")
    assert here("x=lr=0.1/b.pt") == f"x={tmp_path / 'lr=0.1' / 'b.pt'}"
    assert here("x=missing.pt") == str(tmp_path / "x=missing.pt")


def test_without_is_as_if_not_set() -> None:
    both = read(MODEL_TYPE="gpt2", N_EMBD="96", N_HEAD="3", SEED="4")
    assert config.without(both, ["N_EMBD", "N_HEAD"]) == read(MODEL_TYPE="gpt2", SEED="4")
    # What is left may not fit together until the checkpoint has its say.
    left = config.without(both, ["N_EMBD"])
    assert (left.n_embd, left.n_head, left.is_set("N_EMBD"), left.is_set("N_HEAD")) == (128, 3, False, True)
    assert config.without(both, ["MODEL_TYPE"]).block_size == 64


# Showing: properties over every valid environment


def texts_of(name: str) -> st.SearchStrategy[str]:
    each = VARIABLES[name]
    rules = each.metadata
    prose = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
    tricky = st.sampled_from(
        ["${HOME}", "$${A:-x}", "a'b\"c", "\\n\\", "# no", "a #b", "é\r\n\u2028", "$P$G x", "`ls`"]
    )
    if rules["choices"]:
        return st.sampled_from(sorted(rules["choices"]))
    if rules["form"] in SECRET_FORMS:
        return st.sampled_from(["https://example.com/s3cr3t"] if rules["form"] == "webhook" else ["s3cr3t"])
    if rules["form"] == "hub_name":
        return st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,9}/[A-Za-z0-9][A-Za-z0-9_.-]{0,9}", fullmatch=True)
    if rules["form"] == "hub_model":
        return st.from_regex(
            r"[A-Za-z0-9][A-Za-z0-9_.-]{0,9}/[A-Za-z0-9][A-Za-z0-9_.-]{0,9}(@[a-z0-9][a-z0-9./-]{0,9})?", fullmatch=True
        )
    if rules["form"] == "name":
        return st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}", fullmatch=True)
    if rules["form"] == "address":
        return st.from_regex(r"[a-z][a-z0-9]{0,9}://[A-Za-z0-9/=._-]{1,40}", fullmatch=True)
    if rules["form"] == "layers":
        return st.lists(st.sampled_from(models.lora_layers()), min_size=1).map(", ".join)
    if rules["form"] == "blocks":
        return st.sets(st.integers(0, 9), min_size=1).map(lambda numbers: " ,".join(map(str, numbers)))
    if rules["form"] or kind_of(each) is str:
        free = st.one_of(prose, tricky).filter(lambda text: text.replace(",", " ").strip() and text.strip()[0] != "[")
        return st.one_of(free, st.sampled_from(rules["words"])) if rules["words"] else free
    by_type: dict[type, Callable[[], st.SearchStrategy[Any]]] = {
        bool: st.booleans,
        int: lambda: st.integers(int(rules["minimum"]), int(rules["maximum"] or 2**63 - 1)),
        float: lambda: st.floats(
            rules["minimum"] or rules["above"] or 0,
            rules["maximum"] or rules["below"],
            exclude_min=rules["above"] is not None,
            exclude_max=rules["below"] is not None,
            allow_infinity=False,
        ),
    }
    return by_type[kind_of(each)]().map(repr)


TEXTS = {name: texts_of(name) for name in VARIABLES if name != "ENV_FILE"}
# Some variables at a time: with half of all set, nearly every environment is one that does not fit together.
VALID = st.lists(st.sampled_from(sorted(TEXTS)), unique=True, max_size=20).flatmap(
    lambda names: st.fixed_dictionaries({name: TEXTS[name] for name in names})
)


TOGETHER = (
    "thins what",
    "needs",
    "must be a multiple",
    "must divide",
    "is more than",
    "is above",
    "are both set",
    "both name",
    "is for RESUME",
    "freezes the base",
    "has no effect",
    "saves adapters",
    "cannot hold adapters",
    "has no TTT layers",
    "names a missing block",
    ", but MODEL_TYPE",
)


def outcome(action: Callable[..., Config], *arguments: Any) -> tuple[Config | None, list[str]]:
    try:
        return action(*arguments), []
    except ConfigError as error:
        return None, error.problems


def valid(variables: Mapping[str, str]) -> Config:
    c, found = outcome(lambda: config.from_saved(config.read(ALONE | dict(variables)), {}))
    # "0" as RESUME is no path; all else that valid texts can be blamed for is not fitting together.
    assert all(any(word in line for word in (*TOGETHER, "expected never, auto")) for line in found)
    assume(c is not None)
    assert c is not None
    return c


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(variables=VALID)
def test_as_env_reads_back(tmp_path_factory: pytest.TempPathFactory, variables: dict[str, str]) -> None:
    before = valid(variables)
    path = tmp_path_factory.getbasetemp() / "round.env"
    path.write_text(config.as_env(before, {}), encoding="utf-8")
    after = config.read({"ENV_FILE": str(path)})
    secrets = {name for name, each in VARIABLES.items() if each.metadata["form"] in SECRET_FORMS}
    for name in VARIABLES.keys() - {"ENV_FILE"} - secrets:
        assert getattr(after, name.lower()) == getattr(before, name.lower()), name
    assert [name for name in secrets if after.is_set(name)] == []
    assert "s3cr3t" not in path.read_text(encoding="utf-8")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(variables=VALID)
def test_to_dict_reads_back(variables: dict[str, str]) -> None:
    before = valid(variables)
    after = config.from_saved(read(), json.loads(json.dumps(config.to_dict(before), allow_nan=False)))
    assert config.to_dict(after) == config.to_dict(before) | {"DEVICE": "auto"}
    assert all(after.sources[name] == "checkpoint" for name in IDENTITY | MATH | HABIT)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(variables=st.dictionaries(st.sampled_from(sorted(set(VARIABLES) - {"ENV_FILE"})), st.text(max_size=8)))
def test_any_text_is_taken_or_refused(variables: dict[str, str]) -> None:
    c, found = outcome(config.read, ALONE | variables)
    assert all(line.isprintable() for line in found)
    assert c is None or {n for n in VARIABLES if c.is_set(n)} == {
        n for n, text in variables.items() if (text if n in config.ALLOW_BLANK else text.strip())
    }
    assert (c is None) == bool(found)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(text=st.one_of(st.text(), st.text("SED=#'\"\\ \n$\0{}:-1")))
def test_any_env_file_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.env"
    path.write_text(text, encoding="utf-8", newline="")
    c, found = outcome(config.read, {"ENV_FILE": str(path)})
    assert found if c is None else c.env_file == str(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(
    saved=st.dictionaries(
        st.sampled_from(sorted(VARIABLES)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
            max_leaves=3,
        ),
    )
)
def test_any_checkpoint_is_taken_or_refused(saved: dict[str, Any]) -> None:
    c, found = outcome(config.from_saved, read(), saved)
    assert all("(checkpoint)" in line for line in found)
    assert found if c is None else {n for n in VARIABLES if c.sources[n] == "checkpoint"} == saved.keys() - SESSION


def test_as_env_marks_what_is_not_set() -> None:
    lines = config.as_env(read(PROMPT="a b", LEARNING_RATE="5e-5"), {}).splitlines()
    assert 'PROMPT="a b"' in lines
    assert "LEARNING_RATE=5e-5" in lines
    assert "# SAMPLE_SEED=" in lines
    assert "BIAS=true" in lines


def test_describe() -> None:
    assert config.describe(read()) == ["non-default settings: none"]
    lines = config.describe(read(BATCH_SIZE="4", TRAINING_STEPS="2000", PROMPT="a\x1bb c"))  # 2000 is the default
    assert lines == [r"non-default settings: BATCH_SIZE=4 (environment), PROMPT='a\x1bb c' (environment)"]
    saved = config.to_dict(read(MODEL_TYPE="gpt2", SEED="5"))
    assert config.describe(config.from_saved(read(), saved)) == [
        "non-default settings: MODEL_TYPE=gpt2 (checkpoint), SEED=5 (checkpoint)"
    ]
    # Defaults depend on other variables: what is set is listed if it changes anything.
    adamw = config.describe(read(MODEL_TYPE="gpt2", OPTIMIZER="adamw"))
    assert adamw == ["non-default settings: MODEL_TYPE=gpt2 (environment), OPTIMIZER=adamw (environment)"]
    wide = config.describe(read(MODEL_TYPE="gpt2", OPTIMIZER="adamw", N_EMBD="384"))  # adamw is the default there
    assert wide == ["non-default settings: MODEL_TYPE=gpt2 (environment), N_EMBD=384 (environment)"]
    many = config.describe(read(MODEL_TYPE="gpt2", **dict.fromkeys(("N_EMBD", "N_HEAD", "N_LAYER", "SEED"), "3")))
    assert len(many) == 2
    assert all(len(line) <= 118 for line in many)


# The command line


def run(
    code: str, *, cwd: Path, arguments: list[str] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(config.ROOT), **variables}
    return subprocess.run(
        [sys.executable, "-c", code, *(arguments or [])], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )  # fmt: skip


START = "from milepost import config; config.from_command_line('__main__', 'Do this.', ['SEED'])"


def test_a_mistake_ends_with_2_and_no_traceback_before_torch(tmp_path: Path) -> None:
    code = f"import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); {START}"
    done = run(code, cwd=tmp_path, MODEL_TYPE="gtp2", DEBUG="true", **ALONE)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == "MODEL_TYPE='gtp2' (environment): expected one of bigram, gpt2, llama; did you mean gpt2?\n"
    assert "Traceback" in run(code, cwd=tmp_path, MODEL_TYPE="gtp2", DEBUG="1", **ALONE).stderr


def test_help_survives_a_closed_pipe(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(config.ROOT)}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", START, "--help"], stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, env=environment, check=False
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_prints_the_summary_and_the_variables_that_the_script_reads(
    argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/some_script.py", argument])
    with pytest.raises(SystemExit) as ended:
        config.from_command_line("__main__", "Do this\nand that.\n\nMORE=1", ["LEARNING_RATE", "Resuming", "OPTIMIZER"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert out.isascii()
    assert "python3 scripts/some_script.py" in out
    assert "\nDo this and that.\n" in out
    assert "MORE" not in out
    assert "LEARNING_RATE  (default: bigram 0.01, gpt2 0.01, llama 0.01, pretrained 5e-5)" in out
    assert "OPTIMIZER  (default: bigram adamw, gpt2 muon, llama muon, pretrained adamw)" in out
    shown = [line.split()[0] for line in out.splitlines() if "  (default: " in line]
    resuming = [name for name, each in VARIABLES.items() if each.metadata["group"] == "Resuming"]
    assert shown == ["LEARNING_RATE", *resuming, "OPTIMIZER"]  # common settings, groups, other settings


def test_a_script_that_is_imported_gets_the_declared_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    monkeypatch.setenv("SEED", "nonsense")
    assert config.from_command_line("load_checkpoint", "", []) == Config()


@pytest.mark.parametrize(
    ("arguments", "use"),
    [
        (["--learning_rate", "1e-4"], "use LEARNING_RATE=1e-4 python3 training.py"),
        (["--learning-rate=1e-4", "--seed", "3"], "use LEARNING_RATE=1e-4 SEED=3 python3 training.py"),
        (["--lr", "1e-4"], "use LEARNING_RATE=1e-4 python3 training.py"),
        (["MODEL_TYPE=gpt2"], "use MODEL_TYPE=gpt2 python3 training.py"),
        (["--prompt", "Dear Wren,"], "use PROMPT='Dear Wren,' python3 training.py"),
        (["--stream", "--seed=1"], "use STREAM=true SEED=1 python3 training.py"),
        (["a b.pt"], "use CHECKPOINT_PATH='a b.pt' python3 training.py"),
        (["--resume_from_checkpoint=x"], "use RESUME=x python3 training.py"),
        (["--checkpoint.resume", "true"], "use RESUME=auto python3 training.py"),
        (["--resume"], "use RESUME=auto python3 training.py"),
        (["--resume=false"], "use RESUME=never python3 training.py"),
        (["--checkpoint.resume_step", "5000"], "use RESUME_STEP=5000 RESUME=auto python3 training.py"),
        (["--legacy_checkpoint", "x.pt"], "use CHECKPOINT_PATH=x.pt python3 training.py"),
        (["--optimizer.lr=3"], "use LEARNING_RATE=3 python3 training.py"),
        (["--n_layers", "3"], "use N_LAYER=3 python3 training.py"),
        (["--learningrate=3"], "use LEARNING_RATE=3 python3 training.py"),
        (["--model_name", "dante"], "use CHECKPOINT_DIR=checkpoints/dante python3 training.py"),
        (["--model_name", "gpt2-medium"], "use GPT2_MODEL_NAME=gpt2-medium python3 training.py"),
        (["a.pt", "b.pt"], "use CHECKPOINT_PATH=a.pt,b.pt python3 training.py"),
        (["--config", "run.env"], "use ENV_FILE=run.env python3 training.py"),
        (["--config", "absent.yaml"], "(unknown: absent.yaml): python3 training.py --help lists them"),
        *(
            ([f"--{word}", "x"], f"(unknown: --{word}): python3 training.py --help lists them")
            for word in ("dim", "data.shuffle", "model-size", "checkpoint.strategy", "step", "evaluate")
        ),
        (["--epochs", "3"], "(unknown: --epochs (compare TRAINING_STEPS)): python3 training.py --help lists them"),
        (["--lora"], "use LORA_RANK=8 python3 training.py"),
        (["--lora", "4", "--gpu"], "use LORA_RANK=4 DEVICE=gpu python3 training.py"),
        (["--bf16", "--seed=3"], "use DTYPE=bfloat16 SEED=3 python3 training.py"),
        (["--xyzzy"], "(unknown: --xyzzy): python3 training.py --help lists them"),
        (["now"], "(unknown: now): python3 training.py --help lists them"),
    ],
)
def test_arguments_are_refused_with_the_variables_to_set(
    arguments: list[str], use: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["training.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        config.from_command_line("__main__", "", [])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("training.py takes no arguments, settings are environment variables")
    assert error.endswith(use + "\n")


def test_an_argument_of_training_that_names_a_checkpoint_is_the_one_to_resume() -> None:
    reads = {"RESUME", "LEARNING_RATE"}
    assert refuse_arguments("training.py", ["--model-path", "x"], reads).endswith("use RESUME=x python3 training.py")
    assert refuse_arguments("x.py", ["--ckpt", "x"], {"CHECKPOINT_PATH"}).endswith("use CHECKPOINT_PATH=x python3 x.py")


YAML = """model:
  n_layers: 6   # of them
  dim: 64
optimizer:
  lr: 3e-4
  betas: [0.9, 0.95]
data_path: "my letters.txt"
resume: true
checkpoint:
  save_dir: out
  keep: null
"""
JSON = '{\n "n_layers": 6,\n "dim": 64,\n "lr": 3e-4,\n "data_path": "my letters.txt",\n "resume": true,\n "save_dir": "out"\n}'
TOML = 'n_layers = 6\ndim = 64\n[optimizer]\nlr = 3e-4\n[data]\ndata_path = "my letters.txt"\nresume = true\nsave_dir = "out"\n'
REPLACED = "N_LAYER=6 LEARNING_RATE=3e-4 TRAINING_DATA_SOURCE='my letters.txt' RESUME=auto CHECKPOINT_DIR=out"


@pytest.mark.parametrize(("name", "text"), [("c.yaml", YAML), ("c.yml", YAML), ("c.json", JSON), ("c.toml", TOML)])
def test_the_keys_of_a_configuration_file_are_listed_as_variables(name: str, text: str, tmp_path: Path) -> None:
    """On the command line and as ENV_FILE; a key that names no variable for sure is listed as unknown."""
    path = tmp_path / name
    path.write_text(text)
    said = refuse_arguments("training.py", ["--config", str(path)])
    assert said.endswith(f"(unknown: dim): use {REPLACED} python3 training.py")
    (problem,) = file_problems_of(path)
    assert REPLACED in problem
    assert str(path) in problem
    assert "dim" in problem


def file_problems_of(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.read({"ENV_FILE": str(path)}, cwd=path.parent)
    return caught.value.problems


def test_what_replaces_a_configuration_file_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(YAML)
    pairs = dict(word.split("=", 1) for word in shlex.split(REPLACED))
    assert config.read(ALONE | pairs, cwd=tmp_path).n_layer == 6


def test_words_of_other_programs_for_values_are_taken(tmp_path: Path) -> None:
    assert read(EVAL_TYPE="paper_metrics").eval_type == "benchmark"
    assert of_file(tmp_path, "RESUME_STEP=-1\n", RESUME="auto").resume_step is None
    assert read(RESUME_STEP="-1").resume_step is None
    assert problems(RESUME_STEP="-2")  # the control


def test_helpers_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, debug in (("1", True), ("true", False), ("", False), ("01", False)):
        monkeypatch.setenv("DEBUG", value)
        assert config.debug() is debug
    for value, disabled in (("1", True), ("0", False), ("", False), ("false", False), ("x", True)):
        monkeypatch.setenv("TQDM_DISABLE", value)
        assert config.tqdm_disabled() is disabled


# The generated files


def test_generated_files_are_up_to_date() -> None:
    for name, text in ((".env.example", config.env_example()), ("docs/configuration.md", config.reference())):
        assert (config.ROOT / name).read_text(encoding="utf-8") == text, (
            f"run: python3 -m milepost.config ({name} is out of date)"
        )


def test_the_example_gives_the_defaults_as_it_is_and_with_every_line_set(tmp_path: Path) -> None:
    assert of_file(tmp_path, config.env_example()) == of_file(tmp_path, "")
    live = "\n".join(line.removeprefix("#") for line in config.env_example().splitlines() if not line.startswith("# "))
    c = config.read({"ENV_FILE": os.devnull}, cwd=config.ROOT)
    (tmp_path / "live.env").write_text(live)
    full = config.read({"ENV_FILE": str(tmp_path / "live.env")}, cwd=config.ROOT)
    assert {n: getattr(full, n.lower()) for n in VARIABLES if n != "ENV_FILE"} == {
        n: getattr(c, n.lower()) for n in VARIABLES if n != "ENV_FILE"
    }


def test_the_reference_has_a_row_for_each_variable() -> None:
    rows = [line.split(" | ") for line in config.reference().splitlines() if line.startswith("| `")]
    assert [row[0].strip("| `") for row in rows] == list(VARIABLES)
    assert all(len(row) == 5 for row in rows)


def test_cublas_is_configured_before_it_starts() -> None:
    """In the process's real environment, where C code reads it, whether the settings come from there or from Python; a user's
    own choice stays.
    """
    own = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    for read, env, expected in (("", {}, ":4096:8"), ("{}", {}, ":4096:8"), ("", own, ":16:8"), ("{}", own, ":16:8")):
        code = (
            f"from milepost import config; import os; config.read({read}); print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, env={"PATH": os.environ["PATH"], **ALONE, **env}, capture_output=True, text=True, check=True)  # fmt: skip
        assert done.stdout.strip() == expected


# Several processes


def test_paths_that_may_differ_between_machines_are_not_compared(tmp_path: Path) -> None:
    """Two checkouts in different places, each with a relative ENV_FILE; a difference that matters is still found."""
    files = {"ENV_FILE": "run.env", "CHECKPOINT_DIR": "c", "EVAL_DATA": "t.txt", "OUTPUT": "o.png", "PROMPT_FILE": "p"}
    shared = []
    for place, seed in (("here", "1"), ("there", "1"), ("there", "2")):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "run.env").write_text(f"SEED={seed}\n")
        shared.append(config.shared_settings(config.read(files, cwd=tmp_path / place)))
    assert shared[0] == shared[1]
    assert {name for name in shared[0] if shared[0][name] != shared[2][name]} == {"SEED"}


def launched(**variables: str) -> dict[str, int]:
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"} | variables  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        return config.torchrun()


def test_torchrun_is_read_and_a_single_process_needs_none() -> None:
    assert launched() == {"rank": 3, "size": 4, "local_rank": 1, "local_size": 2}
    assert launched(WORLD_SIZE="1", RANK="0") == {}
    assert launched(WORLD_SIZE="") == {}


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_torchrun_environment_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^WORLD_SIZE=4 without a valid {name}: start with torchrun, or unset"):
        launched(**{name: ""})


@pytest.mark.parametrize("value", ["two", "-1", "1.5"])
def test_ranks_are_whole_numbers(value: str) -> None:
    with pytest.raises(ConfigError, match="without a valid RANK"):
        launched(RANK=value)
    with pytest.raises(ConfigError, match="without a valid WORLD_SIZE"):
        launched(WORLD_SIZE=value)
