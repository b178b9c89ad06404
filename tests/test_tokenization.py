import copy
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from work import calls

from milepost.text.chunks import rechunk
from milepost.text.errors import DataError
from milepost.text.registry import TOKENIZERS as TOKENIZERS_BY_NAME
from milepost.text.tokenization import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
    UnknownCharacters,
    build,
    choose,
    from_dict,
    tokenizer_class,
)
from milepost.text.tokenization import bpe as bpe_module
from milepost.text.tokenization import gpt2 as gpt2_module
from milepost.text.tokenization.base import END_OF_TEXT, REQUIRED

ROOT = Path(__file__).parent.parent
LETTERS = "Dear Wren, I can't say — we've tried 12 times… “what”\n\n\tshe'd ask.  Nothing 日本 é\r\n"
# Characters that GPT-2's regex treats differently, and on whose whitespace property Python and Rust differ.
TRICKY = " \n\t\r\v\f\x1c\x1d\x1e\x1f\x85\u00a0\u1680\u2003\u2028\u3000\u200b'sdtmlverSx1²Ⅳ.,!é中\u0301😀<|endoftext>"
tricky_text = st.lists(st.sampled_from([*TRICKY, *"   \n\n", "'re", "'ll", "<|endoftext|>", "the"])).map("".join)


def trained(vocab_size: int = 400) -> Tokenizer:
    return build("bpe", [(LETTERS * 20, True)], alphabet="", documents=1, vocab_size=vocab_size)


BPE = trained()
TOKENIZERS: dict[str, Tokenizer] = {"byte": ByteTokenizer(), "bpe": BPE, "gpt2": Gpt2Tokenizer()}
MERGING = {kind: TOKENIZERS[kind] for kind in ("bpe", "gpt2")}


# Round trips


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.encode_array(text).tolist() == ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=st.text() | tricky_text)
def test_every_text_survives_a_round_trip(kind: str, text: str) -> None:
    check_round_trip(TOKENIZERS[kind], text)


@settings(max_examples=100, deadline=None)
@given(alphabet=st.sets(st.characters(exclude_categories=["Cs"]), min_size=1), data=st.data())
def test_every_text_over_its_alphabet_survives_a_char_tokenizer(alphabet: set[str], data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from(sorted(alphabet))))
    tokenizer = build("char", [], alphabet="".join(sorted(alphabet)), documents=1, vocab_size=0)
    check_round_trip(tokenizer, text)
    again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.to_dict() == tokenizer.to_dict()
    assert again.encode(text) == tokenizer.encode(text) == [sorted(alphabet).index(char) for char in text]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=50, deadline=None)
@given(text=st.text() | tricky_text)
def test_a_tokenizer_survives_json(kind: str, text: str) -> None:
    again = REBUILT[kind]
    assert again.encode(text) == TOKENIZERS[kind].encode(text)


def test_a_tokenizer_rebuilt_from_json_is_equal() -> None:
    for kind, again in REBUILT.items():
        tokenizer = TOKENIZERS[kind]
        assert again.to_dict() == tokenizer.to_dict()
        assert (again.kind, again.digest) == (kind, tokenizer.digest)
        assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert (
        len({tokenizer.digest for tokenizer in (*TOKENIZERS.values(), CharTokenizer("ab"), CharTokenizer("ba"))}) == 5
    )


REBUILT = {kind: from_dict(json.loads(json.dumps(tokenizer.to_dict()))) for kind, tokenizer in TOKENIZERS.items()}


def test_digests_are_those_of_the_canonical_json() -> None:
    assert ByteTokenizer().digest == hashlib.sha256(b'{"kind":"byte"}').hexdigest()
    assert CharTokenizer("é\n").digest == hashlib.sha256(b'{"chars":["\\u00e9","\\n"],"kind":"char"}').hexdigest()


def test_a_saved_dictionary_is_a_copy() -> None:
    before = BPE.digest
    BPE.to_dict()["tokenizer"]["model"]["vocab"].clear()
    assert BPE.digest == before


def test_arrays_are_unsigned_and_fit_the_vocabulary() -> None:
    for tokenizer in (CharTokenizer("ab"), *TOKENIZERS.values()):
        array = tokenizer.encode_array("ab")
        assert array.dtype.kind == "u"
        assert np.iinfo(array.dtype).max >= tokenizer.vocab_size - 1
        assert tokenizer.encode_array("").shape == (0,)


# Char and byte


