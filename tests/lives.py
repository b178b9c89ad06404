"""A run's life on a folder, in processes of its own: train, be killed, resume, prune, list, verify, and be bit-exact."""

import functools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import programs
from drive import ROOT, command, environment, small_text, tensor_bytes
from work import HANGING

from milepost import ckpt, files
from milepost.ckpt import Checkpoint
from milepost.runtime.progress import read_metrics

POLICY = {
    "CHECKPOINT_INTERVAL": "2", "CHECKPOINT_KEEP_LAST": "2", "CHECKPOINT_KEEP_BEST": "1", "TRAINING_STEPS": "24",
    "EVAL_INTERVAL": "8", "SAMPLE_INTERVAL": "0", "N_LAYER": "1", "N_HEAD": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
NOISE = ("Traceback", "UserWarning", "[Errno")
Figures = dict[tuple[int, str], float]


def places(place: Path) -> dict[str, str]:
    return {"CHECKPOINT_DIR": str(place / "checkpoints"), "RUNS_DIR": str(place / "runs")}


def said_by(script: str, own: Path, place: Path, *, code: int = 0, **changes: str) -> str:
    """Run a script with its output in `place`, and return what it said."""
    done = command(script, own, **(POLICY | places(place) | changes))
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert not any(word in said for word in NOISE), said
    return said


def trained_until(own: Path, place: Path, when: Callable[[], bool], **changes: str) -> int:
    """Train in `place` and kill the process as soon as `when` holds. Return its exit status."""
    small_text(own)
    env = {
        name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH", "OMP_WAIT_POLICY") if name in os.environ
    }
    env |= environment(own, **(POLICY | places(place) | changes))
    with open(own / "killed.log", "ab") as log:
        process = programs.start([sys.executable, "training.py"], cwd=ROOT, env=env, stdout=log, stderr=log)
        until = time.monotonic() + HANGING
        while process.poll() is None and not when():
            assert time.monotonic() < until
            time.sleep(0.005)
        process.kill()
        return process.wait()


def has_step(place: Path, step: int) -> bool:
    """Whether a checkpoint of a step at or after `step` is visible, by its name."""
    names = [name for _, folders, files_ in os.walk(place / "checkpoints") for name in (*folders, *files_)]
    return any(f"step{later:04d}" in name for later in range(step, step + 40) for name in names if name[0] != ".")


def outcome(place: Path, *, kept: int = 3) -> tuple[dict[str, bytes], Figures]:
    """Return the last checkpoint's tensors and every logged figure; assert that the folder is as the policy leaves it."""
    folder = place / "checkpoints"
    ckpt.index._last_listing.cache_clear()
    found = ckpt.find(folder)
    assert [each.problem for each in found if each.problem] == []
    for each in found:
        assert ckpt.verify(each.path) == []
    regular = [each for each in found if each.path.parent.name != "best"]
    assert 1 <= len(regular) <= kept, [each.path.name for each in regular]
    assert ckpt.best(found) is not None
    assert [path.name for path in folder.rglob(".tmp-*")] == []
    return tensor_bytes(_newest(found)), figures(place)


def _newest(found: list[ckpt.Found]) -> Checkpoint:
    last = ckpt.latest(found)
    assert last is not None
    return ckpt.load(last.path, verify=True)


def figures(place: Path) -> Figures:
    """Return the logged losses of each step; assert that no step is there twice."""
    (path,) = (place / "runs").glob("*/metrics.jsonl")
    lines = [(line["step"], line["split"], line["loss"]) for line in read_metrics(path)]
    result = {(step, split): loss for step, split, loss in lines}
    assert len(result) == len(lines)
    return result


@functools.cache
def undisturbed(layout: str) -> tuple[dict[str, bytes], Figures]:
    """Return what the same run leaves on an ordinary disk, uninterrupted."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder)
        said_by("training.py", own, own, CHECKPOINT_LAYOUT=layout)
        return outcome(own, kept=2)


def live(own: Path, place: Path, layout: str = "unified", *, settle: Callable[[], None] = lambda: None) -> str:
    """Train in `place`, kill, resume, look; return what the resume said. `settle` waits for the file system."""
    expected = undisturbed(layout)
    status = trained_until(own, place, lambda: has_step(place, 8), CHECKPOINT_LAYOUT=layout)
    assert status == -signal.SIGKILL, (own / "killed.log").read_text()
    settle()
    said = said_by("training.py", own, place, CHECKPOINT_LAYOUT=layout, RESUME="auto")
    assert "restored" in said
    settle()
    for which in ("latest", "best"):
        said_by("scripts/load_checkpoint.py", own, place, CHECKPOINT_PATH=which, MAX_NEW_TOKENS="3")
    said_by("scripts/list_checkpoints.py", own, place)
    files.forget()
    assert outcome(place) == expected
    return said
