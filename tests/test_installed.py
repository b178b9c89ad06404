"""`pip install .` in an environment of its own: what is found, and where outputs and caches go."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import programs
import pytest
from drive import ROOT, TINY, tensor_bytes
from pages import copied_checkout
from work import HANGING

from milepost import ckpt

SMALL = TINY | {"ENABLE_CHECKPOINTS": "true", "TRAINING_STEPS": "4"}
CACHE = (
    "import sys; from milepost.places import cache_folder; from pathlib import Path; "
    "print(cache_folder(Path(sys.argv[1])))"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of the test's own, which makes folders of it unwritable."""
    (tmp_path / "checkout").mkdir()
    return copied_checkout(tmp_path / "checkout")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment that has the package, and the packages that it needs from here."""
    checkout = copied_checkout(tmp_path_factory.mktemp("checkout"))
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    # In ASCII: under LC_ALL=C an isolated interpreter reads such a file so, and the path may have other letters.
    here = f"import sys; sys.path.append({sysconfig.get_path('purelib')!a})\n"
    (packages_of(place) / "here.pth").write_text(here)
    pip = [sys.executable, "-m", "pip", "--python", str(python_of(place))]
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*pip, "install", *offline, str(checkout)], check=True, capture_output=True)
    return place


def python_of(place: Path) -> Path:
    return place / "bin" / "python"


def packages_of(place: Path) -> Path:
    (folder,) = place.glob("lib/python*/site-packages")
    return folder


def run(place: Path, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the environment's Python in `folder`."""
    env = programs.LEAST | {"HOME": str(folder / "home"), "PYTHONDONTWRITEBYTECODE": "1"} | variables
    command = [str(python_of(place)), *arguments]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=HANGING, check=False
    )  # fmt: skip


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_every_module_is_installed_and_the_bundled_text(installed: Path) -> None:
    held = files_below(packages_of(installed))
    modules = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("milepost/**/*.py", "models/*.py", "training.py")
        for path in ROOT.glob(pattern)
    }
    scripts = {f"milepost/scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")}
    expected = modules | scripts | {"milepost/data/dear_wren.md", "milepost/py.typed"}
    assert expected <= held
    assert {
        name for name in held if name.endswith((".py", ".md")) and name.startswith(("milepost", "models"))
    } - expected == set()
    assert not {"data", "scripts", "tests"} & {name.split("/")[0] for name in held}


def test_outputs_go_to_the_current_folder_and_caches_to_the_users(installed: Path, tmp_path: Path) -> None:
    before = files_below(installed)
    caches = {"XDG_CACHE_HOME": str(tmp_path / "caches")}
    trained = run(installed, tmp_path, "-m", "training", **SMALL | caches)
    assert trained.returncode == 0, trained.stderr
    assert sorted(os.listdir(tmp_path)) == ["caches", "checkpoints", "runs"]
    assert sorted(os.listdir(tmp_path / "caches" / "milepost" / "tokens")) != ["scans"]
    record = ckpt.load(ckpt.latest(ckpt.find(tmp_path / "checkpoints")).path)
    assert record.hyperparameters["TRAINING_DATA_SOURCE"] == "data/dear_wren.md"  # a checkout finds it too

    exported = run(installed, tmp_path, "-m", "milepost.scripts.convert_checkpoint", CONVERT_TO="nanogpt")
    assert exported.returncode == 0, exported.stderr
    assert len(list((tmp_path / "exports").glob("checkpoint_*"))) == 1
    resumed = run(installed, tmp_path, "-m", "training", **SMALL | caches | {"RESUME": "auto"})
    assert (resumed.returncode, "is finished" in resumed.stderr) == (0, True), resumed.stderr
    assert not (tmp_path / "home").exists()
    assert files_below(installed) == before


def test_the_next_command_runs(installed: Path, tmp_path: Path) -> None:
    trained = run(installed, tmp_path, "-m", "training", **SMALL)
    (line,) = [line for line in trained.stderr.splitlines() if line.startswith("next: ")]
    said = subprocess.run(
        ["bash", "-c", line.removeprefix("next: ")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (said.returncode, len(said.stdout) > 100) == (0, True), said.stderr
    assert (tmp_path / "home" / ".cache" / "milepost" / "tokens").is_dir()


def test_an_env_file_of_the_current_folder_is_read(installed: Path, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in SMALL.items()))
    trained = run(installed, tmp_path, "-m", "training", CHECKPOINT_DIR="elsewhere")
    assert trained.returncode == 0, trained.stderr
    assert [found.step for found in ckpt.find(tmp_path / "elsewhere")][-1] == 4


def test_the_python_interface_looks_where_it_saves(installed: Path, tmp_path: Path) -> None:
    keywords = {name.lower(): value for name, value in SMALL.items()}
    (tmp_path / "other").mkdir()
    code = f"import os, milepost; os.chdir('other'); milepost.train(**{keywords!r}); print(milepost.latest())"
    done = run(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).parent == tmp_path / "other" / "checkpoints"


# ---------------------------------------------------------------------------------------------------------------------
# A checkout.


def test_a_checkout_keeps_its_caches_unless_it_cannot_be_written(checkout: Path, tmp_path: Path) -> None:
    """A file that is not executable stands for a folder that cannot be written, also to root."""
    users, own = tmp_path / "caches", checkout / "data" / ".cache"

    def cache() -> Path:
        command = [sys.executable, "-c", CACHE, str(users)]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
        return Path(done.stdout.strip())

    assert cache() == own
    (own / "tokens").mkdir(parents=True)
    assert cache() == own
    (own / "downloads").write_text("")
    assert cache() == users / "milepost"


def test_a_text_is_trained_on_where_the_checkout_cannot_be_written(checkout: Path, tmp_path: Path) -> None:
    ways = {"here": tmp_path / "home" / ".cache" / "milepost", "there": tmp_path / "caches" / "milepost"}
    (checkout / "data" / ".cache").mkdir(exist_ok=True)
    (checkout / "data" / ".cache" / "hashes").write_text("")
    places = {"CHECKPOINT_DIR": str(tmp_path / "checkpoints"), "RUNS_DIR": str(tmp_path / "runs")}
    weights = []
    for name, more in {"here": {}, "there": {"XDG_CACHE_HOME": str(tmp_path / "caches")}}.items():
        env = programs.LEAST | {"HOME": str(tmp_path / "home")} | SMALL | places | more
        command = [sys.executable, str(checkout / "training.py")]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (ways[name] / "tokens" / "scans").is_dir()
        weights.append(tensor_bytes(ckpt.load(ckpt.latest(ckpt.find(tmp_path / "checkpoints")).path)))
    assert weights[0] == weights[1]
