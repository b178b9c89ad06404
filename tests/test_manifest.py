"""The JSON beside tensors: read with care, and a manifest that says what belongs together, in every layout that has one."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from records import FULL, WEIGHT, assert_same, bits, flipped, record, refusal, refused

from milepost import ckpt, files
from milepost.ckpt import CheckpointError, manifest
from milepost.ckpt.manifest import (
    file_problems,
    is_regular,
    parse_json,
    read_json,
    read_manifest,
    sha256,
    write_manifest,
)
from milepost.files import write_json

# The manifest, the weights' file and the optimizer's of each layout that has a manifest, from a checkpoint's home.
PLACES: dict[str, tuple[Callable[[Path], Path], ...]] = {
    "stepfiles": (
        lambda home: home.with_name(home.stem + "_state.json"),
        lambda home: home,
        lambda home: home.with_name(home.stem + "_optimizer.safetensors"),
    ),
    "consolidated": (
        lambda home: home / "training_state.json",
        lambda home: home / "consolidated" / "consolidated.safetensors",
        lambda home: home / "optimizer.safetensors",
    ),
    "directory": (
        lambda home: home / "manifest.json",
        lambda home: home / "model.pt",
        lambda home: home / "optimizer.pt",
    ),
    "huggingface": (
        lambda home: home / "milepost.json",
        lambda home: home / "model.safetensors",
        lambda home: home / "optimizer.safetensors",
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def test_an_object_is_read_as_it_is(tmp_path):
    values = {"a": [1, 2.5, None, True, "é"], "b": {"c": {}}}
    write_json(tmp_path / "a.json", values)
    assert read_json(tmp_path / "a.json") == values


NO_JSON = [
    (b"", "damaged"),
    (b"{", "damaged"),
    (b"[]", "not understood"),
    (b"3", "not understood"),
    (b"null", "not understood"),
    (b'{"a": 1, "a": 2}', "damaged"),
    (b'{"a": {"b": 1, "b": 1}}', "damaged"),
    (b'{"a": NaN}', "damaged"),
    (b'{"a": [-Infinity]}', "damaged"),
    (b"\xff\xfe{}", "damaged"),
    (b'{"a":' + b"[" * 100_000, "damaged"),
    (b'{"a": ' + b"9" * 10_000 + b"}", "damaged"),
]


@pytest.mark.parametrize(("data", "kind"), NO_JSON, ids=[repr(data[:20]) for data, _ in NO_JSON])
def test_anything_else_is_refused_in_one_sentence(data, kind, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    for read in (lambda: read_json(tmp_path / "a.json"), lambda: parse_json(data, str(tmp_path / "a.json"))):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert (caught.value.kind, caught.value.path) == (kind, tmp_path / "a.json")
        assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ")
        assert str(caught.value).isprintable()


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, kind in {"pipe": "not understood", ".": "not understood", "missing": "not found"}.items():
        assert not is_regular(tmp_path / name)
        with pytest.raises(CheckpointError) as caught:
            read_json(tmp_path / name)
        assert (caught.value.kind, caught.value.path) == (kind, tmp_path / name)


def test_a_file_as_large_as_no_json_of_ours_is_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**40)  # takes no space
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "a.json")
    assert (caught.value.kind, caught.value.path) == ("not understood", tmp_path / "a.json")


# ---------------------------------------------------------------------------------------------------------------------
# The manifest itself


def manifest_of_one_file(folder: Path) -> Path:
    """A manifest of one file of three bytes."""
    file = write_json(folder / "a.json", {})
    write_manifest(
        folder / "manifest.json", record(7, **FULL), {"a.json": file}, first={"step": 7}, groups=[{"lr": 1.0}]
    )
    return folder / "manifest.json"


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_manifest_begins_with_what_people_read_and_holds_sizes_and_checksums(tmp_path):
    values = json.loads(manifest_of_one_file(tmp_path).read_text())
    assert list(values) == ["step", "metadata", "optimizer_groups", "files", "sha256"]
    whole = hashlib.sha256(b"{}\n").hexdigest()
    assert values["files"] == {"a.json": {"size": 3, "sha256": whole, "begins_sha256": whole}}
    assert values["files"]["a.json"]["sha256"] == sha256(tmp_path / "a.json")
    assert values["metadata"]["schedule"] == FULL["schedule"]
    assert values["metadata"]["parts"] == ["model", "optimizer"]
    assert read_manifest(tmp_path / "manifest.json")["optimizer_groups"] == [{"lr": 1.0}]


ENTRY = {"size": 3, "sha256": "ab" * 32}
NO_MANIFESTS = [
    ({"files": None}, "not understood", "files"),
    ({"files": []}, "not understood", "files"),
    ({"metadata": None}, "damaged", "NoneType"),
    ({"metadata": {"model_type": "bigram"}}, "damaged", "model_settings"),
    *(
        ({"files": {name: ENTRY}}, "refused", repr(name))
        for name in ("", "..", "/etc/hostname", "a/../../b", "a//b", "./a", "..\\a")
    ),
    ({"files": {"a": 3}}, "damaged", "a: "),
    ({"files": {"a": {"size": 3}}}, "damaged", "a: "),
    ({"files": {"a": {"size": True, "sha256": ""}}}, "damaged", "a: "),
    ({"files": {"a": {"size": "3", "sha256": ""}}}, "damaged", "a: "),
]


@pytest.mark.parametrize(("changes", "kind", "named"), NO_MANIFESTS, ids=str)
def test_what_is_no_manifest_is_refused(changes, kind, named, tmp_path):
    path = manifest_of_one_file(tmp_path)
    change(path, **changes)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(path)
    assert (caught.value.kind, caught.value.path) == (kind, path)
    assert named in caught.value.problem
    assert str(caught.value).isprintable()


def test_sizes_always_and_checksums_when_asked(tmp_path):
    path = manifest_of_one_file(tmp_path)
    values, file, locate = read_manifest(path), tmp_path / "a.json", tmp_path.joinpath
    assert file_problems(locate, values, hashed=True) == []
    file.write_bytes(b"{ }")
    assert file_problems(locate, values, hashed=False) == []
    assert [(found.kind, found.path) for found in file_problems(locate, values, hashed=True)] == [("damaged", file)]
    file.write_bytes(b"{}")
    assert "has 2 bytes instead of 3" in file_problems(locate, values, hashed=False)[0].problem
    file.unlink()
    assert [(found.kind, found.path) for found in file_problems(locate, values, hashed=False)] == [("damaged", file)]
    assert file_problems(locate, values, hashed=False, optional=["a.json"]) == []


# ---------------------------------------------------------------------------------------------------------------------
# What it guards, in every layout that has one


@pytest.fixture(params=sorted(PLACES))
def layout(request) -> str:
    return request.param


@pytest.fixture
def home(layout, tmp_path) -> Path:
    return ckpt.save(record(7, **FULL), tmp_path, layout=layout)


def place(home: Path, layout: str, number: int) -> Path:
    return PLACES[layout][number](home)


def test_control_untouched_it_is_whole(home):
    assert_same(ckpt.load(home, verify=True), record(7, **FULL))
    assert ckpt.verify(home) == []


def test_a_missing_manifest_makes_it_no_checkpoint_or_another_programs(home, layout):
    """Where the files look like another program's then, it is at least never taken for ours."""
    place(home, layout, 0).unlink()
    with contextlib.suppress(CheckpointError):
        read = ckpt.load(home)
        assert (read.run_id, read.save_number) == (None, None)
        assert read.optimizer_state is None or layout == "directory"  # whose optimizer.pt names its parameters
        assert read.model_state[WEIGHT].equal(record(7).model_state[WEIGHT])


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"files": 3, "metadata": {}}'], ids=str)
def test_a_damaged_manifest_is_named(data, home, layout):
    path = place(home, layout, 0)
    path.write_bytes(data)
    assert refused(home).startswith(f"{path}: ")
    (one,) = ckpt.find(home.parent.parent if layout in ("stepfiles", "consolidated") else home.parent)
    assert one.problem is not None
    assert one.problem.startswith(f"{path}: ")
    assert len(ckpt.verify(home)) == 1


