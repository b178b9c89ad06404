"""What another program's checkpoint says of its training is used at a resume; what it lacks, the user names."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from drive import TINY, command
from foreign_programs import SIZES, LectureModel, NanoGPT, nanogpt, shaken, write_lecture_folder
from script import call, script

from milepost import ckpt
from milepost.ckpt import foreign
from milepost.ckpt.foreign.importing import rate_in_use, with_n_head
from milepost.ckpt.restore import build_model
from milepost.runtime.schedule import Schedule, lr_at

ELEVEN = list("\n abcdefghi")
IDS = torch.arange(12).reshape(2, 6) % 11
RATE = 2.5e-4
PLAIN = dict.fromkeys([*TINY, "TRAINING_DATA_SOURCE"]) | {"DEVICE": "cpu", "EVAL_STEPS": "1", "SAMPLE_INTERVAL": "0"}


def stepped(model: Any, optimizer: torch.optim.Optimizer, *, rate: float = RATE) -> torch.optim.Optimizer:
    for _ in range(2):
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


def nano() -> NanoGPT:
    torch.manual_seed(1)
    return shaken(NanoGPT(**SIZES))


def write(folder: Path, **changes: Any) -> Path:
    """nanoGPT's ckpt.pt with its characters and a rate of RATE, and a text of these characters beside it."""
    model = nano()
    content = nanogpt(model, stepped(model, model.configure_optimizers())) | {"chars": ELEVEN}
    content["config"] |= {"batch_size": 2, "beta1": 0.9, "beta2": 0.95, "grad_clip": 0.5}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content | changes, folder / "ckpt.pt")
    (folder / "text.txt").write_text("".join(ELEVEN) * 60)
    return folder / "ckpt.pt"


# ---------------------------------------------------------------------------------------------------------------------
# Rates


def test_the_settings_of_groups_and_config_are_taken(tmp_path: Path) -> None:
    settings = ckpt.load(write(tmp_path)).hyperparameters
    assert settings == {
        "BATCH_SIZE": 2, "LEARNING_RATE": 6e-4, "WEIGHT_DECAY": 0.1, "BETA1": 0.9, "BETA2": 0.95, "GRAD_CLIP": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), "fast", None, [1], True, 2**80])
def test_values_that_are_no_rates_are_left_out(bad: Any) -> None:
    content = {
        "model": nano().state_dict(),
        "n_head": 3,
        "config": {"learning_rate": bad, "batch_size": bad, "beta1": bad},
    }
    found = foreign.understood(content, where="f").hyperparameters
    assert found.keys() <= ({"LEARNING_RATE"} if bad == 2**80 else {"BETA1"})


@pytest.mark.parametrize("place", ["top", "config", "hyper_parameters", "scheduler", "upper case"])
def test_a_rate_is_found_in_every_place(place: str) -> None:
    places: dict[str, dict[str, Any]] = {
        "top": {"lr": RATE},
        "config": {"config": {"learning_rate": RATE}},
        "hyper_parameters": {"hyper_parameters": {"lr": RATE}},
        "scheduler": {"lr_schedulers": [{"_last_lr": [RATE], "last_epoch": 3}]},
        "upper case": {"hyperparameters": {"LEARNING_RATE": RATE}},
    }
    content = {"model": nano().state_dict(), "n_head": 3} | places[place]
    assert foreign.understood(content, where="f").hyperparameters["LEARNING_RATE"] == RATE


COSINE = {
    "learning_rate": 6e-4,
    "min_lr": 6e-5,
    "warmup_iters": 100,
    "lr_decay_iters": 5000,
    "decay_lr": True,
    "max_iters": 5000,
}


def nanogpts_rate(it: int) -> float:
    """get_lr of nanoGPT's train.py."""
    if it < COSINE["warmup_iters"]:
        return COSINE["learning_rate"] * (it + 1) / (COSINE["warmup_iters"] + 1)
    ratio = (it - COSINE["warmup_iters"]) / (COSINE["lr_decay_iters"] - COSINE["warmup_iters"])
    return COSINE["min_lr"] + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (COSINE["learning_rate"] - COSINE["min_lr"])


