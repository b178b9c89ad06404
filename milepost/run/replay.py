"""Faults of a device or its memory: a step taken twice must have equal bits, and what a step left must be what is saved.

A step is a function of the state before it: weights, moments, scaler, seed and step number. So a step that is taken
again from the same state leaves the same bits, in every dtype, with any optimizer, dropout, compilation and number of
processes, unless the device erred. docs/devices.md says which faults this finds and which it cannot.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from milepost.run.state import Run, is_due
from milepost.runtime import hardware
from milepost.runtime.digests import differing, digests
from milepost.runtime.distributed import local
from milepost.runtime.errors import DeviceFaultError, TrainingError
from milepost.runtime.optim import parts
from milepost.runtime.progress import amount

SPARE = 0.9  # share of the free memory that the copy of the state may take
REMEDY = "a device, its memory or its driver errs now and then; train on another one"
Step = Callable[[], dict[str, Tensor]]


class Outcome(NamedTuple):
    """What one pass of a step returned or raised, and the digests of all it computed."""

    metrics: dict[str, Tensor]
    error: TrainingError | None
    digests: dict[str, Any]


def checked(run: Run, step: Step) -> dict[str, Tensor]:
    """Take the step and return its metrics; at REPLAY_CHECK_INTERVAL take it twice, from the same state.

    Raise DeviceFaultError, with the state of before the step, unless both passes agree in every bit. Where a save may
    follow, note the digests of what the step leaves.
    """
    metrics = _taken_twice(run, step) if replays(run) and _has_room(run) else step()
    if run.settings.enable_checkpoints and is_due(run, "checkpoint", "eval"):
        run.state.left = run.state.step, digests(run.tensors())
    return metrics


def replays(run: Run) -> bool:
    """Return whether the next step is to be taken twice."""
    interval = run.settings.replay_check_interval
    return bool(interval and (run.state.step + 1) % interval == 0 and not why_not_replayed(run))


def why_not_replayed(run: Run) -> str | None:
    """Return why equal steps need not have equal bits here, so that nothing can be concluded from two; else None."""
    if not run.settings.deterministic:
        return "DETERMINISTIC=false lets equal steps differ"
    if run.device.type == "mps":
        return "mps does not promise equal bits"
    return None


def left_by_step(run: Run) -> dict[str, int]:
    """Return the digests of weights and moments that the last step left; those of now if none were noted then."""
    step, noted = run.state.left
    return noted if step == run.state.step else digests(run.tensors())


def check_unchanged(tensors: Mapping[str, Tensor], left: Mapping[str, int], step: int) -> None:
    """Raise DeviceFaultError if a tensor about to be saved is not the one that the step left."""
    now = digests({name: local(tensor) for name, tensor in tensors.items()})
    if changed := [name for name, value in now.items() if value != left.get(name)]:
        raise DeviceFaultError(
            f"{_named(changed, len(now))} changed in memory between step {step} and its save, so nothing was saved: "
            "memory errs, or code writes where it must not; test the memory of this machine",
            tensors=changed,
        )


def _taken_twice(run: Run, step: Step) -> dict[str, Tensor]:
    before = _Snapshot(run)
    first = _outcome(run, step)
    before.restore(run)
    second = _outcome(run, step)
    if run.world.any(first.digests != second.digests):
        before.restore(run)
        third = _outcome(run, step)
        before.restore(run)
        raise _fault(run, first, second, third)
    if second.error:
        raise second.error
    if run.engine == "ddp":
        _compare_processes(run)
    return second.metrics


def _outcome(run: Run, step: Step) -> Outcome:
    """Take the step; return its metrics or its error, and the digests of metrics, gradients, weights and moments."""
    with _watched_gradients(run) as gradients:
        try:
            metrics = step()
        except TrainingError as error:
            if run.scaler.is_enabled():
                raise  # it cannot unscale the same step twice
            return Outcome({}, error, {"error": str(error)})
    return Outcome(metrics, None, digests(metrics) | gradients | digests(run.tensors()))


@contextlib.contextmanager
def _watched_gradients(run: Run) -> Iterator[dict[str, int]]:
    """Yield a dictionary that gets the digest of each gradient as the optimizer receives it: a step clears them."""
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    found: dict[str, int] = {}

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found.update(digests({f"gradient of {names[id(p)]}": local(p.grad) for p in held if p.grad is not None}))

    handles = [part.register_step_pre_hook(note) for part in parts(run.optimizer)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Snapshot:
    """A copy, in main memory, of everything that a step changes."""

    def __init__(self, run: Run) -> None:
        self._tensors = [(local(tensor).detach(), _copied(tensor)) for tensor in _parameters(run)]
        self._moments = [
            {
                parameter: {kind: _copied(value) for kind, value in kinds.items()}
                for parameter, kinds in part.state.items()
            }
            for part in parts(run.optimizer)
        ]
        self._scaler, self._state = copy.deepcopy(run.scaler.state_dict()), copy.copy(run.state)

    def restore(self, run: Run) -> None:
        """Put everything back, in place: no other reference to a weight or a moment becomes stale."""
        for tensor, before in self._tensors:
            tensor.copy_(before)
        for part, moments in zip(parts(run.optimizer), self._moments, strict=True):
            for parameter in [parameter for parameter in part.state if parameter not in moments]:
                del part.state[parameter]
            for parameter, kinds in moments.items():
                _restore_kinds(part.state[parameter], kinds)
        run.optimizer.zero_grad(set_to_none=True)
        if self._scaler:
            run.scaler.load_state_dict(self._scaler)
        for field in dataclasses.fields(self._state):
            setattr(run.state, field.name, getattr(self._state, field.name))


def _restore_kinds(now: dict[str, Any], before: dict[str, Any]) -> None:
    for kind in [kind for kind in now if kind not in before]:
        del now[kind]
    for kind, value in before.items():
        if isinstance(value, Tensor) and isinstance(now.get(kind), Tensor):
            local(now[kind]).copy_(value)
        else:
            now[kind] = copy.deepcopy(value)


def _parameters(run: Run) -> list[Tensor]:
    return [*run.model.parameters(), *run.model.buffers()]


def _copied(value: Any) -> Any:
    return local(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def _has_room(run: Run) -> bool:
    """Return whether main memory holds a copy of the state in every process; log it if not."""
    need = run.world.local_size * sum(tensor.nbytes for tensor in run.tensors().values())
    free = hardware.free_main_memory()
    if not run.world.any(free is not None and need > SPARE * free):
        return True
    if "replay" not in run.state.reported:
        run.state.reported.add("replay")
        run.log(f"no step is taken twice: {amount(need, 'B')} of memory for a copy of the state are not free")
    return False


def _fault(run: Run, first: Outcome, second: Outcome, third: Outcome) -> DeviceFaultError:
    """Return the error: what differed, in which process, and which of the passes was odd."""
    names = differing(first.digests, second.digests)
    odd = 1 if second.digests == third.digests else 2 if first.digests == third.digests else None
    which = f"pass {odd} was odd" if odd else "all differed"
    found = f"{_named(names, len(first.digests | second.digests))} differed; of three passes, {which}" if names else ""
    reports = [
        f"process {rank}: {text}" if run.world.size > 1 else text
        for rank, text in enumerate(run.world.all_gather(found))
        if text
    ]
    problem = f"step {run.state.step + 1} was taken twice from one state and came out unequal ({'; '.join(reports)})"
    return DeviceFaultError(f"{problem}, so it was not kept: {REMEDY}", tensors=names, odd_pass=odd)


def _compare_processes(run: Run) -> None:
    """Raise DeviceFaultError unless all processes of data-parallel training hold the same weights and moments."""
    each = run.world.all_gather(digests(run.tensors()))
    names = sorted({name for other in each[1:] for name in differing(each[0], other)})
    if names:
        apart = ", ".join(str(rank) for rank, other in enumerate(each) if other != each[0])
        problem = f"{_named(names, len(each[0]))} of process {apart} are not those of process 0"
        raise DeviceFaultError(f"after step {run.state.step}, {problem}: {REMEDY}", tensors=names)


def _named(names: list[str], total: int) -> str:
    return f"{names[0]} and {len(names) - 1} others of {total} tensors" if len(names) > 1 else names[0]
