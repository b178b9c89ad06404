"""Build a run: choose device, numerics and engine, make the model and its optimizer, and put the parts together."""

import datetime
import os
from typing import Any

import torch
from torch import nn

import models
from milepost import ckpt, config
from milepost.ckpt import Checkpoint
from milepost.ckpt.restore import build_model
from milepost.ckpt.writer import Writer
from milepost.config import Config, ConfigError
from milepost.run.device_check import device_problem
from milepost.run.probe import probe
from milepost.run.state import Run, Saved, State
from milepost.run.text import Text, read_text, training_batches, with_validation_beside
from milepost.run.weights import (
    adapters,
    identity,
    initial_weights,
    lineage,
    shape_variables,
    with_model_of,
    with_pinned,
)
from milepost.runtime import distributed, hardware
from milepost.runtime.distributed import SINGLE, ElsewhereError, World
from milepost.runtime.optim import build_optimizer
from milepost.runtime.progress import Log, amount
from milepost.runtime.schedule import Schedule, default_floor
from milepost.text import tokenization
from models.model import Model
from models.sizes import size_of


def fresh(settings: Config, log: Log, world: World = SINGLE) -> Run:
    """Return a run at step 0 with random weights, or with those of PRETRAINED, GPT2_MODEL_NAME or INIT_FROM."""
    device = hardware.choose_device(settings.device, local_rank=world.local_rank, local_size=world.local_size)
    hardware.make_deterministic(settings.deterministic, device)
    settings = with_pinned(settings, world)
    weights = initial_weights(settings, log, world)
    if weights:
        settings = with_model_of(weights, settings)
        for line in config.no_effect_beside(settings):
            log(line)
    check_batch_size(settings, world)
    settings = with_validation_beside(settings, log)
    text, tokenizer = read_text(settings, log, world, record=weights)
    torch.manual_seed(settings.seed)
    base = None
    if weights:
        if config.frozen_base(settings):
            base = weights.base or identity(weights, settings)  # before build_model takes over their memory
        model = build_model(
            weights,
            device=build_device(device, world),
            block_size=settings.block_size,
            changes=changeable(settings),
            adapters=adapters(settings),
            take=True,
        )
        for kind, count in models.adapter_counts(shapes(model)).items():
            came = "transferred" if weights.model_settings.get(kind) else "added"
            log(f"{models.ADAPTERS[kind]} parameters {came}: {count}")
    else:
        check_size(settings, world, vocab_size=tokenizer.vocab_size, device=device)
        model = new_model(settings, vocab_size=tokenizer.vocab_size)
    run = assemble(
        settings,
        log,
        world,
        device=device,
        model=model,
        text=text,
        tokenizer=tokenizer,
        schedule=planned(settings),
        end=settings.training_steps,
    )
    if weights:
        run.parent, run.base = lineage(weights, {}), base
    return run


def check_size(settings: Config, world: World, *, vocab_size: int, device: torch.device) -> None:
    """Raise ConfigError if a new model does not fit into the free main memory, before it is built.

    On a CPU its gradients must fit too; each process of a machine builds it whole.
    """
    try:
        values = architecture(settings, vocab_size=vocab_size)
        named = [
            f"{name}={values[name.lower()]}" for name in shape_variables(values) if type(values[name.lower()]) is int
        ]
        remedy = f"lower one of {', '.join(named)}" if named else "use a smaller vocabulary"
        size = size_of(settings.model_type, values)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    except RuntimeError as error:  # a shape with more elements than can be counted
        raise ConfigError(
            [f"no machine has the memory for this model ({str(error).splitlines()[0]:.200}): {remedy}"]
        ) from error
    need = (size.bytes + (4 * size.elements if device.type == "cpu" else 0)) * world.local_size
    free = hardware.free_main_memory()
    if world.any(free is not None and need > free):
        size_here = f"a model of {amount(size.elements)} parameters in {amount(size.tensors)} tensors"
        raise ConfigError(
            [f"{size_here} takes {amount(need, 'B')} of memory, {amount(free or 0, 'B')} are free: {remedy}"]
        )


