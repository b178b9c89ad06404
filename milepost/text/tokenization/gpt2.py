"""GPT-2's own tokenizer, through tiktoken, without a network."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from milepost.lazy import np
from milepost.text.errors import DataError
from milepost.text.tokenization.base import END_OF_TEXT, FixedTokenizer, byte_letters, checked_ids, replace_surrogates

GPT2_FILES = {  # name: sha256, as tiktoken_ext/openai_public.py publishes them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# OpenAI's own file, with its license beside it.
VOCAB_BPE = Path(__file__).resolve().parents[1] / "gpt2" / "vocab.bpe.gz"


class Gpt2Tokenizer(FixedTokenizer):
    """GPT-2's own 50,257 tokens, through tiktoken."""

    kind = "gpt2"
    vocab_size = 50257
    end_of_text = 50256
    splits_at = "word"

    def __init__(self) -> None:
        self._encoding = gpt2_encoding()

    def encode_array(self, text: str) -> np.ndarray:
        # encode_ordinary returns a list of Python integers, which costs a sixth of the time.
        encode = functools.partial(self._encoding.encode_to_numpy, disallowed_special=())
        return np.concatenate([encode(part) for part in _bounded(replace_surrogates(text))])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(checked_ids(ids, self.vocab_size))


# tiktoken's regex engine panics after a million backtracking steps, and whitespace before a word costs one step per character.
# Cutting before the last whitespace character gives the same tokens: `\s+(?!\S)` leaves that character to the word anyway.
_BACKTRACK_LIMIT = 500_000
_LONG_WHITESPACE = re.compile(r"\s{100000,}(?=\s\S)")


def _bounded(text: str) -> Iterator[str]:
    """Yield the text, cut where a run of whitespace would be too long for tiktoken."""
    start = 0
    if len(text) >= _BACKTRACK_LIMIT:
        for run in _LONG_WHITESPACE.finditer(text):
            yield text[start : run.end()]
            start = run.end()
    yield text[start:]


# GPT-2's vocabulary


@functools.cache
def gpt2_encoding() -> Any:
    """Return tiktoken's `gpt2` encoding, built without a network. Raise DataError if this project's copy of its merges is damaged."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=Gpt2Tokenizer.vocab_size,
        pat_str=r50k_pat_str,
        mergeable_ranks=_gpt2_ranks(gpt2_file("vocab.bpe").decode("utf-8")),
        special_tokens={END_OF_TEXT: Gpt2Tokenizer.end_of_text},
    )


def _gpt2_ranks(merges: str) -> dict[bytes, int]:
    """Return the id of each token's bytes, equal to tiktoken's `data_gym_to_mergeable_bpe_ranks`, in a quarter of its time."""
    to_bytes = str.maketrans({letter: chr(byte) for byte, letter in enumerate(byte_letters())})
    return {token.translate(to_bytes).encode("latin-1"): i for i, token in enumerate(_tokens(merges))}


def _tokens(merges: str) -> list[str]:
    """Return the tokens by id, in GPT-2's letters: the 256 bytes in the order of their letters, then the merges in file order."""
    lines = merges.split("\n")[1:-1]  # between the version and the last line's end
    return [*sorted(byte_letters()), *(line.replace(" ", "") for line in lines)]


def gpt2_file(name: str) -> bytes:
    """Return `vocab.bpe` or `encoder.json` as published. Raise DataError if the copy of this project is not that file."""
    try:
        merges = gzip.decompress(VOCAB_BPE.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{VOCAB_BPE} cannot be read ({error}): install milepost again") from None
    data = merges if name == "vocab.bpe" else _encoder_json(merges.decode("utf-8", "replace"))
    if hashlib.sha256(data).hexdigest() != GPT2_FILES[name]:
        raise DataError(f"{VOCAB_BPE} is not the file that OpenAI published: install milepost again")
    return data


def _encoder_json(merges: str) -> bytes:
    """Return the bytes of GPT-2's encoder.json, which follows from the merges."""
    tokens = [*_tokens(merges), END_OF_TEXT]
    return json.dumps({token: i for i, token in enumerate(tokens)}).encode()
