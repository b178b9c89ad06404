"""training.py as torchrun starts it, with what a test wants to go wrong; its process numbers are told in a folder.

WORKER_PIDS: a folder where each process leaves a file named by its rank that holds its number, and when it ends by
itself, whatever
    its exit code, another one named {rank}.code.
WORKER_FAULT: "RANK:STEP" kills that process before it learns from the batch of that step, the first time it is started;
    "RANK:STEP:update" when it has told a direction of that step's update by muon, and others wait for the next.
WORKER_LATE: "lock" or "report": a signal comes, as from torchrun, when a process that lost another gives its lock free
or says so. WORKER_MEMORY: bytes that each device seems to have. WORKER_OTHER: "NAME=value" that the second process
finds in its environment, as if it were on another machine.
WORKER_FLIP: "RANK:STEP:batch" changes a token of that step in that process, the first time that the step is taken;
"RANK:STEP:weight" flips a bit of a weight there for good, before the update; "RANK:STEP:evaluation" while it evaluates
after that step.
WORKER_PUTS: a folder where each process notes the objects that it writes into a mirror, in {rank}.puts.
"""

import atexit
import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "training.py"
sys.path.insert(0, str(ROOT))

from milepost import cli  # noqa: E402
from milepost.locks import RunLock  # noqa: E402
from milepost.runtime import hardware  # noqa: E402
from milepost.runtime.distributed import World  # noqa: E402
from milepost.text.batches import Batches  # noqa: E402

rank = os.environ["RANK"]
if rank == "1" and (other := os.environ.get("WORKER_OTHER")):
    name, _, value = other.partition("=")
    os.environ[name] = value
if folder := os.environ.get("WORKER_PIDS"):
    (Path(folder) / rank).write_text(str(os.getpid()), encoding="utf-8")
    end = os._exit

    def ended(code: object) -> None:
        (Path(str(folder)) / f"{rank}.code").write_text(str(code), encoding="utf-8")
        end(code)

    os._exit = ended  # where a training ends that lost another process
    atexit.register(lambda: (Path(str(folder)) / f"{rank}.code").write_text("", encoding="utf-8"))  # and any other

if late := os.environ.get("WORKER_LATE"):
    where, name = {"lock": (RunLock, "release"), "report": (cli, "report")}[late]
    action = getattr(where, name)

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return action(*arguments)

    setattr(where, name, signalled)

if noted := os.environ.get("WORKER_PUTS"):
    from milepost.mirror import Store

    plain_put = Store.put

    def noted_put(store, name, *arguments, **named):
        with open(Path(noted) / f"{rank}.puts", "a", encoding="utf-8") as file:
            file.write(f'"{name}",')
        plain_put(store, name, *arguments, **named)

    Store.put = noted_put

if memory := os.environ.get("WORKER_MEMORY"):
    hardware.all_memory = lambda _: int(memory)

if fault := os.environ.get("WORKER_FAULT"):
    its_rank, its_step, *place = fault.split(":")
    at, tell, first_time = Batches.at, World.broadcast_tensor, os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    asked, spoken = [], []

    def fatal(self, step):
        asked.append(step)
        # The estimate of a run's length looks at the first batch, too.
        if first_time and rank == its_rank and step == int(its_step) and max(asked[:-1]) < step:
            spoken.append("not yet")
            if not place:
                os.kill(os.getpid(), signal.SIGKILL)
        return at(self, step)

    def fatal_in_between(self, tensor, source):
        spoken.extend(["once"] if spoken else [])
        if len(spoken) > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return tell(self, tensor, source)

    Batches.at = fatal
    if place:
        World.broadcast_tensor = fatal_in_between

if asked_to_save := os.environ.get("WORKER_SAVE"):
    saving_rank, saving_step = asked_to_save.split(":")
    plain_at = Batches.at

    def signalled_at(self, step):
        if rank == saving_rank and step == int(saving_step):
            os.kill(os.getpid(), signal.SIGUSR1)
        return plain_at(self, step)

    Batches.at = signalled_at

if flip := os.environ.get("WORKER_FLIP"):
    import torch

    from milepost.runtime import optim
    from milepost.text import batches

    its_rank, its_step, place = flip.split(":")
    right_at, norm, windows = Batches.at, optim.gradient_norm, batches.validation_windows
    seen, weights, flipped = [], [], []

    def fault(where):
        now = rank == its_rank and where == place and seen and seen[-1] == int(its_step) - 1 and not flipped
        flipped.extend([where] * bool(now))
        return now

    def flipped_at(self, step):
        seen.append(step)
        x, y = right_at(self, step)
        if fault("batch"):
            x[0, 0, 0] ^= 1
        return x, y

    def flip_weight():
        optim.local(weights[-1]).detach().view(-1).view(torch.int32)[3] ^= 1 << 20

    def noted_norm(optimizer):
        weights.append(optimizer.param_groups[0]["params"][0])
        if fault("weight"):
            flip_weight()
        return norm(optimizer)

    def noted_windows(*arguments, **sizes):
        if fault("evaluation"):
            flip_weight()
        return windows(*arguments, **sizes)

    Batches.at, optim.gradient_norm, batches.validation_windows = flipped_at, noted_norm, noted_windows

sys.argv = [str(SCRIPT)]
runpy.run_path(str(SCRIPT), run_name="__main__")
