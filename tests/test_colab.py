"""docs/colab.ipynb, its cells executed in order in a copy of the checkout, with a folder in place of Drive."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from drive import ROOT, small_text, tensor_bytes
from pages import copied_checkout
from pages import run as run_line

from milepost import ckpt

DRIVE = "/content/drive/MyDrive"
# A smaller model, and many more steps than are done before the first checkpoint is on Drive.
SMALLER = {
    "N_LAYER": "1", "N_HEAD": "2", "N_EMBD": "16", "BLOCK_SIZE": "16", "BATCH_SIZE": "4", "TRAINING_STEPS": "200", "CHECKPOINT_INTERVAL": "10",
    "EVAL_INTERVAL": "100", "EVAL_STEPS": "2", "SAMPLE_INTERVAL": "0", "DEVICE": "cpu", "PYTHON_DOTENV_DISABLED": "1",
}  # fmt: skip


def cells() -> list[str]:
    """The code of the notebook, without the cells that only Colab can run."""
    notebook = json.loads((ROOT / "docs" / "colab.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in code if "colab" not in cell["metadata"].get("tags", ())]


class Kernel:
    """Executes cells: Python, lines of a shell behind `!`, and `%env`."""

    def __init__(self, checkout: Path, drive: Path) -> None:
        self.checkout, self.drive, self.variables, self.names = checkout, drive, {}, {}  # type: ignore[var-annotated]

    def execute(self, cell: str) -> str:
        """Return what its shell lines print."""
        said, drive = "", str(self.drive)
        for line in re.findall(r"^[!%].*", cell, re.MULTILINE):
            if setting := re.fullmatch(r"%env (\w+)=(.*)", line):
                self.variables[setting[1]] = setting[2].replace(DRIVE, drive)
            else:
                assert line[0] == "!", line
                words = line[1:].replace(DRIVE, shlex.quote(drive))
                done = run_line(words, self.checkout, **(self.variables | SMALLER))
                assert done.returncode == 0, done.stderr
                said += done.stdout + done.stderr
        exec(re.sub(r"^[!%].*", "", cell, flags=re.MULTILINE).replace(DRIVE, drive), self.names)
        return said


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> Kernel:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (tmp_path / "drive").mkdir()
    small_text(copied_checkout(checkout))
    kernel, popen = Kernel(checkout, tmp_path / "drive"), subprocess.Popen
    kernel.variables["TRAINING_DATA_SOURCE"] = "letters.txt"

    def started(words: list[str], **named: Any) -> subprocess.Popen[bytes]:
        """Start a program where the notebook would: in the checkout, with the variables of its cells."""
        if words[-1] != "training.py":
            return popen(words, **named)
        return popen(words, cwd=checkout, env={"PATH": str(Path(sys.executable).parent), "HOME": str(checkout), "OMP_NUM_THREADS": "1"} | kernel.variables | SMALLER,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

    monkeypatch.setattr(subprocess, "Popen", started)
    return kernel


def last(folder: Path) -> ckpt.Checkpoint:
    found = ckpt.latest(ckpt.find(folder))
    assert found is not None
    return ckpt.load(found.path, verify=True)


def test_the_notebook_is_cut_off_and_resumes_on_an_empty_disk_with_the_bytes_of_a_whole_run(kernel):
    settings, cut, loss, resume, listed, text = cells()
    kernel.execute(settings)
    kernel.execute(cut)
    assert kernel.names["run"].returncode == -signal.SIGKILL
    assert last(kernel.checkout / "checkpoints").step < 200
    kernel.execute(loss)
    assert not (kernel.checkout / "checkpoints").exists()
    said = kernel.execute(resume)
    assert "from the mirror: " in said
    ended = last(kernel.checkout / "checkpoints")
    assert "step" in kernel.execute(listed)
    assert kernel.execute(text).startswith("Dear Wren,")
    whole = kernel.execute(
        "!CHECKPOINT_MIRROR= RESUME=never CHECKPOINT_DIR=whole RUNS_DIR=whole-runs python3 training.py"
    )
    assert "from the mirror: " not in whole
    assert (ended.step, tensor_bytes(ended)) == (200, tensor_bytes(last(kernel.checkout / "whole")))


def test_the_cells_of_colab_name_the_packages_that_it_lacks():
    notebook = (ROOT / "docs" / "colab.ipynb").read_text(encoding="utf-8")
    assert [word for word in ("tiktoken", "python-dotenv") if word not in notebook] == []
    assert DRIVE in notebook
