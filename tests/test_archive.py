"""Torch archives: what is written here torch opens as its own, and damage is found and never guessed around."""

import io
import json
import pickletools
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from drive import tensor_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from records import FULL, WEIGHT, flipped, members, pack, record

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError, archive
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
    floats = {str(one): torch.randn(5, 3, generator=draw).to(one) for one in archive.STORAGES if one.is_floating_point}
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
    assert {"model", "wte", "iter_num"} <= archive.words(tmp_path / "theirs.pt")
    dumped(tmp_path / "ours.pt", {"model": 1}, metadata={"step": 1})
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04")
    assert [archive.words(tmp_path / name) for name in ("ours.pt", "damaged.pt", "missing.pt")] == [frozenset()] * 3


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.pt"
    for step in (1, 2):
        path.unlink(missing_ok=True)
        assert archive.read_metadata(dumped(path, {}, metadata={"step": step})) == {"step": step}


NO_ARCHIVES = [
    (b"", "an empty file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a git-lfs pointer: run `git lfs pull`"),
    (b"<!doctype html><html>not found</html>", "a web page"),
    (b'\n {"error": 404}', "JSON text"),
    (b"GGUF\x03\0\0\0" + bytes(40), "a GGUF file"),
    (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file"),
    (b"\x80\x02}q\x00.", "a bare pickle, which is never opened"),
    (b"\x10\0\0\0\0\0\0\0" + b'{"a":1}', "give the folder that holds it"),
    (b"Dear Wren,", "of an unknown kind"),
]


@pytest.mark.parametrize(("data", "kind"), NO_ARCHIVES, ids=[kind for _, kind in NO_ARCHIVES])
def test_what_is_no_archive_is_called_what_it_is(data, kind, tmp_path):
    (tmp_path / "a.pt").write_bytes(data)
    assert kind in refusal(tmp_path / "a.pt")


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
    """The record of `path`, or the one sentence in which it is refused."""
    try:
        return ckpt.load(path, **options)
    except CheckpointError as error:
        text = str(error)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert "weights_only" not in text  # torch's advice is to turn the safety off
    return text


def refusal(path: Path, **options) -> str:
    """The sentence in which `path` is refused; it must be."""
    text = attempt(path, **options)
    assert isinstance(text, str)
    return text


def test_a_file_cut_anywhere_is_refused_and_the_one_before_is_offered(path, tmp_path):
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
        assert ckpt.verify(newer) == [reason]
    chosen, notes = ckpt.resolve("latest", tmp_path)
    assert chosen == path
    assert notes[0].startswith(f"skipped: {newer}")


@pytest.mark.parametrize("size", [1, 5, 32, 4096])
def test_zeros_where_a_file_should_be_are_refused(size, path):
    path.write_bytes(bytes(size))
    assert "is no checkpoint but" in refusal(path)


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
    """Its checksum is right: not an accident of the disk, but somebody's work. Never another exception, never a warning."""
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


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
# Another format's number is no other value of the same: 1 is read as an old one, 3 is refused as a newer one, each with a test of its own.
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
