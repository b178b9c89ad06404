"""The mirror while requests to a server that speaks S3 break: each fault at each kind of request. Nothing leaves this computer.

Attempts follow each other at once here, and botocore makes none of its own; all else is what a run does.
"""

import os

import pytest
from drive import newest, tensor_bytes, train
from mirrors import SMALL, halves, known, lose, no_pause, steps, taken
from records import assert_same, save
from s3_server import (
    BUCKET,
    KINDS,
    Due,
    Proxy,
    answered_in_part,
    client,
    cut_off,
    dribbled,
    no_back_off,
    reset,
    s3,
    stalled,
    stalled_at_once,
    status,
)

from milepost import ckpt, run_checkpoints, run_mirror
from milepost.locks import RunHeldElsewhereError
from milepost.mirror import Lease, Uploader, attempted, fetch, holding, opened, readable, runs_in
from milepost.mirror.back_ends import OPTIONS

pytestmark = pytest.mark.exchange
ADDRESS = f"s3://{BUCKET}/run"
BROKEN = {
    "500": status(500, "InternalError"), "503": status(503, "SlowDown"), "reset": reset, "cut off": cut_off,
    "answered in part": answered_in_part,
}  # fmt: skip
DENIED = status(403, "AccessDenied")
# What stays -> the fault, and a word of the sentence that tells it.
STAYING = {
    "500": (BROKEN["500"], "InternalError"), "503": (BROKEN["503"], "SlowDown"), "reset": (reset, "onnect"),
    "store full": (status(507, "XMinioStorageFull"), "XMinioStorageFull"), "denied": (DENIED, "check the credentials"),
    "credentials expired": (status(400, "ExpiredToken"), "check the credentials"),
    "clock skew": (status(403, "RequestTimeTooSkewed"), "set the clock"),
    "bucket deleted": (status(404, "NoSuchBucket"), "not found"),
}  # fmt: skip
NO_RATE_THAT_IS_REACHED = 1e12  # bytes per second; with a rate, a large file goes in parts of which this process knows
LARGE = 700  # rows and columns of the weights: a checkpoint of two parts


@pytest.fixture
def proxy(monkeypatch):
    no_back_off(monkeypatch)
    with s3(monkeypatch) as running:
        yield running


def copied_and_back(tmp_path, *, size: int = LARGE) -> list[str]:
    """Copy two checkpoints, of which one is kept, and bring it back as it was; return what was reported."""
    folder, back, said = tmp_path / "checkpoints", tmp_path / "back", []
    rate = {"pause": no_pause, "rate": NO_RATE_THAT_IS_REACHED}
    copies = Uploader(known(opened(ADDRESS), tmp_path), keep_last=1, say=said.append, **rate)
    for step in (1, 2):
        path = save(folder, step, size=size)
        copies.submit(path, folder, step=step)
        assert copies.finish() == 0, said
    store = opened(ADDRESS)
    assert (steps(taken(store)), halves(store)) == ([2], [])
    (found,) = readable(store, runs_in(store, pause=no_pause)["one"], say=said.append, pause=no_pause)
    back.mkdir()
    assert_same(ckpt.load(fetch(store, found, back, pause=no_pause), verify=True), ckpt.load(path), but=set())
    return said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*BROKEN, "dribbled"])
def test_a_request_that_breaks_twice_costs_nothing(tmp_path, proxy, name, kind):
    due = Due(kind, BROKEN.get(name, dribbled), times=2)
    proxy.faults.extend([due] * 10_000)
    assert copied_and_back(tmp_path) == []
    assert due.broken == 2  # the control: such requests were made
    proxy.faults.clear()
    assert client(proxy.upstream).list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []


@pytest.mark.parametrize("fault", [stalled, stalled_at_once])
@pytest.mark.parametrize("kind", ["list", "write", "part", "read"])
def test_a_server_that_says_nothing_costs_nothing(tmp_path, proxy, kind, fault, monkeypatch):
    monkeypatch.setattr("s3fs.S3FileSystem.read_timeout", 5)  # seconds instead of 15
    due = Due(kind, fault, times=1)
    proxy.faults.extend([due] * 10_000)
    assert copied_and_back(tmp_path) == []
    assert due.broken == 1


