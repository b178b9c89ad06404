"""The tokenizers as the JSON files that Hugging Face's `tokenizers` and `transformers` open, and back."""

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from milepost.text.tokenization.base import END_OF_TEXT, Tokenizer, byte_letters
from milepost.text.tokenization.bpe import SPLITS, adds_nothing, check_bpe, splits_as_gpt2
from milepost.text.tokenization.byte import ByteTokenizer
from milepost.text.tokenization.char import CharTokenizer
from milepost.text.tokenization.gpt2 import Gpt2Tokenizer, gpt2_file
from milepost.text.tokenization.library import LibraryTokenizer, tokens_before
from milepost.text.tokenization.sentencepiece import is_sentencepiece

Json = dict[str, Any]

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# An empty pattern matches between any two characters, line ends and combining marks included.
EACH_CHARACTER = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
# `_content_digest` of GPT-2's vocabulary and merges; a test compares it with that of the published files.
GPT2_DIGEST = "2a84aa51ea049287ee4c5e438e96023cd6c3bc5250a519851ff57885941f125c"


def tokenizers_json(tokenizer: Tokenizer) -> Json:
    """Return the values of a Hugging Face folder's `tokenizer.json`, which encodes and decodes as `tokenizer` does.

    Two behaviours are the library's. Characters outside a char vocabulary raise an error, as here. "<|endoftext|>" in a text
    becomes the special token, where ours encodes ordinary text; `encode_special_tokens = True` there (`split_special_tokens=True`
    in transformers) makes it do the same. Raise ValueError for a tokenizer that has no such form, DataError if the files of GPT-2
    are not on this machine.
    """
    if isinstance(tokenizer, CharTokenizer):
        return _char_json(tokenizer.chars)
    if isinstance(tokenizer, ByteTokenizer):
        return _byte_level_json({letter: byte for byte, letter in enumerate(byte_letters())}, [])
    if isinstance(tokenizer, Gpt2Tokenizer):
        return _gpt2_json()
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.to_dict()["tokenizer"]
    raise ValueError(f"the tokenizer {tokenizer.kind} has no form as a tokenizer.json")


def tokenizer_config(tokenizer: Tokenizer) -> Json:
    """Return the values of the `tokenizer_config.json` beside it, with which transformers' AutoTokenizer opens the folder.

    Its class adds nothing to tokenizer.json. The caller adds `model_max_length`, in tokens, which depends on the model.
    """
    config: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.end_of_text is not None:
        end = tokenizer.end_token if isinstance(tokenizer, LibraryTokenizer) else END_OF_TEXT
        config |= {"bos_token": end, "eos_token": end}
    if isinstance(tokenizer, LibraryTokenizer) and tokenizer.begin_token is not None:
        config["bos_token"] = tokenizer.begin_token
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    return config


def from_tokenizers_json(values: Mapping[str, Any]) -> Json:
    """Return the `Tokenizer.to_dict` form of the values of a `tokenizer.json`; `tokenization.from_dict` checks it.

    A char or byte tokenizer is recognised if it equals what `tokenizers_json` writes, GPT-2's by the content of its vocabulary and
    merges, whatever program wrote it. A Unigram, and a BPE with byte fallback, is like SentencePiece; everything else is taken
    for a byte-level BPE.
    """
    plain = _without_traces(values)
    if _is_gpt2(plain):
        return {"kind": "gpt2"}
    if plain == tokenizers_json(ByteTokenizer()):
        return {"kind": "byte"}
    if _is_char(plain):
        return {"kind": "char", "chars": _tokens_by_id(plain)}
    return {
        "kind": "sentencepiece" if is_sentencepiece(plain) else "bpe",
        "tokenizer": {name: plain[name] for name in values},
    }


