"""scripts/convert_checkpoint.py and ckpt.convert: nothing is lost, nothing is overwritten,
and what is damaged is left out.
"""

import collections
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from records import FULL, WEIGHT, assert_same, gpt2_record, record
from script import call, copied, family, files_of, same_tensors, script, train_family

from milepost import ckpt
from milepost.ckpt import CheckpointError, finding
from milepost.ckpt.layouts import WRITERS, layout_of
from milepost.ckpt.layouts.manifest_layout import ManifestLayout
from milepost.locks import FOLDER_LOCK

converter = script("convert_checkpoint")
KEPT = (
    "step",
    "save_number",
    "saved_at",
    "run_id",
    "parent",
    "tokenizer",
    "hyperparameters",
    "data",
    "schedule",
    "validation_loss",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_family(tmp_path_factory.mktemp("family"))


def save(folder, one, layout="unified"):
    (folder / "checkpoints").mkdir(exist_ok=True)
    return ckpt.save(one, folder / "checkpoints", layout=layout)


def target_of(out):
    (line,) = [line for line in out.splitlines() if line.startswith("Converted: ")]
    return Path(line.split(" -> ")[1])


@pytest.mark.parametrize("after", WRITERS)
@pytest.mark.parametrize("before", ["unified", "stepfiles"])
def test_from_one_layout_to_another_beside_it(trained, tmp_path, before, after):
    original = ckpt.load(family(trained)[8])
    path = save(tmp_path, original, before)
    untouched = files_of(tmp_path / "checkpoints")
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CHECKPOINT_LAYOUT=after)
    if after == before:
        assert said.code == 2
        assert f"CHECKPOINT_LAYOUT={after}: {path} is laid out so already" in said.err
        return
    assert said.code == 0, said.err
    target = target_of(said.out)
    assert said.out.endswith("Conversion complete!\n")
    new, old = ckpt.load(target, verify=True), ckpt.load(path)
    assert after == layout_of(target).name
    assert same_tensors(new, original)
    assert {name: getattr(new, name) for name in KEPT} == {name: getattr(old, name) for name in KEPT}
    assert new.save_id != old.save_id
    assert {name: data for name, data in files_of(tmp_path / "checkpoints").items() if name in untouched} == untouched
    assert {one.path for one in ckpt.find(tmp_path / "checkpoints")} == {path, target}
    assert ckpt.latest(ckpt.find(tmp_path / "checkpoints")).metadata["save_number"] == old.save_number


def test_the_proof_is_printed(trained, tmp_path):
    path = save(tmp_path, ckpt.load(family(trained)[8]))
    out = call(converter, tmp_path, CHECKPOINT_PATH=path, CHECKPOINT_LAYOUT="separated").out
    size = sum(file.stat().st_size for file in path.parent.glob("*-*.pt"))
    assert f"Original size: {path.stat().st_size / 1e6:.2f} MB ({path.stat().st_size:,} bytes)" in out
    assert f"New size: {size / 1e6:.2f} MB ({size:,} bytes)" in out
    assert "Unified checkpoint split into separated format!" in out
    vocabulary = len(ckpt.load(path).tokenizer["chars"])
    assert f"logits equal: 2 x 16 x {vocabulary}; fields of metadata equal: " in out
    again = call(converter, tmp_path, CHECKPOINT_PATH=target_of(out), CHECKPOINT_LAYOUT="directory").out
    assert [hashed(text) for text in (out, again)] == [hashed(out)] * 2


def hashed(out):
    return out.split("sha256 ")[1].split(";")[0]


def test_without_the_optimizer(trained, tmp_path):
    path = save(tmp_path, ckpt.load(family(trained)[8]))
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CHECKPOINT_MODEL_ONLY="true", OUTPUT=tmp_path / "to-share")
    assert said.code == 0, said.err
    new = ckpt.load(target_of(said.out))
    assert (new.optimizer_state, new.parts) == (None, ["model"])
    assert new.path.parent == tmp_path / "to-share"
    assert all(torch.equal(tensor, new.model_state[name]) for name, tensor in ckpt.load(path).model_state.items())
    assert f"Model-only size: {new.path.stat().st_size / 1e6:.2f} MB" in said.out
    assert ckpt.load(path).optimizer_state is not None


def test_the_full_one_is_the_latest_and_the_best_of_two_of_one_save(tmp_path):
    path = save(tmp_path, record(1, validation_loss=1.0))
    ckpt.convert(path, layout="unified", model_only=True)
    found = ckpt.find(path.parent)
    assert len(found) == 2
    assert ckpt.latest(found).path == ckpt.best(found).path == path
    assert ckpt.resolve(f"{path.parent}/*.pt", path.parent)[0] == path


