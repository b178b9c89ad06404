"""Checkpoints of a mirror on a server that speaks S3: opened, listed and inspected. Nothing leaves this computer."""

from collections import Counter
from pathlib import Path

import pytest
from drive import train
from mirrors import SMALL, known, send
from records import save
from s3_server import BUCKET, no_back_off, reset, s3, status
from script import call, script
from test_remote import TEXT

from milepost import ckpt, config, remote
from milepost.mirror import opened
from milepost.runtime.progress import Log

pytestmark = pytest.mark.exchange
ADDRESS = f"s3://{BUCKET}/run"
FAULTS = {"503": status(503, "SlowDown"), "reset": reset}


@pytest.fixture
def proxy(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    no_back_off(monkeypatch)
    with s3(monkeypatch) as running:
        yield running


@pytest.mark.parametrize("layout", ["unified", "separated", "directory", "sharded"])
def test_inspecting_reads_ranges_and_listing_no_checkpoint(tmp_path, proxy, layout):
    folder = tmp_path / "checkpoints"
    path = save(folder, 3, layout=layout, size=1500)  # 27 MB
    sent = send(known(opened(ADDRESS), tmp_path), path, folder)
    proxy.sent.clear()
    said = call(script("inspect_checkpoint"), tmp_path, CHECKPOINT_PATH=f"{ADDRESS}/latest", FORMAT="json")
    assert said.code == 0, said.err
    assert (
        said.out.replace(f"{ADDRESS}/", f"{folder}/")
        == call(script("inspect_checkpoint"), tmp_path, CHECKPOINT_PATH=path, FORMAT="json").out
    )
    assert sum(proxy.sent) < 4e6 < sent.size
    proxy.sent.clear()
    listed = call(script("list_checkpoints"), tmp_path, CHECKPOINT_DIR=ADDRESS)
    assert (listed.code, path.name in listed.out) == (0, True), listed.err
    assert sum(proxy.sent) < 1e5


def test_a_run_in_a_bucket_generates_on_another_machine_and_is_downloaded_once(tmp_path, proxy):
    assert train(tmp_path, **SMALL, CHECKPOINT_MIRROR=ADDRESS)[0] == 0
    there = ckpt.latest(ckpt.find(tmp_path / "checkpoints")).path
    here = call(script("load_checkpoint"), tmp_path, CHECKPOINT_PATH=there, **TEXT)
    for _ in range(2):
        proxy.seen.clear()
        said = call(script("load_checkpoint"), tmp_path, CHECKPOINT_PATH=f"{ADDRESS}/latest", **TEXT)
        assert (said.code, said.out) == (0, here.out), said.err
    assert not any(command == "GET" and there.name in path for command, path in proxy.seen)


def test_a_name_in_a_bucket_is_followed_by_one_list_and_downloads_each_once(tmp_path, proxy):
    folder, mirrored = tmp_path / "checkpoints", known(opened(ADDRESS), tmp_path)
    paths = [save(folder, step) for step in (1, 2)]
    send(mirrored, paths[0], folder)
    settings = config.read({"PYTHON_DOTENV_DISABLED": "1"})
    name, (first, find, every) = remote.followed(f"{ADDRESS}/latest", settings, Log())
    assert (name, every, Path(first).name, find().name) == ("latest", remote.ASK_EVERY, paths[0].name, paths[0].name)
    proxy.seen.clear()
    assert find().name == paths[0].name
    asked = Counter(path.partition("?")[0].rpartition("/")[2] for _, path in proxy.seen)
    assert (asked.keys(), asked[BUCKET]) == ({BUCKET, "latest.json"}, 1)  # neither manifests nor checkpoints
    proxy.faults.extend([status(403, "AccessDenied")])
    with pytest.raises(ckpt.CheckpointError) as caught:
        find()
    assert caught.value.kind == "unreachable"
    assert find().name == paths[0].name
    send(mirrored, paths[1], folder)
    proxy.seen.clear()
    assert [find().name for _ in range(3)] == [paths[1].name] * 3
    read = [path for command, path in proxy.seen if command == "GET" and ".pt" in path]
    assert len(read) == 1
    assert paths[1].name in read[0]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_a_request_costs_nothing_and_one_that_stays_is_a_sentence(tmp_path, proxy, name, monkeypatch):
    folder = tmp_path / "checkpoints"
    send(known(opened(ADDRESS), tmp_path), save(folder, 3), folder)
    for at in range(0, 12, 3):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(at)))  # an empty cache
        for each in ("inspect_checkpoint", "verify_checkpoint"):
            proxy.faults.extend([None] * at + [FAULTS[name]] * 2)
            said = call(script(each), tmp_path, CHECKPOINT_PATH=f"{ADDRESS}/3")
            proxy.faults.clear()
            assert said.code == 0, said.err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "last"))
    proxy.faults.extend([FAULTS[name]] * 10_000)
    said = call(script("verify_checkpoint"), tmp_path, CHECKPOINT_PATH=f"{ADDRESS}/3")
    proxy.faults.clear()
    assert (said.code, len(said.err.strip().splitlines())) == (3, 1)
    assert "hidden-secret" not in said.err


def test_a_bucket_that_is_missing_and_one_that_refuses_are_a_sentence(tmp_path, proxy):
    missing = call(script("list_checkpoints"), tmp_path, CHECKPOINT_DIR="s3://nowhere/run")
    proxy.faults.extend([status(403, "AccessDenied")] * 20)
    denied = call(script("list_checkpoints"), tmp_path, CHECKPOINT_DIR=ADDRESS)
    assert [said.code for said in (missing, denied)] == [3, 3]
    assert all(len(said.err.strip().splitlines()) == 1 for said in (missing, denied)), (missing.err, denied.err)
