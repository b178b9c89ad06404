"""A model, an optimizer, a tracker, a metric and an auxiliary loss from outside the package, each one file of at most
40 lines in tests/toys.

Each is trained, killed, resumed bit-exactly, converted, listed, pruned and generated from.
"""

import dataclasses
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import programs
import pytest
import torch
from drive import ROOT, environment, newest, tensor_bytes, train
from script import call, script
from test_distributed import torchrun
from work import HANGING

import models
import training
from milepost import ckpt, config
from milepost.ckpt.restore import restore_optimizer
from milepost.runtime import optimizers, trackers
from milepost.runtime.optim import build_optimizer
from milepost.runtime.progress import read_metrics

FOLDER = Path(__file__).with_name("toys")
LINES = 40
KILLED_AT = 5
COMMON = {
    "TRAINING_STEPS": "6",
    "CHECKPOINT_INTERVAL": "2",
    "WARMUP_STEPS": "0",
    "EVAL_INTERVAL": "3",
    "GRADIENT_ACCUMULATION_STEPS": "2",
}
SMALL = dict.fromkeys(("N_LAYER", "N_HEAD"))
# toy -> its settings, the layout to convert to, and the metrics that it adds
TOYS = {
    "toy_model": ({"MODEL_TYPE": "mlp", **SMALL}, "huggingface", set()),
    "toy_optimizer": ({"OPTIMIZER": "signs"}, "stepfiles", set()),
    "toy_tracker": ({"TRACKER": "jsonl"}, "directory", set()),
    "toy_metric": ({}, "directory", {"grad_norm_block0", "grad_norm_block1"}),
    "toy_loss": ({"MODEL_TYPE": "zgpt2", "OPTIMIZER": "muon"}, "separated", {"cross_entropy", "z_loss"}),
}

# What a user's own script does: register, read the settings, train. Here it is killed in the middle.
DRIVER = """
import os, signal, sys
sys.path[:0] = [{root!r}, {toys!r}]
import models
from milepost import config
import {toy}
import training
learn = training.training_step
def killed(run, lr):
    if run.state.step == {step}:
        run.writer.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return learn(run, lr)
training.training_step = killed
training.guarded(training.main, config.read())
"""

TOGETHER = """
import sys
sys.path[:0] = [{root!r}, {toys!r}]
from milepost import config
import toy_loss
settings = config.read()
import toy_metric
import training
sys.exit(training.guarded(training.main, settings))
"""


@pytest.fixture(autouse=True)
def registries():
    """Registries as they were, after each test."""
    kept = [(registry, dict(registry)) for registry in (models.MODELS, optimizers.OPTIMIZERS, trackers.TRACKERS)]
    measures = list(training.MEASURES)
    yield
    training.MEASURES[:] = measures
    for registry, before in kept:
        registry.clear()
        registry.update(before)


