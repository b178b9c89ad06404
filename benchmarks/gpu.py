"""Measure training, saving and generating on one CUDA GPU against nanoGPT, transformers and what the card can do.

    NANOGPT_DIR=~/nanoGPT TINYSHAKESPEARE=~/input.txt python3 benchmarks/gpu.py     # at most four minutes
    python3 benchmarks/gpu.py --small                                               # the same code on the CPU, small

Every arm runs in its own process (gpu_arms.py); the processes of a part alternate. A part that takes longer than its
seconds, or an arm that fails, is reported as not measured, and the next part begins.
"""

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from measure import header, not_measured, row  # noqa: E402
from steps import nanogpt_folder  # noqa: E402

SMALL = "--small" in sys.argv[1:]
ARMS = Path(__file__).with_name("gpu_arms.py")
LIMITS = {"training": 100, "saving": 25, "generating": 40, "serving": 25, "time to loss": 25}  # seconds of each part
ROUNDS, STEPS, TOKENS = (2, 2, 8) if SMALL else (5, 20, 256)  # a turn is so many steps or tokens
BEHIND_A_SAVE = 2 if SMALL else 20  # steps

# The TFLOP/s of dense bfloat16 products with float32 sums, by the beginning of the device's name. From NVIDIA's data
# sheets of each card (where they give figures "with sparsity", half of them), and for the last two from the papers on
# their architectures, Ada and GA102. B200, H100, A100 and RTX 4090 were compared with other tables, the others were not:
# look at the card's own sheet before a share is quoted.
PEAKS = {
    "NVIDIA B200": 2250, "NVIDIA H200": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H100": 989,
    "NVIDIA A100": 312, "NVIDIA A10": 125, "NVIDIA L40S": 362, "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 4090": 165, "NVIDIA GeForce RTX 3090": 71,
}  # fmt: skip
GOALS = {"tokens/s": "1.2", "save": "1.02"}


def main() -> None:
    """Print the table."""
    if not SMALL and not torch.cuda.is_available():
        print("not measured: no CUDA device here; --small runs the same on the CPU")
        return
    name = "the CPU" if SMALL else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    header()
    with tempfile.TemporaryDirectory(dir=place_for_saves()) as folder:
        part("training", lambda clock: training(clock, name, Path(folder)))
        part("generating", lambda clock: generating(clock, Path(folder)))
        part("serving", lambda clock: serving(clock, Path(folder)))
        part("time to loss", lambda clock: time_to_loss(clock, Path(folder)))


def place_for_saves() -> Path:
    """Return the folder of checkpoints, on the disk that checkpoints are written to."""
    (ROOT / "checkpoints").mkdir(exist_ok=True)
    return ROOT / "checkpoints"


def part(name: str, work: Callable[["Clock"], None]) -> None:
    """Do a part of the measurements; report as one row why it ended before its end."""
    try:
        work(Clock(LIMITS[name]))
    except (ArmError, subprocess.SubprocessError) as error:
        not_measured(name, str(error))


