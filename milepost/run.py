"""One training, and how it is put together: from nothing, from other weights, or from parts that a checkpoint gave back."""

import dataclasses
import datetime
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from milepost import ckpt, config
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.foreign.importing import with_chars, with_kind
from milepost.ckpt.hub import local_folder
from milepost.ckpt.restore import build_model, build_tokenizer, name_the_base, with_base
from milepost.ckpt.tensors import digest
from milepost.ckpt.writer import Writer
from milepost.config import Config, ConfigError
from milepost.runtime import distributed, hardware
from milepost.runtime.distributed import SINGLE, World
from milepost.runtime.optim import Schedule, build_optimizer
from milepost.runtime.progress import Log, Metrics, Progress
from milepost.runtime.trackers import Mirror
from milepost.text import token_files, tokenization
from milepost.text.batches import Batches, largest_block_size
from milepost.text.corpus import Corpus, open_corpus
from milepost.text.errors import DataError
from milepost.text.scan import Scan, cached_scan
from models.model import Model

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"
CACHE_FOLDER = DATA_FOLDER / ".cache" / "tokens"
# The fields of a model's settings that a variable each names: LORA_RANK.
ADAPTERS = {
    "lora": ("rank", "alpha", "dropout", "targets"),
    "ttt": ("layers", "base_lr", "mini_batch_size", "initial_gating_alpha"),
}


@dataclass(frozen=True, kw_only=True)
class Text:
    """The training text: its fingerprint, and its tokens on both sides of the split."""

    corpus: Corpus
    scan: Scan
    split: token_files.TokenSplit
    validation_fraction: float

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint records of the text, to know it again."""
        return {
            "source": self.corpus.source,
            "name": self.corpus.name,
            "sha256": self.scan.sha256,
            "characters": self.scan.characters,
            "validation_fraction": self.validation_fraction,
        }


@dataclass(kw_only=True, eq=False)
class Run:
    """One training: everything that the loop reads and moves on. A step is one optimizer update."""

    settings: Config
    log: Log
    # What is trained, on what.
    device: torch.device
    dtype: str
    compile_step: bool
    model: Model
    forward: (
        nn.Module
    )  # the model, or its compiled twin that shares the parameters; with `ddp` what averages their gradients, too
    tokenizer: tokenization.Tokenizer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    writer: Writer
    # What it learns from.
    text: Text
    batches: Batches
    # Who it is, and which of its processes this one.
    run_id: str
    world: World = SINGLE
    engine: str = "none"
    savers: Any = None  # the processes' group for saving, which goes on beside their training
    parent: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    # Where it stands.
    step: int = 0
    tokens_seen: int = 0
    resumed_save: float = math.inf  # when the checkpoint was saved that the same run resumes from (Unix seconds)
    observed_step: int | None = None
    saved_step: int = 0
    saved_observed_step: int | None = None  # `observed_step` as the last save has it
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    kept_best_step: int | None = None  # the best step once it is in best/
    last_saved: Path | None = None
    save_failed: bool = False
    skipped_updates: int = 0
    updating: bool = False  # while the weights are between two steps
    last_sample: str | None = None
    refused: set[str] = field(default_factory=set)
    # Opened when training begins.
    metrics: Metrics = field(init=False)
    mirror: Mirror = field(init=False)
    progress: Progress = field(init=False)

    @property
    def folder(self) -> Path:
        """Where metrics, samples and the log of this run go."""
        return Path(self.settings.runs_dir) / self.run_id

    @property
    def saves_parts(self) -> bool:
        """Whether each process saves the part that it has; else one saves all."""
        return self.engine == "fsdp" and self.settings.checkpoint_layout == "sharded"

    @property
    def best_is_pending(self) -> bool:
        """Whether the best step should be in best/ and is not, as far as rank 0 knows."""
        wanted = self.settings.enable_checkpoints and self.settings.checkpoint_keep_best > 0
        return wanted and self.best_step not in (None, self.kept_best_step)

    @property
    def end(self) -> int:
        """The step at which the run is done."""
        return self.settings.training_steps

    def fingerprint(self) -> dict[str, Any]:
        """What of the machine and the versions decides this run's bits."""
        return hardware.fingerprint(
            self.device,
            dtype=self.dtype,
            compile_step=self.compile_step,
            deterministic=self.settings.deterministic,
            processes=self.world.size,
            local_processes=self.world.local_size,
            distributed=self.engine,
        )


