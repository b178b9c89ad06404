import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenization import AT_LINES

from milepost.text import token_files as tokens_module
from milepost.text.corpus import Corpus, open_corpus
from milepost.text.errors import DataError
from milepost.text.scan import Scan, cached_scan, scan
from milepost.text.token_files import TokenSplit, prepare
from milepost.text.tokenization import ByteTokenizer, CharTokenizer, Gpt2Tokenizer, Tokenizer, UnknownCharacters, build

ROOT = Path(__file__).parent.parent
TEXT = "Dear Wren,\n\nI can't decide — “stay” or go?  It's 12 o'clock.\n" * 30
BPE = build("bpe", [(TEXT, True)], alphabet="", documents=1, vocab_size=350)
PIECES = build("sentencepiece", [(TEXT, True)], alphabet="", documents=1, vocab_size=350)
TOKENIZERS = [CharTokenizer(sorted(set(TEXT))), ByteTokenizer(), BPE, Gpt2Tokenizer(), PIECES]


def corpus_of(folder: Path, *documents: str) -> tuple[Corpus, Scan]:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    corpus = open_corpus(str(path), data_dir=folder)
    return corpus, scan(corpus)


def prepared(folder: Path, tokenizer: Tokenizer, *documents: str, fraction: float = 0.1) -> TokenSplit:
    corpus, found = corpus_of(folder, *documents)
    return prepare(corpus, found, tokenizer, validation_fraction=fraction, cache_dir=folder / "cache")


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.kind)
def test_each_part_holds_the_tokens_of_its_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = prepared(tmp_path, tokenizer, TEXT)
    at = int(len(TEXT) * 0.9)
    assert split.train.tolist() == tokenizer.encode_whole(TEXT[:at])
    assert split.validation.tolist() == tokenizer.encode_whole(TEXT[at:])


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.kind)
@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.text(st.sampled_from("Dear ,\n—?"), min_size=1, max_size=12), min_size=1, max_size=4),
    fraction=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 0.99]),
    chunk=st.integers(1, 6),
)
def test_documents_are_split_and_separated_as_a_plain_computation_does(
    tokenizer: Tokenizer,
    documents: list[str],
    fraction: float,
    chunk: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    at = round(sum(map(len, documents)) * (1000 - 1000 * fraction)) // 1000
    sides: tuple[list[str], list[str]] = ([], [])
    for text in documents:
        for side, part in zip(sides, (text[:at], text[at:]), strict=True):
            if part:
                side.append(part)
        at = max(0, at - len(text))
    separator = [tokenizer.end_of_text] if tokenizer.end_of_text is not None else tokenizer.encode("\n")
    expected = [
        [i for text in side for i in [*separator, *tokenizer.encode_whole(text)]][len(separator) :] for side in sides
    ]
    folder = tmp_path_factory.mktemp("split")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "CHUNK", chunk)
        split = prepared(folder, tokenizer, *documents, fraction=fraction)
    assert [split.train.tolist(), split.validation.tolist()] == expected
    shutil.rmtree(folder)


def test_the_split_is_exact_where_floats_are_not(tmp_path: Path) -> None:
    assert int(10 * (1 - 0.9)) == 0  # what plain floats would give
    split = prepared(tmp_path, ByteTokenizer(), "0123456789", fraction=0.9)
    assert bytes(split.train.tolist()) == b"0"
    assert bytes(split.validation.tolist()) == b"123456789"
    for length in (1, 7, 99, 1_115_394):  # as nanoGPT splits
        at = int(length * (1 - tokens_module.Fraction(str(0.1))))
        assert at == int(length * 0.9)


def test_no_validation_gives_an_empty_array(tmp_path: Path) -> None:
    split = prepared(tmp_path, ByteTokenizer(), "abc", fraction=0)
    assert split.train.tolist() == [97, 98, 99]
    assert split.validation.shape == (0,)


