"""Tokenizers as SentencePiece makes them, and Llama 3's beginning of a text: the ids are the library's and transformers'."""

import json
from typing import Any

import pytest
import tokenizers
import transformers
from test_chat_templates import conversations, save_model
from test_llama_tokenizers import TEXTS
from test_llama_tokenizers import trained as byte_level
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from milepost import ckpt
from milepost.ckpt.saved_tokenizer import tokenizer_files
from milepost.text import tokenization
from milepost.text.errors import UnknownCharacters
from milepost.text.templates import chat_ids
from milepost.text.tokenization.sentencepiece import BYTES
from milepost.text.tokenizer_json import from_tokenizers_json

pytestmark = pytest.mark.exchange

SPECIAL = ["<unk>", "<s>", "</s>"]
FORMS = {
    "Llama 2": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "Mistral": (None, pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)),
    "always": (None, pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)),
    "no prefix": (normalizers.Replace(" ", "▁"), None),
}
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{{ ' ' + message.content + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + message.content + ' [/INST]' }}{% endif %}{% endfor %}"
)


def words(text: str) -> list[str]:
    return [part for part in text.replace(" ", "▁").replace("▁", " ▁").split(" ") if part]


def trained(form: str, model: str = "BPE") -> tokenizers.Tokenizer:
    """A tokenizer of this form, its vocabulary learned from a few of TEXTS, so that the other scripts fall back to bytes."""
    corpus = [word for text in TEXTS[:2] for word in words(text)] * 4
    made = tokenizers.Tokenizer(models.BPE() if model == "BPE" else models.Unigram())
    if model == "BPE":
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
        made.train_from_iterator(corpus, trainer)
        learned = json.loads(made.to_str())["model"]
        model_json = learned | {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    else:
        trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", show_progress=False)
        made.train_from_iterator(corpus, trainer)
        pieces = [pair for pair in json.loads(made.to_str())["model"]["vocab"] if pair[0] != "<unk>"]
        bytes_first = [[token, 0.0] for token in SPECIAL] + [[token, -20.0] for token in BYTES]
        model_json = {"type": "Unigram", "unk_id": 0, "vocab": bytes_first + pieces, "byte_fallback": True}
    plain = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    parts = {"pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model_json}
    made = tokenizers.Tokenizer.from_str(json.dumps(plain | parts))
    made.add_special_tokens(SPECIAL)
    made.normalizer, made.pre_tokenizer = FORMS[form]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (form != "no prefix"))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def in_transformers(library: tokenizers.Tokenizer, **more: Any) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **more
    )


@pytest.mark.parametrize("model", ["BPE", "Unigram"])
@pytest.mark.parametrize("form", FORMS)
def test_the_ids_are_the_librarys_and_transformers(form: str, model: str) -> None:
    library = trained(form, model)
    ours = tokenization.from_dict(from_tokenizers_json(json.loads(library.to_str())))
    theirs = in_transformers(library)
    assert (ours.kind, ours.begin_of_text, ours.end_of_text) == ("sentencepiece", 1, None)
    fell_back = 0
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode_whole(text) == theirs.encode(text, split_special_tokens=True)
        already = form in ("Mistral", "always") and text.startswith(" ")  # Metaspace puts no second space there
        assert ours.decode(ids) == ("" if not text or already else ours.prefix) + text
        assert ours.decode_bytes(ids) == b"".join(ours.decode_bytes([i]) for i in ids)  # so a text can be streamed
        fell_back += sum(3 <= i < 259 for i in ids)
    assert fell_back > 100
    again = tokenization.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert again.digest == ours.digest


@pytest.mark.parametrize("model", ["BPE", "Unigram"])
def test_what_reads_as_a_special_token_or_a_byte_is_ordinary_text(model: str) -> None:
    """A Unigram finds its whole vocabulary in a text, that of special tokens too: the library returns their ids."""
    library = trained("Mistral", model)
    ours = tokenization.from_dict(from_tokenizers_json(json.loads(library.to_str())))
    text = "a</s>b <0x0A><s>"
    ids = ours.encode(text)
    assert ours.decode(ids) == " " + text
    assert not {0, 1, 2, 3 + 0x0A} & {*ids}
    library.encode_special_tokens = True
    if model == "Unigram":  # the control
        assert 2 in library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("form", FORMS)
def test_conversations_are_those_of_transformers(form: str, tmp_path: Any) -> None:
    theirs = in_transformers(trained(form), chat_template=LLAMA2)
    save_model(theirs, tmp_path)
    record = ckpt.load(tmp_path)
    ours = tokenization.from_dict(record.tokenizer or {})
    assert (ours.stop_ids, ours.begin_of_text) == ((2,), 1)
    for talk in conversations():
        if any(message["role"] == "system" or "<|im_" in message["content"] for message in talk):
            continue
        expected = theirs.apply_chat_template(talk, return_dict=False)
        found = chat_ids(talk, ours, ours.chat_template, answer=False)
        assert ours.decode(found) == ours.decode(expected)
        assert found == expected
    folder = tmp_path / "again"
    folder.mkdir()
    for name, values in tokenizer_files(record).items():
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert [again.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]


def test_the_token_that_begins_a_text_of_llama_3() -> None:
    library = byte_level("Llama 3")
    begin = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", library.token_to_id("<|im_start|>"))]
    )
    library.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    ours = tokenization.from_dict(from_tokenizers_json(json.loads(library.to_str())))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library)
    for text in TEXTS:
        assert ours.encode_whole(text) == theirs.encode(text, split_special_tokens=True)
        assert ours.encode_whole(text)[1:] == ours.encode(text)
    assert ours.begin_of_text == library.token_to_id("<|im_start|>")


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": "▁"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {}, "single": [
            {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]}},
    ],
)  # fmt: skip
def test_what_would_lose_or_add_something_is_refused(change: dict[str, Any]) -> None:
    values = json.loads(trained("Mistral").to_str())
    with pytest.raises(ValueError, match="the tokenizer is not one like SentencePiece that loses nothing"):
        tokenization.from_dict(from_tokenizers_json(values | change))


def test_a_unigram_without_bytes_is_refused_and_the_letter_of_a_space_is_unknown() -> None:
    values = json.loads(trained("Mistral", "Unigram").to_str())
    ours = tokenization.from_dict(from_tokenizers_json(values))
    with pytest.raises(UnknownCharacters):
        ours.encode("a ▁ b")
    values["model"]["byte_fallback"] = False
    with pytest.raises(ValueError, match="byte_fallback must be true"):
        tokenization.from_dict(from_tokenizers_json(values))
