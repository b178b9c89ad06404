"""Checkpoint -> model, tokenizer, optimizer: the one module that knows both sides."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import models
from ckpt.record import Checkpoint, CheckpointError
from ckpt.tensors import digest
from data import exchange, tokenization
from models.lora import LoraSettings
from models.lora import merged as merged_weights
from runtime.distributed import sharded_like

SHOWN = 10  # names and shapes that one message lists

# What an optimizer keeps for one parameter, by a word that only its groups have: the other's moments are of no use to it.
MOMENTS = {"betas": {"step", "exp_avg", "exp_avg_sq"}, "momentum": {"momentum_buffer"}}  # AdamW, Muon


@dataclass(frozen=True)
class Restored:
    """What an optimizer got back: parameters whose state came, parameters in all, and the names of those without."""

    restored: int
    total: int
    missing: tuple[str, ...]


def build_model(
    record: Checkpoint,
    *,
    device: torch.device,
    block_size: int | None = None,
    dropout: float | None = None,
    shared: bool = False,
    adapters: Mapping[str, Any] | None = None,
    take: bool = False,
) -> models.Model:
    """The record's model with its weights, in float32 on `device`. A smaller `block_size` crops learned positions.

    `adapters` (settings by kind, see models.ADAPTERS) adds fresh ones, drawn from torch's global generator. `shared` leaves the weights
    where they are, mapped from the checkpoint's file: for a model that is not trained. `take` moves them out of a record that owns
    them, which has none then: a copy would take their memory twice. Raises CheckpointError listing names and shapes if the weights
    are not exactly those of the recorded settings.
    """
    if record.adapters_only:
        raise CheckpointError(f"{_where(record)}: holds adapters alone; {name_the_base(record)}")
    settings = {**record.model_settings, **(adapters or {})}
    state = dict(record.model_state)
    if block_size is not None and block_size != settings["block_size"]:
        state = _crop_positions(state, settings, block_size, where=_where(record))
        settings["block_size"] = block_size
    if dropout is not None and "dropout" in settings:
        settings["dropout"] = dropout
    try:
        _check_layers(record, state)
        model = skeleton(
            record.model_type, settings
        )  # no memory and no random draws for weights that are replaced at once
    except (ValueError, TypeError, RuntimeError) as error:  # the last for a shape of more elements than can be counted
        reason = f"{str(error).splitlines()[0]:.300}"  # torch adds frames of C++
        raise CheckpointError(f"{_where(record)}: its settings make no model: {reason}") from error
    wanted = model.state_dict()
    added = {kind for kind in adapters or () if not record.model_settings.get(kind)}
    fresh = {name for name in wanted if models.adapter_kind(name) in added}
    _check_shapes({name: wanted[name] for name in wanted if name not in fresh}, state, where=_where(record))
    if shared or (take and record.owned):
        if take:
            record.model_state = {}  # so that each goes as soon as it is converted
        state |= {name: torch.empty(wanted[name].shape) for name in fresh}
        model.load_state_dict({name: state.pop(name).float() for name in list(state)}, assign=True)
        model.to(device)
    else:
        model.to_empty(device=device)
        model.load_state_dict(state, strict=not fresh)
    models.draw_adapters(model, fresh)
    return model


def skeleton(model_type: str, settings: Mapping[str, Any]) -> models.Model:
    """A model of these settings whose weights have shapes and no memory. Raises what models.build raises, and torch's RuntimeError for
    a shape of more elements than can be counted."""
    with torch.device("meta"), _Unfilled():
        return models.build(model_type, settings)


def with_base(record: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The record of adapters alone with the weights of their base; raises CheckpointError if `base` is another one."""
    recorded = (record.base or {}).get("sha256")
    found = digest(base.model_state)
    if base.adapters_only or found != recorded:
        what = (
            "holds adapters itself"
            if base.adapters_only
            else f"has other weights (sha256 {found[:16]}..., not {str(recorded)[:16]}...)"
        )
        raise CheckpointError(
            f"{_where(base)}: {what}: it is not the base of {_where(record)}; {name_the_base(record)}"
        )
    rows = record.model_settings["block_size"]
    state = base.model_state | (
        {"wpe.weight": base.model_state["wpe.weight"][:rows]} if "wpe.weight" in base.model_state else {}
    )
    return dataclasses.replace(
        record,
        model_state=state | record.model_state,
        parts=["model", *record.parts[1:]],
        notes=[*base.notes, *record.notes],
    )


def name_the_base(record: Checkpoint) -> str:
    """What to do about adapters without their base."""
    source = (record.base or {}).get("source")
    return f"set GPT2_MODEL_NAME or BASE_CHECKPOINT to the base that they were trained on ({source})"


def merged(record: Checkpoint) -> Checkpoint:
    """The record with LoRA's products added to the weights: a model without adapters that answers as it did."""
    if not record.model_settings.get("lora"):
        return record
    settings = {name: value for name, value in record.model_settings.items() if name != "lora"}
    try:
        lora = LoraSettings(**record.model_settings["lora"])
        state = merged_weights(record.model_state, lora)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{_where(record)}: its adapters cannot be merged ({error})") from error
    return dataclasses.replace(record, model_state=state, model_settings=settings, optimizer_state=None, base=None)


