"""Killed at any moment, the newest complete checkpoint opens: at random times, and at every single call that changes the disk."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from drive import tensor_bytes
from saver import of_step

import ckpt

KILLS = 60
Said = list[tuple[str, ...]]
Command = Callable[..., Said]


@pytest.fixture(scope="module")
def saver() -> Iterator[Command]:
    """Gives tests/saver.py a command and returns what its children said; kills the first after `seconds` if they are given."""
    script = Path(__file__).with_name("saver.py")
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def command(line: str, *, seconds: float | None = None) -> Said:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            said = [tuple(process.stdout.readline().split())]
            if seconds is not None:
                time.sleep(seconds)  # not to wait for anything: the moment is to be no particular one
                os.kill(int(said[0][1]), signal.SIGKILL)
            while said[-1][0] != "ended":
                said.append(tuple(process.stdout.readline().split()))
            return said

        yield command
        process.stdin.close()


def last(said: Said, word: str, default: int = 0) -> int:
    """The highest step of which a child said `word`."""
    return max((int(words[1]) for words in said if words[0] == word), default=default)


def assert_whole(folder: Path) -> list[int]:
    """Everything visible opens and is bit for bit what was saved; returns the steps, oldest save first."""
    found = ckpt.find(folder)
    assert [one.problem for one in found if one.problem] == []
    visible = [path for place in (folder, folder / "best") if place.is_dir() for path in place.glob("[!.]*.pt")]
    for path in visible:
        one = ckpt.load(path, verify=True)
        assert tensor_bytes(one) == tensor_bytes(of_step(one.step))
    return [one.step for one in found]


def assert_next_save_clears_up(folder: Path, step: int) -> None:
    ckpt.save(of_step(step), folder)
    assert list(folder.rglob(".tmp-*")) == []
    newest = ckpt.latest(ckpt.find(folder))
    assert newest is not None
    assert newest.step == step


def keep_two(folder: Path) -> None:
    """So that a save of the loop stays as quick as the first."""
    for path in [one.path for one in ckpt.find(folder)][:-2]:
        path.unlink()


def test_killed_at_random_times_nothing_that_was_saved_is_lost(saver, tmp_path):
    first, saves, leftovers, draw = 1, 0, 0, random.Random(4)
    for _ in range(KILLS):
        said = saver(f"loop {tmp_path} {first}", seconds=draw.uniform(0.002, 0.040))
        assert said[-1] == ("ended", str(int(signal.SIGKILL)))
        steps, kept = assert_whole(tmp_path), last(said, "kept")
        newest, done = max(steps, default=0), max(last(said, "saved", first - 1), kept)
        assert done <= newest <= done + 1  # what was said to be saved is there, and at most one more
        if kept:
            best = ckpt.best(ckpt.find(tmp_path))
            assert best is not None
            assert best.step >= kept
            assert max(one.step for one in ckpt.find(tmp_path / "best")) >= kept
        leftovers += len(list(tmp_path.rglob(".tmp-*")))
        saves += newest - first + 1
        assert_next_save_clears_up(tmp_path, newest + 1)
        keep_two(tmp_path)
        first = newest + 2
    assert saves >= 10  # the children did save,
    assert leftovers >= 3  # and some were killed in the middle of it


def test_control_a_file_that_is_written_in_place_is_lost(saver, tmp_path):
    """Negative control: the same kills destroy the only checkpoint of a plain torch.save."""
    path, draw = tmp_path / "only.pt", random.Random(4)
    for _ in range(KILLS):
        torch.save(of_step(1).model_state, path)
        saver(f"plain {path}", seconds=draw.uniform(0.002, 0.040))
        try:
            torch.load(path, weights_only=True)
        except Exception:
            return
    pytest.fail(f"{KILLS} kills did not harm a file that is written in place: the kills come at the wrong time")


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    """A folder with step 1, which is also the best."""
    folder = tmp_path_factory.mktemp("before")
    ckpt.keep_best(of_step(1), folder, saved=ckpt.save(of_step(1), folder))
    return folder


def test_killed_at_every_call_that_changes_the_disk_the_old_or_the_new_state_is_there(saver, before, tmp_path):
    """SQLite's way: the n-th call, for n = 0, 1, 2, ... until nothing is left to be killed at."""
    seen = set()
    for number in range(1000):
        folder = tmp_path / str(number)
        shutil.copytree(before, folder)
        said = saver(f"nth {folder} {number}")
        steps = assert_whole(folder)
        newest, done = steps[-1], max(1, last(said, "saved"), last(said, "kept"))
        assert done <= newest <= min(done + 1, 3)
        assert 1 in steps
        bests = [one.step for one in ckpt.find(folder / "best")]
        assert max(bests) in (newest, newest - 1)  # there is a best at any moment
        seen.add((newest, max(bests)))
        assert_next_save_clears_up(folder, 4)
        shutil.rmtree(folder)
        if ("untouched",) in said:
            break
    assert number > 80
    assert seen == {(1, 1), (2, 1), (2, 2), (3, 3)}  # step 3 is saved under best/ at once


def test_two_processes_that_save_into_one_folder_harm_nothing(saver, tmp_path):
    times = 12
    said = saver(f"many {tmp_path} a {times} | many {tmp_path} b {times}")
    assert said[-1] == ("ended", "0", "0")
    found = ckpt.find(tmp_path)
    assert [one.metadata["save_number"] for one in found] == sorted({one.metadata["save_number"] for one in found})
    for run_id in ("a", "b"):
        steps = [one.step for one in found if one.metadata["run_id"] == run_id]
        assert steps == [step for step in range(1, times + 1) if step % 3 or step == times]
        bests = [one.step for one in ckpt.find(tmp_path / "best") if one.metadata["run_id"] == run_id]
        assert bests == [times]
    assert assert_whole(tmp_path)
    assert list(tmp_path.rglob(".tmp-*")) == []