def test_unknown_characters_are_all_named() -> None:
    tokenizer = CharTokenizer("abc \n")
    with pytest.raises(UnknownCharacters) as caught:
        tokenizer.encode("a 😀b\u0301éé")
    assert caught.value.characters == "é\u0301😀"
    assert "'é' (U+00E9)" in str(caught.value)
    assert str(caught.value).endswith("'😀' (U+1F600): not in the vocabulary of 5 characters")
    with pytest.raises(UnknownCharacters, match=r"'9' \(U\+0039\) and 2 more: not in"):
        tokenizer.encode("a0123456789xy")
    with pytest.raises(UnknownCharacters, match="U\\+DCFF"):
        tokenizer.encode("a\udcff")  # what a byte that is no UTF-8 becomes in the environment


def test_bytes_are_their_own_ids() -> None:
    assert ByteTokenizer().encode("é!") == [0xC3, 0xA9, 0x21]
    assert ByteTokenizer().decode([0xC3, 0x21]) == "\ufffd!"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_half_surrogates_become_replacement_characters(kind: str) -> None:
    assert TOKENIZERS[kind].decode(TOKENIZERS[kind].encode("a\udcffb😀")) == "a\ufffdb😀"


@pytest.mark.parametrize("tokenizer", [CharTokenizer("ab"), *TOKENIZERS.values()])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for i in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token {i} is outside the vocabulary of {tokenizer.vocab_size} tokens"):
            tokenizer.decode([i])


# BPE


def test_bpe_merges_frequent_pairs_and_has_the_requested_size() -> None:
    tokenizer = build("bpe", [("the " * 9, True)], alphabet="", documents=1, vocab_size=260)
    assert tokenizer.vocab_size == 260
    assert [tokenizer.decode([i]) for i in tokenizer.encode("the the")] == ["the", " the"]
    assert tokenizer.end_of_text == 0
    assert tokenizer.decode([0]) == "<|endoftext|>"
    assert tokenizer.encode("a<|endoftext|>b").count(0) == 0


@pytest.mark.parametrize("size", [1, 7, 50])
def test_the_same_text_trains_the_same_bpe_in_chunks_of_any_size(size: int) -> None:
    text = LETTERS * 20
    pieces = [(text[i : i + size], i + size >= len(text)) for i in range(0, len(text), size)]
    assert build("bpe", pieces, alphabet="", documents=1, vocab_size=400).to_dict() == BPE.to_dict()


def test_training_gives_the_same_bpe_in_every_process() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from milepost.text.tokenization import build\n"
        f"print(build('bpe', [({LETTERS * 20!r}, True)], alphabet='', documents=1, vocab_size=400).digest)"
    )
    for variables in ({"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1"}, {"PYTHONHASHSEED": "2"}):
        command = [sys.executable, "-c", code, str(ROOT)]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == BPE.digest


def test_bpe_reads_only_so_much_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe_module, "BPE_TRAINING_CHARACTERS", len(LETTERS) * 20)

    def endless() -> Any:
        yield LETTERS * 19, False
        while True:
            yield LETTERS + "zzzz " * 100, False

    assert build("bpe", endless(), alphabet="", documents=1, vocab_size=400).digest == BPE.digest


