"""scripts/convert_checkpoint.py on other programs' checkpoints and on many at once: what is kept,
and what is reported lost.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_programs import (
    CHARS,
    golden_lecture,
    golden_moments,
    golden_nano,
    lightning,
    meta,
    nanogpt,
    pair,
    write_lecture_folder,
    write_pair,
    write_step,
)
from records import record
from script import call, files_of, same_tensors, script

from milepost import ckpt
from milepost.ckpt.conversion import convert
from milepost.ckpt.layouts import WRITERS
from milepost.ckpt.restore import build_tokenizer

converter = script("convert_checkpoint")
CHAR = {"token_kind": "char", "chars": CHARS}


def saved(path: Path, step: int, **more: Any) -> Path:
    """A checkpoint of another program at `path`, with everything in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": golden_nano().state_dict(), "step": step, "config": {"n_head": 2, "batch_size": 4}}
    torch.save(content | {"tokenizer": CHAR} | more, path)
    return path


def aged(path: Path, seconds: int) -> Path:
    """Set the time of the last change, as copying in another order does."""
    os.utime(path, (seconds, seconds))
    return path


def converted(folder: Path, **changes: Any):
    return call(converter, folder, **changes)


def table_of(out: str) -> list[tuple[str, str]]:
    lines = out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split() == ["old", "new"])
    rows = [
        tuple(re.split(" {2,}", line.strip(), maxsplit=1))
        for line in lines[start + 1 :]
        if not line.startswith(("Conversion", "Check"))
    ]
    return [row for row in rows if len(row) == 2 and row[0].startswith("/")]  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------------------
# What a conversion keeps.


@pytest.mark.parametrize("layout", [name for name in WRITERS if not WRITERS[name].run_stem])
def test_the_order_and_the_names_stay_whatever_the_files_times_are(tmp_path, layout):
    source = tmp_path / "old"
    aged(saved(source / "final.pt", 1000), 2_000_000_000)
    aged(saved(source / "latest.pt", 2000), 1_000_000_000)
    assert ckpt.latest(ckpt.find(source)).path.name == "latest.pt"
    said = converted(tmp_path, CHECKPOINT_PATH=source, CONVERT_TO=layout, OUTPUT=tmp_path / "new")
    assert said.code == 0, said.err
    new = ckpt.find(tmp_path / "new")
    assert [(found.step, found.path.name.split("-")[0].removesuffix(".pt")) for found in new] == [
        (1000, "final"), (2000, "latest"),
    ]  # fmt: skip
    assert ckpt.latest(new).step == 2000


def test_documented_names_are_made_anew_and_the_order_stays(tmp_path):
    for name, step, time in (("b.pt", 1000, 2_000_000_000), ("a.pt", 2000, 1_000_000_000)):
        aged(saved(tmp_path / "old" / name, step), time)
    said = converted(tmp_path, CHECKPOINT_PATH=tmp_path / "old", CONVERT_TO="stepfiles", OUTPUT=tmp_path / "new")
    assert said.code == 0, said.err
    assert ckpt.latest(ckpt.find(tmp_path / "new")).path == tmp_path / "new/run/step_002000.safetensors"


def test_a_taken_name_gets_a_number(tmp_path):
    path = saved(tmp_path / "latest.pt", 7)
    targets = [convert(path, tmp_path / "new", layout="unified").target.name for _ in range(3)]
    assert targets == ["latest.pt", "latest_2.pt", "latest_3.pt"]


def test_a_renamed_checkpoint_of_ours_keeps_its_name_and_its_save(tmp_path):
    path = ckpt.save(record(3), tmp_path)
    kept = path.rename(tmp_path / "my favourite.pt")
    target = convert(kept, tmp_path / "new", layout="separated").target
    assert target.name == "my favourite-model.pt"
    new = ckpt.load(target)
    assert (new.run_id, new.save_number, new.saved_at) == (record(3).run_id, 1, ckpt.load(kept).saved_at)


