"""The default layout: what is written is read back, torch can open it, and only the parts asked for are read."""

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch
from drive import tensor_bytes
from records import (
    FULL,
    GIVEN_BY_THE_STORE,
    WEIGHT,
    assert_same,
    mapped_and_touched,
    members,
    pack,
    record,
    refusal,
    refused,
)

from milepost import ckpt
from milepost.ckpt.layouts import unified
from milepost.ckpt.record import FORMAT_VERSION, MEMORY_FIELDS, MIGRATIONS, TENSOR_FIELDS, metadata, migrated

FIXTURE = Path(__file__).parent / "fixtures" / "unified_v1.pt"
GOLDEN = "c60e4fc937608ab542c38233f583ded0fe7abf4224ae306da22a79a537ab8765"  # of its tensors' bytes
KEYS = {"model_state_dict", "optimizer_state_dict", "hyperparameters", "vocab_size", "block_size", "batch_size", "step"}


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
    for name in {field.name for field in dataclasses.fields(written)} - TENSOR_FIELDS - MEMORY_FIELDS:
        if name not in GIVEN_BY_THE_STORE | {"parts"}:
            assert getattr(read, name) == getattr(written, name), name
    assert read.parts == ["model", "optimizer"]
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
    assert read.parts == ["model"]


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
    assert (values["format_version"], values["model_type"], values["step"]) == (2, "bigram", 7)


def test_what_torch_saved_again_is_still_a_checkpoint(path, tmp_path):
    """torch.load and torch.save lose the JSON member; the same values travel in the pickle too."""
    other = tmp_path / "again.pt"
    torch.save(torch.load(path, weights_only=True), other)
    assert tensor_bytes(ckpt.load(other)) == tensor_bytes(ckpt.load(path))
    assert ckpt.load(other).schedule == FULL["schedule"]


def test_any_form_of_the_same_metadata_is_one_record(path):
    read = ckpt.load(path)
    assert_same(read, record(7, **FULL, parts=["model", "optimizer"]))
    assert read.format_version == FORMAT_VERSION


# ---------------------------------------------------------------------------------------------------------------------
# Older and newer formats


def test_the_first_file_of_the_first_format_is_still_read():
    """Written once, by the first version of the writer, from record(7, **FULL) of then, and never again."""
    assert FIXTURE.stat().st_size < 20_000
    read = ckpt.load(FIXTURE, verify=True)
    assert list(tensor_bytes(read)) == [WEIGHT, "0.step", "0.exp_avg", "0.exp_avg_sq"]
    assert hashlib.sha256(b"".join(tensor_bytes(read).values())).hexdigest() == GOLDEN
    assert read.model_state[WEIGHT][0, :3].tolist() == pytest.approx([-0.8201345, 0.3956312, 0.8989085], abs=1e-6)
    known_then = {name: value for name, value in FULL.items() if name != "epoch"}
    assert {name: getattr(read, name) for name in known_then} == known_then
    assert read.model_settings == {"vocab_size": 8, "block_size": 4}
    assert read.tokenizer == {"kind": "char", "chars": list("abcdefgh")}
    assert (read.step, read.epoch, read.save_number, read.written_by) == (7, None, 1, "milepost 0.1.0")
    assert (read.parts, read.format_version, read.notes) == (["model", "optimizer"], FORMAT_VERSION, [])


def test_the_first_file_really_is_of_the_first_format():
    """Negative control for the test above."""
    values = json.loads(members(FIXTURE)["archive/milepost.json"])
    assert values["format_version"] == 1
    assert "parts" not in values


def test_every_older_format_has_its_migration_and_ends_at_the_present():
    assert len(MIGRATIONS) == FORMAT_VERSION - 1
    for version in range(1, FORMAT_VERSION + 1):
        assert migrated({"format_version": version})["format_version"] == FORMAT_VERSION
    assert migrated({"step": 1}) == {"step": 1, "parts": ["model", "optimizer"], "format_version": 2}
    present = {"step": 1, "parts": ["model"], "format_version": 2}
    assert migrated(present) == present


def with_metadata(path: Path, **changes: object) -> Path:
    """The archive with other values in its JSON member."""
    content = members(path)
    values = json.loads(content["archive/milepost.json"]) | changes
    return pack(path, content | {"archive/milepost.json": json.dumps(values)})


def test_a_newer_format_is_refused_by_the_version_that_wrote_it(path):
    with_metadata(path, format_version=FORMAT_VERSION + 1, written_by="milepost 9.1.0", invented=[1])
    error = refusal(path)
    assert (error.kind, error.path) == ("not understood", path)
    assert f"format {FORMAT_VERSION + 1} was written by 'milepost 9.1.0'" in error.problem
    assert f"formats up to {FORMAT_VERSION}" in error.remedy
    (one,) = ckpt.find(path.parent)
    assert one.problem == str(error)


def test_fields_that_a_newer_version_added_break_nothing(path):
    with_metadata(path, invented=[1], also={"a": 2})
    read = ckpt.load(path, verify=True)
    assert_same(read, record(7, **FULL))
    assert len(read.notes) == 1
    assert "2 fields that this version does not know were left out: 'also', 'invented'" in read.notes[0]


@pytest.mark.parametrize("version", ["2", 2.5, True, None, -1, [2]], ids=str)
def test_a_format_that_is_no_number_is_refused(version, path):
    assert "format_version is " in refused(with_metadata(path, format_version=version))


# ---------------------------------------------------------------------------------------------------------------------
# Only what is wanted is read


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """4 MB of weights and 8 MB of moments."""
    return ckpt.save(record(size=1024, tokenizer=None), tmp_path_factory.mktemp("large"))


def bytes_read() -> int:
    """Return the bytes that this process has read through system calls; memory-mapped pages do not count."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_peek_reads_no_tensor(large):
    before = bytes_read()
    values = unified.LAYOUT.read_metadata(large)
    assert bytes_read() - before < 200_000
    assert values["model_settings"] == {"vocab_size": 1024, "block_size": 4}
    assert mapped_and_touched(large) == (0, 0)


def test_peek_needs_no_tensor(path):
    content = members(path)
    assert (
        unified.LAYOUT.read_metadata(pack(path, content | {"archive/data.pkl": b"", "archive/data/0": b""}))["step"]
        == 7
    )
    assert "is damaged" in refused(path)


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