@pytest.mark.parametrize(
    ("saved", "begins"),
    [("my-model", "my-model_"), ("../../out", "checkpoint_"), (7, "checkpoint_"), ("x" * 41, "checkpoint_")],
)
def test_names_begin_as_those_of_the_run(tmp_path, saved, begins):
    one = record(1, hyperparameters={"CHECKPOINT_PREFIX": saved})
    path = ckpt.save(one, tmp_path, prefix="my-model" if saved == "my-model" else "checkpoint")
    target = ckpt.convert(path, tmp_path / "new", layout="directory").target
    assert target.parent == tmp_path / "new"
    assert target.name.startswith(begins)
    assert ckpt.convert(path, tmp_path / "new", layout="directory", prefix="other").target.name.startswith("other_")


def test_nothing_is_overwritten(tmp_path):
    path = save(tmp_path, record(1))
    targets = [ckpt.convert(path, layout="directory").target for _ in range(3)]
    assert len(set(targets)) == 3
    assert all(same_tensors(ckpt.load(target), record(1)) for target in targets)


def test_the_best_stays_in_best(tmp_path):
    one = record(1, validation_loss=1.0)
    path = ckpt.keep_best(one, save(tmp_path, record(9)).parent, saved=None)
    assert ckpt.convert(path, layout="directory").target.parent == path.parent
    stepfile = ckpt.convert(path, layout="stepfiles").target
    assert stepfile == tmp_path / "checkpoints" / "one" / "best" / "step_000001.safetensors"


def test_a_damaged_source_is_refused_and_leaves_nothing(tmp_path):
    path = save(tmp_path, record(1, size=64))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in a tensor, where only the checksum tells
    path.write_bytes(data)
    before = files_of(path.parent)
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CHECKPOINT_LAYOUT="directory")
    assert (said.code, said.out) == (3, "")
    assert "do not match their checksum" in said.err
    assert files_of(path.parent) == before


def test_what_is_not_the_same_after_reading_it_back_is_removed(tmp_path, monkeypatch):
    """The control of the proof: a writer that loses the last bit of one number."""
    path, write = save(tmp_path, record(1)), WRITERS["directory"].write

    def lossy(layout, one, folder, stem):
        weight = one.model_state[WEIGHT].clone()
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        return write(dataclasses.replace(one, model_state={WEIGHT: weight}), folder, stem)

    before = files_of(path.parent)
    monkeypatch.setattr(ManifestLayout, "write", lossy)
    with pytest.raises(CheckpointError, match="its tensors are not those of") as caught:
        ckpt.convert(path, layout="directory")
    assert caught.value.kind == "damaged"
    assert files_of(path.parent) == before


@pytest.mark.parametrize("after", WRITERS)
@pytest.mark.parametrize("before", WRITERS)
def test_every_field_and_every_group_stays(tmp_path, before, after):
    one = gpt2_record(optimizer="muon", **FULL)
    path = save(tmp_path, one, before)
    target = ckpt.convert(path, tmp_path / "new", layout=after).target
    assert_same(ckpt.load(target), ckpt.load(path), but={"save_id"})


LOSSES = {
    "step": lambda one: dataclasses.replace(one, step=one.step + 1),
    "schedule": lambda one: dataclasses.replace(one, schedule=one.schedule | {"peak": 0.5}),
    "hyperparameters": lambda one: dataclasses.replace(one, hyperparameters={}),
    "run_id": lambda one: dataclasses.replace(one, run_id=None),
    "param_groups": lambda one: dataclasses.replace(
        one,
        optimizer_state=one.optimizer_state
        | {"param_groups": [group | {"lr": 0.5} for group in one.optimizer_state["param_groups"]]},
    ),
}


@pytest.mark.parametrize("field", LOSSES)
def test_the_proof_covers_the_metadata(tmp_path, monkeypatch, field):
    """Its control: a writer that loses one field, whose tensors and logits are still the same."""
    path, write = save(tmp_path, record(1, **FULL)), WRITERS["directory"].write
    before = files_of(path.parent)
    lossy = lambda layout, one, folder, stem: write(LOSSES[field](one), folder, stem)  # noqa: E731
    monkeypatch.setattr(ManifestLayout, "write", lossy)
    with pytest.raises(CheckpointError, match=rf": its fields {field} are not those of "):
        ckpt.convert(path, layout="directory")
    assert files_of(path.parent) == before


def test_what_failed_the_proof_is_removed_under_the_lock_of_the_folder(tmp_path, monkeypatch):
    """Another process that saves there clears up what it takes for a dead one's."""
    path, held = save(tmp_path, record(1)), []
    module = sys.modules["milepost.ckpt.conversion"]
    remove = module.remove

    def watched(files):
        with pytest.raises(Timeout):
            FileLock(path.parent / FOLDER_LOCK).acquire(timeout=0)
        held.append(files)
        remove(files)

    monkeypatch.setattr(module, "remove", watched)
    monkeypatch.setattr(module, "logits", lambda one: torch.full((1,), float(one.layout == "unified")))
    before = files_of(path.parent)
    with pytest.raises(CheckpointError, match="its logits are not those of"):
        ckpt.convert(path, layout="separated")
    assert len(held) == 1
    assert files_of(path.parent) == before
    FileLock(path.parent / FOLDER_LOCK).acquire(timeout=0).lock.release()  # the control: it is free now


