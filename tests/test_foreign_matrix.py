"""Every program's files through every script, with its own model's logits and moments; and the table of it in the docs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from drive import ROOT
from foreign_programs import (
    SIZES,
    LectureModel,
    NanoGPT,
    bare,
    lightning,
    meta,
    nanogpt,
    shaken,
    write_lecture_folder,
    write_pair,
    write_step,
)
from records import snapshot
from script import call, script
from torch import Tensor, nn

from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.ckpt.restore import build_model
from milepost.run import text as run_text

ELEVEN = list("\n abcdefghi")
TOKENS = {"token_kind": "char", "chars": ELEVEN}
IDS = torch.arange(18).reshape(3, 6) % 11
VERBS = ("inspect", "list", "generate", "evaluate", "resume", "convert", "prune")


class Made(NamedTuple):
    """What a program saved: what is opened, its model, and its optimizer or None."""

    path: Path
    model: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer | None = None


def nano() -> NanoGPT:
    torch.manual_seed(1)
    return shaken(NanoGPT(**SIZES))


def lecture() -> LectureModel:
    torch.manual_seed(2)
    return shaken(LectureModel(**SIZES))


def stepped(model: Any, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for _ in range(2):
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return stepped(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def tanh_gelus(model: NanoGPT, *, tied: bool) -> NanoGPT:
    """The GPT of minGPT and llm.c, which compute the tanh form of GELU; minGPT's head is its own."""
    for block in model.transformer.h:
        block.mlp.gelu = nn.GELU(approximate="tanh")
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def masked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = torch.ones(1, 1, 6, 6).tril()
    return state | {f"transformer.h.{n}.attn.bias": mask for n in range(2)}


# ---------------------------------------------------------------------------------------------------------------------
# The programs.


def of_nanogpt(folder: Path) -> Made:
    model = nano()
    optimizer = stepped(model, model.configure_optimizers())
    path = write(folder / "ckpt.pt", nanogpt(model, optimizer))
    (folder / "meta.pkl").write_bytes(meta(ELEVEN))
    return Made(path, model, optimizer)


def of_mingpt(folder: Path) -> Made:
    folder = folder / "out"
    model = tanh_gelus(nano(), tied=False)
    write(folder / "model.pt", masked(dict(model.state_dict())))
    (folder / "config.json").write_text(
        json.dumps({"system": {"seed": 1}, "model": SIZES, "trainer": {"learning_rate": 5e-4}})
    )
    (folder / "meta.pkl").write_bytes(meta(ELEVEN))
    return Made(folder, model)


class Bigram(nn.Module):
    """The lecture's bigram model."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding_table = nn.Embedding(11, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding_table(ids)


def of_lectures_bigram(folder: Path) -> Made:
    model = shaken(Bigram())
    optimizer = adamw(model)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "itos": dict(enumerate(ELEVEN)),
        "block_size": 6,
    }
    return Made(write(folder / "bigram.pt", content), model, optimizer)


def of_lectures_gpt(folder: Path) -> Made:
    model = lecture()
    optimizer = adamw(model)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 30, "chars": ELEVEN}
    return Made(write(folder / "gpt.pt", content), model, optimizer)


def of_printed_001(folder: Path) -> Made:
    """Its seven keys; the characters are not among them, so the text is named."""
    model = lecture()
    optimizer = adamw(model)
    content = {
        "model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "hyperparameters": {"n_head": 3, "learning_rate": 1e-3},
        "vocab_size": 11, "block_size": 6, "batch_size": 4, "step": 500,
    }  # fmt: skip
    return Made(write(folder / "checkpoint_bigram_carolyn_hax_step0500_11102025_231500.pt", content), model, optimizer)


def of_printed_002(folder: Path) -> Made:
    model = nano()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    content = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict(),
        "global_step": 1000, "epoch": 5, "config": SIZES | {"chars": ELEVEN},
    }  # fmt: skip
    return Made(write(folder / "checkpoint-step001000.pt", content), model, optimizer)


def of_printed_002_separated(folder: Path) -> Made:
    model = nano()
    optimizer = adamw(model)
    halves = (
        {
            "model_state_dict": model.state_dict(),
            "global_step": torch.tensor(1000),
            "config": SIZES | {"chars": ELEVEN},
        },
        {
            "optimizer_states": [optimizer.state_dict()],
            "lr_scheduler_states": [{"last_epoch": 9}],
            "global_step": 1000,
            "epoch": 5,
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    return Made(write_pair(folder, halves), model, optimizer)


def of_printed_004(folder: Path) -> Made:
    model = lecture()
    optimizer = adamw(model)
    path = write_lecture_folder(folder / "dante", model, TOKENS)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    return Made(path, model, optimizer)


@dataclasses.dataclass
class GPTConfig:
    """As nanoGPT's."""

    block_size: int = 6
    vocab_size: int = 11
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 12


