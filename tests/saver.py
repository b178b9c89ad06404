"""A process that forks children which save until they are killed; test_kill.py tells it what to do, line by line.

It imports torch and runs no operation before it forks: the threads of OpenMP do not survive a fork, and a child of a process
that had started them would wait for them for ever in its first parallel operation.
"""

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from records import record  # noqa: E402

import ckpt  # noqa: E402
from ckpt import Checkpoint, files  # noqa: E402

SIZE = 128  # rows and columns of each of three tensors: 200 kB a file


def of_step(step: int, run_id: str = "one") -> Checkpoint:
    """Better with every step, so that each is the best so far."""
    return record(step, size=SIZE, run_id=run_id, validation_loss=1 / step, tokenizer=None)


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def save_and_keep(step: int, folder: Path, run_id: str = "one") -> None:
    """A step that is saved and the best, or every third time the best only; said when it is done."""
    one = of_step(step, run_id)
    saved = ckpt.save(one, folder) if step % 3 else None
    if saved:
        say("saved", step)
    ckpt.keep_best(one, folder, saved=saved)
    say("kept", step)


def loop(folder: str, first: str) -> None:
    """Saves on and on."""
    step = int(first)
    while True:
        save_and_keep(step, Path(folder))
        step += 1


def plain(path: str) -> None:
    """What everybody does: the same file again and again."""
    step = 1
    while True:
        torch.save(of_step(step).model_state, path)
        step += 1


def many(folder: str, run_id: str, times: str) -> None:
    """So many saves, where a second name is a copy."""

    def refused(*_: object) -> None:
        raise PermissionError(1, "no hard links here")

    os.link = refused  # type: ignore[assignment]
    for step in range(1, int(times) + 1):
        save_and_keep(step, Path(folder), run_id)


def nth(folder: str, number: str) -> None:
    """Saves steps 2 and 3; SIGKILL before the n-th call that changes the disk, half-way through it if it is a write.

    The writes of step 3 are those of step 2 again, and are not counted.
    """
    left = int(number)

    def counted(action: Callable[..., Any], half: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return action(*arguments, **named)

        return call

    def half_of(file: io.BufferedRandom, data: Any) -> None:
        io.BufferedRandom.write(file, memoryview(data).cast("B")[: len(data) // 2])
        file.flush()

    counted_write = counted(io.BufferedRandom.write, half_of)

    class File(io.BufferedRandom):
        def write(self, data: Any) -> int:
            return counted_write(self, data)

    files.open = lambda path, mode: File(io.FileIO(path, "x+"))  # type: ignore[attr-defined]
    for name in ("fsync", "replace", "link", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    save_and_keep(2, Path(folder))
    files.open = open  # type: ignore[attr-defined]
    save_and_keep(3, Path(folder))
    say("untouched")


def main() -> None:
    """`COMMAND ARGUMENTS` forks a child that does it; `|` between two forks both. Says what they say, and then how they ended."""
    torch.save({}, io.BytesIO())  # imports what it needs, once and not in every child
    for line in sys.stdin:
        pids = []
        for words in (part.split() for part in line.split("|")):
            pid = os.fork()
            if pid == 0:
                torch.set_num_threads(1)
                say("started", os.getpid())
                globals()[words[0]](*words[1:])
                os._exit(0)
            pids.append(pid)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        say("ended", *statuses)


if __name__ == "__main__":
    main()
