"""MODE=inference of scripts/load_checkpoint.py: its output, its streams, and reproducibility."""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import os
import re
import subprocess
import sys
import termios
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import programs
import pytest
import torch
from drive import ROOT, TINY, at_step, command, environment, newest
from drive import train as trained_in
from work import HANGING

import training
from milepost import ckpt, config
from milepost.ckpt import Checkpoint
from milepost.ckpt.restore import build_model, build_tokenizer
from milepost.generation import texts
from milepost.generation.decoder import Decoder
from milepost.generation.sampling import generate
from milepost.generation.texts import first_id
from milepost.run import text as run_text
from milepost.runtime.hardware import available_devices
from milepost.runtime.progress import Log
from milepost.splitmix import mix
from models.gpt2 import GPT2, GPT2Settings
from models.linears import multiplies_rows_together

SCRIPT = ROOT / "scripts" / "load_checkpoint.py"
SPEC = importlib.util.spec_from_file_location("load_checkpoint", SCRIPT)
load_checkpoint = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(load_checkpoint)

NOTHING_OF_TRAINING = dict.fromkeys([*TINY, "TRAINING_DATA_SOURCE"]) | {"DEVICE": "cpu"}


class Said(NamedTuple):
    """The result of a command: exit code, stdout and stderr."""

    code: int
    out: str
    err: str


def infer(folder: Path, *, stdout: io.TextIOWrapper | None = None, **changes: str | None) -> Said:
    """Generates in this process from a checkpoint of `folder`; nothing is set but its folders and `changes`."""
    out = stdout or io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    err = io.StringIO()
    settings = config.read(environment(folder, **NOTHING_OF_TRAINING | changes))
    with redirect_stdout(out):
        code = training.guarded(load_checkpoint.main, settings, log=Log(err))
    out.flush()
    return Said(code, out.buffer.getvalue().decode("utf-8") if stdout is None else "", err.getvalue())


def text(folder: Path, **changes: str | None) -> str:
    """The text on stdout of a command that went well, without its last newline."""
    said = infer(folder, **changes)
    assert said.code == 0, said.err
    assert said.out.endswith("\n")
    return said.out[:-1]


def train_once(tmp_path_factory, name: str, **changes: str) -> Path:
    folder = tmp_path_factory.mktemp(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_text, "CACHE_FOLDER", folder / "cache")
        assert trained_in(folder, **changes)[0] == 0
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A run of a GPT-2 with characters and a context of 16, saved at steps 4 and 8."""
    return train_once(tmp_path_factory, "gpt2", SAMPLE_INTERVAL="0")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A run of a GPT-2 whose tokenizer has <|endoftext|>."""
    return train_once(tmp_path_factory, "bpe", TOKENIZER="bpe", BPE_VOCAB_SIZE="300", SAMPLE_INTERVAL="0")


def chain(folder: Path, successors: dict[int, int], tokenizer: dict, *, vocab_size: int, **changes) -> Path:
    """Saves a bigram that continues each token with its successor, whatever TEMPERATURE is; returns `folder`."""
    table = torch.full((vocab_size, vocab_size), -1000.0)
    for one, following in successors.items():
        table[one, following] = 1000.0
    settings = {"vocab_size": vocab_size, "block_size": 8}
    values = {"model_type": "bigram", "model_settings": settings, "tokenizer": tokenizer, "step": 1, "run_id": "chain"}
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    record = Checkpoint(model_state={"token_embedding_table.weight": table}, **values | changes)
    ckpt.save(record, folder / "checkpoints")
    return folder


def circle(folder: Path, characters: str, **changes) -> Path:
    """Saves a bigram that repeats distinct characters in a cycle."""
    following = {i: (i + 1) % len(characters) for i in range(len(characters))}
    tokenizer = {"kind": "char", "chars": list(characters)}
    return chain(folder, following, tokenizer, vocab_size=len(characters), **changes)