def registered(toy: str) -> ModuleType:
    """The toy's module, freshly executed: it registers itself."""
    spec = importlib.util.spec_from_file_location(toy, FOLDER / f"{toy}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[toy] = module  # where dataclasses look their types up
    spec.loader.exec_module(module)
    return module


def lines_of(folder: Path) -> list[dict[str, object]]:
    """The lines of the one run's metrics.jsonl, without what differs between two runs."""
    (path,) = (folder / "runs").glob("*/metrics.jsonl")
    return [
        {name: value for name, value in line.items() if name not in ("run_id", "time", "tok_s")}
        for line in read_metrics(path)
    ]


def kill(toy: str, folder: Path, *, step: int = KILLED_AT, **changes: str) -> None:
    """Train in a process of its own until it is killed at the beginning of a step."""
    code = DRIVER.format(root=str(ROOT), toys=str(FOLDER), toy=toy, step=step)
    keep = {
        name: os.environ[name]
        for name in ("PATH", "HOME", "TMPDIR", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
        if name in os.environ
    }
    ended = programs.run(
        [sys.executable, "-c", code], env=keep | environment(folder, **changes), capture_output=True, text=True,
        timeout=HANGING, check=False
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize("toy", TOYS)
def test_a_toy_goes_through_everything(toy, tmp_path):
    settings, layout, metrics = TOYS[toy]
    settings = COMMON | settings
    registered(toy)
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    for each in (straight, folder):
        each.mkdir()
    code, said = train(straight, **settings)
    assert code == 0, said

    kill(toy, folder, **settings)
    assert newest(folder).step == 4
    code, said = train(folder, RESUME="auto", **settings)
    assert code == 0, said
    assert "not bit-exact" not in said
    assert newest(folder).step == 6
    assert tensor_bytes(newest(folder)) == tensor_bytes(newest(straight))
    assert lines_of(folder) == lines_of(straight)
    assert all(metrics <= line.keys() for line in lines_of(straight) if line["split"] == "train")

    plotted = call(script("plot_run"), folder)
    assert (plotted.code, {name for name in metrics if name in plotted.out}) == (0, metrics), plotted.err

    final = newest(folder)
    said = call(
        script("convert_checkpoint"),
        folder,
        CHECKPOINT_PATH=final.path,
        CONVERT_TO=layout,
        OUTPUT=tmp_path / "converted",
    )
    assert said.code == 0, said.err
    (converted,) = [found for found in ckpt.find(tmp_path / "converted") if found.path.parent.name != "best"]
    assert converted.layout == layout
    assert tensor_bytes(ckpt.load(converted.path, verify=True)) == tensor_bytes(final)

    listed = call(script("list_checkpoints"), folder)
    steps = [line.split()[0] for line in listed.out.split("\n\n")[0].splitlines()[1:]]
    assert (listed.code, steps[:3]) == (0, ["2", "4", "6"])

    text = call(script("load_checkpoint"), folder, CHECKPOINT_PATH=converted.path, SAMPLE_SEED="1", MAX_NEW_TOKENS="20")
    assert (text.code, len(text.out) >= 20) == (0, True), text.err

    pruned = call(script("prune_checkpoints"), folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    left = {found.step for found in ckpt.find(folder / "checkpoints") if found.path.parent.name != "best"}
    assert (pruned.code, left) == (0, {6}), pruned.err


@pytest.mark.parametrize("toy", TOYS)
def test_a_toy_is_short(toy):
    assert len((FOLDER / f"{toy}.py").read_text(encoding="utf-8").splitlines()) <= LINES


# ---------------------------------------------------------------------------------------------------------------------
# What a toy computes.


def test_the_auxiliary_loss_is_minimised_and_its_parts_are_means(tmp_path):
    """Over micro-batches; validation has the cross-entropy only."""
    module = registered("toy_loss")
    run = training.fresh(
        config.read(environment(tmp_path, MODEL_TYPE="zgpt2", DROPOUT="0", GRADIENT_ACCUMULATION_STEPS="2")),
        training.Log(),
    )
    x, y = run.batches.at(0)
    outputs = [run.model(*pair) for pair in zip(x, y, strict=True)]
    metrics = training.training_step(run, 1e-3)
    for name in ("cross_entropy", "z_loss"):
        expected = torch.stack([output.metrics[name] for output in outputs]).mean()
        torch.testing.assert_close(metrics[name], expected.detach())
    torch.testing.assert_close(metrics["loss"], metrics["cross_entropy"] + metrics["z_loss"])
    assert metrics["z_loss"] > module.WEIGHT
    assert run.model.eval()(x[0], y[0]).metrics == {}


def test_the_blocks_norms_make_up_less_than_the_whole(tmp_path):
    registered("toy_metric")
    run = training.fresh(config.read(environment(tmp_path)), training.Log())
    metrics = {name: value.item() for name, value in training.training_step(run, 1e-3).items()}
    assert metrics.keys() == {"loss", "lr", "grad_norm", "grad_norm_block0", "grad_norm_block1"}
    both = metrics["grad_norm_block0"] ** 2 + metrics["grad_norm_block1"] ** 2
    assert 0 < both < metrics["grad_norm"] ** 2


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_metrics_of_two_processes_are_those_of_one(engine, tmp_path):
    """The parts of the loss are means over all; a norm of sharded gradients is that of the whole."""
    settings = {"MODEL_TYPE": "zgpt2", "DROPOUT": "0", "TRAINING_STEPS": "2", "WARMUP_STEPS": "0", "OPTIMIZER": "adamw"}
    program = tmp_path / "program.py"
    program.write_text(TOGETHER.format(root=str(ROOT), toys=str(FOLDER)), encoding="utf-8")
    lines = []
    for processes, more in ((1, {}), (2, {"DISTRIBUTED": engine})):
        folder = tmp_path / str(processes)
        folder.mkdir()
        done = torchrun(folder, processes, script=program, **settings, **more)
        assert done.returncode == 0, done.stderr
        lines.append([line for line in lines_of(folder) if line["split"] == "train"])
    names = {"loss", "grad_norm", "cross_entropy", "z_loss", "grad_norm_block0", "grad_norm_block1"}
    for one, both in zip(*lines, strict=True):
        assert one.keys() == both.keys() >= names
        assert {name: both[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-4)


@pytest.mark.parametrize("killed_at", [2, 3, 4, 5])
def test_the_tracker_has_every_step_once_and_the_variable_that_it_declares(killed_at, tmp_path):
    registered("toy_tracker")
    settings = COMMON | {"TRACKER": "jsonl", "LOG_INTERVAL": "1"}
    label = tmp_path / "label.env"
    label.write_text("TOY_LABEL=from the env file\n", encoding="utf-8")
    kill("toy_tracker", tmp_path, step=killed_at, ENV_FILE=str(label), PYTHON_DOTENV_DISABLED="0", **settings)
    code, said = train(tmp_path, RESUME="auto", **settings)
    assert code == 0, said
    (path,) = tmp_path.glob("runs/*/jsonl/rows.jsonl")
    heading, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert heading == {"label": "from the env file", "seed": 1337}
    expected = {}
    for line in read_metrics(path.parent.parent / "metrics.jsonl"):
        expected[line["step"], f"{line['split']}/loss"] = line["loss"]
    mirrored = [((row["step"], name), row[name]) for row in rows for name in row if name.endswith("/loss")]
    assert dict(mirrored) == expected
    assert len(mirrored) == len(expected)
    assert [row["step"] for row in rows] == list(range(7))


def test_a_setting_of_a_model_that_may_change_at_a_resume_reaches_the_model(tmp_path):
    """Any field whose variable may change, as DROPOUT may, not only those of the models that are here."""
    toy = registered("toy_model")
    kind = dataclasses.make_dataclass("Kind", [("grad_clip", float, 0.0)], bases=(toy.Settings,), frozen=True)
    models.register(
        "clipped", type("Clipped", (toy.MLP,), {"settings_type": kind}), defaults=models.MODELS["mlp"].defaults
    )
    settings = COMMON | SMALL | {"MODEL_TYPE": "clipped"}
    assert train(tmp_path, **settings, GRAD_CLIP="1")[0] == 0
    before = newest(tmp_path)
    assert before.model_settings["grad_clip"] == 1.0
    code, said = train(tmp_path, **settings | {"TRAINING_STEPS": "8"}, GRAD_CLIP="0.5", RESUME="auto")
    assert code == 0, said
    assert newest(tmp_path).model_settings["grad_clip"] == 0.5
    assert newest(tmp_path).run_id != before.run_id


def test_a_metric_takes_no_name_of_a_line(tmp_path):
    training.MEASURES.append(lambda run: {"step": torch.tensor(1e9), "split": torch.tensor(1e9)})
    assert train(tmp_path, TRAINING_STEPS="2")[0] == 0
    assert [(line["step"], line["split"]) for line in lines_of(tmp_path) if line["split"] == "train"] == [
        (1, "train"),
        (2, "train"),
    ]


class Counting(torch.nn.Module):
    """Counts the passes of the model that it stands for, here and in a buffer of that model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, 0
        model.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, ids, targets):
        self.model.passes += 1
        self.seen += 1
        return self.model(ids, targets)


def test_the_warm_up_passes_twice_and_changes_nothing(tmp_path, monkeypatch):
    """However long a pass takes: the order of DistributedDataParallel's sums depends on it.

    The estimate may then pass again, or not.
    """
    run = training.fresh(config.read(environment(tmp_path)), training.Log())
    run.forward = Counting(run.model)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    monkeypatch.setattr(training, "PROBE_SECONDS", 0.0)
    seconds = training.warm_up(run)
    assert run.forward.seen == 2
    assert training.seconds_per_step(run, seconds) == seconds
    assert run.forward.seen == 2
    assert all(tensor.equal(before[name]) for name, tensor in run.model.state_dict().items())
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert run.state.step == 0
    monkeypatch.setattr(training, "PROBE_SECONDS", float("inf"))
    assert training.seconds_per_step(run, seconds) <= seconds
    assert (run.forward.seen, run.model.passes.item()) == (4, 0)


# ---------------------------------------------------------------------------------------------------------------------
# What is not declared is named.


@pytest.mark.parametrize("trait", ["settings_type", "forward", "activation_bytes"])
def test_an_undeclared_trait_is_named(trait, tmp_path):
    module = registered("toy_model")
    delattr(module.MLP, trait)
    with pytest.raises(ValueError, match=f"model 'mlp': toy_model.MLP does not declare {trait} "):
        models.build("mlp", {"vocab_size": 5, "block_size": 4, "n_embd": 2})
    code, said = train(tmp_path, MODEL_TYPE="mlp", **SMALL)
    assert (code, f"does not declare {trait} " in said) == (2, True)


@pytest.mark.parametrize("part", ["__init__", "next_step", "write", "close"])
def test_what_a_tracker_does_not_define_is_named_before_any_file_is_written(part, tmp_path):
    module = registered("toy_tracker")
    delattr(module.JsonLines, part)
    code, said = train(tmp_path, TRACKER="jsonl")
    assert (code, f"TRACKER=jsonl: toy_tracker.JsonLines does not define {part} " in said) == (2, True)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_the_choices_of_a_setting_follow_its_registry(tmp_path):
    with pytest.raises(config.ConfigError) as error:
        config.read(environment(tmp_path, TRACKER="jsonl"))
    assert "expected one of none, tensorboard, wandb, trackio" in error.value.problems[0]
    registered("toy_tracker")
    assert config.read(environment(tmp_path, TRACKER="jsonl")).tracker == "jsonl"
    with pytest.raises(config.ConfigError) as error:
        config.read(environment(tmp_path, TRACKER="jsons"))
    assert "trackio, jsonl; did you mean jsonl?" in error.value.problems[0]


def test_an_undeclared_default_is_named():
    module = registered("toy_model")
    defaults = {name: value for name, value in models.MODELS["mlp"].defaults.items() if name != "learning_rate"}
    with pytest.raises(ValueError, match="model 'other': its defaults do not declare learning_rate"):
        models.register("other", module.MLP, defaults=defaults)


@pytest.mark.parametrize("name", ["mlp", "MLP", "m/p", ""])
def test_a_name_that_is_taken_or_could_not_be_set_is_refused(name):
    module = registered("toy_model")
    with pytest.raises(ValueError, match=f"model '{name}'"):
        models.register(name, module.MLP, defaults=models.MODELS["mlp"].defaults)


@pytest.mark.parametrize(
    ("setting", "value"), [("OPTIMIZER", "muon"), ("LORA_RANK", "2"), ("TTT_LAYERS", "0"), ("GPT2_MODEL_NAME", "gpt2")]
)
def test_a_setting_for_a_trait_that_is_not_declared_names_the_models_that_have_it(setting, value, tmp_path):
    registered("toy_model")
    with pytest.raises(config.ConfigError) as error:
        config.read(environment(tmp_path, MODEL_TYPE="mlp", **SMALL) | {setting: value})
    assert any(
        problem.startswith(f"{setting}={value} ") and "MODEL_TYPE=gpt2" in problem for problem in error.value.problems
    )


def test_an_optimizer_without_names_is_refused():
    registered("toy_optimizer")
    optimizers.register("nameless", lambda model, **_: torch.optim.SGD(model.parameters()))
    model = models.build("bigram", {"vocab_size": 5, "block_size": 4})
    with pytest.raises(ValueError, match=r"optimizer 'nameless': .*named_parameters"):
        build_optimizer(model, "nameless", lr=1.0, weight_decay=0.0, betas=(0.9, 0.99))


def test_state_of_another_optimizer_is_not_loaded(tmp_path):
    """Nothing is known of the toy's state but who saved it: AdamW's must not become it, nor its AdamW's."""
    registered("toy_optimizer")
    for saved, asked in (("signs", "adamw"), ("adamw", "signs")):
        folder = tmp_path / saved
        folder.mkdir()
        assert train(folder, TRAINING_STEPS="2", OPTIMIZER=saved)[0] == 0
        record = newest(folder)
        model = models.build("gpt2", record.model_settings)
        optimizer = build_optimizer(model, asked, lr=1.0, weight_decay=0.0, betas=(0.9, 0.99))
        assert restore_optimizer(optimizer, record, kind=asked).restored == 0
        optimizer = build_optimizer(model, saved, lr=1.0, weight_decay=0.0, betas=(0.9, 0.99))
        assert restore_optimizer(optimizer, record, kind=saved).missing == ()


def test_a_resume_with_another_optimizer_trains(tmp_path):
    registered("toy_optimizer")
    assert train(tmp_path, TRAINING_STEPS="2", OPTIMIZER="signs")[0] == 0
    code, said = train(tmp_path, TRAINING_STEPS="4", OPTIMIZER="adamw", RESUME="auto")
    assert code == 0, said
    assert newest(tmp_path).step == 4
