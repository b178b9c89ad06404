"""Runs the project with the layout of toy_layout.py added: a script, a training that is killed, or a look at folders.

python3 tests/extended.py scripts/list_checkpoints.py
python3 tests/extended.py killed STEP
python3 tests/extended.py seen FOLDER ...   # one JSON line per checkpoint
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from milepost import registry  # noqa: E402

registry.LAYOUTS["per_tensor"] = registry.Registered("toy_layout")  # the one line


def killed(step: int) -> None:
    """Train, and die by SIGKILL in the update of `step`."""
    import training
    from milepost import config

    settings, train_step = config.read(), training.training_step

    def dying(run, *arguments):
        result = train_step(run, *arguments)
        if run.state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    training.training_step = dying
    sys.exit(training.guarded(training.main, settings))


def seen(folders: list[str]) -> None:
    """Print step, layout, path, parts and the sha256 over all tensors of every checkpoint, every byte verified."""
    from milepost import ckpt
    from milepost.ckpt.tensor_listing import held, labelled
    from milepost.ckpt.tensors import digest

    for found in [found for folder in folders for found in ckpt.find(Path(folder))]:
        record = ckpt.load(found.path, verify=True)
        names = sorted(tensor.name for tensor in held(found.path) if tensor.part == "weights")
        facts = {"step": record.step, "layout": record.layout, "path": str(found.path), "parts": record.parts}
        print(json.dumps(facts | {"weights": names, "sha256": digest(labelled(record))}))


if __name__ == "__main__":
    _, what, *arguments = sys.argv
    if what == "killed":
        killed(int(arguments[0]))
    elif what == "seen":
        seen(arguments)
    else:
        sys.argv = [what]
        runpy.run_path(str(ROOT / what), run_name="__main__")
