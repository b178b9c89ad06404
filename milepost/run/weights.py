"""The weights that a run starts with: those of a checkpoint or of a pretrained model, their base, tokenizer and lineage."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from milepost import ckpt, config
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.foreign.importing import IN_CONFIG, lacks_n_head, n_head_problem, with_chars, with_kind, with_n_head
from milepost.ckpt.hub import FOLDER, is_hub_name, is_pinned, local_folder, pinned_name
from milepost.ckpt.record import metadata
from milepost.ckpt.resolving import NONE_SAVED
from milepost.ckpt.restore import name_the_base, with_base
from milepost.ckpt.tensors import digest
from milepost.config import Config, ConfigError
from milepost.mirror.cache import origin
from milepost.remote import local_path
from milepost.run.text import scan_text
from milepost.runtime.distributed import World
from milepost.runtime.progress import Log, shown
from milepost.text.addresses import is_address, is_masked
from milepost.text.known import UNKNOWN_TEXT, Known

# Fields of the adapters' settings; each is a variable, such as LORA_RANK.
ADAPTERS = {
    "lora": ("rank", "alpha", "dropout", "targets"),
    "ttt": ("layers", "base_lr", "mini_batch_size", "initial_gating_alpha"),
}


def initial_weights(settings: Config, log: Log, world: World) -> Checkpoint | None:
    """Return the record whose weights and tokenizer a fresh run starts with, or None for random weights."""
    notes: list[str] = []
    hub_name, name = settings.gpt2_model_name, settings.init_from
    if settings.pretrained:
        pinned = settings.pretrained
        record: Checkpoint | None = _pretrained(world.local_rank0_first(lambda: local_folder(pinned)), notes)
    elif hub_name:
        record = _pretrained(world.local_rank0_first(lambda: local_folder(hub_name)), notes)
    elif name:
        record = agreed(lambda: _named(name, settings, notes, log), world, optimizer=False, everywhere=is_address(name))
    else:
        return None
    assert record is not None  # `load_named` raises
    others = config.without(settings, ["INIT_FROM", "GPT2_MODEL_NAME"])  # they name the record itself, no base
    record = completed(with_its_base(record, others, log), settings, log)
    for note in [*notes, *record.notes]:
        log(note)
    return record


def _named(name: str, settings: Config, notes: list[str], log: Log) -> Checkpoint:
    """Return the checkpoint that INIT_FROM names; add a line on each choice to the notes."""
    path, folder = local_path(name, settings, log), Path(settings.checkpoint_dir)
    try:
        return ckpt.load_named(path, folder, say=notes.append, optimizer=False, verify=True, certain=True)
    except CheckpointError as error:
        if name not in ("latest", "best") or error.kind != "not found":
            raise
        there = (error.remedy or "").removesuffix(NONE_SAVED)
        remedy = f"{there}; INIT_FROM={name} looks in CHECKPOINT_DIR: set INIT_FROM to a checkpoint or its folder"
        raise CheckpointError(error.path or folder, error.problem, remedy, kind=error.kind) from error


def with_pinned(settings: Config, world: World) -> Config:
    """Return the settings, with the commit at which the model of PRETRAINED is now. Raise CheckpointError if the hub has none."""
    if not settings.pretrained:
        return settings
    name = settings.pretrained

    def found() -> str:
        try:
            return pinned_name(name)
        except CheckpointError as error:
            remedy = (error.remedy or "").replace(FOLDER, "set INIT_FROM to a folder with its files")
            raise CheckpointError(name, error.problem, remedy, kind=error.kind) from error

    pinned = world.broadcast(world.on_rank0(found))
    return config.with_values(settings, {"PRETRAINED": pinned}, source=settings.sources["PRETRAINED"])


def _pretrained(folder: Path, notes: list[str]) -> Checkpoint:
    """Return the checkpoint that the folder is, or the latest one in it; add a line on each choice to the notes."""
    return ckpt.load_named(str(folder), folder, say=notes.append, optimizer=False, verify=True, certain=True)


def agreed(
    find: Callable[[], Checkpoint | None], world: World, *, optimizer: bool = True, everywhere: bool = False
) -> Checkpoint | None:
    """Return what `find` finds on rank 0; the other processes open the same checkpoint. Raise as `find` does.

    Rank 0 decides because machines that share a folder may see it change at different times. With `everywhere`, each process
    finds it for itself, as what lies in a cache of its machine.
    """
    record = world.local_rank0_first(find) if everywhere else world.on_rank0(find)
    path, save = world.broadcast((record.path, record.save_id) if record else (None, None))
    if path is not None and record is None:
        record = ckpt.load(path, optimizer=optimizer)
    if world.any(record is not None and record.save_id != save):
        remedy = "name a checkpoint by its step" if everywhere else "all must share one CHECKPOINT_DIR"
        raise CheckpointError(f"{path}: differs between machines: {remedy}")
    return record


def with_its_base(record: Checkpoint, settings: Config, log: Log) -> Checkpoint:
    """Return the record; if it holds only adapters, with the weights of its base, from the settings or else from where
    it was, or where it was moved together with the adapters.

    Raise ConfigError if no base is found, CheckpointError if it is not the recorded one.
    """
    if not record.adapters_only:
        if settings.base_checkpoint:
            log(f"BASE_CHECKPOINT is not used: {record.path} holds its base")
        if settings.init_from:
            log(f"INIT_FROM is not used: {record.path} holds all its weights")
        return record
    path = _base_path(record, settings, log)
    whole = with_base(record, ckpt.load(path, optimizer=False))
    if record.base and _is_gone(record.base):  # what this run saves names the place where the base is now
        whole.base = {**record.base, "source": settings.gpt2_model_name or origin(path) or str(Path(path).absolute())}
    return whole


def _base_path(record: Checkpoint, settings: Config, log: Log) -> Path:
    """Return the path of the base that the settings name, or that the record's adapters record. Raise as `with_its_base` does."""
    if settings.gpt2_model_name and not settings.base_checkpoint:
        return local_folder(settings.gpt2_model_name)
    base, named = record.base or {}, settings.base_checkpoint
    whose = shown(record.path) if record.path else "the adapters"
    if not named and base and record.path:
        there = ckpt.find_base(base, record.path, run_id=record.run_id)
        if there and str(there) != base.get("source"):
            log(f"the base of {whose} is found in {shown(there)}")
        named = str(there) if there else None
    if named := named or settings.init_from or _address(base):
        named = local_path(named, settings, log)
        if there := _base_in_folder(record, named):
            log(f"the base of {whose} is {shown(there)}")
            return there
        path, notes = ckpt.resolve(named, Path(settings.checkpoint_dir))
        for note in notes:
            log(note)
        return path
    source = base.get("source")
    if is_pinned(source) or (base.get("sha256") and is_hub_name(source)):  # the hash tells whether its branch has moved
        log(f"the base of {whose} is {source} of the hub")
        return local_folder(str(source))
    raise ConfigError([f"{record.path} holds only adapters: {name_the_base(record, replaced=ckpt.is_replaced(base))}"])


