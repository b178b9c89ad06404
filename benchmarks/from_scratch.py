"""Measure the validation loss of a llama and of a gpt2 from scratch on tiny Shakespeare, at as many parameters and after as many seconds of training.

    TINYSHAKESPEARE=~/input.txt python3 benchmarks/from_scratch.py        # about six minutes; an argument names other SECONDS

Both have their default settings. Only TRAINING_STEPS is chosen, by the time of a step, so that the learning rate of each has fallen to 0 at the end of
its seconds. Both are in one process and train in turn, a twentieth of their steps at a time. Only training is timed; the loss is over all adjacent windows in
the last tenth of the characters.
"""

import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import compare, header, not_measured, row, seconds  # noqa: E402
from time_to_loss import train, validation_loss  # noqa: E402

from milepost import config  # noqa: E402
from milepost.run import Run, fresh  # noqa: E402
from milepost.runtime import hardware  # noqa: E402
from milepost.runtime.progress import Log  # noqa: E402
from models import parameter_count  # noqa: E402

ARMS = ("llama", "gpt2")
SECONDS, SEEDS = 40.0, (1, 2, 3)  # of training, of each model and seed
TURNS, MARKS = 20, 4  # turns of each model, and losses at equal times
TIMED = 40  # steps whose time decides how many there are
UNLIKE = 0.01  # the largest difference in parameters, of all


def main() -> None:
    """Print the rows."""
    header()
    text, limit = os.environ.get("TINYSHAKESPEARE"), float((sys.argv[1:] or [SECONDS])[0])
    if text is None:
        return not_measured("loss from scratch, llama / gpt2", "TINYSHAKESPEARE does not name the text")
    hardware.keep_freed_memory()
    steps = steps_within(limit, text)
    curves = [trained(text, steps, seed) for seed in SEEDS]
    for mark in range(MARKS):
        losses = {arm: [curve[arm][mark][1] for curve in curves] for arm in ARMS}
        taken = {arm: statistics.median(curve[arm][mark][0] for curve in curves) for arm in ARMS}
        shown = {arm: f"{statistics.mean(losses[arm]):.3f}, {taken[arm]:.1f} s" for arm in ARMS}
        ratio = statistics.mean(losses["gpt2"]) / statistics.mean(losses["llama"])
        name = f"loss from scratch, {(mark + 1) / MARKS:.0%} of the time, llama / gpt2"
        row(name, ours=shown["llama"], peer=shown["gpt2"], ratio=ratio, bound="1")
    return None


def built(arm: str, text: str, *, steps: int, seed: int) -> Run:
    """Return a run of this model with its default settings."""
    values = {"MODEL_TYPE": arm, "TRAINING_STEPS": str(steps), "SEED": str(seed), "EVAL_STEPS": "0"}
    return fresh(config.read({"PYTHON_DOTENV_DISABLED": "1", "TRAINING_DATA_SOURCE": text, **values}), Log())


def steps_within(limit: float, text: str) -> dict[str, int]:
    """Return how many steps each model takes in `limit` seconds. Raise ValueError if their sizes differ."""
    runs = {arm: built(arm, text, steps=10**6, seed=0) for arm in ARMS}
    counts = {arm: parameter_count(run.model) for arm, run in runs.items()}
    print(f"  parameters: {counts}", file=sys.stderr)
    if max(counts.values()) > (1 + UNLIKE) * min(counts.values()):
        raise ValueError(f"the models have {counts} parameters: expected as many in each")
    taken = compare({arm: lambda run=run: train(run, run.state.step + TIMED) for arm, run in runs.items()})
    return {arm: max(TURNS, round(limit * TIMED / taken[arm])) for arm in ARMS}


def trained(text: str, steps: dict[str, int], seed: int) -> dict[str, list[tuple[float, float]]]:
    """Return, for each model, the seconds and the validation loss at each mark."""
    runs = {arm: built(arm, text, steps=steps[arm], seed=seed) for arm in ARMS}
    taken, curves = dict.fromkeys(ARMS, 0.0), {arm: list[tuple[float, float]]() for arm in ARMS}
    for turn in range(1, TURNS + 1):
        for arm, run in runs.items():
            until = run.end * turn // TURNS
            taken[arm] += seconds(lambda run=run, until=until: train(run, until))
            if turn % (TURNS // MARKS) == 0:
                curves[arm].append((taken[arm], validation_loss(run)))
                where = f"seed {seed}, step {until} of {run.end}"
                print(f"  {arm}, {where}: {taken[arm]:.1f} s, {curves[arm][-1][1]:.4f}", file=sys.stderr)
    return curves


if __name__ == "__main__":
    main()
