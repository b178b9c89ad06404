"""Text from ids that arrive one by one: whole characters, and no part of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenization import TOKENIZERS

from milepost.generation.stream import StreamDecoder
from milepost.text.tokenization import ByteTokenizer, Tokenizer


def cut_at_stop(text: str, stops: list[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


few_letters = st.text(st.sampled_from("ab\né😀"), max_size=25)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=few_letters, stops=st.lists(st.text(st.sampled_from("ab\né😀"), min_size=1, max_size=4), max_size=3))
def test_streamed_text_is_the_decoded_text_up_to_the_first_stop(kind: str, text: str, stops: list[str]) -> None:
    check_stream(TOKENIZERS[kind], TOKENIZERS[kind].encode(text), stops)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_streaming_any_ids_equals_decoding_them(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stops = data.draw(st.lists(st.text(min_size=1, max_size=2) | st.just("\ufffd"), max_size=2))
    check_stream(tokenizer, ids, stops)


def check_stream(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> None:
    decoder = StreamDecoder(tokenizer, stops)
    expected = cut_at_stop(tokenizer.decode(ids), stops)
    shown = ""
    for i in ids:
        shown += decoder.push(i)
        assert expected.startswith(shown)
    shown += decoder.flush()
    assert shown == expected
    assert decoder.stopped == any(stop in tokenizer.decode(ids) for stop in stops)
    assert (decoder.push(ids[0]) if decoder.stopped else "") + decoder.flush() == ""


def test_text_is_shown_as_early_as_it_can_be() -> None:
    decoder = StreamDecoder(ByteTokenizer(), ["END"])
    shown = [decoder.push(byte) for byte in "é E ENx END more".encode()]
    assert shown == ["", "é", " ", "", "E ", "", "", "ENx", " ", "", "", "", "", "", "", "", ""]
    assert decoder.stopped


def test_half_a_character_at_the_end_is_flushed() -> None:
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(0x61), decoder.push(0xF0), decoder.push(0x9F), decoder.flush()] == ["a", "", "", "\ufffd"]
    assert not decoder.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop string is empty"):
        StreamDecoder(ByteTokenizer(), ["", "x"])
