"""Measure two processes against one: the same batch shared by both (strong scaling), and twice the batch (weak scaling).

    python3 benchmarks/scaling.py         # about a quarter of an hour, on a machine with two processors

Every process has one thread. The limit is the efficiency of two independent processes that train at the same time. Each arm is `training.py`
itself with muon, the default at these sizes (OPTIMIZER=adamw may be set), timed by the lines of its metrics.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure import ROUNDS, header, row

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # name: variables, sequences per batch, steps between two lines
    "0.8M": ({}, 12, 20),
    "10.7M": ({"N_LAYER": "6", "N_HEAD": "6", "N_EMBD": "384", "BLOCK_SIZE": "256"}, 16, 2),
}
LINES = 6  # of metrics per round; the first ends the warm-up
BOUND = "0.85"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def main() -> None:
    """Print two rows per shape."""
    header()
    for name in SHAPES:
        taken: dict[str, list[float]] = {}
        for number in range(ROUNDS):
            for arm, seconds in measure_round(name).items():
                print(f"  {name} {arm}: {seconds:.4f} s per step (round {number + 1})", file=sys.stderr)
                taken.setdefault(arm, []).append(seconds)
        step = {arm: statistics.median(times) for arm, times in taken.items()}
        print_row(f"strong scaling, 2 processes, {name}", step, arm="shared", apart="apart, half the rows", work=2)
        print_row(f"weak scaling, 2 processes, {name}", step, arm="twice the rows", apart="apart", work=1)


def print_row(metric: str, step: dict[str, float], *, arm: str, apart: str, work: int) -> None:
    """Print the time per step of two processes and of one, and the efficiency against that of two independent
    processes.
    """
    efficiency, limit = (step["one"] / (work * step[name]) for name in (arm, apart))
    figures = {"ours": f"{1e3 * step[arm]:.1f} ms", "peer": f"{1e3 * step['one']:.1f} ms, one"}
    row(metric, **figures, ratio=efficiency, bound=BOUND, limit=f"{limit:.2f}, apart", share=efficiency / limit)


def measure_round(name: str) -> dict[str, float]:
    """Return the seconds per step of every arm, one after another."""
    rows = SHAPES[name][1]
    return {
        "one": seconds_per_step(name, rows=rows),
        "shared": seconds_per_step(name, TORCHRUN, rows=rows),
        "twice the rows": seconds_per_step(name, TORCHRUN, rows=2 * rows),
        "apart": seconds_per_step(name, rows=rows, at_once=2),
        "apart, half the rows": seconds_per_step(name, rows=rows // 2, at_once=2),
    }


def seconds_per_step(name: str, launcher: Sequence[str] = (), *, rows: int, at_once: int = 1) -> float:
    """Return the seconds per step of a training that `launcher` starts, after its first line;
    the slowest of `at_once`.
    """
    sizes, _, between = SHAPES[name]
    variables = {
        "MODEL_TYPE": "gpt2",
        "BATCH_SIZE": str(rows),
        "TRAINING_STEPS": str(LINES * between),
        "LOG_INTERVAL": str(between),
    }
    quiet = {
        "EVAL_INTERVAL": "0",
        "EVAL_STEPS": "1",
        "SAMPLE_INTERVAL": "0",
        "ENABLE_CHECKPOINTS": "false",
        "DEVICE": "cpu",
    }
    # With smaller batches the default optimizer would differ. The thread limit keeps a process to one of many
    # processors.
    fixed = {"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1", "PYTHON_DOTENV_DISABLED": "1", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(number) for number in range(at_once)]
        command = [sys.executable, *launcher, str(ROOT / "training.py")]
        started = []
        for place in places:
            env = {"OPTIMIZER": "muon"} | os.environ | sizes | variables | quiet | fixed | {"RUNS_DIR": str(place)}
            started.append(
                subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
        for process in started:
            errors = process.communicate()[1]
            if process.returncode:
                sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{errors}")
        return max(between_lines(place) for place in places)


def between_lines(runs: Path) -> float:
    """Return the median seconds per step between two training lines of the run below `runs`."""
    (path,) = runs.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    trained = [(line["step"], line["time"]) for line in lines if line["split"] == "train"]
    pairs = itertools.pairwise(trained)
    return statistics.median((after[1] - before[1]) / (after[0] - before[0]) for before, after in pairs)


if __name__ == "__main__":
    main()