def test_a_vocabulary_without_line_feed_works_for_a_single_document_only(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("abc")
    assert prepared(tmp_path, tokenizer, "abc", fraction=0).train.tolist() == [0, 1, 2]
    with pytest.raises(UnknownCharacters):
        prepared(tmp_path, tokenizer, "abc", "abc", fraction=0)
    assert len(os.listdir(tmp_path / "cache")) == 1  # nothing half-built stays


class Wide(ByteTokenizer):
    """Bytes as ids at the far end of a vocabulary."""

    kind = "byte"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32) + np.uint32(self.vocab_size - 256)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_files_are_read_only_maps_of_the_smallest_type(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    split = prepared(tmp_path, Wide(vocab_size), "xyz\xff", fraction=0)
    for array in (split.train, split.validation):
        assert isinstance(array, np.memmap)
        assert array.dtype == dtype
        assert not array.flags.writeable
    assert split.train.tolist() == [byte + vocab_size - 256 for byte in "xyz\xff".encode()]
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(os.listdir(folder)) == ["sha256.json", "train.npy", "validation.npy"]
    assert np.load(folder / "train.npy").tolist() == split.train.tolist()


# The cache


def only_folder(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


class Counting(ByteTokenizer):
    calls = 0

    def encode_array(self, text: str) -> np.ndarray:
        Counting.calls += 1
        return super().encode_array(text)


def test_text_is_tokenized_once(tmp_path: Path) -> None:
    Counting.calls = 0
    first = prepared(tmp_path, Counting(), TEXT)
    calls = Counting.calls
    assert calls > 0
    assert prepared(tmp_path, Counting(), TEXT).train.tolist() == first.train.tolist()
    assert Counting.calls == calls
    assert only_folder(tmp_path).name == tokens_module._key(corpus_of(tmp_path, TEXT)[1], Counting(), 0.1)
    assert len(only_folder(tmp_path).name) == 32


def test_another_text_tokenizer_or_split_is_another_key(tmp_path: Path) -> None:
    prepared(tmp_path, ByteTokenizer(), "abcabc", fraction=0)
    prepared(tmp_path, ByteTokenizer(), "abcabc", fraction=0.5)
    prepared(tmp_path, ByteTokenizer(), "abcabd", fraction=0)
    prepared(tmp_path, ByteTokenizer(), "abc", "abc", fraction=0)
    prepared(tmp_path, CharTokenizer("abc\n"), "abcabc", fraction=0)
    prepared(tmp_path, CharTokenizer("acb\n"), "abcabc", fraction=0)
    assert len(os.listdir(tmp_path / "cache")) == 6


def damage_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"'<u2'", b"'<u4'"))


DAMAGES = {
    "one bit flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0\0"),
    "empty": lambda path: os.truncate(path, 0),
    "only a header": lambda path: os.truncate(path, 128),
    "gone": lambda path: path.unlink(),
    "other type": damage_header,
    "no header": lambda path: path.write_bytes(b"x" * path.stat().st_size),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", ["train.npy", "validation.npy"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: str, name: str) -> None:
    first = prepared(tmp_path, ByteTokenizer(), TEXT)
    expected = (first.train.tolist(), first.validation.tolist())
    DAMAGES[damage](only_folder(tmp_path) / name)
    again = prepared(tmp_path, ByteTokenizer(), TEXT)
    assert (again.train.tolist(), again.validation.tolist()) == expected
    assert sorted(os.listdir(only_folder(tmp_path))) == ["sha256.json", "train.npy", "validation.npy"]


def test_a_file_where_the_folder_belongs_is_replaced(tmp_path: Path) -> None:
    folder_name = tokens_module._key(corpus_of(tmp_path, TEXT)[1], ByteTokenizer(), 0.1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / folder_name).write_text("x")
    assert prepared(tmp_path, ByteTokenizer(), TEXT).train[:4].tolist() == list(b"Dear")


def test_concurrent_builds_are_safe(tmp_path: Path) -> None:
    corpus, found = corpus_of(tmp_path, TEXT)

    def one(_: int) -> list[int]:
        cache = tmp_path / "cache"
        return prepare(corpus, found, ByteTokenizer(), validation_fraction=0, cache_dir=cache).train.tolist()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(24))) == [list(TEXT.encode())] * 24
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_faster_process_wins(tmp_path: Path) -> None:
    corpus, found = corpus_of(tmp_path, TEXT)

    class Slow(ByteTokenizer):
        """Another process finishes while this one works."""

        def encode_array(self, text: str) -> np.ndarray:
            prepare(corpus, found, ByteTokenizer(), validation_fraction=0, cache_dir=tmp_path / "cache")
            faster.append(only_visible(tmp_path / "cache").stat().st_ino)
            return super().encode_array(text)

    faster: list[int] = []
    split = prepare(corpus, found, Slow(), validation_fraction=0, cache_dir=tmp_path / "cache")
    assert split.train.tolist() == list(TEXT.encode())
    assert only_folder(tmp_path).stat().st_ino == faster[0]


