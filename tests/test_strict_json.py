"""milepost/ckpt/strict_json.py: JSON as the json module reads it, but strict, and a tokenizer that comes again not parsed again."""

import json
import shutil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import save

from milepost import ckpt
from milepost.ckpt import CheckpointError, strict_json

MANY = 20_000  # characters of an alphabet: its JSON is longer than strict_json.LARGE
ALPHABET = [chr(code) for code in range(0x4E00, 0x4E00 + MANY)]
LARGE = {"kind": "char", "chars": ALPHABET, "tokenizer": {"inner": ["tokenizer", 1.5, None, "\ud800"]}}
OTHER = LARGE | {"chars": ALPHABET[::-1]}


def text(values: Any, **options: Any) -> bytes:
    return json.dumps(values, **options).encode(errors="surrogatepass")


@pytest.fixture
def names(monkeypatch) -> list[int]:
    """The number of names in each object that is parsed."""
    counted: list[int] = []
    plain = strict_json._object

    def counting(pairs, **options):
        counted.append(len(pairs))
        return plain(pairs, **options)

    monkeypatch.setattr(strict_json, "_object", counting)
    monkeypatch.setattr(strict_json, "_last", strict_json._Known(b"", None))
    return counted


WAYS = {
    "as in an archive": {"sort_keys": True},
    "as in a manifest": {"indent": 2, "ensure_ascii": False},
}
VALUES = {
    "a checkpoint's": {"step": 3, "tokenizer": LARGE, "tokenizer_sha256": "ab"},
    "a manifest's": {"metadata": {"tokenizer": LARGE, "step": 3}, "files": {}},
    "another's": {"tokenizer": OTHER},
    "first and last": {"tokenizer": LARGE, "more": {"tokenizer": LARGE}},
    "in a list": {"a": [{"tokenizer": LARGE}, LARGE, "tokenizer"]},
    "no object": {"tokenizer": ALPHABET, "step": 1},
    "a name with a quote": {'x"tokenizer': LARGE, "step": 2},
    "a text of JSON": {"text": json.dumps({"tokenizer": LARGE}), "tokenizer": LARGE},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("values", VALUES)
def test_whatever_was_parsed_before_values_are_those_of_the_json_module(values, way):
    for before in ({"tokenizer": LARGE}, {"tokenizer": OTHER}, VALUES[values]):
        strict_json.loads(text(before, **WAYS[way]))
        data = text(VALUES[values], **WAYS[way])
        assert strict_json.loads(data) == json.loads(data)


BROKEN = {
    "cut short": lambda data: data[:-1],
    "within the tokenizer": lambda data: data[: len(data) // 2],
    "more behind it": lambda data: data + b"}",
    "a name twice": lambda data: data[:-1] + b', "tokenizer": 1}',
    "a constant that JSON lacks": lambda data: data[:-1] + b', "loss": NaN}',
    "not UTF-8": lambda data: data[:-1] + b', "loss": "\xff"}',
    "letters behind the tokenizer": lambda data: data[:-1] + b"x}",
    "a name in a text": lambda data: b'{"x": "a' + data[1:],
    "a colon too many": lambda data: data.replace(b'"tokenizer": {', b'"tokenizer": : {', 1),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_broken_is_refused_with_the_same_words_the_second_time(how, names):
    data = text({"step": 3, "tokenizer": LARGE}, sort_keys=True)
    found = []
    for known in (False, True):
        if known:
            strict_json.loads(data)
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (several kinds)
            strict_json.loads(BROKEN[how](data))
        found.append((type(caught.value), str(caught.value)))
    assert found[0] == found[1]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["tokenizer", '"tokenizer": {']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9) | st.just("tokenizer"), inner, max_size=3),
    max_leaves=9,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(plain, st.sampled_from([LARGE, OTHER]), st.booleans())
def test_any_values_around_a_tokenizer(around, tokenizer, indented):
    data = text({"a": around, "tokenizer": tokenizer, "z": around}, indent=2 if indented else None)
    assert strict_json.loads(data) == json.loads(data)


@pytest.mark.parametrize("layout", ["unified", "stepfiles"])
def test_a_list_parses_the_tokenizer_of_a_run_once(tmp_path, monkeypatch, names, layout):
    one, other = ({"kind": "odd", "vocab": {f"{word} {n}": n for n in range(9_000)}} for word in ("one", "other"))
    for step in range(1, 5):
        save(tmp_path / "saved", step, layout=layout, tokenizer=one, tokenizer_sha256=None)
    save(tmp_path / "saved", 5, layout=layout, tokenizer=other, tokenizer_sha256=None)
    shutil.copytree(tmp_path / "saved", tmp_path / "copied")  # which no listing has seen
    monkeypatch.setattr(strict_json, "_last", strict_json._Known(b"", None))
    names.clear()
    found = ckpt.find(tmp_path / "copied")
    assert [each.step for each in found] == [1, 2, 3, 4, 5]
    assert 18_000 < sum(names) < 18_000 + 200 * len(found)  # each tokenizer once
    assert [ckpt.load(each.path).tokenizer for each in found] == [one] * 4 + [other]


def test_a_repeated_name_in_a_tokenizer_that_comes_again_is_found(tmp_path):
    data = text({"tokenizer": LARGE})[:-2] + b', "kind": "bpe"}}'
    for _ in range(2):
        with pytest.raises(ValueError, match="a name is repeated"):
            strict_json.loads(data)
    with pytest.raises(CheckpointError, match="a name is repeated"):
        ckpt.manifest.parse_json(data, tmp_path)