@pytest.mark.parametrize("layout", WRITERS)
def test_the_other_values_of_a_file_stay(tmp_path, layout):
    path = saved(tmp_path / "latest.pt", 7, scheduler_state_dict={"last_epoch": 7, "base_lrs": [3e-4, float("inf")]})
    said = converted(tmp_path, CHECKPOINT_PATH=path, CONVERT_TO=layout, OUTPUT=tmp_path / "new")
    assert said.code == 0, said.err
    (found,) = ckpt.find(tmp_path / "new")
    kept = ckpt.load(found.path).imported
    assert kept["values"]["scheduler_state_dict"] == {"last_epoch": 7, "base_lrs": [3e-4, "inf"]}
    assert kept["values"]["config"]["batch_size"] == 4
    assert (kept["file"], kept["bytes"]) == ("latest.pt", path.stat().st_size)
    again = converted(tmp_path, CHECKPOINT_PATH=found.path, CONVERT_TO="unified", OUTPUT=tmp_path / "again.pt")
    assert again.code == 0, again.err
    assert ckpt.load(tmp_path / "again.pt").imported == kept


def nano_file(folder: Path) -> tuple[Path, set[str]]:
    torch.save(nanogpt(golden_nano(), golden_moments()), folder / "ckpt.pt")
    (folder / "meta.pkl").write_bytes(meta(CHARS))
    return folder / "ckpt.pt", {"config", "model_args", "iter_num", "best_val_loss"}


def lightning_file(folder: Path) -> tuple[Path, set[str]]:
    content = lightning(golden_nano(), {"n_head": 2, "lr": 1e-3}) | {"optimizer_states": []}
    torch.save(content, folder / "last.ckpt")
    (folder / "meta.pkl").write_bytes(meta(CHARS))
    return folder / "last.ckpt", {"lr_schedulers", "callbacks", "loops", "hyper_parameters"}


def pair_file(folder: Path) -> tuple[Path, set[str]]:
    (folder / "meta.pkl").write_bytes(meta(CHARS))
    halves = pair(golden_nano(), {"n_head": 2, "bias": False}, golden_moments().state_dict())
    return write_pair(folder, halves), {"lr_scheduler_states", "config"}


def step_file(folder: Path) -> tuple[Path, set[str]]:
    state = {name: tensor for name, tensor in golden_lecture().state_dict().items() if not name.endswith("tril")}
    (folder / "config.json").write_text(json.dumps({"n_head": 2}))
    (folder / "tokenizer.json").write_text(json.dumps(CHAR))
    return write_step(folder, state, accuracy=0.5), {"metrics", "config.json"}


def document_folder(folder: Path) -> tuple[Path, set[str]]:
    path = write_lecture_folder(folder / "dante", golden_lecture(), CHAR)
    (path / "optimizer.pt").unlink()
    return path, {"optimizer_file", "config.json"}


@pytest.mark.parametrize("make", [nano_file, lightning_file, pair_file, step_file, document_folder])
def test_each_program_keeps_what_it_saved_beside_the_weights(tmp_path, make):
    path, names = make(tmp_path)
    target = convert(path, tmp_path / "new", layout="unified").target
    new = ckpt.load(target)
    assert names <= new.imported["values"].keys()
    assert not new.left_out
    assert same_tensors(new, ckpt.load(path))


@pytest.mark.parametrize("key", ["rng_state", "ema", "torch_generator"])
def test_tensors_that_no_layout_holds_are_named_and_the_exit_code_is_3(tmp_path, key):
    path = saved(tmp_path / "latest.pt", 7, **{key: torch.arange(16, dtype=torch.uint8)})
    said = converted(tmp_path, CHECKPOINT_PATH=path, CONVERT_TO="unified", OUTPUT=tmp_path / "new")
    assert said.code == 3
    assert said.err.splitlines()[-1].endswith(f"latest.pt lacks what no layout holds: {key}")
    assert "Conversion complete!" not in said.out
    assert (tmp_path / "new" / "latest.pt").is_file()


def test_an_optimizer_that_cannot_be_used_is_a_loss_unless_only_the_model_was_asked_for(tmp_path):
    model = golden_nano()
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    momentum.step()
    path = saved(tmp_path / "latest.pt", 7, optimizer=momentum.state_dict())
    asked = {"CHECKPOINT_PATH": path, "CONVERT_TO": "unified", "OUTPUT": tmp_path / "new"}
    said = converted(tmp_path, **asked)
    assert said.code == 3
    assert "lacks what no layout holds: optimizer" in said.err
    assert converted(tmp_path, **asked, CHECKPOINT_MODEL_ONLY="true").code == 0


def test_without_a_tokenizer_the_exit_code_is_3(tmp_path):
    path = saved(tmp_path / "latest.pt", 7, tokenizer=None)
    said = converted(tmp_path, CHECKPOINT_PATH=path, CONVERT_TO="unified", OUTPUT=tmp_path / "new")
    assert said.code == 3
    assert "without a tokenizer" in said.err
    assert "Conversion complete!" not in said.out