class _Unfilled(TorchFunctionMode):
    """Passes over torch.nn.init: to draw weights that have no memory, torch first imports its compiler, a second's work."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


def _crop_positions(
    state: dict[str, Tensor], settings: dict[str, Any], block_size: int, *, where: str
) -> dict[str, Tensor]:
    if block_size > settings["block_size"]:
        raise CheckpointError(
            f"{where}: BLOCK_SIZE={block_size} is more than its {settings['block_size']} positions; set BLOCK_SIZE={settings['block_size']} or less"
        )
    return state | {
        name: state[name][:block_size].clone() for name in ("wpe.weight",) if name in state and state[name].dim()
    }


def _check_layers(record: Checkpoint, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the tensors suffice for the layers: a model of many takes memory even without weights.

    No other setting costs time or memory.
    """
    layers = record.model_settings.get("n_layer")
    if not isinstance(layers, int) or layers < 3:
        return
    held = sum(tensor.numel() > 0 for tensor in state.values())  # empty tensors take no place in a file
    if layers <= held:
        one, two = (
            len(skeleton(record.model_type, record.model_settings | {"n_layer": few}).state_dict()) for few in (1, 2)
        )
        if layers * (two - one) <= held:
            return
    problem = f"n_layer is {layers}, but it holds only {held} tensors with numbers"
    raise CheckpointError(f"{_where(record)}: {problem}: its settings are damaged")


def _check_shapes(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], *, where: str) -> None:
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
        raise CheckpointError(f"{where}: its weights do not fit its settings: {'; '.join(problems[:SHOWN])}{more}")


def build_tokenizer(record: Checkpoint) -> tokenization.Tokenizer:
    """The record's own tokenizer. Raises CheckpointError if it has none, or one with more tokens than the model has rows."""
    if record.tokenizer is None:
        raise CheckpointError(f"{_where(record)}: carries no tokenizer")
    try:
        tokenizer = tokenization.from_dict(record.tokenizer)
    except ValueError as error:
        raise CheckpointError(f"{_where(record)}: its tokenizer cannot be rebuilt ({error})") from error
    if record.tokenizer_sha256 not in (None, tokenizer.digest):
        raise CheckpointError(f"{_where(record)}: its tokenizer is not the one it was saved with: the file is damaged")
    rows = record.model_settings["vocab_size"]
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{_where(record)}: its tokenizer has {tokenizer.vocab_size} tokens, but its model only {rows} rows"
        )
    return tokenizer


def tokenizer_files(record: Checkpoint) -> dict[str, Any]:
    """The record's tokenizer as the JSON files of a Hugging Face folder, by name; none if it carries none."""
    if record.tokenizer is None:
        return {}
    tokenizer = build_tokenizer(record)
    return {
        "tokenizer.json": exchange.tokenizers_json(tokenizer),
        "tokenizer_config.json": exchange.tokenizer_config(tokenizer)
        | {"model_max_length": record.model_settings["block_size"]},
    }


def tokenizer_from_file(values: dict[str, Any]) -> dict[str, Any]:
    """The record's form of a Hugging Face folder's tokenizer.json: one of ours is known again, any other is a BPE to be tried."""
    return exchange.from_tokenizers_json(values)


def tokenizer_from_parts(vocab: Any, merges: str, added: Any, special: Iterable[str]) -> dict[str, Any]:
    """The same of vocab.json, merges.txt, added_tokens.json and the special ones among those."""
    return exchange.from_vocab_and_merges(vocab, merges, added, special)


def restore_optimizer(optimizer: torch.optim.Optimizer, record: Checkpoint) -> Restored:
    """Gives `optimizer` the record's moments, matched by parameter name and shape.

    Its own learning rate, weight decay and betas stay: torch's `load_state_dict` would overwrite them, and checks almost nothing itself.
    """
    current = optimizer.state_dict()
    wanted = {
        name: (parameter, kinds)
        for group in optimizer.param_groups
        for kinds in (kinds for word, kinds in MOMENTS.items() if word in group)
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    saved = _state_by_name(record)
    names = {
        index: name
        for group in current["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }
    state = {
        index: saved[name]
        for index, name in names.items()
        if name in saved and _fits(saved[name], wanted[name][0].shape, wanted[name][1])
    }
    # A copy: the record's tensors are mapped from the file, and the optimizer writes into what it is given.
    copied = {
        index: {
            key: value.clone() if value.dim() == 0 else sharded_like(value, wanted[names[index]][0])
            for key, value in moments.items()
        }
        for index, moments in state.items()
    }
    optimizer.load_state_dict({"state": copied, "param_groups": current["param_groups"]})
    missing = tuple(name for index, name in names.items() if index not in state)
    return Restored(len(state), len(names), missing)


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
        raise CheckpointError(
            f"{_where(record)}: its optimizer state is not in torch's form with param_names ({error})"
        ) from error


def _fits(moments: Any, shape: torch.Size, kinds: set[str]) -> bool:
    """Whether `moments` holds one dense tensor of each kind, of the parameter's shape; Adam's step counter is a scalar."""
    if not isinstance(moments, dict) or moments.keys() != kinds:
        return False
    return all(
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and value.shape == (() if kind == "step" else shape)
        for kind, value in moments.items()
    )


ROWS, LONGEST = 2, 64  # of the random tokens whose logits are compared


@torch.no_grad()
def logits(record: Checkpoint) -> Tensor:
    """The model's answer to fixed random tokens: (rows, tokens, vocabulary), float32."""
    model = build_model(record, device=torch.device("cpu")).eval()
    length = min(LONGEST, model.settings.block_size)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.settings.vocab_size, (ROWS, length), generator=draw)
    return model(ids)[0]  # (B, T, V)


PLAIN = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias", "tied")  # what a GPT-2's weights depend on


def weight_shapes(settings: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Name and shape of every weight of a plain GPT-2 of these sizes, in the order of its modules; nothing is allocated."""
    sizes = {name: settings[name] for name in PLAIN if name in settings}
    return {name: tensor.shape for name, tensor in skeleton("gpt2", sizes).state_dict().items()}


def _where(record: Checkpoint) -> str:
    return str(record.path or "checkpoint")
