"""Measure training steps with a mirror against the same steps without one; both save checkpoints.

    python3 benchmarks/mirror.py                       # a folder beside the checkpoints, which is the mirror
    python3 benchmarks/mirror.py s3://bucket/path      # a store; its objects stay there

The arms alternate, run by run. A figure is the median wall time of a whole run; what the end waits for is counted too.
"""

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import compare, header, row  # noqa: E402

import training  # noqa: E402
from milepost import config  # noqa: E402
from milepost.runtime.progress import Log  # noqa: E402

SETTINGS = {
    "MODEL_TYPE": "gpt2", "N_LAYER": "6", "N_HEAD": "6", "N_EMBD": "384", "BLOCK_SIZE": "256", "BATCH_SIZE": "8",
    "TRAINING_STEPS": "60", "EVAL_INTERVAL": "0", "SAMPLE_INTERVAL": "0", "ENABLE_CHECKPOINTS": "true",
    "CHECKPOINT_INTERVAL": "20", "CHECKPOINT_KEEP_LAST": "1", "CHECKPOINT_KEEP_BEST": "0", "PYTHON_DOTENV_DISABLED": "1",
}  # fmt: skip
LIMIT = 1.02  # times the run without


def main() -> None:
    """Print the table."""
    (ROOT / "checkpoints").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "checkpoints") as name:
        address = sys.argv[1] if len(sys.argv) > 1 else f"file://{name}/mirror"
        arms = {
            "without": trained(Path(name)),
            "with": trained(Path(name), CHECKPOINT_MIRROR=address, MIRROR_KEEP_LAST="1"),
        }
        taken = compare(arms)
    header()
    ratio = taken["with"] / taken["without"]
    row(
        "a run with a mirror against one without",
        ours=f"{taken['with']:.2f} s",
        peer=f"{taken['without']:.2f} s",
        ratio=ratio,
        bound=f"<= {LIMIT}",
    )


def trained(folder: Path, **changes: str) -> Callable[[], object]:
    """Return a function that trains a run."""
    places = {"CHECKPOINT_DIR": str(folder / "checkpoints"), "RUNS_DIR": str(folder / "runs")}

    def run() -> None:
        settings = config.read(SETTINGS | places | changes)
        if (code := training.guarded(training.main, settings, log=Log(io.StringIO()))) != 0:
            raise SystemExit(f"a run ended with code {code}")

    return run


if __name__ == "__main__":
    main()
