"""Writes the pieces of a sharded checkpoint, as torch.distributed.checkpoint plans them.

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
from milepost.ckpt.dtypes import DTYPES, name_of
from milepost.ckpt.record import Checkpoint, Json
from milepost.ckpt.tensors import optimizer_names
from milepost.files import NewFile, written

__all__ = ["CheckpointException", "cause", "state_of", "write"]

TORCHS = ".metadata"  # a pickle, for torch's reader; ours never opens it


def state_of(record: Checkpoint) -> dict[str, Any]:
    """Return the tensors nested as `model.{name}` and `optimizer.state.{parameter}.{kind}`."""
    state: dict[str, Any] = {"model": record.model_state}
    if record.optimizer_state is not None:
        names = optimizer_names(record.optimizer_state["param_groups"])
        moments = {names[index]: kinds for index, kinds in record.optimizer_state["state"].items()}
        state["optimizer"] = {"state": moments}
    return state


def write(
    state: dict[str, Any], folder: Path, *, group: ProcessGroup | None
) -> tuple[dict[str, dict[str, Json]], dict[str, Json]]:
    """Write this rank's pieces of `state` into `folder`; all ranks of `group` (None: one process) call it together.

    Returns, on rank 0, size and sha256 of every rank's file and of torch's `.metadata` by name, and where each tensor's
    bytes lie. Raises CheckpointException on all ranks if any failed, and RuntimeError if one is gone.
    """
    storage = _Storage(folder)
    if group is None:
        _write_alone(state, storage)
    else:
        dcp.save(state, storage_writer=storage, process_group=group)
    return storage.made, storage.index


def _write_alone(state: dict[str, Any], storage: "_Storage") -> None:
    """Do what `dcp.save` does for a single process, without its warning."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    (plan,), metadata = planner.create_global_plan([planner.create_local_plan()])
    storage.finish(metadata, [storage.write_data(planner.finish_plan(plan), planner).value()])


def cause(error: CheckpointException) -> BaseException:
    """Return the error of the rank that failed; an OSError comes first, because others may follow from it."""
    causes = [failure for failure, _ in error.failures.values()]
    return next((failure for failure in causes if isinstance(failure, OSError)), causes[0])


class _Storage(StorageWriter):
    """Torch's interface to a storage: one file per rank, hashed while it is written, durable when it is visible."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank = folder, 0
        self.made: dict[str, dict[str, Json]] = {}
        self.index: dict[str, Json] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: each write has a storage of its own."""

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
        """Write this rank's file; return its entry in the manifest, and where in it each piece lies."""
        placed: list[_Placed] = []
        with written(self.folder / _name(self.rank), hashed=True) as file:
            for item in plan.items:
                tensor = planner.resolve_data(item).detach()
                if tensor.numel():  # with fewer rows than ranks, some ranks have none
                    file.write(bytes(-file.tell() % archive.ALIGNMENT))
                    start = file.tell()
                    (begin,) = archive.dump(tensor, _Part(file))
                    placed.append(_Placed(item.index, tuple(tensor.shape), start, file.tell() - start, start + begin))
        done: Future = Future()
        done.set_result((file.entry, placed))
        return done

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        """On rank 0, make the index of what all ranks have written, and write torch's `.metadata`."""
        self.made |= {_name(rank): entry for rank, (entry, _) in enumerate(results)}
        placed = [(_name(rank), piece) for rank, (_, pieces) in enumerate(results) for piece in pieces]
        for name, about in cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata).items():
            dtype = DTYPES[name_of(about.properties.dtype)].safetensors
            self.index[name] = {"dtype": dtype, "shape": list(about.size), "pieces": []}
        for file, piece in sorted(placed, key=lambda item: item[1].offset):
            if any(piece.offset[1:]):
                raise NotImplementedError(f"{piece.key.fqn} is split along another dimension than its first")
            self.index[piece.key.fqn]["pieces"].append([file, piece.begin, *(piece.shape or (1,))[:1]])
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {piece.key: _StorageInfo(file, piece.start, piece.size) for file, piece in placed}
        with written(self.folder / TORCHS, hashed=True) as new:
            new.write(pickle.dumps(metadata, protocol=2))  # protocol 2: its opcodes show plainly what it asks for
        self.made[TORCHS] = new.entry


class _Placed(NamedTuple):
    """Where a piece lies in its rank's file: an archive from `start` of `size` bytes;
    the tensor's bytes from `begin`.
    """

    key: MetadataIndex
    shape: tuple[int, ...]
    start: int
    size: int
    begin: int

    @property
    def offset(self) -> tuple[int, ...]:
        """Return the indices in the whole tensor at which it begins."""
        return tuple(self.key.offset or ())


class _Part(io.RawIOBase):
    """A view of a file from its present position, so that offsets in an archive count from there."""

    def __init__(self, file: NewFile) -> None:
        super().__init__()
        self._file, self._start = file, file.tell()

    def writable(self) -> bool:
        """Return True: zipfile asks."""
        return True

    def tell(self) -> int:
        """Return the bytes written to this part."""
        return self._file.tell() - self._start

    def write(self, data: Any) -> int:
        """Write all of `data`; return its bytes."""
        return self._file.write(data)


def _name(rank: int) -> str:
    return f"__{rank}_0.distcp"  # the names that torch uses
