"""Measure the time from process start to the first token of a checkpoint of GPT-2 (124M parameters), and of the starts that need no torch.

    python3 benchmarks/startup.py         # about a minute and 1.5 GB of disk

The checkpoint has AdamW's state and is in the page cache. All arms are whole processes, including their exit, with bytecode from an earlier
round. The limit of the first token is torch's import and one pass over the weights; that of the other starts is an empty process.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
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
    """Print the rows."""
    header()
    (ROOT / "checkpoints").mkdir(exist_ok=True)  # on the disk that checkpoints are written to
    with tempfile.TemporaryDirectory(dir=ROOT / "checkpoints") as name:
        run = trained(Path(name))
        path = ckpt.save(to_record(run), Path(name))
        size = sum(parameter.nbytes for parameter in run.model.parameters())
        del run
        first_token(path, size)
        starts(path)


def trained(folder: Path) -> Run:
    """Return a run after one step, so that the optimizer has state."""
    run = fresh(config.read(SETTINGS | {"CHECKPOINT_DIR": str(folder), "RUNS_DIR": str(folder)}), Log())
    run.metrics = Metrics(folder / "metrics.jsonl")
    training.training_step(run, 1e-4)
    return run


def process(*arguments: str, code: int = 0, **wanted: str) -> None:
    """Run Python with these arguments and variables; raise SystemExit if it ends with another exit code."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= wanted | {"PYTHON_DOTENV_DISABLED": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, check=False, capture_output=True, cwd=ROOT)
    if done.returncode != code:
        sys.exit(done.stderr.decode())


def first_token(path: Path, size: int) -> None:
    """Measure the script that generates one token against a process that only imports torch."""
    wanted = {"CHECKPOINT_PATH": str(path), "PROMPT": "Dear Wren,", "MAX_NEW_TOKENS": "1"}
    arms = {
        "first token": partial(process, "scripts/load_checkpoint.py", **wanted),
        "import torch": partial(process, "-c", "import torch"),
    }
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


def starts(path: Path) -> None:
    """Measure the starts that need no torch against a process that only imports it, and against an empty one."""
    folders = {"CHECKPOINT_DIR": str(path.parent), "RUNS_DIR": str(path.parent), "CHECKPOINT_PATH": str(path)}
    make_metrics(path.parent / "run")
    arms = {
        "training.py --help": partial(process, "training.py", "--help"),
        "a mistake in a setting": partial(process, "training.py", code=2, TRAINING_STEPS="x"),
        "list_checkpoints.py": partial(
            process, "scripts/list_checkpoints.py", **folders | {"CHECKPOINT_PATH": "latest"}
        ),
        "inspect_checkpoint.py": partial(process, "scripts/inspect_checkpoint.py", **folders),
        "plot_run.py": partial(process, "scripts/plot_run.py", **folders),
    }
    others = {"import torch": partial(process, "-c", "import torch"), "nothing": partial(process, "-c", "")}
    median = compare(arms | others, rounds=ROUNDS)
    for name in arms:
        ours, peer, limit = median[name], median["import torch"], median["nothing"]
        row(
            f"start: {name}",
            ours=f"{ours:.2f} s",
            peer=f"{peer:.2f} s",
            ratio=ours / peer,
            bound="0.25",
            limit=f"{limit:.2f} s",
            share=limit / ours,
        )


def make_metrics(folder: Path) -> None:
    """Write the metrics of a run of a thousand lines."""
    folder.mkdir()
    line = {"time": 1000.0, "split": "train", "loss": 3.0, "lr": 0.1, "tok_s": 9.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step} | line) + "\n" for step in range(1000)))


if __name__ == "__main__":
    main()
