"""Rebuild model, tokenizer and optimizer state from a Checkpoint."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import models
from milepost.ckpt.foreign.importing import lacks_n_head, n_head_problem
from milepost.ckpt.record import EARLIER, Checkpoint, CheckpointError, metadata
from milepost.ckpt.saved_tokenizer import build_tokenizer as build_tokenizer
from milepost.ckpt.saved_tokenizer import where_of
from milepost.ckpt.tensors import digest
from milepost.runtime.distributed import sharded_like
from milepost.runtime.muon import Muon
from milepost.runtime.optim import parts
from models.lora import LoraSettings
from models.lora import merged as merged_weights
from models.model import Model
from models.sizes import Size, layer_size, skeleton

SHOWN = 10  # names and shapes listed in a message

# State of a parameter in the optimizers that work only with exactly these keys. Other optimizers take what they saved.
STATE_OF = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return how many bytes of moments a checkpoint of the optimizer holds; of an unknown one two float32 values for each of
    its parameters, as of AdamW.
    """
    total = 0
    for part in parts(optimizer):
        moments = STATE_OF.get(type(part), STATE_OF[torch.optim.AdamW]) - {"step"}
        total += 4 * len(moments) * sum(parameter.numel() for _, parameter in _named(part))
    return total


@dataclass(frozen=True)
class Restored:
    """Number of parameters with restored state, number of all parameters, and the names of those without."""

    restored: int
    total: int
    missing: tuple[str, ...]


def build_model(
    record: Checkpoint,
    *,
    device: torch.device,
    block_size: int | None = None,
    changes: Mapping[str, Any] | None = None,
    shared: bool = False,
    adapters: Mapping[str, Any] | None = None,
    take: bool = False,
) -> Model:
    """Return the record's model with its weights, in float32 on `device`; a smaller `block_size` crops positions.

    `changes` are settings that replace the recorded ones, such as dropout, where the model has them.
    `adapters` (settings by kind, see models.ADAPTERS) adds new adapters, drawn from torch's global generator. `shared`
    keeps the weights mapped from the checkpoint's file, for a model that is not trained. `take` moves the weights out
    of a record that owns them, which avoids a second copy in memory and leaves the record empty. Raise CheckpointError
    listing names and shapes if the weights do not match the recorded settings.
    """
    if record.adapters_only:
        raise CheckpointError(where_of(record), "holds only adapters", name_the_base(record), kind="lacking")
    if lacks_n_head(metadata(record)):
        raise n_head_problem(record)
    settings = {**record.model_settings, **(adapters or {})}
    state = dict(record.model_state)
    if block_size is not None and block_size != settings["block_size"]:
        _check_crop(block_size, settings["block_size"], where=where_of(record))
        state |= {name: table.clone() for name, table in _cropped(record.model_type, state, block_size).items()}
        settings["block_size"] = block_size
    try:
        settings |= {
            name: value for name, value in (changes or {}).items() if name in models.fields_of(record.model_type)
        }
        _check_layers(record, state)
        # Without memory or random draws: its weights are replaced at once.
        model = skeleton(record.model_type, settings)
    except (ValueError, TypeError, RuntimeError) as error:  # the last for a shape with too many elements
        reason = f"{str(error).splitlines()[0]:.300}"  # torch adds frames of C++
        problem = f"its settings do not build a model: {reason}"
        raise _misfit(record, problem) from error
    wanted = model.state_dict()
    added = {kind for kind in adapters or () if not record.model_settings.get(kind)}
    fresh = {name for name in wanted if models.adapter_kind(name) in added}
    _check_shapes({name: wanted[name] for name in wanted if name not in fresh}, state, record)
    if shared or (take and record.owned):
        if take:
            record.model_state = {}  # frees each tensor as soon as it is converted
        state |= {name: torch.empty(wanted[name].shape) for name in fresh}
        model.load_state_dict({name: state.pop(name).float() for name in list(state)}, assign=True)
        _fill_buffers(model, record.model_type, settings)
        model.to(device)
    else:
        model.to_empty(device=device)
        model.load_state_dict(state, strict=not fresh)
        _fill_buffers(model, record.model_type, settings)
    models.draw_adapters(model, fresh)
    return model


