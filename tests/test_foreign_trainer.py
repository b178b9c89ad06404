"""A folder of transformers' Trainer: its optimizer by name, its schedule and settings, and what cannot be used of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from records import snapshot
from script import call, script
from test_foreign_matrix import decayed, of_transformers_trainer, stepped, theirs

from milepost import ckpt
from milepost.ckpt import CheckpointError
from milepost.ckpt.foreign.importing import rate_in_use
from milepost.runtime.schedule import Schedule, lr_at

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out), the transpose of ours


def by_name(record: ckpt.Checkpoint) -> dict[str, dict[str, Any]]:
    state = record.optimizer_state
    assert state is not None
    pairs = [
        pair for group in state["param_groups"] for pair in zip(group["params"], group["param_names"], strict=True)
    ]
    return {name: state["state"][number] for number, name in pairs}


def assert_moments_by_name(record: ckpt.Checkpoint, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Each moment is that of the parameter of the same name in transformers' own model."""
    ours = by_name(record)
    expected = {name.removeprefix("transformer."): parameter for name, parameter in model.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, parameter in expected.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[parameter][kind]
            assert torch.equal(ours[name][kind], moment.t() if name.endswith(CONV1D) else moment), name
        assert float(ours[name]["step"]) == float(optimizer.state[parameter]["step"])


def saved(folder: Path, *, safe: bool = True, **changes: Any) -> tuple[Path, Any, torch.optim.Optimizer]:
    """A folder as the Trainer leaves it, its model and its optimizer; `changes` replace files by their stem."""
    model, path = theirs(), folder / "checkpoint-500"
    optimizer = stepped(lambda ids: model(ids).logits, torch.optim.AdamW(decayed(model), lr=1e-3))
    model.save_pretrained(path)
    if not safe:
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 500, "max_steps": 900, "train_batch_size": 2}))
    torch.save(changes.get("optimizer", optimizer.state_dict()), path / "optimizer.pt")
    return path, model, optimizer