def bpe_with(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    saved = copy.deepcopy(BPE.to_dict())
    change(saved["tokenizer"])
    return saved


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


MERGED = "".join(BPE.to_dict()["tokenizer"]["model"]["merges"][-1])


def special(content: str, i: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": i, "content": content, **flags}


def name_of_last(tokenizer: dict[str, Any]) -> str:
    return max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)


def template(*single: str) -> dict[str, Any]:
    """A template of texts without special tokens; transformers writes the one with ("A",) whenever it saves."""
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    parts = [{"Sequence": {"id": name, "type_id": 0}} for name in single]
    return {"type": "TemplateProcessing", "single": parts, "pair": [first, second], "special_tokens": {}}


INVALID: dict[str, Callable[[dict[str, Any]], object]] = {
    "exactly 0 to": lambda t: t["model"]["vocab"].update({"!": 2}),
    "ids are not": lambda t: t["model"]["vocab"].update({"!": 4_000_000_000}),
    f"exactly 0 to {BPE.vocab_size}": lambda t: t["model"]["vocab"].update({"!!!!": BPE.vocab_size + 1}),
    "exactly": lambda t: t["model"]["vocab"].update({"!": True}),
    "lacks some of the 256 bytes": lambda t: t["model"]["vocab"].update({"!!!!": t["model"]["vocab"].pop("!")}),
    "GPT-2's byte letters": lambda t: t["model"]["vocab"].update({"日": BPE.vocab_size}),
    "two ids": lambda t: t["added_tokens"][0].update(id=7),
    "special tokens": lambda t: t["added_tokens"][0].update(special=False),
    "words without whitespace or strip flags$": lambda t: t["added_tokens"].append(
        special("<a>", BPE.vocab_size) | {"special": False, "lstrip": True}
    ),
    "or words without whitespace": lambda t: t["added_tokens"].append(
        special("two words", BPE.vocab_size) | {"special": False}
    ),
    "an object": lambda t: t["model"].update(vocab=[]),
    "model.type": lambda t: t["model"].update(type="WordPiece"),
    "model.dropout": lambda t: t["model"].update(dropout=0.1),
    "prefix or suffix": lambda t: t["model"].update(end_of_word_suffix="</w>"),
    "normalizer": lambda t: t.update(normalizer={"type": "Lowercase"}),
    "truncation": lambda t: t.update(truncation={"max_length": 3}),
    "pre_tokenizer": lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
    "GPT-2's regex": lambda t: t["pre_tokenizer"].update(use_regex=False),
    "post_processor": lambda t: t.update(post_processor={"type": "TemplateProcessing"}),
    "post_processor must be": lambda t: t.update(post_processor=template("A", "A")),
    "'<.endoftext.>' is special and also": lambda t: t["model"].update(ignore_merges=True),
    "'Ġ' is special": lambda t: t["added_tokens"].append(special("Ġ", t["model"]["vocab"]["Ġ"])),
    f"{MERGED!r} is special and also": lambda t: t["added_tokens"].append(special(MERGED, t["model"]["vocab"][MERGED])),
    f"'<b>' the id {BPE.vocab_size + 1}, expected {BPE.vocab_size}": lambda t: t["added_tokens"].extend(
        [special("<b>", BPE.vocab_size + 1), special("<a>", BPE.vocab_size)]
    ),
    f"'<a>' the id {BPE.vocab_size - 1}, expected": lambda t: (
        t["model"]["vocab"].update({name_of_last(t): BPE.vocab_size}),
        t["added_tokens"].append(special("<a>", BPE.vocab_size - 1)),
    ),
    f"exactly 0 to {BPE.vocab_size}$": lambda t: t["added_tokens"].append(special("<a>", 5)),
    "cannot be built: data did": lambda t: t["model"].update(merges=5),
    "cannot be built:": lambda t: t["model"].update(merges=[["no", "such"]]),
    "merges are missing": lambda t: t["model"].update(merges=[]),
    "tokens of several bytes have no merge": lambda t: t["model"].update(
        merges=t["model"]["merges"][: len(t["model"]["merges"]) * 2 // 3]
    ),
    "JSON values: RecursionError": lambda t: t.update(extra=nested(100_000)),
    "JSON values: TypeError": lambda t: t.update(extra={1, 2}),
}


@pytest.mark.parametrize("expected", INVALID)
def test_an_invalid_bpe_is_refused(expected: str) -> None:
    from_dict(bpe_with(lambda tokenizer: None))  # the control
    with pytest.raises(ValueError, match=expected) as caught:
        from_dict(bpe_with(INVALID[expected]))
    assert "\n" not in str(caught.value)


def test_harmless_differences_are_accepted() -> None:
    """Controls: special tokens after the vocabulary in order, a token twice, the template of transformers."""
    more = [special("<a>", BPE.vocab_size), special("<b>", BPE.vocab_size + 1)]
    for added in (more, more + more[:1]):
        tokenizer = from_dict(bpe_with(lambda t, added=added: t["added_tokens"].extend(added)))
        assert (tokenizer.vocab_size, tokenizer.decode([BPE.vocab_size + 1])) == (BPE.vocab_size + 2, "<b>")
        assert tokenizer.encode(LETTERS) == BPE.encode(LETTERS)
    assert from_dict(bpe_with(lambda t: t.update(post_processor=template("A")))).encode(LETTERS) == BPE.encode(LETTERS)
    few = bpe_with(lambda t: t["model"]["vocab"].update({"!!!!!": BPE.vocab_size}))  # a token that no merge makes
    assert from_dict(few).encode(LETTERS) == BPE.encode(LETTERS)


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["<new>", "<n>", "<", "new>", " ", "\n", "a", "the", "é", "<|endoftext|>"])
        | st.text(max_size=3)
    )
)
def test_added_words_are_one_token_and_lose_nothing(parts: list[str]) -> None:
    """As a fine-tune adds them. The counts are the text's own, and every text round-trips."""
    added = [special(word, BPE.vocab_size + i) | {"special": False} for i, word in enumerate(("<new>", "<n>"))]
    tokenizer = from_dict(bpe_with(lambda t: t["added_tokens"].extend(added)))
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.count(BPE.vocab_size) == text.count("<new>")
    assert tokenizer.end_of_text not in ids


