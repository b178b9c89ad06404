"""A start with the wrong Python, or without the packages: one sentence with the command that mends it, or the .venv that is there."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from drive import ROOT, environment
from pages import copied_checkout
from work import HANGING

from milepost import start

ENTRIES = [Path("training.py"), *sorted(path.relative_to(ROOT) for path in (ROOT / "scripts").glob("*.py"))]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copied_checkout(tmp_path_factory.mktemp("checkout"))
    shutil.rmtree(folder / ".venv")  # links to this test's environment
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without any package."""
    place = tmp_path_factory.mktemp("bare")
    venv.create(place, with_pip=False, symlinks=True)
    return place / "bin" / "python"


def run(python: Path | str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"} | variables
    return subprocess.run(
        [python, *arguments], env=env, capture_output=True, text=True, timeout=HANGING, check=False, cwd=ROOT / "docs"
    )


@pytest.mark.parametrize("name", [*ENTRIES, Path("milepost/__init__.py"), Path("milepost/start.py")], ids=str)
def test_old_pythons_can_read_every_file_that_runs_before_the_check(name: Path) -> None:
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_a_file_that_old_pythons_cannot_read_would_be_found() -> None:
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n case 1: pass", feature_version=(3, 8))


@pytest.mark.parametrize("name", ENTRIES, ids=str)
@pytest.mark.parametrize("option", ["-I", "-P"])
def test_every_entry_runs_where_python_leaves_out_the_folder_of_the_script(option: str, name: Path) -> None:
    done = run(sys.executable, option, ROOT / name, "--help")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ENTRIES, ids=str)
def test_every_entry_names_the_missing_packages_and_the_command(name: Path, checkout: Path, bare: Path) -> None:
    done = run(bare, checkout / name)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert all(package in line for package in start.PACKAGES.values())
    assert "pip install" in line
    assert str(checkout / "requirements.txt") in line


@pytest.mark.parametrize("name", ["training.py", "scripts/list_checkpoints.py"])
def test_an_old_python_is_refused_before_anything_else_is_imported(name: str, checkout: Path) -> None:
    """Every version before 3.11, as far as this Python can play one."""
    code = "import runpy, sys; sys.version_info = (3, 8, 1); sys.modules['__main__'].__file__ = sys.argv[1]; runpy.run_path(sys.argv[1], run_name='x')"
    done = run(sys.executable, "-c", code, checkout / name, PYTHONPATH=str(checkout))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("error: Python 3.8 is too old")
    assert "requirements.txt" in line or "python.org" in line


def test_the_venv_of_the_checkout_is_used_where_packages_lack(checkout: Path, bare: Path, tmp_path: Path) -> None:
    venv.create(checkout / ".venv", with_pip=False, symlinks=True)
    (packages,) = (checkout / ".venv").glob("lib/python*/site-packages")
    try:
        done = run(bare, checkout / "training.py")  # a .venv that lacks them too: no loop
        assert done.returncode == 1
        assert "pip install" in done.stderr
        (packages / "here.pth").write_text(sysconfig.get_path("purelib"))
        done = run(bare, checkout / "training.py", **environment(tmp_path, TRAINING_STEPS="1", WARMUP_STEPS="0"))
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[0].endswith(f"using {checkout / '.venv' / 'bin' / 'python'}")
    finally:
        os.rename(checkout / ".venv", tmp_path / "venv")


def test_a_program_that_imports_milepost_gets_an_error_that_it_can_catch(checkout: Path, bare: Path) -> None:
    code = "try:\n import milepost\nexcept ImportError as error:\n print(error)"
    done = run(bare, "-c", code, PYTHONPATH=str(checkout))
    assert "pip install" in done.stdout
    assert done.stderr == ""


def test_every_requirement_is_checked() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {line.partition("==")[0] for line in lines if "==" in line} == set(start.PACKAGES.values())