def fresh(settings: Config, log: Log, world: World = SINGLE) -> Run:
    """A run at step 0: from random weights, from GPT2_MODEL_NAME's or from those of INIT_FROM's checkpoint."""
    device = hardware.choose_device(settings.device, local_rank=world.local_rank, local_size=world.local_size)
    hardware.make_deterministic(settings.deterministic, device)
    weights = initial_weights(settings, log, world)
    if weights:
        settings = shaped_like(weights, settings)
    check_shares(settings, world)
    text, tokenizer = read_text(settings, log, world, tokenizer=build_tokenizer(weights) if weights else None)
    torch.manual_seed(settings.seed)
    base = None
    if weights:
        if config.frozen_base(settings):
            base = weights.base or identity(weights, settings)  # now, as the model takes their memory
        model = build_model(
            weights,
            device=built_on(device, world),
            block_size=settings.block_size,
            dropout=settings.dropout,
            adapters=adapters(settings),
            take=True,
        )
        for kind, count in models.adapter_counts(shapes(model)).items():
            came = "transferred" if weights.model_settings.get(kind) else "added"
            log(f"{models.ADAPTERS[kind]} parameters {came}: {count}")
    else:
        model = new_model(settings, vocab_size=tokenizer.vocab_size)
    run = put_together(
        settings, log, world, device=device, model=model, text=text, tokenizer=tokenizer, schedule=planned(settings)
    )
    if weights:
        run.parent, run.base = lineage(weights, {}), base
    return run


def built_on(device: torch.device, world: World) -> torch.device:
    """Where the weights of a model are made: in main memory if they may have to be shared out, as one device may not hold them all."""
    return device if world.size == 1 else torch.device("cpu")


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def adapters(settings: Config) -> dict[str, Any]:
    """The adapters of the settings, as the model's own settings have them."""
    on = {"lora": settings.lora_rank > 0, "ttt": settings.ttt_layers is not None}
    return {
        kind: {name: getattr(settings, f"{kind}_{name}") for name in names}
        for kind, names in ADAPTERS.items()
        if on[kind]
    }


