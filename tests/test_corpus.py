import csv
import email.message
import gzip
import hashlib
import io
import json
import os
import sys
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import in_child, walkable_folder

from milepost.run import text as run_text
from milepost.runtime.progress import Log
from milepost.text import blocks, download, stamps
from milepost.text import scan as scan_module
from milepost.text.corpus import Corpus, open_corpus
from milepost.text.download import fetch
from milepost.text.errors import DataError
from milepost.text.readers import VERBATIM, Reading
from milepost.text.scan import ByteProgress, Scan, cached_scan, forget_scan, scan

URL = "https://example.org/letters/first.txt"


def write(path: Path, text: str | bytes) -> Path:
    data = text if isinstance(text, bytes) else text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def opened(source: object, data_dir: Path = Path("unused"), **reading: Any) -> Corpus:
    return open_corpus(str(source), data_dir=data_dir, reading=Reading(**reading))


def documents(corpus: Corpus) -> list[str]:
    found, text = [], ""
    for piece, ends in corpus.pieces():
        assert piece
        text += piece
        if ends:
            found.append(text)
            text = ""
    assert text == ""
    return found


def error_of(source: object, data_dir: Path = Path("unused")) -> str:
    """The DataError of reading all of `source`."""
    with pytest.raises(DataError) as caught:
        documents(opened(source, data_dir))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# File formats


def as_csv(rows: list[list[str]], delimiter: str = ",") -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue()


THREE = ['first\r\nletter, "quoted"', "zwei — ü", "third\n\nend\u2028x"]
KINDS = {
    "a.txt": (THREE[0], THREE[:1]),
    "a.md": (THREE[1], THREE[1:2]),
    "a.jsonl": ("\n".join(json.dumps({"id": 1, "text": text}) for text in THREE) + "\n\n", THREE),
    "a.json": (json.dumps([{"id": 1, "text": text} for text in THREE], indent=1), THREE),
    "a.csv": (as_csv([["id", "text"], *([str(i), text] for i, text in enumerate(THREE))]), THREE),
    "a.tsv": (as_csv([["id", "text"], *([str(i), text] for i, text in enumerate(THREE))], "\t"), THREE),
}


# Line ends and marks as people's programs write them: of a document, and what is read of it.
LINE_ENDS = {
    "windows": ("first\r\nletter\r\n\r\nend\r\n", "first\nletter\n\nend\n"),
    "old mac": ("first\rletter\r\rend\r", "first\nletter\n\nend\n"),
    "mixed": ("a\r\r\n\n\rb", "a\n\n\n\nb"),
    "line feeds": ("first\nletter\n", "first\nletter\n"),
    "mark": ("\ufefffirst\r\nletter", "first\nletter"),
    "mark inside": ("a\ufeff\r\n\ufeffb", "a\ufeff\n\ufeffb"),
}
AS = {  # how a document stands in a file of each format
    "a.txt": lambda text: text,
    "a.md": lambda text: text,
    "a.jsonl": lambda text: json.dumps({"text": text}),
    "a.json": lambda text: json.dumps([{"text": text}]),
    "a.csv": lambda text: as_csv([["id", "text"], ["1", text]]),
    "a.tsv": lambda text: as_csv([["id", "text"], ["1", text]], delimiter="\t"),
}


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("name", KINDS)
def test_every_format_gives_its_documents(tmp_path: Path, name: str, gz: str) -> None:
    text, expected = KINDS[name]
    plain = [text.replace("\r\n", "\n") for text in expected]
    path = write(tmp_path / (name + gz), text)
    assert documents(opened(path)) == plain
    if name.endswith(VERBATIM):
        assert documents(opened(path, verbatim=True)) == expected


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize("ends", LINE_ENDS)
@pytest.mark.parametrize("name", AS)
def test_line_ends_and_marks_are_normalized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ends: str, block: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    text, expected = LINE_ENDS[ends]
    assert documents(opened(write(tmp_path / name, AS[name](text)))) == [expected]


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", AS)
def test_utf16_with_its_mark_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, encoding: str, block: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    text = "Dear Wren,\r\n\u4e00 \U0001f600 \u00fc\r\n"
    path = write(tmp_path / name, ("\ufeff" + AS[name](text)).encode(encoding))
    assert documents(opened(path)) == [text.replace("\r\n", "\n")]
    path.write_bytes(path.read_bytes() + b"\x00")
    assert f"not valid UTF-16: byte {path.stat().st_size - 1} is 0x00" in error_of(path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_utf16_without_its_mark_is_refused(name: str, encoding: str, tmp_path: Path) -> None:
    """Its bytes are valid UTF-8, of a text with a zero beside each character."""
    path = write(tmp_path / name, 'text\n"Dear diary"\n'.encode(encoding))
    assert "byte order mark" in error_of(path)
    assert documents(opened(write(tmp_path / "b.txt", b"a\0bcd"))) == ["a\0bcd"]


WITHOUT_A_MARK = {  # all valid UTF-8 in at least one of the encodings, where it would be read as control characters
    "Latin": "Dear diary",
    "a quotation mark first": "\u201cDear diary\u201d, she wrote",
    "Cyrillic": "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440, 1 \u0440\u0430\u0437",
    "Greek": "\u03a4\u03bf \u03bc\u03b9\u03ba\u03c1\u03cc \u03c0\u03bf\u03c5\u03bb\u03af",
}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("script", WITHOUT_A_MARK)
def test_wide_characters_without_a_mark_are_refused_in_any_alphabet(script: str, encoding: str, tmp_path: Path) -> None:
    data = WITHOUT_A_MARK[script].encode(encoding)
    message = error_of(write(tmp_path / "a.txt", data))
    assert "save it as UTF-8" in message
    assert f"is 0x00, as {encoding[:6].upper()} without its byte order mark has" in message
    with pytest.raises(UnicodeDecodeError):
        blocks.decoded(data)


@pytest.mark.parametrize(
    "text", ["a\0bcd", "abc\0def\0ghi\0", "one\0two\0three\0", "ab\0\0", "\0" * 64, " a\n\0b c\td\n\0"]
)
def test_zeros_in_utf8_are_characters(text: str, tmp_path: Path) -> None:
    assert documents(opened(write(tmp_path / "a.txt", text))) == [text] == [blocks.decoded(text.encode())]


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-32-le", "utf-32-be"])
def test_utf32_with_its_mark_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, block: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    text = "Dear Wren,\r\n\u4e00 \U0001f600 \u00fc\r\n"
    path = write(tmp_path / "a.txt", ("\ufeff" + text).encode(encoding))
    assert documents(opened(path)) == [text.replace("\r\n", "\n")]
    assert blocks.decoded(path.read_bytes()) == "\ufeff" + text


@pytest.mark.parametrize("ends", LINE_ENDS)
@pytest.mark.parametrize("name", [name for name in AS if name.endswith(VERBATIM)])
def test_verbatim_keeps_them_as_the_first_version_did(tmp_path: Path, name: str, ends: str) -> None:
    text, _ = LINE_ENDS[ends]
    expected = text.removeprefix("\ufeff") if name in ("a.txt", "a.md") else text
    assert documents(opened(write(tmp_path / name, AS[name](text)), verbatim=True)) == [expected]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", KINDS)
def test_files_with_any_line_ends_and_a_mark_give_the_same_text(tmp_path: Path, name: str, end: str) -> None:
    text, expected = KINDS[name]
    whole = text.replace("\r\n", "\n").replace("\n", end)
    plain = [text.replace("\r\n", "\n") for text in expected]
    assert documents(opened(write(tmp_path / name, "\ufeff" + whole))) == plain
    assert documents(opened(write(tmp_path / name, whole))) == plain


def test_suffixes_in_capitals_are_read(tmp_path: Path) -> None:
    assert documents(opened(write(tmp_path / "A.TXT", "x"))) == ["x"]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.jsonl", '{"text": ""}\n{"text": "x"}\n')
    assert documents(opened(tmp_path)) == ["x"]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40), block=st.integers(1, 9))