@pytest.mark.parametrize(
    "saved",
    [
        None,
        [],
        {},
        {"kind": "word"},
        {"kind": ["char"]},
        {"kind": "char"},
        {"kind": "char", "chars": []},
        {"kind": "char", "chars": "ab"},
        {"kind": "char", "chars": ["a", "bc"]},
        {"kind": "char", "chars": ["a", 3]},
        {"kind": "char", "chars": ["a", "b", "a"]},
        {"kind": "char", "chars": ["\ud800"]},
        {"kind": "bpe"},
        {"kind": "bpe", "tokenizer": []},
        {"kind": "bpe", "tokenizer": {"model": {"type": "BPE"}, "pre_tokenizer": 3}},
    ],
)
def test_malformed_dictionaries_are_refused(saved: Any) -> None:
    with pytest.raises(ValueError, match=r"^(unknown tokenizer kind|a char tokenizer|the tokenizer is not)"):
        from_dict(saved)


# GPT-2


def test_gpt2_gives_the_published_ids() -> None:
    tokenizer = Gpt2Tokenizer()
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert len(tokenizer.encode("First Citizen:\nBefore we proceed any further, hear me speak.\n")) == 15
    assert tokenizer.decode([50256]) == "<|endoftext|>"


def reference() -> Any:
    """GPT-2's tokenizer as another library builds it from the published files."""
    from tokenizers import Tokenizer as Other
    from tokenizers import models, pre_tokenizers

    lines = gpt2_module.gpt2_file("vocab.bpe").decode().split("\n")[1:-1]
    vocab = json.loads(gpt2_module.gpt2_file("encoder.json"))
    other = Other(models.BPE(vocab, [tuple(line.split(" ")) for line in lines]))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return other


REFERENCE = reference()


@settings(max_examples=300, deadline=None)
@given(text=st.text() | tricky_text)
def test_gpt2_agrees_with_another_library(text: str) -> None:
    assert Gpt2Tokenizer().encode(text) == REFERENCE.encode(text).ids


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters()) | tricky_text)
def test_gpt2_arrays_are_tiktokens_own_lists(text: str) -> None:
    """Lone surrogates included, which both take for U+FFFD."""
    ids = Gpt2Tokenizer().encode_array(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == gpt2_module.gpt2_encoding().encode_ordinary(text)


def test_the_ranks_are_those_of_tiktokens_own_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken's own `gpt2`, which checks its published hashes, from a cache that is filled with our two files."""
    for name, digest in gpt2_module.GPT2_FILES.items():
        data = gpt2_module.gpt2_file(name)
        assert hashlib.sha256(data).hexdigest() == digest
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/" + name
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(data)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    theirs = openai_public.gpt2()
    assert gpt2_module._gpt2_ranks(gpt2_module.gpt2_file("vocab.bpe").decode()) == theirs["mergeable_ranks"]
    assert theirs["explicit_n_vocab"] == Gpt2Tokenizer.vocab_size
    assert theirs["special_tokens"] == {END_OF_TEXT: Gpt2Tokenizer.end_of_text}


def test_very_long_whitespace_does_not_break_gpt2() -> None:
    text = "a" + " " * 1_200_000 + "b" + "\n" * 600_000 + "c"
    ids = Gpt2Tokenizer().encode(text)
    assert Gpt2Tokenizer().decode(ids) == text
    words = Gpt2Tokenizer().encode("a b c")
    assert [Gpt2Tokenizer().decode([i]) for i in ids if i in words] == ["a", " b"]
    short = "a" + " " * 1_200 + "b" + "\n" * 600 + "c"  # which the library takes whole: the control
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2_module, "_BACKTRACK_LIMIT", 0)
        patch.setattr(gpt2_module, "_LONG_WHITESPACE", re.compile(r"\s{5,}(?=\s\S)"))
        assert Gpt2Tokenizer().encode(short) == REFERENCE.encode(short).ids


