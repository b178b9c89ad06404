"""Measure what TTT layers bring on real text: the validation loss with them, without them, and with one more block instead.

TRAINING_DATA_SOURCE=tinyshakespeare python3 benchmarks/ttt.py        # the bundled text if it is not set; half an hour
"""

import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import milepost  # noqa: E402

SHAPE: dict[str, Any] = {
    "model_type": "gpt2", "tokenizer": "char", "n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 128, "batch_size": 8, "training_steps": 500,
    "dropout": 0.0, "optimizer": "adamw", "learning_rate": 3e-3, "eval_interval": 0, "eval_steps": 0, "sample_interval": 0,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "without": {},
    "TTT_LAYERS=1": {"ttt_layers": "1"},
    "TTT_LAYERS=1, TTT_BASE_LR=1e-8 (it cannot learn while it reads)": {"ttt_layers": "1", "ttt_base_lr": 1e-8},
    "N_LAYER=3, one more block instead": {"n_layer": 3},
}
SEEDS = (1, 2, 3)


def loss(variant: dict[str, Any], seed: int) -> tuple[float, int]:
    """Train and return the validation loss over all of the validation text, and the number of parameters."""
    source = os.environ.get("TRAINING_DATA_SOURCE")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = SHAPE | {"seed": seed, "runs_dir": folder, "training_data_source": source} | variant
        run = milepost.train(**settings)
    assert run.state.validation_loss is not None
    return run.state.validation_loss, sum(parameter.numel() for parameter in run.model.parameters())


def main() -> None:
    """Print a row per variant: the mean validation loss, and the differences to the first variant, seed by seed."""
    found = {(name, seed): loss(variant, seed) for seed in SEEDS for name, variant in VARIANTS.items()}
    base, *_ = VARIANTS
    print("| model | parameters | validation loss, mean of the seeds | difference, seed by seed |\n|---|---|---|---|")
    for name in VARIANTS:
        losses = [found[name, seed][0] for seed in SEEDS]
        apart = ", ".join(f"{own - found[base, seed][0]:+.4f}" for own, seed in zip(losses, SEEDS, strict=True))
        print(f"| {name} | {found[name, SEEDS[0]][1]:,} | {statistics.mean(losses):.4f} | {apart} |")


if __name__ == "__main__":
    main()
