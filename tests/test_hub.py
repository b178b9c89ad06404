"""milepost/ckpt/hub.py with a local hub: the real client, in a process of its own, sends requests that the hub logs."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import programs
import pytest
import torch
from drive import ROOT
from transformers import GPT2Config, GPT2LMHeadModel
from work import HANGING

COMMIT = "a" * 40
ASK = """
import sys
from milepost.ckpt import CheckpointError, load
from milepost.ckpt.hub import local_folder
try:
    folder = local_folder(sys.argv[1])
    record = load(folder)
    print(folder, record.model_settings["n_embd"], (record.tokenizer or {}).get("kind"), *record.notes, sep="\\n")
except CheckpointError as error:
    sys.exit(str(error))
"""


class Hub(http.server.ThreadingHTTPServer):
    """Serves `{top}/{owner}/{name}/` as repositories; `asked` are the files whose bytes were fetched."""

    def __init__(self, top: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.top, self.asked = top, []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        words = self.path.split("?")[0].strip("/").split("/")
        if words[:2] == ["api", "models"]:
            return self.listing("/".join(words[2:4]), words[4:])
        repository, name = "/".join(words[:2]), words[-1]
        file = self.server.top / repository / name
        if words[2:3] != ["resolve"] or not file.is_file():
            return self.say(404, b"", {"X-Error-Code": "EntryNotFound"})
        if body:
            self.server.asked.append(name)
        return self.say(200, file.read_bytes(), {"ETag": f'"{name}-1"', "X-Repo-Commit": COMMIT}, body=body)

    def listing(self, repository: str, rest: list[str]) -> None:
        folder = self.server.top / repository
        if not folder.is_dir():
            return self.say(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = sorted(folder.iterdir())
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": one.name, "size": one.stat().st_size, "oid": "b" * 40} for one in files]
            return self.say(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        values = {
            "id": repository,
            "sha": COMMIT,
            "private": False,
            "siblings": [{"rfilename": one.name} for one in files],
        }
        return self.say(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def say(self, code: int, data: bytes, headers: dict[str, str], *, body: bool = True) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(data)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    top = tmp_path_factory.mktemp("hub")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=8, n_layer=1, n_head=1, n_embd=2))
    for name in ("both", "bin", "shards", "none", "pieces"):
        folder = top / "me" / name
        model.save_pretrained(folder, max_shard_size="100KB" if name == "shards" else "1GB")
        for other in ("README.md", "modeling_evil.py", "flax_model.msgpack"):
            (folder / other).write_text("#version\n")
        (folder / "special_tokens_map.json").write_text("{}")
        if name == "pieces":
            (folder / "tokenizer.model").write_bytes(b"\n\x0e")
        if name in ("both", "bin"):
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        if name in ("bin", "none"):
            (folder / "model.safetensors").unlink()
    server = Hub(top)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def ask(hub: Hub, name: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Return what a process prints that loads the model; `hub.asked` starts empty."""
    hub.asked.clear()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    values = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": str(HANGING),
        "HF_HUB_ETAG_TIMEOUT": str(HANGING),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return programs.run(
        [sys.executable, "-c", ASK, name], cwd=ROOT, env=kept | values | environment, capture_output=True, text=True,
        check=False
    )  # fmt: skip


SMALL = {"config.json", "generation_config.json", "special_tokens_map.json"}


@pytest.mark.parametrize(
    ("name", "weights"),
    [("both", {"model.safetensors"}), ("bin", {"pytorch_model.bin"}), ("shards", None)],
)
def test_weights_are_fetched_in_the_safest_form_that_is_there_and_nothing_else(hub, tmp_path, name, weights):
    if weights is None:
        weights = {one.name for one in (hub.top / "me" / name).glob("model[.-]*")}
        assert len(weights) > 2
    said = ask(hub, f"me/{name}", tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[1] == "2"
    assert set(hub.asked) == SMALL | weights
    assert len(hub.asked) == len(set(hub.asked))
    again = ask(hub, f"me/{name}", tmp_path, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout, hub.asked) == (0, said.stdout, [])


def test_beside_a_tokenizer_that_is_not_read_none_is_guessed(hub, tmp_path):
    said = ask(hub, "me/pieces", tmp_path).stdout
    assert said.splitlines()[2] == "None"
    assert "tokenizer.model: this kind of tokenizer is not read" in said
    assert ask(hub, "me/both", tmp_path).stdout.splitlines()[2] == "gpt2"  # a control


REFUSED = {
    "me/none": "has no model.safetensors and no pytorch_model.bin",
    "me/absent": "me/absent: the hub has no such model, or it needs HF_TOKEN",
    "no good/name": "no good/name: could not be fetched from the hub",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_has_not_is_one_sentence(hub, tmp_path, name):
    said = ask(hub, name, tmp_path)
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.splitlines()[-1].find(REFUSED[name]) >= 0
    assert "Traceback" not in said.stderr


def test_offline_without_a_copy_names_the_folder_form(hub, tmp_path):
    said = ask(hub, "me/both", tmp_path, HF_HUB_OFFLINE="1")
    assert said.returncode == 1
    assert "name a folder that holds config.json and model.safetensors" in said.stderr
    assert hub.asked == []


def test_a_hub_that_is_not_there_names_the_folder_form(hub, tmp_path):
    said = ask(hub, "me/both", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert said.returncode == 1
    assert "without a network, name a folder" in said.stderr
    assert "Traceback" not in said.stderr