def byte_circle(folder: Path, characters: str) -> Path:
    """Saves a byte bigram that repeats the characters, whose bytes are distinct, in a cycle."""
    data = characters.encode()
    assert len(set(data)) == len(data)
    following = dict(zip(data, data[1:] + data[:1], strict=True))
    return chain(folder, following, {"kind": "byte"}, vocab_size=256)


# The prompt


def test_only_prompt_and_continuation_go_to_stdout(gpt2):
    said = infer(gpt2, PROMPT="Dear", MAX_NEW_TOKENS="10")
    assert said.code == 0
    assert re.fullmatch(r"Dear.{10}\n", said.out, re.DOTALL)
    assert f"{newest(gpt2).path}: gpt2 at step 8, char tokenizer, on cpu in float32; SAMPLE_SEED=" in said.err


def test_weights_to_start_from_are_named_where_the_checkpoint_has_its_own(gpt2):
    said = infer(gpt2, INIT_FROM="latest", PROMPT="a")
    path = newest(gpt2).path
    assert (said.code, f"INIT_FROM is not used: {path} holds all its weights\n" in said.err) == (0, True), said.err
    assert "INIT_FROM" not in infer(gpt2, PROMPT="a").err


def test_the_prompt_comes_from_the_variable_a_file_or_stdin(gpt2, tmp_path, monkeypatch):
    settings = {"MAX_NEW_TOKENS": "20", "SAMPLE_SEED": "1"}
    prompt = "Dear Wren,\n\nI "
    expected = text(gpt2, PROMPT=prompt, **settings)
    assert expected.startswith(prompt)
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    assert text(gpt2, PROMPT_FILE=str(tmp_path / "prompt.txt"), **settings) == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert text(gpt2, PROMPT_FILE="-", **settings) == expected


@pytest.mark.parametrize(
    ("name", "reason"), [("latin1.txt", "UTF-8: byte 3"), ("none.txt", "No such file"), (".", "directory")]
)
def test_a_prompt_file_that_cannot_be_read_is_refused(name, reason, gpt2, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    said = infer(gpt2, PROMPT_FILE=str(tmp_path / name))
    assert (said.code, said.out) == (2, "")
    assert f"PROMPT_FILE={tmp_path / name}".rstrip("/.") in said.err
    assert reason in said.err


@pytest.mark.parametrize("form", ["PROMPT", "PROMPT_FILE"])
def test_unknown_characters_of_a_prompt_are_named(form, gpt2, tmp_path):
    prompt = "Dear Jos\u00e9 \u65e5"
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    said = infer(gpt2, **{form: prompt if form == "PROMPT" else str(tmp_path / "prompt.txt")})
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines()[-1].startswith(f"error: {form}")
    assert "'\u00e9' (U+00E9), '\u65e5' (U+65E5): not in the vocabulary of" in said.err


def test_an_empty_prompt_starts_from_a_character_drawn_by_the_seed(gpt2):
    texts = [text(gpt2, SAMPLE_SEED=str(seed), MAX_NEW_TOKENS="5", PROMPT="") for seed in range(8)]
    assert all(len(each) == 1 + 5 for each in texts)
    assert len({each[0] for each in texts}) > 3
    assert text(gpt2, SAMPLE_SEED="3", MAX_NEW_TOKENS="5") == texts[3]


def greedy(folder: Path, ids: list[int], count: int) -> str:
    """The text of the most likely tokens after `ids`: a reference without cache, sampling or streaming."""
    record = newest(folder)
    model, tokenizer = build_model(record, device=torch.device("cpu")).eval(), build_tokenizer(record)
    with torch.no_grad():
        for _ in range(count):
            logits, _, _ = model(torch.tensor([ids]))
            ids = [*ids, int(logits[0, -1].argmax())]
    return tokenizer.decode(ids)


def test_an_empty_prompt_starts_from_end_of_text_where_there_is_one(bpe):
    end_of_text = build_tokenizer(newest(bpe)).end_of_text
    expected = greedy(bpe, [end_of_text], 10).removeprefix("<|endoftext|>")
    assert expected
    assert text(bpe, TEMPERATURE="0", MAX_NEW_TOKENS="10", SAMPLE_SEED="1") == expected
    assert text(bpe, TEMPERATURE="0", MAX_NEW_TOKENS="10", SAMPLE_SEED="2") == expected


def test_generating_ends_at_end_of_text_and_does_not_show_it(tmp_path):
    """A tokenizer of bytes and <|endoftext|>; the chain generates "hi" and then the end."""
    letters = tuple("hi")
    pieces = {letter: i for i, letter in enumerate(byte_letters())} | {"<|endoftext|>": 256}
    mark = {
        "id": 256,
        "content": "<|endoftext|>",
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    before = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": pieces,
        "merges": [],
    }
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [mark],
        "normalizer": None,
        "pre_tokenizer": before,
        "post_processor": None,
        "decoder": before,
        "model": model,
    }
    following = {256: pieces[letters[0]], pieces[letters[0]]: pieces[letters[1]], pieces[letters[1]]: 256}
    folder = chain(tmp_path, following, {"kind": "bpe", "tokenizer": spec}, vocab_size=257)
    assert text(folder, MAX_NEW_TOKENS="50") == "hi"
    assert text(folder, MAX_NEW_TOKENS="50", PROMPT="h") == "hi"


