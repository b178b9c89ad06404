"""One of several processes that each hold a part of a record. test_sharded.py starts them by torchrun, or side by side
to kill one.

`python3 -m torch.distributed.run --nproc_per_node=2 tests/shards.py FOLDER` does everything below `together` once and
says in FOLDER/{rank}.json what it saw. `python3 tests/shards.py` reads `RANK KILLED NUMBER MODE STORE FOLDER` from each
line, quoted as for a shell, and forks a child that saves step 2 and, if it is the one to be KILLED, ends before the
NUMBER-th of its calls that change the disk.
"""

import dataclasses
import datetime
import errno
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (which DTensors ask for; once, not in every child)
import torch.distributed as dist  # noqa: E402
from records import FULL, gpt2_record, record  # noqa: E402
from saver import killed_before, of_step, say  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Shard, distribute_tensor  # noqa: E402

import models  # noqa: E402
from milepost import ckpt, files  # noqa: E402
from milepost.ckpt import Checkpoint, saving, shard_writer  # noqa: E402, F401  (pieces: here, not in every child)
from milepost.ckpt.record import bytes_on_disk, named_tensors  # noqa: E402
from milepost.ckpt.writer import Writer  # noqa: E402

# A wait for a process that has died ends by itself only where gloo forgets it: a send to a process that has just died is
# left in a queue of which Pair::signalException (gloo/transport/tcp/pair.cc) tells nobody.
FORGOTTEN = datetime.timedelta(minutes=3)
UNEVEN = 7  # rows: four and three
SIZES = {"vocab_size": 11, "block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 8}


def shared(one: Checkpoint, group: dist.ProcessGroup) -> Checkpoint:
    """The record as the processes of `group` share it: each has some of the rows of every tensor,
    and all have the scalars.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def part(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor.clone(), mesh, [Shard(0)]) if tensor.dim() else tensor.clone()

    optimizer = one.optimizer_state
    if optimizer is not None:
        state = {
            index: {kind: part(value) for kind, value in kinds.items()} for index, kinds in optimizer["state"].items()
        }
        optimizer = {**optimizer, "state": state}
    weights = {name: part(tensor) for name, tensor in one.model_state.items()}
    return dataclasses.replace(one, model_state=weights, optimizer_state=optimizer, shared_by=group)


def save(one: Checkpoint, folder: Path, *, background: bool = False, best: bool = False) -> Path | None:
    """One save, as a run makes it; returns its path on the process that leads."""
    paths = []

    def job(copy: Checkpoint) -> None:
        if dist.get_rank():
            ckpt.follow(copy)
            return
        with ckpt.leading(copy):
            paths.append(ckpt.save(copy, folder, layout="sharded"))
            if best:
                ckpt.keep_best(copy, folder, saved=None, layout="sharded")
                ckpt.keep_best(copy, folder, saved=paths[0], layout="sharded")

    writer = Writer(background=background, free_memory=lambda: None, say=print)
    writer.submit(one, job)
    for _ in range(50 if background else 0):  # training's own messages, meanwhile
        total = torch.ones(())
        dist.all_reduce(total)
        assert total.item() == dist.get_world_size()
    writer.settle()
    for tensor in named_tensors(one).values():  # as training changes it
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    writer.wait()
    return paths[0] if paths else None


# ---------------------------------------------------------------------------------------------------------------------
# By torchrun, all of these once.


def made() -> dict[str, Callable[[], Checkpoint]]:
    """The records that are saved, whole; the same in every process."""
    return {
        "gpt2": lambda: gpt2_record(7, **FULL),
        "muon": lambda: gpt2_record(8, optimizer="muon"),
        "uneven": lambda: record(9, size=UNEVEN),
        "one row": lambda: record(10, size=1),
        "weights alone": lambda: record(11, optimizer_state=None),
    }


def round_trips(folder: Path, group: dist.ProcessGroup) -> dict[str, Any]:
    """Save every record, synchronously and in the background; return also `bytes_on_disk` of the first."""
    for name, make in made().items():
        for background in (False, True):
            save(shared(make(), group), folder / name / str(background), background=background)
    return {"bytes": bytes_on_disk(shared(made()["gpt2"](), group))}


def bests(folder: Path, group: dist.ProcessGroup) -> dict[str, Any]:
    """Two writes and a second name in one lead."""
    save(shared(record(3, validation_loss=2.0), group), folder / "bests", best=True)
    return {}


def full_disk(folder: Path, group: dist.ProcessGroup) -> dict[str, Any]:
    """A disk that is full for the second process only (of four, for all but the first), then one that is full before
    anything is written, then a disk with space.
    """
    write, problem, seen = files.NewFile.write, saving.free_space_problem, []

    def refused(self: files.NewFile, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for where in ("second", "first", "nowhere"):
        if where == "second" and dist.get_rank():
            files.NewFile.write = refused  # type: ignore[method-assign]
        if where == "first":
            saving.free_space_problem = lambda folder, *, need: "full"
        try:
            save(shared(record(4), group), folder / "full disk")
            seen.append("saved")
        except OSError as error:
            seen.append([error.errno, str(error)])
        files.NewFile.write, saving.free_space_problem = write, problem  # type: ignore[method-assign]
        dist.barrier()
        seen.append(sorted(path.name for path in (folder / "full disk").iterdir() if path.name != ".lock"))
        dist.barrier()
    return {"seen": seen}


def by_columns(folder: Path, group: dist.ProcessGroup) -> dict[str, Any]:
    """A tensor that is sharded along another dimension than its first, which the index cannot express."""
    one, seen = shared(record(4), group), "saved"
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    one.model_state = {name: distribute_tensor(torch.ones(8, 8), mesh, [Shard(1)]) for name in one.model_state}
    try:
        save(one, folder / "columns")
    except NotImplementedError as error:
        seen = str(error)
    dist.barrier()
    return {"seen": seen, "left": [path.name for path in (folder / "columns").iterdir() if path.name != ".lock"]}


def bad_numbers(folder: Path, group: dist.ProcessGroup) -> dict[str, Any]:
    """A tensor with NaN in a row of the second process."""
    one = shared(gpt2_record(5), group)
    good = ckpt.not_finite(one)
    if dist.get_rank() == 1:
        one.model_state["wpe.weight"].to_local()[-1, 0] = float("nan")
    return {"good": good, "bad": ckpt.not_finite(one), "own": ckpt.tensors.not_finite(one.model_state)}


def trained(folder: Path, group: dist.ProcessGroup) -> dict[str, Any]:
    """A model that fully_shard has sharded, after one update; its full tensors come from torch's own gathering."""
    torch.manual_seed(1)
    model = models.build("gpt2", SIZES)
    for block in model.h:
        fully_shard(block)
    fully_shard(model)
    updates = torch.optim.AdamW(list(model.named_parameters()), lr=0.01)
    ids = torch.arange(12).reshape(2, 6) % 11
    model(ids, ids)[1].backward()
    updates.step()
    state = updates.state_dict()
    one = dataclasses.replace(
        gpt2_record(6), model_state=model.state_dict(), optimizer_state=state, model_settings=SIZES, shared_by=group
    )
    whole = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in named_tensors(one).items()
    }
    if not dist.get_rank():
        torch.save(whole, folder / "trained.pt")
    save(one, folder / "trained", background=True)
    return {}


def together(folder: Path) -> None:
    """Run each of the above and return its result."""
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    seen = {
        each.__name__: each(folder, group) for each in (round_trips, bests, full_disk, by_columns, bad_numbers, trained)
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Side by side, one of which is killed.


def child(rank: str, killed: str, number: str, mode: str, store: str, folder: str) -> None:
    """Save step 2 collectively; print `saved`, or `failed` with the error, or `forgotten` after FORGOTTEN."""
    torch.set_num_threads(1)
    # Not by init_method, a URL, which takes no `?` or `#` of a path for what it is.
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=int(rank), world_size=2, timeout=FORGOTTEN)
    one = shared(of_step(2), dist.new_group(backend="gloo", timeout=FORGOTTEN))
    if rank == killed:
        killed_before(int(number))
    try:
        save(one, Path(folder), background=mode == "background")
        say("saved")
    except Exception as error:
        say("forgotten" if "Timed out" in str(error) else "failed", type(error).__name__)
    os._exit(0)


def main() -> None:
    """A child for each line, and how it ended."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(*shlex.split(line))
        say("ended", os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    together(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