def _address(base: Mapping[str, Any]) -> str | None:
    """Return the address in a mirror that a base records, if it can be opened: a part of it may have been secret."""
    source = str(base.get("source"))
    return source if is_address(source) and not is_masked(source) else None


def _is_gone(base: Mapping[str, Any]) -> bool:
    """Return whether the path that a base records leads nowhere, or to a checkpoint of another step. A name of the hub is not a path."""
    source = Path(str(base.get("source")))
    return source.is_absolute() and (not source.exists() or ckpt.is_replaced(dict(base)))


def _base_in_folder(record: Checkpoint, named: str | None) -> Path | None:
    """Return the checkpoint that is the record's base, if a folder of checkpoints is named that holds it."""
    folder = ckpt.whole_folder(named) if named else None
    return ckpt.base_in(record.base, folder) if folder and record.base else None


def identity(base: Checkpoint, settings: Config) -> dict[str, Any]:
    """Return what identifies a base (the sha256 of its weights), and its source."""
    name = settings.pretrained or settings.gpt2_model_name
    path = base.path and (origin(base.path) or str(base.path))
    source = name if name and not Path(name).expanduser().is_dir() else path
    return {"sha256": digest(base.model_state), "source": source, "step": base.step}


def lineage(record: Checkpoint, changed: dict[str, Any]) -> dict[str, Any]:
    """Return the origin of a child run: its first checkpoint, and the settings changed there ({name: [before, now]})."""
    file = record.path.name if record.path else None
    return {"run_id": record.run_id, "step": record.step, "save_id": record.save_id, "file": file, "changed": changed}


def completed(record: Checkpoint, settings: Config, log: Log) -> Checkpoint:
    """Return the record with what another program's file lacks and the settings name: number of heads and tokenizer.

    Raise CheckpointError if they do not name it.
    """
    return with_tokenizer(with_heads(record, settings), settings, log)


def with_heads(record: Checkpoint, settings: Config) -> Checkpoint:
    """Return the record, with N_HEAD if it lacks n_head. Raise CheckpointError if N_HEAD is not set, or does not fit."""
    if not lacks_n_head(metadata(record)):
        return record
    if not (settings.is_set("N_HEAD") and settings.n_head):
        raise n_head_problem(record, remedy=f"set N_HEAD, or {IN_CONFIG}")
    return with_n_head(record, settings.n_head)


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

    BLOCK_SIZE may crop the context. If it is not set, INIT_FROM keeps the weights' block size, PRETRAINED and GPT2_MODEL_NAME
    the default, if it fits.
    """
    own = {name: weights.model_settings[name.lower()] for name in shape_variables(weights.model_settings)}
    own |= adapter_variables(weights.model_settings)
    own |= {"MODEL_TYPE": weights.model_type} | ({"TOKENIZER": weights.tokenizer["kind"]} if weights.tokenizer else {})
    wrong = config.contradictions(settings, own)
    if wrong:
        raise ConfigError(
            [f"{name}={requested}: the initial weights have {saved}; unset {name}" for name, requested, saved in wrong]
        )
    longest = weights.model_settings["block_size"]
    own["BLOCK_SIZE"] = longest if settings.init_from else min(longest, settings.block_size)
    return config.from_saved(settings, own)


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