@pytest.mark.parametrize("step", [0, 50, 99, 100, 2500, 4999])
def test_nanogpts_schedule_goes_on_where_its_rate_is_that_of_the_schedule(step: int) -> None:
    model = nano()
    content = nanogpt(model, stepped(model, model.configure_optimizers(), rate=nanogpts_rate(step)), step=step)
    content["config"] |= COSINE
    found = foreign.understood(content, where="f")
    schedule = Schedule(**found.schedule)
    assert [lr_at(at, schedule) for at in range(step, 5000, 7)] == pytest.approx(
        [nanogpts_rate(at) for at in range(step, 5000, 7)]
    )
    assert found.hyperparameters["TRAINING_STEPS"] == 5000
    content["optimizer"]["param_groups"][0]["lr"] = 1e-7  # negative control: not the schedule's
    assert foreign.understood(content, where="f").schedule == {}


@pytest.mark.parametrize("place", ["config", "group", "scheduler", "nowhere"])
def test_the_peak_and_the_rate_in_use_are_told_apart(place: str, tmp_path: Path) -> None:
    """A decayed rate is not the peak of a schedule."""
    model = nano()
    content = nanogpt(model, stepped(model, model.configure_optimizers()))
    content["config"] = {"learning_rate": 6e-4} if place == "config" else {}
    if place == "group":
        content["optimizer"]["param_groups"][0]["initial_lr"] = 6e-4
    if place == "scheduler":
        content["lr_scheduler"] = {"base_lrs": [6e-4, 6e-4], "_last_lr": [RATE, RATE]}
    found = foreign.understood(content, where="f")
    peak = RATE if place == "nowhere" else 6e-4
    assert (found.hyperparameters["LEARNING_RATE"], found.rate) == (peak, RATE)
    torch.save(content | {"chars": ELEVEN}, tmp_path / "ckpt.pt")
    kept = ckpt.load(ckpt.convert(tmp_path / "ckpt.pt", tmp_path / "new", layout="directory").target)
    assert (kept.hyperparameters["LEARNING_RATE"], rate_in_use(kept)) == (peak, RATE)


def resumed(folder: Path, path: Path, **changes: str) -> tuple[int, str, str]:
    asked = {
        "CHECKPOINT_PATH": str(path),
        "MODE": "resume",
        "RESUME_TRAINING_STEPS": "2",
        "CHECKPOINT_DIR": str(folder / "new"),
    }
    text = {"TRAINING_DATA_SOURCE": str(folder / "text.txt"), "RUNS_DIR": str(folder / "runs")}
    done = command("scripts/load_checkpoint.py", folder, **PLAIN | asked | text | changes)
    return done.returncode, done.stdout, done.stderr


def row(table: str, name: str) -> str:
    return next(line for line in table.splitlines() if line.startswith(name))


def test_keep_holds_the_rate_of_the_file(tmp_path: Path) -> None:
    code, out, err = resumed(tmp_path, write(tmp_path), RESUME_LEARNING_RATE="keep")
    assert code == 0, err
    assert "constant, peak 0.00025, floor 0.00025" in row(out, "learning rate")
    count = len(list(nano().parameters()))
    assert f"moments of {count} of {count} parameters" in row(out, "optimizer")
    last = ckpt.latest(ckpt.find(tmp_path / "new"))
    assert last is not None
    record = ckpt.load(last.path)
    assert (record.schedule["kind"], record.schedule["peak"]) == ("constant", RATE)
    assert record.hyperparameters["BATCH_SIZE"] == 2


def test_the_rate_of_another_optimizer_is_not_adamws() -> None:
    model = nano()
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    content = nanogpt(model, momentum, step=5)
    content["config"] |= {"learning_rate": 0.1}
    found = foreign.understood(content, where="f")
    assert found.optimizer_state is None
    assert not {"LEARNING_RATE", "WEIGHT_DECAY"} & found.hyperparameters.keys()


