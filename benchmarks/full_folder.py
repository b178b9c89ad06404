"""Measure a save into folders that hold 100, 1,000 and 10,000 other checkpoints: with best/, and with pruning.

    python3 benchmarks/full_folder.py          # about two minutes

The default GPT-2 is saved, by turns into each folder; the figure is the median, and the first save into a folder, which
reads what is there, is given alone.
"""

import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from milepost import config  # noqa: E402

COUNTS = (100, 1_000, 10_000)
ROUNDS = 15

import training  # noqa: E402
from milepost import ckpt  # noqa: E402
from milepost.ckpt import Checkpoint  # noqa: E402
from milepost.run import fresh, to_record  # noqa: E402
from milepost.runtime.progress import Log, Metrics  # noqa: E402


def main() -> None:
    """Print the table."""
    (ROOT / "checkpoints").mkdir(exist_ok=True)  # on the disk that checkpoints are written to
    with tempfile.TemporaryDirectory(dir=ROOT / "checkpoints") as name:
        small, default = made(Path(name), MODEL_TYPE="bigram"), made(Path(name), MODEL_TYPE="gpt2")
        folders = {count: filled(Path(name) / str(count), small, count) for count in COUNTS}
        taken: dict[int, list[float]] = {count: [] for count in COUNTS}
        for step in range(1, ROUNDS + 2):
            for count, folder in folders.items():
                taken[count].append(save(dataclasses.replace(default, step=step, run_id="run"), folder))
                print(f"  {count:,} checkpoints, save {step}: {1000 * taken[count][-1]:.0f} ms", file=sys.stderr)
        first = statistics.median(taken[COUNTS[0]][1:])
        for count, each in taken.items():
            median = statistics.median(each[1:])
            print(f"{count:6,} checkpoints: {1000 * median:.0f} ms, {median / first:.2f} of the first; "
                  f"the run's first save {each[0]:.2f} s")  # fmt: skip


def made(folder: Path, **settings: str) -> Checkpoint:
    """Return the record of a run after one step."""
    places = {"CHECKPOINT_DIR": str(folder), "RUNS_DIR": str(folder), "PYTHON_DOTENV_DISABLED": "1"}
    run = fresh(config.read(settings | places), Log())
    run.metrics = Metrics(folder / "metrics.jsonl")
    training.training_step(run, 1e-4)  # so that the optimizer has its state
    return to_record(run)


def filled(folder: Path, record: Checkpoint, count: int) -> Path:
    """Return a new folder with so many copies of a small checkpoint of another run."""
    path = ckpt.save(dataclasses.replace(record, run_id="other"), folder)
    for number in range(1, count):
        shutil.copy(path, path.with_name(f"copy{number}-{path.name}"))
    return folder


def save(record: Checkpoint, folder: Path) -> float:
    """Save it, put it into best/ and prune, as training does; return the seconds that this takes."""
    began = time.perf_counter()
    path = ckpt.save(record, folder)
    ckpt.keep_best(record, folder, saved=path)
    ckpt.prune(folder, run_id="run", keep_last=2, keep_every=0, latest_valid=path)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
