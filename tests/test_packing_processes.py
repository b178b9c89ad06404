"""Packed conversations with several processes: the same training as one, and exact resumes."""

import shutil
from pathlib import Path

import pytest
from drive import at_step, logged, newest, tensor_bytes, train
from talks import talks_file
from test_distributed import torchrun

CHANGES = {"BLOCK_SIZE": "128", "DROPOUT": "0", "GRADIENT_ACCUMULATION_STEPS": "2", "DTYPE": "float32"}


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(talks_file(tmp_path, count=30))


def trained(folder: Path, processes: int, source: str, **changes: str) -> Path:
    folder.mkdir(exist_ok=True)
    done = torchrun(folder, processes, TRAINING_DATA_SOURCE=source, **CHANGES, **changes)
    assert done.returncode == 0, done.stderr
    return folder


def test_one_process_of_torchrun_is_the_plain_run_and_two_learn_the_same(tmp_path: Path, source: str) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    assert train(plain, TRAINING_DATA_SOURCE=source, **CHANGES)[0] == 0
    one, two = (trained(tmp_path / str(count), count, source, CHECKPOINT_INTERVAL="4") for count in (1, 2))
    assert tensor_bytes(newest(one)) == tensor_bytes(newest(plain))
    for ours, theirs in zip(logged(two), logged(one), strict=True):
        assert ours[2] == pytest.approx(theirs[2], abs=1e-6 if ours[0] < 2 else 1e-5)  # loss; then roundings add up
        assert ours[-1] == theirs[-1]  # tokens
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(at_step(two, 4), again / "checkpoints")
    shutil.copytree(two / "runs", again / "runs")
    trained(again, 2, source, RESUME="auto")
    assert tensor_bytes(newest(again)) == tensor_bytes(newest(two))
    assert logged(again) == logged(two)
