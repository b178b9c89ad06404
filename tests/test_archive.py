"""Torch archives: what is written here torch opens as its own, and damage is found and never guessed around."""

import io
import json
import pickle
import pickletools
import random
import resource
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from drive import ROOT, tensor_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from records import FULL, WEIGHT, flipped, members, pack, record
from work import calls, limited

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError, archive, tensor_listing
from milepost.ckpt.dtypes import FLOATS
from milepost.ckpt.record import metadata
from milepost.files import NewFile


@pytest.fixture
def path(tmp_path) -> Path:
    return ckpt.save(record(7, **FULL), tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# What torch opens


def dumped(path: Path, content: dict[str, Any], **options: Any) -> Path:
    with NewFile(path) as file:
        archive.dump(content, file, **options)
        file.finish()
    return path


def every_kind() -> dict[str, torch.Tensor]:
    """Every dtype, and every way in which a tensor can lie in its memory."""
    draw = torch.Generator().manual_seed(1)
    floats = {f"torch.{one}": torch.randn(5, 3, generator=draw).to(getattr(torch, one)) for one in FLOATS}
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    base = torch.arange(24.0).reshape(4, 6)
    return floats | {
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "int32": torch.tensor([[-(2**31)], [2**31 - 1]], dtype=torch.int32),
        "no dimension": torch.tensor(3.5),
        "empty": torch.empty(0),
        "empty in the middle": torch.empty(2, 0, 3),
        "odd": odd,
        "transposed": base.t(),
        "every second": base[:, ::2],
        "a part": base[1:3, 2:4],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "trained": torch.nn.Parameter(torch.ones(2)),
        "channels last": torch.arange(16.0).reshape(1, 2, 2, 4).to(memory_format=torch.channels_last),
    }


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and flat[0].equal(flat[1])


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_opens_every_tensor_as_it_was(mmap, tmp_path):
    tensors = every_kind()
    path = dumped(tmp_path / "all.pt", {"tensors": tensors, "step": 3, "none": None, "list": [1, 2.5, "é", True]})
    content = torch.load(path, weights_only=True, mmap=mmap)
    assert list(content["tensors"]) == list(tensors)
    assert [name for name, tensor in tensors.items() if not same_bits(content["tensors"][name], tensor)] == []
    assert all(tensor.is_contiguous() for tensor in content["tensors"].values())
    assert {name: value for name, value in content.items() if name != "tensors"} == {
        "step": 3, "none": None, "list": [1, 2.5, "é", True],
    }  # fmt: skip


def test_it_holds_what_torchs_own_archive_of_the_same_holds(tmp_path):
    """torch keeps the memory around a part and the order of a transposed one; the values are the same."""
    content = {"model_state_dict": every_kind(), "step": 3}
    torch.save(content, tmp_path / "theirs.pt")
    dumped(tmp_path / "ours.pt", content)
    ours, theirs = (torch.load(tmp_path / name, weights_only=True) for name in ("ours.pt", "theirs.pt"))
    assert ours.keys() == theirs.keys()
    assert ours["step"] == theirs["step"]
    for name, tensor in theirs["model_state_dict"].items():
        assert same_bits(ours["model_state_dict"][name], tensor), name


def test_every_tensor_begins_where_its_element_may(tmp_path):
    path = dumped(tmp_path / "all.pt", {f"é{one}": torch.ones(one) for one in range(40)}, metadata={"step": 1})
    starts = {name: span.start for name, span in data_ranges(path).items()}
    assert len([name for name in starts if name.startswith("archive/data/")]) == 40
    assert {start % 64 for start in starts.values()} == {0}


def test_every_member_has_its_checksum_and_stands_there_once(tmp_path):
    path = dumped(tmp_path / "all.pt", {"tensors": every_kind()}, metadata={"step": 1})
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        names = file.namelist()
        assert json.loads(file.read("archive/milepost.json")) == {"step": 1}
        assert {one.compress_type for one in file.infolist()} == {zipfile.ZIP_STORED}
    assert len(names) == len(set(names)) == len(every_kind()) + 4
    assert archive.verify(path) == []


@pytest.mark.parametrize("limit", [100, 1000])
@pytest.mark.parametrize("mmap", [False, True])
def test_an_archive_with_the_fields_of_a_large_one_opens_too(mmap, limit, tmp_path, monkeypatch):
    """Past 4 GiB a zip file needs longer fields; here already past `limit` bytes."""
    tensors = {str(one): torch.randn(one) for one in (1, 30, 400, 5000)}
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    path = dumped(tmp_path / "large.pt", {"tensors": tensors}, metadata={"step": 1})
    monkeypatch.undo()
    assert path.read_bytes().count(b"PK\x06\x06") == 1  # the end of a large archive's directory
    content = torch.load(path, weights_only=True, mmap=mmap)["tensors"]
    assert all(same_bits(content[name], tensor) for name, tensor in tensors.items())
    assert {span.start % 64 for span in data_ranges(path).values()} == {0}
    assert archive.verify(path) == []
    assert archive.read_metadata(path) == {"step": 1}


def test_a_tied_tensor_is_written_under_both_names(tmp_path):
    one = torch.randn(3, 2)
    content = torch.load(dumped(tmp_path / "tied.pt", {"a": one, "b": one}), weights_only=True)
    assert content["a"].equal(one)
    assert content["b"].equal(one)


def test_a_dtype_that_no_checkpoint_has_is_an_error_and_no_file(tmp_path):
    with pytest.raises(KeyError):
        dumped(tmp_path / "bytes.pt", {"a": torch.ones(2, dtype=torch.complex64)})


def test_it_is_written_to_a_stream_that_cannot_seek(tmp_path):
    """As NewFile, which writes past the page cache and never goes back."""

    class Stream(io.RawIOBase):
        data = b""

        def writable(self) -> bool:
            return True

        def tell(self) -> int:
            return len(self.data)

        def write(self, piece: Any) -> int:
            self.data += bytes(piece)
            return len(piece)

    stream = Stream()
    archive.dump({"a": torch.arange(5.0)}, stream)
    assert torch.load(io.BytesIO(stream.data), weights_only=True)["a"].tolist() == [0, 1, 2, 3, 4]
    assert dumped(tmp_path / "file.pt", {"a": torch.arange(5.0)}).read_bytes() == stream.data


def test_the_same_content_gives_the_same_bytes(tmp_path):
    files = [dumped(tmp_path / name, {"tensors": every_kind()}, metadata={"step": 1}) for name in ("a.pt", "b.pt")]
    assert files[0].read_bytes() == files[1].read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# What it is, without unpickling


def test_known_by_its_name_or_its_first_bytes(tmp_path):
    path = dumped(tmp_path / "a.pt", {"a": torch.ones(1)})
    other = path.rename(tmp_path / "no suffix")
    (tmp_path / "text").write_text("PK, but no archive")
    (tmp_path / "b.pth").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    assert [archive.is_archive(one) for one in (other, tmp_path / "b.pth")] == [True, True]
    assert [archive.is_archive(one) for one in (tmp_path / "text", tmp_path / "folder.pt")] == [False, False]


def test_the_words_of_anothers_pickle_are_seen_and_not_unpickled(tmp_path):
    torch.save({"model": {"wte": torch.ones(2)}, "iter_num": 5}, tmp_path / "theirs.pt")
    assert {"model", "wte", "iter_num"} <= archive.pickle_strings(tmp_path / "theirs.pt")
    dumped(tmp_path / "ours.pt", {"model": 1}, metadata={"step": 1})
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04")
    assert [archive.pickle_strings(tmp_path / name) for name in ("ours.pt", "damaged.pt", "missing.pt")] == [
        frozenset()
    ] * 3


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.pt"
    for step in (1, 2):
        path.unlink(missing_ok=True)
        assert archive.read_metadata(dumped(path, {}, metadata={"step": step})) == {"step": step}


NO_ARCHIVES = [
    (b"", "an empty file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "run `git lfs pull`"),
    (b"<!doctype html><html>not found</html>", "a web page"),
    (b'\n {"error": 404}', "JSON text"),
    (b"GGUF\x03\0\0\0" + bytes(40), "a GGUF file"),
    (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file"),
    (b"\x80\x02}q\x00.", "a bare pickle, which is never opened"),
    (b"\x10\0\0\0\0\0\0\0" + b'{"a":1}', "name the folder that holds it"),
    (b"Dear Wren,", "of an unknown kind"),
]


@pytest.mark.parametrize(("data", "kind"), NO_ARCHIVES, ids=[kind for _, kind in NO_ARCHIVES])
def test_what_is_no_archive_is_called_what_it_is(data, kind, tmp_path):
    (tmp_path / "a.pt").write_bytes(data)
    assert kind in refusal(tmp_path / "a.pt")
    assert kind_of_error(tmp_path / "a.pt") == "not understood"
    with pytest.raises(CheckpointError) as caught:
        archive.load(tmp_path / "a.pt")
    assert caught.value.remedy


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def data_ranges(path: Path) -> dict[str, range]:
    """Where each member's bytes lie in the file."""
    ranges = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            start = member.header_offset + 30 + name + extra
            ranges[member.filename] = range(start, start + member.file_size)
    return ranges


def attempt(path: Path, **options) -> Checkpoint | str:
    """Return the record of `path`, or the message of the error."""
    try:
        return ckpt.load(path, **options)
    except CheckpointError as caught:
        error, text = caught, str(caught)
    assert error.path == path
    assert error.kind in ("damaged", "not understood", "lacking", "refused")
    assert text.startswith(str(path))
    assert "\n" not in text
    assert "weights_only" not in text  # torch's advice is to turn the safety off
    return text


def kind_of_error(path: Path) -> str:
    """Return the kind of the error with which `path` is refused."""
    with pytest.raises(CheckpointError) as caught:
        ckpt.load(path)
    return caught.value.kind


def refusal(path: Path, **options) -> str:
    """Return the message of the error with which `path` is refused."""
    text = attempt(path, **options)
    assert isinstance(text, str)
    return text


def test_a_file_truncated_anywhere_is_refused_and_the_previous_is_offered(path, tmp_path):
    newer = ckpt.save(record(8), tmp_path)
    whole = newer.read_bytes()
    with zipfile.ZipFile(newer) as archive:
        edges = {0, 1, 4, 8, 64, archive.start_dir, len(whole) - 22}
        edges |= {member.header_offset for member in archive.infolist()}
    edges |= {edge for span in data_ranges(newer).values() for edge in (span.start, span.stop)}
    cuts = {edge + shift for edge in edges for shift in (-1, 0, 1)} | set(range(0, len(whole), 400))
    assert len(cuts) > 80
    for cut in sorted(cut for cut in cuts if 0 <= cut < len(whole)):
        newer.write_bytes(whole[:cut])
        reason = refusal(newer)
        assert "empty" in reason or "cut short" in reason or cut < 4
        assert kind_of_error(newer) == ("damaged" if "cut short" in reason else "not understood")
        assert ckpt.verify(newer) == [reason]
    chosen, notes = ckpt.resolve("latest", tmp_path)
    assert chosen == path
    assert notes[0].startswith(f"skipped: {newer}")


@pytest.mark.parametrize("size", [1, 5, 32, 4096])
def test_zeros_where_a_file_should_be_are_refused(size, path):
    path.write_bytes(bytes(size))
    assert "is not a checkpoint but" in refusal(path)
    assert kind_of_error(path) == "not understood"


def test_a_bit_flipped_in_any_member_is_found(path):
    """verify=True finds every one; in the pickle and in the metadata every load does."""
    whole = path.read_bytes()
    for name, span in data_ranges(path).items():
        for position in sorted({span[0], span[len(span) // 3], span[len(span) // 2], span[-1]}):
            flipped(path, position, bit=position % 8)
            refusal(path, verify=True)
            assert len(ckpt.verify(path)) == 1
            if name.endswith(("data.pkl", "milepost.json")):
                refusal(path)
            path.write_bytes(whole)
    assert ckpt.verify(path) == []


def test_a_bit_flipped_outside_the_members_is_found_or_harmless(path):
    """Headers, padding, names, directory: refused, or the record is still the same in every bit."""
    whole, expected = path.read_bytes(), tensor_bytes(ckpt.load(path))
    inside = {position for span in data_ranges(path).values() for position in span}
    outside = [position for position in range(len(whole)) if position not in inside]
    refused = 0
    for position in outside[::9] + outside[-30:]:
        flipped(path, position, bit=position % 8)
        read = attempt(path, verify=True)
        if isinstance(read, str):
            refused += 1
        else:
            assert tensor_bytes(read) == expected
            assert read.schedule == FULL["schedule"]
        path.write_bytes(whole)
    assert refused > 20


def test_control_plain_torch_does_not_see_a_flipped_bit(path):
    """Why verify is there: torch loads the damaged number without a word, and so does a load that does not verify."""
    span = data_ranges(path)["archive/data/0"]
    flipped(path, span.start + 3, bit=6)
    assert not torch.load(path, weights_only=True)["model_state_dict"][WEIGHT].equal(record(7).model_state[WEIGHT])
    assert not ckpt.load(path).model_state[WEIGHT].equal(record(7).model_state[WEIGHT])
    assert "archive/data/0" in refusal(path, verify=True)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    path = ckpt.save(record(7), tmp_path_factory.mktemp("parts"))
    return path.with_name("changed.pt"), members(path)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_pickle_changed_in_any_way_loads_or_is_refused_in_one_sentence(parts, data):
    """Its checksum is right: not an accident of the disk, but somebody's work.

    Never another exception, never a warning.
    """
    path, content = parts
    pickled = bytearray(content["archive/data.pkl"])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(pickled) - 1))
        pickled[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    pack(path, content | {"archive/data.pkl": bytes(pickled)})
    with warnings.catch_warnings(action="error"):
        read = attempt(path)
    if not isinstance(read, str):
        assert all(isinstance(tensor, torch.Tensor) for tensor in read.model_state.values())


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"X\x05\0\0\0state", b"X\x05\0\0\0stale", "its optimizer state is not in the form of"),
        (b"X\x0c\0\0\0param_groups", b"X\x0c\0\0\0param_grouse", "its optimizer state is not in the form of"),
    ],
    ids=["no state", "no groups"],
)
def test_an_optimizer_state_of_another_form_is_refused_and_the_model_opens(parts, old, new, problem):
    path, content = parts
    pickled = content["archive/data.pkl"]
    assert pickled.count(old) == 1
    pack(path, content | {"archive/data.pkl": pickled.replace(old, new)})
    assert problem in attempt(path)
    assert attempt(path, optimizer=False).model_state[WEIGHT].equal(record(7).model_state[WEIGHT])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
# Another format's number is no other value of the same: 1 is read as an old one, 3 is refused as a newer one, each with
# a test of its own.
@given(name=st.sampled_from(sorted(metadata(record()).keys() - {"format_version"})), value=json_values)
def test_metadata_changed_in_any_way_is_taken_as_its_type_or_refused(parts, name, value):
    path, content = parts
    values = json.loads(content["archive/milepost.json"]) | {name: value}
    pack(path, content | {"archive/milepost.json": json.dumps(values)})
    read = attempt(path)
    if isinstance(read, str):
        assert any(word in read for word in (name, "NaN", "Infinity", "vocab_size"))
        return
    taken = getattr(read, name)
    assert taken == value
    assert not isinstance(taken, (int, float)) or (type(taken) is not bool and 0 <= taken < 2**63)


def test_our_own_pickles_ask_for_nothing_but_tensors(path):
    asked = {
        wanted for code, wanted, _ in pickletools.genops(members(path)["archive/data.pkl"]) if code.name == "GLOBAL"
    }
    assert asked == {"collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2"}


# ---------------------------------------------------------------------------------------------------------------------
# What is checked is what is opened


def tensors_in(value: Any) -> list[bytes]:
    """The bytes of every tensor in nested dictionaries, in order."""
    if isinstance(value, torch.Tensor):
        return [value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()]
    return [data for each in value.values() for data in tensors_in(each)] if isinstance(value, dict) else []


def opened_by_torch(path: Path) -> list[bytes] | None:
    """Return the bytes of the tensors by torch's own reader; None if it refuses the file."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return tensors_in(torch.load(path, weights_only=True))
    except Exception:  # whatever a strange file leads it to
        return None


@pytest.fixture(scope="module")
def structures(tmp_path_factory) -> list[tuple[Path, bytes]]:
    """An archive of our writer, of torch's, and of Python's zipfile; and where a changed copy of each may lie."""
    folder = tmp_path_factory.mktemp("structures")
    ours = ckpt.save(record(7), folder)
    torch.save(torch.load(ours, weights_only=True), folder / "theirs.pt")
    pack(folder / "packed.pt", members(ours))
    files = [ours, folder / "theirs.pt", folder / "packed.pt"]
    return [(file.with_name(f"changed-{file.name}"), file.read_bytes()) for file in files]


def second_readers_view(path: Path) -> str:
    """Whether verify and load agree about the file, and torch about its tensors."""
    problems = [(str(problem), problem.kind) for problem in archive.verify(path)]
    try:
        content = archive.load(path)[0]
    except CheckpointError as error:
        content, problem, kind = {}, str(error), error.kind
    else:
        problem = ""
    if problem:
        assert problems == [(problem, kind)]
        return "refused"
    if not problems:
        assert opened_by_torch(path) in (tensors_in(content), None)
    return "damaged bytes" if problems else "opened"


@settings(deadline=None, max_examples=300)
@given(number=st.integers(0, 2), seed=st.integers(0, 2**32))
def test_what_verify_passes_is_the_same_to_a_second_reader(structures, number, seed):
    path, data = structures[number]
    path.write_bytes(fuzz.zip_structure(random.Random(seed), data))
    second_readers_view(path)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_hostile_archives(structures, part):
    """None needs more memory than a process of this size with 256 MiB more has, none hangs, and all readers agree."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    came = Counter[str]()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, hard))
    try:
        for seed in range(part * 10_000, (part + 1) * 10_000):
            path, data = structures[seed % 3]
            path.write_bytes(fuzz.zip_structure(random.Random(seed), data))
            with limited(60):
                came[second_readers_view(path)] += 1
            assert not any(problem.kind == "lacking" for problem in archive.verify(path)), seed  # such as memory
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
    print(part, dict(came))
    assert came.total() == 10_000
    assert came["refused"] > 1000


def test_control_changed_structures_are_refused_and_some_mislead_torch(structures):
    """Negative control: of the same changes, torch opens some that are refused here,
    and finds other tensors in them.
    """
    came, misled = Counter[str](), 0
    for seed in range(400):
        path, data = structures[seed % 3]
        path.write_bytes(fuzz.zip_structure(random.Random(seed), data))
        came[view := second_readers_view(path)] += 1
        path.write_bytes(data)
        original = opened_by_torch(path)
        path.write_bytes(fuzz.zip_structure(random.Random(seed), data))
        misled += view == "refused" and opened_by_torch(path) not in (original, None)
    assert came["refused"] > 250
    assert came["opened"] > 5  # fields that say nothing about the members
    assert misled > 3


def with_twin(data: bytes, name: str, content: bytes) -> bytes:
    file = io.BytesIO(data)
    with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr(name, content)
    return file.getvalue()


def changed_at(data: bytes, where: str, offset: int, form: str, change: Callable[[int], int]) -> bytes:
    """One field of the first entry, the first local header or the end record changed."""
    records = fuzz.zip_records(data)
    at = {"entry": records[0], "local": records[len(records) // 2], "end": records[-1]}[where][0]
    changed = bytearray(data)
    struct.pack_into(form, changed, at + offset, change(*struct.unpack_from(form, data, at + offset)))
    return bytes(changed)


def renamed(data: bytes, old: bytes, new: bytes, *, central_only: bool = False) -> bytes:
    begin = fuzz.zip_records(data)[0][0] if central_only else 0
    return data[:begin] + data[begin:].replace(old, new)


BOMB = b"\x80\x02" + b"}" * 4_000_000 + b"."
AMBIGUOUS: dict[str, Callable[[bytes], bytes]] = {
    "name in capitals": lambda data: with_twin(data, "archive/DATA.PKL", BOMB),
    "folder in capitals": lambda data: with_twin(data, "ARCHIVE/data.pkl", BOMB),
    "a tensor's name in capitals": lambda data: with_twin(data, "archive/DATA/0", b"1234"),
    "one name twice": lambda data: with_twin(data, "archive/data/0", b"1234"),
    "a backslash": lambda data: with_twin(data, "archive\\data.pkl", BOMB),
    "letters beyond ASCII": lambda data: with_twin(data, "archive/d\u00e4ta", b""),
    "a second folder": lambda data: with_twin(data, "other/data/0", b"1234"),
    "a member without a folder": lambda data: with_twin(data, "data.txt", b""),
    "a folder entry": lambda data: with_twin(data, "archive/data/", b""),
    "a deeper pickle only": lambda data: renamed(data, b"archive/data.pkl", b"arch/ve/data.pkl"),
    "another name behind the directory's": lambda data: renamed(data, b"data/0", b"data/1", central_only=True),
    "local method": lambda data: changed_at(data, "local", 8, "<H", lambda _: 8),
    "local flags": lambda data: changed_at(data, "local", 6, "<H", lambda flags: flags ^ 8),
    "local checksum": lambda data: changed_at(data, "local", 14, "<L", lambda crc: crc ^ 1),
    "local size": lambda data: changed_at(data, "local", 22, "<L", lambda size: size + 1),
    "local packed size": lambda data: changed_at(data, "local", 18, "<L", lambda size: size + 1),
    "local extra field": lambda data: changed_at(data, "local", 28, "<H", lambda size: size + 4),
    "packed size": lambda data: changed_at(data, "entry", 20, "<L", lambda size: size - 1),
    "smaller size": lambda data: changed_at(
        changed_at(data, "entry", 20, "<L", lambda size: size - 1), "entry", 24, "<L", lambda size: size - 1
    ),
    "offset": lambda data: changed_at(data, "entry", 42, "<L", lambda offset: offset + 1),
    "one place for two": lambda data: changed_at(data, "entry", 42, "<L", lambda _: 300),
    "outside the file": lambda data: changed_at(data, "entry", 42, "<L", lambda _: 2**31),
    "zip64 values missing": lambda data: changed_at(data, "entry", 42, "<L", lambda _: 2**32 - 1),
    "count on this disk": lambda data: changed_at(data, "end", 8, "<H", lambda count: count - 1),
    "count": lambda data: changed_at(
        changed_at(data, "end", 8, "<H", lambda count: count - 1), "end", 10, "<H", lambda count: count - 1
    ),
    "another disk": lambda data: changed_at(data, "end", 4, "<H", lambda _: 1),
    "directory's size": lambda data: changed_at(data, "end", 12, "<L", lambda size: size - 1),
    "a comment": lambda data: changed_at(data, "end", 20, "<H", lambda _: 3) + b"abc",
    "a second end record": lambda data: data + data[-22:],
    "bytes behind it": lambda data: data + b"\n",
    "bytes before it": lambda data: b"x" + data,
    "a gap before the directory": lambda data: changed_at(
        data[: fuzz.zip_records(data)[0][0]] + b"gap" + data[fuzz.zip_records(data)[0][0] :],
        "end",
        16,
        "<L",
        lambda at: at,
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_whatever_two_zip_readers_could_read_differently_is_refused_by_all_commands(case, tmp_path):
    path = pack(tmp_path / "a.pt", members(ckpt.save(record(3), tmp_path)))
    data = path.read_bytes()
    assert archive.verify(path) == []  # control
    assert ckpt.load(path).step == 3
    path.write_bytes(AMBIGUOUS[case](data))
    reason = refusal(path)
    assert ckpt.verify(path) == [reason]
    assert [each.problem for each in ckpt.find(tmp_path) if each.path == path] == [reason]
    with pytest.raises(CheckpointError):
        tensor_listing.held(path)


def test_zip64_records_that_disagree_are_refused(tmp_path):
    torch.save(torch.load(ckpt.save(record(3), tmp_path), weights_only=True), path := tmp_path / "theirs.pt")
    data = path.read_bytes()
    assert data[-98:-94] == b"PK\x06\x06"
    assert archive.verify(path) == []  # control
    for place in (*range(-94, -90), *range(-82, -22)):  # every byte of both records but for versions and signatures
        if data[place : place + 1] and place not in range(-42, -38):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place:][1:])
            assert [str(problem) for problem in archive.verify(path)] == [refusal(path)]


@pytest.mark.parametrize("name", ["a.pt", "model with spaces.pt", "m\u00f6del.pt", "data.pkl.pt", "x"])
def test_what_torch_saves_under_any_name_is_opened(name, tmp_path):
    content = {"model_state_dict": every_kind() | {"empty list": torch.empty(0, 3)}, "step": 3}
    del content["model_state_dict"]["expanded"]  # it claims more bytes than the file holds  # type: ignore[attr-defined]
    torch.save(content, path := tmp_path / name)
    opened, _ = archive.load(path)
    assert tensors_in(opened) == tensors_in(torch.load(path, weights_only=True))
    assert archive.verify(path) == []


def test_what_torch_saves_to_a_stream_is_opened(tmp_path):
    content = {"w": torch.arange(1000.0), "n": torch.arange(3), "e": torch.empty(0)}
    with open(path := tmp_path / "a.pt", "wb") as file:
        torch.save(content, file)
    assert tensors_in(archive.load(path)[0]) == tensors_in(content)
    assert archive.verify(path) == []


@pytest.mark.parametrize("alignment", [1, 4096])
def test_what_torch_saves_with_another_alignment_is_opened(alignment, tmp_path):
    content = {"w": torch.arange(1000.0), "n": torch.arange(3), "e": torch.empty(0)}
    from torch.utils.serialization import config

    with config.patch("save.storage_alignment", alignment):
        torch.save(content, path := tmp_path / "a.pt")
    (said,) = (value for name, value in members(path).items() if name.endswith("/.storage_alignment"))
    assert said == str(alignment).encode()  # in a folder that is named so, or "archive" where a path is not ASCII
    assert tensors_in(archive.load(path)[0]) == tensors_in(content)
    assert archive.verify(path) == []


# ---------------------------------------------------------------------------------------------------------------------
# Tensors and values that a pickle describes wrongly


class Made:
    """Pickled as a call of a function that is named `module name`."""

    def __init__(self, name: str, *arguments: Any) -> None:
        self.name, self.arguments = name, arguments


class Reference:
    """Pickled as a persistent id."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Crafted(pickle._Pickler):
    """Python's pickler, which writes any name without looking for it."""

    def persistent_id(self, value: Any) -> Any:
        return value.value if isinstance(value, Reference) else None

    def save(self, value: Any, save_persistent_id: bool = True) -> None:  # type: ignore[override]
        if not isinstance(value, Made):
            super().save(value, save_persistent_id)
            return
        self.write(b"c" + value.name.replace(" ", "\n").encode() + b"\n")
        if value.arguments != (None,):  # else only the name
            super().save(value.arguments)
            self.write(b"R")


def crafted(content: Any) -> bytes:
    Crafted(file := io.BytesIO(), protocol=2).dump(content)
    return file.getvalue()


def named(name: str) -> Made:
    return Made(name, None)


def stored(key: Any = "0", kind: str = "torch FloatStorage", count: Any = 64, *more: Any) -> Reference:
    return Reference(("storage", named(kind), key, "cpu", count, *more))


def tensor(
    storage: Any = None, offset: Any = 0, size: Any = (8, 8), stride: Any = (8, 1), function: str = "v2", more: Any = ()
) -> Made:
    name = f"torch._utils _rebuild_tensor_{function}"
    return Made(name, storage or stored(), offset, size, stride, False, Made("collections OrderedDict"), *more)


def colliding(end: bytes, count: int) -> bytes:
    """A dictionary of so many keys of one hash: Python would compare each with all before it."""
    keys = ((number * (2**61 - 1)).to_bytes(11, "little") for number in range(1, count + 1))
    return b"\x80\x02}(" + b"".join(b"\x8a\x0b" + key + end + b"K\x01" for key in keys) + b"u."


GIBI = 2**30
DESCRIBED: dict[str, Any] = {
    "more elements than its member": tensor(stored(count=GIBI), size=(GIBI,), stride=(1,)),
    "fewer elements than its member": tensor(stored(count=63), size=(8,), stride=(1,)),
    "another dtype of the same count": tensor(stored(kind="torch DoubleStorage")),
    "its bytes in another dtype": tensor(stored(kind="torch ByteStorage", count=256), size=(256,), stride=(1,)),
    "a larger shape": tensor(size=(2**17, 2**17)),
    "one row more": tensor(size=(9, 8)),
    "an offset beyond": tensor(offset=1),
    "a stride beyond": tensor(stride=(9, 1)),
    "stride 0": tensor(size=(2**20, 2**14), stride=(0, 0)),
    "overlapping rows": tensor(size=(8, 16), stride=(1, 1)),
    "an empty one far outside": tensor(offset=65, size=(0,), stride=(1,)),
    "bytes from an empty member": tensor(stored("9", count=0), size=(2**34,), stride=(1,)),
    "a member that is not there": tensor(stored("77")),
    "a member elsewhere": tensor(stored("../data.pkl")),
    "a negative offset": tensor(offset=-1),
    "a negative size": tensor(size=(-8, -8)),
    "a negative stride": tensor(stride=(-8, 1)),
    "a size that is huge": tensor(size=(2**62, 4), stride=(1, 1)),
    "a size beyond 64 bits": tensor(size=(0, 2**70), stride=(1, 1)),
    "a size of truth": tensor(size=(True, 8)),
    "a size of a float": tensor(size=(8.0, 8)),
    "a size in a list": tensor(size=[8, 8]),
    "no size": tensor(size=None),
    "a stride too few": tensor(stride=(1,)),
    "65 dimensions": tensor(size=(1,) * 65, stride=(1,) * 65),
    "no arguments": Made("torch._utils _rebuild_tensor_v2"),
    "a number for its storage": tensor(3),
    "a dtype for its storage": tensor(named("torch float32")),
    "a storage by number": tensor(stored(0)),
    "a storage of text elements": tensor(stored(count="64")),
    "a storage of a shape": tensor(stored(kind="torch Size")),
    "a storage with a view": tensor(stored("0", "torch FloatStorage", 64, None)),
    "no storage at all": tensor(Reference(("module", 1))),
    "quantised": tensor(stored(kind="torch QInt8Storage", count=256)),
    "of bytes without a kind": tensor(stored(kind="torch UntypedStorage", count=256)),
    "the newest form": tensor(function="v3", more=(named("torch float32"),)),
    "a sparse one": Made("torch._utils _rebuild_sparse_tensor", 1),
    "a parameter of a number": Made("torch._utils _rebuild_parameter", 3, True, None),
    "a shape of text": Made("torch Size", ("8",)),
    "a shape beyond 64 bits": Made("torch Size", (2**70,)),
    "a shape of nothing": Made("torch Size"),
    "a device of no name": Made("torch device", "abacus"),
    "a device of a list": Made("torch device", [1]),
    "an ordered dictionary of a number": Made("collections OrderedDict", 3),
    "a called dtype": Made("torch float32", 1),
    "a called storage": Made("torch FloatStorage", GIBI),
    "keys that collide": colliding(b"", 200_000),
    "tuples that collide": colliding(b"\x85", 100_000),
    "a list as a key": b"\x80\x02}]K\x01s.",
    "a key nested deep": b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.",
    "a value nested deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "text longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "an integer longer than the file": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "a long integer": b"\x80\x02\x8b\x00\x00\x10\x00" + b"\x01" * 2**20 + b".",
    "two values": b"\x80\x02}}.",
    "no value": b"\x80\x02.",
    "a mark that stays": b"\x80\x02(}.",
    "a tuple of too few": b"\x80\x02K\x01\x87.",
    "attributes of a tensor": None,
    "attributes of a dictionary": b"\x80\x02}}b.",
    "items of a list": b"\x80\x02]K\x01K\x01s.",
    "an element of a dictionary": b"\x80\x02}K\x01a.",
    "millions of lists": b"\x80\x02(" + b"]" * 4_000_000 + b"t.",
}
DESCRIBED["attributes of a tensor"] = crafted(tensor())[:-1] + b"}b."


@pytest.fixture(scope="module")
def with_pickle(tmp_path_factory) -> Callable[[Path, Any], Path]:
    """Packs a good checkpoint whose pickle holds something more, or is other bytes; member 9 is empty."""
    parts = members(ckpt.save(record(7), tmp_path_factory.mktemp("good")))
    pickled = parts["archive/data.pkl"].removesuffix(b".")

    def make(path: Path, value: Any) -> Path:
        inner = value.removeprefix(b"\x80\x02") if isinstance(value, bytes) else crafted(value)[2:]
        text = pickled + b"X\x04\0\0\0more" + inner.removesuffix(b".") + b"s."
        return pack(path, parts | {"archive/data.pkl": text, "archive/data/9": b""})

    return make


@pytest.mark.parametrize("case", DESCRIBED)
def test_a_tensor_or_value_that_its_bytes_do_not_make_is_refused(case, with_pickle, tmp_path):
    path = with_pickle(tmp_path / "a.pt", DESCRIBED[case])

    def refused_everywhere() -> None:
        reason = refusal(path, optimizer=False)
        assert ckpt.verify(path) == [reason]
        assert reason.startswith(f"{path}: is damaged") or "Python objects that a checkpoint never needs" in reason
        with pytest.raises(CheckpointError):
            tensor_listing.held(path)

    calls(refused_everywhere, most=500_000 + 20 * path.stat().st_size)  # fails at once beyond: no bomb goes off


SOUND: dict[str, Any] = {
    "the whole storage": tensor(),
    "its columns": tensor(size=(8, 8), stride=(1, 8)),
    "a part": tensor(offset=9, size=(7, 7), stride=(8, 1)),
    "an element": tensor(offset=63, size=(), stride=()),
    "nothing at its end": tensor(offset=64, size=(0, 3), stride=(3, 1)),
    "nothing of an empty member": tensor(stored("9", count=0), size=(0,), stride=(1,)),
    "a broadcast dimension of one": tensor(size=(1, 8), stride=(0, 1)),
    "a parameter": Made("torch._utils _rebuild_parameter", tensor(), True, Made("collections OrderedDict")),
    "a shape": Made("torch Size", (8, 8)),
    "a device": Made("torch device", "cuda", 1),
    "keys of all kinds": {(1, "a"): 1, 2.5: 1, None: 1, True: 2, -1: 3, -2: 4, 2**70: 5},
    "many tuples as keys": {(number, number + 1): number for number in range(20_000)},
    "a hundred in each other": b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".",
}


@pytest.mark.parametrize("case", SOUND)
def test_control_what_the_bytes_make_is_opened_as_torch_opens_it(case, with_pickle, tmp_path):
    path = with_pickle(tmp_path / "a.pt", SOUND[case])
    assert archive.verify(path) == []
    ours, theirs = archive.load(path)[0]["more"], torch.load(path, weights_only=True)["more"]
    if isinstance(theirs, torch.Tensor):
        assert same_bits(ours, theirs)
        assert ours.stride() == theirs.stride()
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs


def test_attributes_of_a_dictionary_do_not_replace_its_methods(with_pickle, tmp_path):
    """As `_metadata` of a state_dict, and as `items`, which would be called instead of the method."""
    value = crafted(Made("collections OrderedDict"))[:-1] + crafted({"items": 3, "_metadata": {}})[2:-1] + b"b."
    path = with_pickle(tmp_path / "a.pt", value)
    assert archive.verify(path) == []
    assert list(archive.load(path)[0]["more"].items()) == []


def test_a_weight_cut_short_under_a_right_checksum_is_refused(tmp_path):
    path = ckpt.save(record(7), tmp_path)
    parts = members(path)
    assert len(parts["archive/data/0"]) == 256
    for data in (parts["archive/data/0"][:4], b"", parts["archive/data/0"] + bytes(4)):
        pack(path, parts | {"archive/data/0": data})
        assert ckpt.verify(path) == [refusal(path)]
    pack(path, parts)
    assert ckpt.verify(path) == []


OPENS = """
import resource, sys
from pathlib import Path
from milepost import ckpt; import torch
torch.set_num_threads(1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for path in map(Path, sys.stdin.read().splitlines()):
    problems = ckpt.verify(path)
    try:
        print("opened", ckpt.load(path).step, problems)
    except ckpt.CheckpointError as error:
        print("refused", problems == [str(error)], "Memory" in str(error) or "allocate" in str(error))
"""


def test_nothing_that_a_file_claims_takes_a_quarter_of_a_gigabyte(with_pickle, tmp_path):
    values = {**DESCRIBED, "storages that claim the same": [tensor(stored("0", count=2**19))] * 543}
    paths = [with_pickle(tmp_path / f"{number}.pt", value) for number, value in enumerate(values.values())]
    paths.append(with_pickle(tmp_path / "twin.pt", 1))
    paths[-1].write_bytes(with_twin(paths[-1].read_bytes(), "archive/DATA.PKL", BOMB))
    paths.append(with_pickle(tmp_path / "good.pt", 1))
    lines = "\n".join(map(str, paths))
    done = subprocess.run(
        [sys.executable, "-c", OPENS], cwd=ROOT, input=lines, capture_output=True, text=True, check=True
    )
    *refused, control = done.stdout.splitlines()
    assert control == "opened 7 []"
    assert [name for name, line in zip([*values, "twin"], refused, strict=True) if line != "refused True False"] == []