def test_gpt2_hands_a_text_to_tiktoken_as_a_whole_and_never_makes_a_list_of_its_tokens() -> None:
    """Ten times the text takes no more calls, and memory only for what tiktoken returns."""
    text, tokenizer = (LETTERS * 14_000)[:1_000_000], Gpt2Tokenizer()
    made = {}
    for size in (len(text) // 100, len(text) // 10, len(text)):  # the first has what is done once
        ids, made[size] = calls(lambda size=size: tokenizer.encode_array(text[:size]))
    assert made[len(text)] <= made[len(text) // 10] + 5  # which looks for whitespace that is too long for tiktoken
    tracemalloc.start()
    tokenizer.encode_array(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * ids.nbytes


def test_gpt2_needs_neither_a_cache_nor_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    assert gpt2_module.gpt2_encoding.__wrapped__().encode_ordinary("Hello world") == [15496, 995]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["missing", "cut", "another file", "no archive"])
def test_merges_other_than_the_published_are_refused(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = gpt2_module.VOCAB_BPE.read_bytes()
    path = tmp_path / "vocab.bpe.gz"
    contents = {"cut": data[:-9], "another file": gzip.compress(b"#version: 0.2\nx y\n"), "no archive": b"x"}
    if damage != "missing":
        path.write_bytes(contents[damage])
    monkeypatch.setattr(gpt2_module, "VOCAB_BPE", path)
    for name in gpt2_module.GPT2_FILES:
        with pytest.raises(DataError, match=r"vocab\.bpe\.gz .*install milepost again"):
            gpt2_module.gpt2_file(name)


def test_importing_is_light() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import milepost.text.token_files; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    assert "milepost.text.tokenization.base" in modules.stdout.split()
    assert not {"torch", "tiktoken", "tokenizers", "requests"} & set(modules.stdout.split())


# Choosing and building


def test_auto_follows_weights_and_alphabet() -> None:
    few, many = "".join(map(chr, range(256))), "".join(map(chr, range(257)))
    assert choose("auto", alphabet=few, pretrained=False) == "char"
    assert choose("auto", alphabet=many, pretrained=False) == "bpe"
    assert choose("auto", alphabet=few, pretrained=True) == "gpt2"
    assert choose("byte", alphabet=many, pretrained=True) == "byte"


def test_building_each_kind() -> None:
    pieces = [("abc abc", True)]
    built = {
        kind: build(kind, pieces, alphabet=" abc", documents=1, vocab_size=300)
        for kind in ("char", "byte", "bpe", "gpt2")
    }
    assert {kind: type(tokenizer) for kind, tokenizer in built.items()} == {
        "char": CharTokenizer,
        "byte": ByteTokenizer,
        "bpe": BpeTokenizer,
        "gpt2": Gpt2Tokenizer,
    }
    assert built["char"].to_dict()["chars"] == [" ", "a", "b", "c"]
    several = build("char", pieces, alphabet=" abc", documents=2, vocab_size=0)
    assert several.to_dict()["chars"] == ["\n", " ", "a", "b", "c"]
    with pytest.raises(ValueError, match="'word': expected one of char, byte, bpe, gpt2"):
        build("word", pieces, alphabet="", documents=1, vocab_size=0)
    with pytest.raises(ValueError, match="256 is too small: expected at least 257"):
        build("bpe", pieces, alphabet="", documents=1, vocab_size=256)


# The registry


class Toy(Tokenizer):
    """Lacks everything."""


class Incomplete(CharTokenizer):
    """Lacks one method, as a mistaken name would leave it."""

    kind = "incomplete"
    decode_bytes = None  # type: ignore[assignment]


class Misnamed(CharTokenizer):
    """Is registered under another name than its kind."""


@pytest.mark.parametrize(
    ("cls", "named"),
    [(Toy, list(REQUIRED)), (Incomplete, ["decode_bytes"]), (Misnamed, ["'char'"])],
)
def test_an_incomplete_class_is_refused_naming_what_is_missing(
    cls: type[Tokenizer], named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOKENIZERS_BY_NAME, "incomplete", f"{__name__}:{cls.__name__}")
    with pytest.raises(TypeError) as caught:
        build("incomplete", [], alphabet="ab", documents=1, vocab_size=0)
    assert all(name in str(caught.value) for name in ["incomplete", cls.__name__, *named])


def test_every_registered_class_is_complete() -> None:
    for kind in TOKENIZERS_BY_NAME:
        assert tokenizer_class(kind).kind == kind


# Chunks


@pytest.mark.parametrize("kind", MERGING)
@settings(max_examples=400, deadline=None)
@given(text=tricky_text, size=st.integers(1, 6), first=st.integers(0, 9))
def test_chunked_tokens_are_the_tokens_of_the_whole(kind: str, text: str, size: int, first: int) -> None:
    pieces = [(part, False) for part in (text[:first], text[first:]) if part]
    chunks = [chunk for chunk, _ in rechunk(pieces, size=size)]
    assert "".join(chunks) == text
    tokenizer = MERGING[kind]
    assert [i for chunk in chunks for i in tokenizer.encode(chunk)] == tokenizer.encode(text)


def with_cuts_of(before: list[dict[str, Any]] | None, **changes: Any) -> Tokenizer:
    """BPE with another pre-tokenizer before its bytes, or other values, as other models have it."""
    values = copy.deepcopy(BPE.to_dict()["tokenizer"]) | changes
    if before is not None:
        by_regex = before[0]["type"] == "Digits"
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": by_regex}
        values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*before, last]}
    return from_dict({"kind": "bpe", "tokenizer": values})


def split_by(regex: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}]


