"""milepost/runtime/scaling.py: each formula against values worked by hand, a count of what really happens, or the function that it minimises."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from drive import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import models
from milepost.runtime import scaling
from milepost.runtime.scaling import Cluster, Step

CLUSTER = Cluster(
    machines=4, devices=8, flops=1e14, memory=16e9, within=1e11, between=1e10, copy=1e10, disk=1e9, machine_mtbf=4e6
)
STEP = Step(
    weights=1000, trained=1000, root=400, block=100, flops_per_token=6000.0, tokens=50, micro_batches=1, activations=7
)
SIZES = {"vocab_size": 64, "block_size": 16, "n_layer": 3, "n_head": 2, "n_embd": 32, "bias": False}


def on(machines: int, devices: int) -> Cluster:
    return dataclasses.replace(CLUSTER, machines=machines, devices=devices)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic and memory.


def test_operations_are_those_that_pytorch_counts():
    """All of a step's matrix products, forward and backward; norms, which are no products, are 0.5 % of the weights here."""
    model = models.build("gpt2", SIZES)
    x, y = torch.randint(64, (2, 5, 16))
    with FlopCounterMode(display=False) as counter:
        model(x, y)[1].backward()
    products = sum(
        weight.numel() for name, weight in model.named_parameters() if weight.dim() == 2 and name != "wpe.weight"
    )
    counts = {"layers": 3, "width": 32, "context": 16}
    exact = scaling.flops_per_token(weights=products, trained=products, **counts)
    assert counter.get_total_flops() == exact * 5 * 16
    all_but_positions = models.parameter_count(model) - 16 * 32
    said = scaling.flops_per_token(weights=all_but_positions, trained=all_but_positions, **counts)
    assert 1 < said / exact < 1.01
    assert scaling.flops_per_token(weights=100, trained=10, layers=2, width=3, context=4) == 400 + 20 + 288


def test_a_frozen_base_costs_a_third_less_at_most():
    whole, frozen = (scaling.flops_per_token(weights=900, trained=n, layers=1, width=1, context=0) for n in (900, 0))
    assert frozen / whole == pytest.approx(2 / 3)


def test_memory_of_ddp_is_what_a_run_is_warned_with():
    for frozen in (False, True):
        model = models.build("gpt2", SIZES | {"lora": {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "c_attn"}})
        if frozen:
            models.freeze_base(model)
        activations = model.activation_bytes(5, bytes_per_value=2)
        one = dataclasses.replace(
            STEP, weights=models.parameter_count(model), trained=models.trained_count(model), activations=activations
        )
        assert scaling.ddp_memory(one) == models.training_bytes(model, 5, bytes_per_value=2)


def test_memory_of_fsdp():
    assert scaling.fsdp_memory(STEP, 1) == 16 * 1000 + 4 * (400 + 200) + 7
    assert scaling.fsdp_memory(STEP, 10) == 16 * 100 + 4 * (400 + 200) + 7
    added_up = dataclasses.replace(STEP, micro_batches=2)
    assert scaling.fsdp_memory(added_up, 10) - scaling.fsdp_memory(STEP, 10) == 4 * (1000 - 100)  # whole gradients


# ---------------------------------------------------------------------------------------------------------------------
# Communication.


def ring(parts: np.ndarray, sent: list[int]) -> np.ndarray:
    """A ring's all-reduce of the rows of `parts`, a chunk at a time to the next; `sent` grows by what each sends."""
    n = len(parts)
    chunks = [np.array_split(row.copy(), n) for row in parts]
    for phase in ("scatter", "gather"):
        for turn in range(n - 1):
            first = 0 if phase == "scatter" else 1
            moving = [(i, (i + first - turn) % n) for i in range(n)]
            values = [chunks[i][c].copy() for i, c in moving]
            for (i, c), value in zip(moving, values, strict=True):
                to = (i + 1) % n
                chunks[to][c] = chunks[to][c] + value if phase == "scatter" else value
                sent[i] += value.size
    return np.array([np.concatenate(row) for row in chunks])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_an_all_reduce_sends_what_a_ring_sends(n):
    parts, sent = np.random.default_rng(0).integers(0, 100, (n, 120)), [0] * n
    assert (ring(parts, sent) == parts.sum(0)).all()
    assert {2 * scaling.pass_bytes(120, on(1, n))[0]} == set(sent)
    assert scaling.pass_bytes(120, on(1, n))[1] == 0