@pytest.mark.parametrize("number", [1, 2], ids=["weights", "optimizer"])
def test_a_flipped_bit_is_found_by_verify_and_by_verify_alone(number, layout, tmp_path, monkeypatch):
    """But for the beginning of a file, which every load looks at: here it is short, as a mebibyte is of a real one."""
    for module in (files.writing, manifest):
        monkeypatch.setattr(module, "BEGINNING", 64)
    home = ckpt.save(record(7, **FULL), tmp_path, layout=layout)
    path = place(home, layout, number)
    data = path.read_bytes()
    position = len(data) - 5 if path.suffix == ".safetensors" else data.index(b"data/0") + 200  # in a tensor's bytes
    flipped(path, position, bit=4)
    read = ckpt.load(home)
    assert bits(read) != bits(record(7, **FULL))
    (problem,) = ckpt.verify(home)
    error = refusal(home, verify=True)
    assert (error.kind, error.path, str(error)) == ("damaged", path, problem)


@pytest.mark.parametrize("number", [1, 2], ids=["weights", "optimizer"])
def test_a_file_of_another_save_is_refused_by_every_load(number, home, layout, tmp_path):
    """The same size and sound in itself: only its beginning tells."""
    (tmp_path / "other").mkdir()
    other = ckpt.save(record(8, **FULL), tmp_path / "other", layout=layout)
    path, wrong = place(home, layout, number), place(other, layout, number)
    shutil.copy(wrong, path)
    assert path.stat().st_size == wrong.stat().st_size
    assert (refusal(home).kind, refusal(home).path) == ("damaged", path)
    if number == 2:
        assert ckpt.load(home, optimizer=False).step == 7  # which does not look at it


