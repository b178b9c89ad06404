"""Measure what a start pays for its probe: beside a training step, a save and all of a start, for two sizes of GPT-2.

    python3 benchmarks/probe.py          # under a minute

The probe is taken once at each start, and its sha256 is stored with each save.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from milepost import config  # noqa: E402

SIZES = {
    "default, 0.8M": {},
    "10.7M": {"N_LAYER": "6", "N_HEAD": "6", "N_EMBD": "384", "BLOCK_SIZE": "256", "BATCH_SIZE": "16"},
}
TURNS = 5

import training  # noqa: E402
from milepost import ckpt  # noqa: E402
from milepost.run import fresh, to_record  # noqa: E402
from milepost.run.probe import probe  # noqa: E402
from milepost.runtime.progress import Log, Metrics  # noqa: E402


def main() -> None:
    """Print a row per size."""
    (ROOT / "checkpoints").mkdir(exist_ok=True)  # on the disk that checkpoints are written to
    for name, sizes in SIZES.items():
        with tempfile.TemporaryDirectory(dir=ROOT / "checkpoints") as folder:
            row = measured(Path(folder), {"MODEL_TYPE": "gpt2"} | sizes)
        print(f"{name:14} " + ", ".join(f"{what} {1000 * seconds:.0f} ms" for what, seconds in row.items()))


def measured(folder: Path, settings: dict[str, str]) -> dict[str, float]:
    """Return the median processor seconds of a start without its imports and probe, of the probe, of a step and of a save."""
    places = {"CHECKPOINT_DIR": str(folder), "RUNS_DIR": str(folder), "PYTHON_DOTENV_DISABLED": "1"}
    asked = config.read(settings | places)
    run = fresh(asked, Log())
    run.metrics = Metrics(folder / "metrics.jsonl")
    training.training_step(run, 1e-4)  # so that the optimizer has its state

    def probed() -> object:
        return probe(run.model, optimizer=run.settings.optimizer, device=run.device, dtype=run.dtype)

    return {
        "start": median(lambda: fresh(asked, Log())),
        "probe": median(probed),
        "step": median(lambda: training.training_step(run, 1e-4)),
        "save": median(lambda: ckpt.save(to_record(run), folder)),
    }


def median(action: Callable[[], object]) -> float:
    """Return the median processor seconds of TURNS calls, after one that is not counted."""
    taken = []
    for _ in range(TURNS + 1):
        began = time.process_time()
        action()
        taken.append(time.process_time() - began)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    main()
