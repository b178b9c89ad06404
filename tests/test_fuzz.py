"""Checkpoints of every layout changed at random: a clean refusal, or a load whose tensors are right.

The work is done in tests/fuzz.py.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

from milepost import ckpt

CASES, SOAK_CASES, PROCESSES = 1500, 100_000, 10
SCRIPT = Path(__file__).with_name("fuzz.py")


def fuzzed(folder: Path, *, seed: int, first: int, count: int) -> dict[str, int]:
    """Return the outcomes of so many cases, in a process of bounded memory and time."""
    folder.mkdir()
    command = [sys.executable, SCRIPT, folder, str(seed), str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (folder / "progress").read_text() if (folder / "progress").exists() else "none"
    assert done.returncode == 0, (
        f"ended with {done.returncode} after case {seed}/{last.strip()}:\n{done.stderr[-8000:]}"
    )
    return json.loads(done.stdout)


def test_a_changed_checkpoint_is_refused_in_a_sentence_or_is_right(tmp_path):
    counts = fuzzed(tmp_path / "fuzz", seed=1, first=0, count=CASES)
    assert sum(counts.values()) == CASES
    assert counts["refused"] > CASES / 4  # changes do harm,
    assert counts["loaded"] > CASES / 20  # and some are harmless
    assert counts["refused when used"] > 0


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PROCESSES))
def test_a_hundred_thousand_changed_checkpoints(part, tmp_path):
    count = SOAK_CASES // PROCESSES
    counts = fuzzed(tmp_path / "fuzz", seed=2, first=part * count, count=count)
    print(f"cases {part * count} to {(part + 1) * count}: {counts}")
    assert sum(counts.values()) == count


def test_control_without_checksums_it_would_be_seen(tmp_path, monkeypatch):
    """Negative control: the same changes, taken without verifying, give other tensors, and the comparison sees it."""
    load = ckpt.load
    monkeypatch.setattr(ckpt, "load", lambda path, *, optimizer=True, verify=False: load(path, optimizer=optimizer))
    path = ckpt.save(fuzz.record(7, size=64, tokenizer=None), tmp_path / "unified")
    one = fuzz.sample(path, ours=True)
    seen = 0
    for number in range(60):
        path.write_bytes(fuzz.flip(random.Random(number), one.content[path], b""))
        try:
            fuzz.outcome(random.Random(number), one, exact=True)
        except AssertionError as error:
            seen += "other tensors" in str(error)
    assert seen > 10