def test_blocks_of_any_size_give_the_same_text(text: str, block: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp() / "blocks.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        plain = text.removeprefix("\ufeff")
        assert "".join(documents(opened(path, verbatim=True))) == plain
        assert "".join(documents(opened(path))) == plain.replace("\r\n", "\n").replace("\r", "\n")


JSON_FORMS = {
    "a list of objects": ('[{"text": "one"}, {"text": "two"}]', ["one", "two"]),
    "a list of strings": ('["one", "two"]', ["one", "two"]),
    "one object": ('{"text": "one"}', ["one"]),
    "an object per line": ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
    "brackets and escapes inside": (json.dumps(["]", '"', "[\\", "\u2028"]), ["]", '"', "[\\", "\u2028"]),
    "empty": ("[]", []),
}
BAD_JSON = {
    "cut off in its list": ('["one", "two"', "ends within its list, after record 2"),
    "cut off in a value": ('["one", "tw', "record 2 is not valid JSON"),
    "something behind it": ('["one"] x', "record 2 is not valid JSON"),
    "no JSON": ("Dear Wren,", "record 1 is not valid JSON"),
    "a list of lists": ('[["one"]]', "record 1: expected an object with a member 'text', found a list"),
    "one object around its rows": ('{"data": [{"text": "one"}]}', "record 1: its rows are in 'data': save that list"),
    "another field": ('[{"text": "one"}, {"body": "two"}]', "record 2: expected a member 'text', found body"),
    "a number": ("[1]", "found a int"),
    "too deep": ("[" * 100_000, "record 1"),
    "half a surrogate": ('["\\ud800"]', "surrogate"),
    "a comma before the end": ('["one", "two" , ]', "record 3 is not valid JSON (a comma stands before the end"),
    "a comma before the first": ('[, "one"]', "record 1 is not valid JSON (a comma stands in its place"),
    "two commas": ('["one",, "two"]', "record 2 is not valid JSON (a comma stands in its place"),
    "no comma": ('["one" "two"]', "record 2 is not valid JSON (no comma stands before it"),
    "commas without a list": (
        '{"text": "one"},\n{"text": "two"}',
        "record 2 is not valid JSON (a comma stands before it",
    ),
    "an object behind it": ('["one"]\n{"text": "two"}', "record 2 is not valid JSON (its list ends before it"),
    "a second list behind it": ('["one"] ["two"]', "record 2 is not valid JSON (its list ends before it"),
    "two ends": ('["one"]]', "record 2 is not valid JSON (its list ends before it"),
}


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", JSON_FORMS)
def test_json_is_a_list_or_values_that_follow_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, block: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    text, expected = JSON_FORMS[form]
    found, path = "", write(tmp_path / "a.json", text)
    assert documents(opened(path)) == expected
    assert documents(opened(write(path, f" \n{text}\r\n"))) == expected, found


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("form", BAD_JSON)
def test_json_errors_name_file_and_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, block: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    text, expected = BAD_JSON[form]
    message = error_of(write(tmp_path / "a.json", text))
    assert "a.json" in message
    assert expected in message


DELIMITED = {
    "commas": ("id,text\n1,a;b\n", ["a;b"], False),
    "semicolons": ("id;text\n1;a,b\n", ["a,b"], True),
    "tabs": ("id\ttext\n1\ta,b;c\n", ["a,b;c"], True),
    "one column": ("text\na;b\n", ["a;b"], False),
    "quoted": ('id;"text"\n1;"a;b"\n', ["a;b"], True),
    "spaces": ("id ; text\n1;a\n", ["a"], True),
    "commas with a semicolon in a name": ("a;b,text\n1,x\n", ["x"], False),
}


@pytest.mark.parametrize("form", DELIMITED)
def test_the_delimiter_is_the_one_with_which_the_first_line_has_the_column(tmp_path: Path, form: str) -> None:
    text, expected, noted = DELIMITED[form]
    notes: list[str] = []
    corpus = opened(write(tmp_path / "a.csv", text))
    assert [piece for piece, _ in corpus.pieces(notes.append)] == expected
    assert [form.split()[0] in note or form in ("quoted", "spaces") for note in notes] == [True] * noted
    if noted:
        assert str(tmp_path / "a.csv") in notes[0]


@pytest.mark.parametrize("line", ["Hello, ", "Well, yes; no,", "a;"])
def test_one_column_between_tabs_holds_commas_and_semicolons(line: str, tmp_path: Path) -> None:
    assert documents(opened(write(tmp_path / "a.tsv", f"text\n{line}\n"))) == [line]


def test_a_separator_at_the_end_of_a_text_is_not_dropped_in_silence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\nShall I compare thee,\n")
    assert "line 2: the row has 2 columns, the first line names 1: put quotes" in error_of(path)
    notes: list[str] = []
    corpus = opened(write(path, 'id,text\n1,"so, it ends",\n2,so it ends,\n3,end\n'))
    assert [text for text, _ in corpus.pieces(notes.append)] == ["so, it ends", "so it ends", "end"]
    assert [note.partition(":")[2][:28] for note in notes] == [" 2 rows with more columns th"]


def test_the_columns_of_a_csv_without_the_field_are_listed(tmp_path: Path) -> None:
    assert "found id, body" in error_of(write(tmp_path / "a.csv", "id;body\n1;x\n"))
    assert "found id, body" in error_of(write(tmp_path / "a.tsv", "id\tbody\n1\tx\n"))


def test_of_a_data_set_that_was_saved_to_disk_only_the_rows_are_read(tmp_path: Path) -> None:
    """The datasets library keeps its state beside them, and what it computed from them."""
    train = tmp_path / "saved" / "train"
    train.mkdir(parents=True)
    for name in ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "cache-7c1f.arrow"):
        (train / name).write_bytes(b"ARROW1")
    (train / "dataset_info.json").write_text('{"citation": "", "description": ""}')
    rows = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
    (train / "state.json").write_text(json.dumps({"_data_files": rows, "_fingerprint": "7c1f", "_split": "train"}))
    corpus = open_corpus(str(train), data_dir=tmp_path)
    assert [path.name for path in corpus.paths] == [row["filename"] for row in rows]
    assert corpus.skipped == (f"{train}: 3 files skipped: .json, .arrow",)
    selected = {"_data_files": rows, "_indices_files": [{"filename": "indices.arrow"}]}
    (train / "state.json").write_text(json.dumps(selected))
    with pytest.raises(DataError, match="save it again with a newer version of the datasets library"):
        open_corpus(str(train), data_dir=tmp_path)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=f"splits train, test of a data set: name the folder of one, such as {train}"):
        open_corpus(str(tmp_path / "saved"), data_dir=tmp_path)


