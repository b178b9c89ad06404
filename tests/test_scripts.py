"""Every script that looks after checkpoints, in a process of its own: help, refusals, pipes, and any current folder."""

import subprocess
import sys

import programs
import pytest
from drive import ROOT, command
from records import record
from script import NOTHING_OF_TRAINING

from milepost import ckpt

NAMES = ("list", "inspect", "verify", "convert", "prune", "evaluate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints, and a text."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "text.txt").write_text("abcd" * 9, encoding="utf-8")
    (folder / "checkpoints").mkdir()
    for step in (1, 2):
        ckpt.save(record(step), folder / "checkpoints")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_help_and_arguments(name, folder):
    script = str(ROOT / "scripts" / f"{name}_checkpoint{'s' if name in ('list', 'prune') else ''}.py")
    run = lambda *words: subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)  # noqa: E731
    said = run("--help")
    assert said.returncode == 0
    assert "CHECKPOINT_DIR  (default: checkpoints)" in said.stdout
    assert "LEARNING_RATE" not in said.stdout
    assert said.stderr == ""
    said = run("--checkpoint", "x.pt")
    assert said.returncode == 2
    assert "takes no arguments" in said.stderr
    assert "CHECKPOINT_PATH=x.pt" in said.stderr


MORE = {
    "list_checkpoints": {},
    "inspect_checkpoint": {},
    "verify_checkpoint": {},
    "convert_checkpoint": {"CHECKPOINT_LAYOUT": "directory", "OUTPUT": "new"},
    "prune_checkpoints": {"CHECKPOINT_KEEP_LAST": "1"},
    "compare_samples": {"MAX_NEW_TOKENS": "5", "OUTPUT": "compared.md"},
    "evaluate_checkpoint": {"EVAL_DATA": "text.txt", "OUTPUT": "figures.json"},
}


@pytest.mark.parametrize("name", MORE)
def test_from_any_folder_into_a_pipe_that_closes(name, folder):
    """The reader is gone before the first line: no traceback, and the exit code of the work that was done."""
    env = {
        **programs.LEAST,
        "PYTHON_DOTENV_DISABLED": "1",
        "CHECKPOINT_DIR": "checkpoints",
        "NO_COLOR": "1",
        "DEVICE": "cpu",
    }
    line = '{ "$0" "$1"; echo $? >&3; } 3>code | true'
    words = [sys.executable, str(ROOT / "scripts" / f"{name}.py")]
    done = subprocess.run(
        ["bash", "-c", line, *words], cwd=folder, env=env | MORE[name], capture_output=True, text=True, check=False
    )
    assert (folder / "code").read_text().strip() == "0", done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_what_is_printed_goes_to_stdout_and_the_rest_to_stderr(folder):
    changes = NOTHING_OF_TRAINING | {"CHECKPOINT_KEEP_LAST": "1"}
    done = command("scripts/prune_checkpoints.py", folder, **changes)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith("bytes would be freed; DRY_RUN=false does it")
    nothing = NOTHING_OF_TRAINING | {"CHECKPOINT_PATH": str(folder / "nothing.pt")}
    done = command("scripts/inspect_checkpoint.py", folder, **nothing)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr
