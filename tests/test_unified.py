"""The default layout: what is written is what is read, anybody can open it, and damage is found and never guessed around."""

import dataclasses
import hashlib
import json
import pickletools
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from drive import tensor_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from records import WEIGHT, flipped, members, pack, record

import ckpt
from ckpt import Checkpoint, CheckpointError
from ckpt.layouts import unified
from ckpt.record import MEMORY_FIELDS, TENSOR_FIELDS, metadata

FIXTURE = Path(__file__).parent / "fixtures" / "unified.pt"
GOLDEN = "c60e4fc937608ab542c38233f583ded0fe7abf4224ae306da22a79a537ab8765"  # of its tensors' bytes
KEYS = {"model_state_dict", "optimizer_state_dict", "hyperparameters", "vocab_size", "block_size", "batch_size", "step"}

# Every field of a record with a value of its own.
FULL = {
    "windows_seen": 12,
    "tokens_seen": 4800,
    "schedule": {"kind": "cosine", "peak": 3e-4, "floor": 1e-5, "warmup_steps": 2, "start_step": 0, "end_step": 9},
    "scaler": {"scale": 65536.0, "growth_factor": 2.0},
    "observed_step": 6,
    "validation_loss": 2.25,
    "best_loss": 2.125,
    "best_step": 4,
    "hyperparameters": {"BATCH_SIZE": 2, "LEARNING_RATE": 3e-4, "STOP": None, "ODD": "é\u2028\n\x00"},
    "data": {"name": "letters", "sha256": "ab" * 32},
    "runtime": {"dtype": "float32", "compile": False, "threads": 2},
    "run_id": "20251110-120000-bigram-letters-1f2e",
    "parent": {"run_id": "earlier", "step": 3, "changed": {"SEED": [0, 1]}},
}


@pytest.fixture
def path(tmp_path) -> Path:
    return ckpt.save(record(7, **FULL), tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Round trip


def test_every_tensor_and_every_field_comes_back(path):
    written = record(7, **FULL)
    read = ckpt.load(path, verify=True)
    assert tensor_bytes(read) == tensor_bytes(written)
    assert read.optimizer_state["param_groups"] == written.optimizer_state["param_groups"]
    given_by_the_store = {"save_id", "save_number", "saved_at"}
    for name in {field.name for field in dataclasses.fields(written)} - TENSOR_FIELDS - MEMORY_FIELDS:
        if name not in given_by_the_store:
            assert getattr(read, name) == getattr(written, name), name
    assert set(FULL) <= {field.name for field in dataclasses.fields(written)}
    assert (read.save_number, read.path, read.layout, read.notes) == (1, path, "unified", [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 1, 2), (1000, 7)], ids=str)
def test_any_float_of_any_shape_keeps_its_bits(dtype, shape, tmp_path):
    tensor = torch.randn(shape).to(dtype)
    if tensor.numel() > 4:
        tensor.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40]).to(dtype)
    other = torch.randn(2, 3)
    path = ckpt.save(record(model_state={"one": tensor, "other": other.t()}), tmp_path)
    state = ckpt.load(path).model_state
    assert state["one"].dtype == dtype
    assert state["one"].shape == shape
    assert state["one"].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    assert state["other"].equal(other.t())


def test_a_record_without_optimizer_or_tokenizer(tmp_path):
    read = ckpt.load(ckpt.save(record(optimizer_state=None, tokenizer=None), tmp_path))
    assert read.optimizer_state is None
    assert read.tokenizer is None


def test_saving_what_was_loaded_changes_nothing(path, tmp_path):
    again = ckpt.load(ckpt.save(ckpt.load(path), tmp_path), verify=True)
    assert tensor_bytes(again) == tensor_bytes(record(7, **FULL))
    assert again.save_number == 2


class Sly(str):
    """A str that a pickle would store as this class, which nobody else has."""


def test_only_tensors_and_plain_values_get_in(tmp_path):
    sly = record(run_id=Sly("one"), hyperparameters={Sly("NAME"): Sly("value"), "BETAS": (0.9, 0.95)})
    read = ckpt.load(ckpt.save(sly, tmp_path))
    assert type(read.run_id) is str
    assert read.hyperparameters == {"NAME": "value", "BETAS": [0.9, 0.95]}
    assert all(type(value) is str for value in (*read.hyperparameters, read.hyperparameters["NAME"]))


# ---------------------------------------------------------------------------------------------------------------------
# Others can open it


