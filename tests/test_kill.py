"""Killed at any moment, the newest complete checkpoint opens: at random times,
and at every single call that changes the disk.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

import programs
import pytest
import torch
from folders import in_best, make_before, next_save_clears_up, steps_of, tidy, whole
from saver import EVERY, KEEP_EVERY, KEEP_LAST, of_step

from milepost import ckpt

KILLS = 60  # of each layout, half of them while it saves in the background
MOST = 50  # times as many, until enough of them have come at a good time
SOAK_KILLS = 10_000  # of all layouts
HISTORY = 12  # kills that one folder goes through
MODES = ("blocking", "background")
Said = list[tuple[str, ...]]
Command = Callable[..., Said]


@pytest.fixture(scope="module")
def saver() -> Iterator[Command]:
    """Send tests/saver.py a command and return what its children printed; kill the first after `seconds` if given."""
    script = Path(__file__).with_name("saver.py")
    with programs.start([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
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
    """Return the highest step that a child reported with `word`."""
    return max((int(words[1]) for words in said if words[0] == word), default=default)


# ---------------------------------------------------------------------------------------------------------------------
# At random times.


@dataclass
class History:
    """The expected content of a folder: the steps of regular saves, the retained best, and counts which show that the
    kills were well timed.
    """

    ordinary: list[int] = field(default_factory=list)
    best: int = 0
    saves: int = 0
    leftovers: int = 0

    def kept(self, newest: int) -> set[int]:
        """The ordinary saves up to `newest` that the policy keeps."""
        own = [step for step in self.ordinary if step <= newest]
        return set(own[-KEEP_LAST:]) | {step for step in own if step % KEEP_EVERY == 0}


def killed_once(saver: Command, folder: Path, layout: str, mode: str, history: History, seconds: float) -> None:
    """One child that saves until it is killed, and then everything that must hold."""
    first = max(history.ordinary, default=0) + 1
    said = saver(f"loop {quote(str(folder))} {layout} {mode} {first}", seconds=seconds)
    assert said[-1] == ("ended", str(int(signal.SIGKILL)))
    found = whole(folder)
    newest = max((one.step for one in found), default=0)
    done = max(last(said, "saved", first - 1), last(said, "kept"))
    assert done <= newest <= done + 1  # what was said to be saved is there, and at most one more
    history.ordinary += [step for step in range(first, newest + 1) if step % EVERY]
    ordinary, pruned = set(steps_of(found, best=False)), last(said, "pruned")
    assert history.kept(newest) <= ordinary <= set(history.ordinary)
    if pruned:
        assert {step for step in ordinary if step <= pruned} <= history.kept(pruned)
    history.best = last(said, "kept", history.best)
    assert max(steps_of(found, best=True), default=0) >= history.best  # there is a best at any moment
    best = ckpt.best(ckpt.find(folder))
    assert (best.step if best else 0) >= history.best
    history.saves += newest - first + 1
    history.leftovers += len(list(folder.rglob(".tmp-*")))
    next_save_clears_up(folder, layout, newest + 1)
    history.ordinary.append(newest + 1)


def killed_often(saver: Command, folder: Path, layout: str, *, kills: int, seed: int) -> tuple[int, int]:
    """Return how many saves so many kills let through, and how many hidden names they left. There are more kills, and
    the children live longer, until enough have saved and enough were killed while they saved: a moment is drawn, and
    says nothing of a machine's speed."""
    draw, saves, leftovers, longest = random.Random(seed), 0, 0, time_of_two_steps(saver, folder / "timed", layout)
    done = 0
    while done < kills or (done < MOST * kills and (saves < kills / 6 or leftovers < kills / 20)):
        place, history = folder / "history", History()
        place.mkdir(parents=True)
        for number in range(done, done + HISTORY):
            killed_once(saver, place, layout, MODES[number % 2], history, draw.uniform(0.0, longest))
        shutil.rmtree(place)
        done, saves, leftovers = done + HISTORY, saves + history.saves, leftovers + history.leftovers
        longest *= 1.5 if saves < done / 6 else 1
    return saves, leftovers


def time_of_two_steps(saver: Command, folder: Path, layout: str) -> float:
    """Return seconds within which kills hit a save, on a slow computer too: the best of three, against hiccups."""
    times = []
    for name in ("first", "second", "third"):
        make_before(folder / name, layout)
        start = time.monotonic()
        assert ("untouched",) in saver(f"nth {quote(str(folder / name))} {layout} blocking 1000000")
        times.append(time.monotonic() - start)
    return min(times)


