"""Real disks that stop taking writes while a run trains: a quota that is used up, an ext4 that turns read-only after an error."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from drive import newest, tensor_bytes, train
from mounts import MOUNTS, break_ext4, limit, missing
from test_last_save import await_save
from test_last_step import trained

from milepost import ckpt, files, run_checkpoints
from milepost.runtime.progress import read_metrics

pytestmark = pytest.mark.mounted


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(folder)[0] == 0
    return folder


@pytest.fixture(autouse=True)
def forgetting() -> Iterator[None]:
    """Another file system gets the device number of an earlier one."""
    files.forget()
    yield
    files.forget()


def steps_logged(runs: Path) -> list[int]:
    (path,) = runs.glob("*/metrics.jsonl")
    return [line["step"] for line in read_metrics(path) if line["split"] == "train"]


def whole(folder: Path) -> dict[int, list[str]]:
    """Return what `verify` finds in each checkpoint of a folder, by step."""
    ckpt.index._last_listing.cache_clear()
    return {each.step: ckpt.verify(each.path) for each in ckpt.find(folder) if each.path.parent.name != "best"}


def broken(place: Path) -> None:
    await_save()
    break_ext4(place)


@pytest.mark.parametrize("layout", ["unified", "separated", "directory"])
def test_a_quota_that_is_used_up_while_training_costs_nothing_once_it_is_raised(
    layout, uninterrupted, tmp_path, monkeypatch
):
    if packages := missing("btrfs with a quota"):
        pytest.skip(f"needs {packages}")
    with MOUNTS["btrfs with a quota"](tmp_path / "fs") as part:
        pauses: list[float] = []

        def lower() -> None:
            await_save()
            limit(part, "16K")

        def raise_quota(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                limit(part, "none")

        monkeypatch.setattr(run_checkpoints.time, "sleep", raise_quota)
        (tmp_path / "checkpoints").symlink_to(part)
        code, said = trained(tmp_path, {6: lower}, CHECKPOINT_LAYOUT=layout)
        assert code == 0, said
        assert pauses == list(run_checkpoints.PAUSES[:2])
        assert said.count("the disk quota is used up") == 2
        assert whole(part) == {4: [], 8: []}
        assert [path.name for path in part.rglob(".tmp-*")] == []
        assert tensor_bytes(newest(tmp_path)) == tensor_bytes(newest(uninterrupted))


@pytest.mark.parametrize("layout", ["unified", "directory"])
def test_an_ext4_that_turns_read_only_keeps_what_it_has_and_another_disk_in_its_place_gets_the_rest(
    layout, uninterrupted, tmp_path, monkeypatch
):
    with MOUNTS["ext4, read-only after an error"](tmp_path / "fs") as place:
        pauses: list[float] = []

        def mount_another(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True)

        monkeypatch.setattr(run_checkpoints.time, "sleep", mount_another)
        places = {"CHECKPOINT_DIR": str(place / "checkpoints"), "RUNS_DIR": str(place / "runs")}
        code, said = trained(tmp_path, {6: lambda: broken(place)}, CHECKPOINT_LAYOUT=layout, **places)
        assert code == 0, said
        assert said.count("is read-only now") == 2
        assert whole(place / "checkpoints") == {8: []}
        last = ckpt.latest(ckpt.find(place / "checkpoints"))
        assert last is not None
        assert tensor_bytes(ckpt.load(last.path, verify=True)) == tensor_bytes(newest(uninterrupted))
        assert steps_logged(place / "runs") == [6, 7, 8]
        subprocess.run(["umount", "-l", str(place)], check=True)
        assert whole(place / "checkpoints") == {4: []}
        assert steps_logged(place / "runs") == [1, 2, 3, 4, 5]


def test_a_disk_that_stays_read_only_is_a_failed_save_and_the_lines_that_are_lost_are_counted(tmp_path, monkeypatch):
    with MOUNTS["ext4, read-only after an error"](tmp_path / "fs") as place:
        pauses: list[float] = []
        monkeypatch.setattr(run_checkpoints.time, "sleep", pauses.append)
        places = {"CHECKPOINT_DIR": str(place / "checkpoints"), "RUNS_DIR": str(place / "runs")}
        code, said = trained(tmp_path, {6: lambda: broken(place)}, **places)
        assert code == 5, said
        assert pauses == list(run_checkpoints.PAUSES)
        assert "metrics.jsonl lacks 4 lines" in said  # of steps 6, 7 and 8, and of the evaluation
        assert whole(place / "checkpoints") == {4: []}