def new_model(settings: Config, *, vocab_size: int) -> Model:
    """Return a model with random weights from torch's global generator.

    Raise ConfigError if its settings are invalid.
    """
    try:
        return models.build(settings.model_type, architecture(settings, vocab_size=vocab_size))
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def architecture(settings: Config, *, vocab_size: int) -> dict[str, Any]:
    """Return the model's settings, as models.build takes them: each field that is a variable has its value, if one is set."""
    names = models.fields_of(settings.model_type)
    values = {name: getattr(settings, name) for name in names if name.upper() in config.VARIABLES}
    given = {name: value for name, value in values.items() if value is not None}
    return {"vocab_size": vocab_size} | given | adapters(settings)


def changeable(settings: Config) -> dict[str, Any]:
    """Return the model's settings that a resume may change, such as dropout: those whose variable has scope "math"."""
    math = {name.lower() for name, variable in config.VARIABLES.items() if variable.metadata["scope"] == "math"}
    return {name: value for name, value in architecture(settings, vocab_size=1).items() if name in math}


def choose_layout(settings: Config, engine: str, *, record: Checkpoint | None) -> str:
    """Return the layout of the run's checkpoints: CHECKPOINT_LAYOUT if it is set, else that of `record`.

    With sharded weights a fresh run's processes each write their own part.
    """
    if settings.is_set("CHECKPOINT_LAYOUT"):
        return settings.checkpoint_layout
    if record is None:
        return "sharded" if engine == "fsdp" else settings.checkpoint_layout
    return record.layout if record.layout in ckpt.WRITERS else "unified"


def check_batch_size(settings: Config, world: World) -> None:
    """Raise ConfigError if BATCH_SIZE is not a multiple of the number of processes."""
    if settings.batch_size % world.size:
        nearest = max(1, round(settings.batch_size / world.size)) * world.size
        problem = f"BATCH_SIZE={settings.batch_size} cannot be split evenly between {world.size} processes"
        fewer = max(count for count in range(1, world.size) if settings.batch_size % count == 0)
        raise ConfigError([f"{problem}: set a multiple of {world.size}, for example {nearest}, or start {fewer}"])


def planned(settings: Config) -> Schedule:
    """Return the learning-rate schedule of a whole run."""
    kind, peak, floor = settings.lr_schedule, settings.learning_rate, settings.min_learning_rate
    return Schedule(
        kind=kind,
        peak=peak,
        floor=default_floor(kind, peak) if floor is None else floor,
        warmup_steps=settings.warmup_steps,
        start_step=0,
        end_step=settings.training_steps,
    )


def assemble(
    settings: Config,
    log: Log,
    world: World,
    *,
    device: torch.device,
    model: Model,
    text: Text,
    tokenizer: tokenization.Tokenizer,
    schedule: Schedule,
    end: int,
    record: Checkpoint | None = None,
    window: int = 0,
) -> Run:
    """Return a run of these parts with a new id, which ends at step `end`.

    It is at step 0, or at the step of `record` with its data continuing at `window`.
    """
    if config.frozen_base(settings):
        models.freeze_base(model)
    step = record.step if record else 0
    dtype, compile_step = numerics(settings, log, device=device, model=model, end=end)
    engine = choose_engine(settings, world, device=device, model=model, dtype=dtype, record=record)
    check_device(settings, world, device=device, dtype=dtype, model=model)
    probed = probe_of(settings, world, device=device, dtype=dtype, model=model, record=record)
    forward = distribute(model, engine, device=device, compile_step=compile_step)
    rows = world.share(settings.batch_size)
    batches = training_batches(text, model, settings, log, step=step, window=window, rows=rows)
    optimizer = build_optimizer(
        model, settings.optimizer, lr=schedule.peak, weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2), world=world,
    )  # fmt: skip
    return Run(
        settings=settings,
        schedule=schedule,
        end=end,
        layout=choose_layout(settings, engine, record=record),
        log=log,
        device=device,
        dtype=dtype,
        compile_step=compile_step,
        model=model,
        forward=forward,
        tokenizer=tokenizer,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == "float16"),
        writer=Writer(background=settings.checkpoint_async, free_memory=hardware.free_main_memory, say=log),
        text=text,
        batches=batches,
        probed=probed,
        world=world,
        engine=engine,
        savers=distributed.new_control_group() if engine == "fsdp" else None,
        run_id=world.broadcast(new_run_id(settings.run_name or f"{settings.model_type}-{text.corpus.name}")),
        state=State(step=step, tokens_seen=record.tokens_seen if record else 0),
        saved=Saved(step=step),
    )


