"""Killed at any moment on mounted file systems that lack something: at random times, and at every call that changes the
disk. They take long: `make soak-filesystems`.
"""

import contextlib
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

import pytest
from folders import make_before, next_save_clears_up, steps_of, whole
from mounts import MOUNTS
from picky import mounted
from test_kill import Command, Said, last, saver  # noqa: F401  (a fixture)

from milepost import ckpt, files

pytestmark = [pytest.mark.soak, pytest.mark.mounted]

KILLS = 20  # at random times, of each pair; as many at the n-th call
LONGEST = 1.5  # seconds of a life
LAYOUTS = ["unified", "separated", "directory"]
PAIRS = [("rename", layout) for layout in LAYOUTS] + [("rename-dir", "directory"), ("append", "unified")]
PAIRS += [("lock", "unified"), ("lock", "directory")] + [("rclone, writes", layout) for layout in LAYOUTS]


@contextlib.contextmanager
def place_of(name: str, folder: Path) -> Iterator[Path]:
    """Yield a folder on a file system of `mounts`, or on one that lacks `name`."""
    files.forget()
    with MOUNTS[name](folder) if name in MOUNTS else mounted(folder, name) as place:
        yield place
    files.forget()


def check(said: Said, folder: Path, layout: str, *, before: int, best: int) -> int:
    """Assert that nothing complete was lost and nothing half taken, and that the next save clears up. Return its step."""
    found = whole(folder, in_place=True)  # each opens, and is what was saved, bit for bit
    done = max(last(said, "saved", before), last(said, "kept", before))
    newest = max((one.step for one in found), default=0)
    assert done <= newest <= done + 2
    assert max(steps_of(found, best=True), default=0) >= last(said, "kept", best)
    latest = ckpt.latest(ckpt.find(folder))
    assert (latest.step if latest else 0) >= done
    next_save_clears_up(folder, layout, newest + 1)
    return newest + 1


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_killed_at_random_times(name, layout, saver, tmp_path):  # noqa: F811
    draw, saved, halves = random.Random(f"{name} {layout}"), 0, 0
    with place_of(name, tmp_path / "fs") as place:
        folder, step, best = place / "checkpoints", 0, 0
        folder.mkdir()
        for number in range(KILLS):
            mode = ("blocking", "background")[number % 2]
            line = f"loop {quote(str(folder))} {layout} {mode} {step + 1}"
            said = saver(line, seconds=draw.uniform(0.0, LONGEST))
            assert said[-1] == ("ended", str(int(signal.SIGKILL)))
            saved += len([words for words in said if words[0] == "saved"])
            best = last(said, "kept", best)
            halves += len(list(folder.rglob(".tmp-*")))
            step = check(said, folder, layout, before=step, best=best)
    print(f"{name}, {layout}: {KILLS} kills, {saved} saves, {halves} leftovers")
    assert saved > KILLS / 6


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_killed_before_the_nth_call(name, layout, saver, tmp_path):  # noqa: F811
    halves, calls = 0, 0
    with place_of(name, tmp_path / "fs") as place:
        for number in range(1000):
            folder = place / f"checkpoints{number}"
            make_before(folder, layout)
            said = saver(f"nth {quote(str(folder))} {layout} blocking {number}")
            halves += len(list(folder.rglob(".tmp-*")))
            if ("untouched",) in said:
                break
            calls += 1
            check(said, folder, layout, before=2, best=2)
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{name}, {layout}: killed at each of {calls} calls, {halves} leftovers")
    assert calls > 20
    assert halves > 0
