"""What several devices can be expected to do, on paper: arithmetic, memory, communication, and how often to save. Nothing is measured here.

n devices are `machines` times `devices`. Times are in seconds, sizes in bytes, rates per second. docs/scaling.md explains the formulas.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

BYTES = 4  # of a weight, of its gradient and of each of AdamW's two moments: all are kept in float32
BACKWARD = 2 / 3  # of a step's arithmetic: two products for each one of the forward pass


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal machines of equal devices, and what each of them does in a second."""

    machines: int
    devices: int  # of each machine
    flops: float  # FLOP/s that a device reaches
    memory: float  # bytes of a device
    within: float  # bytes/s that a device sends to the others of its machine
    between: float  # bytes/s that a machine sends to the others
    copy: float  # bytes/s from a device to main memory
    disk: float  # bytes/s that a machine writes
    machine_mtbf: float  # mean seconds between failures of one machine

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.machines * self.devices

    @property
    def mtbf(self) -> float:
        """Mean seconds until any of the machines fails; failures are taken for independent, and each stops the training."""
        return self.machine_mtbf / self.machines


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training and one step of it on one device."""

    weights: int  # of the model
    trained: int  # of these, those that learn
    root: int  # of these, those that stand in no block
    block: int  # of these, those of one block
    flops_per_token: float
    tokens: int  # of one device and micro-batch
    micro_batches: int
    activations: int  # bytes of a micro-batch


class Way(NamedTuple):
    """One of the two ways to share the work, and what it costs."""

    name: str
    sent: float  # bytes that pass by in a step
    memory: float  # bytes of a device
    seconds: tuple[float, float]  # of a step: with all hidden that can be, with nothing hidden
    fits: bool


class Saving(NamedTuple):
    """One way to save, in seconds: what a save costs training, when its last byte is written, how often to, and the share of time lost."""

    together: bool
    background: bool
    cost: float
    write: float
    interval: float
    lost: float


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic and memory.


def flops_per_token(*, weights: int, trained: int, layers: int, width: int, context: int) -> float:
    """Operations that a token costs in training: 6 N + 12 L C T.

    6 N is of Kaplan et al. 2020 (arXiv 2001.08361, section 2.1), attention's part as Chowdhery et al. 2022 count it (PaLM, arXiv 2204.02311,
    appendix B), its masked half too. Each of the N weights that are multiplied (`weights`: all but positions) costs 2 operations forward,
    2 for the gradient of its input, and 2 for its own if it is among the `trained` ones.
    """
    return 4 * weights + 2 * trained + 12 * layers * width * context


def compute_seconds(step: Step, cluster: Cluster) -> float:
    """Of the arithmetic of a step."""
    return step.flops_per_token * step.tokens * step.micro_batches / cluster.flops


def ddp_memory(step: Step) -> float:
    """Bytes that each device needs when it holds the whole model: weights, and of trained ones gradients and AdamW's two moments."""
    return BYTES * (step.weights + 3 * step.trained) + step.activations


def fsdp_memory(step: Step, devices: int) -> float:
    """Bytes that each of `devices` needs when it holds a part of every weight, gradient and moment (ZeRO's third stage).

    Beside these there are whole: the weights outside the blocks, and of two blocks, one at work and one on its way; and, while micro-batches
    add up, all gradients, which are summed over the processes only in the last.
    """
    parts = step.weights + 2 * step.trained
    gradients = step.trained / devices if step.micro_batches == 1 else step.trained
    return BYTES * (parts / devices + gradients + step.root + 2 * step.block) + step.activations


# ---------------------------------------------------------------------------------------------------------------------
# Communication.


def pass_bytes(size: float, cluster: Cluster) -> tuple[float, float]:
    """What one all-gather or reduce-scatter of `size` bytes sends: from each device inside its machine, from each machine to others.

    On two levels, of d devices and m machines: (d - 1) / d of the bytes and (m - 1) / m of them. A ring within one level sends exactly this
    (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms"); an all-reduce is both passes, 2 (n - 1) / n.
    """
    within = size * (cluster.devices - 1) / cluster.devices
    between = size * (cluster.machines - 1) / cluster.machines
    return within, between


def pass_seconds(size: float, cluster: Cluster) -> float:
    """Of one such pass, one level after the other; what a message costs besides its bytes is left out."""
    within, between = pass_bytes(size, cluster)
    return within / cluster.within + between / cluster.between


def ddp_bytes(step: Step) -> float:
    """Bytes that pass by in a step when every device holds the whole model: the gradients' all-reduce, two passes, once a step."""
    return 2 * BYTES * step.trained


