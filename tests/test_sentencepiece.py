"""A tokenizer in the form of SentencePiece: nothing of a text is lost, and the token that begins a text is where it belongs."""

import dataclasses
import json
from pathlib import Path

import pytest
import tokenizers
import torch
from drive import newest, tensor_bytes, train
from hypothesis import given, settings
from hypothesis import strategies as st
from records import gpt2_record
from script import call, script
from test_tokenization import LETTERS, tricky_text

from milepost.ckpt import CheckpointError
from milepost.ckpt.exports.gguf_tokens import tokens_of
from milepost.ckpt.restore import build_model, build_tokenizer
from milepost.evaluate.passages import opening
from milepost.generation.sampling import generate
from milepost.generation.texts import first_id
from milepost.text import tokenization
from milepost.text.templates import chat_ids
from milepost.text.tokenization.sentencepiece import BYTES, merge_pairs

OURS = tokenization.build("sentencepiece", [(LETTERS * 20, True)], alphabet="", documents=1, vocab_size=400)
LITERAL = st.sampled_from([*"ab <>|/", "<s>", "<unk>", "<0x41>", "<|endoftext|>"])


@settings(max_examples=200, deadline=None)
@given(text=st.text() | tricky_text | st.lists(LITERAL).map("".join))
def test_nothing_of_a_text_is_lost_and_none_of_it_is_special(text: str) -> None:
    text = text.replace("\u2581", "")
    ids = OURS.encode(text)
    assert OURS.decode(ids) == (" " if text else "") + text
    assert not {*OURS.special_tokens.values()} & {*ids}
    for after, before in (("text", ""), ("special", " ")):
        part = OURS.encode_part(text, after=after)  # type: ignore[arg-type]
        assert OURS.decode(part) == (before if text else "") + text


def test_characters_that_are_no_tokens_are_their_bytes() -> None:
    assert OURS.encode_part("\u20ac", after="text").tolist() == [3 + byte for byte in "\u20ac".encode()]
    assert [OURS.decode_bytes([3 + byte]) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_the_vocabulary_depends_on_the_text_alone() -> None:
    text = LETTERS * 20
    pieces = [(text[at : at + 7], at + 7 >= len(text)) for at in range(0, len(text), 7)]
    again = tokenization.build("sentencepiece", pieces, alphabet="", documents=1, vocab_size=400)
    assert again.digest == OURS.digest
    assert len(BYTES) + 3 < again.vocab_size <= 400


def test_a_space_is_a_token_though_the_text_has_none() -> None:
    chinese = tokenization.build(
        "sentencepiece", [("\u5929\u5730\u7384\u9ec4" * 20, True)], alphabet="", documents=1, vocab_size=300
    )
    assert chinese.decode(chinese.encode("\u5929 \u5730")) == " \u5929 \u5730"


def test_what_begins_a_text_precedes_texts_prompts_and_conversations() -> None:
    begin = OURS.begin_of_text
    assert (begin, OURS.end_of_text) == (1, 2)
    assert OURS.encode_whole("ab") == [begin, *OURS.encode("ab")]
    assert chat_ids([{"role": "user", "content": "ab"}], OURS, None, answer=True)[0] == begin
    assert opening(OURS).tolist() == [begin]
    assert first_id(OURS, torch.Generator()) == begin


def test_a_run_resumes_exactly_and_continues_a_prompt_after_the_beginning_of_a_text(tmp_path: Path) -> None:
    how = {"TOKENIZER": "sentencepiece", "BPE_VOCAB_SIZE": "320", "SAMPLE_INTERVAL": "0", "N_LAYER": "1"}
    code, said = train(tmp_path, **how)
    assert code == 0, said
    whole = newest(tmp_path)
    assert whole.path is not None
    whole.path.unlink()
    code, said = train(tmp_path, **how, RESUME="auto")
    assert code == 0, said
    again = newest(tmp_path)
    assert (again.step, tensor_bytes(again)) == (whole.step, tensor_bytes(whole))

    tokenizer, model = build_tokenizer(again), build_model(again, device=torch.device("cpu")).eval()
    ids = list(
        generate(
            model, tokenizer.encode_whole("Dear"), max_new_tokens=9, temperature=0, vocab_size=tokenizer.vocab_size
        )
    )
    asked = {"CHECKPOINT_PATH": again.path, "PROMPT": "Dear", "TEMPERATURE": "0", "MAX_NEW_TOKENS": "9"}
    printed = call(script("load_checkpoint"), tmp_path, **asked)
    assert (printed.code, printed.out) == (0, "Dear" + tokenizer.decode(ids) + "\n"), printed.err
    checked = call(script("verify_checkpoint"), tmp_path, CHECKPOINT_PATH=again.path)
    assert checked.code == 0, checked.out + checked.err


def test_llama_cpp_has_scores_in_the_order_of_the_merges() -> None:
    """A tokenizer that does not name every pair is refused, as earlier versions trained them: llama.cpp would join it all the same."""
    one = dataclasses.replace(gpt2_record(settings={"vocab_size": OURS.vocab_size}), tokenizer=OURS.to_dict())
    found, merges = tokens_of(one), OURS.to_dict()["tokenizer"]["model"]["merges"]
    joined = list(dict.fromkeys(map("".join, merges)))
    assert [found.scores[found.texts.index(token)] for token in joined] == [
        -float(place) for place in range(len(joined))
    ]
    spec = OURS.to_dict()["tokenizer"]
    before = {"kind": "sentencepiece", "tokenizer": spec | {"model": spec["model"] | {"merges": merges[:-1]}}}
    with pytest.raises(CheckpointError) as error:
        tokens_of(dataclasses.replace(one, tokenizer=before))
    assert error.value.kind == "refused"


def test_a_changed_file_is_refused() -> None:
    values = json.loads(json.dumps(OURS.to_dict()))
    del values["tokenizer"]["model"]["vocab"]["<0x41>"]
    with pytest.raises(ValueError, match="a token for each of the 256 bytes"):
        tokenization.from_dict(values)


def test_a_merge_that_comes_twice_has_the_place_that_the_library_gives_it() -> None:
    """What the library writes again is what it joins by: here `bc` before `ab`."""
    model = tokenizers.models.BPE(vocab={each: i for i, each in enumerate(["a", "b", "c", "ab", "bc"])}, merges=[])
    spec = json.loads(tokenizers.Tokenizer(model).to_str())
    spec["model"]["merges"] = ["a b", "b c", "a b"]
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert library.encode("abc").tokens == ["a", "bc"]
    assert merge_pairs(spec["model"]) == [tuple(pair) for pair in json.loads(library.to_str())["model"]["merges"]]
