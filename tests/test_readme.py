"""Every command of the README, as written, in a copy of the checkout, with a tiny model set through the environment."""

import html
import os
import re
import shutil

import pytest
from drive import ROOT
from pages import blocks, commands, copied_checkout, run

import models

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [*commands(README), *commands((ROOT / "docs" / "commands.md").read_text(encoding="utf-8"))]
TINY = {
    "N_LAYER": "1", "N_HEAD": "1", "N_EMBD": "8", "BLOCK_SIZE": "8", "BATCH_SIZE": "2", "EVAL_STEPS": "1",
    "SAMPLE_INTERVAL": "0",
    "LOG_INTERVAL": "500",
}  # fmt: skip
# Running this very test suite from inside itself would never end.
NOT_FROM_INSIDE = "make test"
# No later command asks for these runs' last step.
SHORT = {"make train": {"TRAINING_STEPS": "20"}, "python3 training.py": {"TRAINING_STEPS": "20"}}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copied_checkout(tmp_path_factory.mktemp("checkout"))


def test_the_readme_has_the_commands_of_a_first_visit():
    found = " ".join([*COMMANDS, *blocks(README, "sh")])  # what installs is pasted, not run here
    for part in (
        "make train",
        "make test",
        "uv pip install --python .venv -r requirements.txt",
        ".venv/bin/python -m pip install -r requirements.txt",
        "MODE=inference",
        "MODE=resume",
        "RESUME=auto",
        "torchrun --nproc_per_node=2",
        "list_checkpoints.py",
        "verify_checkpoint.py",
        "convert_checkpoint.py",
        "prune_checkpoints.py",
    ):
        assert part in found
    assert len(COMMANDS) == 12
    assert len(README.splitlines()) < 115  # a screen and a half


def test_every_command_runs_as_written(tmp_path):
    """Those of the README, then those of docs/commands.md, in their order: each builds on the files of those before it."""
    checkout = copied_checkout(tmp_path)
    said = {
        command: run(command, checkout, **TINY | SHORT.get(command, {}))
        for command in COMMANDS
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
    assert "is finished: 1000 of 1000 steps" in by_word["RESUME=auto"].stderr
    exported = next((checkout / "exported").glob("checkpoint_*/model.safetensors"))
    assert (exported.parent / "tokenizer.json").is_file()


# Prints its name, its arguments and its variables, but for those in which a shell notes what it does.
PRINTING = """#!/bin/sh
printf '%s\\n' "${0##*/}" "$@"
env | grep -v '^\\(_\\|SHLVL\\|LOGNAME\\|PWD\\|OLDPWD\\)=' | sort
"""


@pytest.fixture
def in_shell(tmp_path):
    """Return a function that runs a line in a shell whose programs are PRINTING."""
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    for name in ("make", "python3", "torchrun"):
        (tmp_path / name).write_text(PRINTING)
        (tmp_path / name).chmod(0o755)
    return lambda line, shell: run(line, tmp_path, shell=shell, PATH=f"{tmp_path}:{os.environ['PATH']}")


def test_zsh_starts_the_same_programs_as_bash(in_shell):
    """With the same arguments and variables; what they do then is tested above."""
    for command in COMMANDS:
        bash, zsh = (in_shell(command, shell) for shell in ("bash", "zsh"))
        assert (bash.returncode, bash.stdout, bash.stderr) == (zsh.returncode, zsh.stdout, zsh.stderr) != (0, "", "")


def test_control_a_line_that_only_bash_takes_is_noticed(in_shell):
    assert [in_shell("make *.none", shell).returncode for shell in ("bash", "zsh")] == [0, 1]


def test_the_picture_of_the_first_run_is_of_the_run_that_the_text_describes():
    picture = (ROOT / "docs" / "first-run.svg").read_text(encoding="utf-8")
    labels = [html.unescape(label) for label in re.findall(r"<text[^>]*>([^<]*)</text>", picture)]
    (loss,) = re.findall(r"validation loss (\d\.\d+)\s+nats per character", README)
    steps = max(float(label) for label in labels if label.isdecimal())
    assert {loss, "step", "loss (nats per character)", "training", "validation"} <= set(labels)
    assert steps == models.MODELS["gpt2"].defaults["training_steps"]


def test_make_test_runs_every_check(checkout):
    done = run("make --dry-run test", checkout)
    assert done.returncode == 0
    assert all(part in done.stdout for part in ("pytest", "ruff check", "ruff format --check", "mypy"))


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], ids=lambda page: page.stem)
def test_the_links_of_the_documents_lead_somewhere(page):
    """And, where they name a heading, to one that is there."""
    for target, _, heading in re.findall(r"\]\(([^)#:\s]*)(#([^)]+))?\)", page.read_text(encoding="utf-8")):
        there = page.parent / target if target else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not heading or heading in headings(there), f"{page.name} links to {target}#{heading}"


def headings(page):
    """The names by which links reach the headings of a page."""
    lines = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-") for line in lines]


def test_every_page_is_in_the_table_of_the_readme_and_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f"docs/{page}" not in README and page != "README.md"] == []
    assert [page for page in pages if not re.search(rf"[: ]{re.escape(page)}$", site, re.MULTILINE)] == []
