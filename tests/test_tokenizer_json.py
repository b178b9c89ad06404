"""tokenizer.json as `tokenizers` and `transformers` open it: the same ids, the same text, and the way back."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drive import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Theirs
from transformers import AutoTokenizer, GPT2Config, GPT2Tokenizer, PreTrainedTokenizerFast

from milepost.text import tokenization
from milepost.text.registry import TOKENIZERS
from milepost.text.tokenization import END_OF_TEXT, Tokenizer, UnknownCharacters, from_dict
from milepost.text.tokenization.base import edge
from milepost.text.tokenization.gpt2 import gpt2_file
from milepost.text.tokenizer_json import GPT2_DIGEST, from_tokenizers_json, tokenizer_config, tokenizers_json

BUNDLED = (ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8")
TRICKY = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\n",
    "one\r\ntwo\rthree\n\r\n",
    "\ttabs\t\tand\x0bothers\x0c\x1c\x85\u2028\u2029",
    "e\u0301 n\u0303 \u0301at the start",
    "\uff76\uff9e\uff70 \uff21\uff22\uff23 \u30ac\uff5e",
    "😀 👩\u200d👩\u200d👧 🏳️\u200d🌈 👍🏽",
    "don't , . ! can 't  n't",
    "\x00\x01\x7f\ufeff\ufffd\U0010ffff",
    "Dear Wren,\u00a0I\u3000can't…",
]
ALPHABET = sorted({*BUNDLED, *"".join(TRICKY)})


@functools.cache
def ours(kind: str) -> Tokenizer:
    return tokenization.build(kind, [(BUNDLED, True)], alphabet="".join(ALPHABET), documents=1, vocab_size=600)


def write_folder(folder: Path, tokenizer: Tokenizer) -> Path:
    """Write the files by which transformers finds a folder's tokenizer."""
    folder.mkdir()
    files = {
        "config.json": GPT2Config(vocab_size=tokenizer.vocab_size).to_dict(),
        "tokenizer.json": tokenizers_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer) | {"model_max_length": 64},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_folder(top / kind, ours(kind)) for kind in TOKENIZERS}


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[str, Any]:
    """By library and kind: something with `encode(text) -> ids` and `decode(ids) -> text`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
        return {
            (name, kind): opened(name, folder)
            for kind, folder in folders.items()
            for name in ("tokenizers", "PreTrainedTokenizerFast", "AutoTokenizer")
        }


def opened(name: str, folder: Path) -> Any:
    if name == "AutoTokenizer":
        return AutoTokenizer.from_pretrained(folder)
    if name == "PreTrainedTokenizerFast":
        return PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False
        )
    return Theirs.from_file(str(folder / "tokenizer.json"))


def ids_of(their: Any, text: str) -> list[int]:
    encoded = their.encode(text)
    return encoded if isinstance(encoded, list) else encoded.ids


def check_same(their: Any, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids_of(their, text) == tokenizer.encode_whole(text)
    assert their.decode(ids) == text
    assert tokenizer.decode(ids) == (tokenizer.prefix if text else "") + text


LIBRARIES = ("tokenizers", "PreTrainedTokenizerFast", "AutoTokenizer")
each_library = pytest.mark.parametrize("library", LIBRARIES)
each_kind = pytest.mark.parametrize("kind", TOKENIZERS)


# The same ids and the same text


@each_library
@each_kind
def test_the_bundled_text_gets_the_same_ids(theirs: dict[str, Any], library: str, kind: str) -> None:
    check_same(theirs[library, kind], ours(kind), BUNDLED)


@each_library
@each_kind
def test_tricky_texts_get_the_same_ids(theirs: dict[str, Any], library: str, kind: str) -> None:
    for text in TRICKY:
        check_same(theirs[library, kind], ours(kind), text)


@each_kind
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from(ALPHABET)) | st.lists(st.sampled_from([*TRICKY, "the", " "])).map("".join))
def test_any_text_of_the_vocabulary_gets_the_same_ids(theirs: dict[str, Any], kind: str, text: str) -> None:
    for library in LIBRARIES:
        check_same(theirs[library, kind], ours(kind), text)


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2"])
@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_at_all_gets_the_same_ids_where_bytes_are_tokens(theirs: dict[str, Any], kind: str, text: str) -> None:
    for library in LIBRARIES:
        check_same(theirs[library, kind], ours(kind), text)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 255)))
def test_ids_of_invalid_utf8_decode_alike(theirs: dict[str, Any], ids: list[int]) -> None:
    """A model in training generates incomplete characters."""
    for library in LIBRARIES:
        assert theirs[library, "byte"].decode(ids) == ours("byte").decode(ids)


@settings(max_examples=50, deadline=None)
@given(alphabet=st.sets(st.characters(exclude_categories=["Cs"]), min_size=1), data=st.data())
def test_every_alphabet_gets_the_same_ids(alphabet: set[str], data: st.DataObject) -> None:
    tokenizer = tokenization.CharTokenizer(sorted(alphabet))
    text = data.draw(st.text(st.sampled_from(sorted(alphabet))))
    values = json.loads(json.dumps(tokenizers_json(tokenizer)))
    check_same(Theirs.from_str(json.dumps(values)), tokenizer, text)
    assert from_tokenizers_json(values) == tokenizer.to_dict()


def test_control_another_pre_tokenizer_would_be_seen() -> None:
    """Negative control: Split by a regex whose `.` leaves out line ends, and a byte-level that adds a space."""
    values = tokenizers_json(ours("char"))
    values["pre_tokenizer"]["pattern"] = {"Regex": "."}
    with pytest.raises(Exception, match="Missing \\[UNK\\]"):
        check_same(Theirs.from_str(json.dumps(values)), ours("char"), "a\n\nb")
    values = tokenizers_json(ours("byte"))
    values["pre_tokenizer"]["add_prefix_space"] = True
    with pytest.raises(AssertionError):
        check_same(Theirs.from_str(json.dumps(values)), ours("byte"), "ab")
    values = tokenizers_json(ours("char"))
    values["decoder"] = None
    with pytest.raises(AssertionError):
        check_same(Theirs.from_str(json.dumps(values)), ours("char"), "ab")


# transformers on the folder


@each_kind
def test_transformers_adds_no_token_of_its_own(theirs: dict[str, Any], kind: str) -> None:
    tokenizer, auto = ours(kind), theirs["AutoTokenizer", kind]
    assert len(auto) == auto.vocab_size == tokenizer.vocab_size
    assert sorted(auto.get_vocab().values()) == list(range(tokenizer.vocab_size))
    assert (auto.bos_token_id, auto.eos_token_id) == (edge(tokenizer), tokenizer.end_of_text)
    assert (auto.unk_token, auto.pad_token) == (None, None)
    assert auto.model_max_length == 64


@each_library
def test_unknown_characters_are_an_error_in_both(theirs: dict[str, Any], library: str) -> None:
    with pytest.raises(UnknownCharacters):
        ours("char").encode("a\u0416b")
    with pytest.raises(Exception, match=r"WordLevel error: Missing \[UNK\] token"):
        theirs[library, "char"].encode("a\u0416b")


@pytest.mark.parametrize(("kind", "end_of_text"), [("bpe", 0), ("gpt2", 50256)])
def test_the_end_of_text_is_special_to_them_by_default(
    theirs: dict[str, Any], folders: dict[str, Path], kind: str, end_of_text: int
) -> None:
    text = f"a{END_OF_TEXT}b"
    assert end_of_text not in ours(kind).encode(text)
    for library in LIBRARIES:
        assert ids_of(theirs[library, kind], text) == [*ours(kind).encode("a"), end_of_text, *ours(kind).encode("b")]
    check_same(AutoTokenizer.from_pretrained(folders[kind], split_special_tokens=True), ours(kind), text)


# Reading back


@each_kind
def test_reading_back_gives_the_same_tokenizer(kind: str) -> None:
    values = json.loads(json.dumps(tokenizers_json(ours(kind))))
    assert from_tokenizers_json(values) == ours(kind).to_dict()
    assert from_dict(from_tokenizers_json(values)).digest == ours(kind).digest


@each_kind
def test_a_tokenizer_saved_again_by_transformers_is_recognised(
    theirs: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    theirs["AutoTokenizer", kind].save_pretrained(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert values["post_processor"]["type"] == "TemplateProcessing"  # what it adds, and what makes this test one
    assert from_tokenizers_json(values) == ours(kind).to_dict()


@each_kind
def test_truncation_and_padding_of_the_last_call_are_left_out(kind: str) -> None:
    """transformers saves them with the tokenizer; they cut and fill, and change no id of a text."""
    cut = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    fill = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    values = tokenizers_json(ours(kind)) | {"truncation": cut, "padding": fill}
    assert from_tokenizers_json(values) == ours(kind).to_dict()


@pytest.mark.parametrize("merges", ["pairs", "strings"])
def test_gpt2_is_recognised_by_content(tmp_path: Path, merges: str) -> None:
    lines = gpt2_file("vocab.bpe").decode("utf-8").splitlines()[1:]
    vocab = json.loads(gpt2_file("encoder.json"))
    GPT2Tokenizer(vocab=vocab, merges=[tuple(line.split()) for line in lines]).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    if merges == "strings":  # as the file that was published for GPT-2 has them
        values["model"]["merges"] = lines
    assert values != tokenizers_json(ours("gpt2"))
    assert from_tokenizers_json(values) == {"kind": "gpt2"}
    assert len(GPT2_DIGEST) == 64


OTHERS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "gpt2 with two merges exchanged": ("gpt2", lambda t: t["model"]["merges"].insert(0, t["model"]["merges"].pop())),
    "gpt2 with two ids exchanged": ("gpt2", lambda t: t["model"]["vocab"].update({"!": 1, '"': 0})),
    "gpt2 with a token more": (
        "gpt2",
        lambda t: t["added_tokens"].append({**t["added_tokens"][0], "content": "<pad>", "id": 50257}),
    ),
    "gpt2 in lower case": ("gpt2", lambda t: t.update(normalizer={"type": "Lowercase"})),
    "gpt2 with a space before": ("gpt2", lambda t: t["pre_tokenizer"].update(add_prefix_space=True)),
    "gpt2 with odd merges": ("gpt2", lambda t: t["model"]["merges"].append({})),
    "byte with two ids exchanged": ("byte", lambda t: t["model"]["vocab"].update({"a": 98, "b": 97})),
    "byte with a merge": (
        "byte",
        lambda t: (t["model"]["vocab"].update(ab=256), t["model"]["merges"].append(["a", "b"])),
    ),
    "char with a gap": ("char", lambda t: t["model"]["vocab"].pop("a")),
    "char with one id twice": ("char", lambda t: t["model"]["vocab"].update(a=t["model"]["vocab"]["b"])),
    "char with an unknown token": ("char", lambda t: t["model"].update(unk_token="a")),
    "char with a word": ("char", lambda t: t["model"]["vocab"].update(ab=len(ALPHABET))),
    "char with an id that is none": ("char", lambda t: t["model"]["vocab"].update(a="1")),
    "char in lower case": ("char", lambda t: t.update(normalizer={"type": "Lowercase"})),
    "char without characters": ("char", lambda t: t["model"].update(vocab={})),
    "char without a model": ("char", lambda t: t.update(model=None)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_different_tokenizer_is_not_recognised_as_ours(name: str) -> None:
    kind, change = OTHERS[name]
    values = copy.deepcopy(tokenizers_json(ours(kind)))
    change(values)
    assert from_tokenizers_json(values) == {"kind": "bpe", "tokenizer": values}
    if kind == "char":
        with pytest.raises(ValueError, match=r"^the tokenizer is not a byte-level BPE: model.type must be BPE$"):
            from_dict(from_tokenizers_json(values))


def test_half_a_character_as_a_token_is_refused_when_it_is_built() -> None:
    values = tokenizers_json(ours("char"))
    values["model"]["vocab"] = {"\ud800": 0, "a": 1}
    with pytest.raises(ValueError, match="surrogates"):
        from_dict(from_tokenizers_json(json.loads(json.dumps(values))))


def test_the_returned_json_is_a_copy() -> None:
    for kind in TOKENIZERS:
        first = tokenizers_json(ours(kind))
        first["model"]["vocab"].clear()
        before = first["pre_tokenizer"] or {}
        before.get("pattern", {}).clear()
        before.clear()
        assert (tokenizers_json(ours(kind))["pre_tokenizer"] or {}).get("pattern") != {}
        assert len(tokenizers_json(ours(kind))["model"]["vocab"]) == ours(kind).vocab_size
