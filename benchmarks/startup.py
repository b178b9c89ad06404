"""Measure the time from process start to the first token of a checkpoint of GPT-2 (124M parameters).

    python3 benchmarks/startup.py         # about a minute and 1.5 GB of disk

The checkpoint has AdamW's state and is in the page cache. Both arms are whole processes, including their exit. The limit is torch's import
and one pass over the weights.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import compare, header, read_rate, row  # noqa: E402

import training  # noqa: E402
from milepost import ckpt, config  # noqa: E402
from milepost.run import Run, fresh, to_record  # noqa: E402
from milepost.runtime.progress import Log, Metrics  # noqa: E402

SETTINGS = {
    "MODEL_TYPE": "gpt2", "N_LAYER": "12", "N_HEAD": "12", "N_EMBD": "768", "TOKENIZER": "gpt2", "BLOCK_SIZE": "256",
    "BATCH_SIZE": "1",
    "COMPILE": "false", "PYTHON_DOTENV_DISABLED": "1",
}  # fmt: skip
ROUNDS = 7


def main() -> None:
    """Print the row."""
    header()
    (ROOT / "checkpoints").mkdir(exist_ok=True)  # on the disk that checkpoints are written to
    with tempfile.TemporaryDirectory(dir=ROOT / "checkpoints") as name:
        run = trained(Path(name))
        path = ckpt.save(to_record(run), Path(name))
        size = sum(parameter.nbytes for parameter in run.model.parameters())
        del run
        first_token(path, size)


def trained(folder: Path) -> Run:
    """Return a run after one step, so that the optimizer has state."""
    run = fresh(config.read(SETTINGS | {"CHECKPOINT_DIR": str(folder), "RUNS_DIR": str(folder)}), Log())
    run.metrics = Metrics(folder / "metrics.jsonl")
    training.training_step(run, 1e-4)
    return run


def first_token(path: Path, size: int) -> None:
    """Measure the script that generates one token against a process that only imports torch."""
    wanted = {
        "CHECKPOINT_PATH": str(path),
        "PROMPT": "Dear Wren,",
        "MAX_NEW_TOKENS": "1",
        "PYTHON_DOTENV_DISABLED": "1",
    }

    def process(*arguments: str) -> None:
        command, environment = [sys.executable, *arguments], os.environ | wanted
        subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)

    script = str(ROOT / "scripts" / "load_checkpoint.py")
    arms = {"first token": lambda: process(script), "import torch": lambda: process("-c", "import torch")}
    median = compare(arms, rounds=ROUNDS)
    ours, import_only = median["first token"], median["import torch"]
    limit = import_only + size / read_rate(size)
    row(
        "process start to first token, 124M",
        ours=f"{ours:.2f} s",
        peer=f"{import_only:.2f} s",
        ratio=ours / import_only,
        bound="1.6",
        limit=f"{limit:.2f} s",
        share=limit / ours,
    )


if __name__ == "__main__":
    main()
