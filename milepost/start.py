"""Whether this Python can run the project: its version, and the packages that it needs.

`import milepost` calls `check` first. Written so that Python 3.8 can read it, as the scripts are.
"""

import importlib.util
import os
import shutil
import subprocess
import sys

OLDEST = (3, 11)
PACKAGES = {  # module: its name on PyPI
    "torch": "torch", "tiktoken": "tiktoken", "tokenizers": "tokenizers", "numpy": "numpy", "dotenv": "python-dotenv",
    "safetensors": "safetensors", "tqdm": "tqdm", "filelock": "filelock", "huggingface_hub": "huggingface_hub",
    "fsspec": "fsspec",
}  # fmt: skip
PACKAGE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(PACKAGE)
VENV = os.path.join(ROOT, ".venv")


def check() -> None:
    """Return if this Python can run the project. From here on a signal ends a script of the project at once.

    Otherwise a script of the project runs again in the checkout's .venv, if there is another Python in it, or ends with the command
    that mends it; anything else that imports milepost gets ImportError.
    """
    script = is_script()
    if script and sys.version_info[:2] >= OLDEST:
        from milepost.runtime.interrupt import exit_on_signal  # an older Python cannot read it

        exit_on_signal()
    problem = find_problem(sys.version_info[:2])
    if not problem:
        return
    if not script:
        raise ImportError("%s: %s" % (problem, remedy()))
    python = python_of(VENV)
    if os.path.exists(python) and os.path.realpath(sys.prefix) != os.path.realpath(VENV):
        sys.stderr.write("%s; using %s\n" % (problem, nearby(python)))
        sys.stderr.flush()
        run_again(python)
    sys.exit("error: %s: %s" % (problem, remedy()))


def find_problem(version: tuple) -> str:  # type: ignore[type-arg]
    """Return what is wrong with this Python, or an empty text."""
    if version < OLDEST:
        return "Python %d.%d is too old (%s), 3.11 or newer is needed" % (*version, sys.executable)
    missing = missing_packages()
    return "%s not installed for this Python (%s)" % (", ".join(missing), sys.executable) if missing else ""


def missing_packages() -> list:  # type: ignore[type-arg]
    """Return the names on PyPI of the packages that cannot be found. Nothing is imported."""
    return [PACKAGES[module] for module in PACKAGES if importlib.util.find_spec(module) is None]


def is_script() -> bool:
    """Return whether the program that runs is training.py or one of scripts/."""
    path = os.path.realpath(getattr(sys.modules.get("__main__"), "__file__", None) or "")
    scripts = [os.path.realpath(os.path.join(place, "scripts")) for place in (ROOT, PACKAGE)]
    return path == os.path.realpath(os.path.join(ROOT, "training.py")) or os.path.dirname(path) in scripts


def python_of(environment: str) -> str:
    """Return the path of an environment's Python."""
    return os.path.join(environment, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))


def run_again(python: str) -> None:
    """Run this program with another Python instead, with the same arguments and environment."""
    command = [python, *sys.argv]
    if os.name == "nt":  # execv there returns to the shell at once
        sys.exit(subprocess.call(command))
    os.execv(python, command)


def nearby(path: str) -> str:
    """Return a path relative to the current folder if it is below it."""
    try:
        relative = os.path.relpath(path)
    except (OSError, ValueError):  # the folder is gone, or on another drive
        return path
    return path if relative.startswith("..") else relative


def remedy() -> str:
    """Return the command that makes the program run, for the shell that is likely here."""
    needs = os.path.join(ROOT, "requirements.txt")
    if not os.path.isfile(needs):
        return 'run "%s" -m pip install %s' % (
            sys.executable,
            " ".join(missing_packages()) or "a newer Python's milepost",
        )
    needs, venv, python = nearby(needs), nearby(VENV), nearby(python_of(VENV))
    current = sys.version_info[:2] >= OLDEST
    conda = os.path.isdir(os.path.join(sys.prefix, "conda-meta"))
    isolated = conda or sys.prefix != getattr(sys, "base_prefix", sys.prefix)
    if current and isolated and importlib.util.find_spec("pip"):
        return "run  %s -m pip install -r %s" % (sys.executable, needs)
    if shutil.which("uv"):
        if current and isolated:
            return "run  uv pip install --python %s -r %s" % (sys.executable, needs)
        return "run  uv venv --clear --python 3.13 %s && uv pip install --python %s -r %s" % (venv, venv, needs)
    names = ["python3.%d" % minor for minor in (13, 12, 11, 14)]
    newer = sys.executable if current else next(filter(shutil.which, names), "")
    if newer:
        clear = "--clear " if os.path.exists(VENV) else ""
        return "run  %s -m venv %s%s && %s -m pip install -r %s" % (newer, clear, venv, python, needs)
    return (
        "install Python 3.11 or newer (python.org, or uv: https://docs.astral.sh/uv), then make train, or see README.md"
    )