@pytest.mark.parametrize("layout", ckpt.WRITERS)
def test_killed_at_random_times_nothing_that_was_saved_is_lost(layout, saver, tmp_path):
    saves, leftovers = killed_often(saver, tmp_path, layout, kills=KILLS, seed=4)
    assert saves >= 10  # the children did save,
    assert leftovers >= 3  # and some were killed in the middle of it


@pytest.mark.soak
@pytest.mark.parametrize("layout", ckpt.WRITERS)
def test_killed_ten_thousand_times_nothing_that_was_saved_is_lost(layout, saver, tmp_path):
    kills = -(-SOAK_KILLS // len(ckpt.WRITERS))
    saves, leftovers = killed_often(saver, tmp_path, layout, kills=kills, seed=5)
    print(f"{layout}: {kills} kills, {saves} saves, {leftovers} hidden names left behind and cleared, 0 lost")
    assert saves >= kills / 6
    assert leftovers >= kills / 20


def test_control_a_file_that_is_written_in_place_is_lost(saver, tmp_path):
    """Negative control: the same kills destroy the only checkpoint of a plain torch.save."""
    path, draw, longest = tmp_path / "only.pt", random.Random(4), 0.040
    for _ in range(KILLS):
        torch.save(of_step(1).model_state, path)
        saver(f"plain {quote(str(path))}", seconds=draw.uniform(0.0, longest))
        longest *= 1.1  # a slow machine takes longer until it writes
        try:
            torch.load(path, weights_only=True)
        except Exception:
            return
    pytest.fail(f"{KILLS} kills did not harm a file that is written in place: the kills come at the wrong time")


# ---------------------------------------------------------------------------------------------------------------------
# At every call.


def killed_at(saver: Command, folder: Path, layout: str, mode: str, number: int) -> tuple[Said, tuple[int, int]]:
    """Return what the child killed at its n-th call printed, and the latest and the best step after it."""
    said = saver(f"nth {quote(str(folder))} {layout} {mode} {number}")
    found = whole(folder)
    ordinary, best = steps_of(found, best=False), max(steps_of(found, best=True))
    newest, done = max(*ordinary, best), max(2, last(said, "saved"), last(said, "kept"))
    assert done <= newest <= {2: 4, 4: 6, 6: 6}[done]
    assert best >= last(said, "kept", 2)  # there is a best at any moment
    assert 2 in ordinary  # which the policy keeps, though only to generate from
    assert 1 in ordinary or last(said, "kept") >= 4
    if last(said, "pruned"):
        assert set(ordinary) == {2, 4}
        assert [one.resumable for one in found if one.step == 2 and not in_best(one)] == [False]
    next_save_clears_up(folder, layout, 7)
    return said, (newest, best)


def killed_at_every_call(saver: Command, folder: Path, layout: str, mode: str) -> None:
    """SQLite's way: the n-th call, for n = 0, 1, 2, ... until nothing is left to be killed at."""
    make_before(folder / "before", layout)
    seen = set()
    for number in range(1000):
        shutil.copytree(folder / "before", folder / "now")
        said, state = killed_at(saver, folder / "now", layout, mode, number)
        seen.add(state)
        shutil.rmtree(folder / "now")
        if ("untouched",) in said:
            break
    assert number > 30
    assert seen == {(2, 2), (4, 2), (4, 4), (6, 6)}  # step 6 is saved under best/ at once


@pytest.mark.parametrize("layout", ckpt.WRITERS)
def test_killed_at_every_call_that_changes_the_disk_the_old_or_the_new_state_is_there(layout, saver, tmp_path):
    killed_at_every_call(saver, tmp_path, layout, "blocking")


@pytest.mark.soak
@pytest.mark.parametrize("layout", ckpt.WRITERS)
def test_killed_at_every_call_of_a_save_in_the_background(layout, saver, tmp_path):
    killed_at_every_call(saver, tmp_path, layout, "background")


# ---------------------------------------------------------------------------------------------------------------------
# Two at once.


@pytest.mark.parametrize("layout", ckpt.WRITERS)
def test_two_processes_that_save_into_one_folder_harm_nothing(layout, saver, tmp_path):
    times = 8
    said = saver(f"many {quote(str(tmp_path))} {layout} a {times} | many {quote(str(tmp_path))} {layout} b {times}")
    assert said[-1] == ("ended", "0", "0")
    found = whole(tmp_path)
    numbers = [one.metadata["save_number"] for one in ckpt.find(tmp_path)]
    assert numbers == sorted(set(numbers))
    for run_id in ("a", "b"):
        own = [one for one in found if one.run_id == run_id]
        assert steps_of(own, best=False) == [4, 7, 8]
        assert steps_of(own, best=True) == [8]
    tidy(tmp_path)