def byte_letters() -> list[str]:
    """GPT-2's letters for the 256 bytes, as the tokenizers library gives them (in another order,
    which does not matter).
    """
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


# Reproducibility


def test_temperature_zero_takes_the_likeliest_token_whatever_the_seed(gpt2):
    ids = build_tokenizer(newest(gpt2)).encode("Dear")
    expected = greedy(gpt2, ids, 12)  # 4 + 12 tokens are the whole context
    for seed in ("1", "2"):
        assert text(gpt2, PROMPT="Dear", TEMPERATURE="0", MAX_NEW_TOKENS="12", SAMPLE_SEED=seed) == expected


@pytest.mark.parametrize("knob", [{"TOP_K": "1"}, {"TOP_P": "1e-9"}], ids=str)
def test_drawing_among_one_token_is_greedy(knob, gpt2):
    settings = {"PROMPT": "Dear", "MAX_NEW_TOKENS": "30"}
    assert text(gpt2, **settings, **knob) == text(gpt2, **settings, TEMPERATURE="0")


def test_the_repetition_penalty_counts_the_prompt_too(gpt2):
    """So strong that a character comes again only when every likely one has been seen."""
    said = text(gpt2, PROMPT="Wren", TEMPERATURE="0", MAX_NEW_TOKENS="12", REPETITION_PENALTY="1e9")
    assert len(set(said)) == len(said) == 16
    assert said != text(gpt2, PROMPT="Wren", TEMPERATURE="0", MAX_NEW_TOKENS="12")


def test_a_seed_repeats_and_another_differs(gpt2):
    settings = {"PROMPT": "Dear", "MAX_NEW_TOKENS": "40"}
    first = text(gpt2, **settings, SAMPLE_SEED="1")
    assert text(gpt2, **settings, SAMPLE_SEED="1") == first
    assert text(gpt2, **settings, SAMPLE_SEED="2") != first


def test_an_unset_seed_is_random_and_logged(gpt2):
    settings = {"PROMPT": "Dear", "MAX_NEW_TOKENS": "40"}
    first, second = infer(gpt2, **settings), infer(gpt2, **settings)
    assert first.out != second.out
    (seed,) = re.findall(r"SAMPLE_SEED=(\d+)", first.err)
    assert infer(gpt2, **settings, SAMPLE_SEED=seed).out == first.out