@pytest.mark.parametrize("safe", [True, False])
def test_the_moments_are_those_of_transformers_own_model_by_name(tmp_path: Path, safe: bool) -> None:
    path, model, optimizer = saved(tmp_path, safe=safe)
    record = ckpt.load(path, verify=True)
    assert_moments_by_name(record, model, optimizer)
    groups = record.optimizer_state["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    with torch.no_grad():
        optimizer.state[next(model.transformer.h[0].ln_1.parameters())]["exp_avg"].add_(1)
    with pytest.raises(AssertionError):  # negative control
        assert_moments_by_name(record, model, optimizer)


def test_one_step_with_the_restored_moments_is_theirs(tmp_path: Path) -> None:
    """The next update from the same gradients gives the same weights."""
    from milepost.ckpt.restore import build_model, restore_optimizer
    from milepost.runtime.optim import build_optimizer

    path, model, optimizer = saved(tmp_path)
    record = ckpt.load(path)
    mine = build_model(record, device=torch.device("cpu")).eval()
    own = build_optimizer(mine, kind="adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999))
    assert not restore_optimizer(own, record, kind="adamw").missing
    ids = torch.arange(18).reshape(3, 6) % 11
    for network, updates in ((model, optimizer), (mine, own)):
        network(ids).logits.square().mean().backward()
        updates.step()
    with torch.no_grad():
        torch.testing.assert_close(mine(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


@dataclasses.dataclass
class TrainingArguments:
    """As transformers'."""

    learning_rate: float = 2e-3
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 100
    adam_beta1: float = 0.8
    max_grad_norm: float = 0.5
    gradient_accumulation_steps: int = 3
    hub_token: str = "secret"


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial"])
def test_settings_and_schedule_are_the_trainers(tmp_path: Path, kind: str) -> None:
    path, _, optimizer = saved(tmp_path)
    torch.save(TrainingArguments(lr_scheduler_type=kind), path / "training_args.bin")
    rate = 1e-3  # half of the way of 800 steps after 100 warm-up steps, and half of the peak
    torch.save({"base_lrs": [2e-3, 2e-3], "_last_lr": [rate, rate]}, path / "scheduler.pt")
    record = ckpt.load(path)
    own = {
        name: record.hyperparameters[name] for name in ("BATCH_SIZE", "LEARNING_RATE", "TRAINING_STEPS", "GRAD_CLIP")
    }
    assert own == {"BATCH_SIZE": 2, "LEARNING_RATE": 2e-3, "TRAINING_STEPS": 900, "GRAD_CLIP": 0.5}
    assert record.hyperparameters["GRADIENT_ACCUMULATION_STEPS"] == 3
    assert rate_in_use(record) == rate
    assert bool(record.schedule) is (kind != "polynomial")
    if record.schedule:
        schedule = Schedule(**record.schedule)
        assert (schedule.kind, schedule.floor, lr_at(500, schedule)) == (kind, 0.0, pytest.approx(rate))
    optimizer.param_groups[0]["lr"] = 1.1e-3  # control: not the rate of that schedule
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    assert ckpt.load(path).schedule == {}
    new = ckpt.convert(path, tmp_path / "new", layout="unified").target
    assert b"secret" not in new.read_bytes()


SGD = {"state": {0: {"momentum_buffer": torch.zeros(11, 12)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


@pytest.mark.parametrize("content", [{"state": {}}, SGD, {"loss": 1.0}])
def test_what_cannot_be_used_is_named_with_its_reason(tmp_path: Path, content: Any) -> None:
    path, _, _ = saved(tmp_path, optimizer=content)
    record = ckpt.load(path, verify=True)
    assert record.optimizer_state is None
    assert record.parts == ["model"]
    assert any("optimizer" in note and "cannot be used: " in note for note in record.notes)
    assert any(part.startswith("optimizer.pt") for part in record.left_out)
    said = call(script("inspect_checkpoint"), tmp_path, CHECKPOINT_PATH=path)
    assert said.code == 0
    assert "cannot be used: " in said.out + said.err


@pytest.mark.parametrize("how", ["flipped", "half"])
def test_a_damaged_optimizer_file_keeps_nobody_from_generating(tmp_path: Path, how: str) -> None:
    path = of_transformers_trainer(tmp_path).path
    data = bytearray((path / "optimizer.pt").read_bytes())
    data[data.find(b"data/3") + 200] ^= 1
    (path / "optimizer.pt").write_bytes(data if how == "flipped" else data[: len(data) // 2])
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        ckpt.load(path, verify=True)
    assert (caught.value.kind, caught.value.path) == ("damaged", path / "optimizer.pt")
    assert [found.problem for found in ckpt.find(tmp_path)] == [None]
    asked = {"CHECKPOINT_PATH": path, "PROMPT": "abc", "MAX_NEW_TOKENS": "3", "SAMPLE_SEED": "1"}
    said = call(script("load_checkpoint"), tmp_path, **asked)
    assert said.code == 0, said.err
    done = ckpt.convert(path, tmp_path / "new", layout="unified", model_only=True)
    assert not done.left_out
    assert {name: found for name, found in snapshot(tmp_path).items() if name in before} == before


@pytest.mark.exchange
def test_a_folder_that_transformers_trainer_wrote(tmp_path: Path) -> None:
    """The Trainer itself, which needs accelerate."""
    from transformers import Trainer, TrainingArguments

    model = theirs()
    ids = torch.arange(6) % 11
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=6, save_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, warmup_steps=2, learning_rate=3e-3,
        weight_decay=0.1,
    )  # fmt: skip
    data = [{"input_ids": ids.roll(shift), "labels": ids.roll(shift)} for shift in range(16)]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    last = ckpt.load(tmp_path / "out" / "checkpoint-6")
    assert_moments_by_name(last, trainer.model, trainer.optimizer.optimizer)
    record = ckpt.load(tmp_path / "out" / "checkpoint-4")
    assert (record.schedule["kind"], lr_at(4, Schedule(**record.schedule))) == ("linear", pytest.approx(1.5e-3))
