"""The learning rate as a pure function of the step. Imports no torch: the settings take the names of schedules from
here.

To add a schedule, add its function to SCHEDULES; LR_SCHEDULE then takes its name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

# A warmup-stable-decay schedule decays for this share of the run (Haegele et al. 2024, arXiv 2405.18392).
WSD_DECAY = 0.2

# Each returns the place between floor (0) and peak (1) after a share, in [0, 1), of the steps that follow the warm-up.
SCHEDULES: Final[dict[str, Callable[[float], float]]] = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share: 1 - share,
    "wsd": lambda share: min(1.0, (1 - share) / WSD_DECAY),
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rates of the steps [start_step, end_step). Rates are AdamW's."""

    kind: str  # a name of SCHEDULES
    peak: float
    floor: float
    warmup_steps: int
    start_step: int
    end_step: int

    @property
    def total(self) -> int:
        """The number of steps."""
        return self.end_step - self.start_step


def lr_at(step: int, schedule: Schedule) -> float:
    """Return the learning rate of the update after `step` completed steps.

    Past the end of the schedule its last rate is held.
    """
    done = min(step, schedule.end_step - 1) - schedule.start_step
    if done < schedule.warmup_steps:
        return schedule.peak * (done + 1) / (schedule.warmup_steps + 1)
    share = (done - schedule.warmup_steps) / max(1, schedule.total - schedule.warmup_steps)  # in [0, 1)
    return schedule.floor + (schedule.peak - schedule.floor) * SCHEDULES[schedule.kind](share)


def default_floor(kind: str, peak: float) -> float:
    """Return the lowest rate of a schedule where none is set: a tenth of the peak, or 0 for linear."""
    return 0.0 if kind == "linear" else float(f"{peak / 10:.12g}")  # 0.0003, not 0.00030000000000000003


def replan(schedule: Schedule, *, peak: float, start_step: int, steps: int, warmup_steps: int) -> Schedule:
    """Return a schedule of the same kind over `steps` steps from `start_step`;
    the floor keeps its ratio to the peak.
    """
    ratio = schedule.floor / schedule.peak if schedule.peak > 0 else 0.0
    floor = float(f"{ratio * peak:.12g}")  # 1e-5, not 9.999999999999999e-6: people read it
    end_step = start_step + steps
    return Schedule(
        kind=schedule.kind, peak=peak, floor=floor, warmup_steps=warmup_steps, start_step=start_step, end_step=end_step
    )