def test_several_samples_differ_and_the_first_equals_a_single_sample(gpt2):
    settings = {"PROMPT": "Dear", "MAX_NEW_TOKENS": "40", "SAMPLE_SEED": "5"}
    three = infer(gpt2, **settings, NUM_SAMPLES="3")
    length = len("Dear") + 40 + 1
    samples = [three.out[at : at + length] for at in range(0, len(three.out), length)]
    assert [len(each) for each in samples] == [length] * 3
    assert all(each.startswith("Dear") and each.endswith("\n") for each in samples)
    assert len(set(samples)) == 3
    assert samples[0] == infer(gpt2, **settings).out
    assert [f"sample {number} of 3" in three.err for number in (1, 2, 3)] == [True] * 3


# Stopping and streaming


def test_a_stop_string_ends_the_text_and_is_not_shown(tmp_path):
    folder = circle(tmp_path, "abcdefgh\n")
    settings = {"PROMPT": "a", "MAX_NEW_TOKENS": "30"}
    assert text(folder, **settings) == "abcdefgh\n" * 3 + "abcd"
    for stream in ("true", "false"):
        assert text(folder, **settings, STREAM=stream, STOP="ef") == "abcd"
        assert text(folder, **settings, STREAM=stream, STOP='["xyz", "gh", "ef"]') == "abcd"
        assert text(folder, **settings, STREAM=stream, STOP=r"h\na") == "abcdefg"
        assert text(folder, **settings, STREAM=stream, STOP="cdx") == "abcdefgh\n" * 3 + "abcd"  # held back, then shown


def test_a_stop_string_in_the_prompt_stops_nothing(tmp_path):
    folder = circle(tmp_path, "abcdefgh")
    assert text(folder, PROMPT="abc", STOP="b", MAX_NEW_TOKENS="20") == "abcdefgha"


class Recorder(io.TextIOWrapper):
    """A stdout that remembers each piece it was given."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", newline="")
        self.pieces: list[str] = []

    def write(self, piece: str) -> int:
        self.pieces.append(piece)
        return super().write(piece)


def pieces_of(folder: Path, **changes: str) -> list[str]:
    """The pieces that stdout was given, but for empty ones."""
    stdout = Recorder()
    assert infer(folder, stdout=stdout, **changes).code == 0
    return [piece for piece in stdout.pieces if piece]


def test_streaming_shows_each_token_and_otherwise_the_same_text_at_once(gpt2):
    settings = {"PROMPT": "Dear", "MAX_NEW_TOKENS": "40", "SAMPLE_SEED": "1"}
    streamed, whole = (pieces_of(gpt2, **settings, STREAM=stream) for stream in ("true", "false"))
    assert len(streamed) == 1 + 40 + 1
    assert len(whole) == 2
    assert "".join(streamed) == "".join(whole)


WORDS = "\u00e9\u20ac\U0001d11e"  # of two, three and four bytes


@pytest.mark.parametrize("prompt", ["", "\u00e9"])
def test_incomplete_characters_are_held_back(prompt, tmp_path):
    folder = byte_circle(tmp_path, WORDS)
    first_bytes = (first_id(build_tokenizer(newest(folder)), generator(seed)) for seed in itertools.count())
    seed = next(seed for seed, byte in enumerate(first_bytes) if byte == WORDS.encode()[0])
    count = str(9 * 3 - (1 if not prompt else 2))
    pieces = pieces_of(folder, PROMPT=prompt, MAX_NEW_TOKENS=count, SAMPLE_SEED=str(seed))
    assert pieces == [*WORDS * 3, "\n"]


def generator(seed: int) -> torch.Generator:
    """The generator of a seed's first sample."""
    return torch.Generator().manual_seed(mix(seed, 0))


def test_an_incomplete_character_at_the_end_is_replaced(tmp_path):
    folder = byte_circle(tmp_path, WORDS)
    assert text(folder, PROMPT="\u00e9", MAX_NEW_TOKENS="5") == "\u00e9\u20ac\ufffd"


def test_a_full_context_window_is_logged_once(gpt2):
    said = infer(gpt2, PROMPT="Dear", MAX_NEW_TOKENS="60", NUM_SAMPLES="2")
    assert said.code == 0
    assert len(re.findall(r"context window of 16 tokens", said.err)) == 1
    assert "context window" not in infer(gpt2, PROMPT="Dear", MAX_NEW_TOKENS="12").err


