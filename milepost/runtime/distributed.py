"""The processes of one training under torchrun: their ranks, what they communicate, and how they share the model.

The engines are PyTorch's: DistributedDataParallel (every process holds the whole model) and fully_shard (each holds a
part).
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from milepost.lazy import Tensor, dist, torch, torch_is_in_use
from milepost.screen import flush_streams

if TYPE_CHECKING:
    from torch import nn

Value = TypeVar("Value")
POLL_SECONDS = 0.02
# How long processes wait for the work of another, such as training a tokenizer. A process that dies is noticed at once,
# but for a send that gloo queues in the very moment of the death: nobody is told of that one (Pair::signalException in
# gloo/transport/tcp/pair.cc), and torchrun ends the process.
CONTROL_TIMEOUT = datetime.timedelta(days=1)


class ElsewhereError(Exception):
    """Another process failed and reports why: this one ends without a message."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of one training, and this one's rank. A single process gets every answer at once."""

    rank: int = 0  # among all
    size: int = 1
    local_rank: int = 0  # among those of this machine
    local_size: int = 1
    control: dist.ProcessGroup | None = (
        None  # gloo group for everything but gradients and weights, which use the default group
    )

    @property
    def is_rank0(self) -> bool:
        """Whether this process logs, saves and writes metrics."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return this process's part of `count` sequences; the parts of all processes make up the whole, in order."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def any(self, here: bool) -> bool:
        """Return whether `here` is true in any process. Every process must call this."""
        return self.any_of(here)[0]

    def any_of(self, *here: bool) -> list[bool]:
        """Return for each value whether it is true in any process, in one message. Every process must call this."""
        return [total > 0 for total in self.sum(*map(float, here))] if self.size > 1 else list(here)

    def sum(self, *values: float) -> list[float]:
        """Return each value summed over the processes."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total, group=self.control)
        return total.tolist()

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a 0-dim tensor over the processes, on its device."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def broadcast_tensor(self, tensor: Tensor, source: int) -> Callable[[], Tensor]:
        """Send `tensor` of rank `source` to all. The function that is returned waits for it and returns it."""
        if self.size == 1:
            return lambda: tensor
        tensor = tensor.contiguous()
        sent = dist.broadcast(tensor, src=source, async_op=True)

        def arrived() -> Tensor:
            sent.wait()
            return tensor

        return arrived

    def broadcast(self, value: Value) -> Value:
        """Return the `value` of rank 0, any plain object."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def all_gather(self, value: Value) -> list[Value]:
        """Return the value of each process, by rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self.control)
        return values

    def on_rank0(self, work: Callable[[], Value]) -> Value | None:
        """Run `work` on rank 0 and return its result there, None elsewhere, when it is done.

        Its error ends all processes.
        """
        return self._run_if(self.is_rank0, work)

    def local_rank0_first(self, work: Callable[[], Value]) -> Value:
        """Run `work` in every process, first on local rank 0 of each machine,
        so that the others find its result in the cache.
        """
        value = self._run_if(self.local_rank == 0, work)
        return work() if value is None else value

    def _run_if(self, chosen: bool, work: Callable[[], Value]) -> Value | None:
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


SINGLE = World()


def join(torchrun: dict[str, int], *, accelerator: str) -> World:
    """Join the processes that torchrun started, which compute on `accelerator` ("cpu" or "cuda").

    Without torchrun or with a single process nothing is set up, so that such a run is bit-identical to the plain one.
    """
    if not torchrun:
        return SINGLE
    world = World(**torchrun, control=None)
    backend = "cpu:gloo,cuda:nccl" if accelerator == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store_of_attempt(world), rank=world.rank, world_size=world.size)
    return replace(world, control=new_control_group(timeout=CONTROL_TIMEOUT))


def _store_of_attempt(world: World) -> dist.Store:
    """Return the store through which the processes find each other, with a prefix of its own for this attempt.

    torchrun's restarts share one store, in which a process may read the address of a killed one
    (https://github.com/pytorch/pytorch/issues/135712), and no attempt number is the same on every machine. So rank 0
    draws a name for the attempt, every other process writes its own token under that name, and the name counts once
    rank 0 has seen all tokens.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    token, others = secrets.token_hex(8), range(1, world.size)
    if world.is_rank0:
        store.set("attempt", token)
        store.set(f"{token}/all", " ".join(store.get(f"{token}/{rank}").decode() for rank in others))  # `get` waits
        return dist.PrefixStore(token, store)
    while True:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/{world.rank}", token)
        if store.check([f"{attempt}/all"]) and token in store.get(f"{attempt}/all").decode().split():
            return dist.PrefixStore(attempt, store)
        time.sleep(POLL_SECONDS)


def leave() -> None:
    """Undo `join`. Collect the engine's last references first: gloo's threads must end before the interpreter does."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def ended(code: int) -> int:
    """Return the exit code; a process that has not left the others, because of an error, exits here at once.

    Leaving them could wait for dead processes, and the interpreter's own shutdown may abort in gloo's threads.
    """
    if torch_is_in_use() and dist.is_initialized():
        flush_streams()
        os._exit(code)
    return code


def lost(error: BaseException) -> bool:
    """Return whether the error means that another process is gone."""
    if torch_is_in_use() and isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# The two engines.


def data_parallel(forward: nn.Module) -> nn.Module:
    """Return `forward` with its gradients averaged over all processes during the backward pass.

    Buckets are rearranged after the first backward pass, and from three processes on the order of a sum depends on its
    place in a bucket: `training.warm_up` runs two passes before the first step, so that a resumed run has the same
    buckets.
    """
    return torch.nn.parallel.DistributedDataParallel(forward, gradient_as_bucket_view=True)


def fully_sharded(model: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
    """Shard every parameter of `model` over the processes, on `device`;
    a block's parameters are gathered while it computes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)


def new_control_group(*, timeout: datetime.timedelta | None = None) -> dist.ProcessGroup:
    """Return a gloo group of all processes, for communication in main memory beside the training's or with a longer
    timeout.
    """
    return dist.new_group(backend="gloo", timeout=timeout)


@contextlib.contextmanager
def syncing(forward: nn.Module, engine: str, *, now: bool) -> Iterator[None]:
    """Share the gradients of the passes in this context if `now`: only the last micro-batch of a step needs to."""
    if engine == "fsdp":
        forward.set_requires_gradient_sync(now)  # type: ignore[operator]
    with contextlib.nullcontext() if now or engine != "ddp" else forward.no_sync():  # type: ignore[operator]
        yield


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered if it is sharded. Every process must call this, in the same order."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory."""
    return tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a copy of `tensor`, sharded like `like`."""
    if not _is_sharded(like):
        return tensor.clone()
    from torch.distributed.tensor import distribute_tensor

    where: dict[str, Any] = {"device_mesh": like.device_mesh, "placements": like.placements}  # type: ignore[attr-defined]
    # Every process has the whole tensor, so nothing is sent.
    return distribute_tensor(tensor.to(like.device), **where, src_data_rank=None)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")