def of_printed_004_legacy(folder: Path) -> Made:
    """One file that bundles everything, the config as an object."""
    model = lecture()
    optimizer = adamw(model)
    content = {
        "model_state": model.state_dict(), "optim_state": optimizer.state_dict(), "config": GPTConfig(), "step": 1000,
        "token_kind": "char", "chars": ELEVEN,
    }  # fmt: skip
    return Made(write(folder / "latest.pt", content), model, optimizer)


def of_lightning(name: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        model = nano()
        optimizer = adamw(model)
        content = lightning(model, {"lr": 1e-3, "config": GPTConfig(), "chars": ELEVEN})
        content["state_dict"] = {f"{name}.{key}": tensor for key, tensor in model.state_dict().items()}
        content["optimizer_states"] = [optimizer.state_dict()]
        return Made(write(folder / "last.ckpt", content), model, optimizer)

    return make


def theirs() -> Any:
    """A GPT-2 of transformers with dropout off."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=11, n_positions=6, n_embd=12, n_layer=2, n_head=3, bos_token_id=None, eos_token_id=None
    )
    return shaken(GPT2LMHeadModel(config))


def of_transformers_state(folder: Path) -> Made:
    model = theirs()
    optimizer = stepped(lambda ids: model(ids).logits, torch.optim.AdamW(model.parameters()))
    content = {
        "model_state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": {"n_head": 3},
        "chars": ELEVEN,
    }
    return Made(write(folder / "gpt2.pt", content), lambda ids: model(ids).logits, optimizer)


def decayed(model: Any) -> list[dict[str, Any]]:
    """The groups of transformers' Trainer: no decay of biases and LayerNorms."""
    parameters = dict(model.named_parameters())
    free = {name for name in parameters if name.endswith("bias") or ".ln_" in name}
    return [
        {"params": [one for name, one in parameters.items() if name not in free], "weight_decay": 0.1},
        {"params": [one for name, one in parameters.items() if name in free], "weight_decay": 0.0},
    ]


def of_transformers_trainer(folder: Path) -> Made:
    model = theirs()
    path = folder / "checkpoint-500"
    optimizer = stepped(lambda ids: model(ids).logits, torch.optim.AdamW(decayed(model), lr=1e-3))
    model.save_pretrained(path)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    torch.save({"base_lrs": [2e-3, 2e-3], "last_epoch": 500, "_last_lr": [1e-3, 1e-3]}, path / "scheduler.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 500, "epoch": 1.5}))
    (path / "meta.pkl").write_bytes(meta(ELEVEN))
    return Made(path, lambda ids: model(ids).logits, optimizer)


def of_llm_c(folder: Path) -> Made:
    folder = folder / "out"
    model = tanh_gelus(nano(), tied=True)
    write(folder / "model.pt", masked(dict(model.state_dict())))
    (folder / "config.json").write_text(json.dumps({"n_head": 3, "activation": "gelu_new"}))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENS))
    return Made(folder, model)


def of_mlx(folder: Path) -> Made:
    model = nano()
    path = write_step(folder, bare(model), val_loss=2.5)
    (folder / "config.json").write_text(json.dumps(SIZES | {"activation": "gelu_erf"}))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENS))
    return Made(path, model)


PROGRAMS: dict[str, Callable[[Path], Made]] = {
    "nanoGPT": of_nanogpt,
    "minGPT": of_mingpt,
    "the lecture's bigram": of_lectures_bigram,
    "the lecture's GPT": of_lectures_gpt,
    "one file with seven keys": of_printed_001,
    "one file with `model`, `optimizer`, `lr_scheduler`": of_printed_002,
    "`-model.pt` and `-optimizer.pt`": of_printed_002_separated,
    "a folder of five files": of_printed_004,
    "`latest.pt` with its config as an object": of_printed_004_legacy,
    "Lightning, module `model`": of_lightning("model"),
    "Lightning, module `net`": of_lightning("net"),
    "Lightning, module `gpt`": of_lightning("gpt"),
    "a state dict of transformers' GPT-2": of_transformers_state,
    "`checkpoint-500/` of transformers' Trainer": of_transformers_trainer,
    "a state dict of llm.c": of_llm_c,
    "MLX": of_mlx,
}
# The programs whose files hold no optimizer state that is read.
WEIGHTS_ONLY = {"minGPT", "a state dict of llm.c", "MLX"}


