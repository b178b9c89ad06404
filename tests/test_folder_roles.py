"""Folders are judged by what is in them, whatever they are called or set as;
nothing in them is passed over in silence.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from drive import train
from foreign_programs import (
    CHARS,
    SMALL,
    bare,
    golden_lecture,
    golden_nano,
    meta,
    nanogpt,
    pair,
    write_lecture_folder,
    write_pair,
)
from records import gpt2_record, record
from safetensors.torch import save_file
from script import call, script

from milepost import ckpt
from milepost.ckpt import CheckpointError, retention
from milepost.ckpt.conversion import convert
from milepost.ckpt.finding import folder_of, in_best
from milepost.ckpt.layouts import WRITERS, known_layout
from milepost.ckpt.restore import build_tokenizer
from milepost.ckpt.tensor_listing import all_files
from milepost.text.tokenization import CharTokenizer
from milepost.text.tokenizer_json import tokenizers_json

lister, pruner, converter = script("list_checkpoints"), script("prune_checkpoints"), script("convert_checkpoint")
FOLDER_LAYOUTS = [name for name in WRITERS if WRITERS[name].is_folder and not WRITERS[name].run_stem]


def transformers_folder(path: Path) -> Path:
    """A folder as transformers saves it: without a manifest."""
    ckpt.save(gpt2_record(), path.parent, layout="huggingface").rename(path)
    (path / "milepost.json").unlink()
    return path


def kind_of(path: Path | str, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        ckpt.resolve(str(path), folder)
    return caught.value.kind


# ---------------------------------------------------------------------------------------------------------------------
# A folder of checkpoints that is a checkpoint itself, and one called best.


@pytest.mark.parametrize("layout", ["transformers", *FOLDER_LAYOUTS])
def test_checkpoints_inside_a_checkpoint_are_found_and_pruned(tmp_path, layout):
    if layout == "transformers":
        transformers_folder(tmp_path / "base")
    else:
        ckpt.save(gpt2_record(run_id="base"), tmp_path, layout=layout).rename(tmp_path / "base")
    base = tmp_path / "base"
    saved = [ckpt.save(record(step), base) for step in (1, 2, 3)]
    assert {found.path for found in ckpt.find(base)} == {base, *saved}
    assert ckpt.latest(ckpt.find(base)).path == saved[-1]
    assert ckpt.orphans(base) == []
    assert ckpt.resolve(str(base), tmp_path)[0] == base  # named as a checkpoint, it is one
    ckpt.prune(base, run_id=record().run_id, keep_last=1, keep_every=0, latest_valid=saved[-1])
    assert {found.path for found in ckpt.find(base)} == {base, saved[-1]}
    assert ckpt.load(base).model_type == "gpt2"


def test_a_folder_called_best_is_a_folder_of_checkpoints(tmp_path):
    folder = tmp_path / "best"
    saved = [ckpt.save(record(step, validation_loss=float(step)), folder) for step in (1, 2, 3)]
    assert [folder_of(path, record().run_id) for path in saved] == [folder] * 3
    assert not any(in_best(found, folder) for found in ckpt.find(folder))
    assert not ckpt.best_is_kept(folder, run_id=record().run_id, loss=1.0)
    gone = retention.prune(folder, run_id=record().run_id, keep_last=1, keep_every=0, latest_valid=saved[-1])
    assert [found.path for found in gone.remove] == saved[:2]
    assert convert(saved[-1], layout="directory").target.parent == folder


@pytest.mark.parametrize("neighbour", ["another program's", "another run's"])
def test_a_folder_called_best_is_not_its_neighbour_s(tmp_path, neighbour):
    """A checkpoint of another program or run in the folder above does not make it that folder's best."""
    if neighbour == "another run's":
        ckpt.save(record(9, run_id="other"), tmp_path)
    else:
        transformers_folder(tmp_path / "base")
        (tmp_path / ".lock").unlink()
    saved = ckpt.save(record(1), tmp_path / "best")
    assert folder_of(saved, record().run_id) == tmp_path / "best"