def test_skipped_files_are_told_for_folders_and_globs(tmp_path: Path) -> None:
    for name in ("a.txt", "b.docx", "c.DOCX", "d.jpg", "e/f.txt", "e/g.pdf", ".h.jpg"):
        write(tmp_path / name, "x")
    assert opened(tmp_path).skipped == (f"{tmp_path}: 4 files skipped: .docx, .jpg, .pdf",)
    assert opened(tmp_path / "*.*").skipped == (f"{tmp_path}/*.*: 3 files skipped: .docx, .jpg",)
    assert opened(f"{tmp_path}/a.txt,{tmp_path}/e").skipped == (f"{tmp_path}/e: 1 file skipped: .pdf",)
    assert opened(tmp_path / "a.txt").skipped == ()


def test_long_records_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4)
    path = write(tmp_path / "a.jsonl", '{"text": "abcdefghi"}\n{"text": "abcd"}')
    assert list(opened(path).pieces()) == [("abcd", False), ("efgh", False), ("i", True), ("abcd", True)]


def test_csv_fields_may_be_larger_than_the_default_limit(tmp_path: Path) -> None:
    text = "x y\n" * 50_000
    assert documents(opened(write(tmp_path / "a.csv", as_csv([["text"], [text]])))) == [text]


# Damaged and unsupported files