def fsdp_bytes(step: Step) -> float:
    """The same when each device holds a part: weights gathered for each forward and each backward pass, gradients scattered once a step.

    With one micro-batch 3 passes over the model, half as much again as DDP (Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054, section 7), but
    for the weights outside the blocks: fully_shard leaves those whole from a forward pass to its backward pass.
    """
    gathered = 2 * step.weights - step.root
    return BYTES * (step.micro_batches * gathered + step.trained)


def exposed(communication: float, beside: float) -> tuple[float, float]:
    """Seconds that a step grows by: at best, all that fits beside `beside` seconds of arithmetic being hidden; at worst, nothing hidden."""
    return max(0.0, communication - beside), communication


def enough_tokens(cluster: Cluster) -> float:
    """Tokens of a device and micro-batch from which arithmetic can hide all communication; the model's size falls out.

    DDP sends 8 N bytes beside the backward pass, 4 N operations a token; FSDP up to 12 N beside the whole step, 6 N. Both make
    2 F ((d - 1) / (d B_within) + (m - 1) / (m B_between)), attention's operations left out.
    """
    return 2 * cluster.flops * pass_seconds(1.0, cluster)


def ways(step: Step, cluster: Cluster) -> tuple[Way, Way]:
    """DDP, which hides its sums beside the last micro-batch's backward pass, and FSDP, which hides what it gathers beside everything."""
    compute = compute_seconds(step, cluster)
    made = []
    for name, sent, memory, beside in (
        ("ddp", ddp_bytes(step), ddp_memory(step), compute * BACKWARD / step.micro_batches),
        ("fsdp", fsdp_bytes(step), fsdp_memory(step, cluster.size), compute),
    ):
        best, worst = exposed(pass_seconds(sent, cluster), beside)
        made.append(Way(name, sent, memory, (compute + best, compute + worst), memory <= cluster.memory))
    return made[0], made[1]


def chosen(both: tuple[Way, Way], cluster: Cluster, wish: str) -> Way:
    """What DISTRIBUTED=`wish` takes; of itself the whole model on each device where that fits. One device has nothing to share."""
    ddp, fsdp = both
    if cluster.size == 1 or wish == "ddp":
        return ddp
    return fsdp if wish == "fsdp" or not ddp.fits else ddp


def fewer(step: Step, cluster: Cluster) -> Iterator[tuple[Step, Cluster]]:
    """The same training on 1, 2, 4, ... devices and on all: the same rows of a device at a time, more micro-batches."""
    shapes = [(1, devices) for devices in _powers(cluster.devices)]
    shapes += [(machines, cluster.devices) for machines in _powers(cluster.machines)]
    for machines, devices in dict.fromkeys([*shapes, (cluster.machines, cluster.devices)]):
        part = dataclasses.replace(cluster, machines=machines, devices=devices)
        yield dataclasses.replace(step, micro_batches=step.micro_batches * (cluster.size // part.size)), part


def _powers(count: int) -> list[int]:
    """Powers of two that divide `count`."""
    return [2**power for power in range(count.bit_length()) if count % 2**power == 0]


# ---------------------------------------------------------------------------------------------------------------------
# Saving and failing.


def young_interval(cost: float, mtbf: float) -> float:
    """Seconds between saves that lose least time, if each costs `cost` seconds of training: sqrt(2 cost mtbf).

    Young 1974, "A first order approximation to the optimum checkpoint interval", Communications of the ACM 17(9).
    """
    return math.sqrt(2 * cost * mtbf)


def lost_share(interval: float, *, cost: float, delay: float, restart: float, mtbf: float) -> float:
    """Share of the time that saves and failures take, to first order: cost / T + (T / 2 + delay + restart) / M.

    A failure loses half an interval on average, the `delay` seconds until what was saved last is whole on the disk, and `restart`. From 1 on
    there is no progress.
    """
    return cost / interval + (interval / 2 + delay + restart) / mtbf


def savings(state: float, cluster: Cluster, way: Way, *, restart: float) -> list[Saving]:
    """A checkpoint of `state` bytes saved by one process and by all together, each in the background and with training waiting.

    In the background training waits for the copy alone, and at most that: it is made beside the next pass. With FSDP one process must
    first be sent what the others hold. The next save waits for the one before, so no interval is shorter than a write.
    """
    gathering = pass_seconds(state, cluster) if way.name == "fsdp" else 0.0
    alone = gathering + state / cluster.copy, state / cluster.disk
    together = state / cluster.size / cluster.copy, state / cluster.machines / cluster.disk
    made = []
    for by_all, (copy, write) in ((False, alone), (True, together)):
        for background in (True, False):
            cost, delay = (copy, write) if background else (copy + write, 0.0)
            interval = max(young_interval(cost, cluster.mtbf), delay)
            lost = lost_share(interval, cost=cost, delay=delay, restart=restart, mtbf=cluster.mtbf)
            made.append(Saving(by_all, background, cost, write, interval, lost))
    return made
