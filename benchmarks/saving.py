"""Measure saving GPT-2 (124M parameters) with AdamW's state, 1.5 GB, against torch.save and against the disk.

    python3 benchmarks/saving.py          # about six minutes and 8 GB of disk

Every figure is a ratio of medians of alternating arms. "Stall" is the total loss of a run: the wall time of steps with a save, drained at the
end, minus that of as many steps without.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from milepost import config  # noqa: E402

SETTINGS = {
    "MODEL_TYPE": "gpt2", "N_LAYER": "12", "N_HEAD": "12", "N_EMBD": "768", "TOKENIZER": "gpt2", "BLOCK_SIZE": "256",
    "BATCH_SIZE": "1",
    "DROPOUT": "0", "ENABLE_CHECKPOINTS": "true", "CHECKPOINT_KEEP_LAST": "1", "CHECKPOINT_KEEP_BEST": "0",
}  # fmt: skip
ROUNDS = 5
STEPS, PAIRS = 20, 3  # steps between two saves, and how often they are run with one and without

import torch  # noqa: E402

import training  # noqa: E402
from milepost import ckpt  # noqa: E402
from milepost.files import new_file  # noqa: E402
from milepost.run import Run, fresh, to_record  # noqa: E402
from milepost.run_checkpoints import save_checkpoint  # noqa: E402
from milepost.runtime.progress import Log, Metrics  # noqa: E402


def main() -> None:
    """Print the table."""
    (ROOT / "checkpoints").mkdir(exist_ok=True)  # on the disk that checkpoints are written to
    with tempfile.TemporaryDirectory(dir=ROOT / "checkpoints") as name:
        folder = Path(name)
        places = {"CHECKPOINT_DIR": name, "RUNS_DIR": name, "PYTHON_DOTENV_DISABLED": "1"}
        run = fresh(config.read(SETTINGS | places), Log())
        run.metrics = Metrics(folder / "metrics.jsonl")
        training.training_step(run, 1e-4)  # so that the optimizer has its state
        size = sum(tensor.nbytes for tensor in ckpt.record.named_tensors(to_record(run)).values())
        print(f"{size / 1e9:.2f} GB of tensors, {torch.get_num_threads()} threads, {run.dtype}")
        inside_save(run, folder)
        blocking(run, folder, size)
        opening(run, folder)
        whole_run(run)


def seconds(action: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def compare(arms: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median seconds of each arm. The arms alternate; the first round does not count."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            one = seconds(arm)
            print(f"  {name}: {one:.3f} s{'' if number else ' (not counted)'}", file=sys.stderr)
            taken[name] += [one] if number else []
    return {name: statistics.median(each) for name, each in taken.items()}


def inside_save(run: Run, folder: Path) -> None:
    """Measure how long save() blocks the loop, and how long the next update waits for the copy."""

    def torch_save() -> None:
        record = to_record(run)
        torch.save({"model": record.model_state, "optimizer": record.optimizer_state}, folder / "plain.pt")

    def background() -> None:
        run.state.step += 1
        save_checkpoint(run, regular=True)

    taken: list[tuple[float, float, float]] = []
    for number in range(ROUNDS + 1):
        (folder / "plain.pt").unlink(missing_ok=True)
        plain, ours, copy = seconds(torch_save), seconds(background), seconds(run.writer.settle)
        run.writer.wait()
        print(f"  torch.save {plain:.3f} s, save() {ours:.4f} s, copy {copy:.3f} s", file=sys.stderr)
        taken += [(plain, ours, ours + copy)] if number else []
    (folder / "plain.pt").unlink()
    plain, ours, both = map(statistics.median, zip(*taken, strict=True))
    print(f"time inside save():            1/{plain / ours:.0f} of torch.save's {plain:.2f} s (bound 1/15)")
    print(f"with the copy, nothing beside:  1/{plain / both:.0f}")


def blocking(run: Run, folder: Path, size: int) -> None:
    """Measure a durable save with checksums against dd of as many zeros."""
    target, zeros, record = folder / "save.pt", folder / "zeros", to_record(run)

    def ours() -> None:
        target.unlink(missing_ok=True)
        content = {"model_state_dict": record.model_state, "optimizer_state_dict": record.optimizer_state}
        with new_file(target) as file:
            ckpt.archive.dump(content, file, metadata={})

    def dd() -> None:
        zeros.unlink(missing_ok=True)
        blocks = ["bs=8M", f"count={size // 2**23}", "conv=fsync"]
        subprocess.run(["dd", "if=/dev/zero", f"of={zeros}", *blocks], check=True, capture_output=True)

    median = compare({"blocking save": ours, "dd conv=fsync": dd})
    for path in (target, zeros):
        path.unlink()
    ratio = median["dd conv=fsync"] / median["blocking save"]
    print(
        f"blocking save:                 {ratio:.2f} of dd conv=fsync, "
        f"{size / median['blocking save'] / 1e9:.2f} GB/s (bound 0.6)"
    )


OPEN = """
import sys, torch
sys.path.insert(0, {root!r})
from pathlib import Path
from milepost import ckpt
from milepost.ckpt.restore import build_model
def memory(word):  # of this process, in bytes: VmRSS now, VmHWM the most since it was reset
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(word))
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
model = build_model(ckpt.load(Path({path!r}), optimizer=False), device=torch.device("cpu"), shared=True)
total = sum(float(p.detach().sum()) for p in model.parameters())  # every weight is read
print((memory("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


def opening(run: Run, folder: Path) -> None:
    """Measure opening a full checkpoint for generation against torch.load of the whole; both from a warm page cache."""
    path = ckpt.save(to_record(run), folder)

    def ours() -> None:
        record = ckpt.load(path, optimizer=False)
        ckpt.restore.build_model(record, device=torch.device("cpu"), shared=True)

    median = compare({"open": ours, "torch.load": lambda: torch.load(path, weights_only=True)})
    ratio = median["torch.load"] / median["open"]
    print(f"opening for inference:         1/{ratio:.0f} of torch.load's {median['torch.load']:.2f} s (bound 1/10)")
    script = OPEN.format(root=str(ROOT), path=str(path))
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    print(f"its peak memory, weights read: {float(done.stdout):.2f} of the model's bytes (bound 1.2)")


def whole_run(run: Run) -> None:
    """Measure steps with a save at their start, drained at their end, against the same steps without."""

    def steps(*, save: bool) -> None:
        if save:
            save_checkpoint(run, regular=True)
        for _ in range(STEPS):
            training.training_step(run, 1e-4)
        run.writer.wait()

    arms = {"without": lambda: steps(save=False), "with a save": lambda: steps(save=True)}
    median = compare(arms, rounds=PAIRS)
    stall = median["with a save"] - median["without"]
    ratio, step = median["with a save"] / median["without"], median["without"] / STEPS
    print(
        f"a save every {STEPS} steps of {step:.2f} s: {ratio:.3f} of the time without, a stall of {stall:.2f} "
        f"s (bound 1.06)"
    )


if __name__ == "__main__":
    main()
