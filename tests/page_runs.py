"""Runs for the tests of the page: their files as training leaves them, without training."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from records import record

from milepost import ckpt

XSS = (
    "<img src=x onerror=\"window.hit=1\">",
    "<script>window.hit=1</script>",
    "\"><svg onload='window.hit=1'>",
    "</script><script>window.hit=1</script>",
    "</style><script>window.hit=1</script>",
    "javascript:window.hit=1",
    "<!--<script>window.hit=1",
    "]]><iframe srcdoc='<script>parent.hit=1</script>'>",
    "{{constructor.constructor('window.hit=1')()}}",
    "`${window.hit=1}`",
    "\u202e<b>",
)  # fmt: skip
BASE, FAST, CHILD, CUT = "20261127-090000-base", "20261127-091000-fast", "20261127-092000-child", "20261127-093000-cut"


def line(step: int, split: str, loss: float, *, since: float, **more: float) -> str:
    """A line of metrics.jsonl, a second for each step."""
    train = {"lr": 1e-3 / (1 + step / 100), "grad_norm": 1.0, "tok_s": 9000.0 + step} if split == "train" else {}
    common = {"loss": loss, "lr": None, "grad_norm": None, "tokens": step * 512, "tok_s": None}
    return json.dumps({"step": step, "time": since + step, "split": split} | common | train | more) + "\n"


def write_run(
    folder: Path,
    name: str,
    steps: Iterable[int],
    *,
    since: float = 1.79e9,
    rate: float = 1.0,
    parent: object = None,
    sample: str = "It was I been said so.",
    **settings: str,
) -> Path:
    """Write a run whose training loss falls from 4 towards 2, with a validation and a sample every 100 steps."""
    place = folder / "runs" / name
    (place / "samples").mkdir(parents=True)
    with open(place / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in steps:
            loss = 2 + 2 * math.exp(-rate * step / 200) + 0.05 * math.sin(step)
            file.write(line(step, "train", loss, since=since))
            if step % 100 == 0:
                file.write(line(step, "validation", loss + 0.1, since=since))
                (place / "samples" / f"step{step:06d}.txt").write_text(f"{sample}\nstep {step}\n", encoding="utf-8")
    values = {"TRAINING_STEPS": str(max(steps)), "MODEL_TYPE": "gpt2", "LEARNING_RATE": "1e-3"} | settings
    (place / "config.env").write_text("".join(f"{each}={value}\n" for each, value in values.items()), encoding="utf-8")
    (place / "run.json").write_text(json.dumps({"run_id": name, "parent": parent}), encoding="utf-8")
    return place


def save(folder: Path, name: str, *steps: int, **changes: object) -> None:
    """Save a small checkpoint of a run at each of the steps."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    for step in steps:
        ckpt.save(record(step, run_id=name, validation_loss=3 - step / 1000, **changes), folder / "checkpoints")


def family(folder: Path) -> Path:
    """Two runs, a child of the first, and an interrupted run."""
    write_run(folder, BASE, range(2, 601, 2))
    write_run(
        folder,
        FAST,
        range(2, 601, 2),
        since=1.79e9 + 1000,
        rate=2,
        LEARNING_RATE="4e-3",
        RUN_NOTE="four times the rate",
    )
    parent = {"run_id": BASE, "step": 400, "file": "x.pt", "changed": {"LEARNING_RATE": [1e-3, 3e-4]}}
    write_run(folder, CHILD, range(402, 901, 2), since=1.79e9 + 2000, parent=parent, LEARNING_RATE="3e-4")
    write_run(folder, CUT, range(2, 301, 2), since=1.79e9 + 3000, TRAINING_STEPS="5000", DROPOUT="0.2")
    save(folder, BASE, 200, 400, 600)
    save(folder, FAST, 600, optimizer_state=None)
    save(folder, CHILD, 500, 900)
    save(folder, CUT, 100, 300)
    return folder
