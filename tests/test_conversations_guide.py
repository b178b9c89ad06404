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

import models
from milepost import ckpt
from milepost.run import text as run_text
from milepost.text.corpus import open_corpus

PAGE = (ROOT / "docs" / "conversations.md").read_text(encoding="utf-8")
BUNDLED = ROOT / "data" / "conversations.jsonl"


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


def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_text, "CACHE_FOLDER", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    pretrained(tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(BUNDLED, tmp_path / "data")
    shutil.copy(BUNDLED, tmp_path / "held_out.jsonl")
    lines = [line for line in pages.commands(PAGE) if re.search(r"\bpython3 \S+\.py$", line)]
    assert len(lines) == 5
    for line in lines:
        done = called(line, tmp_path)
        assert done.code == 0, f"{line}\n{done.out}\n{done.err}"
    assert list((tmp_path / "small").glob("*.pt"))
    assert "exact match" in done.out
    assert json.loads((tmp_path / "answers.json").read_text())["checkpoints"][0]["benchmarks"][0]["items"] > 40


def test_the_bundled_conversations_are_varied() -> None:
    corpus = open_corpus(str(BUNDLED), data_dir=ROOT / "data")
    talks = [talk for _, talk in corpus.conversations()]
    assert len(talks) == 40
    assert len({talk[-1]["content"] for talk in talks}) == 40
    assert any(len(talk) > 3 for talk in talks)
    assert sum(talk[0]["role"] == "system" for talk in talks) == 5
