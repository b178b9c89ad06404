"""Parquet, Arrow and zstd: the same text as .jsonl of the same rows, in flat memory, with broken rows named, resumed exactly."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exactly import resumes_exactly
from talks import rows, talk, talks_file

from milepost.text import blocks, columnar
from milepost.text.corpus import Corpus, open_corpus
from milepost.text.errors import DataError, TextFieldError
from milepost.text.readers import Reading
from milepost.text.scan import scan

exchange = pytest.mark.exchange
TEXTS = ["first\r\nletter", "", "zwei — ü", "third\n\nend"]


def opened(source: Path | str, **reading: Any) -> Corpus:
    return open_corpus(str(source), data_dir=Path("nowhere"), reading=Reading(**reading))


def table_file(path: Path, values: list[dict[str, Any]], **options: Any) -> Path:
    """A .parquet, or an .arrow of the form `how` (file or stream), of these rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(values)
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
        return path
    new = pa.ipc.new_stream if options.get("how") == "stream" else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=options.get("row_group_size", 2))
    return path


def packed(path: Path, data: bytes) -> Path:
    from backports import zstd

    path.write_bytes(zstd.compress(data))
    return path


KINDS: dict[str, dict[str, Any]] = {
    "a.parquet": {"row_group_size": 3},
    "b.parquet": {"compression": "zstd", "data_page_size": 64},
    "a.arrow": {"how": "file"},
    "b.arrow": {"how": "stream"},
}


@exchange
@pytest.mark.parametrize("name", KINDS)
def test_rows_are_the_documents_that_a_jsonl_of_them_has(name: str, tmp_path: Path) -> None:
    values = [{"id": number, "text": text, "url": None} for number, text in enumerate(TEXTS * 3)]
    path = table_file(tmp_path / name, values, **KINDS[name])
    assert scan(opened(path)) == scan(opened(rows(tmp_path / "same.jsonl", values)))
    assert scan(opened(path)).documents == 9
    with pytest.raises(TextFieldError, match="id, text, url"):
        scan(opened(path, text_field="body"))


@exchange
@pytest.mark.parametrize("name", KINDS)
def test_rows_are_the_conversations_that_a_jsonl_of_them_has(name: str, tmp_path: Path) -> None:
    draw = random.Random(1)
    forms = {
        "messages": [{"messages": talk(draw), "source": "x"} for _ in range(20)],
        "instruction": [{"instruction": f"{n}?", "input": "" if n % 2 else "it", "output": "y"} for n in range(20)],
        "chosen": [{"question": f"{n}?", "reply": "y"} for n in range(20)],
    }
    for form, values in forms.items():
        chosen = {"prompt_field": "question", "answer_field": "reply"} if form == "chosen" else {}
        path = table_file(tmp_path / name, values, **KINDS[name])
        plain = opened(rows(tmp_path / "same.jsonl", values), **chosen)
        found = opened(path, **chosen)
        assert found.reading.form == form
        assert [each for _, each in found.conversations()] == [each for _, each in plain.conversations()]
        assert next(found.conversations())[0] == f"{path} row 1"


@exchange
@pytest.mark.parametrize("name", KINDS)
def test_columns_that_are_not_read_are_told(name: str, tmp_path: Path) -> None:
    path = table_file(tmp_path / name, [{"prompt": "a?", "completion": "b", "system": "Be brief."}], **KINDS[name])
    assert list(scan(opened(path)).notes[1:]) == [f"{path}: members of its rows that are not read: system"]


@exchange
def test_only_the_columns_that_are_used_are_read(tmp_path: Path) -> None:
    """A column that cannot be read stops nothing, unless it is the text."""
    values = [{"text": f"text {n} " * 50, "other": f"other {n} " * 50} for n in range(100)]
    path = table_file(tmp_path / "a.parquet", values, compression="none", use_dictionary=False, write_statistics=False)
    whole = scan(opened(path)).sha256
    data = bytearray(path.read_bytes())
    for number in range(100):
        begins = data.find(f"other {number} other".encode())
        data[begins : begins + 6] = b"\xff" * 6
    path.write_bytes(data)
    assert scan(opened(path)).sha256 == whole
    with pytest.raises(DataError, match="row 1: holds text that is not valid UTF-8"):
        scan(opened(path, text_field="other"))


