"""FORMAT=json of the scripts that look after checkpoints, and the order, filter and totals of the list."""

import json
from pathlib import Path

import pytest
from drive import ROOT, train
from script import call, copied, family, script, train_family

from milepost import ckpt

DOCS = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return copied(trained, tmp_path)


def printed(name: str, folder: Path, code: int = 0, **changes: str | Path) -> dict:
    done = call(script(name), folder, FORMAT="json", **changes)
    assert done.code == code, done.err
    return json.loads(done.out)


def documented(name: str) -> set[str]:
    """The fields that docs/checkpoints.md names for a script."""
    (row,) = (line for line in DOCS.splitlines() if line.startswith(f"| `{name}.py` |"))
    return set(row.split("|")[2].replace("`", "").replace(",", " ").split())


def keys(value: object) -> set[str]:
    """The names of an object, and of the first object of each list in it."""
    assert isinstance(value, dict)
    inner = [each[0] for each in value.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
    return set(value).union(*map(keys, inner))


def test_a_list_has_what_the_table_has(folder: Path) -> None:
    (folder / "checkpoints" / "x.pt").write_bytes(b"no checkpoint")
    out = printed("list_checkpoints", folder)
    found = {str(each.path): each for each in ckpt.find(folder / "checkpoints")}
    assert [each["path"] for each in out["checkpoints"]] == list(found)
    for each in out["checkpoints"]:
        ours = found[each["path"]]
        assert (each["bytes"], each["run"], each["kind"]) == (ours.size, ours.run_id, ours.kind and str(ours.kind))
        assert each["resumable"] == (not ours.problem and ours.resumable)
    assert any(each["problem"] and each["step"] is None for each in out["checkpoints"])
    assert sum("latest" in each["marks"] for each in out["checkpoints"]) == 1
    runs = {run["run"]: run for run in out["runs"]}
    assert {name: run["bytes"] for name, run in runs.items()} == {
        name: sum(each.size for each in found.values() if each.run_id == name) for name in runs
    }
    assert sorted(bool(run["parent"]) for run in runs.values()) == [False, True]
    assert keys(out) <= documented("list_checkpoints")


@pytest.mark.parametrize("order", ["step", "loss", "size", "name"])
def test_the_list_is_sorted(folder: Path, order: str) -> None:
    out = printed("list_checkpoints", folder, SORT=order)["checkpoints"]
    field = {"name": "path", "size": "bytes"}.get(order, order)
    values = [each[field] for each in out if each[field] is not None]
    assert values == sorted(values, reverse=order == "loss")
    assert len(out) == len(printed("list_checkpoints", folder)["checkpoints"])


def test_the_list_is_filtered_by_run(folder: Path) -> None:
    child, parent = (
        next(each.run_id for each in ckpt.find(folder / "checkpoints") if bool(each.metadata["parent"]) is has)
        for has in (True, False)
    )
    for name, runs in (
        (child, {child}),
        ("latest", {child}),
        (parent, {parent}),
        (f"{child},{parent}", {child, parent}),
    ):
        assert {each["run"] for each in printed("list_checkpoints", folder, RUN=str(name))["checkpoints"]} == runs
    done = call(script("list_checkpoints"), folder, RUN="no-such-run")
    assert done.code == 2
    assert str(parent) in done.err


def test_a_named_run_is_found_by_its_name(tmp_path: Path) -> None:
    for name in ("alpha", "alpha.2", None):
        assert train(tmp_path, RUN_NAME=name, TRAINING_STEPS="1", WARMUP_STEPS="0", EVAL_INTERVAL="0")[0] == 0
    folders = sorted(path.name.split("-", 2)[2].rpartition("-")[0] for path in (tmp_path / "runs").iterdir())
    assert folders == ["alpha", "alpha.2", "gpt2-letters"]
    for name in ("alpha", "alpha.2"):
        assert [each["run"].split("-")[2] for each in printed("list_checkpoints", tmp_path, RUN=name)["runs"]] == [name]
        drawn = call(script("plot_run"), tmp_path, RUN=name)
        assert (drawn.code, drawn.out.count("alpha")) == (0, 1)
    refused = call(script("plot_run"), tmp_path, RUN="alph")
    assert refused.code == 2


def test_a_note_and_what_differs_are_listed(tmp_path: Path) -> None:
    shorter = {"TRAINING_STEPS": "1", "WARMUP_STEPS": "0", "EVAL_INTERVAL": "0"}
    for rate, text in (("1e-3", "a first try: \x1b[2J"), ("1e-4", None)):
        assert train(tmp_path, LEARNING_RATE=rate, RUN_NOTE=text, **shorter)[0] == 0
    runs = printed("list_checkpoints", tmp_path)["runs"]
    assert [(run["differs"], run["note"]) for run in runs] == [
        ("LEARNING_RATE=0.001", "a first try: \x1b[2J"),
        ("LEARNING_RATE=0.0001", None),
    ]
    *_, first, second = call(script("list_checkpoints"), tmp_path).out.splitlines()
    assert first.endswith("  LEARNING_RATE=0.001   a first try: \\x1b[2J")
    assert second.endswith("  LEARNING_RATE=0.0001")
    drawn = call(script("plot_run"), tmp_path, RUN="2*").out.rstrip().splitlines()
    assert [line.split("  ")[-1].strip() for line in drawn[-2:]] == [
        "LEARNING_RATE=0.001, a first try: \\x1b[2J",
        "LEARNING_RATE=0.0001",
    ]


def test_an_inspection_has_metadata_and_tensors(folder: Path) -> None:
    path = family(folder)[4]
    out = printed("inspect_checkpoint", folder, CHECKPOINT_PATH=path)
    record = ckpt.load(path)
    weights = {each["name"]: tuple(each["shape"]) for each in out["tensors"] if each["part"] == "weights"}
    assert weights == {name: tuple(tensor.shape) for name, tensor in record.model_state.items()}
    assert out["metadata"]["step"] == 4
    assert set(out) == documented("inspect_checkpoint") - {"part", "name", "dtype", "shape", "bytes"}
    both = printed("inspect_checkpoint", folder, CHECKPOINT_PATH=path, COMPARE_WITH=family(folder)[8])
    assert not both["identical"]
    assert {each["part"] for each in both["differences"]} == {"metadata", "tensor"}
    assert printed("inspect_checkpoint", folder, CHECKPOINT_PATH=path, COMPARE_WITH=path)["identical"]


def test_a_verification_has_every_check(folder: Path) -> None:
    path = family(folder)[4]
    out = printed("verify_checkpoint", folder, CHECKPOINT_PATH=path)
    assert out["passed"]
    assert [each["check"] for each in out["checkpoints"][0]["checks"]][:2] == ["bytes", "shapes"]
    assert keys(out) == documented("verify_checkpoint")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    bad = printed("verify_checkpoint", folder, 3, CHECKPOINT_PATH=path)
    assert not bad["passed"]
    assert "FAILED" in {each["status"] for each in bad["checkpoints"][0]["checks"]}


def test_an_evaluation_prints_what_it_writes(trained: Path, folder: Path, tmp_path: Path) -> None:
    path = family(folder)[4]
    out = printed(
        "evaluate_checkpoint",
        folder,
        CHECKPOINT_PATH=path,
        OUTPUT=tmp_path / "f.json",
        EVAL_DATA=trained / "letters.txt",
    )
    assert out == json.loads((tmp_path / "f.json").read_text())
    assert set(out) == documented("evaluate_checkpoint")


def test_a_pruning_has_what_it_would_delete(folder: Path) -> None:
    before = sorted((folder / "checkpoints").iterdir())
    plan = printed("prune_checkpoints", folder, CHECKPOINT_KEEP_LAST="1")
    assert plan["dry_run"]
    assert sorted((folder / "checkpoints").iterdir()) == before
    done = printed("prune_checkpoints", folder, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert [each["path"] for each in done["checkpoints"]] == [each["path"] for each in plan["checkpoints"]] != []
    assert not any(Path(each["path"]).exists() for each in done["checkpoints"])
    assert keys(done) == documented("prune_checkpoints")