# ---------------------------------------------------------------------------------------------------------------------
# Many at once.


def many(folder: Path) -> Path:
    """Two models, each in a folder of its own, as people keep them."""
    for name in ("dante", "shakespeare"):
        saved(folder / "many" / name / "latest.pt", 2000)
        saved(folder / "many" / name / "final.pt", 1000)
    return folder / "many"


EVERY = {f"{name}/{file}.pt" for name in ("dante", "shakespeare") for file in ("latest", "final")}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("{}", EVERY),
        ("{}/*", EVERY),
        ("{}/*/latest.pt", {"dante/latest.pt", "shakespeare/latest.pt"}),
        ("{}/dante/*.pt", {"latest.pt", "final.pt"}),
        ("{0}/dante/latest.pt,{0}/dante/final.pt", {"latest.pt", "final.pt"}),
        ("{0}/dante/latest.pt,{0}/shakespeare", {"dante/latest.pt", "shakespeare/latest.pt", "shakespeare/final.pt"}),
        ("{0}/dante/*.pt,{0}/dante/latest.pt", {"latest.pt", "final.pt"}),
    ],
)
def test_everything_that_is_named_is_converted(tmp_path, chosen, expected):
    source, new = many(tmp_path), tmp_path / "new"
    said = converted(tmp_path, CHECKPOINT_PATH=chosen.format(source), CONVERT_TO="unified", OUTPUT=new)
    assert said.code == 0, said.err
    assert files_of(new).keys() == expected
    rows = table_of(said.out)
    assert {Path(target).relative_to(new).as_posix() for _, target in rows} == expected
    assert all(Path(old).name == Path(target).name for old, target in rows)
    again = converted(tmp_path, CHECKPOINT_PATH=chosen.format(source), CONVERT_TO="unified", OUTPUT=new)
    assert again.code == 0
    assert files_of(new).keys() == expected
    assert "Converted: " not in again.out


def test_a_file_that_changed_since_is_converted_again(tmp_path):
    source, new = many(tmp_path), tmp_path / "new"
    asked = {"CHECKPOINT_PATH": source, "CONVERT_TO": "unified", "OUTPUT": new}
    assert converted(tmp_path, **asked).code == 0
    aged(saved(source / "dante" / "latest.pt", 2000), 1_500_000_000)
    assert converted(tmp_path, **asked).code == 0
    assert files_of(new).keys() == EVERY | {"dante/latest_2.pt"}


@pytest.mark.parametrize("chosen", ["{}", "{}/*", "{}/*/*.pt", "{0}/dante/broken.pt,{0}/dante/latest.pt"])
def test_a_damaged_file_is_named_in_the_table_and_the_exit_code_is_3(tmp_path, chosen):
    source, new = many(tmp_path), tmp_path / "new"
    broken = source / "dante" / "broken.pt"
    broken.write_bytes((source / "dante" / "latest.pt").read_bytes()[:900])
    said = converted(tmp_path, CHECKPOINT_PATH=chosen.format(source), CONVERT_TO="unified", OUTPUT=new)
    assert said.code == 3
    assert dict(table_of(said.out))[str(broken)] == "(skipped: damaged)"
    assert sum(line.startswith(f"skipped: {broken}: is damaged") for line in said.err.splitlines()) == 1
    assert any(name.endswith("latest.pt") for name in files_of(new))
    assert "Conversion complete!" not in said.out


LOSSES = {"random generators": {"rng_state": torch.arange(16, dtype=torch.uint8)}, "tokenizer": {"tokenizer": None}}


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("lost", LOSSES)
def test_a_second_conversion_reports_the_losses_of_the_first_again(tmp_path, layout, lost):
    saved(tmp_path / "old" / "latest.pt", 7, **LOSSES[lost])
    asked = {"CHECKPOINT_PATH": tmp_path / "old", "CONVERT_TO": layout, "OUTPUT": tmp_path / "new"}
    first = converted(tmp_path, **asked)
    before = files_of(tmp_path / "new")
    second = converted(tmp_path, **asked)
    assert (first.code, second.code, files_of(tmp_path / "new")) == (3, 3, before)
    assert second.err.splitlines()[-1] == first.err.splitlines()[-1]
    assert "Conversion complete!" not in second.out
    saved(tmp_path / "old" / "latest.pt", 7)  # control: without a loss both end with 0
    assert [converted(tmp_path, **asked | {"OUTPUT": tmp_path / "whole"}).code for _ in range(2)] == [0, 0]