# Where the text goes

STEERING = "a\x1b[2J\x07\r\x9b\u202e\t\n"


def test_control_characters_reach_a_pipe_as_they_are(tmp_path):
    folder = circle(tmp_path, STEERING)
    assert text(folder, PROMPT="a\x1b", MAX_NEW_TOKENS="10") == STEERING + "a"


def everything_from(terminal: int) -> str:
    """Return what a terminal received before its other end was closed; it may arrive in chunks."""
    received = bytearray()
    with contextlib.suppress(OSError):  # Linux's end of a terminal that nobody holds open any more
        while piece := os.read(terminal, 1000):
            received += piece
    return received.decode("utf-8")


@pytest.mark.parametrize("stream", ["true", "false"])
def test_control_characters_are_replaced_on_a_terminal(stream, tmp_path):
    folder = circle(tmp_path, STEERING)
    ours, theirs = os.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # no \r of the terminal's own before \n
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    with open(theirs, "w", encoding="utf-8") as terminal:
        assert infer(folder, stdout=terminal, PROMPT="a\x1b", MAX_NEW_TOKENS="9", STREAM=stream).code == 0
    shown = everything_from(ours)
    os.close(ours)
    assert shown == r"a\x1b[2J\x07\r\x9b\u202e" + "\t\n\n"


def test_a_closed_pipe_ends_it_quietly(tmp_path):
    """As `| head -c 10` closes it. Without an end of its own, only the closed pipe stops this process."""
    folder = circle(tmp_path, "abcdefgh")
    env = programs.LEAST | environment(folder, **NOTHING_OF_TRAINING | {"PROMPT": "a", "MAX_NEW_TOKENS": str(10**12)})
    with programs.start([sys.executable, SCRIPT], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(10) == b"abcdefghab"
        child.stdout.close()
        said = child.stderr.read().decode()
        assert child.wait(timeout=HANGING) == 0
    assert re.fullmatch(r"taking .*\n.*: bigram at step 1, char tokenizer, on cpu in float32; SAMPLE_SEED=\d+\n", said)


def test_a_script_as_it_is_typed(tmp_path, gpt2):
    """A glob that no shell expanded, relative to the current folder; the prompt through a pipe;
    stdout holds only the text.
    """
    unset = NOTHING_OF_TRAINING | {"CHECKPOINT_PATH": "checkpoints/checkpoint_gpt2_*_step0004_*.pt"}
    settings = {"PROMPT_FILE": "-", "MAX_NEW_TOKENS": "12", "SAMPLE_SEED": "1", "CHECKPOINT_DIR": None}
    done = command(str(SCRIPT), gpt2, cwd=gpt2, stdin="Dear", **unset | settings)
    assert done.returncode == 0, done.stderr
    assert str(at_step(gpt2, 4)) in done.stderr
    assert (
        done.stdout
        == infer(gpt2, CHECKPOINT_PATH=str(at_step(gpt2, 4)), PROMPT="Dear", **settings | {"PROMPT_FILE": None}).out
    )


def test_generating_leaves_no_trace(gpt2):
    def everything() -> dict[Path, object]:
        return {path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns) for path in gpt2.rglob("*")}

    before = everything()
    text(gpt2, PROMPT="Dear", MAX_NEW_TOKENS="40")
    assert everything() == before


# Settings that contradict the checkpoint

CONTRADICTIONS = [
    ("N_LAYER", "3", "2"),
    ("BLOCK_SIZE", "8", "16"),
    ("TOKENIZER", "bpe", "char"),
    ("MODEL_TYPE", "bigram", "gpt2"),
    ("BIAS", "false", "True"),
]
GREEDY = {"PROMPT": "Dear", "TEMPERATURE": "0", "MAX_NEW_TOKENS": "12"}


