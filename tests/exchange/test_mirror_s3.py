"""The mirror on a server that speaks S3, through a proxy that breaks requests. Nothing leaves this computer."""

import os
import signal
import subprocess
import sys

import pytest
from drive import ROOT, child_environment, logged, newest, tensor_bytes, train
from mirrors import halves, known, taken
from records import save
from s3_server import BUCKET, Fault, Proxy, answered_in_part, cut_off, reset, s3, status
from test_mirror import SMALL, lose, no_pause, steps, uploader
from work import HANGING

from milepost.locks import RunHeldElsewhereError
from milepost.mirror import Lease, StoreError, attempted, holding, opened, readable, runs_in
from milepost.mirror.retrying import ATTEMPTS
from milepost.mirror.uploading import look_up, prune

pytestmark = pytest.mark.exchange
ADDRESS = f"s3://{BUCKET}/run"
BROKEN = {
    "500": status(500, "InternalError"), "503": status(503, "SlowDown"), "reset": reset, "cut off": cut_off,
    "answered in part": answered_in_part,
}  # fmt: skip
REFUSED = {"denied": status(403, "AccessDenied"), "expired": status(400, "ExpiredToken")}


@pytest.fixture
def proxy(monkeypatch):
    with s3(monkeypatch) as running:
        yield running


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_a_broken_request_costs_nothing(tmp_path, proxy, name, at):
    """Each kind of fault on each kind of request: list, put of a file, of bytes, and a question for the size."""
    folder = tmp_path / "checkpoints"
    copies, said = uploader(known(opened(ADDRESS), tmp_path))
    proxy.faults.extend([None] * at + [BROKEN[name]] * 2)
    copies.submit(save(folder, 1), folder, step=1)
    assert copies.finish() == 0
    assert said == []
    store = opened(ADDRESS)
    assert (steps(taken(store)), halves(store)) == ([1], [])


@pytest.mark.parametrize("name", [*BROKEN, *REFUSED])
def test_a_fault_that_stays_is_reported_in_one_line_without_secrets(tmp_path, proxy, name):
    folder, fault = tmp_path / "checkpoints", (BROKEN | REFUSED)[name]
    copies, said = uploader(known(opened(ADDRESS), tmp_path))
    proxy.faults.extend([None] * 2 + [fault] * 20 * ATTEMPTS)
    copies.submit(save(folder, 1), folder, step=1)
    with copies._changed:
        copies._changed.wait_for(lambda: copies._current is None and copies._waiting is None)
    proxy.faults.clear()
    assert len(said) == 1
    assert "\n" not in said[0]
    assert "hidden-secret" not in said[0]
    assert copies.finish() == 0
    assert steps(taken(opened(ADDRESS))) == [1]


def test_a_bucket_that_is_missing(tmp_path, proxy):
    folder = tmp_path / "checkpoints"
    copies, said = uploader(known(opened("s3://nowhere/run"), tmp_path))
    copies.submit(save(folder, 1), folder, step=1)
    assert copies.finish() == 1
    assert "no bucket nowhere" in said[0]


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_bucket_that_is_missing_is_refused_before_the_first_step(tmp_path, proxy, resume):
    code, said = train(tmp_path, **SMALL, CHECKPOINT_MIRROR="s3://nowhere/run", RESUME=resume)
    assert code == 2
    assert said.count("no bucket nowhere") == 1
    assert list((tmp_path / "checkpoints").glob("checkpoint*")) == []


@pytest.mark.parametrize("first", ["list", "write"])
def test_a_bucket_that_may_not_be_written_is_refused_before_the_first_step(tmp_path, proxy, first):
    """Neither listed nor written, or listed only."""
    proxy.faults.extend([REFUSED["denied"] if first == "list" else only("PUT", REFUSED["denied"])] * 20)
    code, said = train(tmp_path, **SMALL, CHECKPOINT_MIRROR=ADDRESS)
    assert code == 2
    assert said.count("access is refused") == 1
    assert "hidden-secret" not in said
    assert list((tmp_path / "checkpoints").glob("checkpoint*")) == []


def test_rights_in_a_part_of_a_bucket_are_enough(tmp_path, proxy):
    """The bucket itself may not be asked for, and nothing lies below the address yet."""
    proxy.faults.extend([only("HEAD", REFUSED["denied"])])
    assert opened(ADDRESS).names() == []
    assert ("HEAD", f"/{BUCKET}") in proxy.seen


def only(command: str, fault: Fault) -> Fault:
    """A fault of one kind of request."""
    return lambda request: request.command == command and fault(request)


def overwriting(request: Proxy) -> bool:
    """Let a server be one that knows no conditional writes."""
    del request.headers["If-None-Match"]
    return False


@pytest.mark.parametrize("conditional", [True, False])
def test_a_lease_is_exclusive_where_the_server_writes_conditionally(proxy, conditional):
    proxy.faults.extend([None if conditional else overwriting] * 30)
    own = Lease(opened(ADDRESS), "one", say=print)
    with holding(own):
        assert own.exclusive == conditional
        with pytest.raises(RunHeldElsewhereError):
            Lease(opened(ADDRESS), "one", say=print).hold()
    with holding(Lease(opened(ADDRESS), "one", say=print)):  # it was given back
        assert opened(ADDRESS).names("one/lease") == ["one/lease/00000002.beat", "one/lease/00000002.json"]


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("at", range(0, 14, 2))
def test_a_lease_is_had_whatever_request_breaks(proxy, name, at):
    proxy.faults.extend([None] * at + [BROKEN[name]])
    own = Lease(opened(ADDRESS), "one", say=print)
    attempted(own.hold, pause=no_pause)
    attempted(own.hold, pause=no_pause)
    with pytest.raises(RunHeldElsewhereError):
        Lease(opened(ADDRESS), "one", say=print).hold()
    own.release()


@pytest.mark.parametrize("fault", [None, "reset", "500"])
def test_a_bounded_upload_in_parts_arrives_as_it_was(tmp_path, proxy, fault):
    """Twelve million bytes in parts of five, one of which breaks, and a rate that no computer reaches."""
    folder, content = tmp_path, os.urandom(12 * 10**6)
    (folder / "large").write_bytes(content)
    store, sent = opened(ADDRESS), []
    proxy.faults.extend([None, BROKEN[fault]] if fault else [])
    attempted(lambda: store.put("large", folder / "large", moved=sent.append, piece=2**20), pause=no_pause)
    assert store.read("large", limit=2**30) == content
    assert sum(sent) >= len(content)
    assert max(sent) <= 2**20
    assert sum(1 for command, path in proxy.seen if command == "PUT" and "partNumber" in path) >= 3
    if fault is None:
        store.put("small", b"abc", piece=2)
        assert store.read("small", limit=10) == b"abc"


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
    assert prune(fresh, folder, keep_last=1) == []


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