def test_a_conversion_of_a_conversion_keeps_what_the_first_left_out_and_loses_nothing(tmp_path):
    path = saved(tmp_path / "latest.pt", 7, rng_state=torch.arange(16, dtype=torch.uint8))
    first = convert(path, tmp_path / "one", layout="unified")
    second = convert(first.target, tmp_path / "two", layout="directory")
    assert (first.left_out, second.left_out) == (["rng_state"], [])
    assert ckpt.load(second.target).imported == ckpt.load(first.target).imported
    assert ckpt.load(second.target).imported["left_out"] == ["rng_state"]


@pytest.mark.parametrize("size", ["flipped", 900])
@pytest.mark.parametrize("ours", [False, True])
def test_a_damaged_target_does_not_count_as_converted(tmp_path, size, ours):
    source, new = tmp_path / "old", tmp_path / "new"
    path = ckpt.save(record(3), source) if ours else saved(source / "latest.pt", 7)
    asked = {"CHECKPOINT_PATH": source, "CONVERT_TO": "unified", "OUTPUT": new}
    assert converted(tmp_path, **asked).code == 0
    (target,) = new.glob("*.pt")
    data = bytearray(target.read_bytes())
    data[data.find(ckpt.load(path).model_state.popitem()[1].numpy().tobytes()) + 1] ^= 1
    target.write_bytes(data if size == "flipped" else data[:size])
    damaged = target.read_bytes()
    said = converted(tmp_path, **asked)
    assert said.code == 0, said.err
    assert str(target) in said.err  # named
    assert target.read_bytes() == damaged
    (anew,) = set(new.glob("*.pt")) - {target}
    assert not ckpt.verify(anew)
    said = converted(tmp_path, **asked)
    assert (said.code, len(list(new.glob("*.pt")))) == (0, 2)
    assert same_tensors(ckpt.load(anew), ckpt.load(path))


@pytest.mark.parametrize("layout", WRITERS)
def test_the_hash_of_the_tokenizer_is_recorded_as_in_our_own_saves(tmp_path, layout):
    path = saved(tmp_path / "latest.pt", 7)
    new = ckpt.load(convert(path, tmp_path / "new", layout=layout).target)
    assert new.tokenizer_sha256 == build_tokenizer(new).digest
    assert ckpt.load(path).tokenizer_sha256 is None


def test_a_tokenizer_that_cannot_be_rebuilt_is_left_out(tmp_path):
    bpe = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": "none"}}
    done = convert(saved(tmp_path / "latest.pt", 7, tokenizer=bpe), tmp_path / "new", layout="unified")
    assert (done.has_tokenizer, len(done.left_out)) == (False, 1)
    assert ckpt.load(done.target).tokenizer is None


def test_half_of_a_pair_is_not_passed_over(tmp_path):
    source = tmp_path / "old"
    source.mkdir()
    path = write_pair(source, pair(golden_nano(), {"n_head": 2, "bias": False}, golden_moments().state_dict()))
    (source / "meta.pkl").write_bytes(meta(CHARS))
    saved(source / "latest.pt", 5)
    path.unlink()
    for chosen in (source, f"{source}/*"):
        said = converted(tmp_path, CHECKPOINT_PATH=chosen, CONVERT_TO="unified", OUTPUT=tmp_path / "new")
        assert said.code == 3
        assert "checkpoint-step001000-optimizer.pt" in said.err
        assert "(skipped: lacking)" in said.out


def test_an_export_takes_many_too(tmp_path):
    for name in ("a", "b"):
        torch.save(nanogpt(golden_nano()), (tmp_path / name).with_suffix(".pt"))
    (tmp_path / "meta.pkl").write_bytes(meta(CHARS))
    said = converted(tmp_path, CHECKPOINT_PATH=f"{tmp_path}/*.pt", CONVERT_TO="nanogpt", OUTPUT=tmp_path / "out")
    assert said.code == 0, said.err
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"a", "b"}


# ---------------------------------------------------------------------------------------------------------------------
# OUTPUT as the name of a file.