def copied_at_once(run, saved, folder, *, step) -> None:
    """Submit a checkpoint and wait until it is mirrored, or is not."""
    run_mirror.copy_to_mirror(run, saved, folder, step=step)
    run.uploader.finish()


@pytest.mark.parametrize("name", STAYING)
def test_a_store_that_fails_midway_is_a_sentence_and_training_goes_on(tmp_path, proxy, name, monkeypatch):
    """From the second checkpoint on, and until the run has ended; the same command copies then what is missing.

    The lease is given back, since the process that held it lives on here.
    """
    (whole := tmp_path / "whole").mkdir()
    assert train(whole, **SMALL)[0] == 0
    monkeypatch.setattr(run_checkpoints, "copy_to_mirror", copied_at_once)  # so that none is passed over
    variables = SMALL | {"CHECKPOINT_MIRROR": ADDRESS, "CHECKPOINT_ASYNC": "false", "MIRROR_KEEP_LAST": "0"}
    fault, word = STAYING[name]
    written: list[bool] = []
    begun: list[bool] = []

    def later(request: Proxy) -> bool:
        if not begun and request.path.endswith("latest.json"):
            begun.extend(
                written if request.command == "HEAD" else []
            )  # the last request of the first checkpoint passes
            written.extend([True] if request.command == "PUT" else [])
            return False
        return bool(begun) and "lease" not in request.path and fault(request)

    proxy.faults.extend([later] * 100_000)
    code, said = train(tmp_path, **variables)
    assert code == 8, said
    sentences = [line for line in said.splitlines() if "mirror: " in line and "copied to" not in line]
    assert len(sentences) == 1, said
    assert word in sentences[0]
    assert "training continues" in sentences[0]
    assert "1 checkpoint not yet mirrored" in said
    assert "hidden-secret" not in said
    assert tensor_bytes(newest(tmp_path)) == tensor_bytes(newest(whole))
    proxy.faults.clear()
    assert [each.found.step for each in taken(opened(ADDRESS))] == [2]
    code, said = train(tmp_path, **variables, RESUME="auto")
    assert (code, halves(opened(ADDRESS))) == (0, []), said
    assert max(steps(taken(opened(ADDRESS)))) == 6
    proxy.seen.clear()
    assert train(tmp_path, **variables, RESUME="auto")[0] == 0
    assert not any(command in ("PUT", "POST") for command, _ in proxy.seen)  # nothing is copied twice


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_is_brought_back_whatever_request_breaks(tmp_path, proxy, name):
    """Each kind of request twice, where a fresh machine resumes."""
    variables = SMALL | {"CHECKPOINT_MIRROR": ADDRESS}
    assert train(tmp_path, **variables)[0] == 0
    whole = tensor_bytes(newest(tmp_path))
    lose(tmp_path)
    every = {kind: Due(kind, BROKEN[name], times=2) for kind in ("list", "read", "size", "write")}
    proxy.faults.extend([lambda request: any(due(request) for due in every.values())] * 10_000)
    code, said = train(tmp_path, **variables, RESUME="auto")
    assert (code, "from the mirror" in said) == (0, True), said
    assert {kind: due.broken for kind, due in every.items()} == dict.fromkeys(every, 2)
    assert tensor_bytes(newest(tmp_path)) == whole


# ---------------------------------------------------------------------------------------------------------------------
# Refused before the first step.


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_bucket_that_is_missing_is_refused_before_the_first_step(tmp_path, proxy, resume):
    code, said = train(tmp_path, **SMALL, CHECKPOINT_MIRROR="s3://nowhere/run", RESUME=resume)
    assert code == 2
    assert said.count("no bucket nowhere") == 1
    assert list((tmp_path / "checkpoints").glob("checkpoint*")) == []


