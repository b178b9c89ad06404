"""The training state that transformers' Trainer saves beside a model: optimizer.pt, scheduler.pt, training_args.bin.

Read as other programs' archives are: nothing is imported, and what cannot be used is named.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from milepost.ckpt import archive
from milepost.ckpt.foreign.importing import imported
from milepost.ckpt.foreign.keys import epoch_of, step_of, validation_loss_of
from milepost.ckpt.foreign.optimizer import Shapes, Translate, matched, wide_and_flat
from milepost.ckpt.foreign.other_values import plain_values
from milepost.ckpt.foreign.rates import CLOSE, rate_in_use, training_settings
from milepost.ckpt.manifest import is_regular, read_json
from milepost.ckpt.record import CheckpointError, Json
from milepost.runtime.schedule import Schedule, lr_at

STATE = "trainer_state.json"
OPTIMIZERS = ("optimizer.pt", "optimizer.bin")  # the second is accelerate's name
SCHEDULER, ARGUMENTS = "scheduler.pt", "training_args.bin"
UNREAD = ("scaler.pt", "rng_state.pth", "rng_state_*.pth")  # glob patterns
OTHERS = (STATE, SCHEDULER, ARGUMENTS, *UNREAD)  # that belong to its folder and hold no tensor of its model
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


def optimizer_file(path: Path) -> Path | None:
    """Return the file of the optimizer in a folder, None if there is none."""
    return next((path / name for name in OPTIMIZERS if is_regular(path / name)), None)


def training_of(path: Path, theirs: Shapes, ours: Shapes, translate: Translate, *, whole: bool = True) -> Training:
    """Return the training state in the folder of a checkpoint, which has an `optimizer_file`.

    `theirs` has the trained parameters in the order of their model, `ours` those under our names; `translate` turns tensors of
    the one into tensors of the other. If not `whole`, no tensor is read. Raise CheckpointError if the optimizer's file is damaged.
    """
    file = optimizer_file(path)
    assert file is not None
    saved, refusal = _opened(file)
    progress = _state(path)
    scheduler, _ = _opened(path / SCHEDULER)
    arguments, _ = _opened(path / ARGUMENTS)
    # Those of a loop with accelerate, and of the Trainer, which decays only matrices.
    ways = [[list(theirs)], wide_and_flat(theirs)]
    state, note = matched(saved, theirs, ours, translate, whole=whole, ways=ways)
    content = {**progress, "optimizer": saved, "lr_scheduler": scheduler}
    rate = rate_in_use(content)
    schedule = _schedule(arguments or {}, progress, step=step_of(progress, where=str(path / STATE)), rate=rate)
    unused = [file.name] if state is None else []
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


def progress(path: Path, training: Training, configs: Iterable[str] = ()) -> tuple[dict[str, Json], list[str]]:
    """Return step, epoch, loss and settings by the files of the Trainer, with the other values of the folder and of its `configs`;
    and what is not taken.
    """
    state = _state(path)
    step, history = step_of(state, where=str(path / STATE)), state.get("log_history")
    entries = history if isinstance(history, list) else []
    evaluated = [
        entry for entry in entries if isinstance(entry, dict) and entry.get("step") == step and "eval_loss" in entry
    ]
    beside = [(name, read_json(path / name)) for name in configs if is_regular(path / name)]
    scheduler = [(SCHEDULER, training.scheduler)] if training.scheduler else []
    kept, left_out = plain_values([*state.items(), *beside, *scheduler])
    return {
        "step": step,
        "epoch": epoch_of(state, where=str(path / STATE)),
        "validation_loss": validation_loss_of({"val_loss": evaluated[-1]["eval_loss"]} if evaluated else {}),
        "hyperparameters": dict(training.hyperparameters),
        "schedule": dict(training.schedule),
        "imported": imported(kept, rate=training.rate, unused=training.note),
    }, [*left_out, *training.left_out]


def problems(path: Path) -> list[CheckpointError]:
    """Return what is damaged in the optimizer's file."""
    file = optimizer_file(path)
    return [problem for problem in (archive.verify(file) if file else []) if problem.kind == "damaged"]


def _state(path: Path) -> dict[str, Json]:
    return read_json(path / STATE) if is_regular(path / STATE) else {}


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
