"""The tokenizer of another program's file: read from inside or set by the user, never chosen because its size fits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drive import ROOT, TINY, command
from foreign_programs import LectureModel, NanoGPT, shaken

from milepost import ckpt
from milepost.ckpt.foreign.embedded_tokenizer import tokenizer_inside

DEFAULT = sorted(set((ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8")))
# As many characters as the default text has, none of which but the newline is in it.
CYRILLIC = ["\n", *(chr(0x410 + number) for number in range(len(DEFAULT) - 1))]
STOI = {char: number for number, char in enumerate(CYRILLIC)}
ITOS = dict(enumerate(CYRILLIC))
SIZES = {"vocab_size": len(CYRILLIC), "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 8}
BPE = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}

SPELLINGS: dict[str, dict[str, Any]] = {
    "chars": {"chars": CYRILLIC},
    "chars as a text": {"chars": "".join(CYRILLIC)},
    "chars as a tuple": {"chars": tuple(CYRILLIC)},
    "token_kind and chars": {"token_kind": "char", "chars": CYRILLIC},
    "stoi": {"stoi": STOI},
    "itos": {"itos": ITOS},
    "itos as a list": {"itos": CYRILLIC},
    "itos as JSON has it": {"itos": {str(number): char for number, char in ITOS.items()}},
    "everything": {"token_kind": "char", "chars": CYRILLIC, "stoi": STOI, "itos": ITOS, "vocab_size": len(CYRILLIC)},
    "char_to_idx": {"char_to_idx": STOI, "idx_to_char": ITOS},
    "char2idx": {"char2idx": STOI},
    "vocab list": {"vocab": CYRILLIC},
    "vocab by character": {"vocab": STOI},
    "vocab by id": {"vocab": ITOS},
}
PLACES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "top": lambda words: words,
    "config": lambda words: {"config": SIZES | words},
    "meta": lambda words: {"meta": words},
    "tokenizer": lambda words: {"tokenizer": words},
    "config.tokenizer": lambda words: {"config": SIZES | {"tokenizer": words}},
    "hyper_parameters": lambda words: {"hyper_parameters": words},
    "tokenizer as JSON text": lambda words: {"tokenizer": json.dumps(words)},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_in_every_place_is_the_same_alphabet(spelling, place):
    content = {"model": {}, "step": 3} | PLACES[place](SPELLINGS[spelling])
    assert tokenizer_inside([content], len(CYRILLIC), where="f")[0] == {"kind": "char", "chars": CYRILLIC}


@pytest.mark.parametrize(
    ("content", "rows", "expected"),
    [
        ({"token_kind": "gpt2"}, 50257, {"kind": "gpt2"}),
        ({"tokenizer": "gpt2"}, 50304, {"kind": "gpt2"}),
        ({"tokenizer": {"kind": "byte"}}, 256, {"kind": "byte"}),
        ({"tokenizer": BPE}, 3, {"kind": "bpe", "tokenizer": BPE}),
        ({"tokenizer": json.dumps(BPE)}, 3, {"kind": "bpe", "tokenizer": BPE}),
        ({"config": {"tokenizer": BPE}}, 3, {"kind": "bpe", "tokenizer": BPE}),
        ({"tokenizer": {"name": "CharTokenizer", "chars": ["a", "b"]}}, 2, {"kind": "char", "chars": ["a", "b"]}),
    ],
)  # fmt: skip
def test_kinds_and_bpe(content, rows, expected):
    assert tokenizer_inside([content], rows, where="f")[0] == expected


@pytest.mark.parametrize(
    "content",
    [{}, {"vocab": "vocab.json"}, {"chars": 74}, {"vocab_size": 74}, {"config": {"type": "gpt2"}}, {"kind": "gpt2"}, {"token_kind": "char"}, {"alphabet": "latin"}],
    ids=str,
)  # fmt: skip
def test_values_without_tokens_are_not_a_tokenizer(content):
    """Negative control: similar keys yield no tokenizer."""
    assert tokenizer_inside([content], 74, where="f") == (None, "")


@pytest.mark.parametrize(
    "content",
    [
        {"chars": ["a", "b"], "stoi": {"b": 0, "a": 1}},
        {"vocab": {"a": 1, "b": 2}},
        {"vocab": ["<pad>", "a"]},
        {"chars": ["a", "a"]},
        {"chars": ["a", "b", "c", "d"]},
        {"tokenizer": "cl100k_base"},
        {"tokenizer": "{"},
        {"token_kind": "gpt2"},
    ],
    ids=str,
)
def test_an_unknown_tokenizer_is_reported_and_not_replaced(content):
    found, note = tokenizer_inside([content], 3, where="f")
    assert found is None
    assert note.startswith("f: the tokenizer inside cannot be used: ")


# ---------------------------------------------------------------------------------------------------------------------
# The whole way, in processes of their own.


def lecture(words: dict[str, Any]) -> dict[str, Any]:
    """A bundle of model, optimizer and tokenizer in one file."""
    torch.manual_seed(0)
    return {"model": shaken(LectureModel(**SIZES)).state_dict(), "config": SIZES, "step": 30} | words


def nano(words: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "model": shaken(NanoGPT(**SIZES, bias=True)).state_dict(),
        "model_args": SIZES | {"bias": True},
        "iter_num": 30,
    } | words


PROGRAMS = {"lecture": lecture, "nanogpt": nano}
BARE = dict.fromkeys([*TINY, "TRAINING_DATA_SOURCE"]) | {"DEVICE": "cpu"}


def bundle(folder: Path, program: str, words: dict[str, Any]) -> Path:
    path = folder / "latest.pt"
    torch.save(PROGRAMS[program](words), path)
    return path


def generated(folder: Path, path: Path, **changes: str) -> tuple[int, str, str]:
    asked = {"CHECKPOINT_PATH": str(path), "MAX_NEW_TOKENS": "40", "SAMPLE_SEED": "1"}
    done = command("scripts/load_checkpoint.py", folder, **BARE | asked | changes)
    return done.returncode, done.stdout, done.stderr


def converted(folder: Path, path: Path, **changes: str) -> tuple[int, str, Path | None]:
    output = folder / "converted"
    asked = {"CHECKPOINT_PATH": str(path), "CONVERT_TO": "directory", "OUTPUT": str(output)}
    done = command("scripts/convert_checkpoint.py", folder, **BARE | asked | changes)
    found = ckpt.find(output) if output.is_dir() else []
    return done.returncode, done.stdout, found[0].path if found else None


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_bundles_own_alphabet_generates_and_is_converted(program, tmp_path):
    """It has as many characters as the default text, but different ones."""
    path = bundle(tmp_path, program, SPELLINGS["everything"])
    code, text, said = generated(tmp_path, path)
    assert code == 0, said
    assert set(text) <= set(CYRILLIC)
    code, said, target = converted(tmp_path, path)
    assert (code, "Conversion complete!" in said) == (0, True)
    assert json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))["chars"] == CYRILLIC


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_a_tokenizer_nothing_is_guessed(program, tmp_path):
    path = bundle(tmp_path, program, {})
    code, text, said = generated(tmp_path, path)
    assert (code, text) == (3, "")
    assert "TRAINING_DATA_SOURCE" in said.splitlines()[-1]
    code, said, target = converted(tmp_path, path)
    assert (code, "Conversion complete!" in said) == (3, False)
    assert ckpt.load(target).tokenizer is None


def test_the_text_set_by_the_user_is_used(tmp_path):
    """The remedy in the error works for generating and converting;
    a text with another number of characters is refused.
    """
    path = bundle(tmp_path, "nanogpt", {})
    own = tmp_path / "own.txt"
    own.write_text("".join(CYRILLIC) * 3, encoding="utf-8")
    code, text, said = generated(tmp_path, path, TRAINING_DATA_SOURCE=str(own))
    assert code == 0, said
    assert set(text) <= set(CYRILLIC)
    code, said, target = converted(tmp_path, path, TRAINING_DATA_SOURCE=str(own))
    assert (code, "Conversion complete!" in said) == (0, True)
    assert ckpt.load(target).tokenizer == {"kind": "char", "chars": CYRILLIC}
    own.write_text("abc", encoding="utf-8")
    assert generated(tmp_path, path, TRAINING_DATA_SOURCE=str(own))[:2] == (3, "")


def test_a_requested_kind_is_used_if_its_tokens_fit(tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 256, "bias": True}
    path = tmp_path / "latest.pt"
    torch.save({"model": shaken(NanoGPT(**sizes)).state_dict(), "model_args": sizes}, path)
    assert generated(tmp_path, path)[0] == 3
    assert generated(tmp_path, path, TOKENIZER="byte")[0] == 0
    assert generated(tmp_path, path, TOKENIZER="gpt2")[:2] == (3, "")


def test_converting_a_folder_reports_a_file_without_a_tokenizer(tmp_path):
    (tmp_path / "old").mkdir()
    bundle(tmp_path / "old", "nanogpt", {})
    code, said, target = converted(tmp_path, tmp_path / "old")
    assert (code, "Conversion complete!" in said) == (3, False)
    assert target is not None
