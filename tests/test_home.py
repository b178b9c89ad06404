"""Nothing that is shared names the home folder of the user who trained it, and everything in it is found again."""

import os
import re
from pathlib import Path

import pytest
from drive import ROOT, command, newest, small_text
from records import in_child
from script import NOTHING_OF_TRAINING

from milepost import ckpt, config
from milepost.paths import with_home, without_home

NO_SAMPLES = {"EVAL_INTERVAL": "0", "SAMPLE_INTERVAL": "0"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with text, a run in the huggingface layout, and adapters of its checkpoint."""
    folder = tmp_path_factory.mktemp("home")
    text = {"HOME": str(folder), "TRAINING_DATA_SOURCE": str(small_text(folder))} | NO_SAMPLES
    done = command(str(ROOT / "training.py"), folder, CHECKPOINT_LAYOUT="huggingface", **text, TRAINING_STEPS="4")
    assert done.returncode == 0, done.stderr
    base = next((folder / "checkpoints").glob("checkpoint*"))
    lora = {"LORA_RANK": "2", "INIT_FROM": str(base), "CHECKPOINT_DIR": str(folder / "adapters"), "WARMUP_STEPS": "0"}
    done = command(str(ROOT / "training.py"), folder, **text, **lora, CHECKPOINT_ADAPTERS_ONLY="true",
                   TRAINING_STEPS="1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def naming(folder: Path, home: Path) -> list[str]:
    """Return the visible files below `folder` that hold the path of `home`."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return [path.name for path in files if bytes(home) in path.read_bytes()]


def test_checkpoints_do_not_name_the_home_folder(home):
    assert naming(home / "checkpoints", home) == []
    assert naming(home / "adapters", home) == []
    assert "config.env" in naming(home / "runs", home)  # negative control: it is not shared


@pytest.mark.parametrize(
    ("name", "to"), [("checkpoints", "huggingface"), ("checkpoints", "nanogpt"), ("adapters", "peft")]
)
def test_exports_do_not_name_the_home_folder(name, to, home):
    changes = {"CHECKPOINT_PATH": str(next((home / name).glob("checkpoint*"))), "OUTPUT": str(home / f"shared-{to}")}
    done = command(str(ROOT / "scripts" / "convert_checkpoint.py"), home, **NOTHING_OF_TRAINING | changes,
                   CONVERT_TO=to, HOME=str(home))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path for path in (home / f"shared-{to}").rglob("*") if path.is_file()]
    assert naming(home / f"shared-{to}", home) == []


def test_the_same_settings_resume_the_same_run(home):
    runs = sorted((home / "runs").iterdir())
    text = {"HOME": str(home), "TRAINING_DATA_SOURCE": str(home / "letters.txt")} | NO_SAMPLES
    done = command(str(ROOT / "training.py"), home, CHECKPOINT_LAYOUT="huggingface", **text, RESUME="auto",
                   TRAINING_STEPS=str(newest(home).step))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stderr
    assert sorted((home / "runs").iterdir()) == runs


def test_adapters_find_their_base_again(home, monkeypatch):
    done = command(str(ROOT / "scripts" / "list_checkpoints.py"), home, **NOTHING_OF_TRAINING, HOME=str(home),
                   CHECKPOINT_PATH=str(home / "adapters"))  # fmt: skip
    assert re.search(r"checkpoint_\S+ +found$", done.stdout, re.MULTILINE), done.stdout
    monkeypatch.setenv("HOME", str(home))
    (found, *_) = ckpt.find(home / "adapters")
    assert Path(str(ckpt.load(found.path).base["source"])).is_relative_to(home)


def test_a_resume_finds_the_text_again(home):
    changes = {"HOME": str(home), "TRAINING_DATA_SOURCE": None, "CHECKPOINT_PATH": "latest", "MODE": "resume"}
    done = command(str(ROOT / "scripts" / "load_checkpoint.py"), home, **NOTHING_OF_TRAINING | changes,
                   RESUME_TRAINING_STEPS="2", RESUME_LEARNING_RATE="keep")  # fmt: skip
    assert done.returncode == 0, done.stderr
    only = "the uninterrupted run would have ended at step 4"
    assert re.search(f"^bit-exact +no +{only}$", done.stdout, re.MULTILINE), done.stdout
    assert newest(home).step == 6


def test_caches_of_a_user_without_a_home_folder_go_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))  # nobody can create it
    assert config.user_caches() == tmp_path / ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "caches"))  # named: an error there is the user's
    assert config.user_caches() == tmp_path / "file" / "caches"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # control: it can be created
    assert config.user_caches() == tmp_path / "home" / ".cache"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that the system does not know")
def test_a_user_that_the_system_does_not_know_gets_no_folder_of_the_name_tilde():
    """Nobody's number but one: no entry in the list of users, and no HOME."""

    def caches() -> str:
        os.environ.pop("HOME", None)
        os.environ.pop("XDG_CACHE_HOME", None)
        os.setuid(54321)
        return str(config.user_caches())

    assert in_child(caches) == str(Path.cwd() / ".cache")


def test_paths_in_and_outside_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/wren")
    for path, stored in (
        ("/home/wren/a.txt,/data/b.txt", "~/a.txt,/data/b.txt"),
        ("/home/wrens/a.txt", "/home/wrens/a.txt"),
        ("/home/wren", "/home/wren"),
        ("https://host/home/wren/a", "https://host/home/wren/a"),
        ("gpt2", "gpt2"),
    ):
        assert without_home(path) == stored
        assert with_home(stored) == path
    monkeypatch.setenv("HOME", "/")
    assert without_home("/a.txt") == "/a.txt"
