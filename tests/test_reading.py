"""Reads that fail in the middle of a checkpoint: tried again, and never taken for damage."""

import builtins
import errno
import functools
import io
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import whole
from records import bits, record
from saver import of_step

from milepost import ckpt
from milepost.ckpt import CheckpointError, archive, index
from milepost.files import open_steadily, reaching, read_steadily

LAYOUTS = list(ckpt.WRITERS)
FOR_EVER = 10**9


class Failing:
    """Fails the reads of files whose path contains `part`: from the `first` on, counted over all of them, `times` in
    all.
    """

    def __init__(self) -> None:
        self.part, self.first, self.times, self.reads = "nothing", 0, 0, 0

    def set(self, part: str, first: int, times: int) -> None:
        self.part, self.first, self.times, self.reads = part, first, times, 0
        reaching._failed.clear()
        for cached in (index._last_listing, archive._cached, archive._marks):  # as in a new process
            cached.cache_clear()

    def count(self, path: str) -> None:
        if self.part not in path:
            return
        self.reads += 1
        if self.first < self.reads <= self.first + self.times:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    control, real = Failing(), io.open

    class File(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            control.count(str(self.name))
            return super().readinto(buffer) or 0

        def read(self, size: int = -1) -> bytes:
            control.count(str(self.name))
            return super().read(size) or b""

        def readall(self) -> bytes:
            control.count(str(self.name))
            return super().readall() or b""

    def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        if mode != "rb" or control.part not in str(file):
            return real(file, mode, buffering, *rest, **named)
        raw = File(file, mode)
        return raw if buffering == 0 else io.BufferedReader(raw)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(reaching, "PAUSES", (0.0,) * 3)
    yield control
    reaching._failed.clear()


def each_read(failing: Failing, part: str, times: int, action: Callable[[], Any]) -> Iterator[Any]:
    """Yield what `action` returns, or the CheckpointError that it raises, with the n-th read failing, for every n."""
    for first in itertools.count():
        failing.set(part, first, times)
        try:
            result: Any = action()
        except CheckpointError as error:
            result = error
        if failing.reads <= first:
            assert first > 0  # something was read
            return
        yield result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_read_that_fails_once_is_repeated(layout, failing, tmp_path):
    path = ckpt.save(record(1), tmp_path, layout=layout)
    expected = bits(ckpt.load(path))
    for verify in (False, True):
        for result in each_read(failing, path.name, 1, functools.partial(ckpt.load, path, verify=verify)):
            assert bits(result) == expected
    for problems in each_read(failing, path.name, 1, lambda: ckpt.verify(path)):
        assert problems == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_fails_from_the_nth_read_on_could_not_be_read_and_is_never_damaged(layout, failing, tmp_path):
    path = ckpt.save(record(1), tmp_path, layout=layout)
    expected, kinds = bits(ckpt.load(path)), set()
    for result in each_read(failing, path.stem, FOR_EVER, lambda: ckpt.load(path, verify=True)):
        kinds.add(result.kind)
        assert "damaged" not in str(result)
    for problems in each_read(failing, path.stem, FOR_EVER, lambda: ckpt.verify(path)):
        assert problems
        assert all("could not be read" in problem for problem in problems)
    for found in each_read(failing, path.stem, FOR_EVER, lambda: ckpt.find(tmp_path)):
        assert "unreachable" in {each.kind for each in found} <= {"unreachable", None}
        assert all(each.path.name.startswith(path.stem) for each in found)
    assert kinds == {"unreachable"}
    failing.set("nothing", 0, 0)
    assert bits(ckpt.load(path, verify=True)) == expected  # nothing of it is remembered


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_pruned_while_a_read_fails(layout, failing, tmp_path):
    paths = [ckpt.save(of_step(step), tmp_path, layout=layout) for step in (1, 2, 3)]
    policy: dict[str, Any] = {"run_id": "one", "keep_last": 1, "keep_every": 0}
    prune = functools.partial(ckpt.prune, tmp_path, latest_valid=paths[2], **policy)
    for which in (0, 1, 2):
        for result in each_read(failing, paths[which].stem, FOR_EVER, prune):
            assert result.kind == "unreachable"
            failing.set("nothing", 0, 0)
            assert {each.step for each in whole(tmp_path)} == {1, 2, 3}
            break  # the first read of each: the next ones find the listing in memory
    failing.set("nothing", 0, 0)
    prune()  # the control
    assert {each.step for each in whole(tmp_path)} == {3}


def test_the_newest_that_does_not_answer_is_not_passed_over_where_steps_count(failing, tmp_path):
    older, newest = (ckpt.save(record(step), tmp_path) for step in (1, 2))
    said: list[str] = []
    latest = functools.partial(ckpt.load_named, "latest", tmp_path, say=said.append)
    for result in each_read(failing, newest.name, FOR_EVER, lambda: latest(certain=True, verify=True)):
        assert result.kind == "unreachable"
    failing.set(newest.name, 0, FOR_EVER)
    assert latest().path == older  # to generate, another is taken and named
    assert any("could not be read" in line for line in said)


def test_a_file_is_read_on_after_it_was_opened_anew(failing, tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(256)) * 1000)
    content = path.read_bytes()
    for first in range(4):
        failing.set("numbers", first, 2)
        with open_steadily(path) as file:
            assert file.read(10) + file.read() == content
        failing.set("numbers", 0, FOR_EVER)
        with pytest.raises(OSError, match="Stale"):
            read_steadily(path)


def test_another_file_under_the_name_is_not_mixed_with_the_one_that_was_opened(failing, tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(b"a" * 20_000)
    failing.set("numbers", 1, 1)
    with open_steadily(path) as file:
        begin = file.read(1)
        (tmp_path / "new").write_bytes(b"b" * 20_000)
        os.replace(tmp_path / "new", path)
        assert begin + file.read() == b"a" * 20_000
    assert Path(path).read_bytes()[:1] == b"b"
