"""What is pasted into a shell, and the files for Docker. The commands of the README's bash blocks run in test_readme.py."""

import re
import shutil
import subprocess

import pytest
import yaml
from drive import ROOT
from pages import blocks

from milepost import config

PAGES = ["README.md", *sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
PASTED = [
    block
    for text in TEXTS.values()
    for language in ("sh", "bash")
    for block in blocks(text, language)
    if "#!/" not in block
]
WINDOWS = [block for text in TEXTS.values() for language in ("powershell", "bat") for block in blocks(text, language)]


@pytest.mark.parametrize("block", [*PASTED, *WINDOWS])
def test_no_block_holds_a_comment_or_a_prompt(block: str) -> None:
    """zsh runs `#` as a command, and a line that begins with $ or > is no command anywhere."""
    for line in block.splitlines():
        assert not re.search(r"(^|\s)#", line)
        assert not re.match(r"\s*(\$ |> |\()", line)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_block_can_be_read_by_every_shell(shell: str) -> None:
    """By each shell that is installed; bash always is."""
    if not (path := shutil.which(shell)):
        assert shell != "bash"
        pytest.skip(f"{shell} is not installed")
    for block in PASTED:
        done = subprocess.run([path, "-n"], input=block, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), block


def test_no_pattern_is_left_to_the_shell() -> None:
    """zsh and fish refuse a pattern that matches nothing."""
    for block in PASTED:
        assert not re.search(r"[*?]", re.sub(r"'[^']*'|\"[^\"]*\"", "", block)), block


def test_settings_for_windows_are_variables() -> None:
    named = set(re.findall(r"(?:\$env:|Env:|set \")([A-Z_]+)", "".join(WINDOWS)))
    assert named
    assert named <= config.VARIABLES.keys()


def test_docker_files_agree_with_the_project() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    assert re.search(r"^ENTRYPOINT \[\"python\"\]$", dockerfile, re.MULTILINE)  # in exec form, so that signals arrive
    assert re.search(r"^USER (?!root)", dockerfile, re.MULTILINE)
    service = compose["services"]["train"]
    assert service["environment"].keys() <= config.VARIABLES.keys()
    config.read({"PYTHON_DOTENV_DISABLED": "1", **service["environment"]})
    set_there = dict(re.findall(r"(\w+)=(/data/\w+)", dockerfile))
    assert {volume.split(":")[1] for volume in service["volumes"]} == set(set_there.values())
    assert {volume.split(":")[0] for volume in service["volumes"]} == compose["volumes"].keys()
    assert "ARG DEVICE=cpu" in dockerfile
    assert "DEVICE" in service["build"]["args"]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".env", ".git", "checkpoints", "runs"} <= set(ignored)
