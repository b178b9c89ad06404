"""A checkpoint that several processes write: one leads, which names, announces and reveals it, the others follow.

    with ckpt.leading(record):                  # on the first process of `record.shared_by`
        ckpt.save(record, folder, layout="sharded")
    ckpt.follow(record)                         # on each of the others

Saving is done in a thread beside training, so that `shared_by` is a gloo group of its own: two threads that used one group would
take each other's messages for answers. If a process dies, what waits for it raises RuntimeError.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from milepost.ckpt import tensors
from milepost.ckpt.record import Checkpoint


@contextlib.contextmanager
def leading(record: Checkpoint) -> Iterator[None]:
    """Tells the followers at the end of the block that no other write comes, also if one failed; nothing for a record of one process."""
    try:
        yield
    except Exception:  # after a KeyboardInterrupt this process ends, and the others see that
        with contextlib.suppress(RuntimeError):  # of a process that has died; what led here is the error to tell
            announce(record, None)
        raise
    announce(record, None)


def announce(record: Checkpoint, place: Path | None) -> None:
    """Tells the followers into which hidden folder to write their pieces now, or by None that it was the last."""
    if record.shared_by is not None:
        dist.broadcast_object_list([place and str(place.absolute())], group=record.shared_by, group_src=0)


def everywhere(record: Checkpoint, here: bool) -> bool:
    """Whether it is so in all processes of `shared_by`, which ask together."""
    answers = [here]
    if record.shared_by is not None:
        answers = [here] * record.shared_by.size()
        dist.all_gather_object(answers, here, group=record.shared_by)
    return all(answers)


def follow(record: Checkpoint) -> None:
    """Writes this process's pieces of `record` into each folder that the leader announces, until it says that none comes.

    A write that fails in any process fails in all: the leader raises why, and its folder is gone; here the next one is waited for.
    """
    if record.shared_by is None:
        return
    from milepost.ckpt import shard_writer  # which takes most of a second, and a process alone does not need

    state = shard_writer.state_of(record)
    while (place := _announced(record)) is not None:
        with contextlib.suppress(shard_writer.CheckpointException):
            shard_writer.write(state, place, group=record.shared_by)


def _announced(record: Checkpoint) -> Path | None:
    told: list[str | None] = [None]
    dist.broadcast_object_list(told, group=record.shared_by, group_src=0)
    return Path(told[0]) if told[0] else None


def not_finite(record: Checkpoint) -> list[str]:
    """The names of the weights that hold NaN or infinity. All processes of `shared_by` call it together and get the same answer."""
    bad = tensors.not_finite(record.model_state)
    if record.shared_by is None:
        return bad
    found: list[list[str]] = [[] for _ in range(record.shared_by.size())]
    dist.all_gather_object(found, bad, group=record.shared_by)
    everywhere = {name for names in found for name in names}
    return [name for name in record.model_state if name in everywhere]