def test_a_resume_asks_for_the_text_instead_of_taking_the_bundled_one(tmp_path: Path) -> None:
    asked = {"CHECKPOINT_PATH": str(write(tmp_path)), "MODE": "resume", "CHECKPOINT_DIR": str(tmp_path / "new")}
    done = command("scripts/load_checkpoint.py", tmp_path, **PLAIN | asked | {"TRAINING_DATA_SOURCE": None})
    assert done.returncode == 2, done.stderr
    assert "set TRAINING_DATA_SOURCE" in done.stderr
    assert not (tmp_path / "new").exists()


def test_keep_without_a_rate_asks_for_one(tmp_path: Path) -> None:
    path = write(tmp_path, optimizer=None, config={})
    code, _, err = resumed(tmp_path, path, RESUME_LEARNING_RATE="keep")
    assert code == 2
    assert "set RESUME_LEARNING_RATE to a number" in err
    assert resumed(tmp_path, path, RESUME_LEARNING_RATE="1e-4", RESUME_TRAINING_STEPS="0")[0] == 0  # the remedy


# ---------------------------------------------------------------------------------------------------------------------
# RESUME of training.py


def train(folder: Path, **changes: str | None) -> tuple[int, str]:
    places = {"RUNS_DIR": str(folder / "runs"), "TRAINING_STEPS": "252", "ENABLE_CHECKPOINTS": "true"}
    done = command("training.py", folder, **PLAIN | places | changes)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("resume", ["latest", "auto", "path"])
def test_a_resume_on_a_text_that_the_user_names_is_a_child(resume: str, tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints" / "out")
    named = {"RESUME": str(path) if resume == "path" else resume, "CHECKPOINT_DIR": str(path.parent)}
    code, said = train(tmp_path, **named)
    assert code == 2, said
    assert "set TRAINING_DATA_SOURCE" in said
    code, said = train(tmp_path, **named, TRAINING_DATA_SOURCE=str(path.parent / "text.txt"))
    assert code == 0, said
    assert "not bit-exact" in said
    last = ckpt.latest(ckpt.find(path.parent))
    assert last is not None
    record = ckpt.load(last.path, verify=True)
    assert (record.step, record.parent["file"], record.parent["run_id"]) == (252, "ckpt.pt", None)
    assert {kinds["step"].item() for kinds in record.optimizer_state["state"].values()} == {4.0}  # two and two


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "constant, peak 0.00025, floor 0.00025"),  # the decayed rate, held
        ({"MIN_LEARNING_RATE": "1e-5"}, "cosine, peak 0.0006, floor 1e-05"),  # a new plan, from the peak of the file
        ({"LEARNING_RATE": "1e-3"}, "cosine, peak 0.001, floor 0.0001"),
    ],
)
def test_a_decayed_rate_is_held_and_not_decayed_again(asked: dict[str, str], expected: str, tmp_path: Path) -> None:
    """A file of nanoGPT without lr_decay_iters, so that its schedule is not known."""
    path = write(tmp_path)
    named = {"CHECKPOINT_DIR": str(tmp_path), "TRAINING_DATA_SOURCE": str(tmp_path / "text.txt")}
    code, said = train(tmp_path, RESUME=str(path), **named | asked)
    assert code == 0, said
    assert expected in row(said, "learning rate")


@pytest.mark.parametrize("name", ["latest.pt", "final.pt", "ckpt.pt"])
def test_the_newest_file_of_a_model_is_found_under_the_parent_folder(name: str, tmp_path: Path) -> None:
    """Document 004's `checkpoints/dante/latest.pt`."""
    path = write(tmp_path / "checkpoints" / "dante")
    path = path.rename(path.with_name(name))
    (found,) = ckpt.find(tmp_path / "checkpoints")
    assert (found.path, found.problem, found.step) == (path, None, 250)
    path.rename(path.with_name("other.pt"))  # negative control: any folder may lie beside checkpoints
    assert ckpt.find(tmp_path / "checkpoints") == []