def first_invalid_byte(data: bytes) -> int | None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


@settings(max_examples=100, deadline=None)
@given(
    data=st.lists(st.sampled_from([b"a", "é".encode(), "日".encode(), "😀".encode(), b"\xff", b"\xf0\x9f", b"\xc3"])),
    block=st.integers(1, 5),
)
def test_invalid_utf8_is_found_where_python_finds_it(
    data: list[bytes], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    joined = b"".join(data)
    path = write(tmp_path_factory.getbasetemp() / "invalid.txt.gz", joined)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        if (position := first_invalid_byte(joined)) is not None:
            assert f"invalid.txt.gz is not valid UTF-8: byte {position} is 0x" in error_of(path)
        else:
            assert "".join(documents(opened(path))) == joined.decode()


def test_invalid_utf8_in_later_lines_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    first = b'{"text": "one"}\n'
    message = error_of(write(tmp_path / "a.jsonl", first + b'{"text": "\xe9"}\n'))
    assert f"a.jsonl is not valid UTF-8: byte {len(first) + 10} is 0xe9" in message
    assert "byte 7 is 0xe9" in error_of(write(tmp_path / "a.csv", b"text\nab\xe9\n"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected an object, found a list: name a file of one list .json"),
        ('{"body": "x"}', "found body"),
        ('{"text": 3}', "'text' is 3, not text: fill it or leave the row out"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    message = error_of(write(tmp_path / "a.jsonl", '{"text": "good"}\n' + line + "\n"))
    assert "a.jsonl line 2" in message
    assert expected in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("id,body\n1,x\n", "column 'text' in the first line, found id, body"),
        ("", "found nothing"),
        ("id,text\n1,x\n2\n", "line 3: the row ends before"),
        ('text\n"never closed\n', "line 2 is not valid CSV"),
    ],
)
def test_csv_errors_name_file_and_line(tmp_path: Path, text: str, expected: str) -> None:
    message = error_of(write(tmp_path / "a.csv", text))
    assert "a.csv" in message
    assert expected in message


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(os.urandom(5000).hex().encode())
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    for data in (whole[:-1], whole[: len(whole) // 2], bytes(broken), b"no gzip at all"):
        (tmp_path / "a.txt.gz").write_bytes(data)
        assert "a.txt.gz is a damaged gzip file" in error_of(tmp_path / "a.txt.gz")


# Finding files


def test_folders_are_read_in_order_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/c.txt.gz", ".hidden.txt", ".cache/x.txt", "a/.git/y.md", "code.py"):
        write(tmp_path / name, name)
    assert documents(opened(tmp_path)) == ["a/c.txt.gz", "a/z.md", "b.txt"]


def test_links_and_folders_that_are_not_read_are_told(tmp_path: Path) -> None:
    for name in ("texts/a.txt", "texts/sub/b.txt", "elsewhere/c.txt"):
        write(tmp_path / name, name)
    texts = tmp_path / "texts"
    (texts / "linked").symlink_to(tmp_path / "elsewhere")
    (texts / "lost.txt").symlink_to(tmp_path / "deleted.txt")
    (texts / "again.txt").symlink_to(tmp_path / "elsewhere" / "c.txt")  # a link to a file is read
    corpus = opened(texts)
    assert documents(corpus) == ["texts/a.txt", "elsewhere/c.txt", "texts/sub/b.txt"]
    assert corpus.skipped == (f"{texts}: 2 links not read: linked, lost.txt; to read one, name what it points to",)
    corpus = opened(f"{texts}/*")
    assert documents(corpus) == ["texts/a.txt", "elsewhere/c.txt"]
    assert corpus.skipped == (f"{texts}/*: 2 folders not read: linked, sub; to read one, name it too",)
    # This reads what is in the folders, too: one file twice, by two links.
    assert opened(f"{texts}/**").skipped == (f"read more than once: {texts / 'again.txt'}",)
    assert documents(opened(f"{texts}/*.txt,{texts}/linked,{texts}/sub")) == [
        *("texts/a.txt", "elsewhere/c.txt"),
        *("elsewhere/c.txt", "texts/sub/b.txt"),
    ]


def test_a_folder_that_cannot_be_listed_is_refused() -> None:
    """Its files would be missing from the text."""
    with walkable_folder() as texts:
        write(texts / "a.txt", "a")
        closed = write(texts / "sub" / "b.txt", "b").parent
        closed.chmod(0)
        said = in_child(lambda: error_of(texts), as_nobody=True)
        closed.chmod(0o755)
        assert said.startswith(f"{closed} cannot be read (Permission denied): allow that, or name the files")
        assert documents(opened(texts)) == ["a", "b"]


def test_texts_that_are_read_twice_are_told(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "B.txt", "c.md"):
        write(tmp_path / name, name)
    assert opened(tmp_path).skipped == ()
    corpus = opened(f"{tmp_path},{tmp_path / 'c.md'}")
    assert documents(corpus) == ["B.txt", "a.txt", "b.txt", "c.md", "c.md"]
    assert corpus.skipped == (f"read more than once: {tmp_path / 'c.md'}",)
    write(tmp_path / "a.txt.gz", gzip.compress(b"a.txt"))  # as gzip -k leaves it
    (said,) = opened(tmp_path).skipped
    assert said.startswith("read one after the other, though they may be the same text: ")
    assert said.endswith(f"{tmp_path}: a.txt and a.txt.gz")


def test_globs_commas_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt", "e.py", "f, g.txt"):
        write(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    assert documents(opened("?.*")) == ["a.txt", "b.txt", "c.md"]
    assert documents(opened("**/d.txt")) == ["deep/d.txt"]
    assert documents(opened(" c.md, a.txt,deep ")) == ["c.md", "a.txt", "deep/d.txt"]
    assert documents(opened("f, g.txt")) == ["f, g.txt"]


def test_unknown_suffixes_are_refused_with_the_supported_ones(tmp_path: Path) -> None:
    for name in ("a.pdf", "noext", "a.pdf.gz"):
        assert ".txt, .md, .jsonl, .json, .csv, .tsv, each also with .gz" in error_of(write(tmp_path / name, "x"))
    assert "expected .txt" in error_of(tmp_path / "*.pdf")
    assert "expected .txt" in error_of(tmp_path)


def test_a_missing_path_lists_at_most_ten_names(tmp_path: Path) -> None:
    for i in range(12):
        write(tmp_path / f"{i:02}.txt", "x")
    expected = (
        f"{tmp_path} holds 00.txt, 01.txt, 02.txt, 03.txt, 04.txt, 05.txt, 06.txt, 07.txt, 08.txt, 09.txt and 2 more"
    )
    assert error_of(tmp_path / "12.txt") == f"{tmp_path}/12.txt does not exist: {expected}"
    assert error_of(tmp_path / "no" / "folder.txt").endswith(expected)
    assert error_of(tmp_path / "*.md") == f"no file matches {tmp_path}/*.md: {expected}"


def test_odd_sources_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "neither a file nor a folder" in error_of(tmp_path / "pipe.txt")
    assert "names nothing" in error_of(" , ")
    assert "does not exist" in error_of("x" * 5000)
    assert "does not exist" in error_of(write(tmp_path / "a.txt", "x").with_name("\0"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("carolyn_hax.md", "carolyn_hax"),
        ("My Letters (2).TXT.gz", "my_letters_2"),
        ("v1.5", "v1_5"),
        ("a.txt,b.md", "a_b"),
        ("x" * 39 + "- y.txt", "x" * 39),
        ("日本.txt", "folder"),
        (".", "folder"),
    ],
)
def test_corpus_names_are_safe_for_file_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str
) -> None:
    folder = tmp_path / "folder"
    for part in source.split(","):
        write(folder / part / "x.txt" if part in (".", "v1.5") else folder / part, "x")
    monkeypatch.chdir(folder)
    assert opened(source).name == name


# Downloading


class Response(io.BytesIO):
    def __init__(self, data: bytes, length: int | None = None) -> None:
        super().__init__(data)
        self.headers = {} if length is None else {"Content-Length": str(length)}


class Web:
    """A stand-in for the network: returns `data` for every address and counts requests."""

    def __init__(self, data: bytes, length: int | None = None) -> None:
        self.data, self.length, self.requests = data, length, 0

    def __call__(self, url: str) -> Response:
        self.requests += 1
        return Response(self.data, self.length)


def no_network(url: str) -> Response:
    raise urllib.error.URLError("Name or service not known")


def test_a_url_is_downloaded_once_and_its_hash_recorded(tmp_path: Path) -> None:
    web = Web(b"Dear Wren,\n", 11)
    first = open_corpus(URL + "?raw=1", data_dir=tmp_path, open_url=web)
    again = open_corpus(URL + "?raw=1", data_dir=tmp_path, open_url=no_network)
    assert documents(first) == documents(again) == ["Dear Wren,\n"]
    assert first.name == "first"
    (path,) = first.paths
    assert path.parent == tmp_path / ".cache" / "downloads"
    record = json.loads(path.with_name(path.name + ".json").read_text())
    assert record == {"url": URL + "?***", "sha256": hashlib.sha256(web.data).hexdigest(), "bytes": 11}
    assert sorted(os.listdir(path.parent)) == sorted([path.name, path.name + ".json"])


def test_a_download_in_a_read_only_folder_is_used_and_new_ones_go_elsewhere(tmp_path: Path) -> None:
    web, cache = Web(b"Dear Wren,\n"), tmp_path / "cache"
    packed = fetch(URL, data_dir=tmp_path, open_url=web)
    assert fetch(URL, data_dir=tmp_path, cache_dir=cache, open_url=no_network) == packed
    assert os.listdir(cache) == ["hashes"]
    packed.write_bytes(b"damaged")
    assert fetch(URL, data_dir=tmp_path, cache_dir=cache, open_url=web).parent == cache / "downloads"
    assert fetch(URL, data_dir=tmp_path, cache_dir=cache, open_url=no_network).parent == cache / "downloads"
    assert packed.read_bytes() == b"damaged"


def test_a_download_removes_what_killed_ones_left(tmp_path: Path) -> None:
    left = tmp_path / ".cache" / "downloads" / f".tmp-a.txt-{2**31 - 1}-{'0' * 8}"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    old = left.stat().st_mtime - 700
    os.utime(left, (old, old))
    path = fetch(URL, data_dir=tmp_path, open_url=Web(b"Dear Wren,\n"))
    assert sorted(os.listdir(left.parent)) == sorted([path.name, path.name + ".json"])


def test_a_damaged_or_unrecorded_download_is_repeated(tmp_path: Path) -> None:
    web = Web(b"text")
    path = fetch(URL, data_dir=tmp_path, open_url=web)
    path.write_bytes(b"tex")
    assert fetch(URL, data_dir=tmp_path, open_url=web).read_bytes() == b"text"
    path.with_name(path.name + ".json").unlink()
    fetch(URL, data_dir=tmp_path, open_url=web)
    assert web.requests == 3


@pytest.mark.parametrize(
    ("web", "expected"),
    [
        (Web(b"x" * 101), "larger than 100 bytes"),
        (Web(b"x", 101), "larger than 100 bytes"),
        (Web(b"x" * 50, 60), "broke off after 50 of 60 bytes"),
        (Web(b"x", -1), "broke off"),
        (no_network, f"{URL} could not be downloaded: urlopen error Name or service not known"),
    ],
)
def test_failed_downloads_leave_nothing(tmp_path: Path, web: Web, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        open_corpus(URL, data_dir=tmp_path, max_download_bytes=100, open_url=web)
    assert expected in str(caught.value)
    assert os.listdir(tmp_path / ".cache" / "downloads") == []


def test_only_https_and_supported_formats_are_downloaded(tmp_path: Path) -> None:
    assert "only https is supported" in error_of("http://example.org/a.txt", tmp_path)
    assert "expected hf://datasets/owner/name" in error_of("hf://owner/name", tmp_path)
    assert "only https is supported" in error_of("ftp://example.org/a.txt", tmp_path)
    assert "expected .txt" in error_of("https://example.org/a.zip", tmp_path)
    assert "expected .txt" in error_of("https://[::1", tmp_path)
    handler, headers = download._HttpsOnly(), email.message.Message()
    request = urllib.request.Request(URL)
    for elsewhere in ("http://example.org/a.txt", "ftp://example.org/a.txt"):
        with pytest.raises(DataError, match="not https"):
            handler.redirect_request(request, None, 302, "", headers, elsewhere)
    followed = handler.redirect_request(request, None, 302, "", headers, "https://example.org/b.txt")
    assert followed.full_url == "https://example.org/b.txt"


def test_tiny_shakespeare_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(b"First Citizen:").hexdigest())
    web = Web(b"First Citizen:")
    for _ in range(2):
        corpus = open_corpus("tinyshakespeare", data_dir=tmp_path, open_url=web)
        assert (corpus.name, documents(corpus), web.requests) == ("tinyshakespeare", ["First Citizen:"], 1)
    local = write(tmp_path / "tinyshakespeare.txt", "First Citizen:")
    assert opened("tinyshakespeare", tmp_path).paths == (local,)


def test_another_text_is_refused_as_tiny_shakespeare(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not the expected file"):
        open_corpus("tinyshakespeare", data_dir=tmp_path, open_url=Web(b"Hamlet"))
    write(tmp_path / "tinyshakespeare.txt", "Hamlet")
    message = error_of("tinyshakespeare", tmp_path)
    assert f"{tmp_path}/tinyshakespeare.txt is not tiny Shakespeare" in message
    assert "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed" in message


def test_without_a_network_the_error_names_the_file_to_provide(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_corpus("tinyshakespeare", data_dir=tmp_path, open_url=no_network)
    assert str(caught.value) == (
        f"put the text of tiny Shakespeare at {tmp_path}/tinyshakespeare.txt and start again, because "
        f"{download.TINY_SHAKESPEARE_URL} could not be downloaded: urlopen error Name or service not known"
    )


# Scanning


def scanned(tmp_path: Path, texts: list[str], **reading: Any) -> Scan:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    return scan(opened(write(tmp_path / "scan.jsonl", lines), **reading))


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(min_size=1), min_size=1))
def test_scan_equals_a_plain_computation(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    found = scanned(tmp_path_factory.getbasetemp(), texts, verbatim=True)
    assert found.sha256 == hashlib.sha256(b"".join(text.encode() + b"\xff" for text in texts)).hexdigest()
    assert (found.characters, found.documents) == (sum(map(len, texts)), len(texts))
    assert found.alphabet == "".join(sorted(set("".join(texts))))


def test_the_hash_sees_document_ends_but_not_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = scanned(tmp_path, ["ab", "c"]).sha256
    assert joined != scanned(tmp_path, ["a", "bc"]).sha256
    assert joined != scanned(tmp_path, ["abc"]).sha256
    monkeypatch.setattr(blocks, "BLOCK", 1)
    assert joined == scanned(tmp_path, ["ab", "c"]).sha256


def test_no_text_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        scan(opened(write(tmp_path / "a.txt", "\ufeff")))


def test_scanning_takes_flat_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "large.txt", "Dear Wren, ünder all this\n" * 1_000_000)
    tracemalloc.start()
    try:
        found = scan(opened(path))
        flat = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert len(path.read_text()) == found.characters
        whole = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert flat < 16e6 < whole  # bytes; the control shows that the measure sees a text held whole


def test_progress_is_logged_about_every_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.9, 2.0, 2.0, 3.9, 4.1, 4.1])
    monkeypatch.setattr(scan_module.time, "monotonic", lambda: next(clock))
    lines: list[str] = []
    progress = ByteProgress(lines.append, "reading")
    for _ in range(4):
        progress.add(3_000_000)
    assert lines == ["reading: 6 MB done", "reading: 12 MB done"]


# Remembering a scan


def bytes_read() -> int:
    """The bytes that this process has read so far."""
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("rchar"))


LATER = 2**62  # nanoseconds: long after any file of a test was written
SIZE = 8_000_000
counts_bytes = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/io")


def scan_and_count(path: Path, *, now: int = LATER) -> tuple[Scan, int]:
    """The cached scan of a file, and the bytes that were read for it."""
    corpus, before = opened(path), bytes_read()
    found = cached_scan(corpus, cache_dir=path.parent / "cache", now=lambda: now)
    return found, bytes_read() - before


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A text of SIZE bytes whose scan is cached."""
    path = write(tmp_path / "large.txt", b"Dear Wren,\n" * (SIZE // 11))
    found, read = scan_and_count(path)
    assert found == scan(opened(path))
    assert read >= path.stat().st_size  # the control: the measure sees a file that is read whole
    return path


@counts_bytes
def test_an_unchanged_text_is_not_read_again(large: Path) -> None:
    found, read = scan_and_count(large)
    assert found == scan(opened(large))
    assert read < SIZE / 20


def edit_middle(path: Path) -> None:
    """Change one byte in the middle."""
    with open(path, "r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"#")


def edit_middle_and_restore_mtime(path: Path) -> None:
    status = path.stat()
    edit_middle(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def replace_and_restore_mtime(path: Path) -> None:
    status = path.stat()
    other = write(path.with_name("other.txt"), path.read_bytes().replace(b"Wren", b"Nerw"))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


EDITS = {
    "appended": lambda path: path.write_bytes(path.read_bytes() + b"#"),
    "same size": edit_middle,
    "same size and mtime": edit_middle_and_restore_mtime,
    "replaced by a file of the same size and mtime": replace_and_restore_mtime,
}


@counts_bytes
@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_text_is_read_again(large: Path, edit: str) -> None:
    before = scan_and_count(large)[0]
    EDITS[edit](large)
    found, read = scan_and_count(large)
    assert found == scan(opened(large)) != before
    assert read >= SIZE
    assert scan_and_count(large)[1] < SIZE / 20


def without_ctime(patch: pytest.MonkeyPatch) -> None:
    """Compare files as on Windows, which has no time that a program cannot set."""
    plain = stamps._stamp
    patch.setattr(stamps, "_stamp", lambda path: plain(path) | {"ctime_ns": 0})


@counts_bytes
@pytest.mark.parametrize(("position", "noticed"), [(0, True), (SIZE // 2, False), (-1, True)])
def test_without_ctime_a_same_size_edit_is_noticed_at_the_edges_only(
    large: Path, monkeypatch: pytest.MonkeyPatch, position: int, noticed: bool
) -> None:
    """The documented limit on Windows."""
    without_ctime(monkeypatch)
    before, status = scan_and_count(large)[0], large.stat()
    data = bytearray(large.read_bytes())
    data[position] = ord("#")
    large.write_bytes(data)
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (scan_and_count(large)[0] != before) == noticed


@counts_bytes
def test_a_text_modified_just_before_it_was_read_is_read_again(large: Path) -> None:
    """A later edit may carry the same time stamps."""
    written = max(large.stat().st_mtime_ns, large.stat().st_ctime_ns)
    os.truncate(large, SIZE // 2)  # so that the cached scan is out of date
    for now, again in ((written + 10**9, True), (written + 10**9, True), (written + 10**10, True), (LATER, False)):
        assert (scan_and_count(large, now=now)[1] >= SIZE // 2) == again


@counts_bytes
@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record.unlink(),
        lambda record: record.write_text("{"),
        lambda record: record.write_text(record.read_text().replace('"documents": 1', '"documents": 2')),
        lambda record: record.write_text("[1]"),
    ],
)
def test_a_damaged_record_is_not_believed(large: Path, damage: Callable[[Path], object]) -> None:
    (record,) = (large.parent / "cache" / "scans").iterdir()
    damage(record)
    found, read = scan_and_count(large)
    assert found == scan(opened(large))
    assert read >= SIZE


def test_each_set_of_files_has_its_own_record(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.txt", "ab"), write(tmp_path / "b.txt", "cde")
    sources = (one, two, f"{one},{two}", f"{two},{one}")
    for _ in range(2):
        found = [cached_scan(opened(source), cache_dir=tmp_path / "cache", now=lambda: LATER) for source in sources]
        assert found == [scan(opened(source)) for source in sources]
    assert len(list((tmp_path / "cache" / "scans").iterdir())) == 4


@counts_bytes
def test_each_way_of_reading_a_file_has_its_own_record(tmp_path: Path) -> None:
    """A text with carriage returns has two hashes, and a file of two fields two texts; none is read again, none is mistaken."""
    rows = [{"text": "Dear\r\n" * 25_000, "body": "Wren\r\n" * 50_000}] * 4  # the first is read to tell their form
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    ways = [{}, {"verbatim": True}, {"text_field": "body"}, {"text_field": "body", "verbatim": True}]
    plain = [scan(opened(path, **way)) for way in ways]
    assert len({found.sha256 for found in plain}) == 4
    for again in (False, True):
        before = bytes_read()
        found = [cached_scan(opened(path, **way), cache_dir=tmp_path / "cache", now=lambda: LATER) for way in ways]
        assert found == plain
        assert (bytes_read() - before < path.stat().st_size) == again


def test_a_damaged_cache_of_one_way_is_forgotten_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "Dear\r\n")
    normal, verbatim = opened(path), opened(path, verbatim=True)
    for corpus in (normal, verbatim):
        cached_scan(corpus, cache_dir=tmp_path / "cache", now=lambda: LATER)
    forget_scan(normal, cache_dir=tmp_path / "cache")
    (left,) = (tmp_path / "cache" / "scans").iterdir()
    assert left.name.startswith("scan1")  # the name under which earlier versions recorded it


def test_remarks_on_files_are_remembered(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "text" / f"{number}.csv", "id;text\n1;x\n")
    write(tmp_path / "text" / "5.txt", "a<|endoftext|>b<|endoftext|>")
    for _ in range(2):
        notes = cached_scan(opened(tmp_path / "text"), cache_dir=tmp_path / "cache", now=lambda: LATER).notes
        assert [str(tmp_path / "text" / f"{number}.csv") in note for number, note in enumerate(notes[:3])] == [True] * 3
        assert "2 more" in notes[3]
        assert "2 times" in notes[4]


def test_zeros_in_a_text_are_told(tmp_path: Path) -> None:
    """A crash may leave them at the end of a file."""
    (note,) = scanned(tmp_path, ["a letter", "cut off" + "\0" * 1200]).notes
    assert note.endswith("has 1,200 zeros (U+0000) among its characters, as a damaged file has")
    assert scanned(tmp_path, ["a letter", "whole"]).notes == ()


def test_a_separator_is_advised_where_it_would_end_documents(tmp_path: Path) -> None:
    row = '{"text": "a<|endoftext|>b"}\n'
    names = {"a.txt": "a<|endoftext|>b", "a.jsonl": row, "a.py": "'<|endoftext|>'"}
    advised = {
        name: "document separator" in scan(opened(write(tmp_path / name, text))).notes[-1]
        for name, text in names.items()
    }
    assert advised == {"a.txt": True, "a.jsonl": False, "a.py": False}


@pytest.mark.parametrize("block", [1, 5, 12, 13, 14, 1 << 20])
def test_written_ends_of_text_are_counted_wherever_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    path = write(tmp_path / "a.txt", "<|endoftext|>" * 3 + "x<|endoftext|" + "<|endoftext|>")
    (note,) = scan(opened(path)).notes
    assert "4 times" in note


@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.gz"])
@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["<|end|>", "<|end", "|>", "<", "ab", "\r\n", "日本"])).map("".join), st.integers(1, 9))
def test_a_separator_ends_documents_wherever_blocks_end(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, text: str, block: int
) -> None:
    path = write(tmp_path_factory.mktemp("text") / f"a{suffix}", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        corpus = opened(path, separator="<|end|>")
        assert documents(corpus) == [each for each in text.replace("\r\n", "\n").split("<|end|>") if each]
        assert max((len(piece) for piece, _ in corpus.pieces()), default=0) <= max(block, 2) + len("<|end|>")


def test_a_separator_gives_another_scan_and_is_no_text_of_a_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a<|end|>b")
    found = [
        cached_scan(opened(path, separator=s), cache_dir=tmp_path / "c", now=lambda: LATER) for s in ("", "<|end|>")
    ]
    assert [(each.characters, each.documents) for each in found] == [(9, 1), (2, 2)]
    assert found[0].sha256 != found[1].sha256
    path = write(tmp_path / "a.jsonl", '{"text": "a<|end|>b"}')
    assert documents(opened(path, separator="<|end|>")) == ["a<|end|>b"]


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "ab")
    write(tmp_path / "cache", "a file, not a folder")
    assert scan_and_count(path)[0] == scan(opened(path))


@counts_bytes
def test_a_download_is_hashed_once(tmp_path: Path) -> None:
    web = Web(b"Dear Wren,\n" * (SIZE // 11))
    path = fetch(URL, data_dir=tmp_path, open_url=web)
    os.utime(path, (1, 1))
    (tmp_path / ".cache" / "hashes").mkdir()
    remember = partial(stamps.remembered, "sha256", [path], tmp_path / ".cache" / "hashes", now=lambda: LATER)
    assert remember(lambda: stamps.file_sha256(path)) == hashlib.sha256(web.data).hexdigest()
    before = bytes_read()
    assert fetch(URL, data_dir=tmp_path, open_url=web) == path
    assert bytes_read() - before < SIZE / 20
    assert web.requests == 1


@counts_bytes
def test_a_start_does_not_read_an_unchanged_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run opens a text; a Log belongs to one start."""
    path = write(tmp_path / "large.txt", b"Dear Wren,\n" * (SIZE // 11))
    monkeypatch.setattr(run_text, "CACHE_FOLDER", tmp_path / "cache")
    monkeypatch.setattr(stamps, "RECENT", -LATER)  # the file was written just now
    counts = []
    for _ in range(2):
        before = bytes_read()
        found = run_text.scan_source(str(path), Log())[1]
        counts.append(bytes_read() - before)
        assert found == scan(opened(path))
    assert counts[0] >= path.stat().st_size
    assert counts[1] < SIZE / 20