@exchange
@pytest.mark.parametrize("name", ["a.parquet", "b.arrow"])
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    import pyarrow as pa

    def peak(count: int) -> int:
        values = [{"text": np.random.default_rng(n).bytes(1500).hex(), "n": n} for n in range(count)]
        path = table_file(tmp_path / name, values, row_group_size=count if name == "a.parquet" else 100)
        del values
        before, most = pa.total_allocated_bytes(), 0
        for _ in columnar.columnar_rows(path, ("text",)):
            most = max(most, pa.total_allocated_bytes() - before)
        return most

    small, large = peak(2000), peak(16000)  # 6 MB and 48 MB, each one row group
    assert 0 < large < 1.5 * small + (1 << 20) or small == large == 0  # Arrow files are mapped
    assert large < 16000 * 3000 / 3


@exchange
def test_broken_rows_and_files_are_named(tmp_path: Path) -> None:
    path = table_file(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}])
    with pytest.raises(DataError, match=r"a.parquet row 2: 'text' is None, not text: fill it or leave the row out"):
        scan(opened(path))
    path = table_file(tmp_path / "b.parquet", [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}])
    with pytest.raises(DataError, match=r"b.parquet row 2: prompt is empty"):
        scan(opened(path))
    whole = path.read_bytes()
    for broken in (whole[:-9], b"", b"PAR1"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"b.parquet cannot be read as parquet \("):
            scan(opened(path))
    arrow = table_file(tmp_path / "c.arrow", [{"text": "a" * 500}] * 50)
    arrow.write_bytes(arrow.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"c.arrow cannot be read as arrow \("):
        scan(opened(arrow))


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.arrow.zst"])
def test_a_packed_file_of_columns_is_refused_as_packed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"packed")
    with pytest.raises(DataError, match="are read as they are, because they pack their columns: unpack it"):
        open_corpus(str(tmp_path / name), data_dir=tmp_path).pieces().__next__()


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        scan(opened(path))
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"pip install backports\.zstd"):
        scan(opened(path))


# zstd


@exchange
def test_zstd_is_read_as_the_text_in_it(tmp_path: Path) -> None:
    plain = rows(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    path = packed(tmp_path / "b.jsonl.zst", plain.read_bytes())
    path.write_bytes(path.read_bytes() * 2)  # frames that follow one another, as pzstd writes them
    assert scan(opened(path)).characters == 2 * scan(opened(plain)).characters
    (tmp_path / "t.txt").write_text("Dear Wren,\r\n" * 1000)
    same = packed(tmp_path / "u.txt.zst", (tmp_path / "t.txt").read_bytes())
    assert scan(opened(same)).sha256 == scan(opened(tmp_path / "t.txt")).sha256
    for broken in (same.read_bytes()[:-4], b"no zstd at all"):
        same.write_bytes(broken)
        with pytest.raises(DataError, match=r"u\.txt\.zst is a damaged zstd file"):
            scan(opened(same))


@exchange
def test_zstd_is_unpacked_block_by_block(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.txt.zst", b"dear wren " * (5 * blocks.BLOCK // 10))
    assert {len(text) for text in blocks.blocks_of(path)} <= set(range(1, blocks.BLOCK + 1))


# Runs


def source_of(folder: Path, kind: str) -> Path:
    if kind == "messages.parquet":
        values = [json.loads(line) for line in talks_file(folder).read_text().splitlines()]
        return table_file(folder / "talks.parquet", values, row_group_size=7)
    values = [{"text": f"Letter {n}: the wren sings at dawn, and so does lark {n % 7}.\n"} for n in range(200)]
    if kind == "text.jsonl.zst":
        return packed(folder / "text.jsonl.zst", rows(folder / "text.jsonl", values).read_bytes())
    return table_file(folder / kind, values, row_group_size=50)


@exchange
@pytest.mark.parametrize("kind", ["text.parquet", "messages.parquet", "text.arrow", "text.jsonl.zst"])
def test_a_resumed_run_equals_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    record, said = resumes_exactly(tmp_path, TRAINING_DATA_SOURCE=str(source_of(tmp_path, kind)), BLOCK_SIZE="64")
    assert ("its rows are conversations" in said) == kind.startswith("messages")
    assert record.data["file_types"] == 2


@exchange
@pytest.mark.parametrize("name", KINDS)
def test_two_columns_of_one_name_are_refused(name: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "completion"])
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with (pa.ipc.new_stream if KINDS[name]["how"] == "stream" else pa.ipc.new_file)(
            str(path), table.schema
        ) as file:
            file.write_table(table)
    with pytest.raises(DataError, match="two columns 'completion'"):
        list(opened(path).conversations())