def test_plain_torch_opens_it_and_finds_the_documented_keys(path):
    content = torch.load(path, weights_only=True)
    assert content.keys() == KEYS | {"metadata"}
    assert content["model_state_dict"][WEIGHT].equal(record(7).model_state[WEIGHT])
    assert content["optimizer_state_dict"]["state"][0]["exp_avg"].shape == (8, 8)
    assert content["hyperparameters"] == FULL["hyperparameters"]
    assert (content["vocab_size"], content["block_size"], content["batch_size"], content["step"]) == (8, 4, 2, 7)


def test_plain_zipfile_reads_the_metadata(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        values = json.loads(archive.read("archive/milepost.json"))
    assert values == json.loads(json.dumps(metadata(ckpt.load(path))))
    assert values == torch.load(path, weights_only=True)["metadata"]
    assert (values["format_version"], values["model_type"], values["step"]) == (1, "bigram", 7)


def test_what_torch_saved_again_is_still_a_checkpoint(path, tmp_path):
    """torch.load and torch.save lose the JSON member; the same values travel in the pickle too."""
    other = tmp_path / "again.pt"
    torch.save(torch.load(path, weights_only=True), other)
    assert tensor_bytes(ckpt.load(other)) == tensor_bytes(ckpt.load(path))
    assert ckpt.load(other).schedule == FULL["schedule"]


def test_the_first_file_of_this_format_is_still_read():
    """Written once, by the first version of the writer, from record(7, **FULL), and never again."""
    assert FIXTURE.stat().st_size < 20_000
    read = ckpt.load(FIXTURE, verify=True)
    assert list(tensor_bytes(read)) == [WEIGHT, "0.step", "0.exp_avg", "0.exp_avg_sq"]
    assert hashlib.sha256(b"".join(tensor_bytes(read).values())).hexdigest() == GOLDEN
    assert read.model_state[WEIGHT][0, :3].tolist() == pytest.approx([-0.8201345, 0.3956312, 0.8989085], abs=1e-6)
    assert all(getattr(read, name) == value for name, value in FULL.items())
    assert read.model_settings == {"vocab_size": 8, "block_size": 4}
    assert read.tokenizer == {"kind": "char", "chars": list("abcdefgh")}
    assert read.step == 7
    assert (read.save_number, read.format_version, read.written_by) == (1, 1, "milepost 0.1.0")


# ---------------------------------------------------------------------------------------------------------------------
# Only what is wanted is read


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """4 MB of weights and 8 MB of moments."""
    return ckpt.save(record(size=1024, tokenizer=None), tmp_path_factory.mktemp("large"))


def bytes_read() -> int:
    """What this process has read through system calls so far; memory-mapped pages are no part of it."""
    return int(Path("/proc/self/io").read_text().split()[1])


def mapped_and_touched(path: Path) -> tuple[int, int]:
    """Bytes of `path` that are mapped into this process, and that have been touched there."""
    mapped = touched = 0
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith(("Size:", "Rss:")):
            size = int(line.split()[1]) * 1024
            mapped, touched = mapped + size * line.startswith("Size"), touched + size * line.startswith("Rss")
    return mapped, touched


def test_peek_reads_no_tensor(large):
    before = bytes_read()
    values = unified.peek(large)
    assert bytes_read() - before < 200_000
    assert values["model_settings"] == {"vocab_size": 1024, "block_size": 4}
    assert mapped_and_touched(large) == (0, 0)


def test_peek_needs_no_tensor(path):
    content = members(path)
    assert unified.peek(pack(path, content | {"archive/data.pkl": b"", "archive/data/0": b""}))["step"] == 7
    with pytest.raises(CheckpointError):
        ckpt.load(path)


def test_inference_reads_the_weights_and_not_the_optimizer(large):
    read = ckpt.load(large, optimizer=False)
    assert read.optimizer_state is None
    weight = read.model_state[WEIGHT].clone()
    mapped, touched = mapped_and_touched(large)
    assert mapped > 12e6  # the whole file is mapped,
    assert 4e6 < touched < 5e6  # and of its 12 MB the 4 MB of weights were read
    assert weight.equal(record(size=1024).model_state[WEIGHT])


def test_control_the_optimizer_would_be_seen(large):
    """Negative control for the test above."""
    read = ckpt.load(large)
    assert sum(len(data) for data in tensor_bytes(read).values()) > 12e6
    assert mapped_and_touched(large)[1] > 12e6


def test_writing_to_what_was_loaded_leaves_the_file(path):
    before = path.read_bytes()
    read = ckpt.load(path)
    read.model_state[WEIGHT].fill_(5)
    read.optimizer_state["state"][0]["exp_avg"].fill_(5)
    assert path.read_bytes() == before


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
@given(name=st.sampled_from(sorted(metadata(record()))), value=json_values)
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