def test_two_levels_send_what_they_are_said_to():
    """Scattered inside each machine, summed between equal places of all machines, gathered inside."""
    machines, devices, size = 3, 4, 120
    parts = np.random.default_rng(0).integers(0, 100, (machines, devices, size))
    within, between = [0] * machines * devices, [0] * machines
    scattered = np.empty((machines, devices, size // devices), dtype=int)
    for machine in range(machines):
        for device, chunk in enumerate(np.split(parts[machine], devices, axis=1)):
            scattered[machine, device] = chunk.sum(0)  # d - 1 chunks come here, so each device sends as many
            within[machine * devices + device] += (devices - 1) * chunk.shape[1]
    for device in range(devices):
        sent = [0] * machines
        scattered[:, device] = ring(scattered[:, device], sent)
        between = [a + b for a, b in zip(between, sent, strict=True)]
    within = [count + (devices - 1) * size // devices for count in within]  # and on to the others
    assert (np.concatenate(list(scattered[0])) == parts.sum((0, 1))).all()
    said = [2 * each for each in scaling.pass_bytes(size, on(machines, devices))]
    assert (set(within), set(between)) == ({said[0]}, {said[1]})


FULLY_SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
import models

class Counted(TorchDispatchMode):
    bytes = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(("c10d._allgather_base_", "c10d._reduce_scatter_base_")):
            self.bytes += max(args[0].nbytes, args[1].nbytes)
        return function(*args, **(kwargs or {}))

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
model = models.build("gpt2", {sizes})
blocks = [models.parameter_count(block) for block in model.h]
for each in (*model.h, model):
    fully_shard(each, mesh=init_device_mesh("cpu", (4,)))
ids = torch.randint(64, (2, 16))
for micro_batches in (1, 3):
    with Counted() as counted:
        for number in range(micro_batches):
            model.set_requires_gradient_sync(number == micro_batches - 1)
            model(ids, ids)[1].backward()
    print(counted.bytes)
"""


def test_fsdp_gathers_and_scatters_what_pytorch_does():
    """The collectives of `fully_shard` itself, among four processes of which three are imagined."""
    code = FULLY_SHARDED.replace("{sizes}", repr(SIZES))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    model = models.build("gpt2", SIZES)
    weights, block = models.parameter_count(model), models.parameter_count(model.h[0])
    one = dataclasses.replace(STEP, weights=weights, trained=weights, root=weights - 3 * block, block=block)
    said = [scaling.fsdp_bytes(dataclasses.replace(one, micro_batches=number)) for number in (1, 3)]
    assert [float(line) for line in done.stdout.split()] == said


def test_zero_sends_half_as_much_again():
    """Where nothing stands outside the blocks (Rajbhandari et al. 2020)."""
    assert scaling.fsdp_bytes(dataclasses.replace(STEP, root=0)) / scaling.ddp_bytes(STEP) == 1.5


def test_both_levels_take_their_time():
    within, between = 800 * 7 / 8, 800 * 3 / 4
    assert scaling.pass_seconds(800, CLUSTER) == pytest.approx(within / 1e11 + between / 1e10)
    assert scaling.pass_seconds(800, on(1, 1)) == 0


@pytest.mark.parametrize(
    ("communication", "beside", "said"), [(3.0, 5.0, (0.0, 3.0)), (5.0, 3.0, (2.0, 5.0)), (0.0, 1.0, (0.0, 0.0))]
)
def test_what_is_exposed(communication, beside, said):
    assert scaling.exposed(communication, beside) == said


def test_from_enough_tokens_on_all_is_hidden_whatever_the_model():
    enough = scaling.enough_tokens(CLUSTER)
    assert enough == pytest.approx(2 * 1e14 * (7 / 8 / 1e11 + 3 / 4 / 1e10))
    for weights in (10**6, 10**9):
        step = dataclasses.replace(STEP, weights=weights, trained=weights, root=0, flops_per_token=6.0 * weights)
        for tokens, hidden in ((math.ceil(enough), True), (int(0.99 * enough), False)):
            for way in scaling.ways(dataclasses.replace(step, tokens=tokens), CLUSTER):
                compute = scaling.compute_seconds(dataclasses.replace(step, tokens=tokens), CLUSTER)
                assert math.isclose(way.seconds[0], compute, rel_tol=1e-9) is hidden
                assert way.seconds[1] > compute


def test_only_the_last_micro_batch_hides_the_sums_of_ddp():
    tokens = math.ceil(scaling.enough_tokens(CLUSTER))
    step = dataclasses.replace(STEP, root=0, tokens=tokens // 4 + 1, micro_batches=4)
    ddp, fsdp = scaling.ways(step, CLUSTER)
    compute = scaling.compute_seconds(step, CLUSTER)
    assert ddp.seconds[0] == pytest.approx(
        compute + 3 / 4 * scaling.pass_seconds(scaling.ddp_bytes(step), CLUSTER), rel=1e-3
    )
    assert fsdp.seconds[0] > compute  # which gathers for each of them


def test_what_distributed_takes():
    for memory, wish, name in ((1e9, "auto", "ddp"), (1, "auto", "fsdp"), (1, "ddp", "ddp"), (1e9, "fsdp", "fsdp")):
        cluster = dataclasses.replace(CLUSTER, memory=memory)
        assert scaling.chosen(scaling.ways(STEP, cluster), cluster, wish).name == name
    alone = dataclasses.replace(on(1, 1), memory=1)
    assert scaling.chosen(scaling.ways(STEP, alone), alone, "fsdp").name == "ddp"


@pytest.mark.parametrize(
    ("machines", "devices", "sizes"),
    [(1, 8, [1, 2, 4, 8]), (2, 6, [1, 2, 6, 12]), (1, 1, [1]), (3, 5, [1, 5, 15]), (8, 1, [1, 2, 4, 8])],
)
def test_fewer_devices_take_the_same_steps(machines, devices, sizes):
    found = list(scaling.fewer(STEP, on(machines, devices)))
    assert [part.size for _, part in found] == sizes
    assert {step.tokens * step.micro_batches * part.size for step, part in found} == {50 * machines * devices}
    assert {step.tokens for step, _ in found} == {50}


# ---------------------------------------------------------------------------------------------------------------------
# Saving and failing.


@given(st.floats(1e-3, 1e3), st.floats(1e4, 1e8), st.floats(0, 1e3), st.floats(0, 1e3))
def test_youngs_interval_loses_least(cost, mtbf, delay, restart):
    """Of all intervals, by the share of time that is lost."""
    best = scaling.young_interval(cost, mtbf)
    lost = [
        scaling.lost_share(best * factor, cost=cost, delay=delay, restart=restart, mtbf=mtbf)
        for factor in (0.5, 0.99, 1, 1.01, 2)
    ]
    assert min(lost) == lost[2]


@pytest.mark.parametrize(("hours", "minutes"), [(24, 117), (6, 57)])
def test_young_agrees_with_dalys_figures(hours, minutes):
    """Daly 2006, figures 3 and 4: dumps of 5 minutes; his refinement takes the dump itself off, and adds a few percent."""
    young = scaling.young_interval(300, 3600 * hours)
    assert young - 300 == pytest.approx(60 * minutes, rel=0.04)
    ratio = 300 / (2 * 3600 * hours)
    assert young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - 300 == pytest.approx(60 * minutes, abs=30)


def test_the_lost_share_is_what_a_simulation_loses():
    """Work in pieces of T, each followed by a save of `cost`; failures at random moments, each setting back to the last save."""
    draw, mtbf, cost, restart, interval = np.random.default_rng(0), 20000.0, 10.0, 60.0, 600.0
    wall = useful = 0.0
    while useful < 3e7:
        left = draw.exponential(mtbf)
        pieces = int(left // (interval + cost))
        useful += pieces * interval
        wall += left + restart
    lost = scaling.lost_share(interval, cost=cost, delay=0, restart=restart, mtbf=mtbf)
    assert 1 - useful / wall == pytest.approx(lost, rel=0.05)


def test_a_delayed_save_loses_its_delay_too():
    shares = [scaling.lost_share(100, cost=1, delay=delay, restart=0, mtbf=1e4) for delay in (0, 30)]
    assert shares[1] - shares[0] == pytest.approx(30 / 1e4)


def test_the_ways_to_save():
    way = scaling.ways(STEP, CLUSTER)[1]  # fsdp
    alone, alone_waiting, together, together_waiting = scaling.savings(32e9, CLUSTER, way, restart=60)
    gathering = scaling.pass_seconds(32e9, CLUSTER)
    assert (alone.cost, alone.write) == (pytest.approx(gathering + 3.2), 32)
    assert (together.cost, together.write) == (pytest.approx(0.1), 8)
    assert (alone_waiting.cost, together_waiting.cost) == (pytest.approx(gathering + 35.2), pytest.approx(8.1))
    assert alone.interval == pytest.approx(math.sqrt(2 * alone.cost * 1e6))
    assert together.lost < together_waiting.lost < alone_waiting.lost
    plain = scaling.savings(32e9, CLUSTER, scaling.ways(STEP, CLUSTER)[0], restart=60)[0]
    assert plain.cost == pytest.approx(3.2)  # ddp: nothing to gather


def test_no_save_begins_before_the_last_one_is_written():
    slow = dataclasses.replace(CLUSTER, disk=1e6, machine_mtbf=4e5)
    in_background, waiting, *_ = scaling.savings(32e9, slow, scaling.ways(STEP, slow)[0], restart=0)
    assert in_background.interval == in_background.write == 32000
    assert waiting.interval == pytest.approx(math.sqrt(2 * 32003.2 * 1e5))
    assert CLUSTER.mtbf == 1e6
