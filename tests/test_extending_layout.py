"""A layout is added from outside the package by one file (toy_layout.py) and one line (in extended.py).

Each step runs in a process of its own, because layouts are registered before the settings are first read.
"""

import ast
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
from drive import ROOT, environment
from records import FULL, assert_same, flipped, record, refusal, snapshot

from milepost import config, registry
from milepost.ckpt.layouts import LAYOUTS, WRITERS, check_distinct
from milepost.ckpt.layouts.archive_layout import ArchiveLayout
from milepost.ckpt.layouts.foreign_layout import ForeignLayout
from milepost.ckpt.layouts.manifest_layout import ManifestLayout, Safetensors

TESTS = Path(__file__).parent
LONGEST = 40  # lines of the toy


def extended(*words: str, folder: Path, **changes: str | Path) -> subprocess.CompletedProcess[str]:
    texts = {"CHECKPOINT_LAYOUT": "per_tensor"} | {name: str(value) for name, value in changes.items()}
    env = programs.LEAST | environment(folder, **texts)
    return programs.run(
        [sys.executable, TESTS / "extended.py", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


def done(*words: str, folder: Path, **changes: str | Path) -> str:
    """Run a command that must succeed; return its stdout."""
    process = extended(*words, folder=folder, **changes)
    assert process.returncode == 0, process.stderr
    return process.stdout


def seen(*places: Path) -> list[dict[str, Any]]:
    """Return what `extended.py seen` prints of each checkpoint of the folders, in order of save."""
    return [json.loads(line) for line in done("seen", *map(str, places), folder=places[0].parent).splitlines()]


def train(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    done("training.py", folder=folder, CHECKPOINT_INTERVAL="2", RESUME="auto", CHECKPOINT_ASYNC="false")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """An uninterrupted run of 8 steps with a checkpoint every second step."""
    folder = tmp_path_factory.mktemp("extending") / "straight"
    train(folder)
    return folder


@pytest.fixture(scope="module")
def straight(trained) -> list[dict[str, Any]]:
    """Its checkpoints."""
    return seen(trained / "checkpoints")


def test_the_toy_is_short():
    assert len((TESTS / "toy_layout.py").read_text().splitlines()) <= LONGEST


def test_it_trains_into_a_file_per_tensor(straight):
    assert [(found["step"], found["layout"], found["parts"]) for found in straight] == [
        (step, "per_tensor", ["model", "optimizer"]) for step in (2, 4, 6, 8)
    ]
    path = Path(straight[-1]["path"])
    files = {place.relative_to(path).as_posix() for place in path.rglob("*") if place.is_file()}
    assert {name for name in files if name.startswith("weights/")} == {
        f"weights/{name}.safetensors" for name in straight[-1]["weights"]
    }
    assert "weights/wte.weight.safetensors" in files
    assert any(name.startswith("optimizer/") for name in files)


def test_killed_and_resumed_it_equals_the_uninterrupted_run(straight, tmp_path):
    changes = {"CHECKPOINT_INTERVAL": "2", "CHECKPOINT_ASYNC": "false"}
    process = extended("killed", "5", folder=tmp_path, **changes)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [found["step"] for found in seen(tmp_path / "checkpoints")] == [2, 4]
    train(tmp_path)
    resumed = seen(tmp_path / "checkpoints")
    assert [(found["step"], found["sha256"]) for found in resumed] == [
        (found["step"], found["sha256"]) for found in straight
    ]
    assert len({found["sha256"] for found in straight}) == 4  # control: a step more or less would differ


def test_it_is_converted_to_another_layout_and_back_without_loss(trained, straight, tmp_path):
    convert, first = "scripts/convert_checkpoint.py", straight[-1]
    place, back = tmp_path / "unified", tmp_path / "back"
    done(convert, folder=trained, CHECKPOINT_PATH=first["path"], CHECKPOINT_LAYOUT="unified", OUTPUT=place)
    done(convert, folder=trained, CHECKPOINT_PATH=place, OUTPUT=back)
    between, last = seen(place, back)
    assert (between["layout"], last["layout"]) == ("unified", "per_tensor")
    assert first["sha256"] == between["sha256"] == last["sha256"]
    files = [snapshot(Path(found["path"])) for found in (first, last)]
    assert [content.pop("index.json") != b"" for content in files] == [True, True]  # each has a save id of its own
    assert files[0] == files[1]


def test_it_is_listed_inspected_and_generated_from(trained):
    assert done("scripts/list_checkpoints.py", folder=trained).count("per_tensor") == 4
    assert "per_tensor" in done("scripts/inspect_checkpoint.py", folder=trained)
    said = done("scripts/load_checkpoint.py", folder=trained, MODE="inference", PROMPT="Dear", MAX_NEW_TOKENS="5")
    assert said.startswith("Dear")
    assert len(said.rstrip("\n")) >= len("Dear")


def test_a_flipped_bit_is_found(trained, straight, tmp_path):
    verify = "scripts/verify_checkpoint.py"
    path = shutil.copytree(straight[-1]["path"], tmp_path / "copy")
    assert extended(verify, folder=trained, CHECKPOINT_PATH=path).returncode == 0  # control
    for part in ("weights", "optimizer"):
        file = sorted((path / part).iterdir())[0]
        flipped(file, file.stat().st_size - 1, 3)
        process = extended(verify, folder=trained, CHECKPOINT_PATH=path)
        assert process.returncode == 3
        assert str(file) in process.stdout + process.stderr
        flipped(file, file.stat().st_size - 1, 3)


def test_it_is_pruned_and_stripped_of_its_optimizer(tmp_path):
    train(tmp_path)
    changes = {"CHECKPOINT_KEEP_LAST": "1", "CHECKPOINT_KEEP_EVERY": "4", "DRY_RUN": "false"}
    done("scripts/prune_checkpoints.py", folder=tmp_path, **changes)
    left = [found for found in seen(tmp_path / "checkpoints") if Path(found["path"]).parent.name != "best"]
    assert [(found["step"], found["parts"]) for found in left] == [(4, ["model"]), (8, ["model", "optimizer"])]
    assert not (Path(left[0]["path"]) / "optimizer").exists()


# ---------------------------------------------------------------------------------------------------------------------
# One file and one line


def test_no_file_names_a_layout_but_the_registry():
    modules = {entry.module for entry in registry.LAYOUTS.values()}
    names = {module.rpartition(".")[2] for module in modules}
    for path in sorted((ROOT / "milepost").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in modules, path
                assert node.module != "milepost.ckpt.layouts" or not names & {alias.name for alias in node.names}, path
            assert not isinstance(node, ast.Import) or not modules & {alias.name for alias in node.names}, path


def test_the_settings_offer_the_registered_layouts():
    offered = config.VARIABLES["CHECKPOINT_LAYOUT"].metadata["choices"]
    assert offered == tuple(WRITERS) == registry.layouts_to_save()
    assert {layout.name for layout in LAYOUTS if layout.writable} == set(offered)


# ---------------------------------------------------------------------------------------------------------------------
# What is not declared

WEIGHTS, OPTIMIZER = Safetensors("weights.safetensors"), Safetensors("optimizer.safetensors")
WHOLE: dict[str, Any] = {
    "name": "toy",
    "members": ("weights.safetensors", "optimizer.safetensors", "index.json"),
    "manifest": "index.json",
    "weights": WEIGHTS,
    "optimizer": OPTIMIZER,
}
UNDECLARED = {
    "name": {"name": ""},
    "manifest": {"manifest": ""},  # no file makes the checkpoint visible
    "weights": {"weights": None},
    "optimizer": {"optimizer": None},
    "members": {"members": ()},
    "primary": {
        "primary": ".pt",
        "members": (),
        "suffixes": (".safetensors", "_index.json"),
        "manifest": "_index.json",
    },
    "suffixes": {"members": (), "suffixes": ("_index.json", ".safetensors"), "manifest": "_index.json"},
}


@pytest.mark.parametrize("trait", UNDECLARED)
def test_a_trait_that_is_not_declared_is_named(trait):
    with pytest.raises(ValueError, match=rf"^layout .*: .*`{trait}`"):
        ManifestLayout(**(WHOLE | UNDECLARED[trait]))


def test_archives_and_foreign_layouts_name_what_they_lack_too():
    with pytest.raises(ValueError, match="`model_keys`"):
        ArchiveLayout(name="toy", suffixes=(".pt",))
    with pytest.raises(ValueError, match="`keys`"):
        ForeignLayout(name="toy")


def test_a_layout_whose_folders_another_would_read_is_refused():
    """The directory layout knows its folders by manifest.json."""
    members = ("weights.safetensors", "optimizer.safetensors", "manifest.json")
    toy = ManifestLayout(**WHOLE | {"members": members, "manifest": "manifest.json"})
    with pytest.raises(ValueError, match=r"^layout toy: directory takes every folder that holds manifest\.json"):
        check_distinct([*LAYOUTS, toy])
    check_distinct([toy])  # control


def test_control_what_is_declared_writes_and_reads(tmp_path):
    layout = ManifestLayout(**WHOLE)
    path = layout.write(record(7, **FULL), tmp_path, "stem")
    assert path == tmp_path / "stem"
    assert_same(layout.read(path, verify=True), record(7, **FULL))
    assert layout.problems(path) == []


def test_without_the_layout_its_checkpoint_is_not_understood(trained):
    """Control: everything above came from the line that registers it."""
    path = next((trained / "checkpoints").glob("*_step0008_*"))
    assert refusal(path).kind == "not understood"
