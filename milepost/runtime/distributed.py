"""What torchrun's environment means for us: which process this is, what it shares with the others, and what they agree on.

All of it is PyTorch's own: DistributedDataParallel (every process holds the whole model) and fully_shard (each holds a part of it).
"""

import contextlib
import datetime
import gc
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")
POLL_SECONDS = 0.02
LONGEST_WORK = datetime.timedelta(
    days=1
)  # of one process while the others wait, as for a tokenizer; the death of one is noticed at once


class ElsewhereError(Exception):
    """Another process found something wrong, and says what: this one ends without a word."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of one training, and which of them this is. Alone, every method answers at once."""

    rank: int = 0  # among all
    size: int = 1
    local_rank: int = 0  # among those of this machine
    local_size: int = 1
    words: dist.ProcessGroup | None = None  # over which they talk; gradients and weights have torch's default group

    @property
    def first(self) -> bool:
        """Whether this is the one process that tells, saves and writes metrics."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of `count` rows; the parts of all make up the whole, in order."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def any(self, here: bool) -> bool:
        """Whether it is so in any process. Every process asks."""
        return self.sum(float(here))[0] > 0 if self.size > 1 else here

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total, group=self.words)
        return total.tolist()

    def mean(self, value: Tensor) -> Tensor:
        """A 0-dim tensor's mean over the processes, on its device."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def broadcast_tensor(self, tensor: Tensor, source: int) -> Callable[[], Tensor]:
        """Gives `tensor` what it holds in process `source`; the answer waits until it has arrived, and returns it."""
        if self.size == 1:
            return lambda: tensor
        tensor = tensor.contiguous()
        sent = dist.broadcast(tensor, src=source, async_op=True)

        def arrived() -> Tensor:
            sent.wait()
            return tensor

        return arrived

    def broadcast(self, value: Value) -> Value:
        """What the first process has for `value`: any plain object."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.words)
        return box[0]

    def all_gather(self, value: Value) -> list[Value]:
        """The value of each process, by rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self.words)
        return values

    def by_first(self, work: Callable[[], Value]) -> Value | None:
        """What `work` gives in the first process; the others wait for it and get None. Its error ends all."""
        return self._by(self.first, work)

    def in_turn(self, work: Callable[[], Value]) -> Value:
        """What `work` gives in each process; on every machine one of them goes first, so that the others find what it put into a cache."""
        value = self._by(self.local_rank == 0, work)
        return work() if value is None else value

    def _by(self, chosen: bool, work: Callable[[], Value]) -> Value | None:
        value, error = None, None
        if chosen:
            try:
                value = work()
            except Exception as problem:
                error = problem
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise ElsewhereError
        return value


ALONE = World()


def join(torchrun: dict[str, int], *, accelerator: str) -> World:
    """This process among those that torchrun started; `accelerator` ("cpu" or "cuda") is what they compute on.

    Without torchrun, and with a single process of it, nothing is set up: such a run is the plain one, bit for bit.
    """
    if not torchrun:
        return ALONE
    world = World(**torchrun, words=None)
    backend = "cpu:gloo,cuda:nccl" if accelerator == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store_of_this_attempt(world), rank=world.rank, world_size=world.size)
    return replace(world, words=another_group(timeout=LONGEST_WORK))


def _store_of_this_attempt(world: World) -> dist.Store:
    """The store by which the processes find each other, without what those of an attempt before left there.

    torchrun's restarts share one store, where a process may read the address of one that was killed
    (https://github.com/pytorch/pytorch/issues/135712), and no number of the attempt is the same on every machine. So the first
    process draws a name for it, and it counts once each of the others has put under that name what it has drawn itself.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    drawn, others = secrets.token_hex(8), range(1, world.size)
    if world.first:
        store.set("attempt", drawn)
        store.set(f"{drawn}/all", " ".join(store.get(f"{drawn}/{rank}").decode() for rank in others))  # `get` waits
        return dist.PrefixStore(drawn, store)
    while True:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/{world.rank}", drawn)
        if store.check([f"{attempt}/all"]) and drawn in store.get(f"{attempt}/all").decode().split():
            return dist.PrefixStore(attempt, store)
        time.sleep(POLL_SECONDS)


def leave() -> None:
    """Ends what `join` began. The engine's last references go first: gloo's threads must have ended before the interpreter does."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def ended(code: int) -> int:
    """The exit code `code`; but a process that never left the others, because something was raised, ends here and now.

    To leave them it might wait for those that are gone, and the interpreter's own end may abort in gloo's threads.
    """
    if dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def lost(error: BaseException) -> bool:
    """Whether `error` says that a process which should have answered is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


# ---------------------------------------------------------------------------------------------------------------------
# The two engines.


def data_parallel(forward: nn.Module) -> nn.Module:
    """Return `forward` with its gradients averaged over all processes during the backward pass.

    Buckets are rearranged after the first backward pass, and from three processes on the order of a sum depends on its place in a
    bucket: `training.warm_up` runs two passes before the first step, so that a resumed run has the same buckets.
    """
    return nn.parallel.DistributedDataParallel(forward, gradient_as_bucket_view=True)


def fully_sharded(model: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
    """Leaves each process a part of every parameter of `model`, on `device`; a block's are gathered while it is at work."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for each in (*blocks, model):
        fully_shard(each, mesh=mesh)


def another_group(*, timeout: datetime.timedelta | None = None) -> dist.ProcessGroup:
    """All processes once more, for what they say to each other in main memory, beside other talk or for longer than that may last."""
    return dist.new_group(backend="gloo", timeout=timeout)


@contextlib.contextmanager
def syncing(forward: nn.Module, engine: str, *, now: bool) -> Iterator[None]:
    """Whether the passes in the block share their gradients: only the last micro-batch of a step need do so."""
    if engine == "fsdp":
        forward.set_requires_gradient_sync(now)  # type: ignore[operator]
    with contextlib.nullcontext() if now or engine != "ddp" else forward.no_sync():  # type: ignore[operator]
        yield


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if each process holds a part; every process asks, in the same order."""
    return tensor.full_tensor() if _in_parts(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process, in the same memory."""
    return tensor.to_local() if _in_parts(tensor) else tensor  # type: ignore[attr-defined]


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of `tensor`, of which this process keeps the part that it has of `like`."""
    if not _in_parts(like):
        return tensor.clone()
    from torch.distributed.tensor import distribute_tensor

    where: dict[str, Any] = {"device_mesh": like.device_mesh, "placements": like.placements}  # type: ignore[attr-defined]
    return distribute_tensor(
        tensor.to(like.device), **where, src_data_rank=None
    )  # each has all of it, so nothing is sent


def _in_parts(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")