def test_the_folder_of_document_004_keeps_optimizer_and_batch_size(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = shaken(LectureModel(**SIZES))
    path = write_lecture_folder(tmp_path / "dante", model, {"token_kind": "char", "chars": ELEVEN})
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    torch.save(model.state_dict(), path / "model.pt")
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    record = ckpt.load(path)
    assert record.parts == ["model", "optimizer"]
    assert (record.hyperparameters["BATCH_SIZE"], record.hyperparameters["LEARNING_RATE"]) == (32, RATE)
    (tmp_path / "text.txt").write_text("".join(ELEVEN) * 60)
    code, out, err = resumed(tmp_path, path, RESUME_LEARNING_RATE="keep")
    assert code == 0, err
    assert row(out, "optimizer").split()[1] == "restored"
    last = ckpt.latest(ckpt.find(tmp_path / "new"))
    assert last is not None
    assert ckpt.load(last.path).hyperparameters["BATCH_SIZE"] == 32


# ---------------------------------------------------------------------------------------------------------------------
# What the file lacks


def without_heads(folder: Path) -> tuple[Path, NanoGPT]:
    """A file of nanoGPT's weights with their characters, which records nothing else; and its model."""
    path, model = folder / "weights.pt", nano()
    torch.save({"model": model.state_dict(), "chars": ELEVEN}, path)
    (folder / "text.txt").write_text("".join(ELEVEN) * 60)
    return path, model


def test_n_head_from_the_settings_opens_what_lacks_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"model": nano().state_dict(), "chars": ELEVEN}, path)
    asked = {"CHECKPOINT_PATH": str(path), "PROMPT": "abc", "MAX_NEW_TOKENS": "5", "SAMPLE_SEED": "1"}
    done = command("scripts/load_checkpoint.py", tmp_path, **PLAIN | asked)
    assert done.returncode == 3
    assert "set N_HEAD" in done.stderr
    done = command("scripts/load_checkpoint.py", tmp_path, **PLAIN | asked | {"N_HEAD": "3"})
    assert done.returncode == 0, done.stderr
    assert "3 is used, as set" in done.stderr
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 2}))  # what the file says counts
    done = command("scripts/inspect_checkpoint.py", tmp_path, **PLAIN | asked | {"N_HEAD": "3"})
    assert [line.split() for line in done.stdout.splitlines() if line.startswith("n_head")] == [["n_head:", "2"]]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("load_checkpoint", {"PROMPT": "abc", "MAX_NEW_TOKENS": "5"}),
        ("compare_samples", {"PROMPT": "abc", "MAX_NEW_TOKENS": "5"}),
        ("evaluate_checkpoint", {"EVAL_DATA": "text.txt"}),
        ("verify_checkpoint", {}),
        ("convert_checkpoint", {"OUTPUT": "new"}),
        ("convert_checkpoint", {"OUTPUT": "new", "CONVERT_TO": "nanogpt"}),
    ],
)
def test_whatever_builds_the_model_asks_for_n_head_and_takes_it(
    name: str, asked: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = without_heads(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = call(script(name), tmp_path, CHECKPOINT_PATH=str(path), **asked)
    assert done.code == 3
    assert "has no n_head" in done.err + done.out
    assert "set N_HEAD" in done.err + done.out
    assert not list(tmp_path.glob("new/*"))
    done = call(script(name), tmp_path, CHECKPOINT_PATH=str(path), N_HEAD="5", **asked)
    assert done.code == 3
    assert "does not divide n_embd=12" in done.err + done.out
    done = call(script(name), tmp_path, CHECKPOINT_PATH=str(path), N_HEAD="3", **asked)
    assert done.code == 0, done.err
    if "OUTPUT" in asked and "CONVERT_TO" not in asked:
        (converted,) = tmp_path.glob("new/*.pt")
        assert ckpt.load(converted).model_settings["n_head"] == 3


def test_a_file_without_heads_is_shown_as_that(tmp_path: Path) -> None:
    path, _ = without_heads(tmp_path)
    done = call(script("inspect_checkpoint"), tmp_path, CHECKPOINT_PATH=str(path))
    assert done.code == 0, done.err
    assert "not recorded; set N_HEAD" in row(done.out, "n_head")
    done = call(script("list_checkpoints"), tmp_path, CHECKPOINT_DIR=str(tmp_path))
    assert done.code == 0, done.err
    assert "lacks n_head" in done.out


def test_the_number_of_heads_of_one_call_is_not_that_of_the_next(tmp_path: Path) -> None:
    path, model = without_heads(tmp_path)
    record = ckpt.load(path)
    with pytest.raises(ckpt.CheckpointError) as caught:
        build_model(record, device=torch.device("cpu"))
    assert (caught.value.kind, caught.value.path) == ("lacking", path)
    with pytest.raises(ckpt.CheckpointError) as caught:
        ckpt.save(record, tmp_path / "saved")
    assert caught.value.kind == "lacking"
    logits = build_model(with_n_head(record, 3), device=torch.device("cpu")).eval()(IDS).logits
    assert torch.allclose(logits, model(IDS), atol=1e-5)
    assert "n_head" not in ckpt.load(path).model_settings


def test_adapters_know_the_heads_of_a_base_that_records_none(tmp_path: Path) -> None:
    """They were named when the adapters were trained, and stand in the adapters' own settings."""
    path, _ = without_heads(tmp_path)
    (tmp_path / "text.txt").write_text("".join(ELEVEN) * 60)
    asked = {
        "INIT_FROM": str(path), "TRAINING_DATA_SOURCE": str(tmp_path / "text.txt"), "ENABLE_CHECKPOINTS": "true", "DEVICE": "cpu",
        "CHECKPOINT_ADAPTERS_ONLY": "true", "LORA_RANK": "2", "TRAINING_STEPS": "2", "CHECKPOINT_DIR": str(tmp_path / "new"), "MODEL_TYPE": "gpt2",
    }  # fmt: skip
    done = command("training.py", tmp_path, **PLAIN | asked)
    assert done.returncode == 3
    assert "set N_HEAD" in done.stderr
    done = command("training.py", tmp_path, **PLAIN | asked | {"N_HEAD": "3"})
    assert done.returncode == 0, done.stderr
    (adapters,) = (tmp_path / "new").glob("*.pt")
    done = call(script("load_checkpoint"), tmp_path, CHECKPOINT_PATH=str(adapters), PROMPT="abc", MAX_NEW_TOKENS="5")
    assert done.code == 0, done.err


@pytest.mark.parametrize("layers", [12, 24])
def test_the_heads_of_the_published_gpt2_are_known_by_its_shapes(layers: int) -> None:
    width, heads = {12: (768, 12), 24: (1024, 16)}[layers]
    with torch.device("meta"):
        import models

        shape = {"vocab_size": 50257, "block_size": 1024, "n_layer": layers, "n_embd": width, "n_head": heads}
        state = models.build("gpt2", shape).state_dict()
    assert foreign.weights._n_head({}, shape, "f")[0] == heads
    assert state


@pytest.mark.parametrize("key", ["model_state", "weights", "net", "gpt", "my_model"])
@pytest.mark.parametrize(
    "prefix", ["", "net.", "gpt.", "model.", "a.b.", "_orig_mod.", "_forward_module.model.", "module.net."]
)
def test_weights_under_any_key_and_prefix(prefix: str, key: str, tmp_path: Path) -> None:
    model = nano()
    content = {
        key: {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "n_head": 3,
        "iter": 8,
        "batch_size": 4,
    }
    torch.save(content, tmp_path / "a.pt")
    record = ckpt.load(tmp_path / "a.pt")
    with torch.no_grad():
        found = build_model(record, device=torch.device("cpu")).eval()(IDS).logits
        torch.testing.assert_close(found, model(IDS), atol=1e-5, rtol=0)
    assert (record.step, record.hyperparameters["BATCH_SIZE"]) == (8, 4)


def test_a_pointer_of_git_lfs_is_called_what_it_is(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 548105171\n"
    path = tmp_path / "ckpt.pt"
    torch.save({"model": nano().state_dict()}, path)
    for name in ("config.json", "weights.safetensors", "ckpt.pt"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(ckpt.CheckpointError) as caught:
            ckpt.load(path if name == "config.json" else tmp_path / name)
        assert "git lfs pull" in str(caught.value)
        assert caught.value.kind in ("lacking", "not understood")
        (tmp_path / "config.json").unlink(missing_ok=True)