@pytest.mark.parametrize(("name", "value", "saved"), CONTRADICTIONS)
def test_a_contradiction_in_the_env_file_is_ignored_with_a_line(name, value, saved, gpt2, tmp_path):
    (tmp_path / "other.env").write_text(f"{name}={value}\n")
    said = infer(gpt2, ENV_FILE=str(tmp_path / "other.env"), PYTHON_DOTENV_DISABLED=None, **GREEDY)
    assert said.code == 0
    assert said.out == infer(gpt2, **GREEDY).out
    (line,) = [line for line in said.err.splitlines() if line.startswith(f"{name}=")]
    assert str(tmp_path / "other.env") in line
    assert f"the checkpoint has {saved}" in line


@pytest.mark.parametrize(("name", "value", "saved"), CONTRADICTIONS)
def test_a_contradiction_in_the_process_environment_is_refused(name, value, saved, gpt2):
    said = infer(gpt2, **{name: value}, **GREEDY)
    assert (said.code, said.out) == (2, "")
    assert f"{name}=" in said.err
    assert f"the checkpoint has {saved}" in said.err
    assert f"unset {name}" in said.err


def test_all_contradictions_are_reported_at_once(gpt2):
    said = infer(gpt2, N_LAYER="3", N_HEAD="4", **GREEDY)
    assert said.code == 2
    assert "N_LAYER=3" in said.err
    assert "N_HEAD=4" in said.err


def test_equal_and_training_only_settings_do_not_contradict(gpt2):
    same = {"MODEL_TYPE": "gpt2", "N_LAYER": "2", "TOKENIZER": "auto", "BLOCK_SIZE": "16"}
    training_only = {
        "LEARNING_RATE": "0.5",
        "BATCH_SIZE": "99",
        "DROPOUT": "0.9",
        "TRAINING_STEPS": "1",
        "TRAINING_DATA_SOURCE": "none.txt",
    }
    assert text(gpt2, **same, **training_only, **GREEDY) == text(gpt2, **GREEDY)


@pytest.mark.parametrize("absent", sorted({"cuda", "mps"} - set(available_devices())))
def test_a_missing_device_is_refused_with_the_available_devices(absent, gpt2):
    said = infer(gpt2, DEVICE=absent)
    assert (said.code, said.out) == (2, "")
    assert f"DEVICE={absent}" in said.err
    assert f"available: {', '.join(available_devices())}" in said.err


