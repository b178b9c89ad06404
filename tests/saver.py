"""A process that forks children which save until they are killed; test_kill.py tells it what to do, line by line.

It imports torch and runs no operation before it forks: the threads of OpenMP do not survive a fork, and a child of a
process that had started them would wait for them for ever in its first parallel operation.
"""

import fcntl
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed.checkpoint  # noqa: E402  (once, not in every child)
from lacking import take_away  # noqa: E402
from records import record  # noqa: E402

from milepost import ckpt  # noqa: E402
from milepost.ckpt import Checkpoint  # noqa: E402
from milepost.ckpt.writer import Writer, named_tensors  # noqa: E402
from milepost.files import look, writing  # noqa: E402

SIZE = 128  # rows and columns of each of three tensors: 200 kB a checkpoint
EVERY = 3  # of so many steps one is the best only, as an evaluation between two saves is
KEEP_LAST, KEEP_EVERY = 2, 4
CHANGING = (
    "open",
    "write",
    "fsync",
    "replace",
    "link",
    "unlink",
    "mkdir",
    "rmdir",
)  # the calls of os that change a disk
REPEATED = ("open", "write", "fsync")  # those that a second save makes as the first did

_write = os.write


def of_step(step: int, run_id: str = "one") -> Checkpoint:
    """Better with every step, so that each is the best so far."""
    return record(step, size=SIZE, run_id=run_id, validation_loss=1 / step, tokenizer=None)


def say(*words: object) -> None:
    _write(1, (" ".join(map(str, words)) + "\n").encode())


def save_keep_prune(
    one: Checkpoint, folder: Path, layout: str, *, keep_last: int = KEEP_LAST, keep_every: int = KEEP_EVERY
) -> None:
    """Do what a run does when a save is due, and report each part: a save, or every third time only the best; then
    pruning.
    """
    saved = ckpt.save(one, folder, layout=layout) if one.step % EVERY else None
    if saved:
        say("saved", one.step)
    ckpt.keep_best(one, folder, saved=saved, layout=layout)
    say("kept", one.step)
    ckpt.prune(folder, run_id=str(one.run_id), keep_last=keep_last, keep_every=keep_every, latest_valid=saved)
    say("pruned", one.step)


def each_step(steps: range, folder: str, layout: str, mode: str, **policy: int) -> None:
    """Save these steps through a Writer; the submitted record changes as soon as it may, as in training."""
    writer = Writer(background=mode == "background", free_memory=lambda: None, say=say)
    for step in steps:
        one = of_step(step)
        writer.submit(one, lambda copy: save_keep_prune(copy, Path(folder), layout, **policy))
        writer.settle()
        for tensor in named_tensors(one).values():
            tensor.zero_()
    writer.wait()


def loop(folder: str, layout: str, mode: str, first: str) -> None:
    """Saves on and on."""
    each_step(range(int(first), 10**9), folder, layout, mode)


def plain(path: str) -> None:
    """Write the same file again and again, as most programs do."""
    step = 1
    while True:
        torch.save(of_step(step).model_state, path)
        step += 1


def many(folder: str, layout: str, run_id: str, times: str) -> None:
    """So many saves, where a second name is a copy."""

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "no hard links here")

    os.link = refused  # type: ignore[assignment]
    for step in range(1, int(times) + 1):
        save_keep_prune(of_step(step, run_id), Path(folder), layout)


def nth(folder: str, layout: str, mode: str, number: str, lack: str = "") -> None:
    """Save steps 3 and 4; SIGKILL before the n-th call that changes the disk, in the middle of it if it is a write.

    The writes of step 4 repeat those of step 3 and are not counted. The file system lacks what `lack` names.
    """
    if lack:
        take_away(setattr, lack)
    look(Path(folder))  # as a run does before it trains
    original = killed_before(int(number))
    each_step(range(4, 5), folder, layout, mode, keep_last=1, keep_every=2)
    for name in REPEATED:
        setattr(os, name, original[name])
    each_step(range(6, 7), folder, layout, mode, keep_last=1, keep_every=2)
    say("untouched")


def killed_before(number: int) -> dict[str, Callable[..., Any]]:
    """From now on the n-th call that changes the disk is this process's end; returns those calls as they were."""
    left = number

    def counted(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if name == "open" and not arguments[1] & os.O_CREAT:
                return action(*arguments, **named)
            if left == 0:
                if name == "write":
                    half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return action(*arguments, **named)

        return call

    writing.CHUNK = 2**16  # so that a file takes several writes
    original = {name: getattr(os, name) for name in CHANGING}
    for name, action in original.items():
        setattr(os, name, counted(name, action))
    return original


def half(descriptor: int, data: Any) -> None:
    """Write the first half; past the page cache only whole blocks can be written."""
    direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0)
    size = len(data) // 2
    _write(descriptor, memoryview(data)[: size // writing.BLOCK * writing.BLOCK if direct else size])


def main() -> None:
    """Fork a child for each `COMMAND ARGUMENTS`, quoted as for a shell; two with `|` between them run at once.

    Say how they ended.
    """
    torch.save({}, io.BytesIO())  # imports what it needs, once and not in every child
    for line in sys.stdin:
        pids = []
        for words in map(shlex.split, line.split("|")):
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
