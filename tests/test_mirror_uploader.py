"""The thread that copies checkpoints: faults of the store, attempts, and who waits for whom."""

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mirrors import (
    SECRETS,
    Faulty,
    halves,
    in_folder,
    in_memory,
    known,
    saves_of,
    send,
    steps,
    uploader,
)
from records import save
from work import HANGING

from milepost import ckpt
from milepost.mirror import Store, StoreError, Uploader
from milepost.mirror.retrying import ATTEMPTS, LONGEST_PAUSE, attempted, pauses
from milepost.mirror.uploading import look_up
from milepost.run_mirror import behind_mirror

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
    assert behind_mirror(SimpleNamespace(uploader=copies)) == "2"
    released.set()
    assert copies.finish() == 0
    assert behind_mirror(SimpleNamespace(uploader=copies)) == behind_mirror(SimpleNamespace(uploader=None)) == ""
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


def test_a_checkpoint_that_its_owner_deleted_is_told(tmp_path):
    store, folder = in_memory(), tmp_path / "checkpoints"
    copies, said = uploader(known(store, tmp_path))
    path = save(folder, 1)
    path.unlink()
    copies.submit(path, folder, step=1)
    assert (copies.finish(), copies.skipped) == (1, 0)
    assert said == [f"mirror: step 1 is not mirrored ({path}: was deleted before it was copied); training continues"]


def test_one_of_best_that_is_gone_is_passed_over(tmp_path, monkeypatch):
    store, folder = in_memory(), tmp_path / "checkpoints"
    copies, said = uploader(known(store, tmp_path))
    monkeypatch.setattr("milepost.mirror.uploader.bests_to_upload", lambda *_, **__: [folder / "best" / "gone.pt"])
    copies.submit(save(folder, 1), folder, step=1)
    assert (copies.finish(), said, copies.skipped) == (0, [], 1)
    assert steps(saves_of(store)) == [1]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_name_in_best_that_is_none_on_every_system_is_told_and_the_others_are_copied(tmp_path):
    store, folder = in_memory(), tmp_path / "checkpoints"
    mirrored = known(store, tmp_path)
    copies, said = uploader(mirrored, keep_last=2)
    (folder / "best").mkdir(parents=True)
    save(folder, 1).rename(folder / "best" / "keep: 3.4.pt")
    for step in (2, 3):
        copies.submit(save(folder, step), folder, step=step)
        assert copies.finish() == 0
    (line,) = said
    assert "keep: 3.4.pt is not mirrored" in line
    assert "'best/keep: 3.4.pt' is no name on every system: rename it" in line
    assert steps(saves_of(store)) == [3, 2]
    assert look_up(known(store, tmp_path)) == []


def test_files_of_the_run_stay_as_a_manifest_that_arrived_unheard_of_names_them(tmp_path):
    """The manifest arrives and latest.json does not; the next attempt finds grown files, and ends before its own manifest."""
    store, folder = in_folder(tmp_path / "mirror"), tmp_path / "checkpoints"
    mirrored, path = known(store, tmp_path), save(folder, 1)
    metrics, put = mirrored.run_folder / "metrics.jsonl", Store.put
    for fails in ("latest.json", "manifest.json"):
        with metrics.open("a") as file:
            file.write("line\n")

        def broken(store: Store, name: str, source: Path | bytes, *, fails: str = fails, **more: Any) -> None:
            if name.endswith(fails):
                raise StoreError(name, "503", "passing")
            put(store, name, source, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "put", broken)
            with pytest.raises(StoreError):
                send(mirrored, path, folder)
    assert steps(saves_of(store)) == [1]
    assert halves(store) == []
    send(mirrored, path, folder)
    assert halves(store) == []
    (saved,) = saves_of(store)
    assert store.read(saved.run_parts[0].object, limit=100) == b"line\n"


def test_what_is_being_copied_is_not_pruned_here(tmp_path):
    folder = tmp_path / "checkpoints"
    paths = [save(folder, step) for step in (1, 2, 3)]
    policy = {"run_id": "one", "keep_last": 1, "keep_every": 0, "latest_valid": paths[2]}
    gone = ckpt.prune(folder, **policy, spare={paths[0]})
    assert [found.path for found in gone.remove] == [paths[1]]
    assert [found.path for found in ckpt.prune(folder, **policy).remove] == [paths[0]]