# Which checkpoint


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three saves of one run: the newest is neither the best nor that of the highest step."""
    folder = tmp_path_factory.mktemp("three")
    for step, loss in ((4, 1.0), (8, 2.0), (6, 3.0)):
        circle(folder, "abcdefgh", step=step, validation_loss=loss)
    return folder


FORMS = [
    (None, 6),  # latest is the default
    ("latest", 6),
    ("best", 4),
    ("{folder}/checkpoints", 6),
    ("{folder}/checkpoints/*.pt", 8),
    ("{folder}/check*/checkpoint_bigram_*_step000[46]_*.pt", 6),
    ("{step4}", 4),
]


@pytest.mark.parametrize(("form", "step"), FORMS)
def test_checkpoint_path_takes_a_file_a_glob_a_folder_latest_and_best(form, step, three):
    path = form and form.format(folder=three, step4=at_step(three, 4))
    said = infer(three, CHECKPOINT_PATH=path, PROMPT="a", MAX_NEW_TOKENS="7")
    assert (said.code, said.out) == (0, "abcdefgh\n")
    assert f"{at_step(three, step)}: bigram at step {step}," in said.err
    assert ("taking" in said.err) == (form != "{step4}")  # a choice is told


def test_a_relative_glob_starts_at_the_current_folder(three, monkeypatch):
    monkeypatch.chdir(three)
    said = infer(three, CHECKPOINT_PATH="checkpoints/*_step0004_*.pt", PROMPT="a", MAX_NEW_TOKENS="1")
    assert said.out == "ab\n"
    assert "matches 1: taking" in said.err


@pytest.mark.parametrize("name", ["checkpoint_gpt2_none.pt", "*_step9999_*.pt"])
def test_a_missing_checkpoint_lists_the_existing(name, three):
    said = infer(three, CHECKPOINT_PATH=str(three / "checkpoints" / name))
    assert (said.code, said.out) == (3, "")
    assert name in said.err
    at = [said.err.index(at_step(three, step).name) for step in (6, 8, 4)]
    assert at == sorted(at)  # newest first


@pytest.mark.parametrize("requested", ["latest", "best", "{folder}/checkpoints", "{folder}/checkpoints/*.pt"])
@pytest.mark.parametrize("exists", [True, False])
def test_without_any_checkpoint_the_error_names_the_command_that_makes_one(requested, exists, tmp_path):
    if exists:
        (tmp_path / "checkpoints").mkdir()
    said = infer(tmp_path, CHECKPOINT_PATH=requested.format(folder=tmp_path))
    assert (said.code, said.out) == (3, "")
    assert "ENABLE_CHECKPOINTS=true" in said.err
    assert str(tmp_path / "checkpoints") in said.err


def test_a_file_without_model_state_dict_lists_the_keys_it_has(tmp_path):
    torch.save({"weights": torch.zeros(2), "epoch": 3}, tmp_path / "other.pt")
    said = infer(tmp_path, CHECKPOINT_PATH=str(tmp_path / "other.pt"))
    assert (said.code, said.out) == (3, "")
    assert f"{tmp_path / 'other.pt'}: does not contain model_state_dict" in said.err
    assert re.search(r"keys seen: '?weights'?, '?epoch'?", said.err)


def test_a_damaged_newest_is_skipped_with_a_line(three, tmp_path):
    circle(tmp_path, "abcdefgh")
    damaged = tmp_path / "checkpoints" / "zz.pt"
    damaged.write_bytes(at_step(three, 4).read_bytes()[:1000])
    said = infer(tmp_path, PROMPT="a", MAX_NEW_TOKENS="1")
    assert (said.code, said.out) == (0, "ab\n")
    assert f"skipped: {damaged}" in said.err


def test_weights_that_are_not_finite_are_the_checkpoints_fault(tmp_path):
    circle(tmp_path, "abcdefgh")
    record = newest(tmp_path)
    record.model_state = {name: torch.full_like(tensor, torch.nan) for name, tensor in record.model_state.items()}
    ckpt.save(record, tmp_path / "checkpoints")
    said = infer(tmp_path, PROMPT="a", MAX_NEW_TOKENS="5")
    assert said.code == 3
    assert "earlier checkpoint" in said.err
    assert "unexpected" not in said.err


# Formats and drafts


@pytest.mark.parametrize("settings", [{"QUANTIZE": "int8"}, {"DTYPE": "bfloat16"}], ids=str)
@pytest.mark.parametrize("numba", [True, False], ids=["compiled", "torch"])
def test_drafting_changes_no_text(settings, numba, gpt2, monkeypatch):
    monkeypatch.setattr(texts, "FEWEST_COMPILED", 1 if numba else 1000)
    settings = settings | {"PROMPT": "Dear Wren, dear Wren, dear", "MAX_NEW_TOKENS": "60", "SAMPLE_SEED": "2"}
    plain = infer(gpt2, **settings)
    drafted = infer(gpt2, SPECULATE="lookup", **settings)
    assert (drafted.code, drafted.out) == (0, plain.out)
    used = numba or "QUANTIZE" in settings or multiplies_rows_together()
    assert ("SPECULATE=lookup is not used: this processor reads bfloat16 weights anew" in drafted.err) is not used


def test_float32_generates_what_the_model_generates(gpt2):
    model, tokenizer = (
        build_model(newest(gpt2), device=torch.device("cpu")).eval(),
        build_tokenizer(newest(gpt2)),
    )
    drawn = generate(
        model, tokenizer.encode("Dear"), max_new_tokens=60, temperature=0.0, vocab_size=tokenizer.vocab_size
    )
    assert text(
        gpt2, PROMPT="Dear", MAX_NEW_TOKENS="60", TEMPERATURE="0", DTYPE="float32"
    ) == "Dear" + tokenizer.decode(list(drawn))


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, []),
        ({"DTYPE": "float32"}, []),
        ({"DTYPE": "bfloat16"}, ["bfloat16"]),
        ({"QUANTIZE": "int8"}, ["int8"]),
        ({"QUANTIZE": "int8", "DTYPE": "bfloat16"}, ["int8"]),
    ],
    ids=str,
)
def test_the_dtype_is_the_requested(settings, weights, gpt2, monkeypatch):
    made = decoders_made(monkeypatch)
    assert infer(gpt2, PROMPT="Dear", MAX_NEW_TOKENS="60", **settings).code == 0
    assert made == weights


def test_a_narrow_model_logs_that_it_does_not_draft(gpt2):
    settings = {"PROMPT": "Dear", "SAMPLE_SEED": "3", "MAX_NEW_TOKENS": "40"}
    said = infer(gpt2, SPECULATE="lookup", **settings)
    assert (said.code, said.out) == (0, infer(gpt2, **settings).out)
    assert re.search(r"SPECULATE=lookup is not used: .*\b16\b", said.err)


@pytest.mark.parametrize(("requested", "weights"), [("float32", ["float32"]), ("bfloat16", ["bfloat16"])])
def test_a_wide_model_is_decoded_in_the_requested_dtype(requested, weights, tmp_path, monkeypatch):
    folder, made = wide(tmp_path), decoders_made(monkeypatch)
    settings = {"DTYPE": requested, "PROMPT": "ab", "MAX_NEW_TOKENS": "60", "SAMPLE_SEED": "3"}
    plain = text(folder, **settings)
    assert text(folder, SPECULATE="lookup", **settings) == plain
    assert made == weights * 2


def decoders_made(monkeypatch) -> list[str]:
    """The dtypes of the fast decoders made from now on, of either kind."""
    made, make = [], Decoder.__init__
    monkeypatch.setattr(
        Decoder, "__init__", lambda self, model, **how: made.append(how["weights"]) or make(self, model, **how)
    )
    return made


def wide(folder: Path) -> Path:
    """Saves an untrained GPT-2, wide enough to be decoded in a format of its own; returns `folder`."""
    torch.manual_seed(0)
    model = GPT2(GPT2Settings(vocab_size=3, block_size=32, n_layer=1, n_head=4, n_embd=256))
    (folder / "checkpoints").mkdir()
    tokenizer = {"kind": "char", "chars": ["a", "b", "c"]}
    values = {"model_type": "gpt2", "model_settings": dataclasses.asdict(model.settings), "tokenizer": tokenizer}
    ckpt.save(Checkpoint(model_state=model.state_dict(), step=1, run_id="wide", **values), folder / "checkpoints")
    return folder


def test_a_bigram_is_not_quantized_and_drafts_nothing(tmp_path):
    folder = circle(tmp_path, "abc")
    said = infer(folder, PROMPT="a", QUANTIZE="int8")
    assert (said.code, said.out) == (2, "")
    assert "QUANTIZE=int8 needs a fast decoder: Bigram has no fast decoder; set QUANTIZE=none" in said.err
    said = infer(folder, PROMPT="a", MAX_NEW_TOKENS="5", SPECULATE="lookup")
    assert (said.code, said.out) == (0, "abcabc\n")
    assert "SPECULATE=lookup is not used: Bigram has no fast decoder" in said.err  # fmt: skip


def test_float16_on_a_cpu_is_refused(gpt2):
    said = infer(gpt2, PROMPT="Dear", DTYPE="float16")
    assert (said.code, said.out) == (2, "")
    assert "DTYPE=float16 is for cuda and mps" in said.err
