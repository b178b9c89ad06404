"""Small files that would take much memory or time to read are refused in one sentence, before they do."""

import csv
import gzip
import json
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from drive import ROOT, TINY, small_text, train
from script import call, script
from test_corpus import documents, error_of, opened, write
from work import HANGING

from milepost.evaluate import choices
from milepost.text import blocks, chunks, readers
from milepost.text.chunks import rechunk
from milepost.text.errors import DataError
from milepost.text.tokenization import ByteTokenizer, Gpt2Tokenizer, bpe, build

MB = 1 << 20

# A record far above the limit in each format: what precedes it, a megabyte of it many times, what follows.
LONG = {
    "a.jsonl": (b'{"text": "one"}\n{"text": "', b'"}\n'),
    "a.json": (b'["one", "', b'"]'),
    "a.csv": (b"text\none\n", b"\n"),
    "quoted.csv": (b'text\none\n"', b'"\n'),
    "lines.csv": (b'text\none\n"', b""),  # a quote that is never closed
    "semicolons.csv": (b"id;text\n1;one\n2;", b"\n"),
    "a.tsv": (b"id\ttext\n1\tone\n2\t", b"\n"),
}


def packed(path: Path, start: bytes, megabytes: int, end: bytes, *, line: bool = False) -> Path:
    block = (b"a" * 1023 + (b"\n" if line else b"a")) * 1024
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(megabytes):
            file.write(block)
        file.write(end)
    return path