AT_LINES = {
    "SmolLM2": with_cuts_of([{"type": "Digits", "individual_digits": True}]),
    **{name: with_cuts_of(split_by(regex)) for name, regex in bpe_module.SPLITS.items()},
    "NFC": with_cuts_of(None, normalizer={"type": "NFC"}),
    "sentencepiece": build("sentencepiece", [(LETTERS * 20, True)], alphabet="", documents=1, vocab_size=400),
}


@pytest.mark.parametrize("name", AT_LINES)
@settings(max_examples=400, deadline=None)
@given(text=tricky_text, size=st.integers(1, 6), first=st.integers(0, 9))
def test_other_tokenizers_are_cut_at_lines(name: str, text: str, size: int, first: int) -> None:
    """The ids are those of the library for the whole text."""
    tokenizer = AT_LINES[name]
    pieces = [(part, False) for part in (text[:first], text[first:]) if part]
    chunks = [chunk for chunk, _ in rechunk(pieces, size=size, at="line")]
    assert (tokenizer.splits_at, "".join(chunks)) == ("line", text)
    whole = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]
    first_part, *others = chunks or [""]
    parts = [tokenizer.encode_array(first_part), *(tokenizer.encode_part(part, after="text") for part in others)]
    assert [i for part in parts for i in part.tolist()] == whole


def test_a_text_is_cut_at_lines_after_one_line_feed_and_before_a_space() -> None:
    pieces = [(text, False) for text in ("\u4e2d\u3002\n", "\u4e2d\n\n", "a  b")]
    chunks = [chunk for chunk, _ in rechunk([*pieces, ("", True)], size=1, at="line")]
    assert chunks == ["\u4e2d\u3002\n", "\u4e2d\n\na", "  b"]


def test_a_vocabulary_with_tokens_across_words_or_lines_is_not_cut() -> None:
    values = AT_LINES["sentencepiece"].to_dict()
    for token in ("a\u2581b", "\na"):
        other = copy.deepcopy(values)
        other["tokenizer"]["model"]["vocab"][token] = len(other["tokenizer"]["model"]["vocab"])
        assert from_dict(other).splits_at == "document"


def test_cutting_anywhere_would_change_tokens() -> None:
    """The control: the property above can fail."""
    tokenizer = Gpt2Tokenizer()
    for left, right in (("a ", "b"), ("a\n", "\n\nb"), ("ab", "c"), ("don'", "t")):
        assert tokenizer.encode(left) + tokenizer.encode(right) != tokenizer.encode(left + right)


def test_chunks_are_small_where_they_can_be_and_keep_document_ends() -> None:
    text = "some words and\nlines " * 50
    chunks = list(rechunk([(text, True), ("x" * 99, False), ("y z", True), (" ", True)], size=32))
    assert max(len(chunk) for chunk, _ in chunks[:-2]) <= 64
    assert chunks[-2:] == [(("x" * 99) + "y z", True), (" ", True)]
    assert [ends for _, ends in chunks].count(True) == 3
    assert list(rechunk([("ab cd", False)], size=3)) == [("ab", False), (" cd", False)]
