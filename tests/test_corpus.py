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

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.run import text as run_text
from milepost.runtime.progress import Log
from milepost.text import download, readers, stamps
from milepost.text import scan as scan_module
from milepost.text.corpus import Corpus, open_corpus
from milepost.text.download import fetch
from milepost.text.errors import DataError
from milepost.text.scan import ByteProgress, Scan, cached_scan, scan

URL = "https://example.org/letters/first.txt"


def write(path: Path, text: str | bytes) -> Path:
    data = text if isinstance(text, bytes) else text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def opened(source: object, data_dir: Path = Path("unused")) -> Corpus:
    return open_corpus(str(source), data_dir=data_dir)


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


def as_csv(rows: list[list[str]]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out).writerows(rows)
    return out.getvalue()


THREE = ['first\r\nletter, "quoted"', "zwei — ü", "third\n\nend\u2028x"]
KINDS = {
    "a.txt": (THREE[0], THREE[:1]),
    "a.md": (THREE[1], THREE[1:2]),
    "a.jsonl": ("\n".join(json.dumps({"id": 1, "text": text}) for text in THREE) + "\n\n", THREE),
    "a.csv": (as_csv([["id", "text"], *([str(i), text] for i, text in enumerate(THREE))]), THREE),
}


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("name", KINDS)
def test_every_format_gives_its_documents(tmp_path: Path, name: str, gz: str) -> None:
    text, expected = KINDS[name]
    assert documents(opened(write(tmp_path / (name + gz), text))) == expected


@pytest.mark.parametrize("name", KINDS)
def test_a_byte_order_mark_is_dropped_only_at_the_start(tmp_path: Path, name: str) -> None:
    text, expected = KINDS[name]
    assert documents(opened(write(tmp_path / name, "\ufeff" + text))) == expected
    assert documents(opened(write(tmp_path / "b.txt", "\ufeffa\ufeffb"))) == ["a\ufeffb"]


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
        patch.setattr(readers, "BLOCK", block)
        assert "".join(documents(opened(path))) == text.removeprefix("\ufeff")


def test_long_records_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK", 4)
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
        patch.setattr(readers, "BLOCK", block)
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
        ("[1]", "found a list"),
        ('{"body": "x"}', "found body"),
        ('{"text": 3}', "found a int"),
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
        assert ".txt, .md, .jsonl, .csv, each also with .gz" in error_of(write(tmp_path / name, "x"))
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
    assert record == {"url": URL + "?raw=1", "sha256": hashlib.sha256(web.data).hexdigest(), "bytes": 11}
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


def scanned(tmp_path: Path, texts: list[str]) -> Scan:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    return scan(opened(write(tmp_path / "scan.jsonl", lines)))


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(min_size=1), min_size=1))
def test_scan_equals_a_plain_computation(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    found = scanned(tmp_path_factory.getbasetemp(), texts)
    assert found.sha256 == hashlib.sha256(b"".join(text.encode() + b"\xff" for text in texts)).hexdigest()
    assert (found.characters, found.documents) == (sum(map(len, texts)), len(texts))
    assert found.alphabet == "".join(sorted(set("".join(texts))))


def test_the_hash_sees_document_ends_but_not_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = scanned(tmp_path, ["ab", "c"]).sha256
    assert joined != scanned(tmp_path, ["a", "bc"]).sha256
    assert joined != scanned(tmp_path, ["abc"]).sha256
    monkeypatch.setattr(readers, "BLOCK", 1)
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
