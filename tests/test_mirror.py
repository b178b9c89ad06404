"""The mirror: what is copied, in which order, what a reader takes, what is deleted there, and faults of the store."""

import dataclasses
import errno
import json
import os
import shutil
import threading
from pathlib import Path

import mirrors
import pytest
from drive import logged, newest, tensor_bytes, train
from mirrors import Faulty, halves, in_folder, in_memory, known, manifests, send
from records import assert_same, record, save
from work import HANGING

from milepost import ckpt, config
from milepost.ckpt import CheckpointError
from milepost.config import ConfigError
from milepost.mirror import (
    Mirrored,
    Store,
    StoreError,
    Uploader,
    contents,
    fetch,
    fetch_bests,
    fetch_run,
    readable,
    runs_in,
)
from milepost.mirror.contents import Part, Save, expired, objects_to_delete
from milepost.mirror.retrying import ATTEMPTS, LONGEST_PAUSE, attempted, pauses
from milepost.mirror.uploading import look_up, prune

SECRETS = ("pass-word", "a-secret")


def no_pause(seconds: float) -> None:
    """Another attempt follows at once."""


def saves_of(store: Store, run_id: str = mirrors.RUN) -> list[Save]:
    return list(readable(store, runs_in(store, pause=no_pause).get(run_id, []), say=print, pause=no_pause))


def uploader(mirrored: Mirrored, *, keep_last: int = 0) -> tuple[Uploader, list[str]]:
    said: list[str] = []
    return Uploader(mirrored, keep_last=keep_last, say=said.append, pause=no_pause), said


# ---------------------------------------------------------------------------------------------------------------------
# There and back.


@pytest.mark.parametrize("layout", ckpt.WRITERS)
@pytest.mark.parametrize("place", [in_folder, lambda _: in_memory()], ids=["file", "memory"])
def test_every_layout_comes_back_as_it_was(tmp_path, layout, place):
    store, folder = place(tmp_path / "mirror"), tmp_path / "checkpoints"
    path = save(folder, 3, layout=layout)
    saved = send(known(store, tmp_path), path, folder)
    original, again = ckpt.load(path, verify=True), tmp_path / "again"
    again.mkdir()
    (found,) = saves_of(store)
    assert found == saved
    back = fetch(store, found, again, pause=no_pause)
    assert back.relative_to(again) == path.relative_to(folder)
    assert_same(ckpt.load(back, verify=True), original, but=set())
    assert [each.name for each in again.rglob(".tmp-*")] == []


def test_the_manifest_comes_after_all_that_it_names(tmp_path):
    store = in_memory(fs := Faulty())
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "metrics.jsonl").write_text('{"step": 1}\n')
    saved = send(known(store, tmp_path), save(tmp_path / "checkpoints", 1), tmp_path / "checkpoints")
    names = [name.removeprefix("/mirror/") for name in fs.written]
    assert names == [*(part.object for part in saved.parts), saved.manifest, contents.LATEST]
    assert [part.place for part in saved.run_parts] == ["run/metrics.jsonl"]


def test_files_of_the_run_are_sent_again_only_if_they_changed(tmp_path):
    mirrored, folder = known(in_memory(fs := Faulty()), tmp_path), tmp_path / "checkpoints"
    metrics, log = mirrored.run_folder / "metrics.jsonl", mirrored.run_folder / "training.log"
    metrics.write_text("1\n")
    log.write_text("begun\n")
    send(mirrored, save(folder, 1), folder)
    metrics.write_text("1\n2\n")
    fs.written.clear()
    second = send(mirrored, save(folder, 2), folder)
    assert [name.rpartition("/")[2] for name in fs.written if "/run/" in name] == ["metrics.jsonl"]
    fetch_run(mirrored.store, second, tmp_path / "back", say=print, pause=no_pause)
    assert (tmp_path / "back" / "metrics.jsonl").read_text() == "1\n2\n"
    assert (tmp_path / "back" / "training.log").read_text() == "begun\n"


def test_lines_that_are_here_and_not_in_the_mirror_stay(tmp_path):
    mirrored, folder = known(in_memory(), tmp_path), tmp_path / "checkpoints"
    (mirrored.run_folder / "metrics.jsonl").write_text("1\n2\n")
    (mirrored.run_folder / "training.log").write_text("begun\nsaved\n")
    saved = send(mirrored, save(folder, 1), folder)
    (mirrored.run_folder / "metrics.jsonl").write_text("1\n2\n3\n")
    (mirrored.run_folder / "training.log").write_text("begun\n")
    fetch_run(mirrored.store, saved, mirrored.run_folder, say=print, pause=no_pause)
    assert (mirrored.run_folder / "metrics.jsonl").read_text() == "1\n2\n3\n"
    assert (mirrored.run_folder / "training.log").read_text() == "begun\nsaved\n"


