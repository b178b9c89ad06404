"""Every command of the README, as written, in a copy of the checkout, with a tiny model set through the environment."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drive import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = {
    "N_LAYER": "1", "N_HEAD": "1", "N_EMBD": "8", "BLOCK_SIZE": "8", "BATCH_SIZE": "2", "EVAL_STEPS": "1", "SAMPLE_INTERVAL": "0",
    "LOG_INTERVAL": "500", "OMP_NUM_THREADS": "1",
}  # fmt: skip
# Running this very test suite from inside itself would never end.
NOT_FROM_INSIDE = "make test"
# No later command asks for these runs' last step.
SHORT = {"make train": {"TRAINING_STEPS": "20"}, "python3 training.py": {"TRAINING_STEPS": "20"}}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.split("   #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what git holds, with a python3 and a pip that are the ones running this test."""
    folder = tmp_path_factory.mktemp("checkout")
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(command: str, checkout: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """One line of the README in a shell with an empty home and no network to speak of."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = TINY | {"PATH": path, "HOME": str(checkout / "home"), "VENV": sys.prefix, "HF_HUB_OFFLINE": "1"} | more
    return subprocess.run(["bash", "-c", command], cwd=checkout, env=env, capture_output=True, text=True, timeout=300, check=False)  # fmt: skip


def test_the_readme_has_the_commands_of_a_first_visit():
    found = " ".join(commands())
    for part in (
        "make train",
        "make test",
        "pip install -r requirements.txt",
        "MODE=inference",
        "MODE=resume",
        "RESUME=auto",
        "list_checkpoints.py",
        "verify_checkpoint.py",
        "convert_checkpoint.py",
        "prune_checkpoints.py",
    ):
        assert part in found
    assert len(commands()) == 12


def test_every_command_runs_as_written(checkout):
    """In the README's order: each builds on what the ones before it left."""
    said = {
        command: run(command, checkout, **SHORT.get(command, {}))
        for command in commands()
        if command != NOT_FROM_INSIDE
    }
    for command, done in said.items():
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    by_word = {
        word: next(done for command, done in said.items() if word in command)
        for word in ("inference", "MODE=resume", "RESUME=auto")
    }
    assert by_word["inference"].stdout.startswith("Dear Wren,")
    assert len(by_word["inference"].stdout) == len("Dear Wren,") + 300 + 1
    assert "1000; 2000 more, to 3000" in by_word["MODE=resume"].stdout
    assert "step3000" in by_word["MODE=resume"].stderr
    assert "is finished: 3000 of 3000 steps" in by_word["RESUME=auto"].stderr
    exported = next((checkout / "exported").glob("checkpoint_*/model.safetensors"))
    assert (exported.parent / "tokenizer.json").is_file()


def test_make_test_runs_every_check(checkout):
    done = run("make --dry-run test", checkout)
    assert done.returncode == 0
    assert all(part in done.stdout for part in ("pytest", "ruff check", "ruff format --check", "mypy"))


def test_the_links_of_the_documents_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