# ---------------------------------------------------------------------------------------------------------------------
# What must be equal.


def assert_computes(record: Checkpoint, made: Made) -> None:
    with torch.no_grad():
        expected = made.model(IDS)
        found = build_model(record, device=torch.device("cpu")).eval()(IDS).logits
    assert expected.std() > 0.1  # large enough for the tolerance to mean something
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def values_of(states: list[dict[str, Any]], kind: str) -> Tensor:
    """All numbers of a kind of moment in order of size, without zeros: those of parameters that only our model has."""
    flat = torch.cat([state[kind].reshape(-1) for state in states])
    return flat[flat != 0].sort().values


def assert_moments(record: Checkpoint, made: Made) -> None:
    """All moments are there, whatever was joined or transposed; tests/test_foreign.py compares them by name."""
    if made.optimizer is None:
        assert record.optimizer_state is None
        return
    assert record.optimizer_state is not None
    for kind in ("exp_avg", "exp_avg_sq"):
        ours = values_of(list(record.optimizer_state["state"].values()), kind)
        assert torch.equal(ours, values_of(list(made.optimizer.state.values()), kind))


@pytest.fixture
def _cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_text, "CACHE_FOLDER", tmp_path / "cache")


@pytest.mark.usefixtures("_cached")
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_script_takes_its_files(program: str, tmp_path: Path) -> None:
    made = PROGRAMS[program](tmp_path / "theirs")
    folder, before = made.path.parent, snapshot(tmp_path / "theirs")
    text = tmp_path / "text.txt"
    text.write_text("".join(ELEVEN) * 60)
    record = ckpt.load(made.path, verify=True)
    assert_computes(record, made)
    assert_moments(record, made)
    named = {"CHECKPOINT_PATH": made.path, "TRAINING_DATA_SOURCE": text, "RUNS_DIR": tmp_path / "runs"}

    said = call(script("inspect_checkpoint"), tmp_path, **named)
    assert said.code == 0, said.err
    assert ("can resume training" in said.out) is (program not in WEIGHTS_ONLY)
    said = call(script("list_checkpoints"), tmp_path, CHECKPOINT_DIR=folder)
    assert said.code == 0, said.err
    assert made.path.name in said.out
    assert [found.problem for found in ckpt.find(folder)] == [None]

    said = call(script("load_checkpoint"), tmp_path, **named, PROMPT="abc", MAX_NEW_TOKENS="5", SAMPLE_SEED="1")
    assert said.code == 0, said.err
    assert said.out.startswith("abc")
    assert set(said.out) <= set(ELEVEN)
    said = call(script("evaluate_checkpoint"), tmp_path, **named, EVAL_DATA=text)
    assert said.code == 0, said.err

    new = {"CHECKPOINT_DIR": tmp_path / "new", "BATCH_SIZE": "2", "EVAL_STEPS": "1", "SAMPLE_INTERVAL": "0"}
    said = call(script("load_checkpoint"), tmp_path, **named | new, MODE="resume", RESUME_TRAINING_STEPS="1")
    assert said.code == 0, said.err
    (row,) = [line for line in said.out.splitlines() if line.startswith("optimizer")]
    assert row.split()[1] == ("missing" if program in WEIGHTS_ONLY else "restored")
    latest = ckpt.latest(ckpt.find(tmp_path / "new"))
    assert latest is not None
    assert latest.step == record.step + 1

    said = call(script("convert_checkpoint"), tmp_path, **named, CONVERT_TO="unified", OUTPUT=tmp_path / "converted")
    assert said.code in (0, 3), said.err  # 3: some of it has no place here, and is named
    (found,) = ckpt.find(tmp_path / "converted")
    converted = ckpt.load(found.path, verify=True)
    assert_computes(converted, made)
    assert_moments(converted, made)
    assert converted.step == record.step

    said = call(script("prune_checkpoints"), tmp_path, CHECKPOINT_DIR=folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert said.code == 0, said.err
    after = snapshot(tmp_path / "theirs")
    assert {name: after.get(name) for name in before} == before  # nothing was deleted or changed


# ---------------------------------------------------------------------------------------------------------------------
# The table in the docs.


def table() -> str:
    """Return the table of programs and scripts as docs/checkpoints.md prints it."""
    rows = [["file", *VERBS]]
    for program in PROGRAMS:
        resume = "weights" if program in WEIGHTS_ONLY else "weights, moments"
        rows.append(
            [program, *(resume if verb == "resume" else "left alone" if verb == "prune" else "yes" for verb in VERBS)]
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def test_the_docs_print_this_table() -> None:
    assert table() in (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
