"""`Run`: the parts of one training, its state, and the checkpoint made of them."""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from milepost import ckpt, config
from milepost.ckpt import Checkpoint
from milepost.ckpt.record import named_tensors
from milepost.ckpt.writer import Writer
from milepost.config import Config
from milepost.mirror import Helper, Sharing, Uploader
from milepost.run.text import Text
from milepost.runtime import distributed, hardware
from milepost.runtime.distributed import SINGLE, World
from milepost.runtime.progress import Log, Metrics, Progress
from milepost.runtime.schedule import Schedule, default_floor
from milepost.runtime.tracking.mirror import Mirror
from milepost.text import tokenization
from milepost.text.batches import Batches
from milepost.text.hub import SCHEME
from milepost.text.mixtures import MixedBatches
from milepost.text.packing import PackedBatches
from models.model import Model

TRY_INSTEAD = "try a lower LEARNING_RATE, a longer WARMUP_STEPS or GRAD_CLIP=1"  # where training diverges


@dataclass(kw_only=True)
class State:
    """What the loop changes besides the parameters and the optimizer. A step is one optimizer update."""

    # A checkpoint records these.
    step: int = 0
    tokens_seen: int = 0
    observed_step: int | None = None  # the last step that was evaluated and sampled
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    # And not these.
    skipped_updates: int = 0  # consecutive float16 updates that overflowed
    updating: bool = False  # during the optimizer's update
    left: tuple[int, dict[str, int]] = (-1, {})  # a step, and the digests of the tensors that it left
    last_sample: str | None = None
    reported: set[str] = field(default_factory=set)  # files whose write errors were logged


@dataclass(kw_only=True)
class Saved:
    """What of a run is on the disk.

    The thread that saves in the background updates `best_step`, `path`, `number`, `failed` and what belongs to it.
    """

    step: int = 0  # of the last regular checkpoint
    observed_step: int | None = None  # the run's `observed_step` in that checkpoint
    best_step: int | None = None  # the run's best step, once it is in best/
    path: Path | None = None  # the last regular checkpoint written
    resumed: Path | None = None  # the checkpoint that the run resumes from
    number: int = 0  # the last save number
    failed: bool = False  # whether the last regular save failed
    refused: bool = False  # whether it failed for a reason that may pass: a full disk, a folder that did not answer
    need: int = 0  # bytes of the save that failed
    attempts: int = 0  # failures in a row
    retry_at: float = 0.0  # when another attempt is worth it (time.monotonic())
    not_mirrored: int = 0  # checkpoints that the mirror lacks at the end
    resumed_time: float = math.inf  # when the checkpoint that the run resumes from was saved (Unix seconds)


@dataclass(kw_only=True, eq=False)
class Run:
    """One training: its parts, which stay, and its `state`, which moves in the loop."""

    settings: (
        Config  # as set by the user, the checkpoint and the defaults; the next three are what the run made of them
    )
    schedule: Schedule
    end: int  # the last step
    layout: str  # of its checkpoints
    log: Log
    # Model and numerics.
    device: torch.device
    dtype: str
    compile_step: bool
    model: Model
    forward: nn.Module  # what the loop calls: the model, compiled if `compile_step`, and wrapped if `engine` is ddp
    tokenizer: tokenization.Tokenizer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    writer: Writer
    # Data.
    text: Text
    batches: Batches | PackedBatches | MixedBatches
    probed: dict[str, Any]  # what `probe` returned: whether this machine computes as another did
    # Processes.
    world: World = SINGLE
    engine: str = "none"  # how the processes share the work: none, ddp or fsdp
    savers: Any = None  # their group for saving in the background
    # Identity and origin.
    run_id: str
    parent: dict[str, Any] | None = None  # of a child run: where it branched off, and with which settings
    base: dict[str, Any] | None = None  # of adapters: sha256 and source of the frozen weights

    state: State
    saved: Saved

    # Opened when training begins.
    metrics: Metrics = field(init=False)
    mirror: Mirror = field(init=False)
    bar: Progress = field(init=False)
    uploader: Uploader | None = None  # to the mirror of checkpoints, on rank 0
    sharing: Sharing | None = None  # of the uploads with other ranks, on rank 0
    helper: Helper | None = None  # of the uploader, on other ranks

    @property
    def folder(self) -> Path:
        """RUNS_DIR/<run_id>: metrics, samples and the log of this run."""
        return Path(self.settings.runs_dir) / self.run_id

    @property
    def saves_parts(self) -> bool:
        """Whether each process saves its own part of the weights; else rank 0 saves everything."""
        return self.engine == "fsdp" and self.layout == "sharded"

    @property
    def best_is_pending(self) -> bool:
        """Whether the best step should be in best/ and is not, as far as rank 0 knows."""
        enabled = self.settings.enable_checkpoints and self.settings.checkpoint_keep_best > 0
        return enabled and self.state.best_step not in (None, self.saved.best_step)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return this process's part of all weights and moments, named as `named_tensors` names those of a record."""
        record = Checkpoint(
            model_state=self.model.state_dict(),
            optimizer_state=self.optimizer.state_dict(),
            model_type="",
            model_settings={},
        )
        return {name: distributed.local(tensor) for name, tensor in named_tensors(record).items()}

    def resolved(self) -> dict[str, Any]:
        """Return the variables that the run follows instead of its settings' values, by name: schedule, layout, and data sets of
        the hub with their commits.

        MIN_LEARNING_RATE stays None where the floor is the schedule's default.
        """
        plan, asked = self.schedule, self.settings.min_learning_rate
        floor = None if asked is None and plan.floor == default_floor(plan.kind, plan.peak) else plan.floor
        data, texts = (
            self.text.fingerprint(),
            {"TRAINING_DATA_SOURCE": "source", "VALIDATION_DATA": "validation_source"},
        )
        return {name: data[key] for name, key in texts.items() if SCHEME in str(data.get(key))} | {
            "TRAINING_STEPS": self.end,
            "LR_SCHEDULE": plan.kind,
            "LEARNING_RATE": plan.peak,
            "MIN_LEARNING_RATE": floor,
            "WARMUP_STEPS": plan.warmup_steps,
            "CHECKPOINT_LAYOUT": self.layout,
        }

    def hyperparameters(self) -> dict[str, Any]:
        """Return the settings that a checkpoint records, as the run follows them: data sets of the hub with their commits."""
        data, texts = (
            self.text.fingerprint(),
            {"TRAINING_DATA_SOURCE": "source", "VALIDATION_DATA": "validation_source"},
        )
        pinned = {name: data[key] for name, key in texts.items() if SCHEME in str(data.get(key))}
        return config.to_dict(self.settings) | self.resolved() | pinned

    def fingerprint(self) -> dict[str, Any]:
        """Return the hardware, versions and numerics that affect bitwise reproducibility."""
        return {"probe": self.probed} | hardware.fingerprint(
            self.device,
            dtype=self.dtype,
            compile_step=self.compile_step,
            deterministic=self.settings.deterministic,
            processes=self.world.size,
            local_processes=self.world.local_size,
            distributed=self.engine,
        )