def test_a_best_below_a_folder_of_checkpoints_stays_its_best(tmp_path):
    """The control: the same name, where the folder above was saved into."""
    saved = ckpt.save(record(1, validation_loss=1.0), tmp_path)
    kept = ckpt.keep_best(ckpt.load(saved), tmp_path, saved=saved)
    assert kept.parent == tmp_path / "best"
    assert folder_of(kept, record().run_id) == tmp_path
    assert ckpt.best_is_kept(tmp_path, run_id=record().run_id, loss=1.0)
    (tmp_path / ".lock").unlink()
    assert folder_of(kept, record().run_id) == tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# Neighbours of other programs.


def test_the_trainer_s_steps_decide_which_is_the_latest(tmp_path):
    for step, loss in ((10, 2.0), (8, 1.0), (9, 3.0)):
        path = transformers_folder(tmp_path / "out" / f"checkpoint-{step}")
        history = [{"step": 1, "eval_loss": 9.0}, {"step": step, "eval_loss": loss}]
        state = {"global_step": step, "epoch": step / 4, "max_steps": 10, "log_history": history}
        (path / "trainer_state.json").write_text(json.dumps(state))
    found = ckpt.find(tmp_path / "out")
    assert [each.step for each in found] == [8, 9, 10]
    assert (ckpt.latest(found).path.name, ckpt.best(found).path.name) == ("checkpoint-10", "checkpoint-8")
    one = ckpt.load(ckpt.latest(found).path)
    assert (one.step, one.epoch, one.validation_loss) == (10, 2.5, 2.0)
    assert one.imported["values"]["max_steps"] == 10
    assert one.written_by != record().written_by


def test_an_adapter_in_a_model_folder_is_named_and_its_loss_is_exit_code_3(tmp_path):
    path = transformers_folder(tmp_path / "m")
    asked = {"CHECKPOINT_PATH": path, "CONVERT_TO": "unified", "OUTPUT": tmp_path / "new"}
    assert call(converter, tmp_path, **asked).code == 0
    (path / "adapter_config.json").write_text("{}")
    assert any("adapter_config.json" in note for note in ckpt.load(path).notes)
    said = call(converter, tmp_path, **asked)
    assert said.code == 3
    assert "adapter_config.json" in said.err.splitlines()[-1]


def hub_mixin(folder: Path) -> Path:
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in bare(golden_nano()).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SMALL))
    (folder / "meta.pkl").write_bytes(meta(CHARS))
    return folder


