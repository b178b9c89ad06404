"""Runs the commands of a documentation page in a copy of the checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from drive import ROOT
from work import HANGING


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    """Every line of the bash blocks that is a command."""
    lines = [line.split("   #")[0].strip() for block in blocks(text, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def copied_checkout(folder: Path) -> Path:
    """Return a copy of the files that git tracks, with the environment of this test as .venv (make takes no path with a
    space). Beside its parts make can touch files of its own there, although the environment may be another user's.
    """
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith("."):
            (folder / ".venv" / part.name).symlink_to(part)
    return folder


def run(command: str, checkout: Path, *, shell: str = "bash", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line in a shell whose python3 and pip are those of this test, with an empty home and no network."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {
        "PATH": path,
        "HOME": str(checkout / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    } | variables
    return subprocess.run(
        [shell, "-c", command], cwd=checkout, env=env, capture_output=True, text=True, timeout=HANGING, check=False
    )
