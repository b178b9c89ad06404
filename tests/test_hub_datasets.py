"""Data sets of the hub with a local hub: which files a split has, the commit in the record, and a resume after the branch moved."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drive import ROOT, child_environment, newest, tensor_bytes
from test_hub import Answer, Hub
from work import HANGING

from milepost.text import hub as hub_module
from milepost.text.errors import DataError
from milepost.text.hub import at_commit, configs_of, data_set, files_of_split, of_one_type

LETTERS = (ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8")
FIRST, SECOND = "1" * 40, "2" * 40


class DataHub(Hub):
    """Serves `{top}/{commit}/` as the only data set, `name`, whose branch main is at `main`."""

    def __init__(self, top: Path, name: str = "wren/letters") -> None:
        super().__init__(top)
        self.name = name.split("/")
        self.RequestHandlerClass = DataAnswer
        self.gated, self.main, self.configs = False, FIRST, list[dict[str, Any]]()


class DataAnswer(Answer):
    server: DataHub

    def answer(self, *, body: bool) -> None:
        words = self.path.split("?")[0].strip("/").split("/")
        if words[:4] == ["api", "datasets", *self.server.name]:
            commit = self.commit(words[5] if len(words) > 5 else "main")
            if not (self.server.top / commit).is_dir():
                return self.say(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = sorted(path for path in (self.server.top / commit).rglob("*") if path.is_file())
            names = [path.relative_to(self.server.top / commit).as_posix() for path in files]
            if words[4:5] == ["tree"]:
                tree = [{"type": "file", "path": name, "size": path.stat().st_size, "oid": "b" * 40} for name, path in zip(names, files, strict=True)]  # fmt: skip
                return self.say(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            card = {"configs": self.server.configs} if self.server.configs else {}
            values = {"id": "/".join(self.server.name), "sha": commit, "private": False, "cardData": card,
                      "siblings": [{"rfilename": name} for name in names]}  # fmt: skip
            return self.say(200, json.dumps(values).encode(), {"Content-Type": "application/json"})
        if words[:4] == ["datasets", *self.server.name, "resolve"]:
            commit = self.commit(words[4])
            file = self.server.top / commit / "/".join(words[5:])
            if self.server.gated:
                return self.say(403, b"", {"X-Error-Code": "GatedRepo"})
            if body:
                self.server.asked.append(file.name)
            return self.say(
                200, file.read_bytes(), {"ETag": f'"{commit[0]}-{file.name}"', "X-Repo-Commit": commit}, body=body
            )
        return self.say(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def commit(self, revision: str) -> str:
        return self.server.main if revision == "main" else revision


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[DataHub]:
    with data_hub(tmp_path) as server:
        yield server


@contextlib.contextmanager
def data_hub(tmp_path: Path, name: str = "wren/letters") -> Iterator[DataHub]:
    """Yield a hub whose data set has two commits."""
    for commit, start in ((FIRST, 0), (SECOND, 9000)):
        folder = tmp_path / "hub" / commit
        (folder / "data").mkdir(parents=True)
        for part, text in (("train-00000-of-00002", LETTERS[start : start + 3000]), ("train-00001-of-00002", LETTERS[start + 3000 : start + 6000]),
                           ("test-00000-of-00001", LETTERS[20000:21000])):  # fmt: skip
            (folder / "data" / f"{part}.jsonl").write_text(json.dumps({"text": text}) + "\n")
        (folder / "README.md").write_text("# Letters\n")
        (folder / "load.py").write_text("raise SystemExit('run')\n")
    server = DataHub(tmp_path / "hub", name)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def train(folder: Path, hub: DataHub, **changes: str) -> tuple[int, str]:
    """Train in a process of its own, whose hub is the local one."""
    import subprocess
    import sys

    folder.mkdir(exist_ok=True)
    where = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1",
             "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": str(HANGING), "HF_HUB_ETAG_TIMEOUT": str(HANGING)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "training.py"], cwd=ROOT, env=child_environment(folder, **changes) | where, capture_output=True, text=True,
        timeout=HANGING, check=False
    )  # fmt: skip
    return done.returncode, done.stderr


def test_a_resume_is_exact_after_the_branch_has_moved(hub: DataHub, tmp_path: Path) -> None:
    source = "hf://datasets/wren/letters"
    changes = {"TRAINING_DATA_SOURCE": source, "VALIDATION_DATA": f"{source}/test", "CHECKPOINT_INTERVAL": "2"}
    code, said = train(tmp_path / "run", hub, **changes)
    assert code == 0, said
    assert sorted(hub.asked) == [
        "test-00000-of-00001.jsonl",
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
    ]
    whole = newest(tmp_path / "run")
    assert (
        whole.data["source"]
        == f"hf://datasets/wren/letters@{FIRST}/train"
        == whole.hyperparameters["TRAINING_DATA_SOURCE"]
    )
    assert whole.data["validation_source"] == f"hf://datasets/wren/letters@{FIRST}/test"
    assert whole.data["characters"] == 6000
    for path in (tmp_path / "run" / "checkpoints").rglob("*step000[68]*"):
        path.unlink()
    hub.main = SECOND
    for named in (changes, {"TRAINING_DATA_SOURCE": None}):  # as it was named, or from the checkpoint
        hub.asked.clear()
        code, said = train(tmp_path / "run", hub, RESUME="auto", **named)  # type: ignore[arg-type]
        assert code == 0, said
        assert hub.asked == []
        assert tensor_bytes(newest(tmp_path / "run")) == tensor_bytes(whole)
        assert newest(tmp_path / "run").run_id == whole.run_id
        for path in (tmp_path / "run" / "checkpoints").rglob("*step000[68]*"):
            path.unlink()
    code, said = train(tmp_path / "run", hub, RESUME="auto", TRAINING_DATA_SOURCE=f"{source}@{SECOND}")
    assert (code, "is not the text that the checkpoint was trained on" in said) == (2, True)
    code, said = train(tmp_path / "other", hub, TRAINING_DATA_SOURCE=source)
    assert code == 0, said  # the control: a new run has the branch as it is now
    assert newest(tmp_path / "other").data["sha256"] != whole.data["sha256"]


def test_what_the_hub_has_not_is_one_sentence(hub: DataHub, tmp_path: Path) -> None:
    for source, problem in {
        "hf://datasets/wren/none": "the hub has no such data set",
        "hf://datasets/wren/letters/dev": "it has test, train",
        "hf://datasets/wren/letters@other": "the hub has the data set, but no such revision of it",
        "hf://datasets/wren": "expected hf://datasets/owner/name",
    }.items():
        code, said = train(tmp_path / "run", hub, TRAINING_DATA_SOURCE=source)
        assert (code, problem in said) == (4, True), said
    hub.gated = True
    code, said = train(tmp_path / "run", hub, TRAINING_DATA_SOURCE="hf://datasets/wren/letters")
    assert (code, "accept them at huggingface.co/datasets/wren/letters and set HF_TOKEN" in said) == (4, True), said


@pytest.mark.parametrize("lack", ["server", "network"])
def test_a_hub_that_cannot_be_reached_is_one_sentence(hub: DataHub, tmp_path: Path, lack: str) -> None:
    changes = {"HF_HUB_OFFLINE": "1"} if lack == "network" else {}
    if lack == "server":
        hub.shutdown()
        hub.server_close()
    code, said = train(tmp_path / "run", hub, TRAINING_DATA_SOURCE="hf://datasets/wren/letters", **changes)
    assert code == 4, said
    assert "hf://datasets/wren/letters could not be fetched from the hub" in said
    assert "unexpected" not in said


SEVERAL_TYPES = [
    (["train.csv", "train.jsonl", "train.parquet"], ["train.parquet"]),
    (["train.csv", "train.jsonl", "train.tsv"], ["train.jsonl"]),
    (
        ["a/train.json", "b/train.jsonl", "c/train.jsonl", "train.csv"],
        ["a/train.json", "b/train.jsonl", "c/train.jsonl"],
    ),
    (["a.txt", "b.txt", "c.jsonl", "config.json", "d.jsonl"], ["c.jsonl", "d.jsonl"]),
    (["data.jsonl", "dataset_infos.json", "requirements.txt"], ["data.jsonl"]),
    (["a.tsv", "b.arrow", "b.txt"], ["b.arrow"]),
]
SHARDS = [
    f"data/{name}.parquet"
    for name in (
        "dev-00000-of-00001",
        "train_gen-00000-of-00001",
        "train_sft-00000-of-00002",
        "train_sft-00001-of-00002",
    )
]
TREE = ["a.csv", "sub/b.csv", "sub/c/d.csv", "sub/e.txt"]
PATTERNS = {
    "*.csv": ["a.csv"],
    "**/*.csv": ["a.csv", "sub/b.csv", "sub/c/d.csv"],
    "**": TREE,
    "sub/*": ["sub/b.csv", "sub/e.txt"],
    "s?b/[bc].csv": ["sub/b.csv"],
}
NAMES = ["README.md", "data/train-0.parquet", "data/validation-0.parquet", "fr/train.csv", "load.py", "dev.jsonl"]


def test_the_files_of_a_split_are_those_of_the_readme_or_of_their_names() -> None:
    def files(address: str, names: list[str] = NAMES, configs: list[dict[str, Any]] | None = None) -> list[str]:
        return files_of_split(data_set(f"hf://datasets/a/b{address}"), names, configs or [])

    assert files("") == files("/train") == ["data/train-0.parquet", "fr/train.csv"]
    assert files("/validation") == ["data/validation-0.parquet", "dev.jsonl"]
    assert files(":fr") == ["fr/train.csv"]
    assert files("", ["a.jsonl.zst", "b.txt", "c.py", "training_args.json"]) == ["training_args.json"]
    assert files("", ["a.jsonl.zst", "b.txt", "c.py"]) == ["a.jsonl.zst", "b.txt"]
    configs = [
        {
            "config_name": "en",
            "data_files": [{"split": "train", "path": "data/train-*"}, {"split": "held", "path": ["dev.jsonl"]}],
            "default": True,
        },
        {"config_name": "fr", "data_files": "fr/*.csv"},
    ]
    assert files("", configs=configs) == ["data/train-0.parquet"]
    assert files("/held", configs=configs) == ["dev.jsonl"]
    assert files(":fr", configs=configs) == ["fr/train.csv"]
    folders = [{"config_name": "en", "data_dir": "data"}, {"config_name": "fr", "data_dir": "./fr/"}]
    assert files(":fr", configs=folders) == ["fr/train.csv"]
    assert files(":en/validation", configs=folders) == ["data/validation-0.parquet"]
    with pytest.raises(DataError, match="one of its configs"):
        files("", configs=folders)
    assert files("", configs=folders[:1]) == ["data/train-0.parquet"]
    assert files("", configs=[{"data_dir": "."}]) == files("")
    assert files("", configs=[{"data_dir": "data", "data_files": "./val*"}]) == ["data/validation-0.parquet"]
    assert configs_of(None) == []
    for address, problem in ((":de", "en, fr"), ("/test", "held, train")):
        with pytest.raises(DataError, match=problem):
            files(address, configs=configs)
    with pytest.raises(DataError, match="one of its configs"):
        files("", configs=[{**each, "default": False} for each in configs])
    with pytest.raises(DataError, match="no data file"):
        files("", ["README.md", "load.py"])


@pytest.mark.parametrize(("names", "read"), SEVERAL_TYPES)
def test_of_several_types_one_is_read(names: list[str], read: list[str]) -> None:
    """Data sets hold one text in several types; tests/exchange compares with the datasets library."""
    assert of_one_type(files_of_split(data_set("hf://datasets/a/b"), names, [])) == read


@pytest.mark.parametrize(("pattern", "found"), PATTERNS.items())
def test_patterns_of_a_readme_are_those_of_the_hub(pattern: str, found: list[str]) -> None:
    assert files_of_split(data_set("hf://datasets/a/b"), TREE, [{"data_files": pattern}]) == found


def test_a_split_of_shards_is_named_whole() -> None:
    """Else train would be the texts of train_sft and of train_gen, which have the same questions."""

    def files(split: str) -> list[str]:
        return files_of_split(data_set(f"hf://datasets/a/b{split}"), SHARDS, [])

    assert files("/train_sft") == ["data/train_sft-00000-of-00002.parquet", "data/train_sft-00001-of-00002.parquet"]
    assert files("/validation") == ["data/dev-00000-of-00001.parquet"]
    assert files_of_split(data_set("hf://datasets/a/b/test"), [*SHARDS, "test.parquet"], []) == ["test.parquet"]
    with pytest.raises(DataError, match=r"no such split with .* files; it has dev, train_gen, train_sft"):
        files("")


def test_files_of_another_type_are_told(hub: DataHub, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / FIRST / "data"
    (folder / "train-00000-of-00001.csv").write_text("text\nanother copy\n")
    code, said = train(tmp_path / "run", hub, TRAINING_DATA_SOURCE="hf://datasets/wren/letters")
    assert code == 0, said
    assert newest(tmp_path / "run").data["characters"] == 6000
    assert (
        "not read, because files of several types are copies of one text as a rule: data/train-00000-of-00001.csv"
        in said
    )


def test_a_recorded_commit_takes_the_place_of_a_branch_alone() -> None:
    recorded = [f"hf://datasets/a/b@{FIRST}:en/train"]
    for named in ("hf://datasets/a/b:en", "hf://datasets/a/b@main:en/train", recorded[0]):
        assert at_commit(named, recorded) == recorded[0]
    for other in (f"hf://datasets/a/b@{SECOND}:en", "hf://datasets/a/b:fr", "hf://datasets/a/c:en", "/a/b.txt"):
        assert at_commit(other, recorded) == other
    assert hub_module.data_set("hf://datasets/a/b").split == "train"


def test_an_address_is_taken_apart() -> None:
    for revision in ("main", "v1.0", FIRST, "refs/convert/parquet", "refs/pr/7"):
        found = data_set(f"hf://datasets/a/b@{revision}:en/test")
        assert (found.repo, found.revision, found.config, found.split) == ("a/b", revision, "en", "test")
        assert data_set(found.address) == found
        assert data_set(f"hf://datasets/a/b@{revision}/test").config is None
    for wrong in ("a/b@refs/heads/main", "a/b@x/y/z", "a", "a/b:en:fr"):
        with pytest.raises(DataError, match="expected hf://datasets/owner/name"):
            data_set(f"hf://datasets/{wrong}")