def test_best_checkpoints_come_back_into_best(tmp_path):
    mirrored, folder = known(in_memory(), tmp_path), tmp_path / "checkpoints"
    folder.mkdir()
    best = ckpt.keep_best(record(1, validation_loss=1.0), folder, saved=save(folder, 1, validation_loss=1.0))
    later = save(folder, 2, validation_loss=2.0)
    send(mirrored, best, folder)
    saved = send(mirrored, later, folder)
    again = tmp_path / "again"
    fetch_bests(mirrored.store, saved, again, say=print, pause=no_pause)
    (found,) = ckpt.find(again)
    assert found.path.relative_to(again) == best.relative_to(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What a reader takes.


@pytest.fixture
def three(tmp_path) -> Mirrored:
    """A run with three checkpoints in a mirror that is a folder."""
    mirrored, folder = known(in_folder(tmp_path / "mirror"), tmp_path), tmp_path / "checkpoints"
    for step in (1, 2, 3):
        (mirrored.run_folder / "metrics.jsonl").write_text("line\n" * step)
        send(mirrored, save(folder, step), folder)
    return mirrored


def path_of(store: Store, name: str) -> Path:
    return Path(store.root) / name


def test_a_half_manifest_is_skipped_and_reported(three):
    first = path_of(three.store, manifests(three.store)[0])
    first.write_bytes(first.read_bytes()[:-50])
    said: list[str] = []
    left = list(readable(three.store, manifests(three.store), say=said.append, pause=no_pause))
    assert [each.found.step for each in left] == [2, 1]
    assert len(said) == 1
    assert str(first) in said[0]


@pytest.mark.parametrize("how", ["missing", "shorter", "altered"])
def test_a_damaged_checkpoint_is_not_revealed(three, tmp_path, how):
    newest_save = saves_of(three.store)[0]
    file = path_of(three.store, newest_save.checkpoint_parts[0].object)
    content = file.read_bytes()
    file.unlink()
    if how != "missing":
        file.write_bytes(
            content[:-1] if how == "shorter" else content[:500] + bytes([content[500] ^ 1]) + content[501:]
        )
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(CheckpointError) as caught:
        fetch(three.store, newest_save, again, pause=no_pause)
    assert caught.value.kind == "damaged"
    assert [each.name for each in again.iterdir() if each.name != ".lock"] == []


def test_a_store_that_lists_late_gives_the_newest(three, monkeypatch):
    names = three.store.names()
    late = [name for name in names if "/00000003-" not in name]
    monkeypatch.setattr(Store, "names", lambda store: list(late))
    assert [each.found.step for each in saves_of(three.store)] == [3, 2, 1]
    path_of(three.store, contents.LATEST).unlink()  # control: the listing alone
    assert [each.found.step for each in saves_of(three.store)] == [2, 1]


HOSTILE = [
    {"run_id": ".."}, {"run_id": "a/b"}, {"name": "../00000001-" + "0" * 16}, {"checkpoint": "/etc/passwd"},
    {"checkpoint": "a/../../b"}, {"bests": ["../x"]}, {"parts": []}, {"name": "00000009-" + "0" * 16}, {"metadata": []},
    {"more": 1},
]  # fmt: skip
HOSTILE_PARTS = [
    {"place": "checkpoints/../../x"}, {"place": "/x"}, {"place": "elsewhere/x"}, {"place": "run/a\\b"}, {"object": "two/x"},
    {"object": "one/../two"}, {"size": -1}, {"size": "1"}, {"sha256": None}, {"place": "run/c:x"},
]  # fmt: skip


@pytest.mark.parametrize("change", [*HOSTILE, *HOSTILE_PARTS], ids=str)
def test_a_manifest_that_leads_elsewhere_is_refused(three, change):
    """With a sha256 of its own that agrees."""
    values = json.loads(json.dumps(dataclasses.asdict(saves_of(three.store)[0])))
    if set(change) <= {"place", "object", "size", "sha256"}:
        values["parts"][0] |= change
    else:
        values |= change
    values = json.loads(json.dumps({"format": contents.FORMAT, **values}))
    content = json.dumps({**values, "sha256": contents._own_sum(values)}).encode()
    with pytest.raises(CheckpointError) as caught:
        contents.parsed(content, "here")
    assert caught.value.kind == "damaged"


def test_the_same_manifest_is_read_without_the_change(three):
    saved = saves_of(three.store)[0]
    assert contents.parsed(contents.as_bytes(saved), "here") == saved


# ---------------------------------------------------------------------------------------------------------------------
# Retention.


def of_step(step: int, *, bests: tuple[int, ...] = (), end: int = 100, best: bool = False) -> Save:
    own = {"save_number": step, "save_id": f"{step:016x}", "step": step, "hyperparameters": {"TRAINING_STEPS": end}}
    name = contents.save_name(own)
    parts = (Part(f"checkpoints/{step}.pt", f"one/{name}/{step}.pt", 1, ""), Part("run/log", "one/shared", 1, ""))
    names = tuple(of_step(each).name for each in bests)
    return Save("one", name, f"{'best/' * best}{step}.pt", "unified", own, names, parts)


def steps(saves: list[Save]) -> list[int]:
    return [each.found.step for each in saves]


def test_the_newest_the_best_the_final_and_the_needed_stay():
    saves = [of_step(1), of_step(2, best=True), of_step(3, end=3), of_step(4), of_step(5, bests=(2,)), of_step(6)]
    assert steps(expired(saves, keep_last=0)) == []
    assert steps(expired(saves, keep_last=1)) == [1, 2, 4, 5]
    assert steps(expired(saves, keep_last=2)) == [1, 4]
    assert steps(expired(saves, keep_last=2, needed=[of_step(4).name])) == [1]


def test_objects_that_others_name_stay_and_manifests_go_first():
    gone, kept = of_step(1), of_step(2)
    assert objects_to_delete([gone], [kept]) == [gone.manifest, gone.parts[0].object]
    assert objects_to_delete([gone], []) == [gone.manifest, gone.parts[0].object, "one/shared"]


def test_only_what_our_manifests_name_is_deleted(three, tmp_path):
    foreign = [f"one/{saves_of(three.store)[-1].name}/checkpoints/mine.pt", "one/notes.txt", "two/00000001-mine/x.json"]
    for name in foreign:
        path_of(three.store, name).parent.mkdir(parents=True, exist_ok=True)
        path_of(three.store, name).write_text("mine")
    assert steps(prune(three, tmp_path / "checkpoints", keep_last=1)) == [1, 2]
    assert set(foreign) <= set(three.store.names())
    assert halves(three.store) == []
    assert steps(saves_of(three.store)) == [3]


def test_nothing_is_deleted_while_a_manifest_cannot_be_read(three, tmp_path):
    fresh = known(three.store, tmp_path)
    look_up(fresh)
    torn = path_of(three.store, f"one/00000009-{'0' * 16}/manifest.json")
    torn.parent.mkdir(parents=True)
    torn.write_text("{")
    before = three.store.names()
    with pytest.raises(CheckpointError):
        prune(fresh, tmp_path / "checkpoints", keep_last=1)
    assert three.store.names() == before


def test_the_base_of_adapters_stays(three, tmp_path):
    folder = tmp_path / "checkpoints"
    (base,) = [each for each in ckpt.find(folder) if each.step == 1]
    uses = {"sha256": "0" * 64, "source": str(base.path), "step": 1}
    assert ckpt.note_use(uses, run_id="adapters", checkpoint_dir=tmp_path / "elsewhere")
    assert steps(prune(three, folder, keep_last=1)) == [2]


# ---------------------------------------------------------------------------------------------------------------------
# Faults of the store.

PASSING = [
    OSError(errno.EIO, "Internal Server Error"), ConnectionResetError("reset by peer"), TimeoutError("stalled"),
    OSError(errno.EBUSY, "SlowDown"), OSError(errno.ENOSPC, "No space left on device"), RuntimeError("of a library"),
]  # fmt: skip
REFUSED = [PermissionError("Access Denied"), FileNotFoundError("The specified bucket does not exist")]


def test_pauses_grow_are_bounded_and_differ_between_machines():
    longest, shortest = list(pauses(lambda: 1.0)), list(pauses(lambda: 0.0))
    assert len(longest) == ATTEMPTS - 1
    assert longest == sorted(longest)
    assert longest[-1] <= LONGEST_PAUSE
    assert all(short == long / 2 for short, long in zip(shortest, longest, strict=True))


@pytest.mark.parametrize(("kind", "asked"), [("passing", ATTEMPTS), ("refused", 1), ("missing", 1)])
def test_only_what_may_pass_is_tried_again(kind, asked):
    calls, waited = [], []

    def refuse() -> None:
        calls.append(1)
        raise StoreError("there", "no", kind)

    with pytest.raises(StoreError):
        attempted(refuse, pause=waited.append)
    assert (len(calls), len(waited)) == (asked, asked - 1)


@pytest.mark.parametrize("fault", PASSING, ids=repr)
@pytest.mark.parametrize("operation", [0, 1, 2, 3])
def test_a_fault_that_passes_costs_nothing(tmp_path, fault, operation):
    store, folder = in_memory(fs := Faulty()), tmp_path / "checkpoints"
    mirrored = known(store, tmp_path)
    (mirrored.run_folder / "metrics.jsonl").write_text("1\n")
    fs.faults.extend([None] * operation + [fault] * (ATTEMPTS - 1))
    copies, said = uploader(mirrored)
    copies.submit(save(folder, 1), folder, step=1)
    assert copies.finish() == 0
    assert (said, steps(saves_of(store)), halves(store)) == ([], [1], [])


@pytest.mark.parametrize("fault", [*PASSING, *REFUSED], ids=repr)
def test_a_fault_that_stays_is_reported_once_and_the_next_checkpoint_is_tried(tmp_path, fault):
    store, folder = in_memory(fs := Faulty()), tmp_path / "checkpoints"
    copies, said = uploader(known(store, tmp_path))
    for step in (1, 2):
        fs.faults.extend([fault] * ATTEMPTS)
        copies.submit(save(folder, step), folder, step=step)
        with copies._changed:  # until it has given up
            copies._changed.wait_for(lambda: copies._current is None and copies._waiting is None)
        fs.faults.clear()
    assert saves_of(store) == []
    assert len(said) == 1
    assert not any(secret in said[0] for secret in SECRETS)
    assert copies.finish() == 0  # the last one is tried once more at the end
    assert steps(saves_of(store)) == [2]
    assert copies.skipped == 1


def test_of_those_that_wait_only_the_newest_is_copied_and_training_never_waits(tmp_path):
    store, folder = in_memory(fs := Faulty()), tmp_path / "checkpoints"
    begun, released = threading.Event(), threading.Event()

    def stall(path: str) -> None:
        begun.set()
        released.wait(HANGING)

    fs.faults.append(stall)
    copies, _ = uploader(known(store, tmp_path))
    paths = [save(folder, step) for step in (1, 2, 3, 4)]
    for step, path in enumerate(paths, 1):
        copies.submit(path, folder, step=step)
        begun.wait(HANGING)
    assert copies.in_use() == {paths[0], paths[3]}
    released.set()
    assert copies.finish() == 0
    assert steps(saves_of(store)) == [4, 1]
    assert copies.skipped == 2


def test_the_end_gives_up_on_a_store_that_stalls(tmp_path):
    fs, released, now = Faulty(), threading.Event(), iter(range(0, 10**9, 500))
    fs.faults.append(lambda path: released.wait(HANGING))
    folder = tmp_path / "checkpoints"
    copies = Uploader(known(in_memory(fs), tmp_path), keep_last=0, say=print, clock=lambda: float(next(now)))
    copies.submit(save(folder, 1), folder, step=1)
    assert copies.finish() == 1
    released.set()


def test_a_checkpoint_that_its_owner_deleted_is_passed_over(tmp_path):
    store, folder = in_memory(), tmp_path / "checkpoints"
    copies, said = uploader(known(store, tmp_path))
    path = save(folder, 1)
    path.unlink()
    copies.submit(path, folder, step=1)
    assert (copies.finish(), said, copies.skipped) == (0, [], 1)


def test_what_is_being_copied_is_not_pruned_here(tmp_path):
    folder = tmp_path / "checkpoints"
    paths = [save(folder, step) for step in (1, 2, 3)]
    policy = {"run_id": "one", "keep_last": 1, "keep_every": 0, "latest_valid": paths[2]}
    gone = ckpt.prune(folder, **policy, spare={paths[0]})
    assert [found.path for found in gone.remove] == [paths[1]]
    assert [found.path for found in ckpt.prune(folder, **policy).remove] == [paths[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.

SMALL = {
    "MODEL_TYPE": "bigram", "N_LAYER": None, "N_HEAD": None, "N_EMBD": None, "DROPOUT": None, "TRAINING_STEPS": "6",
    "CHECKPOINT_INTERVAL": "2", "EVAL_INTERVAL": "2", "SAMPLE_INTERVAL": "4", "CHECKPOINT_KEEP_LAST": "1",
    "MIRROR_KEEP_LAST": "1",
}  # fmt: skip


def lose(folder: Path) -> None:
    """The disk is gone, the mirror is not."""
    for name in ("checkpoints", "runs"):
        shutil.rmtree(folder / name, ignore_errors=True)


def test_a_run_resumes_on_an_empty_disk_past_a_damaged_checkpoint(tmp_path):
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}", "MIRROR_KEEP_LAST": "0"}
    code, said = train(tmp_path, **variables)
    assert code == 0, said
    whole, lines = tensor_bytes(newest(tmp_path)), logged(tmp_path)
    store = in_folder(tmp_path / "mirror")
    last = saves_of(store, (run_id := os.listdir(tmp_path / "runs")[0]))[0]
    path_of(store, last.checkpoint_parts[0].object).write_bytes(b"damaged")
    lose(tmp_path)
    code, said = train(tmp_path, **variables, RESUME="auto")
    assert code == 0, said
    assert f"skipped: {store.shown}/{last.checkpoint_parts[0].object}" in said
    assert (tensor_bytes(newest(tmp_path)), logged(tmp_path)) == (whole, lines)
    assert os.listdir(tmp_path / "runs") == [run_id]
    assert halves(store) != []  # the damaged one is left for its owner to look at


def test_a_disk_that_is_as_new_as_the_mirror_reads_no_checkpoint_from_it(tmp_path):
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'my mirror'}"}
    assert train(tmp_path, **variables)[0] == 0
    code, said = train(tmp_path, **variables, RESUME="auto")
    assert code == 0
    assert "from the mirror" not in said


def test_another_model_in_the_mirror_is_left_there(tmp_path):
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}"}
    assert train(tmp_path, **variables)[0] == 0
    lose(tmp_path)
    code, said = train(tmp_path, **variables | {"BLOCK_SIZE": "8"}, RESUME="auto")
    assert code == 0
    assert "from the mirror" not in said
    assert {found.step for found in ckpt.find(tmp_path / "checkpoints")} == {6}


