"""The mirror on servers that speak S3: one in this process, and a store that people run. Nothing leaves this computer."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from drive import ROOT, child_environment, logged, newest, tensor_bytes, train
from mirrors import SMALL, halves, known, lose, no_pause, steps, taken, uploader
from records import save
from s3_server import BUCKET, client, reset, s3, seaweedfs
from work import HANGING

from milepost.locks import RunHeldElsewhereError
from milepost.mirror import Lease, StoreError, holding, opened, readable, runs_in
from milepost.mirror.uploading import look_up, prune

pytestmark = pytest.mark.exchange
ADDRESS = f"s3://{BUCKET}/run"


@pytest.fixture(scope="module", params=["moto", "seaweedfs"])
def server(request, tmp_path_factory):
    """Where SeaweedFS listens; None stands for a server of moto in each test."""
    if request.param == "moto":
        yield None
    else:
        with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as place:
            yield place


@pytest.fixture
def proxy(server, monkeypatch):
    with s3(monkeypatch, server) as running:
        yield running


def test_a_lease_is_exclusive(proxy):
    """By conditional writes, which the server knows."""
    own = Lease(opened(ADDRESS), "one", say=print)
    with holding(own):
        assert own.exclusive
        with pytest.raises(RunHeldElsewhereError):
            Lease(opened(ADDRESS), "one", say=print).hold()
    with holding(Lease(opened(ADDRESS), "one", say=print)):  # it was given back
        assert opened(ADDRESS).names("one/lease") == ["one/lease/00000002.beat", "one/lease/00000002.json"]


def test_of_processes_that_create_one_object_at_once_one_succeeds(proxy):
    """Each with a connection of its own."""
    stores, barrier = [opened(ADDRESS) for _ in range(4)], threading.Barrier(4)

    def create(number: int) -> bool:
        barrier.wait(HANGING)
        return stores[number].create("one", str(number).encode())

    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            created = list(threads.map(create, range(4)))
            assert created.count(True) == 1
            assert opened(ADDRESS).read("one", limit=10) == str(created.index(True)).encode()
            opened(ADDRESS).delete("one")


def test_a_large_file_goes_in_parts_and_comes_back_as_it_was(tmp_path, proxy):
    content, store = os.urandom(12 * 10**6), opened(ADDRESS)
    (tmp_path / "large").write_bytes(content)
    store.put("large", tmp_path / "large", piece=2**20)
    store.get("large", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == content
    assert sum(1 for command, path in proxy.seen if command == "PUT" and "partNumber" in path) >= 3


def test_in_a_bucket_with_versions_only_current_ones_count(tmp_path, proxy):
    """What is deleted there leaves a marker, and what is written over stays as an earlier version."""
    own, folder = client(proxy.upstream), tmp_path / "checkpoints"
    own.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    store = opened(ADDRESS)
    copies, said = uploader(known(store, tmp_path), keep_last=1)
    for step in (1, 2, 3):
        copies.submit(save(folder, step), folder, step=step)
        assert copies.finish() == 0
    assert (said, steps(taken(store)), halves(store)) == ([], [3], [])
    assert len(store.names()) == len(store.sizes()) == 3  # a checkpoint, its manifest and latest.json
    kept = own.list_object_versions(Bucket=BUCKET)
    assert sum(each["Key"].endswith("manifest.json") for each in kept["Versions"]) == 3  # the control
    assert sum(each["Key"].endswith("manifest.json") for each in kept["DeleteMarkers"]) == 2
    assert store.read("latest.json", limit=1000).count(b"00000003-") == 1
    assert [store.create("x", b"1"), store.create("x", b"2")] == [True, False]
    store.delete("x")
    assert store.create("x", b"3")  # a marker is no object
    assert store.read("x", limit=10) == b"3"
    (last,) = taken(store)
    own.delete_object(Bucket=BUCKET, Key=f"run/{last.manifest}")
    said.clear()
    named = runs_in(store, pause=no_pause)["one"]  # by latest.json alone
    assert (list(readable(store, named, say=said.append, pause=no_pause)), len(said)) == ([], 1)
    assert "manifest.json: not found" in said[0]


def test_retention_leaves_what_is_not_ours(tmp_path, proxy):
    store, folder = opened(ADDRESS), tmp_path / "checkpoints"
    copies, said = uploader(known(store, tmp_path), keep_last=1)
    store.put("one/mine.txt", b"mine")
    for step in (1, 2, 3):
        copies.submit(save(folder, step), folder, step=step)
        copies.finish()
    assert (said, steps(taken(store)), halves(store)) == ([], [3], [])
    assert len(store.names()) == 4  # a checkpoint, its manifest, latest.json and what is not ours
    fresh = known(store, tmp_path)
    assert look_up(fresh) == []
    assert prune(fresh, keep_last=1) == []


def test_an_object_that_is_missing_is_told_from_a_store_that_fails(tmp_path, proxy):
    store = opened(ADDRESS)
    store.put("x", b"abc")
    with pytest.raises(StoreError) as caught:
        store.read("y", limit=10)
    assert caught.value.kind == "missing"
    assert list(readable(store, runs_in(store, pause=no_pause).get("one", []), say=print, pause=no_pause)) == []


def test_a_run_resumes_on_an_empty_disk_past_a_damaged_checkpoint(tmp_path, proxy):
    variables = SMALL | {"CHECKPOINT_MIRROR": ADDRESS, "MIRROR_KEEP_LAST": "0", "CHECKPOINT_ASYNC": "false"}
    code, said = train(tmp_path, **variables)
    assert code == 0, said
    whole, lines = tensor_bytes(newest(tmp_path)), logged(tmp_path)
    lose(tmp_path)
    store = opened(ADDRESS)
    last = taken(store)[0]
    store.put(last.checkpoint_parts[0].object, b"damaged")
    code, said = train(tmp_path, **variables, RESUME="auto")
    assert code == 0, said
    assert f"skipped: {ADDRESS}/{last.checkpoint_parts[0].object}" in said
    assert "from the mirror" in said
    assert (tensor_bytes(newest(tmp_path)), logged(tmp_path)) == (whole, lines)


@pytest.mark.parametrize("request_number", [2, 9, 14, 21, 27])
def test_a_machine_lost_at_a_request_costs_no_bit(tmp_path, proxy, request_number):
    """The process is killed by the server's side, at a request that is never answered."""
    whole = tmp_path / "whole"
    whole.mkdir()
    assert train(whole, **SMALL)[0] == 0
    variables = SMALL | {"CHECKPOINT_MIRROR": ADDRESS}
    environment = child_environment(tmp_path, **variables) | {
        name: value for name, value in os.environ.items() if name.startswith("AWS_") or name == "PYTHONPATH"
    }
    with subprocess.Popen([sys.executable, "training.py"], cwd=ROOT, env=environment, stdout=-3, stderr=-3) as process:

        def kill(request) -> bool:
            process.kill()
            return reset(request)

        proxy.faults.extend([None] * request_number + [kill])
        assert process.wait(HANGING) == -signal.SIGKILL
    proxy.faults.clear()
    assert halves(opened(ADDRESS)) == []
    reported = len(taken(opened(ADDRESS)))
    lose(tmp_path)
    code, said = train(tmp_path, **variables, RESUME="auto")
    assert code == 0, said
    assert ("from the mirror" in said) == (reported > 0)
    assert (tensor_bytes(newest(tmp_path)), logged(tmp_path)) == (tensor_bytes(newest(whole)), logged(whole))
