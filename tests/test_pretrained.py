"""PRETRAINED=owner/name with a local hub: what is fetched, the commit in the record, and resumes after the branch has moved."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from drive import ROOT, child_environment, newest, tensor_bytes
from test_hub import Answer, Hub, ask
from test_templates import CHATML, bpe
from work import HANGING

import models
from milepost import ckpt, config
from milepost.ckpt.hub import is_pinned, is_same_model
from milepost.publish.card import base_on_hub
from milepost.publish.public import hub_name

FIRST, SECOND, OTHER_KIND = "1" * 40, "2" * 40, "3" * 40
SIZES = {"block_size": 512, "n_layer": 2, "n_head": 2, "n_embd": 16}


class ModelHub(Hub):
    """Serves `{top}/{commit}/` as the only model, wren/lark, whose branch main is at `main`."""

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        self.RequestHandlerClass = ModelAnswer
        self.main, self.gated = FIRST, False


class ModelAnswer(Answer):
    server: ModelHub

    def answer(self, *, body: bool) -> None:
        words = self.path.split("?")[0].strip("/").split("/")
        api = words[:4] == ["api", "models", "wren", "lark"]
        revision = (words[5:6] if api else words[3:4]) or ["main"]
        commit = self.server.main if revision == ["main"] else revision[0]
        if words[:2] not in (["api", "models"], ["wren", "lark"]) or (words[:2] == ["api", "models"] and not api):
            return self.say(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if not (self.server.top / commit).is_dir():
            return self.say(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if api:
            return self.listed(commit, words[4:])
        file = self.server.top / commit / words[-1]
        if not file.is_file():
            return self.say(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.server.gated:
            return self.say(403, b"", {"X-Error-Code": "GatedRepo"})
        if body:
            self.server.asked.append(file.name)
        return self.say(
            200, file.read_bytes(), {"ETag": f'"{commit[0]}-{file.name}"', "X-Repo-Commit": commit}, body=body
        )

    def listed(self, commit: str, rest: list[str]) -> None:
        files = sorted(path for path in (self.server.top / commit).iterdir() if path.is_file())
        values: Any = {
            "id": "wren/lark",
            "sha": commit,
            "private": False,
            "siblings": [{"rfilename": path.name} for path in files],
        }
        if rest[:1] == ["tree"]:
            values = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "b" * 40} for path in files
            ]
        return self.say(200, json.dumps(values).encode(), {"Content-Type": "application/json"})


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits of a Llama, and one of a GPT-2."""
    top, tokenizer = tmp_path_factory.mktemp("hub"), bpe(CHATML)
    for seed, (commit, kind) in enumerate(((FIRST, "llama"), (SECOND, "llama"), (OTHER_KIND, "gpt2"))):
        torch.manual_seed(seed)
        model = models.build(kind, {"vocab_size": tokenizer.vocab_size, **SIZES})
        record = ckpt.Checkpoint(
            model_state=model.state_dict(), model_type=kind, model_settings=models.plain(model.settings), tokenizer=tokenizer.to_dict()
        )  # fmt: skip
        shutil.move(ckpt.save(record, top / "saved", layout="huggingface"), top / commit)
        (top / commit / "modeling_evil.py").write_text("raise SystemExit('run')\n")
    return top


@pytest.fixture
def hub(repository: Path) -> Iterator[ModelHub]:
    server = ModelHub(repository)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


# Of a run that keeps only what the model brings: its sizes are its own.
FEW = dict.fromkeys(("MODEL_TYPE", "N_LAYER", "N_HEAD", "N_EMBD", "DROPOUT"))