def _fill_buffers(model: Model, model_type: str, settings: Mapping[str, Any]) -> None:
    """Set the buffers that are not saved (`persistent=False`) to their initial values."""
    saved = model.state_dict().keys()
    unsaved = [name for name, _ in model.named_buffers() if name not in saved]
    if not unsaved:
        return
    with torch.random.fork_rng(devices=[]):
        initial = dict(models.build(model_type, settings).named_buffers())
    for name in unsaved:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, initial[name].to(next(model.parameters()).device))


def with_base(record: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Return adapters with the weights of their base added; raise CheckpointError if `base` is another base."""
    recorded = (record.base or {}).get("sha256")
    found = digest(base.model_state)
    if recorded is None and not base.adapters_only:
        record.notes.append(f"{where_of(record)}: does not record its base; {where_of(base)} is used, as set")
    elif base.adapters_only or found != recorded:
        other = f"has other weights (sha256 {found[:16]}..., not {str(recorded)[:16]}...)"
        reason = "holds adapters itself" if base.adapters_only else other
        problem = f"is not the base of {where_of(record)}: it {reason}"
        remedy = name_the_base(record, replaced=str(base.path) == (record.base or {}).get("source"))
        raise CheckpointError(where_of(base), problem, remedy, kind="refused")
    block_size = record.model_settings["block_size"]
    state = base.model_state | _cropped(record.model_type, base.model_state, block_size)
    return dataclasses.replace(
        record,
        model_state=state | record.model_state,
        parts=["model", *record.parts[1:]],
        notes=[*base.notes, *record.notes],
    )


def name_the_base(record: Checkpoint, *, replaced: bool = False) -> str:
    """Return the remedy for adapters without their base; `replaced` if other weights are at its place now."""
    base = record.base or {}
    if replaced:
        then = f"step {base.get('step')}, which was {base['source']} when they were trained"
        return f"set BASE_CHECKPOINT to a copy of their base ({then}; other weights are there now)"
    trained_on = (
        f"the base that they were trained on ({base['source']})"
        if base.get("source")
        else "the base that they were trained on"
    )
    return f"set GPT2_MODEL_NAME or BASE_CHECKPOINT to {trained_on}"


def merged(record: Checkpoint) -> Checkpoint:
    """Return the record with the LoRA products added to the weights: an equivalent model without adapters."""
    if not record.model_settings.get("lora"):
        return record
    settings = {name: value for name, value in record.model_settings.items() if name != "lora"}
    try:
        lora = LoraSettings(**record.model_settings["lora"])
        state = merged_weights(record.model_state, lora)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        problem = f"its adapters cannot be merged ({error})"
        raise CheckpointError(where_of(record), problem, EARLIER, kind="damaged") from error
    return dataclasses.replace(record, model_state=state, model_settings=settings, optimizer_state=None, base=None)


def _check_crop(block_size: int, positions: int, *, where: str) -> None:
    if block_size > positions:
        problem = f"BLOCK_SIZE={block_size} is more than its {positions} positions"
        raise CheckpointError(where, problem, f"set BLOCK_SIZE={positions} or less", kind="refused")


def _cropped(model_type: str, state: Mapping[str, Tensor], block_size: int) -> dict[str, Tensor]:
    """Return the first `block_size` rows of each position embedding in the state."""
    try:
        tables = models.load(model_type).position_tables
    except ValueError:  # an unknown model is refused where it is built
        return {}
    return {name: state[name][:block_size] for name in tables if name in state and state[name].dim()}


def _check_layers(record: Checkpoint, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if n_layer needs more tensors or numbers than exist: layers take memory even without weights.

    No other setting costs time or memory. Twice the numbers are let through: which tensor is missing is reported later.
    """
    layers = record.model_settings.get("n_layer")
    if not isinstance(layers, int) or layers < 3:
        return
    held = [tensor.numel() for tensor in state.values() if tensor.numel()]  # empty tensors take no space in a file
    one = layer_size(record.model_type, record.model_settings) if layers <= len(held) else Size(1, 1)
    if layers * one.tensors > len(held):
        problem = f"n_layer is {layers}, but it holds only {len(held)} tensors with numbers"
    elif layers * one.elements > 2 * sum(held):
        problem = f"n_layer is {layers}, but it holds only {sum(held)} numbers"
    else:
        return
    raise _misfit(record, f"its settings do not fit its weights: {problem}")


def _misfit(record: Checkpoint, problem: str) -> CheckpointError:
    """Return the error of settings and weights that are not of one model: damage, unless another program's files were put together."""
    if record.written_by.startswith("another program"):
        remedy = "put the config there that was saved with these weights"
        return CheckpointError(where_of(record), problem, remedy, kind="not understood")
    return CheckpointError(where_of(record), problem, EARLIER, kind="damaged")


def _check_shapes(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], record: Checkpoint) -> None:
    problems = [f"{name} {tuple(tensor.shape)} is missing" for name, tensor in wanted.items() if name not in found]
    problems += [
        f"{name} {tuple(tensor.shape)} is not expected" for name, tensor in found.items() if name not in wanted
    ]
    problems += [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        problem = f"its weights do not fit its settings: {'; '.join(problems[:SHOWN])}{more}"
        raise _misfit(record, problem)


def restore_optimizer(optimizer: torch.optim.Optimizer, record: Checkpoint, *, kind: str | None = None) -> Restored:
    """Load the record's optimizer state into `optimizer`, matched by parameter name and shape.

    `kind` is the registered name of the optimizer. AdamW and Muon take exactly their own state; other optimizers take
    any dense tensors and numbers, provided the record was saved by the same `kind`. Learning rate, weight decay and
    betas stay those of `optimizer`: torch's `load_state_dict` would overwrite them, and checks almost nothing.
    """
    saved, same = _state_by_name(record), kind is not None and record.hyperparameters.get("OPTIMIZER") == kind
    state: dict[str, dict[str, Any]] = {}
    for part in parts(optimizer):
        for name, parameter in _named(part):
            shape = record.model_state[name].shape if name in record.model_state else None
            known = same and shape == parameter.shape
            if _fits(saved.get(name), parameter.shape, STATE_OF.get(type(part)), known=known):
                state[name] = {key: _copied(value, parameter) for key, value in saved[name].items()}
    current = optimizer.state_dict()
    names = {
        index: name
        for group in current["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }
    loaded = {index: state[name] for index, name in names.items() if name in state}
    optimizer.load_state_dict({"state": loaded, "param_groups": current["param_groups"]})
    for part in parts(optimizer):
        _keep_dtypes(part, state)
    return Restored(len(loaded), len(names), tuple(name for name in names.values() if name not in state))


def _named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of the optimizer with its name."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def _copied(value: Any, parameter: Tensor) -> Any:
    """Copy a value: the record's tensors are mapped from the file, and the optimizer updates its state in place."""
    if not isinstance(value, Tensor):
        return value
    return sharded_like(value, parameter) if value.shape == parameter.shape else value.clone()


def _keep_dtypes(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Restore the saved dtypes: torch's `load_state_dict` casts all but `step` to the parameter's dtype."""
    if type(optimizer) in STATE_OF:
        return
    for name, parameter in _named(optimizer):
        for key, value in state.get(name, {}).items():
            if isinstance(value, Tensor) and optimizer.state[parameter][key].dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(parameter.device)


def _state_by_name(record: Checkpoint) -> dict[str, dict[str, Any]]:
    values = record.optimizer_state or {"state": {}, "param_groups": []}
    try:
        return {
            name: values["state"][index]
            for group in values["param_groups"]
            for index, name in zip(group["params"], group["param_names"], strict=True)
            if index in values["state"]
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        problem = f"its optimizer state is not in torch's form with param_names ({error})"
        raise CheckpointError(where_of(record), problem, EARLIER, kind="damaged") from error


def _fits(values: Any, shape: torch.Size, keys: set[str] | None, *, known: bool) -> bool:
    """Whether a parameter's saved state can be loaded.

    With `keys`, it must hold a dense tensor of the parameter's shape for each; AdamW's step counter is a scalar.
    Without `keys`, any dense tensors and numbers fit if it is `known` that the same optimizer saved them for a
    parameter of the same shape.
    """
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        return False
    if keys is None:
        return known and all(_is_dense(value) or isinstance(value, int | float) for value in values.values())
    return values.keys() == keys and all(
        _is_dense(value) and value.shape == (() if key == "step" else shape) for key, value in values.items()
    )


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


ROWS, LONGEST = 2, 64  # sequences, and tokens per sequence, of the random input whose logits are compared


@torch.no_grad()
def logits(record: Checkpoint) -> Tensor:
    """Return the model's logits (B, T, V) for fixed random tokens, float32."""
    model = build_model(record, device=torch.device("cpu")).eval()
    length = min(LONGEST, model.settings.block_size)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.settings.vocab_size, (ROWS, length), generator=draw)
    found: Tensor = model(ids).logits
    return found