def test_a_folder_of_weights_and_sizes_opens_as_its_file_does(tmp_path):
    folder = hub_mixin(tmp_path / "m")
    path, _ = ckpt.resolve(str(folder), tmp_path)
    assert path == folder / "model.safetensors"
    assert ckpt.load(path).model_settings["n_head"] == SMALL["n_head"]


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_tokenizer_saved_after_a_padded_call_is_the_same(tmp_path, place):
    """tokenizer.json keeps truncation and padding of the last call; neither is part of the tokenizer."""
    last = {"truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}}
    last |= {
        "padding": {"strategy": {"Fixed": 4}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    }
    values = tokenizers_json(CharTokenizer([*CHARS])) | last
    if place == "inside":
        path = tmp_path / "ckpt.pt"
        torch.save(nanogpt(golden_nano()) | {"tokenizer": values}, path)
    else:
        path = hub_mixin(tmp_path / "m") / "model.safetensors"
        (path.parent / "meta.pkl").unlink()
        (path.parent / "tokenizer.json").write_text(json.dumps(values))
    assert build_tokenizer(ckpt.load(path)).encode("".join(CHARS)) == list(range(len(CHARS)))


def trainer_run(folder: Path) -> Path:
    for step in (10, 9):
        state = {"global_step": step, "log_history": []}
        (transformers_folder(folder / f"checkpoint-{step}") / "trainer_state.json").write_text(json.dumps(state))
    return folder / "checkpoint-10"


def a_hub_mixin(folder: Path) -> Path:
    return hub_mixin(folder) / "model.safetensors"


def a_folder_of_ours(folder: Path) -> Path:
    return [ckpt.save(gpt2_record(step), folder) for step in (1, 2)][-1]


@pytest.mark.parametrize("make", [trainer_run, a_hub_mixin, a_folder_of_ours])
@pytest.mark.parametrize("variable", ["INIT_FROM", "GPT2_MODEL_NAME", "CHECKPOINT_PATH"])
def test_any_folder_of_weights_serves_in_any_role(tmp_path, make, variable):
    used = make(tmp_path / "theirs")
    if variable == "CHECKPOINT_PATH":
        said = call(script("load_checkpoint"), tmp_path, CHECKPOINT_PATH=tmp_path / "theirs", MAX_NEW_TOKENS="2")
        assert (said.code, f"{used}: gpt2 at step" in said.err) == (0, True), said.err
        return
    own = dict.fromkeys(["N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE", "DROPOUT"]) | {"MODEL_TYPE": "gpt2"}
    text = tmp_path / "letters.txt"
    text.write_text("".join(ckpt.load(used).tokenizer["chars"]) * 60)
    own |= {"TRAINING_DATA_SOURCE": str(text), "TRAINING_STEPS": "2", variable: str(tmp_path / "theirs")}
    code, said = train(tmp_path, **own)
    assert code == 0, said
    assert (str(used) in said) or make is a_hub_mixin


def test_a_tokenizer_that_is_not_read_is_neither_damage_nor_absence(tmp_path):
    folder = transformers_folder(tmp_path / "m")
    bpe = {"type": "BPE", "vocab": {chr(97 + i): i for i in range(11)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": bpe}))
    said = call(script("verify_checkpoint"), tmp_path, CHECKPOINT_PATH=folder)
    (exactly,) = [line.split(None, 2) for line in said.out.splitlines() if line.startswith("resumes exactly")]
    assert (said.code, exactly[2]) == (3, "no      it fails a check (tokenizer)")
    settings = {"CHECKPOINT_PATH": folder, "CONVERT_TO": "unified", "OUTPUT": tmp_path / "out"}
    said = call(script("convert_checkpoint"), tmp_path, **settings)
    assert said.code == 3
    assert "lacks what no layout holds: its tokenizer, which cannot be rebuilt" in said.err
    assert "TOKENIZER=byte" not in said.err  # it would not be used
    assert ckpt.load(tmp_path / "out" / "m.pt").tokenizer is None


def test_a_vocabulary_without_its_merges_is_named(tmp_path):
    path = transformers_folder(tmp_path / "m")
    (path / "tokenizer.json").unlink()
    for half, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        (path / half).write_text("{}")
        with pytest.raises(CheckpointError, match=other) as caught:
            ckpt.load(path)
        assert caught.value.kind == "lacking"
        (path / half).unlink()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 548105171\n"
HELD_BY_GIT = [
    "model.safetensors",
    "tokenizer.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "vocab.json",
]


@pytest.mark.parametrize("name", [*HELD_BY_GIT, "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_is_named_in_every_place(tmp_path, name):
    path = transformers_folder(tmp_path / "m")
    if name in ("merges.txt", "vocab.json"):
        (path / "tokenizer.json").unlink()
        (path / "merges.txt").write_text("#version: 0.2\n")
        (path / "vocab.json").write_text("{}")
    if name in ("pytorch_model.bin", "model.safetensors.index.json"):
        (path / "model.safetensors").unlink()
    (path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match="git lfs pull") as caught:
        ckpt.load(path)
    assert caught.value.path == path / name or str(path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.csv"])
def test_a_text_that_git_keeps_elsewhere_is_not_trained_on(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(tmp_path / name), BLOCK_SIZE="4")
    assert (code, "git lfs pull" in said) == (4, True), said


def test_a_text_on_git_lfs_is_trained_on(tmp_path):
    """The control: it begins as a pointer does, and is longer than one."""
    (tmp_path / "a.txt").write_text(POINTER * 60)
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(tmp_path / "a.txt"), BLOCK_SIZE="4")
    assert code == 0, said


def test_weights_of_a_save_that_was_killed_are_no_checkpoint(tmp_path):
    """The control: the same file without sizes beside it."""
    folder = hub_mixin(tmp_path / "m")
    (folder / "config.json").unlink()
    assert ckpt.find(folder) == []


# ---------------------------------------------------------------------------------------------------------------------
# What a folder without checkpoints holds instead.


def peft_adapter(folder: Path) -> str:
    (folder / "adapter_config.json").write_text("{}")
    return "adapter_config.json"


def half_a_pair(folder: Path) -> str:
    write_pair(folder, pair(golden_nano(), SMALL)).unlink()
    return "checkpoint-step001000-model.pt is missing"


def half_a_step(folder: Path) -> str:
    save_file({"x": torch.ones(1)}, folder / "step_000100_optimizer.safetensors")
    return "step_000100_state.json is missing"


def weights_without_state(folder: Path) -> str:
    save_file(bare(golden_nano()), folder / "step_000100.safetensors")
    return "step_000100_state.json is missing"


def model_without_config(folder: Path) -> str:
    (transformers_folder(folder / "m") / "config.json").unlink()
    return f"{folder / 'm' / 'model.safetensors'}: is part of a checkpoint, and config.json is missing"


def mlx_adapter(folder: Path) -> str:
    save_file({"layers.0.q_proj.lora_a": torch.ones(2, 2)}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 2}')
    return "an adapter of MLX-LM (adapter_config.json): fuse it"


def folders_below(folder: Path) -> str:
    for name in ("dante", "shakespeare"):
        (folder / name).mkdir()
        torch.save(nanogpt(golden_nano()), folder / name / "newest.pt")
    return f"{folder / 'dante'}, {folder / 'shakespeare'}; name one of them"


def other_files(folder: Path) -> str:
    for name in ("README.md", "notes.txt", ".hidden"):
        (folder / name).write_text("x")
    return "it holds README.md, notes.txt)"


MADE = [
    peft_adapter,
    half_a_pair,
    half_a_step,
    folders_below,
    other_files,
    weights_without_state,
    model_without_config,
    mlx_adapter,
]


@pytest.mark.parametrize("make", MADE)
def test_the_message_names_what_is_there(tmp_path, make):
    (tmp_path / "checkpoints").mkdir()
    named = make(tmp_path / "checkpoints")
    for said in (call(lister, tmp_path), call(script("inspect_checkpoint"), tmp_path)):
        assert said.code == 3
        assert named in said.err
        assert ("ENABLE_CHECKPOINTS" in said.err) == (make is other_files)


def test_the_list_shows_halves_and_gives_each_problem_its_kind(tmp_path):
    folder = tmp_path / "checkpoints"
    ckpt.save(record(1), folder)
    half_a_pair(folder)
    (folder / "broken.pt").write_bytes(ckpt.save(record(2), folder).read_bytes()[:900])
    torch.save({"model": {"features.0.weight": torch.ones(3, 3, 2, 2)}}, folder / "resnet.pt")
    torch.save({"model": bare(golden_nano())}, folder / "headless.pt")
    out = call(lister, tmp_path).out
    rows = [line.split(str(folder)) for line in out.splitlines() if line.startswith("?")]
    kinds = {Path(name).name: before.split()[-1] for before, name in rows}
    assert kinds["broken.pt"] == "damaged"
    (headless,) = [line for line in out.splitlines() if "headless.pt" in line]
    assert headless.split()[-2:] == ["lacks", "n_head"]
    assert "damaged" not in kinds["resnet.pt"]
    assert any(
        line.startswith("lacking: ") and "checkpoint-step001000-optimizer.pt" in line for line in out.splitlines()
    )
    assert any(line.startswith("not understood: ") for line in out.splitlines())


def test_the_list_names_folders_below_that_hold_more(tmp_path):
    folder = tmp_path / "checkpoints"
    ckpt.save(record(1), folder)
    ckpt.save(record(2), folder, layout="stepfiles")  # in the folder of its run, which belongs to the list
    assert "below" not in call(lister, tmp_path).out
    folders_below(folder)
    (line,) = [line for line in call(lister, tmp_path).out.splitlines() if "below" in line]
    assert line.endswith(f": {folder / 'dante'}, {folder / 'shakespeare'}")


def test_a_better_checkpoint_of_another_run_is_shown_beside_the_best(tmp_path):
    folder = tmp_path / "checkpoints"
    better = ckpt.save(record(1, run_id="old", validation_loss=1.0), folder)
    ckpt.save(record(2, run_id="new", validation_loss=3.0), folder)
    best = ckpt.save(record(3, run_id="new", validation_loss=2.0), folder)
    path, notes = ckpt.resolve("best", folder)
    assert path == best
    assert any(str(better) in note and "new" in note and "1.0000" in note for note in notes)
    lines = call(lister, tmp_path).out.splitlines()
    marks = {path: line.split(str(path))[1].strip() for path in (better, best) for line in lines if str(path) in line}
    assert marks == {better: "lowest loss", best: "latest, best"}
    os.remove(better)
    assert not any("lowest" in line for line in call(lister, tmp_path).out.splitlines())
    assert len(ckpt.resolve("best", folder)[1]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# A damaged file is damaged, however it is named.


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("how", ["empty", "half", "noise"])
def test_a_glob_that_matches_only_damage_says_damage(tmp_path, layout, how):
    path = ckpt.save(gpt2_record(), tmp_path, layout=layout)
    kinds = {}
    for file in all_files(path):
        data = file.read_bytes()
        file.write_bytes({"empty": b"", "half": data[: len(data) // 2], "noise": bytes(len(data))}[how])
        for name in (f"{path.parent}/*", str(path)):
            try:
                ckpt.load(ckpt.resolve(name, tmp_path)[0])
            except CheckpointError as error:
                kinds[file.name, name] = error.kind
        file.write_bytes(data)
    assert kinds
    assert not {"not found", "unspecified"} & set(kinds.values()), kinds


def test_half_of_a_pair_under_a_glob_lacks_its_other_half(tmp_path):
    path = ckpt.save(record(1), tmp_path, layout="separated")
    path.unlink()
    assert kind_of(f"{tmp_path}/*", tmp_path) in ("lacking", "damaged")
    assert known_layout(next(tmp_path.glob("*.pt"))).name == "separated"


def test_what_is_not_read_of_a_trainer_s_folder_is_named(tmp_path):
    path = transformers_folder(tmp_path / "checkpoint-5")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 5, "log_history": [{"step": 5, "loss": 1.0}]}))
    for name in ("optimizer.pt", "rng_state.pth"):
        torch.save({"state": {}}, path / name)
    asked = {"CHECKPOINT_PATH": path, "CONVERT_TO": "unified", "OUTPUT": tmp_path / "new"}
    said = call(converter, tmp_path, **asked)
    assert said.code == 3
    assert "optimizer.pt" in said.err.splitlines()[-1]
    assert "rng_state.pth" in said.err.splitlines()[-1]
    (found,) = ckpt.find(tmp_path / "new")
    assert found.metadata["imported"]["values"]["log_history"] == [{"step": 5, "loss": 1.0}]
    assert "config.json" in found.metadata["imported"]["values"]
    assert call(converter, tmp_path, **asked, CHECKPOINT_MODEL_ONLY="true").code == 0


def test_checkpoints_inside_a_checkpoint_are_named_and_converted_too(tmp_path):
    """Document 004: the new files and the old latest.pt lie in one folder."""
    folder = write_lecture_folder(tmp_path / "many" / "dante", golden_lecture(), {"token_kind": "char", "chars": CHARS})
    (folder / "optimizer.pt").unlink()
    torch.save(nanogpt(golden_nano()) | {"tokenizer": {"token_kind": "char", "chars": CHARS}}, folder / "latest.pt")
    path, notes = ckpt.resolve(str(folder), tmp_path)
    assert path == folder
    assert any("latest.pt" in note for note in notes)
    assert not any("model.pt" in note for note in notes)
    said = call(converter, tmp_path, CHECKPOINT_PATH=tmp_path / "many", CONVERT_TO="unified", OUTPUT=tmp_path / "new")
    assert said.code == 0, said.err
    assert {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*.pt")} == {
        "dante.pt", "dante/latest.pt",
    }  # fmt: skip
