"""docs/conversations.md: every command as it is written, on a GPT-2 of a few weights under the name gpt2."""

import json
import re
import shutil
from pathlib import Path

import pages
import pytest
import torch
from drive import ROOT
from test_guides import called
from test_templates import CHATML, bpe

import models
from milepost import ckpt
from milepost.run import text as run_text
from milepost.text.corpus import open_corpus

PAGE = (ROOT / "docs" / "conversations.md").read_text(encoding="utf-8")
BUNDLED = ROOT / "data" / "conversations.jsonl"
ASK_WREN, HELD_OUT = (ROOT / "data" / f"ask_wren{end}.jsonl" for end in ("", "_held_out"))


def pretrained(folder: Path) -> None:
    """A GPT-2 with the vocabulary of the published ones and room for a conversation, as a Hugging Face folder."""
    settings = {"vocab_size": 50257, "block_size": 128, "n_layer": 1, "n_head": 1, "n_embd": 4}
    torch.manual_seed(0)
    model = models.build("gpt2", settings)
    record = ckpt.Checkpoint(
        model_state=model.state_dict(),
        model_type="gpt2",
        model_settings=models.plain(model.settings),
        tokenizer={"kind": "gpt2"},
    )
    shutil.move(ckpt.save(record, folder / "hub", layout="huggingface"), folder / "gpt2")


def instructed(folder: Path) -> None:
    """A small Llama with a chat template, as the folder that the page downloads."""
    tokenizer = bpe(CHATML)
    settings = {"vocab_size": tokenizer.vocab_size, "block_size": 512, "n_layer": 1, "n_head": 1, "n_embd": 8}
    torch.manual_seed(0)
    model = models.build("llama", settings)
    record = ckpt.Checkpoint(
        model_state=model.state_dict(),
        model_type="llama",
        model_settings=models.plain(model.settings),
        tokenizer=tokenizer.to_dict(),
    )
    shutil.move(ckpt.save(record, folder / "hub", layout="huggingface"), folder / "SmolLM2-135M-Instruct")


@pytest.mark.parametrize("gguf", [False, pytest.param(True, marks=pytest.mark.exchange)])  # which needs a package
def test_every_command_runs(gguf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_text, "CACHE_FOLDER", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    pretrained(tmp_path)
    instructed(tmp_path)
    (tmp_path / "data").mkdir()
    for path in (BUNDLED, ASK_WREN, HELD_OUT):
        shutil.copy(path, tmp_path / "data")
    shutil.copy(BUNDLED, tmp_path / "held_out.jsonl")
    lines = [line for line in pages.commands(PAGE) if re.search(r"\bpython3 \S+\.py$", line)]
    assert len(lines) == 10
    for line in [line for line in lines if gguf or "CONVERT_TO=gguf" not in line]:
        done = called(line, tmp_path)
        assert done.code == 0, f"{line}\n{done.out}\n{done.err}"
    assert list((tmp_path / "small").glob("*.pt"))
    assert len(list(tmp_path.glob("wren_gguf/*-q8_0.gguf"))) == int(gguf)
    assert "the model's own chat template" in next((tmp_path / "runs").glob("*ask_wren*/training.log")).read_text()
    assert "exact match" in done.out
    assert json.loads((tmp_path / "answers.json").read_text())["checkpoints"][0]["benchmarks"][0]["items"] > 40


def test_the_bundled_conversations_are_varied() -> None:
    corpus = open_corpus(str(BUNDLED), data_dir=ROOT / "data")
    talks = [talk for _, talk in corpus.conversations()]
    assert len(talks) == 40
    assert len({talk[-1]["content"] for talk in talks}) == 40
    assert any(len(talk) > 3 for talk in talks)
    assert sum(talk[0]["role"] == "system" for talk in talks) == 5


def test_the_questions_and_answers_are_varied() -> None:
    rows = [json.loads(line) for path in (ASK_WREN, HELD_OUT) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 336
    assert all(row.keys() == {"prompt", "completion"} for row in rows)
    assert len({row["prompt"] for row in rows}) == 336
    assert len({row["completion"] for row in rows}) == 336
    assert len({tuple(row["completion"].split()[:3]) for row in rows}) > 330
