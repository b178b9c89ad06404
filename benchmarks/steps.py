"""Measure a training step against unmodified nanoGPT (float32, eager on a CPU) with equal batch and shapes, and against the machine.

    NANOGPT_DIR=~/nanoGPT python3 benchmarks/steps.py        # about five minutes

Each trains in its own process, and the processes alternate.
"""

import contextlib
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from milepost import config  # noqa: E402

SHAPES = {  # name: layers, heads, width, tokens, rows, steps a turn
    "0.8M": (4, 4, 128, 64, 12, 100),
    "10.7M": (6, 6, 384, 256, 16, 2),
    "124M": (12, 12, 768, 256, 4, 1),
    "124M, T=1024, B=8": (12, 12, 768, 1024, 8, 1),
}
BOUNDS = {"0.8M": "1.8", "10.7M": "3", "124M": "3"}
ROUNDS = 5
LONG = "124M, T=1024, B=8"
CURVE = 500  # steps after which the losses of two number formats are compared

import torch  # noqa: E402
from measure import gemm_rate, header, not_measured, row, seconds  # noqa: E402

import training  # noqa: E402
from milepost.run import Run, fresh  # noqa: E402
from milepost.runtime import hardware  # noqa: E402
from milepost.runtime.progress import Log  # noqa: E402
from models import attention, head, parameter_count  # noqa: E402


def main() -> None:
    """Print the table."""
    header()
    for name in BOUNDS:
        throughput(name)
    memory()
    curve()


def settings(name: str, **more: str) -> dict[str, str]:
    """Return the variables of a shape; all others have their defaults."""
    layers, heads, width, tokens, rows, _ = SHAPES[name]
    sizes = {"N_LAYER": layers, "N_HEAD": heads, "N_EMBD": width, "BLOCK_SIZE": tokens, "BATCH_SIZE": rows}
    kind = {"MODEL_TYPE": "gpt2", "TOKENIZER": "gpt2" if width == 768 else "char", "BIAS": "false", "DROPOUT": "0"}
    return kind | {key: str(value) for key, value in sizes.items()} | {"PYTHON_DOTENV_DISABLED": "1"} | more


def throughput(name: str) -> None:
    """Measure the steps per second of both, and our share of the rate that matrix products allow."""
    layers, _, width, tokens, rows, steps = SHAPES[name]
    arms = {arm: Worker(arm, name) for arm in ("ours", "nanogpt") if arm == "ours" or nanogpt_folder()}
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(-1, ROUNDS):
        for arm, worker in arms.items():
            one = worker.ask(steps) / steps
            print(f"  {name} {arm}: {one:.4f} s a step{'' if number >= 0 else ' (not counted)'}", file=sys.stderr)
            taken[arm] += [one] if number >= 0 else []
    count = int(arms["ours"].ask(0))
    flops = rows * tokens * (6 * (count - tokens * width) + 12 * layers * width * tokens)  # PaLM's count, as in nanoGPT
    for worker in arms.values():
        worker.close()
    # Without bfloat16 instructions its product takes minutes, and float32 is what the processor can do.
    fastest = torch.bfloat16 if hardware.multiplies_bfloat16() else torch.float32
    ours, limit = statistics.median(taken["ours"]), flops / gemm_rate(fastest)
    peer = statistics.median(taken["nanogpt"]) if "nanogpt" in taken else None
    row(
        f"training step, {name}",
        ours=f"{1e3 * ours:.1f} ms",
        peer=f"{1e3 * peer:.1f} ms" if peer else "NANOGPT_DIR unset",
        ratio=peer / ours if peer else None,
        bound=BOUNDS[name],
        limit=f"{1e3 * limit:.1f} ms, {str(fastest).removeprefix('torch.')} GEMM",
        share=limit / ours,
    )


def memory() -> None:
    """Measure the peak memory of two steps with long sequences, where the logits would be the largest tensor."""
    if not nanogpt_folder():
        return not_measured(f"peak memory, {LONG}", "NANOGPT_DIR is not set")
    peaks = {}
    for arm in ("ours", "nanogpt"):
        worker = Worker(arm, LONG)
        worker.ask(2)  # in the second the optimizer's state is there
        peaks[arm] = worker.ask(-1)
        worker.close()
    figures = {arm: f"{peak / 1e9:.2f} GB" for arm, peak in peaks.items()}
    ratio = peaks["ours"] / peaks["nanogpt"]
    return row(f"peak memory, {LONG}", ours=figures["ours"], peer=figures["nanogpt"], ratio=ratio, bound="at most 0.6")


