"""`Run`, and how to build one: from random weights, from pretrained weights, or from the parts of a checkpoint."""

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
from milepost.runtime.progress import Log, Metrics, Progress, amount
from milepost.runtime.trackers import Mirror
from milepost.text import token_files, tokenization
from milepost.text.batches import Batches, largest_block_size
from milepost.text.chunks import LongWordError
from milepost.text.corpus import Corpus
from milepost.text.errors import DataError
from milepost.text.known import NORMALIZED, UNKNOWN_TEXT, Known, known_text, open_text
from milepost.text.scan import Scan
from milepost.text.unknown import encoder_of
from models.model import Model
from models.sizes import size_of

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"
CACHE_FOLDER = DATA_FOLDER / ".cache" / "tokens"
TRY_INSTEAD = "try a lower LEARNING_RATE, a longer WARMUP_STEPS or GRAD_CLIP=1"  # where training diverges
# Fields of the adapters' settings; each is a variable, such as LORA_RANK.
ADAPTERS = {
    "lora": ("rank", "alpha", "dropout", "targets"),
    "ttt": ("layers", "base_lr", "mini_batch_size", "initial_gating_alpha"),
}


@dataclass(frozen=True, kw_only=True)
class Text:
    """The training text: its fingerprint, and the tokens of both splits."""

    corpus: Corpus
    scan: Scan
    split: token_files.TokenSplit
    validation_fraction: float
    unknown: str | None = None  # what was done with characters that the vocabulary lacks; None: it has all

    def fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint records to recognize the text."""
        return {
            "source": self.corpus.source,
            "name": self.corpus.name,
            "sha256": self.scan.sha256,
            "characters": self.scan.characters,
            "validation_fraction": self.validation_fraction,
            **({} if self.corpus.reading.verbatim else NORMALIZED),
            **({"unknown_characters": self.unknown} if self.unknown else {}),
        }


@dataclass(kw_only=True)
class Saved:
    """What of a run is on the disk.

    The thread that saves in the background updates `best_step`, `path` and `failed`.
    """

    step: int = 0  # of the last regular checkpoint
    observed_step: int | None = None  # the run's `observed_step` in that checkpoint
    best_step: int | None = None  # the run's best step, once it is in best/
    path: Path | None = None  # the last regular checkpoint written
    failed: bool = False  # whether the last regular save failed


@dataclass(kw_only=True, eq=False)
class Run:
    """One training: everything that the loop reads and changes. A step is one optimizer update."""

    settings: Config
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
    schedule: Schedule
    writer: Writer
    # Data.
    text: Text
    batches: Batches
    # Processes.
    world: World = SINGLE
    engine: str = "none"  # how the processes share the work: none, ddp or fsdp
    savers: Any = None  # their group for saving in the background
    # Identity and origin.
    run_id: str
    parent: dict[str, Any] | None = None  # of a child run: where it branched off, and with which settings
    base: dict[str, Any] | None = None  # of adapters: sha256 and source of the frozen weights
    resumed_save: float = math.inf  # when the checkpoint that this run resumes from was saved (Unix seconds)

    # Progress: moves in the loop, and a checkpoint records it.
    step: int = 0
    tokens_seen: int = 0
    observed_step: int | None = None  # the last step that was evaluated and sampled
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    # Moves in the loop, and a checkpoint does not record it.
    saved: Saved = field(default_factory=Saved)
    skipped_updates: int = 0  # consecutive float16 updates that overflowed
    updating: bool = False  # during the optimizer's update
    last_sample: str | None = None
    reported: set[str] = field(default_factory=set)  # files whose write errors were logged

    # Opened when training begins.
    metrics: Metrics = field(init=False)
    mirror: Mirror = field(init=False)
    progress: Progress = field(init=False)

    @property
    def folder(self) -> Path:
        """RUNS_DIR/<run_id>: metrics, samples and the log of this run."""
        return Path(self.settings.runs_dir) / self.run_id

    @property
    def saves_parts(self) -> bool:
        """Whether each process saves its own part of the weights; else rank 0 saves everything."""
        return self.engine == "fsdp" and self.settings.checkpoint_layout == "sharded"

    @property
    def best_is_pending(self) -> bool:
        """Whether the best step should be in best/ and is not, as far as rank 0 knows."""
        enabled = self.settings.enable_checkpoints and self.settings.checkpoint_keep_best > 0
        return enabled and self.best_step not in (None, self.saved.best_step)

    @property
    def end(self) -> int:
        """The last step of the run."""
        return self.settings.training_steps

    def fingerprint(self) -> dict[str, Any]:
        """Return the hardware, versions and numerics that affect bitwise reproducibility."""
        return hardware.fingerprint(
            self.device,
            dtype=self.dtype,
            compile_step=self.compile_step,
            deterministic=self.settings.deterministic,
            processes=self.world.size,
            local_processes=self.world.local_size,
            distributed=self.engine,
        )


def is_due(run: Run, *names: str) -> bool:
    """Return whether any of `names` (eval, sample, log, checkpoint) is due at this step by its interval.

    At the last step all are.
    """
    return any(ckpt.due(run.step, getattr(run.settings, f"{name}_interval"), last=run.end) for name in names)


def fresh(settings: Config, log: Log, world: World = SINGLE) -> Run:
    """Return a run at step 0 with random weights, or with those of GPT2_MODEL_NAME or INIT_FROM."""
    device = hardware.choose_device(settings.device, local_rank=world.local_rank, local_size=world.local_size)
    hardware.make_deterministic(settings.deterministic, device)
    weights = initial_weights(settings, log, world)
    if weights:
        settings = with_model_of(weights, settings)
    check_batch_size(settings, world)
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
            dropout=settings.dropout,
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
        settings, log, world, device=device, model=model, text=text, tokenizer=tokenizer, schedule=planned(settings)
    )
    if weights:
        run.parent, run.base = lineage(weights, {}), base
    return run


def build_device(device: torch.device, world: World) -> torch.device:
    """Return where to build a model: in main memory with several processes, because one device may not hold all weights
    before sharding.
    """
    return device if world.size == 1 else torch.device("cpu")


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def adapters(settings: Config) -> dict[str, Any]:
    """Return the enabled adapters as the model's settings name them: {"lora": {"rank": 8, ...}}."""
    on = {"lora": settings.lora_rank > 0, "ttt": settings.ttt_layers is not None}
    return {
        kind: {name: getattr(settings, f"{kind}_{name}") for name in names}
        for kind, names in ADAPTERS.items()
        if on[kind]
    }