class Clock:
    """Measures tokens per second of training, without evaluation and saving."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self._since, self._tokens = time.monotonic(), self._run.state.tokens_seen

    def rate(self) -> float:
        """Return tokens per second since the last call or restart."""
        rate = (self._run.state.tokens_seen - self._tokens) / max(time.monotonic() - self._since, 1e-9)
        self.restart()
        return rate


def is_due(run: Run, *names: str) -> bool:
    """Return whether any of `names` (eval, sample, log, checkpoint) is due at this step by its interval.

    At the last step all are.
    """
    return any(ckpt.due(run.state.step, getattr(run.settings, f"{name}_interval"), last=run.end) for name in names)


def to_record(run: Run) -> Checkpoint:
    """Return the run as a checkpoint. With sharded weights all processes must call it."""
    state, model_state, adapters_only = run.state, run.model.state_dict(), run.settings.checkpoint_adapters_only
    if adapters_only:
        model_state = {name: tensor for name, tensor in model_state.items() if models.is_adapter(name)}
    optimizer_state = None if run.settings.checkpoint_model_only else run.optimizer.state_dict()
    if run.engine == "fsdp" and not run.saves_parts:
        model_state, optimizer_state = gathered(model_state, run.world), gathered(optimizer_state, run.world)
    return Checkpoint(
        model_state=model_state,
        optimizer_state=optimizer_state,
        shared_by=run.savers if run.saves_parts else None,
        model_type=run.settings.model_type,
        model_settings=models.plain(run.model.settings),
        tokenizer=run.tokenizer.to_dict(),
        tokenizer_sha256=run.tokenizer.digest,
        step=state.step,
        epoch=run.batches.epoch(state.step),
        windows_seen=run.batches.windows_seen(state.step),
        tokens_seen=state.tokens_seen,
        schedule=dataclasses.asdict(run.schedule),
        scaler=run.scaler.state_dict() or None,
        observed_step=state.observed_step,
        validation_loss=state.validation_loss if state.observed_step == state.step else None,
        best_loss=state.best_loss,
        best_step=state.best_step,
        hyperparameters=run.hyperparameters(),
        data=run.text.fingerprint(),
        runtime=run.fingerprint(),
        run_id=run.run_id,
        parent=run.parent,
        base=run.base,
        parts=["adapters" if adapters_only else "model"],
    )


def gathered(state: Any, world: World) -> Any:
    """Return a state with full tensors in the main memory of rank 0.

    All processes must call it; the others get empty tensors.
    """
    if isinstance(state, dict):
        return {name: gathered(value, world) for name, value in state.items()}
    if not isinstance(state, torch.Tensor):
        return state
    tensor = distributed.full(state)
    return tensor.cpu() if world.is_rank0 else tensor.new_empty(0)