def curve() -> None:
    """Compare the loss after equal steps on the same data with that of plain float32: no kernel of ours, no chunks."""
    losses = {}
    for arm, (dtype, short, chunk) in {
        "ours": ("auto", attention.SHORT, head.CHUNK),
        "plain": ("float32", 0, 2**62),
    }.items():
        attention.SHORT, head.CHUNK = short, chunk
        run = prepared(settings("0.8M", DTYPE=dtype, TRAINING_STEPS=str(CURVE)))
        each = [
            training.training_step(run, training.lr_at(run.state.step, run.schedule))["loss"].item()
            for _ in range(CURVE)
        ]
        losses[arm] = statistics.mean(each[-50:])
    figures = {"ours": f"{losses['ours']:.4f}", "peer": f"{losses['plain']:.4f} plain"}
    row(
        f"training loss after {CURVE} steps, 0.8M",
        **figures,
        ratio=losses["ours"] / losses["plain"],
        bound="0.99 to 1.01",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The processes.


class Worker:
    """A process that trains one arm: asked for a number of steps, it answers with their seconds."""

    def __init__(self, arm: str, name: str) -> None:
        command = [sys.executable, __file__, arm, name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, steps: int) -> float:
        """Return the seconds of `steps` steps; for 0 the number of parameters, for -1 the peak memory in bytes."""
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018
        print(steps, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def work(arm: str, name: str) -> None:
    """Answer on stdout the requests on stdin."""
    step, count = (ours if arm == "ours" else nanogpt)(name)
    for line in sys.stdin:
        asked = int(line)
        if asked < 0:
            answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        else:
            answer = seconds(lambda: [step() for _ in range(asked)]) if asked else float(count)  # noqa: B023
        print(answer, flush=True)


def prepared(values: dict[str, str]) -> Run:
    """Return a run as training.py builds it, on the bundled text."""
    run = fresh(config.read(values), Log())
    hardware.keep_freed_memory()
    return run


def ours(name: str) -> tuple[Callable[[], object], int]:
    """Return the training step of the loop, and the number of parameters."""
    run = prepared(settings(name, OPTIMIZER="adamw"))  # as there
    return lambda: training.training_step(run, 1e-3), parameter_count(run.model)


def nanogpt(name: str) -> tuple[Callable[[], object], int]:
    """Return the step of nanoGPT's train.py (its model, optimizer and clipping) on random tokens,
    and the number of parameters.
    """
    _, _, width, tokens, rows, _ = SHAPES[name]
    vocab_size = 50304 if width == 768 else 65
    model, optimizer = nanogpt_model(name, vocab_size=vocab_size, beta2=0.95)
    x, y = torch.randint(vocab_size, (2, rows, tokens))

    def step() -> None:
        model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, parameter_count(model)


def nanogpt_model(
    name: str, *, vocab_size: int, beta2: float, device: str = "cpu"
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return nanoGPT's model of a shape and its optimizer, from its checkout."""
    layers, heads, width, tokens, _, _ = SHAPES[name]
    sys.path.insert(0, str(nanogpt_folder()))
    from model import GPT, GPTConfig

    sizes = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": tokens, "vocab_size": vocab_size}
    with contextlib.redirect_stdout(sys.stderr):  # it tells of itself
        model = GPT(GPTConfig(**sizes, dropout=0.0, bias=False)).to(device)
        return model, model.configure_optimizers(0.1, 1e-3, (0.9, beta2), device)


def nanogpt_folder() -> Path | None:
    """Return the folder of a checkout of https://github.com/karpathy/nanoGPT, if NANOGPT_DIR names one."""
    folder = os.environ.get("NANOGPT_DIR")
    return Path(folder).expanduser() if folder else None


if __name__ == "__main__":
    work(*sys.argv[1:]) if sys.argv[1:] else main()
