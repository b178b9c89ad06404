"""CONVERT_TO=gguf in llama.cpp itself: the same ids of a text, nearly the same logits,
and the same 64 tokens of greedy text.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_cpp import Llama
from records import gpt2_record
from torch.nn import functional as F

from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.ckpt.exports.gguf import TYPES
from milepost.ckpt.restore import build_model, build_tokenizer
from milepost.text import tokenization
from milepost.text.tokenization import CharTokenizer

STORY = (
    "Dear Wren, in June my “naïve café” neighbour replaced the fence between our gardens, and the old one ran from my "
    "coal bunker to an iron stake beside the pear tree. The new one stands eleven inches further over; I measured it "
    "twice with a steel tape. She says “it was always there”. The naïve café owner says 42 inches, or 1,066 "
    "mm. What should I do "
    "about the nettles, the hedge, and the cat who watches us both from the shed roof every single morning?\n"
)
TRICKY = [
    "don't  naïve café 😀 \n\n\n 1234  x\t\ty",
    "“q” …naïve 日本語 \u00a0\u3000",
    " \n  a\r\n",
    "é e\u0301 \u2028",
]
PROMPT, LENGTH = "Dear Wren, in June", 64
# (tokenizer, settings): GPT-2's tokens with 47 rows to spare, a BPE of our own in a model without biases, characters
# with rows to spare and without, bytes.
MODELS = {
    "gpt2": ("gpt2", {"vocab_size": 50304}),
    "bpe": ("bpe", {"bias": False, "activation": "gelu_erf"}),
    "char": ("char", {"bias": False}),
    "untied char": ("char", {"tied": False, "vocab_size": 60}),
    "byte": ("byte", {}),
}


@pytest.fixture(scope="module", params=MODELS)
def learned(request) -> Checkpoint:
    """A model that is overfitted to STORY, so that the most likely next token is certain."""
    kind, settings = MODELS[request.param]
    alphabet = "".join(sorted({*STORY}))
    tokenizer = tokenization.build(kind, [(STORY * 5, True)], alphabet=alphabet, documents=1, vocab_size=300)
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 64}
    one = dataclasses.replace(gpt2_record(settings=sizes | settings), tokenizer=tokenizer.to_dict())
    model = build_model(one, device=torch.device("cpu"))
    ids = torch.tensor([tokenizer.encode(STORY)[:113]])
    if not model.settings.tied:
        model.lm_head.bias.requires_grad_(False).zero_()
    updates = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = F.cross_entropy(model(ids[:, :-1])[0][0], ids[0, 1:])
        updates.zero_grad()
        loss.backward()
        updates.step()
    return dataclasses.replace(one, model_state={name: each.detach() for name, each in model.state_dict().items()})


@pytest.fixture(scope="module")
def greedy(learned) -> tuple[list[int], torch.Tensor]:
    """Prompt and 64 tokens after it, always the likeliest, and the logits of each; no two are nearly as likely."""
    model, tokenizer = build_model(learned, device=torch.device("cpu")).eval(), build_tokenizer(learned)
    ids = tokenizer.encode(PROMPT)
    end = len(ids) + LENGTH
    with torch.no_grad():
        while len(ids) < end:
            best = model(torch.tensor([ids]))[0][0, -1].topk(2)
            assert best.values[0] - best.values[1] > 2
            ids.append(int(best.indices[0]))
        return ids, model(torch.tensor([ids]))[0][0]


def opened(folder: Path, record: Checkpoint, kind: str) -> Llama:
    path = ckpt.exporter("gguf", gguf_type=kind).write(record, folder, "model")
    return Llama(str(path), n_ctx=128, n_threads=2, logits_all=True, verbose=False)


@pytest.mark.parametrize("kind", TYPES)
def test_greedy_text_is_the_same(tmp_path, learned, greedy, kind):
    llama, tokenizer = opened(tmp_path, learned, kind), build_tokenizer(learned)
    text = tokenizer.decode(greedy[0][len(tokenizer.encode(PROMPT)) :])
    said = llama.create_completion(PROMPT, max_tokens=LENGTH, temperature=0.0, repeat_penalty=1.0)
    assert said["usage"]["completion_tokens"] == LENGTH
    assert said["choices"][0]["text"] == text
    assert len(text.encode()) >= LENGTH
    assert "“naïve café”" in text


@pytest.mark.parametrize(("kind", "most"), [("f32", 0.02), ("f16", 0.02), ("q8_0", 0.25)])
def test_logits_are_nearly_the_same(tmp_path, learned, greedy, kind, most):
    """Of a standard deviation of ours: llama.cpp looks its GELU up in a table of half precision,
    so that F32 is not exact either.
    """
    llama, (ids, ours) = opened(tmp_path, learned, kind), greedy
    distance = apart(llama, ids, ours)
    print(
        f"{learned.tokenizer['kind']} {kind}: logits differ by at most {distance:.3g}, standard deviation {ours.std():.3g}"
    )
    assert distance < most * ours.std()


def apart(llama: Llama, ids: list[int], ours: torch.Tensor) -> float:
    """Return the largest difference of two logits; a token that only the file has is never the likeliest."""
    llama.eval(ids)
    theirs, rows = np.array(llama.scores[: len(ids)]), ours.shape[1]
    assert (theirs[:, rows:].max(axis=1, initial=-np.inf) < theirs.max(axis=1)).all()
    return np.abs(theirs[:, :rows] - ours.numpy()).max()


def test_the_ids_of_any_text_are_ours(tmp_path, learned):
    llama, tokenizer = opened(tmp_path, learned, "q8_0"), build_tokenizer(learned)
    known = {*tokenizer.chars} if isinstance(tokenizer, CharTokenizer) else None
    for text in (STORY, *TRICKY):
        mine = text if known is None else "".join(char for char in text if char in known)
        ids = llama.tokenize(mine.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(mine)
        assert llama.detokenize(ids).decode() == mine
    end = tokenizer.end_of_text
    assert llama.token_eos() == (-1 if end is None else end)
    if end is not None:
        assert llama.tokenize(b"<|endoftext|>", add_bos=False, special=True) == [end]


@pytest.mark.parametrize("learned", ["char", "untied char"], indirect=True)
@pytest.mark.parametrize("char", ["Z", "\u2018", "ß", "日", "😀"])
def test_a_character_that_the_model_lacks_is_no_token(tmp_path, learned, char):
    """Some share their first byte with characters that it has, and none is passed over."""
    llama = opened(tmp_path, learned, "f32")
    ids = llama.tokenize(f"Dear {char} Wren".encode(), add_bos=False, special=False)
    assert ids[-5:] == build_tokenizer(learned).encode(" Wren")
    assert -1 in ids
    with pytest.raises(RuntimeError):
        llama.eval(ids)


def test_control_a_transposed_matrix_would_be_seen(tmp_path, learned, greedy):
    state = dict(learned.model_state)
    state["h.1.attn.c_proj.weight"] = state["h.1.attn.c_proj.weight"].t().contiguous()
    llama, (ids, ours) = opened(tmp_path, dataclasses.replace(learned, model_state=state), "f32"), greedy
    assert apart(llama, ids, ours) > 0.1 * ours.std()
