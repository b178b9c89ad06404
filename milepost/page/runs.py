"""What the page shows of a run besides its curves: what became of it, its checkpoints, samples and settings, as JSON."""

import contextlib
import hashlib
import heapq
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from milepost import ckpt, config
from milepost.ckpt import Found
from milepost.ckpt.finding import loss_of
from milepost.config.variables import VARIABLES
from milepost.page.columns import Columns, Splits
from milepost.paths import is_real_file
from milepost.plots.curves import begins_anew
from milepost.reporting import base_variable, resume_command
from milepost.runtime.progress import shown
from milepost.screen import harmless

SAMPLES = 30  # newest of a run
SAMPLE_BYTES = 16_384  # of a sample
SAMPLE_NAME = re.compile(r"step(\d{1,15})\.txt")
NAME = 200  # characters of a name or a value
Json = dict[str, Any]


def digest(name: bytes) -> str:
    """Return an id for addresses, so that no request holds a path."""
    return hashlib.blake2b(name, digest_size=9).hexdigest()


def plain(value: object, *, length: int = NAME) -> str:
    """Return a name or a value from a file as one harmless line."""
    text = harmless(str(value)[: 2 * length], one_line=True)
    return text if len(text) <= length else f"{text[:length]}..."


def summary(name: str, splits: Splits, settings: dict[str, str], parent: Json | None) -> Json:
    """Return the figures of a run, as far as its lines and its settings tell."""
    train, validation = (splits.get(split, Columns()) for split in ("train", "validation"))
    steps = [step for each in splits.values() if (step := each.last("step")) is not None]
    times = [time for each in splits.values() if (time := each.last("time")) is not None]
    figures = {
        "step": max(steps, default=None), "loss": train.last("loss"), "validation": validation.last("loss"),
        "best": validation.lowest("loss"), "speed": train.last("tok_s"), "tokens": train.last("tokens"),
        "began": min((each.fields["time"][0] for each in splits.values() if each.count), default=None),
        "time": max(times, default=None), "first": min((each.fields["step"][0] for each in splits.values()), default=None),
    }  # fmt: skip
    first = {split: each.lowest("step") for split, each in (("train", train), ("validation", validation))}
    return {
        "name": plain(name),
        "note": plain(settings.get("RUN_NOTE", "")),
        "steps": planned(settings),
        "parent": beginning(parent, anew=begins_anew(parent, **first)),
        **{key: None if value is None or not math.isfinite(value) else value for key, value in figures.items()},
    }


def planned(settings: dict[str, str]) -> int | None:
    """Return the TRAINING_STEPS of a run; None if they are unknown."""
    with contextlib.suppress(ValueError):
        return int(settings.get("TRAINING_STEPS", ""))
    return None


def beginning(parent: Json | None, *, anew: bool) -> Json | None:
    """Return the checkpoint that the run began with, and the settings that changed."""
    if parent is None:
        return None
    changed = parent.get("changed")
    pairs = changed.items() if isinstance(changed, dict) else ()
    changes = [f"{name} {' -> '.join(map(str, values))}" for name, values in pairs if isinstance(values, list)]
    step = parent.get("step")
    return {
        "name": plain(parent.get("run_id") or parent.get("file") or "other weights"),
        "step": step if isinstance(step, int) else None,
        "anew": anew,
        "changed": [plain(change) for change in changes],
    }


def state(figures: Json, *, training: bool) -> str:
    """Return what became of a run: training, finished, interrupted or unknown."""
    if training:
        return "training"
    if figures["step"] is None or figures["steps"] is None:
        return "unknown"
    return "finished" if figures["step"] >= figures["steps"] else "interrupted"


def resume_line(found: Iterable[Found], *, checkpoint_dir: Path, runs_dir: Path) -> str | None:
    """Return the command that resumes a run from the latest of its checkpoints; None if it cannot be resumed."""
    latest = ckpt.latest([each for each in found if each.resumable])
    if latest is None:
        return None
    base, variable = latest.metadata.get("base"), None
    if isinstance(base, dict) and "adapters" in latest.metadata.get("parts", ()):
        pretrained = (latest.metadata.get("hyperparameters") or {}).get("GPT2_MODEL_NAME")
        variable = base_variable(base, pretrained=bool(pretrained))
    return resume_command(latest.path, checkpoint_dir=checkpoint_dir, runs_dir=runs_dir, more=variable)


def checkpoints(found: Iterable[Found], problems: Callable[[Found], list[str] | None]) -> list[Json]:
    """Return the checkpoints of a run, oldest first. `problems` returns what was found wrong; None if nobody has verified it."""
    own = list(found)
    best, latest = ckpt.lowest_loss(own), ckpt.latest(own)
    return [
        {
            "id": digest(os.fsencode(each.path)),
            "path": plain(shown(each.path), length=500),
            "problems": problems(each),
            "step": each.step,
            "loss": loss_of(each),
            "bytes": each.size,
            "layout": each.layout,
            "saved_at": plain(each.metadata.get("saved_at") or ""),
            "resumable": each.resumable,
            "best": each is best,
            "latest": each is latest,
        }
        for each in own
    ]


def damaged(found: Iterable[Found]) -> list[Json]:
    """Return the checkpoints that cannot be read: their run is unknown too."""
    return [{"path": plain(shown(each.path), length=500), "kind": str(each.kind), "problem": plain(each.problem, length=500)}
            for each in found if each.problem]  # fmt: skip


def sampled(folder: Path) -> list[int]:
    """Return the steps of the samples of a run, the newest SAMPLES of them, oldest first."""
    with contextlib.suppress(OSError):
        names = (SAMPLE_NAME.fullmatch(path.name) for path in (folder / "samples").iterdir())
        return sorted(heapq.nlargest(SAMPLES, {int(name[1]) for name in names if name}))
    return []


def samples(folder: Path) -> list[Json]:
    """Return the newest samples of a run, oldest first; without those that cannot be read."""
    found = []
    for step in sampled(folder):
        with contextlib.suppress(OSError):
            path = folder / "samples" / f"step{step:06d}.txt"
            if is_real_file(path):  # a link may lead anywhere, and reading a pipe would block
                with open(path, "rb") as file:
                    text = file.read(SAMPLE_BYTES).decode(errors="replace")
                found.append({"step": step, "text": harmless(text)})
    return found


def settings_shown(settings: dict[str, str]) -> dict[str, str]:
    """Return the settings of a run that decide its weights, as lines to show."""
    return {
        name: plain(settings[name])
        for name, each in VARIABLES.items()
        if name in settings and each.metadata["scope"] in ("identity", "math")
    }


def labels(settings: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return for each run the settings in which the runs differ, as one harmless line."""
    return {run: plain(text, length=500) for run, text in config.labels(settings).items()}