@pytest.mark.parametrize("number", [1, 2], ids=["weights", "optimizer"])
@pytest.mark.parametrize("change", [-1, 1, None], ids=["cut", "longer", "empty"])
def test_a_changed_size_is_found_by_every_look(number, change, home, layout):
    path = place(home, layout, number)
    data = path.read_bytes()
    path.write_bytes(b"" if change is None else data[:-1] if change < 0 else data + b"\0")
    size = path.stat().st_size
    assert (refusal(home).kind, refusal(home).path) == ("damaged", path)
    assert f"has {size} bytes instead of {len(data)}" in refusal(home).problem
    with pytest.raises(CheckpointError) as caught:
        ckpt.WRITERS[layout].read_metadata(home)
    assert (caught.value.kind, caught.value.path) == ("damaged", path)
    assert len(ckpt.verify(home)) == 1


def test_a_manifest_that_was_changed_is_found_by_verify(home, layout):
    """What it says to people may be edited; the metadata, the groups and the checksums agree with a checksum of their own."""
    path = place(home, layout, 0)
    values = json.loads(path.read_text())
    for name, other in {
        "metadata": values["metadata"] | {"tokens_seen": 4801},
        "optimizer_groups": [{"lr": 1.0}],
    }.items():
        change(path, **{name: other})
        assert (refusal(home, verify=True).kind, refusal(home, verify=True).path) == ("damaged", path)
        assert ckpt.verify(home) != []
        change(path, **{name: values[name]})
    change(path, step=8, epoch=None)
    assert ckpt.load(home, verify=True).step == 7
    assert ckpt.verify(home) == []


def test_missing_weights_are_found_by_every_look(home, layout):
    path = place(home, layout, 1)
    path.unlink()
    folder = home.parent.parent if layout in ("stepfiles", "consolidated") else home.parent
    assert str(path) in refused(home) or str(home) in refused(home)
    assert all(one.problem for one in ckpt.find(folder))


def test_without_the_optimizers_file_it_generates_and_says_so(home, layout):
    path = place(home, layout, 2)
    path.unlink()
    read = ckpt.load(home, verify=True)
    assert_same(read, record(7, **FULL, optimizer_state=None))
    assert read.notes == [f"{path}: not found; without it this checkpoint generates but cannot resume bit-exactly"]
    assert read.parts == ckpt.WRITERS[layout].read_metadata(home)["parts"] == ["model"]
    assert ckpt.verify(home) == []


def test_inference_leaves_the_optimizers_file_unread(home, layout):
    """Read, its flipped header would be refused."""
    path = place(home, layout, 2)
    flipped(path, 3, bit=6)
    assert ckpt.load(home, optimizer=False).optimizer_state is None
    refused(home)


def test_metadata_of_a_newer_format_is_refused_by_its_writer(home, layout):
    path = place(home, layout, 0)
    values = json.loads(path.read_text())
    change(path, metadata=values["metadata"] | {"format_version": 99, "written_by": "milepost 9.9"})
    assert "format 99 was written by 'milepost 9.9'" in refused(home)


def test_fields_that_a_newer_version_added_break_nothing(home, layout):
    path = place(home, layout, 0)
    values = json.loads(path.read_text())
    change(path, invented=[1], metadata=values["metadata"] | {"invented": 1}, sha256=None)
    assert_same(ckpt.load(home, verify=True), record(7, **FULL))


GROUPS = [None, [], [{}], {"params": [0]}, [{"params": [0], "param_names": ["other"]}]]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_groups_that_do_not_fit_the_optimizers_file_are_refused(groups, home, layout):
    if layout != "directory":  # its optimizer.pt has the groups inside
        change(place(home, layout, 0), optimizer_groups=groups)
        with pytest.raises(CheckpointError, match="param_groups") as caught:
            ckpt.load(home)
        assert caught.value.kind == "damaged"
    assert ckpt.load(home, optimizer=False).step == 7