def test_a_mirror_that_refuses_neither_stops_training_nor_is_passed_over(tmp_path):
    (tmp_path / "file").write_text("in the way")
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'file' / 'mirror'}", "MIRROR_KEEP_LAST": "0"}
    code, said = train(tmp_path, **variables)
    assert code == 8
    assert "1 checkpoint not yet mirrored" in said
    assert newest(tmp_path).step == 6


def test_a_mirror_that_does_not_answer_starts_no_run_anew(tmp_path, monkeypatch):
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}"}
    assert train(tmp_path, **variables)[0] == 0

    def fail(store: Store) -> list[str]:
        raise StoreError("there", "down", "refused")

    monkeypatch.setattr(Store, "names", fail)
    code, said = train(tmp_path, **variables, RESUME="auto")  # the disk has it
    assert code == 0
    assert "warning: the mirror could not be read (there: down)" in said
    lose(tmp_path)
    assert train(tmp_path, **variables, RESUME="auto")[0] == 3
    assert not (tmp_path / "checkpoints").exists()


def test_secrets_of_an_address_are_stored_and_shown_nowhere():
    settings = config.read({"CHECKPOINT_MIRROR": "sftp://me:pass-word@host/mirror?token=a-secret"})
    assert config.public(settings, "CHECKPOINT_MIRROR") == "sftp://***@host/mirror?***"
    store = in_memory(fs := Faulty())
    fs.faults.append(PermissionError("me:pass-word@host refused token=a-secret"))
    with pytest.raises(StoreError) as caught:
        store.put("x", b"")
    assert not any(word in str(caught.value) for word in SECRETS)
    assert caught.value.kind == "refused"


@pytest.mark.parametrize(
    ("address", "named"), [("nowhere://bucket/run", "s3://"), ("gs://bucket/run", "gcsfs"), ("file:///", "folder")]
)
def test_an_address_that_cannot_be_a_mirror_is_refused_before_the_first_step(tmp_path, address, named):
    code, said = train(tmp_path, **SMALL | {"CHECKPOINT_MIRROR": address})
    assert code == 2
    assert named in said
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("value", ["bucket/run", "s3:/bucket", "s3://a b", "s3://a,b"])
def test_what_is_no_address_is_refused(value):
    with pytest.raises(ConfigError):
        config.read({"CHECKPOINT_MIRROR": value})