def new_run_id(name: str) -> str:
    """Return a unique name: start time, RUN_NAME or what else tells what the run is, and four random hex digits."""
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}-{os.urandom(2).hex()}"


def build_device(device: torch.device, world: World) -> torch.device:
    """Return where to build a model: in main memory with several processes, because one device may not hold all weights
    before sharding.
    """
    return device if world.size == 1 else torch.device("cpu")


def probe_of(
    settings: Config, world: World, *, device: torch.device, dtype: str, model: Model, record: Checkpoint | None
) -> dict[str, Any]:
    """Return the probe of this machine; empty if no checkpoint will record it, or equal steps need not have equal bits."""
    compared = settings.enable_checkpoints or record is not None
    if not compared or not settings.deterministic or device.type == "mps":
        return {}
    return probe(model, optimizer=settings.optimizer, device=device, dtype=dtype, world=world)


def check_device(settings: Config, world: World, *, device: torch.device, dtype: str, model: Model) -> None:
    """Raise DeviceError if a step of this process's size comes out otherwise on the device than on the CPU."""
    if device.type == "cpu" or not settings.device_check:
        return
    rows = settings.batch_size // world.size
    problem = device_problem(model, device=device, dtype=dtype, rows=rows, seed=settings.seed)
    if world.any(problem is not None):
        raise refused(device, problem) if problem else ElsewhereError


def refused(device: torch.device, problem: str) -> hardware.DeviceError:
    """Return the refusal of a device that computes wrongly, with the ways on."""
    wrong = f"DEVICE={device.type} computes wrongly with torch {torch.__version__}: {problem}"
    remedy = (
        "set DEVICE=cpu, or install another version of torch or of the driver; DEVICE_CHECK=false goes on regardless"
    )
    return hardware.DeviceError(f"{wrong}: {remedy}")


def choose_engine(
    settings: Config,
    world: World,
    *,
    device: torch.device,
    model: Model,
    dtype: str,
    record: Checkpoint | None,
) -> str:
    """Return how the processes share the work: none, ddp or fsdp.

    `auto` keeps the checkpoint's engine if the number of processes is equal; else it is ddp if every device has memory
    for a whole step.
    """
    if world.size == 1:
        return "none"
    before = record.runtime if record else {}
    if settings.distributed != "auto":
        return settings.distributed
    if before.get("processes") == world.size and before.get("distributed") in ("ddp", "fsdp"):
        return str(before["distributed"])
    need = memory_needed(model, settings, world, engine="ddp", device=device, dtype=dtype)
    available = hardware.all_memory(device)
    return "fsdp" if world.any(available is not None and need > available) else "ddp"


def memory_needed(
    model: Model, settings: Config, world: World, *, engine: str, device: torch.device, dtype: str
) -> int:
    """Estimate the bytes of device memory that a training step takes; on a CPU, of all processes of this machine
    together.
    """
    need = models.training_bytes(
        model,
        settings.batch_size // world.size,
        bytes_per_value=4 if dtype == "float32" else 2,
        processes=world.size if engine == "fsdp" else 1,
    )
    return need * (world.local_size if device.type == "cpu" else 1)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def distribute(model: Model, engine: str, *, device: torch.device, compile_step: bool) -> nn.Module:
    """Move the model, or this process's shard of it, to the device; return the module that the training step calls."""
    if engine == "fsdp":
        distributed.fully_sharded(model, model.blocks(), device)
    else:
        model.to(device)
    forward = hardware.compiled(model) if compile_step else model
    return distributed.data_parallel(forward) if engine == "ddp" else forward


def numerics(settings: Config, log: Log, *, device: torch.device, model: Model, end: int) -> tuple[str, bool]:
    """Return the dtype, and whether to compile the steps to `end`, by fixed rules.

    A resume finds the resolved values of its checkpoint in the settings.
    """
    compile_step, remark = hardware.choose_compile(settings.compile, device, pays=model.compile_pays, steps=end)
    if remark:
        log(remark)
    return hardware.choose_dtype(settings.dtype, device, width=getattr(model.settings, "n_embd", 0)), compile_step
