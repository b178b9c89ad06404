"""Take the training settings that another program's checkpoint records: rate, betas, weight decay, batch, schedule.

Pure functions over the loaded content. A value of another type or range is left out.
"""

import math
from collections.abc import Mapping
from typing import Any

from milepost.ckpt.foreign.keys import configs_of, number_of
from milepost.ckpt.foreign.optimizer import saved_optimizer
from milepost.ckpt.record import Json
from milepost.lazy import Tensor
from milepost.runtime.schedule import Schedule, lr_at

# Variable -> the names in use for it in a config, or at the top of the file.
WORDS: dict[str, tuple[str, ...]] = {
    "BATCH_SIZE": ("batch_size", "micro_batch_size", "train_batch_size", "per_device_train_batch_size"),
    "GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "accumulate_grad_batches"),
    "TRAINING_STEPS": ("max_iters", "max_steps", "training_steps", "total_steps"),
    "LEARNING_RATE": ("learning_rate", "lr"),
    "WEIGHT_DECAY": ("weight_decay",),
    "BETA1": ("beta1", "adam_beta1"),
    "BETA2": ("beta2", "adam_beta2"),
    "GRAD_CLIP": ("grad_clip", "gradient_clip_val", "grad_norm_clip", "max_grad_norm"),
}
WHOLE = {"BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS", "TRAINING_STEPS"}
SCHEDULERS = (
    "lr_scheduler",
    "lr_schedulers",
    "lr_scheduler_states",
    "scheduler",
    "scheduler_state_dict",
    "lr_scheduler_state_dict",
)
CLOSE = 1e-6  # relative difference between a recorded rate and that of the schedule


def training_settings(content: Mapping[Any, Any], config: Mapping[str, Json]) -> dict[str, Json]:
    """Return the settings of its training by our variables; those of the optimizer's groups take precedence.

    LEARNING_RATE is the peak of its schedule: the initial rate that a scheduler of torch notes, else that of the config, unless
    the rate in use is higher, else the rate in use (`rate_in_use`). The rate and the weight decay of another optimizer than
    Adam's kind, such as SGD, mean nothing to AdamW and are left out.
    """
    places: list[Mapping[Any, Any]] = [content, *configs_of(content), config]
    found = {name: _first(places, words, whole=name in WHOLE) for name, words in WORDS.items()}
    if _is_of_another_kind(content):
        found |= dict.fromkeys(("LEARNING_RATE", "WEIGHT_DECAY"))
    else:
        planned, rate = found["LEARNING_RATE"], rate_in_use(content)
        peak = _initial(content) or max(planned or 0.0, rate or 0.0) or None
        found |= {name: value for name, value in _of_groups(content).items() if value is not None}
        found["LEARNING_RATE"] = peak
    return {name: value for name, value in found.items() if value is not None and _in_range(name, value)}


def rate_in_use(content: Mapping[Any, Any]) -> float | None:
    """Return the learning rate of the last step by the optimizer's groups, or by the scheduler; None if none is recorded."""
    rate = None if _is_of_another_kind(content) else _of_groups(content)["LEARNING_RATE"]
    return float(rate) if rate is not None and _in_range("LEARNING_RATE", rate) else None


def schedule_of(content: Mapping[Any, Any], step: int) -> dict[str, Json]:
    """Return nanoGPT's schedule as our own if the recorded rate is that of the schedule at `step`; else {}."""
    config = next((values for values in configs_of(content) if "lr_decay_iters" in values), {})
    words = ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters")
    values = [_number(config.get(word)) for word in words]
    rate = _of_groups(content)["LEARNING_RATE"]
    if None in values or config.get("decay_lr") is False or rate is None:
        return {}
    peak, floor, warmup, end = (value for value in values if value is not None)
    if not (0 <= floor <= peak and 0 <= warmup < end and step < end and float(end).is_integer()):
        return {}
    schedule = Schedule(
        kind="cosine", peak=float(peak), floor=float(floor), warmup_steps=int(warmup), start_step=0, end_step=int(end)
    )
    near = any(math.isclose(lr_at(at, schedule), rate, rel_tol=CLOSE) for at in (step, max(0, step - 1)))
    return dict(vars(schedule)) if near else {}


def _groups(content: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """Return the parameter groups of the optimizer; an empty list if there are none."""
    saved = saved_optimizer(content)
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    return [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []


def _is_of_another_kind(content: Mapping[Any, Any]) -> bool:
    """Whether the optimizer is none of Adam's kind: its groups have no betas."""
    groups = _groups(content)
    return bool(groups) and not any("betas" in group for group in groups)


def _of_groups(content: Mapping[Any, Any]) -> dict[str, float | None]:
    """Return the settings of the first group of the optimizer, and the rate of the scheduler if no group has one."""
    groups = _groups(content)
    first = groups[0] if groups else {}
    betas = first.get("betas")
    beta1, beta2 = betas if isinstance(betas, list | tuple) and len(betas) == 2 else (None, None)
    decays = [value for group in groups if (value := _number(group.get("weight_decay"))) is not None]
    return {
        "LEARNING_RATE": _number(first.get("lr", _scheduled(content))),
        "WEIGHT_DECAY": max(decays, default=None),
        "BETA1": _number(beta1),
        "BETA2": _number(beta2),
    }


def _initial(content: Mapping[Any, Any]) -> float | None:
    """Return the rate with which a scheduler of torch began; None if none is recorded."""
    groups = _groups(content)
    noted = _number(groups[0].get("initial_lr")) if groups else None
    rate = noted if noted is not None else _number(_scheduled(content, "base_lrs"))
    return float(rate) if rate is not None and _in_range("LEARNING_RATE", rate) else None


def _scheduled(content: Mapping[Any, Any], word: str = "_last_lr") -> Any:
    """Return the first of the rates that a scheduler records, by default the last that it set; None if none is recorded."""
    state = next((content[word] for word in SCHEDULERS if content.get(word)), None)
    state = state[0] if isinstance(state, list | tuple) and state else state
    rates = state.get(word) if isinstance(state, Mapping) else None
    return rates[0] if isinstance(rates, list | tuple) and rates else None


def _first(places: list[Mapping[Any, Any]], words: tuple[str, ...], *, whole: bool) -> float | int | None:
    """Return the first number under one of `words` in `places`."""
    for values in places:
        for word in [*words, *(word.upper() for word in words)]:
            number = _number(values.get(word))
            if number is not None and (not whole or type(number) is int):
                return number
    return None


def _number(value: Any) -> float | int | None:
    """Return a finite number, also in a tensor of one; None for anything else."""
    if isinstance(value, Tensor) and (value.is_meta or value.numel() != 1):
        return None
    number = number_of(value)
    return number if type(number) in (int, float) and math.isfinite(number) else None


def _in_range(name: str, value: float) -> bool:
    if name in WHOLE:
        return 1 <= value < 2**31
    if name.startswith("BETA"):
        return 0 <= value < 1
    return 0 < value < 1e9 if name == "LEARNING_RATE" else 0 <= value < 1e9
