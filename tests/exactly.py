"""Interrupted + resumed = uninterrupted, for a run whose data the settings name: used by the tests of each form of data."""

import shutil
from pathlib import Path

from drive import at_step, logged, newest, tensor_bytes, train

from milepost.ckpt import Checkpoint


def resumes_exactly(folder: Path, *, step: int = 3, **changes: str) -> tuple[Checkpoint, str]:
    """Train in `folder`, resume from nothing but the checkpoint of `step` elsewhere, and assert that both end the same.

    Return the last checkpoint, and what the resume said, which names no data of its own.
    """
    straight, again = folder / "straight", folder / "again"
    straight.mkdir(parents=True)
    code, said = train(straight, CHECKPOINT_INTERVAL="1", **changes)
    assert code == 0, said
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(at_step(straight, step), again / "checkpoints")
    shutil.copytree(straight / "runs", again / "runs")
    named = ("TRAINING_DATA_SOURCE", "VALIDATION_DATA")
    code, resumed = train(again, RESUME="auto", **(changes | dict.fromkeys(named)))
    assert code == 0, resumed
    assert tensor_bytes(newest(again)) == tensor_bytes(newest(straight))
    assert logged(again) == logged(straight)
    assert newest(again).run_id == newest(straight).run_id
    assert newest(again).data == newest(straight).data
    return newest(straight), said + resumed