def only_visible(folder: Path) -> Path:
    (path,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    return path


def test_a_killed_process_leaves_nothing_that_is_mistaken_for_tokens(tmp_path: Path) -> None:
    corpus_of(tmp_path, TEXT, TEXT)
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from milepost.text.corpus import open_corpus
from milepost.text.scan import scan
from milepost.text.tokenization import ByteTokenizer
from milepost.text.token_files import prepare
class Dying(ByteTokenizer):
    def encode_array(self, text):
        if text == "\\n":
            os.kill(os.getpid(), 9)
        return super().encode_array(text)
folder = Path(sys.argv[2])
corpus = open_corpus(str(folder / "corpus.jsonl"), data_dir=folder)
prepare(corpus, scan(corpus), Dying(), validation_fraction=0.1, cache_dir=folder / "cache")
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    left = only_folder(tmp_path)
    assert left.name.startswith(".")
    split = prepared(tmp_path, ByteTokenizer(), TEXT, TEXT)
    both = (TEXT + "\n" + TEXT).encode()
    assert split.train.tolist() + split.validation.tolist() == list(both)
    assert left.exists()  # a process of another host may be writing it
    age(left, 700)
    prepared(tmp_path, ByteTokenizer(), "other text")
    assert not left.exists()


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    """For a day without a write, because its number may be that of another process by now."""
    parent = tmp_path / "cache" / f".tmp-{'0' * 32}-{os.getppid()}-{'0' * 8}"
    parent.mkdir(parents=True)
    for seconds, stays in ((700, True), (86500, False)):
        age(parent, seconds)
        prepared(tmp_path, ByteTokenizer(), f"text {seconds}")
        assert parent.exists() == stays


def age(folder: Path, seconds: int) -> None:
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_text_that_changed_since_the_scan_is_refused(tmp_path: Path) -> None:
    corpus, found = corpus_of(tmp_path, "one text")
    corpus_of(tmp_path, "two text")
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(corpus, found, ByteTokenizer(), validation_fraction=0, cache_dir=tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_a_stale_scan_is_forgotten_so_that_starting_again_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that the scan's cache cannot see: here the compared stamps are the same for every file."""
    monkeypatch.setattr("milepost.text.stamps._stamp", lambda path: {"mtime_ns": 0, "ctime_ns": 0})
    cache = tmp_path / "cache"
    corpus, _ = corpus_of(tmp_path, "one text")
    before = cached_scan(corpus, cache_dir=cache)
    corpus_of(tmp_path, "two text")
    assert cached_scan(corpus, cache_dir=cache) == before  # the control: it is stale
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(corpus, before, ByteTokenizer(), validation_fraction=0, cache_dir=cache)
    found = cached_scan(corpus, cache_dir=cache)
    split = prepare(corpus, found, ByteTokenizer(), validation_fraction=0, cache_dir=cache)
    assert bytes(split.train.tolist()) == b"two text"


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"cache cannot be written"):
        prepared(tmp_path, ByteTokenizer(), "text")


class Words(ByteTokenizer):
    """Records every text that it encodes."""

    splits_at = "document"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode_array(self, text: str) -> np.ndarray:
        self.seen.append(text)
        return super().encode_array(text)


def test_documents_stay_whole_for_a_tokenizer_that_splits_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "CHUNK", 4)
    monkeypatch.setattr("milepost.text.blocks.BLOCK", 8)
    whole, cut = Words(), Words()
    cut.splits_at = "word"
    for tokenizer in (whole, cut):
        corpus, found = corpus_of(tmp_path, TEXT, "a second document")
        split = prepare(corpus, found, tokenizer, validation_fraction=0.1, cache_dir=tmp_path / tokenizer.splits_at)
        assert bytes([*split.train, *split.validation]) == f"{TEXT}\na second document".encode()
    at = tokens_module.split_at(len(TEXT) + len("a second document"), 0.1)
    assert sorted(text for text in whole.seen if text != "\n") == sorted([TEXT[:at], TEXT[at:], "a second document"])
    assert len(cut.seen) > 20  # the control


