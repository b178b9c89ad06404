"""CONVERT_TO=gguf of tokenizers like SentencePiece's in llama.cpp itself: the same ids of any text, and the same text generated."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cpp import Llama
from test_llama_kin import TEXTS, opened, random_model
from tokenizers import Tokenizer

from milepost.ckpt import CheckpointError
from milepost.ckpt.exports import gguf_tokens
from milepost.ckpt.restore import build_model
from milepost.text import tokenization
from milepost.text.tokenization.sentencepiece import REPLACE, SentencePieceTokenizer, merge_pairs
from milepost.text.tokenizer_json import from_tokenizers_json

README = Path("README.md").read_text(encoding="utf-8")
MORE = [
    "",
    " ",
    "   three spaces",
    "Zeilenende\n\n\n",
    "naïve ☃☃ 𝄞",
    "<s> and </s> and <0x41>",
    "aaaaaaa      bbbbb",
    README[:4000],
]


def trained(vocab_size: int = 600) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.build(
        [(text, True) for text in [*TEXTS, README]], alphabet="", documents=5, vocab_size=vocab_size
    )


def of_json(**changes: Any) -> tokenization.Tokenizer:
    """The same tokenizer, with other values in its tokenizer.json."""
    spec = json.loads(json.dumps(trained().to_dict()["tokenizer"]))
    return tokenization.from_dict(from_tokenizers_json(spec | changes))


def with_model(**changes: Any) -> tokenization.Tokenizer:
    return of_json(model=trained().to_dict()["tokenizer"]["model"] | changes)


def in_llama_cpp(folder: Path, tokenizer: tokenization.Tokenizer, **options: Any) -> tuple[Llama, Any]:
    model = random_model(vocab_size=tokenizer.vocab_size)
    record = dataclasses.replace(model, tokenizer=tokenizer.to_dict())
    return opened(folder, record, **options), record


@pytest.mark.parametrize("space", [True, False])
def test_the_ids_of_any_text_are_ours_and_the_librarys(tmp_path: Path, space: bool) -> None:
    ours = trained() if space else of_json(normalizer=REPLACE)
    llama, _ = in_llama_cpp(tmp_path, ours, vocab_only=True)
    library = Tokenizer.from_str(json.dumps(ours.to_dict()["tokenizer"]))
    assert (llama.token_bos(), llama.token_eos()) == (ours.begin_of_text, ours.end_of_text)
    for text in [*TEXTS, *MORE]:
        ids = llama.tokenize(text.encode(), add_bos=True, special=False)
        assert ids == ours.encode_whole(text), text
        if "<" not in text:  # the library would find special tokens in it
            assert ids == library.encode(text).ids


def test_the_text_that_it_generates_is_ours(tmp_path: Path) -> None:
    """The most likely tokens, one after the other."""
    llama, record = in_llama_cpp(tmp_path, trained())
    model = build_model(record, device=torch.device("cpu")).eval()
    ids = trained().encode_whole("It's 2026")
    ours = list(ids)
    for _ in range(20):
        with torch.no_grad():
            ours.append(int(model(torch.tensor([ours]))[0][0, -1].argmax()))
    theirs = list(ids)
    for token in llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == len(ours):
            break
    assert theirs == ours


def test_control_pairs_that_are_not_joined_would_give_other_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that names one pair for each token only, as earlier versions trained them, llama.cpp reads other tokens."""
    once = with_model(merges=[list(pair) for pair in {"".join(pair): pair for pair in merge_pairs(trained().to_dict()["tokenizer"]["model"])}.values()])  # fmt: skip
    with pytest.raises(CheckpointError, match="does not join"):
        in_llama_cpp(tmp_path, once)
    monkeypatch.setattr(gguf_tokens, "_unlike_llama", lambda spec: "")
    llama, _ = in_llama_cpp(tmp_path, once, vocab_only=True)
    assert any(llama.tokenize(text.encode(), add_bos=True, special=False) != once.encode_whole(text) for text in MORE)
