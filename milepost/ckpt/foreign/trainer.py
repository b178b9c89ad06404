"""The training state that transformers' Trainer saves beside a model: optimizer.pt, scheduler.pt, training_args.bin.

Read as other programs' archives are: nothing is imported, and what cannot be used is named.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from milepost.ckpt import archive
from milepost.ckpt.foreign.optimizer import Translate, matched
from milepost.ckpt.foreign.rates import CLOSE, rate_in_use, training_settings
from milepost.ckpt.foreign.weights import trained
from milepost.ckpt.manifest import is_regular
from milepost.ckpt.record import CheckpointError, Json
from milepost.lazy import Tensor
from milepost.runtime.schedule import Schedule, lr_at

OPTIMIZERS = ("optimizer.pt", "optimizer.bin")  # the second is accelerate's name
SCHEDULER, ARGUMENTS = "scheduler.pt", "training_args.bin"
UNREAD = ("scaler.pt", "rng_state.pth", "rng_state_*.pth")  # glob patterns
OTHERS = (SCHEDULER, ARGUMENTS, *UNREAD)
KINDS = ("linear", "cosine", "constant")  # lr_scheduler_type that is a schedule of ours under the same name


class Training(NamedTuple):
    """What is known of the training: the optimizer's state under our names, our variables, and what is not taken."""

    optimizer_state: dict[str, Any] | None = None
    hyperparameters: Mapping[str, Json] = {}
    schedule: Mapping[str, Json] = {}
    rate: float | None = None  # in use at the step
    scheduler: Json = None  # its values
    note: str | None = None
    left_out: tuple[str, ...] = ()


def training_of(
    path: Path,
    progress: Mapping[str, Json],
    weights: Mapping[str, Tensor],
    translate: Translate,
    *,
    step: int,
    tied: bool,
    whole: bool = True,
) -> Training:
    """Return the training state in the folder of a checkpoint, whose trainer_state.json holds `progress`.

    `translate` turns tensors under the names of `weights` into tensors under ours. If not `whole`, no tensor is read. Raise
    CheckpointError if the optimizer's file is damaged.
    """
    file = next((path / name for name in OPTIMIZERS if is_regular(path / name)), None)
    saved, refusal = _opened(file) if file else (None, None)
    scheduler, _ = _opened(path / SCHEDULER)
    arguments, _ = _opened(path / ARGUMENTS)
    theirs = trained(dict(sorted(weights.items())), tied=tied)
    ours = {name: tuple(tensor.shape) for name, tensor in translate(dict(weights)).items()}
    state, note = matched(saved, theirs, ours, translate, whole=whole)
    content = {**progress, "optimizer": saved, "lr_scheduler": scheduler}
    rate = rate_in_use(content)
    schedule = _schedule(arguments or {}, progress, step=step, rate=rate)
    unused = [file.name] if file and state is None else []
    unopened = [SCHEDULER] if scheduler is None and is_regular(path / SCHEDULER) else []
    return Training(
        optimizer_state=state,
        hyperparameters=training_settings(content, arguments or {}),
        schedule=schedule,
        rate=rate,
        scheduler=scheduler,
        note=refusal or note,
        left_out=(*map(_described, [*unused, *unopened]), *unread(path)),
    )


def unread(path: Path) -> tuple[str, ...]:
    """Return the files of a folder that no record has a place for, in words."""
    found = (file for pattern in UNREAD for file in sorted(path.glob(pattern)) if is_regular(file))
    return tuple(_described(file.name) for file in found)


def _described(name: str) -> str:
    return f"{name} (of transformers' Trainer)"


def _opened(file: Path) -> tuple[dict[Any, Any] | None, str | None]:
    """Return the content of a torch archive, its tensors mapped, or None and the reason; None if there is no file.

    Raise CheckpointError if it is damaged.
    """
    if not is_regular(file):
        return None, None
    try:
        return archive.load(file)[0], None
    except CheckpointError as error:
        if error.kind == "damaged":
            raise
        return None, f"{file.name} is present but cannot be used: {error.problem or error}"


def _schedule(
    arguments: Mapping[Any, Any], progress: Mapping[str, Json], *, step: int, rate: float | None
) -> dict[str, Json]:
    """Return its schedule as our own if the recorded rate is that of the schedule at `step`; else {}."""
    kind = str(arguments.get("lr_scheduler_type"))
    peak: Any
    warmup: Any
    end: Any
    peak, warmup, end = arguments.get("learning_rate"), arguments.get("warmup_steps"), progress.get("max_steps")
    if (
        kind not in KINDS
        or rate is None
        or type(peak) is not float
        or type(warmup) not in (int, float)
        or type(end) is not int
    ):
        return {}
    if not (0 < peak < 1e9 and 0 <= warmup < end <= 2**31 and step < end and float(warmup).is_integer()):
        return {}
    floor = peak if kind == "constant" else 0.0
    schedule = Schedule(kind=kind, peak=peak, floor=floor, warmup_steps=int(warmup), start_step=0, end_step=end)
    return dict(vars(schedule)) if math.isclose(lr_at(step, schedule), rate, rel_tol=CLOSE) else {}
