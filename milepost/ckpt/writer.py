"""Background saves: the state is copied into reusable buffers, and a thread writes them while training continues."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from milepost.ckpt.archive import bytes_of
from milepost.ckpt.collective import everywhere
from milepost.ckpt.record import Checkpoint, named_tensors
from milepost.ckpt.tensors import local

SPARE = 0.9  # share of the free memory that the copy may take


class Writer:
    """Runs jobs on records, one at a time; each waits for the previous one.

    The copy is made during the next forward and backward pass, in which no weight changes; `settle` is called before
    the update.

    For a record that is distributed (`shared_by`), each rank copies its part. The copy lies on a mesh of that group,
    not of training's: training sends messages between the ranks meanwhile, and a message of this thread would be
    received as one of training's.
    """

    def __init__(self, *, background: bool, free_memory: Callable[[], int | None], say: Callable[[str], None]) -> None:
        """`background=False` runs every job at once; `free_memory` returns free bytes, or None if unknown."""
        self._background, self._free_memory, self._say = background, free_memory, say
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._error: BaseException | None = None

    def submit(self, record: Checkpoint, job: Callable[[Checkpoint], None]) -> None:
        """Run `job` on `record` as it is now; return at once if that is possible.

        Raises what the previous job raised.
        """
        self.wait()
        # All ranks or none: a rank that saves at once would wait for those that train meanwhile.
        if not everywhere(record, self._background and self._make_room(record)):
            job(record)
            return
        copy = _like(record, self._buffers)
        self._copied.clear()
        work = (record, copy, job, _reached(record))
        thread = threading.Thread(target=self._work, args=work, name="checkpoint writer")
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads
            job(record)
            return
        self._thread = thread
        if any(tensor.device.type not in ("cpu", "cuda") for tensor in record.model_state.values()):
            self.settle()  # it is unknown whether two threads may use another kind of device

    def settle(self) -> None:
        """Return when the record may change again, because it is copied."""
        if self._thread is not None:
            self._copied.wait()

    def wait(self) -> None:
        """Return when nothing is in flight. Raises what the last job raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(
        self, record: Checkpoint, copy: Checkpoint, job: Callable[[Checkpoint], None], reached: torch.cuda.Event | None
    ) -> None:
        try:
            try:
                with _beside(reached):
                    for name, tensor in named_tensors(record).items():
                        _copy(local(tensor), self._buffers[name])
            finally:
                self._copied.set()
            job(copy)
        except BaseException as error:  # raised again by wait()
            self._error = error

    def _make_room(self, record: Checkpoint) -> bool:
        """Return whether there are buffers for every tensor; without memory for them, every later save runs at once."""
        tensors = {name: local(tensor) for name, tensor in named_tensors(record).items()}
        new = {name: tensor for name, tensor in tensors.items() if not _fits(self._buffers.get(name), tensor)}
        need, free = sum(tensor.nbytes for tensor in new.values()), self._free_memory()
        try:
            if free is not None and need > SPARE * free:
                raise MemoryError
            self._buffers |= {name: _buffer(tensor) for name, tensor in new.items()}
        except (MemoryError, RuntimeError):  # torch raises the second
            self._background, self._buffers = False, {}
            self._say(f"no memory for a copy of {need:,} bytes: training waits for each save (CHECKPOINT_ASYNC=false)")
        return self._background


def _like(record: Checkpoint, buffers: dict[str, Tensor]) -> Checkpoint:
    """Return the record with the buffers in place of its tensors."""
    copies = buffers if record.shared_by is None else _shared(buffers, record, record.shared_by)
    model_state = {name: copies[name] for name in record.model_state}
    optimizer_state: dict[str, Any] | None = None
    if record.optimizer_state is not None:
        state = record.optimizer_state["state"]
        moments = {index: {kind: copies[f"{index}.{kind}"] for kind in kinds} for index, kinds in state.items()}
        optimizer_state = {**record.optimizer_state, "state": moments}
    return dataclasses.replace(record, model_state=model_state, optimizer_state=optimizer_state)


def _shared(buffers: dict[str, Tensor], record: Checkpoint, group: ProcessGroup) -> dict[str, Tensor]:
    """Return the buffers; that of a DTensor as a DTensor whose local part is in main memory."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    mesh = DeviceMesh.from_group(group, "cpu")
    copies = {}
    for name, tensor in named_tensors(record).items():
        copies[name] = buffers[name]
        if isinstance(tensor, DTensor):  # the shape of the whole is known: no communication
            copies[name] = DTensor.from_local(
                buffers[name], mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
    return copies


def _fits(buffer: Tensor | None, tensor: Tensor) -> bool:
    return buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype


def _buffer(tensor: Tensor) -> Tensor:
    """Return main memory for a copy; pinned for a copy from a GPU, which is faster."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _reached(record: Checkpoint) -> torch.cuda.Event | None:
    """Return the moment at which the GPU has computed the record; None without one."""
    device = next((tensor.device for tensor in named_tensors(record).values() if tensor.is_cuda), None)
    return None if device is None else torch.cuda.current_stream(device).record_event()


@contextlib.contextmanager
def _beside(reached: torch.cuda.Event | None) -> Iterator[None]:
    """Copy from a GPU from the moment `reached` on, on a stream of its own, beside what training computes meanwhile; end
    when all is copied. On training's own stream each copy would wait for all that is queued there.
    """
    if reached is None:
        yield
        return
    stream = torch.cuda.Stream(reached.device)
    stream.wait_event(reached)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _copy(tensor: Tensor, buffer: Tensor) -> None:
    """Copy from main memory with numpy: torch would start a second set of OpenMP threads that slows training."""
    if tensor.device.type == "cpu":
        np.copyto(bytes_of(buffer), bytes_of(tensor))
    else:
        buffer.copy_(tensor, non_blocking=tensor.is_cuda)
