"""The pieces of a sharded checkpoint: torch.distributed.checkpoint plans who writes which, and they go to disk as all our files do.

Imported only when such a checkpoint is written, because torch.distributed.checkpoint takes most of a second to import.
"""

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch.distributed.checkpoint as dcp
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (  # what torch's own reader looks for
    CURRENT_DCP_VERSION,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import StorageWriter
from torch.futures import Future

from milepost.ckpt import archive
from milepost.ckpt.record import Checkpoint, Json
from milepost.ckpt.tensors import DTYPES, optimizer_names
from milepost.files import NewFile, written

__all__ = ["CheckpointException", "cause", "state_of", "write"]

TORCHS = ".metadata"  # a pickle; torch's reader goes by it, ours does not open it


def state_of(record: Checkpoint) -> dict[str, Any]:
    """The record's tensors as PyTorch's tools nest them; their names become `model.{name}` and `optimizer.state.{parameter}.{kind}`."""
    state: dict[str, Any] = {"model": record.model_state}
    if record.optimizer_state is not None:
        names = optimizer_names(record.optimizer_state["param_groups"])
        moments = {names[index]: kinds for index, kinds in record.optimizer_state["state"].items()}
        state["optimizer"] = {"state": moments}
    return state


def write(
    state: dict[str, Any], folder: Path, *, group: ProcessGroup | None
) -> tuple[dict[str, dict[str, Json]], dict[str, Json]]:
    """Writes this process's pieces of `state` into `folder`; all processes of `group` do so together, or one alone if it is None.

    Returns, on the first of them, size and sha256 of every process's file and of torch's `.metadata` by name, and where each tensor's
    bytes lie. Raises the CheckpointException of all if it failed in any, and RuntimeError if one is not there any more.
    """
    storage = _Storage(folder)
    if group is None:
        _write_alone(state, storage)
    else:
        dcp.save(state, storage_writer=storage, process_group=group)
    return storage.made, storage.index


def _write_alone(state: dict[str, Any], storage: "_Storage") -> None:
    """What `dcp.save` does for one process, which it warns of."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    (plan,), metadata = planner.create_global_plan([planner.create_local_plan()])
    storage.finish(metadata, [storage.write_data(planner.finish_plan(plan), planner).value()])


def cause(error: CheckpointException) -> BaseException:
    """What went wrong in the process where it did; what a disk refused comes before what followed from that."""
    causes = [each for each, _ in error.failures.values()]
    return next((each for each in causes if isinstance(each, OSError)), causes[0])


class _Storage(StorageWriter):
    """Torch's interface to a place for pieces: a file for each process, hashed while it is written, durable when it is there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank = folder, 0
        self.made: dict[str, dict[str, Json]] = {}
        self.index: dict[str, Json] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: there is one for each write."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.rank = kwargs["rank"]

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def write_data(self, plan: Any, planner: Any) -> Future:
        """Writes this process's file; gives its entry in the manifest, and where in it each piece lies."""
        placed: list[_Placed] = []
        with written(self.folder / _name(self.rank), hashed=True) as file:
            for item in plan.items:
                tensor = planner.resolve_data(item).detach()
                if tensor.numel():  # of fewer rows than processes, some have none
                    file.write(bytes(-file.tell() % archive.ALIGNMENT))
                    start = file.tell()
                    (begin,) = archive.dump(tensor, _Part(file))
                    placed.append(_Placed(item.index, tuple(tensor.shape), start, file.tell() - start, start + begin))
        done: Future = Future()
        done.set_result((file.entry, placed))
        return done

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        """On the first process, of what all have written: makes the index, and writes torch's `.metadata`."""
        self.made |= {_name(rank): entry for rank, (entry, _) in enumerate(results)}
        placed = [(_name(rank), one) for rank, (_, pieces) in enumerate(results) for one in pieces]
        for name, about in cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata).items():
            self.index[name] = {"dtype": DTYPES[about.properties.dtype], "shape": list(about.size), "pieces": []}
        for file, one in sorted(placed, key=lambda each: each[1].offset):
            if any(one.offset[1:]):
                raise NotImplementedError(f"{one.key.fqn} is split along another dimension than its first")
            self.index[one.key.fqn]["pieces"].append([file, one.begin, *(one.shape or (1,))[:1]])
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {one.key: _StorageInfo(file, one.start, one.size) for file, one in placed}
        with written(self.folder / TORCHS, hashed=True) as new:
            new.write(pickle.dumps(metadata, protocol=2))  # whose opcodes tell plainly what it asks for
        self.made[TORCHS] = new.entry


class _Placed(NamedTuple):
    """Where a piece lies in its process's file: an archive of so many bytes, and in it the bytes of the tensor."""

    key: MetadataIndex
    shape: tuple[int, ...]
    start: int
    size: int
    begin: int

    @property
    def offset(self) -> tuple[int, ...]:
        """Where in the whole tensor it begins."""
        return tuple(self.key.offset or ())


class _Part(io.RawIOBase):
    """A file from where it stands now, so that an archive in it counts from its own beginning."""

    def __init__(self, file: NewFile) -> None:
        super().__init__()
        self._file, self._start = file, file.tell()

    def writable(self) -> bool:
        """That it is."""
        return True

    def tell(self) -> int:
        """Bytes of the part."""
        return self._file.tell() - self._start

    def write(self, data: Any) -> int:
        """Takes all of `data`; returns its bytes."""
        return self._file.write(data)


def _name(rank: int) -> str:
    return f"__{rank}_0.distcp"  # as torch calls them