def peak(action: Callable[[], object]) -> int:
    """The most bytes that Python held during the action."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", LONG)
def test_a_record_above_the_limit_is_refused_in_bounded_memory(name, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "RECORD_LIMIT", 4 * MB)
    start, end = LONG[name]
    path = packed(tmp_path / f"{name}.gz", start, 64, end, line=name == "lines.csv")
    messages: list[str] = []
    assert peak(lambda: messages.append(error_of(path))) < 40 * MB
    assert str(path) in messages[0]
    assert "4,194,304" in messages[0]
    assert any(f"{word} {number}" in messages[0] for word in ("line", "record") for number in (2, 3))


@pytest.mark.parametrize("name", LONG)
def test_a_record_below_the_limit_is_read(name, tmp_path, monkeypatch):
    """The control: nothing but the length is wrong with these files."""
    monkeypatch.setattr(blocks, "RECORD_LIMIT", 4 * MB)
    start, end = LONG[name]
    path = packed(tmp_path / f"{name}.gz", start, 2, end or b'"', line=name == "lines.csv")
    assert [len(text) for text in documents(opened(path))] == [3, 2 * MB]


def test_the_sum_of_all_records_has_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "RECORD_LIMIT", 1000)
    rows = [{"text": "x" * 900}] * 50
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert len(documents(opened(path))) == 50
    assert len(documents(opened(write(tmp_path / "a.json", json.dumps(rows))))) == 50
    assert len(documents(opened(write(tmp_path / "a.csv", "text\n" + "\n".join(["x" * 900] * 50))))) == 50


def test_a_text_without_records_may_be_of_any_length(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "RECORD_LIMIT", 1000)
    assert documents(opened(write(tmp_path / "a.txt", "x" * 5000))) == ["x" * 5000]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_small_file_that_unpacks_to_very_much_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "UNPACKED_LIMIT", 4 * MB)
    start = {"a.jsonl": b'{"text": "x"}\n', "a.json": b'["x"]', "a.csv": b"text\n"}.get(name, b"")
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(start + b"\n" * (8 * MB), compresslevel=9))
    message = error_of(path)
    assert str(path) in message
    assert "4,194,304" in message
    assert "unpack it yourself" in message
    plain = tmp_path / name
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    documents(opened(plain))  # the remedy works


def test_a_text_that_is_packed_as_texts_are_has_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "UNPACKED_LIMIT", 1000)
    text = small_text(tmp_path).read_text(encoding="utf-8")
    assert documents(opened(write(tmp_path / "a.txt.gz", text))) == [text]


def test_a_word_without_end_is_refused_by_tokenizers_that_read_words(monkeypatch):
    """Its tokens need a hundred times its size."""
    monkeypatch.setattr(chunks, "WORD_LIMIT", 10_000)

    def pieces() -> Iterator[tuple[str, bool]]:
        for _ in range(1000):
            yield "a" * 1000, False
        yield "a", True

    taken: list[str] = []
    with pytest.raises(DataError, match="10,000"):
        taken.extend(text for text, _ in rechunk(pieces(), size=1000))
    assert taken == []
    assert [len(text) for text, _ in rechunk([("b" * 9000 + " c" * 9000, True)], size=1000)][-1] < 10_000


def test_such_a_word_is_named_with_its_text(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "WORD_LIMIT", 10_000)
    path = tmp_path / "letters.txt"
    path.write_text("Dear Wren,\n" + "a" * 300_000)
    code, said = train(tmp_path, TOKENIZER="gpt2", N_EMBD="4")
    assert code == 4
    assert "letters.txt" in said.splitlines()[-1]
    assert "10,000" in said.splitlines()[-1]
    assert train(tmp_path, TOKENIZER="byte")[0] == 0
    assert Gpt2Tokenizer.splits_at != ByteTokenizer.splits_at


@pytest.mark.parametrize("word", ["a", " ", "\u00fc", "\t"])
def test_merges_are_learned_from_words_of_bounded_length(word):
    """Their time grows with the square of the length."""
    text = f"Dear Wren, {word * 5000} x{word * 700}"
    parts = list(bpe._parts(text))
    assert "".join(parts) == text
    assert all(len(run) <= bpe.LONGEST_WORD for part in parts for run in re.findall(r"\S+|\s+", part))
    plain = "Dear Wren, " * 200
    assert list(bpe._parts(plain)) == [plain]  # the control: ordinary text stays whole


def test_merges_do_not_depend_on_where_a_long_word_is_cut():
    text = "Dear Wren, " + "abcde" * 3000 + " the end of it"
    built = [
        build("bpe", [(text[i : i + size], i + size >= len(text)) for i in range(0, len(text), size)], alphabet="", documents=1, vocab_size=300).to_dict()
        for size in (100, 7001, len(text))
    ]  # fmt: skip
    assert built[0] == built[1] == built[2]


# Benchmarks and prompts


def test_benchmarks_have_the_limits_of_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "RECORD_LIMIT", 4 * MB)
    for name in ("a.jsonl.gz", "a.csv.gz"):
        path = packed(
            tmp_path / name, b'{"sentence_good": "' if "json" in name else b'sentence_good,sentence_bad\n"', 16, b""
        )
        with pytest.raises(DataError, match="4,194,304"):
            choices.read_benchmark(path)
    monkeypatch.setattr(choices, "BENCHMARK_LIMIT", 10_000)
    path = write(tmp_path / "many.csv", "sentence_good,sentence_bad\n" + "a b,b a\n" * 100)
    with pytest.raises(DataError, match=r"many.csv line \d+: .*10,000"):
        choices.read_benchmark(path)


def test_a_prompt_without_end_is_refused(tmp_path, monkeypatch):
    assert train(tmp_path)[0] == 0
    (path,) = (tmp_path / "checkpoints").glob("*step0008*")
    module = script("load_checkpoint")
    monkeypatch.setattr("milepost.samples.PROMPT_LIMIT", 1000)
    said = call(module, tmp_path, CHECKPOINT_PATH=path, PROMPT_FILE="/dev/zero")
    assert said.code == 2
    assert "1,000 bytes" in said.err


# In a process of its own, with the limits as they are


PROGRAM = """
import resource, sys
sys.argv = ["training.py"]
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
import runpy
sys.path.insert(0, {root!r})
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize("name", ["a.jsonl", "quoted.csv"])
def test_two_gigabytes_in_one_record_stay_far_below_them(name, tmp_path):
    """As a command: exit code 4 and one sentence, within three gigabytes of address space."""
    start, end = LONG[name]
    path = tmp_path / f"{name}.gz"
    whole = gzip.compress(b"a" * (64 * MB), compresslevel=9)
    path.write_bytes(gzip.compress(start) + whole * 32 + gzip.compress(end))  # members are read one after another
    assert path.stat().st_size < 4 * MB
    program = PROGRAM.format(limit=3 << 30, root=str(ROOT), path=str(ROOT / "training.py"))
    env = TINY | {
        "TRAINING_DATA_SOURCE": str(path),
        "CHECKPOINT_DIR": str(tmp_path / "c"),
        "RUNS_DIR": str(tmp_path / "r"),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=env | {"PYTHON_DOTENV_DISABLED": "1", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=HANGING, check=False
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert str(path) in done.stderr
    assert f"{blocks.RECORD_LIMIT:,}" in done.stderr
    assert "BATCH_SIZE" not in done.stderr.splitlines()[-1]


def test_the_limit_of_csv_fields_is_that_of_records(tmp_path):
    documents(opened(write(tmp_path / "a.csv", "text\nx\n")))
    assert csv.field_size_limit() == blocks.RECORD_LIMIT
    assert readers.READERS.keys() >= {".csv", ".json"}