def from_vocab_and_merges(
    vocab: Json, merges: str, added: Mapping[str, int], special: Iterable[str], *, split: str | None = None
) -> Json:
    """Return the `Tokenizer.to_dict` form of GPT-2's own two files, `vocab.json` and `merges.txt`, which older fine-tunes have.

    `added` is added_tokens.json, `special` the tokens that encoding text never produces. The files do not record how a text is cut:
    as GPT-2 does, or by one of SPLITS, after normalization to NFC. `tokenization.from_dict` checks the result.
    """
    never_encoded = {END_OF_TEXT, *special}
    tokens = {END_OF_TEXT: vocab[END_OF_TEXT], **added} if END_OF_TEXT in vocab else dict(added)
    ordered = sorted(tokens.items(), key=lambda item: item[1] if type(item[1]) is int else -1)
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    values = _byte_level_json(vocab, [line.split(" ") for line in lines])
    values["added_tokens"] = [_added_token(text, i, special=text in never_encoded) for text, i in ordered]
    if split:
        cut = {"type": "Split", "pattern": {"Regex": SPLITS[split]}, "behavior": "Isolated", "invert": False}
        steps = [cut, BYTE_LEVEL | {"use_regex": False}]
        values |= {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    return from_tokenizers_json(values)


def _added_token(text: str, i: int, *, special: bool) -> Json:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": text, **plain, "special": special}


def _char_json(chars: list[str]) -> Json:
    # The library requires a name for unknown tokens. A name outside the vocabulary makes them an error, not a silent gap.
    model = {"type": "WordLevel", "vocab": {char: i for i, char in enumerate(chars)}, "unk_token": "<unk>"}
    return _tokenizer_json(model, before=EACH_CHARACTER, decoder={"type": "Fuse"})


def _byte_level_json(vocab: dict[str, int], merges: list[list[str]]) -> Json:
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    return _tokenizer_json(model, before=BYTE_LEVEL, decoder=BYTE_LEVEL)


def _gpt2_json() -> Json:
    vocab = json.loads(gpt2_file("encoder.json"))
    lines = gpt2_file("vocab.bpe").decode("utf-8").split("\n")[1:-1]  # without the version and the end of the last line
    special = _added_token(END_OF_TEXT, Gpt2Tokenizer.end_of_text, special=True)
    return _byte_level_json(vocab, [line.split(" ") for line in lines]) | {"added_tokens": [special]}


def _tokenizer_json(model: Json, *, before: Json, decoder: Json) -> Json:
    """Return the library's file without the steps that change text."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": copy.deepcopy(before),
        "post_processor": None,
        "decoder": dict(decoder),
        "model": model,
    }


def _without_traces(values: Mapping[str, Any]) -> Json:
    """Return `values` without what transformers leaves when it saves any tokenizer, and what changes no id of a text.

    That is a template that adds no token, and the truncation and padding of the last call.
    """
    plain = {**values, "truncation": None, "padding": None}
    return plain | {"post_processor": None} if adds_nothing(values.get("post_processor")) else plain


def _is_char(values: Json) -> bool:
    chars = _tokens_by_id(values)
    return all(len(char) == 1 for char in chars) and bool(chars) and values == _char_json(chars)


def _is_gpt2(values: Json) -> bool:
    """Whether `values` has GPT-2's tokens and merges, and no step around them that would change the ids of a text."""
    if _content_digest(values) != GPT2_DIGEST:
        return False
    try:
        check_bpe(values)
    except ValueError:
        return False
    plain = splits_as_gpt2(values) and tokens_before(values.get("post_processor")) == []
    return plain and {token["content"] for token in values["added_tokens"]} <= {END_OF_TEXT}


def _content_digest(values: Json) -> str | None:
    """Return the sha256 of the tokens in id order and of the merges, in hex; None if they are malformed.

    Older files write a merge as one string, newer files as a pair.
    """
    tokens = _tokens_by_id(values)
    merges = values["model"].get("merges") if tokens else None
    if not isinstance(merges, list) or [values["model"]["vocab"][token] for token in tokens] != list(
        range(len(tokens))
    ):
        return None
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if not all(isinstance(pair, list) and all(isinstance(part, str) for part in pair) for pair in pairs):
        return None
    return hashlib.sha256(json.dumps([tokens, pairs], separators=(",", ":")).encode()).hexdigest()


def _tokens_by_id(values: Json) -> list[str]:
    """Return the tokens of the model's vocabulary in id order; empty if it is not a vocabulary."""
    model = values.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or any(type(i) is not int for i in vocab.values()):
        return []
    return sorted(vocab, key=vocab.__getitem__)