def run(script: str, folder: Path, hub: ModelHub, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, whose hub is the local one."""
    folder.mkdir(exist_ok=True)
    where = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1",
             "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": str(HANGING), "HF_HUB_ETAG_TIMEOUT": str(HANGING)}  # fmt: skip
    environment = child_environment(folder, **{**FEW, **changes}) | where
    return programs.run(
        [sys.executable, script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGING,
        check=False,
    )


def test_adapters_find_their_base_after_the_branch_has_moved(hub: ModelHub, tmp_path: Path) -> None:
    """A run of adapters alone needs its base at each resume: the commit that the record names, without asking for another."""
    changes = {
        "PRETRAINED": "wren/lark",
        "LORA_RANK": "2",
        "CHECKPOINT_ADAPTERS_ONLY": "true",
        "CHECKPOINT_INTERVAL": "2",
    }
    folder = tmp_path / "run"
    done = run("training.py", folder, hub, **changes)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.asked
    assert not any(name.endswith(".py") for name in hub.asked)
    whole = newest(folder)
    assert whole.hyperparameters["PRETRAINED"] == whole.base["source"] == f"wren/lark@{FIRST}"  # type: ignore[index]
    assert (whole.model_type, whole.model_settings["n_embd"], whole.model_settings["block_size"]) == ("llama", 16, 16)
    assert "_lark_step0008_" in str(whole.path)
    assert base_on_hub(whole) == "wren/lark"
    for path in (folder / "checkpoints").rglob("*step000[68]*"):
        path.unlink()
    hub.main = SECOND
    for named, offline in ((changes, "0"), ({}, "1")):  # as it was named, and from the checkpoint alone
        hub.asked.clear()
        done = run("training.py", folder, hub, RESUME="auto", HF_HUB_OFFLINE=offline, **named)
        assert done.returncode == 0, done.stderr
        assert hub.asked == []
        assert tensor_bytes(newest(folder)) == tensor_bytes(whole)
        assert newest(folder).run_id == whole.run_id
        for path in (folder / "checkpoints").rglob("*step000[68]*"):
            path.unlink()
    done = run(
        "scripts/load_checkpoint.py", folder, hub, CHECKPOINT_PATH="latest", HF_HUB_OFFLINE="1", MAX_NEW_TOKENS="4"
    )
    assert done.returncode == 0, done.stderr
    done = run("training.py", folder, hub, RESUME="auto", PRETRAINED=f"wren/lark@{SECOND}")
    assert (done.returncode, "PRETRAINED" in done.stderr) == (2, True)
    done = run("training.py", tmp_path / "new", hub, **changes)
    assert done.returncode == 0, done.stderr  # the control: a new run has the branch as it is now
    assert newest(tmp_path / "new").base["source"] == f"wren/lark@{SECOND}"  # type: ignore[index]


def test_adapters_over_a_name_without_a_commit_find_their_base(hub: ModelHub, tmp_path: Path) -> None:
    """INIT_FROM of such adapters cannot name it: GPT2_MODEL_NAME would name first weights too. Their hash tells a moved branch."""
    hub.main, folder = OTHER_KIND, tmp_path / "run"
    lora = {"LORA_RANK": "2", "CHECKPOINT_ADAPTERS_ONLY": "true", "TRAINING_STEPS": "2", "WARMUP_STEPS": "0"}
    done = run("training.py", folder, hub, GPT2_MODEL_NAME="wren/lark", **{**lora, "MODEL_TYPE": "gpt2"})
    assert done.returncode == 0, done.stderr
    saved = newest(folder)
    assert saved.base["source"] == "wren/lark"  # type: ignore[index]
    begun = {"INIT_FROM": str(saved.path), "CHECKPOINT_DIR": str(tmp_path / "more"), **lora}
    done = run("training.py", folder, hub, **begun)
    assert (done.returncode, "is wren/lark of the hub" in done.stderr) == (0, True), done.stderr
    hub.main = SECOND
    moved = run("training.py", folder, hub, **begun)
    assert (moved.returncode, "is not the base of" in moved.stderr) == (3, True), moved.stderr


def test_a_commit_of_another_kind(hub: ModelHub, tmp_path: Path) -> None:
    done = run("training.py", tmp_path / "run", hub, PRETRAINED=f"wren/lark@{OTHER_KIND}", TRAINING_STEPS="2")
    assert done.returncode == 0, done.stderr
    record = newest(tmp_path / "run")
    assert (record.model_type, record.hyperparameters["PRETRAINED"]) == ("gpt2", f"wren/lark@{OTHER_KIND}")


def test_what_the_hub_has_not_is_one_sentence(hub: ModelHub, tmp_path: Path) -> None:
    done = run("training.py", tmp_path / "run", hub, PRETRAINED="wren/none")
    assert done.returncode == 3
    assert len([line for line in done.stderr.splitlines() if "wren/none: the hub has no such model" in line]) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
    for name, offline, problem in (
        ("wren/lark@dev", "0", "wren/lark@dev: the hub has the model, but no such revision"),
        ("wren/lark", "1", "wren/lark: could not be fetched from the hub"),
    ):
        asked = ask(hub, name, tmp_path, HF_HUB_OFFLINE=offline)
        assert (asked.returncode, problem in asked.stderr, "Traceback" in asked.stderr) == (1, True, False)
    done = run("training.py", tmp_path / "run", hub, PRETRAINED="wren/none", HF_HUB_OFFLINE="1")
    assert (done.returncode, "set INIT_FROM to a folder with its files" in done.stderr) == (3, True)
    hub.gated = True
    asked = ask(hub, "wren/lark", tmp_path)
    assert "wren/lark: the hub gives this model only to accounts that have accepted its terms" in asked.stderr
    assert "accept them at huggingface.co/wren/lark and set HF_TOKEN" in asked.stderr


@pytest.mark.parametrize(
    "name", ["gpt2", "./folder", "/folder", "a/b/c", "a b/c", "a/b@", "a/b@x y", "../a/b", "hf://a/b", "a/b@-x"]
)
def test_names_are_checked(name: str) -> None:
    with pytest.raises(config.ConfigError, match="expected owner/name"):
        config.read({"PRETRAINED": name, "PYTHON_DOTENV_DISABLED": "1"})


def test_settings_are_those_of_a_fine_tuning() -> None:
    def read(**given: str) -> config.Config:
        return config.read({"PRETRAINED": "wren/lark@dev", "PYTHON_DOTENV_DISABLED": "1", **given})

    assert (read().pretrained, read().learning_rate, read().block_size) == ("wren/lark@dev", 5e-5, 256)
    assert read(LORA_RANK="8").lora_rank == 8  # of whatever kind the model is
    for other in ({"INIT_FROM": "latest"}, {"GPT2_MODEL_NAME": "gpt2", "MODEL_TYPE": "gpt2"}):
        with pytest.raises(config.ConfigError, match="both name the first weights"):
            read(**other)


def test_pinned_names() -> None:
    assert is_pinned(f"wren/lark@{FIRST}")
    assert not any(map(is_pinned, ("wren/lark", "wren/lark@main", f"/home/wren/lark@{FIRST}", None)))
    assert is_same_model("wren/lark", f"wren/lark@{FIRST}")
    assert is_same_model("wren/lark@main", f"wren/lark@{FIRST}")
    assert not any(is_same_model(name, f"wren/lark@{FIRST}") for name in (f"wren/lark@{SECOND}", "wren/dove", None))
    assert hub_name(f"wren/lark@{FIRST}") == f"wren/lark@{FIRST}"
    assert hub_name(f"/home/wren/lark@{FIRST}") is None