@pytest.mark.parametrize("kind", ["list", "write"])
def test_a_bucket_that_may_not_be_read_or_written_is_refused_before_the_first_step(tmp_path, proxy, kind):
    proxy.faults.extend([Due(kind, DENIED)] * 100)
    code, said = train(tmp_path, **SMALL, CHECKPOINT_MIRROR=ADDRESS)
    assert code == 2
    assert said.count("access is refused") == 1
    assert "hidden-secret" not in said
    assert list((tmp_path / "checkpoints").glob("checkpoint*")) == []


def test_rights_in_a_part_of_a_bucket_are_enough(tmp_path, proxy):
    """The bucket itself may not be asked for, and nothing lies below the address yet."""
    denied: list[str] = []

    def of_the_bucket(request: Proxy) -> bool:
        if request.command != "HEAD" or request.path.rstrip("/") != f"/{BUCKET}":
            return False
        denied.append(request.path)
        return DENIED(request)

    proxy.faults.extend([of_the_bucket] * 10)
    assert opened(ADDRESS).names() == []
    assert len(denied) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The lease, and parts.


def overwriting(request: Proxy) -> bool:
    """Let a server be one that knows no conditional writes."""
    del request.headers["If-None-Match"]
    return False


def test_a_lease_is_had_without_conditional_writes_too(proxy):
    proxy.faults.extend([overwriting] * 30)
    own = Lease(opened(ADDRESS), "one", say=print)
    with holding(own):
        assert not own.exclusive
        with pytest.raises(RunHeldElsewhereError):
            Lease(opened(ADDRESS), "one", say=print).hold()


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


@pytest.mark.parametrize("name", BROKEN)
def test_a_lease_is_given_back_though_the_request_breaks_once(proxy, name):
    own = Lease(opened(ADDRESS), "one", say=print)
    own.hold()
    proxy.faults.append(BROKEN[name])
    own.release()
    with holding(Lease(opened(ADDRESS), "one", say=print, host="another", pause=pytest.fail)):
        pass  # without waiting for the first one to be found dead


@pytest.mark.parametrize("fault", [None, "reset", "500"])
def test_a_bounded_upload_in_parts_arrives_as_it_was(tmp_path, proxy, fault):
    """Twelve million bytes in parts of five, one of which breaks, and a rate that no computer reaches."""
    content, due = os.urandom(12 * 10**6), Due("part", BROKEN.get(fault or "", lambda _: False), times=1)
    (tmp_path / "large").write_bytes(content)
    store, sent = opened(ADDRESS), []
    proxy.faults.extend([due] * 30)
    attempted(lambda: store.put("large", tmp_path / "large", moved=sent.append, piece=2**20), pause=no_pause)
    assert (store.read("large", limit=2**30) == content, due.broken) == (True, 1)
    assert sum(sent) >= len(content)
    assert max(sent) <= 2**20
    assert sum(1 for command, path in proxy.seen if command == "PUT" and "partNumber" in path) >= 3
    if fault is None:
        store.put("small", b"abc", piece=2)
        assert store.read("small", limit=10) == b"abc"


def test_of_a_large_file_only_the_part_that_broke_is_sent_again(tmp_path, proxy, monkeypatch):
    """By botocore's own attempts, which are what they are by default."""
    monkeypatch.delitem(OPTIONS["s3"], "config_kwargs")
    (tmp_path / "large").write_bytes(content := os.urandom(12 * 10**6))
    store, due = opened(ADDRESS), Due("part", BROKEN["500"], after=1, times=1)
    proxy.faults.extend([due] * 30)
    store.put("large", tmp_path / "large", piece=2**20)
    assert (store.read("large", limit=2**30) == content, due.broken) == (True, 1)
    parts = [path.partition("partNumber=")[2][0] for command, path in proxy.seen if "partNumber=" in path]
    assert sorted(parts) == ["1", "2", "2", "3"]
