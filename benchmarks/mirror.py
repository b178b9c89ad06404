"""Measure training steps with a mirror against the same steps without one. Both save a checkpoint before them.

    python3 benchmarks/mirror.py                       # about five minutes; the mirror is a folder beside the checkpoints
    python3 benchmarks/mirror.py s3://bucket/path      # a store; the last checkpoint stays there

The arms take turns at being first, as many steps of one run at a time as take about SECONDS. A figure is the median of the
seconds per step, from the save to the last step, in which the checkpoint must have arrived. The ratio is the median of the rounds'
ratios, so that a machine that slows down for a minute counts in both arms. Memory is the largest that the process had in an arm.
"""

import contextlib
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import header, not_measured, row, seconds  # noqa: E402

import training  # noqa: E402
from milepost import config  # noqa: E402
from milepost.run import Run, fresh  # noqa: E402
from milepost.run_checkpoints import save_checkpoint  # noqa: E402
from milepost.run_mirror import open_mirror  # noqa: E402
from milepost.runtime.progress import Log, Metrics, amount  # noqa: E402

SETTINGS = {
    "MODEL_TYPE": "gpt2", "N_LAYER": "6", "N_HEAD": "6", "N_EMBD": "384", "BLOCK_SIZE": "256", "BATCH_SIZE": "4",
    "ENABLE_CHECKPOINTS": "true", "CHECKPOINT_KEEP_LAST": "1", "CHECKPOINT_KEEP_BEST": "0", "MIRROR_KEEP_LAST": "1",
    "PYTHON_DOTENV_DISABLED": "1",
}  # fmt: skip
ROUNDS, SECONDS = 10, 12.0  # and a round that does not count
LIMIT = 1.02  # times a step without
MEMORY = 100e6  # bytes more than without: the parts of a large file under way, as docs/mirroring.md says
STATUS = Path("/proc/self/status")


def main() -> None:
    """Print the table."""
    (ROOT / "checkpoints").mkdir(exist_ok=True)  # on the disk that checkpoints are written to
    with tempfile.TemporaryDirectory(dir=ROOT / "checkpoints") as name, contextlib.ExitStack() as held:
        address = sys.argv[1] if len(sys.argv) > 1 else f"file://{name}/mirror"
        places = {"CHECKPOINT_DIR": f"{name}/checkpoints", "RUNS_DIR": f"{name}/runs", "CHECKPOINT_MIRROR": address}
        run = fresh(config.read(SETTINGS | places), Log())
        run.metrics = Metrics(Path(name) / "metrics.jsonl")
        open_mirror(run, held)
        training.training_step(run, 1e-4)  # so that the optimizer has its state
        compare(run, steps=max(2, round(SECONDS / seconds(lambda: training.training_step(run, 1e-4)))))


def compare(run: Run, *, steps: int) -> None:
    """Print the seconds per step of both arms, and how much more memory one takes."""
    size = f"a checkpoint of {amount(12 * sum(p.numel() for p in run.model.parameters()), 'B')} every {steps} steps"
    print(f"{size}, {2 * (ROUNDS + 1)} times: about {2 * (ROUNDS + 1) * SECONDS / 60:.0f} minutes", file=sys.stderr)
    uploader, late = run.uploader, 0
    taken: dict[str, list[float]] = {"without": [], "with": []}
    memory: dict[str, list[float]] = {"without": [], "with": []}
    for number in range(-1, ROUNDS):
        for arm in sorted(taken, reverse=number % 2 == 0):
            run.uploader = uploader if arm == "with" else None
            forget_peak()
            elapsed = seconds(lambda: save_and_train(run, steps)) / steps
            late += uploader.behind
            peak = peak_memory()
            missing = uploader.finish()  # whatever is left is outside of the figure, and told
            if missing:
                raise SystemExit("the mirror did not take a checkpoint, for the reason above")
            print(f"  {arm}: {elapsed:.4f} s per step{'' if number >= 0 else ' (warm-up)'}", file=sys.stderr)
            if number >= 0:
                taken[arm].append(elapsed)
                memory[arm].append(peak)
    figures = {arm: statistics.median(times) for arm, times in taken.items()}
    header()
    with_mirror, without = (f"{figures[arm]:.4f} s" for arm in ("with", "without"))
    ratio = statistics.median(with_it / alone for with_it, alone in zip(taken["with"], taken["without"], strict=True))
    row("a step with a mirror against one without", ours=with_mirror, peer=without, ratio=ratio, bound=f"<= {LIMIT}")
    report_memory(memory)
    if late:
        print(
            f"{late} checkpoints arrived after their steps: the mirror is slower than the checkpoints, so this is no figure"
        )


def save_and_train(run: Run, steps: int) -> None:
    """Save in the background, and train meanwhile."""
    save_checkpoint(run, regular=True)
    for _ in range(steps):
        training.training_step(run, 1e-4)
    run.writer.wait()


def forget_peak() -> None:
    """Let the largest memory of this process count from now on, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Return the bytes of the largest memory that this process had since `forget_peak`; 0 where they are not known."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0.0)


def report_memory(memory: dict[str, list[float]]) -> None:
    """Print how much more memory the arm with a mirror took."""
    most = {arm: max(peaks) for arm, peaks in memory.items()}
    if not most["with"]:
        not_measured("memory with a mirror", "only Linux tells it")
        return
    more = (most["with"] - most["without"]) / 1e6
    ours, peer = (f"{most[arm] / 1e6:.0f} MB" for arm in ("with", "without"))
    row(f"memory with a mirror: {more:+.0f} MB (<= {MEMORY / 1e6:.0f})", ours=ours, peer=peer)


if __name__ == "__main__":
    main()