def adapter_variables(model_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of a model's adapters: {"LORA_RANK": 8, ...}."""
    return {
        f"{kind}_{name}".upper(): value for kind in ADAPTERS for name, value in (model_settings.get(kind) or {}).items()
    }


def identity(base: Checkpoint, settings: Config) -> dict[str, Any]:
    """Return what identifies a base (the sha256 of its weights), and its source."""
    return {"sha256": digest(base.model_state), "source": settings.gpt2_model_name or str(base.path), "step": base.step}


def with_its_base(record: Checkpoint, settings: Config, log: Log) -> Checkpoint:
    """Return the record; if it holds only adapters, with the weights of its base, from the settings or else from where
    it was trained.

    Raise ConfigError if no base is found, CheckpointError if it is not the recorded one.
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
        raise ConfigError([f"{record.path} holds only adapters: {name_the_base(record)}"])
    return with_base(record, ckpt.load(path, optimizer=False))


def lineage(record: Checkpoint, changed: dict[str, Any]) -> dict[str, Any]:
    """Return the origin of a child run: its first checkpoint, and the settings changed there ({name: [before, now]})."""
    file = record.path.name if record.path else None
    return {"run_id": record.run_id, "step": record.step, "save_id": record.save_id, "file": file, "changed": changed}


def agreed(find: Callable[[], Checkpoint | None], world: World, *, optimizer: bool = True) -> Checkpoint | None:
    """Return what `find` finds on rank 0; the other processes open the same checkpoint. Raise as `find` does.

    Rank 0 decides because machines that share a folder may see it change at different times.
    """
    record = world.on_rank0(find)
    path, save = world.broadcast((record.path, record.save_id) if record else (None, None))
    if path is not None and record is None:
        record = ckpt.load(path, optimizer=optimizer)
    if world.any(record is not None and record.save_id != save):
        raise CheckpointError(f"{path}: differs between machines: all must share one CHECKPOINT_DIR")
    return record


def initial_weights(settings: Config, log: Log, world: World) -> Checkpoint | None:
    """Return the record whose weights and tokenizer a fresh run starts with, or None for random weights."""
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
    """Return the checkpoint of INIT_FROM, or None; append remarks on the choice to `notes`."""
    if settings.init_from is None:
        return None
    path, remarks = ckpt.resolve(settings.init_from, Path(settings.checkpoint_dir))
    notes.extend(remarks)
    return ckpt.load(path, optimizer=False)


def with_tokenizer(record: Checkpoint, settings: Config, log: Log) -> Checkpoint:
    """Return the record, with the tokenizer that the settings name if it has none.

    That is TOKENIZER=byte or gpt2, or the characters of TRAINING_DATA_SOURCE. Raise CheckpointError if neither is set,
    even if the alphabet of the default text has the right size: an equal size does not make it the checkpoint's
    alphabet.
    """
    if record.tokenizer is not None:
        return record
    if names_complete_tokenizer(settings):
        return with_kind(record, settings.tokenizer)
    if settings.is_set("TRAINING_DATA_SOURCE"):
        return with_chars(record, alphabet_of(settings, log, size=record.model_settings["vocab_size"]))
    for note in record.notes:
        log(note)
    remedy = "set TRAINING_DATA_SOURCE to the text it was trained on, or TOKENIZER=byte or gpt2"
    raise CheckpointError(
        f"{record.path}: carries no usable tokenizer: {remedy}, or put its tokenizer.json or meta.pkl beside it"
    )


def alphabet_of(settings: Config, log: Log, *, size: int) -> list[str]:
    """Return the sorted characters of TRAINING_DATA_SOURCE: of the text as it is, if only then there are `size` of them."""
    found = [scan_text(settings, log, known)[1].alphabet for known in (UNKNOWN_TEXT, Known(carriage_returns=True))]
    return sorted(next((alphabet for alphabet in found if len(alphabet) == size), found[0]))


def names_complete_tokenizer(settings: Config) -> bool:
    """Return whether TOKENIZER names a tokenizer that needs no text."""
    return settings.is_set("TOKENIZER") and settings.tokenizer in ("byte", "gpt2")


def with_model_of(weights: Checkpoint, settings: Config) -> Config:
    """Return the settings with the model and tokenizer of the weights. Raise ConfigError if the settings contradict
    them.

    BLOCK_SIZE may crop the context. If it is not set, INIT_FROM keeps the weights' block size and GPT2_MODEL_NAME the
    default, if it fits.
    """
    own = {name: weights.model_settings[name.lower()] for name in shape_variables(weights.model_settings)}
    own |= adapter_variables(weights.model_settings)
    own |= {"MODEL_TYPE": weights.model_type} | ({"TOKENIZER": weights.tokenizer["kind"]} if weights.tokenizer else {})
    wrong = config.contradictions(settings, own)
    if wrong:
        raise ConfigError(
            [f"{name}={requested}: the initial weights have {saved}; unset {name}" for name, requested, saved in wrong]
        )
    settings, longest = config.from_saved(settings, own), weights.model_settings["block_size"]
    if settings.is_set("BLOCK_SIZE"):
        return settings
    return config.replaced(
        settings, "weights", block_size=longest if settings.init_from else min(longest, settings.block_size)
    )


def shape_variables(model_settings: Iterable[str]) -> list[str]:
    """Return the variables among a model's settings that decide its shape (N_LAYER), besides its vocabulary and
    context.
    """
    named = {name.upper() for name in model_settings} - {"BLOCK_SIZE"}
    return [
        name
        for name, variable in config.VARIABLES.items()
        if name in named and variable.metadata["scope"] == "identity"
    ]


def architecture(settings: Config, *, vocab_size: int) -> dict[str, Any]:
    """Return the model's settings, as models.build takes them: each field that is a variable has its value."""
    names = [field.name for field in dataclasses.fields(models.load(settings.model_type).settings_type)]
    values = {name: getattr(settings, name) for name in names if name.upper() in config.VARIABLES}
    return {"vocab_size": vocab_size} | values | adapters(settings)


def check_size(settings: Config, world: World, *, vocab_size: int, device: torch.device) -> None:
    """Raise ConfigError if a new model does not fit into the free main memory, before it is built.

    On a CPU its gradients must fit too; each process of a machine builds it whole.
    """
    values = architecture(settings, vocab_size=vocab_size)
    named = [f"{name}={values[name.lower()]}" for name in shape_variables(values) if type(values[name.lower()]) is int]
    remedy = f"lower one of {', '.join(named)}" if named else "use a smaller vocabulary"
    try:
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


def planned(settings: Config) -> Schedule:
    """Return the learning-rate schedule of a whole run."""
    peak = settings.learning_rate
    tenth = float(f"{peak / 10:.12g}")  # 0.0003, not 0.00030000000000000003
    lowest = 0.0 if settings.lr_schedule == "linear" else tenth
    floor = lowest if settings.min_learning_rate is None else settings.min_learning_rate
    warmup, end = settings.warmup_steps, settings.training_steps
    return Schedule(kind=settings.lr_schedule, peak=peak, floor=floor, warmup_steps=warmup, start_step=0, end_step=end)


def new_run_id(settings: Config, text_name: str) -> str:
    """Return a unique name: start time, model, text, and four random hex digits."""
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{settings.model_type}-{text_name}-{os.urandom(2).hex()}"


def read_text(
    settings: Config, log: Log, world: World = SINGLE, *, record: Checkpoint | None = None
) -> tuple[Text, tokenization.Tokenizer]:
    """Return the training text and its tokenizer: the record's, or else that of the settings. Equal in every process."""
    known = known_text(record.data, record.tokenizer) if record else UNKNOWN_TEXT
    corpus, scanned = world.local_rank0_first(lambda: scan_text(settings, log, known))
    if len(set(world.all_gather(scanned.sha256))) > 1:
        raise DataError(f"{corpus.source}: differs between machines; copy the same text to all of them")
    if record:
        tokenizer = build_tokenizer(record)
    else:
        made = world.on_rank0(lambda: new_tokenizer(settings, corpus, scanned))
        described = world.broadcast(made.to_dict() if made is not None else {})
        tokenizer = made if made is not None else tokenization.from_dict(described)
        if tokenizer.kind == "char" and settings.tokenizer == "auto":
            log(
                f"only these {tokenizer.vocab_size} characters are known to the model; TOKENIZER=byte or bpe takes any text"
            )
    fraction, block_size = settings.validation_fraction, settings.block_size
    mode: Any = settings.unknown_characters
    try:
        encoder, remark = world.local_rank0_first(
            lambda: encoder_of(tokenizer, corpus, scanned, mode=mode, cache_dir=CACHE_FOLDER)
        )
        split = world.local_rank0_first(
            lambda: token_files.prepare(
                corpus, scanned, encoder, validation_fraction=fraction, cache_dir=CACHE_FOLDER, log=log
            )
        )
    except tokenization.UnknownCharacters as error:
        remedy = "set UNKNOWN_CHARACTERS=skip or replace, or train a new model with TOKENIZER=byte or bpe"
        raise DataError(f"{corpus.source}: {error}: {remedy}") from error
    if remark:
        log(remark)
    largest = largest_block_size(len(split.train), len(split.validation) if fraction else 0)
    if block_size > largest:
        held = f"{len(split.train)} tokens to train on, {len(split.validation)} to validate on"
        fits = f"set BLOCK_SIZE={largest} or less, " if largest > 0 else ""
        remedy = f"{fits}use more text, or train without validation (VALIDATION_FRACTION=0)"
        raise DataError(f"BLOCK_SIZE={block_size} is too long for this text ({held}): {remedy}")
    text = Text(
        corpus=corpus, scan=scanned, split=split, validation_fraction=fraction, unknown=mode if remark else None
    )
    return text, tokenizer


def new_tokenizer(settings: Config, corpus: Corpus, scanned: Scan) -> tokenization.Tokenizer:
    """Return the tokenizer that the settings ask for; a BPE tokenizer is trained on the text."""
    kind = tokenization.choose(settings.tokenizer, alphabet=scanned.alphabet, pretrained=bool(settings.gpt2_model_name))
    alphabet, documents, vocab_size = scanned.alphabet, scanned.documents, settings.bpe_vocab_size
    try:
        return tokenization.build(kind, corpus.pieces(), alphabet=alphabet, documents=documents, vocab_size=vocab_size)
    except LongWordError as error:
        raise DataError(f"{corpus.source}: {error}") from error


def scan_text(settings: Config, log: Log, known: Known = UNKNOWN_TEXT) -> tuple[Corpus, Scan]:
    """Return TRAINING_DATA_SOURCE and its fingerprint, in the form in which it is the known text."""
    return scan_source(settings.training_data_source, log, text_field=settings.text_field, known=known)


@functools.lru_cache(maxsize=4)  # the log in the key makes every command read a changed text again
def scan_source(source: str, log: Log, *, text_field: str = "text", known: Known = UNKNOWN_TEXT) -> tuple[Corpus, Scan]:
    """Return a text source and its fingerprint, in the form in which it is the known text. Cached for the command."""
    corpus, scanned = open_text(
        source, data_dir=DATA_FOLDER, cache_dir=CACHE_FOLDER, text_field=text_field, known=known, log=log
    )
    for line in (*corpus.skipped, *scanned.notes):
        _log_once(line, log)
    return corpus, scanned


@functools.lru_cache(maxsize=64)
def _log_once(line: str, log: Log) -> None:
    log(line)


def assemble(settings: Config, log: Log, world: World, *, device: torch.device, model: Model, text: Text,
                 tokenizer: tokenization.Tokenizer, schedule: Schedule, record: Checkpoint | None = None, window: int = 0) -> Run:  # fmt: skip
    """Return a run of these parts with a new id: at step 0, or at the step of `record` with its data continuing at
    `window`.
    """
    if config.frozen_base(settings):
        models.freeze_base(model)
    step = record.step if record else 0
    dtype, compile_step = numerics(settings, log, device=device, model=model)
    engine = choose_engine(settings, world, device=device, model=model, dtype=dtype, record=record)
    forward = distribute(model, engine, device=device, compile_step=compile_step)
    if engine == "fsdp" and not settings.is_set("CHECKPOINT_LAYOUT") and record is None:
        settings = config.replaced(settings, "plan", checkpoint_layout="sharded")  # each process writes its part
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
        saved=Saved(step=step),
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


def check_batch_size(settings: Config, world: World) -> None:
    """Raise ConfigError if BATCH_SIZE is not a multiple of the number of processes."""
    if settings.batch_size % world.size:
        nearest = max(1, round(settings.batch_size / world.size)) * world.size
        problem = f"BATCH_SIZE={settings.batch_size} cannot be split evenly between {world.size} processes"
        raise ConfigError([f"{problem}: set a multiple of {world.size}, for example {nearest}"])


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


def distribute(model: Model, engine: str, *, device: torch.device, compile_step: bool) -> nn.Module:
    """Move the model, or this process's shard of it, to the device; return the module that the training step calls."""
    if engine == "fsdp":
        distributed.fully_sharded(model, model.blocks(), device)
    else:
        model.to(device)
    forward = hardware.compiled(model) if compile_step else model
    return distributed.data_parallel(forward) if engine == "ddp" else forward


def numerics(settings: Config, log: Log, *, device: torch.device, model: Model) -> tuple[str, bool]:
    """Return the dtype and whether to compile, by fixed rules.

    A resume finds the resolved values of its checkpoint in the settings.
    """
    compile_step, remark = hardware.choose_compile(
        settings.compile, device, pays=model.compile_pays, steps=settings.training_steps
    )
    if remark:
        log(remark)
    return hardware.choose_dtype(settings.dtype, device, width=getattr(model.settings, "n_embd", 0)), compile_step


def to_record(run: Run) -> Checkpoint:
    """Return the run as a checkpoint. With sharded weights all processes must call it."""
    state, adapters_only = run.model.state_dict(), run.settings.checkpoint_adapters_only
    model_state = (
        {name: tensor for name, tensor in state.items() if models.is_adapter(name)} if adapters_only else state
    )
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
        hyperparameters=config.to_dict(run.settings),
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
