"""Collective saves: rank 0 names, announces and reveals a checkpoint, and every rank writes its part.

    with ckpt.leading(record):                  # on rank 0 of `record.shared_by`
        ckpt.save(record, folder, layout="sharded")
    ckpt.follow(record)                         # on every other rank

Saves run in a thread beside training, so `shared_by` is a gloo group of its own: two threads in one group would receive
each other's messages. If a process dies, those that wait for it raise RuntimeError.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from milepost.ckpt import tensors
from milepost.ckpt.record import Checkpoint
from milepost.lazy import dist


@contextlib.contextmanager
def leading(record: Checkpoint) -> Iterator[None]:
    """Announce at the end of the block, also after an error, that no other write follows."""
    try:
        yield
    except Exception:  # after a KeyboardInterrupt this process ends, and the others notice
        with contextlib.suppress(RuntimeError):  # another process has died; report the first error instead
            announce(record, None)
        raise
    announce(record, None)


def announce(record: Checkpoint, place: Path | None) -> None:
    """Broadcast the hidden folder to write pieces into now, or None after the last."""
    if record.shared_by is not None:
        dist.broadcast_object_list([place and str(place.absolute())], group=record.shared_by, group_src=0)


def everywhere(record: Checkpoint, here: bool) -> bool:
    """Return whether `here` is true on every rank of `shared_by`; all ranks call it together."""
    answers = [here]
    if record.shared_by is not None:
        answers = [here] * record.shared_by.size()
        dist.all_gather_object(answers, here, group=record.shared_by)
    return all(answers)


def follow(record: Checkpoint) -> None:
    """Write this rank's pieces of `record` into each folder that rank 0 announces, until it announces the end.

    A write that fails on any rank fails on all: rank 0 raises the cause and removes its folder; here the next folder is
    awaited.
    """
    if record.shared_by is None:
        return
    from milepost.ckpt import shard_writer  # its import takes most of a second, and a single process does not need it

    state = shard_writer.state_of(record)
    while (place := _announced(record)) is not None:
        with contextlib.suppress(shard_writer.CheckpointException):
            shard_writer.write(state, place, group=record.shared_by)


def _announced(record: Checkpoint) -> Path | None:
    place: list[str | None] = [None]
    dist.broadcast_object_list(place, group=record.shared_by, group_src=0)
    return Path(place[0]) if place[0] else None


def not_finite(record: Checkpoint) -> list[str]:
    """Return the names of the weights that hold NaN or Inf; all ranks of `shared_by` call it together."""
    bad = tensors.not_finite(record.model_state)
    if record.shared_by is None:
        return bad
    found: list[list[str]] = [[] for _ in range(record.shared_by.size())]
    dist.all_gather_object(found, bad, group=record.shared_by)
    on_any_rank = {name for names in found for name in names}
    return [name for name in record.model_state if name in on_any_rank]