@pytest.mark.parametrize(
    ("layout", "name", "made"),
    [
        ("unified", "mine.pt", {"mine.pt"}),
        ("separated", "mine-model.pt", {"mine-model.pt"}),
        ("separated", "mine.pt", {"mine-model.pt"}),
        ("stepfiles", "mine.safetensors", {"mine.safetensors", "mine_state.json"}),
    ],
)
def test_output_names_the_file(tmp_path, layout, name, made):
    path = saved(tmp_path / "latest.pt", 7)
    asked = {"CHECKPOINT_PATH": path, "CONVERT_TO": layout, "OUTPUT": tmp_path / "new" / name}
    said = converted(tmp_path, **asked)
    assert said.code == 0, said.err
    assert files_of(tmp_path / "new").keys() == made
    before = files_of(tmp_path / "new")
    asked["CHECKPOINT_PATH"] = f"{tmp_path}/lat*.pt"  # a glob that matches one checkpoint
    again = converted(tmp_path, **asked)
    assert (again.code, files_of(tmp_path / "new")) == (3, before)
    assert "exists already, and nothing is replaced" in again.err


@pytest.mark.parametrize(
    ("chosen", "layout", "name"),
    [
        ("*.pt", "unified", "x.pt"),
        ("a.pt", "directory", "x.pt"),
        ("a.pt", "unified", "x.safetensors"),
        ("a.pt", "nanogpt", "x.pt"),
    ],
)
def test_an_output_that_cannot_be_a_file_is_refused(tmp_path, chosen, layout, name):
    for own in ("a.pt", "b.pt"):
        saved(tmp_path / "old" / own, 7)
    said = converted(
        tmp_path, CHECKPOINT_PATH=tmp_path / "old" / chosen, CONVERT_TO=layout, OUTPUT=tmp_path / "new" / name
    )
    assert (said.code, said.out) == (2, "")
    assert f"OUTPUT={tmp_path / 'new' / name}: " in said.err
    assert not (tmp_path / "new").exists()


def test_gguf_is_given_the_name_that_was_asked_for(tmp_path):
    writer = ckpt.exporter("gguf", gguf_type="f32")
    assert writer.targets(tmp_path, "x") == [tmp_path / "x-f32.gguf"]
    assert writer.targets(tmp_path, "x.gguf") == [tmp_path / "x.gguf"]


def test_what_an_earlier_conversion_left_out_is_converted_when_it_is_asked_for(tmp_path):
    for step in (1, 2):
        ckpt.save(record(step), tmp_path / "old")
    asked = {"CHECKPOINT_PATH": tmp_path / "old", "CONVERT_TO": "separated", "OUTPUT": tmp_path / "new"}
    assert converted(tmp_path, **asked, CHECKPOINT_MODEL_ONLY="true").code == 0
    for _ in range(2):  # the second time, nothing is left to do
        assert converted(tmp_path, **asked).code == 0
        found = ckpt.find(tmp_path / "new")
        assert [one.step for one in found if one.resumable] == [1, 2]
        assert len(found) == 4
    assert converted(tmp_path, **asked, CHECKPOINT_MODEL_ONLY="true").code == 0
    assert len(ckpt.find(tmp_path / "new")) == 4


def test_checkpoints_converted_without_a_tokenizer_are_converted_again_with_one(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(CHARS), encoding="utf-8")
    for step in (1, 2):
        content = {"model": golden_nano().state_dict(), "step": step, "config": {"n_head": 2}}
        (tmp_path / "old").mkdir(exist_ok=True)
        torch.save(content, tmp_path / "old" / f"ckpt_{step}.pt")
    asked = {"CHECKPOINT_PATH": tmp_path / "old", "CONVERT_TO": "unified", "OUTPUT": tmp_path / "new"}
    for _ in range(2):
        said = converted(tmp_path, **asked)
        assert said.code == 3
        assert "Conversion complete" not in said.out
        assert "TRAINING_DATA_SOURCE" in said.err
    assert len(ckpt.find(tmp_path / "new")) == 2
    named = converted(tmp_path, **asked, TRAINING_DATA_SOURCE=text)
    assert named.code == 0, named.err
    assert sum(ckpt.load(one.path).tokenizer is not None for one in ckpt.find(tmp_path / "new")) == 2
    for source in (text, None):
        more = {} if source is None else {"TRAINING_DATA_SOURCE": source}
        assert converted(tmp_path, **asked, **more).code == 0
    assert len(ckpt.find(tmp_path / "new")) == 4