class Clock:
    """The time left to a part."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds * (10 if SMALL else 1)

    def left(self) -> float:
        """Return the seconds left, at least a hundredth."""
        return max(0.01, self._end - time.monotonic())


class ArmError(Exception):
    """An arm failed, or took too long."""


class Arm:
    """A process that measures on request: it answers one line of JSON with one."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._log = name, folder / f"{name}.log".replace(" ", "_")
        own = {"PYTHON_DOTENV_DISABLED": "1", "GPU_BENCHMARK_FOLDER": str(folder), "GPU_BENCHMARK_ROWS": str(rows())}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(ARMS), name, *["--small"] * SMALL], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, env=os.environ | own,
            )  # fmt: skip

    def ask(self, clock: Clock, action: str, **arguments: Any) -> Any:
        """Return the answer. Raise ArmError with the last line of its log if there is none in time."""
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018
        try:
            self._process.stdin.write(json.dumps({"do": action} | arguments).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ArmError(f"{self.name}: {self._last_words()}") from None
        ready, _, _ = select.select([self._process.stdout], [], [], clock.left())
        line = self._process.stdout.readline() if ready else b""
        if not line:
            raise ArmError(f"{self.name}: {self._last_words() if ready else 'the time of this part is over'}")
        print(f"  {self.name}: {action} {arguments or ''} {line.decode().strip()[:150]}", file=sys.stderr)
        return json.loads(line)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "ended without a word"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def rows() -> int:
    """Return how many sequences a step has: 12, as in nanoGPT's bench.py, where the card holds four trainings of them."""
    if SMALL:
        return 2
    return 12 if torch.cuda.get_device_properties(0).total_memory > 64e9 else 2


def started(names: list[str], folder: Path, clock: Clock) -> dict[str, Arm]:
    """Return those arms that start, all at once, since they compile; report the others as not measured."""
    arms = {name: Arm(name, folder) for name in names}
    for name, arm in list(arms.items()):
        try:
            arm.ask(clock, "start")
        except ArmError as error:
            not_measured(name, str(error))
            arms.pop(name).close()
    return arms


def alternating(arms: dict[str, Arm], clock: Clock, action: str, **arguments: Any) -> dict[str, float]:
    """Return the median answer of each arm, in ROUNDS rounds after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, ROUNDS):
        for name, arm in arms.items():
            taken[name] += [arm.ask(clock, action, **arguments)][: number + 1]
    return {name: statistics.median(each) for name, each in taken.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The parts.


def training(clock: Clock, card: str, folder: Path) -> None:
    """Measure tokens per second, their share of the card's peak, memory, and what saving costs."""
    names = ["compiled", "compiled, DETERMINISTIC=false", "eager, muon", *["nanogpt"] * bool(nanogpt_folder())]
    arms = started(names, folder, clock)
    if not arms:
        return
    try:
        facts = {name: arm.ask(clock, "facts") for name, arm in arms.items()}
        seconds = alternating(arms, clock, "steps", count=STEPS)
        rates = {name: STEPS * facts[name]["tokens"] / each for name, each in seconds.items()}
        if known_peak(card) is None:
            not_measured("share of the peak", f"none is known of {card}; the limit is what an arm computes")
        for name in rates:
            training_row(name, rates, facts[name], peak=known_peak(card))
        rate = next(iter(arms.values())).ask(clock, "product") / 1e12
        row("a product of 8192 x 8192 in bfloat16", ours="-", limit=f"{rate:.0f} TFLOP/s")
        for name, arm in arms.items():
            row(f"memory, {name}", ours=f"{arm.ask(clock, 'memory') / 1e9:.2f} GB")
        if not nanogpt_folder():
            not_measured("nanoGPT, compiled", "NANOGPT_DIR is not set")
        if "compiled" in arms:
            part("saving", lambda clock: saving(clock, arms["compiled"]))
    finally:
        for arm in arms.values():
            arm.close()


def known_peak(card: str) -> float | None:
    """Return the FLOP/s of bfloat16 of a card by its name; None for an unknown card."""
    peak = next((tera for name, tera in PEAKS.items() if card.startswith(name)), None)
    return None if peak is None else 1e12 * peak


def training_row(name: str, rates: dict[str, float], facts: dict[str, Any], *, peak: float | None) -> None:
    """Print the row of an arm: its rate, nanoGPT's, and its share of the peak, counted as nanoGPT counts FLOPs."""
    peer, rate = rates.get("nanogpt"), rates[name]
    used = rate * facts["flops_per_token"]
    row(
        f"training {facts['shape']}, {name}",
        ours="-" if name == "nanogpt" else f"{rate:,.0f} tok/s",
        peer=f"{peer:,.0f} tok/s" if peer else "-",
        ratio=rate / peer if peer and name != "nanogpt" else None,
        bound=GOALS["tokens/s"],
        limit=f"{peak / 1e12:.0f} TFLOP/s" if peak else f"{used / 1e12:.1f} TFLOP/s",
        share=used / peak if peak else None,
    )


def saving(clock: Clock, arm: Arm) -> None:
    """Measure what a save costs the steps behind it: time inside save(), steps with and without, and the rest of its writing."""
    pairs = [
        [arm.ask(clock, "steps_after", save=save, count=BEHIND_A_SAVE) for save in (False, True)]
        for _ in range(1 + min(3, ROUNDS))
    ][1:]
    without, with_save = (statistics.median(each[i]["steps"] for each in pairs) for i in (0, 1))
    inside, drain = (statistics.median(each[1][name] for each in pairs) for name in ("inside", "drain"))
    row("time inside save()", ours=f"{1e3 * inside:.1f} ms", limit=f"{drain:.2f} s more to write")
    row(
        f"{BEHIND_A_SAVE} steps with a save, against without",
        ours=f"{1e3 * with_save:.0f} ms",
        peer=f"{1e3 * without:.0f} ms",
        ratio=with_save / without,
        bound=f"at most {GOALS['save']}",
    )


def generating(clock: Clock, folder: Path) -> None:
    """Measure tokens per second of one text against transformers, and against reading the weights once for each."""
    arms = started(["generate", "transformers"], folder, clock)
    try:
        if "generate" not in arms:
            return
        facts = arms["generate"].ask(clock, "facts")
        rates = {name: TOKENS / each for name, each in alternating(arms, clock, "tokens", count=TOKENS).items()}
        bandwidth, peer = arms["generate"].ask(clock, "bandwidth"), rates.get("transformers")
        limit = bandwidth / facts["bytes"]
        row(
            f"one text, {facts['shape']}, {facts['weights']}",
            ours=f"{rates['generate']:.0f} tok/s",
            peer=f"{peer:.0f} tok/s" if peer else "-",
            ratio=rates["generate"] / peer if peer else None,
            limit=f"{limit:.0f} tok/s",
            share=rates["generate"] / limit,
        )
        row("  reading and writing memory", ours="-", limit=f"{bandwidth / 1e12:.2f} TB/s")
    finally:
        for arm in arms.values():
            arm.close()


def serving(clock: Clock, folder: Path) -> None:
    """Measure 16 requests at once against one after the other, through the server."""
    arms = started(["serve"], folder, clock)
    try:
        for arm in arms.values():
            taken = {how: arm.ask(clock, "requests", at_once=how == "at once") for how in ("in turn", "at once")}
            rates = {how: each["tokens"] / each["seconds"] for how, each in taken.items()}
            row(
                f"16 requests at once ({taken['at once']['how']})",
                ours=f"{rates['at once']:.0f} tok/s",
                peer=f"{rates['in turn']:.0f} tok/s",
                ratio=rates["at once"] / rates["in turn"],
            )
    finally:
        for arm in arms.values():
            arm.close()


def time_to_loss(clock: Clock, folder: Path) -> None:
    """Measure the seconds to a validation loss of 1.90 on tiny Shakespeare, against nanoGPT's loop."""
    metric = "seconds to validation loss 1.90, 0.8M"
    if "TINYSHAKESPEARE" not in os.environ:
        return not_measured(metric, "TINYSHAKESPEARE does not name the text")
    arms = started(["learn", *["learn as nanogpt"] * bool(nanogpt_folder())], folder, clock)
    try:
        found = {name: arm.ask(clock, "learn") for name, arm in arms.items()}
    finally:
        for arm in arms.values():
            arm.close()
    if "learn" not in found:
        return None
    shown = {name: f"{each['seconds']:.1f} s to {each['loss']:.3f}" for name, each in found.items()}
    peer = found.get("learn as nanogpt")
    ratio = found["learn"]["seconds"] / peer["seconds"] if peer else None
    return row(metric, ours=shown["learn"], peer=shown.get("learn as nanogpt", "-"), ratio=ratio, bound="0.25")


if __name__ == "__main__":
    main()