def adapter_variables(model_settings: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the adapters that a model has: {"LORA_RANK": 8, ...}."""
    return {
        f"{kind}_{name}".upper(): value for kind in ADAPTERS for name, value in (model_settings.get(kind) or {}).items()
    }


def identity(base: Checkpoint, settings: Config) -> dict[str, Any]:
    """By what a base is known again, and where it came from."""
    return {"sha256": digest(base.model_state), "source": settings.gpt2_model_name or str(base.path), "step": base.step}


def with_its_base(record: Checkpoint, settings: Config, log: Log) -> Checkpoint:
    """The record itself, or if it holds adapters alone, with the weights of its base: those that the settings name, else those that it
    was trained beside, if they are where they were.

    Raises ConfigError if there are none, CheckpointError if they are another base's.
    """
    if not record.adapters_only:
        if settings.base_checkpoint:
            log(f"BASE_CHECKPOINT is not used: {record.path} holds its base")
        return record
    recorded = str((record.base or {}).get("source"))
    there = recorded if Path(recorded).is_absolute() and Path(recorded).exists() else None
    if not settings.base_checkpoint and settings.gpt2_model_name:
        path = local_folder(settings.gpt2_model_name)
    elif named := settings.base_checkpoint or there or settings.init_from:
        path, notes = ckpt.resolve(named, Path(settings.checkpoint_dir))
        for note in notes:
            log(note)
    else:
        raise ConfigError([f"{record.path} holds adapters alone: {name_the_base(record)}"])
    return with_base(record, ckpt.load(path, optimizer=False))


def lineage(record: Checkpoint, changed: dict[str, Any]) -> dict[str, Any]:
    """Where a run comes from: the checkpoint it began with, and the settings that were changed then (name: [before, now])."""
    file = record.path.name if record.path else None
    return {"run_id": record.run_id, "step": record.step, "save_id": record.save_id, "file": file, "changed": changed}


def agreed(find: Callable[[], Checkpoint | None], world: World, *, optimizer: bool = True) -> Checkpoint | None:
    """What `find` finds in the first process; the others open the same checkpoint. Raises as it does.

    Folders change, and machines that share one may see it change at different times.
    """
    record = world.on_rank0(find)
    path, save = world.broadcast((record.path, record.save_id) if record else (None, None))
    if path is not None and record is None:
        record = ckpt.load(path, optimizer=optimizer)
    if world.any(record is not None and record.save_id != save):
        raise CheckpointError(f"{path}: is another checkpoint on another machine: all must see the same CHECKPOINT_DIR")
    return record


def initial_weights(settings: Config, log: Log, world: World) -> Checkpoint | None:
    """The record whose weights and tokenizer a fresh run begins with, if any."""
    notes: list[str] = []
    if settings.gpt2_model_name:
        name = settings.gpt2_model_name
        record: Checkpoint | None = ckpt.load(world.local_rank0_first(lambda: local_folder(name)), optimizer=False)
    else:
        record = agreed(lambda: init_from(settings, notes), world, optimizer=False)
    if record is None:
        return None
    record = with_tokenizer(with_its_base(record, config.without(settings, ["INIT_FROM"]), log), settings, log)
    for note in [*notes, *record.notes]:
        log(note)
    return record


def init_from(settings: Config, notes: list[str]) -> Checkpoint | None:
    """The checkpoint that INIT_FROM means, if any; what there is to say of the choice goes to `notes`."""
    if settings.init_from is None:
        return None
    path, said = ckpt.resolve(settings.init_from, Path(settings.checkpoint_dir))
    notes.extend(said)
    return ckpt.load(path, optimizer=False)


def with_tokenizer(record: Checkpoint, settings: Config, log: Log) -> Checkpoint:
    """The record itself if it has a tokenizer, else with the one that the settings name.

    That is TOKENIZER=byte or gpt2, or the characters of TRAINING_DATA_SOURCE. Raises CheckpointError if neither is set, also where the
    default text would have as many characters: its alphabet is not the checkpoint's.
    """
    if record.tokenizer is not None:
        return record
    if names_tokenizer(settings):
        return with_kind(record, settings.tokenizer)
    if settings.is_set("TRAINING_DATA_SOURCE"):
        return with_chars(record, sorted(scan_source(settings.training_data_source, log)[1].alphabet))
    for note in record.notes:
        log(note)
    remedy = "set TRAINING_DATA_SOURCE to the text it was trained on, or TOKENIZER=byte or gpt2"
    raise CheckpointError(
        f"{record.path}: carries no tokenizer that can be used: {remedy}, or put its tokenizer.json or meta.pkl beside it"
    )


def names_tokenizer(settings: Config) -> bool:
    """Whether TOKENIZER names one that is complete without a text."""
    return settings.is_set("TOKENIZER") and settings.tokenizer in ("byte", "gpt2")


def shaped_like(weights: Checkpoint, settings: Config) -> Config:
    """The settings with the model and tokenizer that the weights bring; raises ConfigError if others were given.

    A given BLOCK_SIZE may crop the context; not given, INIT_FROM keeps the weights' own and GPT2_MODEL_NAME the default, if it fits.
    """
    own = {name: weights.model_settings[name.lower()] for name in shape_variables(weights.model_settings)}
    own |= adapter_variables(weights.model_settings)
    own |= {"MODEL_TYPE": weights.model_type} | ({"TOKENIZER": weights.tokenizer["kind"]} if weights.tokenizer else {})
    wrong = config.contradictions(settings, own)
    if wrong:
        raise ConfigError(
            [f"{name}={given}: the weights to begin with have {kept}; unset {name}" for name, given, kept in wrong]
        )
    settings, longest = config.from_saved(settings, own), weights.model_settings["block_size"]
    if settings.is_set("BLOCK_SIZE"):
        return settings
    return config.replaced(
        settings, "weights", block_size=longest if settings.init_from else min(longest, settings.block_size)
    )


def shape_variables(model_settings: Iterable[str]) -> list[str]:
    """Return the variables among a model's settings that decide its shape (N_LAYER), besides its vocabulary and context."""
    named = {name.upper() for name in model_settings} - {"BLOCK_SIZE"}
    return [name for name, each in config.VARIABLES.items() if name in named and each.metadata["scope"] == "identity"]


def architecture(settings: Config, *, vocab_size: int) -> dict[str, Any]:
    """Return the model's settings, as models.build takes them: each field that is a variable has its value."""
    names = [each.name for each in dataclasses.fields(models.load(settings.model_type).settings_type)]
    values = {name: getattr(settings, name) for name in names if name.upper() in config.VARIABLES}
    return {"vocab_size": vocab_size} | values | adapters(settings)


def new_model(settings: Config, *, vocab_size: int) -> Model:
    """The model of the settings with fresh weights, drawn from torch's global generator."""
    try:
        return models.build(settings.model_type, architecture(settings, vocab_size=vocab_size))
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def planned(settings: Config) -> Schedule:
    """The learning rates of a whole run of these settings."""
    peak = settings.learning_rate
    tenth = float(f"{peak / 10:.12g}")  # 0.0003, not 0.00030000000000000003: people read it
    lowest = 0.0 if settings.lr_schedule == "linear" else tenth
    floor = lowest if settings.min_learning_rate is None else settings.min_learning_rate
    warmup, end = settings.warmup_steps, settings.training_steps
    return Schedule(kind=settings.lr_schedule, peak=peak, floor=floor, warmup_steps=warmup, start_step=0, end_step=end)


def new_run_id(settings: Config, text_name: str) -> str:
    """A name that no other run has: its start, its model, its text, and four random digits."""
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{settings.model_type}-{text_name}-{os.urandom(2).hex()}"


def read_text(
    settings: Config, log: Log, world: World = SINGLE, *, tokenizer: tokenization.Tokenizer | None
) -> tuple[Text, tokenization.Tokenizer]:
    """The text's tokens, and the tokenizer: the given one, or the one that the settings ask for. The same in every process."""
    corpus, scanned = world.local_rank0_first(lambda: scan_source(settings.training_data_source, log))
    if len(set(world.all_gather(scanned.sha256))) > 1:
        raise DataError(
            f"{settings.training_data_source}: is not the same text on every machine; copy it to all of them"
        )
    if tokenizer is None:
        made = world.on_rank0(lambda: new_tokenizer(settings, corpus, scanned))
        described = world.broadcast(made.to_dict() if made is not None else {})
        tokenizer = made if made is not None else tokenization.from_dict(described)
    fraction, block_size = settings.validation_fraction, settings.block_size
    try:
        tokenizer.encode(scanned.alphabet)  # all at once, before any is met: the message lists every unknown character
        split = world.local_rank0_first(
            lambda: token_files.prepare(
                corpus, scanned, tokenizer, validation_fraction=fraction, cache_dir=CACHE_FOLDER, log=log
            )
        )
    except tokenization.UnknownCharacters as error:
        raise DataError(f"{settings.training_data_source}: {error}") from error
    largest = largest_block_size(len(split.train), len(split.validation) if fraction else 0)
    if block_size > largest:
        held = f"{len(split.train)} tokens to train on, {len(split.validation)} to validate on"
        fits = f"set BLOCK_SIZE={largest} or less, " if largest > 0 else ""
        remedy = f"{fits}take more text, or do without validation (VALIDATION_FRACTION=0)"
        raise DataError(f"BLOCK_SIZE={block_size} is too long for this text ({held}): {remedy}")
    return Text(corpus=corpus, scan=scanned, split=split, validation_fraction=fraction), tokenizer


def new_tokenizer(settings: Config, corpus: Corpus, scanned: Scan) -> tokenization.Tokenizer:
    """The tokenizer that the settings ask for, trained on the text if it is of a kind that is."""
    kind = tokenization.choose(settings.tokenizer, alphabet=scanned.alphabet, pretrained=bool(settings.gpt2_model_name))
    return tokenization.build(
        kind,
        corpus.pieces(),
        alphabet=scanned.alphabet,
        documents=scanned.documents,
        vocab_size=settings.bpe_vocab_size,
    )


@functools.lru_cache(maxsize=2)  # keyed by the log, so by the command: a text that changes later is read again
def scan_source(source: str, log: Log) -> tuple[Corpus, Scan]:
    """The corpus of TRAINING_DATA_SOURCE and its fingerprint; read once however often it is asked for."""
    corpus = open_corpus(source, data_dir=DATA_FOLDER)
    return corpus, cached_scan(corpus, cache_dir=CACHE_FOLDER, log=log)


def put_together(settings: Config, log: Log, world: World, *, device: torch.device, model: Model, text: Text,
                 tokenizer: tokenization.Tokenizer, schedule: Schedule, record: Checkpoint | None = None, window: int = 0) -> Run:  # fmt: skip
    """A run of these parts under a new name: at step 0, or where `record` stands, with its data going on at `window`."""
    if config.frozen_base(settings):
        models.freeze_base(model)
    step = record.step if record else 0
    dtype, compile_step = numerics(settings, log, device=device, model=model)
    engine = choose_engine(settings, world, device=device, model=model, dtype=dtype, record=record)
    forward = shared_out(model, engine, device=device, compile_step=compile_step)
    if engine == "fsdp" and not settings.is_set("CHECKPOINT_LAYOUT") and record is None:
        settings = config.replaced(settings, "plan", checkpoint_layout="sharded")  # each process writes what it has
    rows = {"batch_size": settings.batch_size, "accumulation": settings.gradient_accumulation_steps}
    return Run(
        settings=settings,
        log=log,
        device=device,
        dtype=dtype,
        compile_step=compile_step,
        model=model,
        forward=forward,
        tokenizer=tokenizer,
        optimizer=build_optimizer(
            model,
            settings.optimizer,
            lr=schedule.peak,
            weight_decay=settings.weight_decay,
            betas=(settings.beta1, settings.beta2),
            world=world,
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == "float16"),
        schedule=schedule,
        writer=Writer(background=settings.checkpoint_async, free_memory=hardware.free_main_memory, say=log),
        text=text,
        batches=Batches(
            text.split.train,
            block_size=settings.block_size,
            **rows,
            seed=settings.seed,
            start_step=step,
            start_window=window,
            rows=world.share(settings.batch_size),
        ),
        run_id=world.broadcast(new_run_id(settings, text.corpus.name)),
        world=world,
        engine=engine,
        savers=distributed.new_control_group() if engine == "fsdp" else None,
        step=step,
        saved_step=step,
        tokens_seen=record.tokens_seen if record else 0,
    )


def choose_engine(
    settings: Config,
    world: World,
    *,
    device: torch.device,
    model: Model,
    dtype: str,
    record: Checkpoint | None,
) -> str:
    """How the processes share the work. `auto` is what a checkpoint of as many processes had, else ddp where every process has memory
    for the whole model and its optimizer.
    """
    if world.size == 1:
        return "none"
    before = record.runtime if record else {}
    if settings.distributed != "auto":
        return settings.distributed
    if before.get("processes") == world.size and before.get("distributed") in ("ddp", "fsdp"):
        return str(before["distributed"])
    need = memory_needed(model, settings, world, engine="ddp", device=device, dtype=dtype)
    there = hardware.all_memory(device)
    return "fsdp" if world.any(there is not None and need > there) else "ddp"


def check_shares(settings: Config, world: World) -> None:
    """Raises ConfigError if the processes cannot each have as many rows of a batch."""
    if settings.batch_size % world.size:
        nearest = max(1, round(settings.batch_size / world.size)) * world.size
        problem = f"BATCH_SIZE={settings.batch_size} cannot be shared evenly by {world.size} processes"
        raise ConfigError([f"{problem}: set a multiple of {world.size}, like {nearest}"])


def memory_needed(
    model: Model, settings: Config, world: World, *, engine: str, device: torch.device, dtype: str
) -> int:
    """About how many bytes of the device's memory a training step takes; on a CPU, in all the processes that have it in common."""
    need = models.training_bytes(
        model,
        settings.batch_size // world.size,
        bytes_per_value=4 if dtype == "float32" else 2,
        processes=world.size if engine == "fsdp" else 1,
    )
    return need * (world.local_size if device.type == "cpu" else 1)


def shared_out(model: Model, engine: str, *, device: torch.device, compile_step: bool) -> nn.Module:
    """Brings the model to the device, whole or this process's part of it; returns what the training step calls in its place."""
    if engine == "fsdp":
        distributed.fully_sharded(model, model.blocks(), device)
    else:
        model.to(device)
    forward = hardware.compiled(model) if compile_step else model
    return distributed.data_parallel(forward) if engine == "ddp" else forward


def numerics(settings: Config, log: Log, *, device: torch.device, model: Model) -> tuple[str, bool]:
    """Return the dtype and whether to compile, by fixed rules; a resume finds its checkpoint's resolved values in the settings."""
    compile_step, remark = hardware.choose_compile(
        settings.compile, device, pays=model.compile_pays, steps=settings.training_steps
    )
    if remark:
        log(remark)
    return hardware.choose_dtype(settings.dtype, device, width=getattr(model.settings, "n_embd", 0)), compile_step


def to_record(run: Run) -> Checkpoint:
    """The run as a checkpoint."""
    settings, state, apart = config.to_dict(run.settings), run.model.state_dict(), run.settings.checkpoint_adapters_only
    model_state = {name: tensor for name, tensor in state.items() if models.is_adapter(name)} if apart else state
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
        step=run.step,
        epoch=run.batches.epoch(run.step),
        windows_seen=run.batches.windows_seen(run.step),
        tokens_seen=run.tokens_seen,
        schedule=dataclasses.asdict(run.schedule),
        scaler=run.scaler.state_dict() or None,
        observed_step=run.observed_step,
        validation_loss=run.validation_loss if run.observed_step == run.step else None,
        best_loss=run.best_loss,
        best_step=run.best_step,
        hyperparameters=settings,
        data=run.text.fingerprint(),
        runtime=run.fingerprint(),
        run_id=run.run_id,
        parent=run.parent,
        base=run.base,
        parts=["adapters" if apart else "model"],
    )


def gathered(state: Any, world: World) -> Any:
    """A state with its tensors whole, in the first process's main memory; the others take part and keep nothing."""
    if isinstance(state, dict):
        return {name: gathered(value, world) for name, value in state.items()}
    if not isinstance(state, torch.Tensor):
        return state
    tensor = distributed.full(state)
    return tensor.cpu() if world.is_rank0 else tensor.new_empty(0)
