"""Measure a training step with LoRA against one that trains every weight, at equal shapes.

python3 benchmarks/lora.py        # about a minute
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import compare, header, row  # noqa: E402
from steps import SHAPES, prepared, settings  # noqa: E402

import training  # noqa: E402
from milepost import ckpt  # noqa: E402
from milepost.run import Run, to_record  # noqa: E402

BOUNDS = {"10.7M": "1.4", "124M": "1.4"}
RANK = "8"


def main() -> None:
    """Print the table."""
    header()
    for name, bound in BOUNDS.items():
        with tempfile.TemporaryDirectory() as folder:
            full = prepared(settings(name, OPTIMIZER="adamw"))
            base = ckpt.save(dataclasses.replace(to_record(full), optimizer_state=None), Path(folder))
            thin = prepared(settings(name, INIT_FROM=str(base), LORA_RANK=RANK))
            taken = compare({"LoRA": lambda: steps(thin), "full": lambda: steps(full)})  # noqa: B023
        count = SHAPES[name][-1]
        ours, peer = taken["LoRA"] / count, taken["full"] / count
        figures = {"ours": f"{1e3 * ours:.1f} ms", "peer": f"{1e3 * peer:.1f} ms, all"}
        row(
            f"training step with LORA_RANK={RANK}, {name}",
            **figures,
            ratio=peer / ours,
            bound=bound,
            limit="1.5 of the products",
        )


def steps(run: Run) -> None:
    """Run the steps of one round at this size."""
    count = next(steps for layers, _, width, _, _, steps in SHAPES.values() if width == run.settings.n_embd)
    for _ in range(count):
        training.training_step(run, 1e-4)


if __name__ == "__main__":
    main()