@pytest.mark.parametrize("layout", ["unified", "directory"])
def test_an_edited_one_is_refused(tmp_path, layout):
    """Going on from it begins a child run; written anew it would pass for the run that was saved."""
    path = save(tmp_path, gpt2_record(), "directory")
    saved = (path / "config.json").read_text()
    (path / "config.json").write_text(json.dumps(json.loads(saved) | {"batch_size": 4, "dropout": 0.5}))
    before = files_of(tmp_path)
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CHECKPOINT_LAYOUT=layout, OUTPUT=tmp_path / "new")
    assert (said.code, said.out) == (3, "")
    assert f"{path}: was edited since it was saved (BATCH_SIZE 2 -> 4, DROPOUT 0.0 -> 0.5)" in said.err
    assert "set it back in its config.json, or resume from it as it is" in said.err
    assert {name: data for name, data in files_of(tmp_path).items() if name in before} == before
    assert not (tmp_path / "new").exists()
    (path / "config.json").write_text(saved)
    assert ckpt.load(ckpt.convert(path, tmp_path / "new", layout=layout).target).hyperparameters == {"BATCH_SIZE": 2}


def test_a_full_disk_is_seen_before(tmp_path, monkeypatch):
    path = save(tmp_path, record(1))
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    before = files_of(path.parent)
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CHECKPOINT_LAYOUT="directory")
    assert said.code == 1
    assert "the disk is full: about" in said.err
    assert "1 are free" in said.err
    assert files_of(path.parent) == before


# ---------------------------------------------------------------------------------------------------------------------
# A whole folder


@pytest.mark.parametrize("layout", WRITERS)
def test_a_whole_folder(trained, tmp_path, layout):
    source, output = trained / "checkpoints", tmp_path / "new"
    before = files_of(source)
    said = call(converter, trained, CHECKPOINT_PATH=source, OUTPUT=output, CHECKPOINT_LAYOUT=layout)
    assert said.code == 0, said.err
    assert said.out.endswith(f"Conversion complete! Check {output}\n")
    old, new = ckpt.find(source), ckpt.find(output)
    assert len(old) == len(new) == 6
    for one, other in zip(old, new, strict=True):
        assert same_tensors(ckpt.load(one.path), ckpt.load(other.path, verify=True))
        assert (one.step, one.run_id, one.save_order) == (other.step, other.run_id, other.save_order)
        assert other.layout == layout
    assert bests(output) == bests(source)
    assert files_of(source) == before
    again = call(converter, trained, CHECKPOINT_PATH=source, OUTPUT=output, CHECKPOINT_LAYOUT=layout)
    assert again.code == 0
    assert again.out.endswith(f"Conversion complete! Check {output}\n")
    assert "Converted: " not in again.out
    assert again.err.count("already") == 6
    assert len(ckpt.find(output)) == 6


def bests(folder):
    """Run and step of what lies in a best/."""
    return sorted((one.run_id, one.step) for one in finding.scan(folder) if one.path.parent.name == "best")


def test_damaged_ones_are_named_and_left_out(trained, tmp_path):
    folder = copied(trained, tmp_path)
    os.truncate(family(folder)[4], 4000)
    said = call(
        converter,
        folder,
        CHECKPOINT_PATH=folder / "checkpoints",
        OUTPUT=tmp_path / "new",
        CHECKPOINT_LAYOUT="directory",
    )
    assert said.code == 3
    assert f"skipped: {family(trained)[4].name}" in said.err.replace(f"{folder}/checkpoints/", "")
    assert f"1 of {said.out.count('Converted: ') + 1} cannot be read. Check {tmp_path / 'new'}\n" in said.out
    assert "Conversion complete!" not in said.out
    steps = [one.step for one in ckpt.find(tmp_path / "new")]
    assert {2, 6, 8} <= set(steps)


@pytest.mark.parametrize("form", ["separated", "directory", "nanogpt"])
def test_an_output_that_cannot_be_written_is_named_with_its_variable(form, trained, tmp_path):
    output = Path(__file__) / "new"
    said = call(converter, trained, CHECKPOINT_PATH=family(trained)[4], CONVERT_TO=form, OUTPUT=output)
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines()[-1].startswith(f"error: OUTPUT: {output} cannot be written")


def test_a_folder_goes_to_a_new_one(trained, tmp_path):
    source = trained / "checkpoints"
    said = call(converter, trained, CHECKPOINT_PATH=source)
    assert (said.code, said.out) == (2, "")
    assert "OUTPUT: a whole folder" in said.err
    for output in (source, source / "new"):
        said = call(converter, trained, CHECKPOINT_PATH=source, OUTPUT=output)
        assert (said.code, said.out) == (2, "")
        assert "which stays untouched; name another folder" in said.err
    assert not (source / "new").exists()
    (tmp_path / "empty").mkdir()
    said = call(converter, trained, CHECKPOINT_PATH=tmp_path / "empty", OUTPUT=tmp_path / "new")
    assert said.code == 3
    assert not (tmp_path / "new").exists()