# Size


def peak_memory(tmp_path: Path, tokenizer: Tokenizer, megabytes: int) -> float:
    """The peak memory in MB of preparing a corpus of this size."""
    path = tmp_path / f"{megabytes}.txt"
    path.write_bytes((b"Dear Wren, I can't decide what to say.\n" * 25_642)[:1_000_000] * megabytes)
    corpus = open_corpus(str(path), data_dir=tmp_path)
    found = scan(corpus)
    tracemalloc.start()
    try:
        split = prepare(corpus, found, tokenizer, validation_fraction=0.1, cache_dir=tmp_path / "cache")
        assert split.train[-1] >= 0
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("tokenizer", "small", "large"),
    [(ByteTokenizer(), 4, 48), (CharTokenizer(sorted(set("Dear Wren, I can't decide what to say.\n"))), 4, 48),
     (Gpt2Tokenizer(), 4, 16)],
    ids=["byte", "char", "gpt2"],
)  # fmt: skip
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, tokenizer: Tokenizer, small: int, large: int) -> None:
    first, second = (peak_memory(tmp_path, tokenizer, megabytes) for megabytes in (small, large))
    assert second < 1.5 * first  # threads take turns as they like
    assert second < 24  # MB


@pytest.mark.parametrize("name", ["Llama 3", "sentencepiece"])
def test_the_memory_of_other_tokenizers_does_not_grow_with_a_document(name: str) -> None:
    """The library holds a hundred bytes for each character that it encodes at once."""
    sizes: list[int] = []

    class Measured(Words):
        splits_at = AT_LINES[name].splits_at

        def encode_part(self, text: str, *, after: object) -> np.ndarray:
            sizes.append(len(text))
            return super().encode_array(text)

    line = "Dear Wren, I can't decide what to say.\n"
    for _ in tokens_module.token_ids([(line * 26_000, False)] * 4, Measured()):
        pass
    assert max(sizes) <= 2 * tokens_module.CHUNK < sum(sizes)


def test_memory_would_grow_if_text_were_tokenized_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the measure above sees it."""
    monkeypatch.setattr(tokens_module, "CHUNK", 10**9)
    monkeypatch.setattr(tokens_module, "rechunk", lambda pieces, **_: [("".join(text for text, _ in pieces), True)])
    assert peak_memory(tmp_path, Gpt2Tokenizer(), 16) > 50


RESIDENT = """
import sys
from pathlib import Path
from milepost.text.corpus import open_corpus
from milepost.text.scan import scan
from milepost.text.tokenization import Gpt2Tokenizer
from milepost.text.token_files import prepare

def peak():  # of this process's memory, in MB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

folder, tokenizer = Path(sys.argv[1]), Gpt2Tokenizer()
for name in ("small.txt", "large.txt"):
    corpus = open_corpus(str(folder / name), data_dir=folder)
    prepare(corpus, scan(corpus), tokenizer, validation_fraction=0.1, cache_dir=folder / "cache")
    print(peak())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_resident_memory_does_not_grow_with_a_corpus_of_64_megabytes(tmp_path: Path) -> None:
    """Includes tiktoken's allocations, which tracemalloc does not see."""
    for name, megabytes in (("small.txt", 2), ("large.txt", 64)):
        (tmp_path / name).write_bytes((b"Dear Wren, I can't decide what to say.\n" * 25_642)[:1_000_000] * megabytes)
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    small, large = map(float, done.stdout.split())
    assert large - small < 16


def test_progress_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("milepost.text.scan.time.monotonic", lambda: next(clock))
    corpus, found = corpus_of(tmp_path, "x" * 2_000_000)
    lines: list[str] = []
    prepare(corpus, found, ByteTokenizer(), validation_fraction=0, cache_dir=tmp_path / "cache", log=lines.append)
    assert lines == ["tokenizing: 1 MB done", "tokenizing: 2 MB done"]
