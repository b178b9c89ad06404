"""Learning rates as a pure function of the step, and optimizers that do what the papers say to the right parameters."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from work import Waits

import models
from milepost.runtime import muon
from milepost.runtime import optim as optim_module
from milepost.runtime.muon import Muon, MuonWithAdamW, orthogonalised
from milepost.runtime.optim import build_optimizer, clip_gradients, gradient_norm
from milepost.runtime.schedule import SCHEDULES, Schedule, lr_at, replan
from models.model import Model


def schedule(kind: str = "cosine", **changes: float) -> Schedule:
    """Peak 1, no floor, no warm-up, ten steps from 0; `changes` on top."""
    values = {"peak": 1.0, "floor": 0.0, "warmup_steps": 0, "start_step": 0, "end_step": 10} | changes
    return Schedule(kind=kind, **values)  # type: ignore[arg-type]


def rates(plan: Schedule, steps: range) -> list[float]:
    return [lr_at(step, plan) for step in steps]


# Learning rates, by hand

BY_HAND = [
    ("constant", {}, [1.0] * 10),
    ("constant", {"warmup_steps": 3}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
    ("linear", {}, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ("linear", {"floor": 0.5, "warmup_steps": 1, "end_step": 5}, [0.5, 1.0, 0.875, 0.75, 0.625]),
    ("cosine", {"end_step": 4}, [1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2]),
    ("cosine", {"end_step": 6, "warmup_steps": 2, "floor": 0.2}, [1 / 3, 2 / 3, 1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5)]),
    ("wsd", {}, [1.0] * 9 + [0.5]),
    ("wsd", {"end_step": 20}, [1.0] * 17 + [0.75, 0.5, 0.25]),
    ("wsd", {"end_step": 10, "floor": 0.1, "peak": 0.5}, [0.5] * 9 + [0.3]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "expected"), BY_HAND)
def test_rates_computed_by_hand(kind, changes, expected):
    plan = schedule(kind, **changes)
    assert rates(plan, range(plan.end_step)) == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(
    peak=st.floats(1e-6, 1), share=st.floats(0, 1), warmup=st.integers(0, 50), more=st.integers(1, 500), data=st.data()
)
def test_cosine_is_nanogpts_get_lr(peak, share, warmup, more, data):
    """nanoGPT's train.py: a linear warm-up, then a cosine down to min_lr at lr_decay_iters."""
    minimum, decay_iters = peak * share, warmup + more
    it = data.draw(st.integers(0, decay_iters - 1))

    if it < warmup:
        expected = peak * (it + 1) / (warmup + 1)
    else:
        ratio = (it - warmup) / (decay_iters - warmup)
        expected = minimum + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (peak - minimum)

    plan = schedule("cosine", peak=peak, floor=minimum, warmup_steps=warmup, end_step=decay_iters)
    assert lr_at(it, plan) == pytest.approx(expected, rel=1e-9, abs=1e-18)


PLANS = st.builds(
    Schedule,
    kind=st.sampled_from(sorted(SCHEDULES)),
    peak=st.floats(1e-8, 10),
    floor=st.just(0.0),
    warmup_steps=st.integers(0, 300),
    start_step=st.integers(0, 10**6),
    end_step=st.integers(10**6 + 1, 2 * 10**6),
)


@settings(deadline=None)
@given(PLANS, st.integers(0, 3 * 10**6))
def test_no_rate_is_ever_zero_or_above_the_peak(plan, step):
    step = max(step, plan.start_step)
    assert 0 < lr_at(step, plan) <= plan.peak
    assert lr_at(plan.end_step - 1, plan) > 0


@settings(deadline=None)
@given(PLANS, st.integers(0, 10**7))
def test_past_the_plan_its_last_rate_is_held(plan, more):
    assert lr_at(plan.end_step + more, plan) == lr_at(plan.end_step - 1, plan)


@settings(deadline=None)
@given(PLANS, st.data())
def test_a_rate_depends_only_on_the_position_in_the_schedule(plan, data):
    at = data.draw(st.integers(0, plan.total - 1))
    same = schedule(plan.kind, peak=plan.peak, warmup_steps=plan.warmup_steps, end_step=plan.total)
    assert lr_at(plan.start_step + at, plan) == lr_at(at, same)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_after_the_warm_up_the_rate_never_rises(kind):
    after = rates(schedule(kind, warmup_steps=7, end_step=2000), range(7, 2010))
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("warmup", "end"), [(0, 1), (1, 1), (5, 5), (9, 5)])
def test_plans_of_one_step_and_plans_all_warm_up_have_rates(kind, warmup, end):
    plan = schedule(kind, warmup_steps=warmup, end_step=end)
    expected = [(step + 1) / (warmup + 1) for step in range(end)] if warmup else [1.0]
    assert rates(plan, range(end)) == pytest.approx(expected)


# Planning anew


@pytest.mark.parametrize("kind", SCHEDULES)
def test_replan_is_the_same_kind_over_the_added_steps_with_the_floors_ratio(kind):
    saved = schedule(kind, peak=1e-3, floor=2.5e-4, warmup_steps=100, end_step=2000)
    plan = replan(saved, peak=4e-4, start_step=2000, steps=500, warmup_steps=0)
    assert (plan.kind, plan.peak, plan.start_step, plan.end_step, plan.warmup_steps) == (kind, 4e-4, 2000, 2500, 0)
    assert plan.floor == pytest.approx(1e-4)
    assert plan.total == 500
    assert lr_at(2000, plan) == 4e-4  # no second warm-up


def test_replan_keeps_a_floor_of_zero_at_zero_and_takes_a_warm_up_that_is_asked_for():
    plan = replan(schedule(floor=0.0), peak=0.5, start_step=10, steps=4, warmup_steps=1)
    assert plan.floor == 0
    assert lr_at(10, plan) == 0.25
    assert lr_at(11, plan) == 0.5


def test_replan_of_a_plan_without_a_rate_has_no_floor():
    assert replan(schedule(peak=0.0), peak=0.5, start_step=0, steps=4, warmup_steps=0).floor == 0


# AdamW


def gpt2() -> Model:
    torch.manual_seed(0)
    settings = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8, "dropout": 0.0, "bias": True}
    return models.build("gpt2", settings)


def bigram() -> Model:
    torch.manual_seed(0)
    return models.build("bigram", {"vocab_size": 11, "block_size": 8})


def optimizer_of(model: nn.Module, kind: str = "adamw", **changes: object) -> torch.optim.Optimizer:
    values = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99)} | changes
    return build_optimizer(model, kind, **values)  # type: ignore[arg-type]


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def names_in(groups: list[dict]) -> list[str]:
    return [name for group in groups for name in group["param_names"]]


@pytest.mark.parametrize("build", [gpt2, bigram])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(kind, build):
    model = build()
    groups = optimizer_of(model, kind, weight_decay=0.3).param_groups
    assert sorted(names_in(groups)) == sorted(name for name, _ in model.named_parameters())
    for group in groups:
        assert group["params"]
        assert {parameter.dim() >= 2 for parameter in group["params"]} == {group["weight_decay"] == 0.3}
        assert group["lr"] == 1e-2


def test_decay_moves_matrices_and_nothing_else():
    """With gradients of zero, AdamW's update is the decay alone: a matrix shrinks by lr * weight_decay."""
    model = gpt2()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_of(model, lr=0.5, weight_decay=0.2).step()
    for name, parameter in model.named_parameters():
        expected = before[name] * 0.9 if parameter.dim() >= 2 else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_are_left_out():
    model = gpt2()
    model.wte.weight.requires_grad_(False)
    assert "wte.weight" not in names_in(optimizer_of(model).param_groups)
    assert "wte.weight" not in names_in(optimizer_of(model, "muon").param_groups)


def reference_adamw(
    weight: Tensor, gradients: list[Tensor], *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> Tensor:
    """Loshchilov and Hutter 2019, algorithm 2, in float64; epsilon 1e-8."""
    weight, (beta1, beta2) = weight.double(), betas
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        gradient = gradient.double()
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        step = (mean / (1 - beta1**t)) / ((square / (1 - beta2**t)).sqrt() + 1e-8)
        weight = weight - lr * weight_decay * weight - lr * step
    return weight


@pytest.mark.parametrize("steps", [1, 5])
def test_fused_adamw_equals_a_float64_reference(steps):
    model = gpt2()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = optimizer_of(model, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    assert all(group["fused"] for group in optimizer.param_groups)
    gradients: dict[str, list[Tensor]] = {name: [] for name in before}
    for step in range(steps):
        give_gradients(model, step)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients[name].append(parameter.grad.clone())
        optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.1 if parameter.dim() >= 2 else 0.0
        wanted = reference_adamw(before[name], gradients[name], lr=3e-3, weight_decay=decay, betas=(0.9, 0.95))
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=0, atol=1e-6)


# Muon beside AdamW


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = gpt2()
    optimizer = optimizer_of(model, "muon")
    assert isinstance(optimizer, MuonWithAdamW)
    muon, adamw = optimizer.parts
    assert isinstance(muon, Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert set(names_in(muon.param_groups)) == matrices - {"wte.weight", "wpe.weight"}
    assert set(names_in(adamw.param_groups)) == {name for name, _ in model.named_parameters()} - set(
        names_in(muon.param_groups)
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_of_a_ttt_layer_only_what_multiplies_decays_and_muon_takes_the_four_projections(kind):
    settings = {"vocab_size": 9, "block_size": 4, "n_layer": 2, "n_head": 2, "n_embd": 8, "ttt": {"layers": "1"}}
    groups = optimizer_of(models.build("gpt2", settings), kind, weight_decay=0.3).param_groups
    own = {name: group for group in groups for name in group["param_names"] if ".ttt." in name}
    assert len([name for name in names_in(groups) if ".ttt." in name]) == len(own) == 19
    projections = {f"h.1.ttt.{name}.weight" for name in ("wq", "wk", "wv", "wo")}
    inner = {f"h.1.ttt.{name}" for name in ("W1", "W2", "learnable_ttt_lr_weight")}
    assert {name for name, group in own.items() if group["weight_decay"] == 0.3} == projections | inner
    assert {name for name, group in own.items() if "momentum" in group} == (projections if kind == "muon" else set())


def test_a_model_without_hidden_matrices_gets_plain_adamw():
    assert isinstance(optimizer_of(bigram(), "muon"), torch.optim.AdamW)


def reference_muon(weight: Tensor, gradients: list[Tensor], *, lr: float, weight_decay: float) -> Tensor:
    """Jordan et al. 2024 for one matrix, in float64: Nesterov momentum of 0.95, five quintic iterations,
    AdamW's size of update.
    """
    weight = weight.double()
    average = torch.zeros_like(weight)
    for gradient in gradients:
        average = 0.95 * average + 0.05 * gradient.double()
        direction = 0.05 * gradient.double() + 0.95 * average
        direction = direction / direction.norm()
        for _ in range(5):
            gram = direction @ direction.T
            direction = 3.4445 * direction + (-4.7750 * gram + 2.0315 * gram @ gram) @ direction
        weight = weight - lr * weight_decay * weight - lr * 0.2 * math.sqrt(max(weight.shape)) * direction
    return weight


def blocks_of(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices in a weight: query, key and value in attention's first."""
    return list(tensor.chunk(3)) if "c_attn" in name else [tensor]


def hidden(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if name[:2] == "h." and parameter.dim() == 2
    }


def distance(moved: Tensor, wanted: Tensor, before: Tensor) -> float:
    """How far from the wanted movement, as a share of it."""
    return float((moved.double() - wanted.double()).norm() / (wanted.double() - before.double()).norm())


# In float32 the iteration is the formula; bfloat16 (8 bits) leaves some percent, which is what torch.optim.Muon works
# with too.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("together", [muon.TOGETHER, 1])
def test_every_block_moves_as_a_float64_reference(dtype, tolerance, together, monkeypatch):
    monkeypatch.setattr(muon, "_iteration_dtype", lambda device: dtype)
    monkeypatch.setattr(muon, "TOGETHER", together)
    model = gpt2()
    before = {name: parameter.detach().clone() for name, parameter in hidden(model).items()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in before}
    optimizer = optimizer_of(model, "muon", lr=2e-3, weight_decay=0.1)
    for seed in range(3):
        give_gradients(model, seed)
        for name, parameter in hidden(model).items():
            assert parameter.grad is not None
            gradients[name].append(parameter.grad.clone())
        optimizer.step()
    assert len(before) == 8
    for name, parameter in hidden(model).items():
        for number, block in enumerate(blocks_of(name, parameter.detach())):
            start, *given = (blocks_of(name, one)[number] for one in (before[name], *gradients[name]))
            assert distance(block, reference_muon(start, given, lr=2e-3, weight_decay=0.1), start) < tolerance


def test_it_equals_torchs_muon_and_adamw_used_apart():
    """torch.optim.Muon iterates each matrix alone, in bfloat16: near. Everything else is the same AdamW: equal."""
    model, apart = gpt2(), gpt2()
    optimizer = optimizer_of(model, "muon", lr=2e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    matrices = {name: [block.detach().clone() for block in blocks_of(name, one)] for name, one in hidden(apart).items()}
    muon = torch.optim.Muon(
        [block for blocks in matrices.values() for block in blocks],
        lr=2e-3,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    tables, vectors = [apart.wte.weight, apart.wpe.weight], [one for one in apart.parameters() if one.dim() == 1]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.99), fused=True)
    for seed in range(3):
        give_gradients(model, seed)
        give_gradients(apart, seed)
        for name, parameter in hidden(apart).items():
            assert parameter.grad is not None
            for block, gradient in zip(matrices[name], blocks_of(name, parameter.grad), strict=True):
                block.grad = gradient.clone()
        for one in (optimizer, muon, adamw):
            one.step()
    for name, parameter in model.named_parameters():
        if name in matrices:
            assert distance(parameter.detach(), torch.cat(matrices[name]), before[name]) < 0.05
        else:
            assert torch.equal(parameter, apart.get_parameter(name))
            assert not torch.equal(parameter, before[name])


def conditioned(rows: int, columns: int) -> Tensor:
    """A matrix whose singular values lie between 1 and 10."""
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
    return u @ torch.diag(torch.linspace(1, 10, min(rows, columns), dtype=torch.float64)) @ v


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalised_keeps_directions_and_evens_out_sizes(shape, dtype):
    torch.manual_seed(0)
    matrices = torch.stack([conditioned(*shape), 1e-6 * conditioned(*shape)])
    for matrix, result in zip(matrices, orthogonalised(matrices, dtype).double(), strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ result @ v.T  # diagonal if the directions are kept
        sizes = inner.diagonal()
        assert sizes.min() > 0.65
        assert sizes.max() < 1.25
        assert (inner - sizes.diag()).abs().max() < (1e-4 if dtype == torch.float32 else 0.05)


def test_a_matrix_of_zeros_stays_one():
    assert not orthogonalised(torch.zeros(1, 4, 4), torch.float32).any()


def test_query_key_and_value_each_get_an_orthogonal_update():
    torch.manual_seed(0)
    model = models.build("gpt2", {"vocab_size": 5, "block_size": 4, "n_layer": 1, "n_head": 1, "n_embd": 16})
    (weight,) = [parameter for name, parameter in hidden(model).items() if "c_attn" in name]
    weight.grad = torch.cat([size * conditioned(16, 16) for size in (1, 10, 100)]).float()
    before = weight.detach().clone()
    optimizer_of(model, "muon", lr=1.0, weight_decay=0.0).step()
    for block in (before - weight.detach()).chunk(3):
        sizes = torch.linalg.svdvals(block) / (0.2 * 4)  # as of a 16 by 16 matrix
        assert sizes.min() > 0.6
        assert sizes.max() < 1.3


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: parameter.detach().numpy().tobytes() for name, parameter in model.named_parameters()}


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        give_gradients(model, seed)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_state_that_went_through_a_file_continues_bit_equal(kind):
    straight, resumed = gpt2(), gpt2()
    first = optimizer_of(straight, kind)
    stepped(straight, first, range(3))

    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    second = optimizer_of(resumed, kind)
    second.load_state_dict(saved["optimizer"])

    stepped(straight, first, range(3, 6))
    stepped(resumed, second, range(3, 6))
    assert weights(resumed) == weights(straight)


def test_control_without_the_state_it_does_not():
    straight, resumed = gpt2(), gpt2()
    first = optimizer_of(straight, "muon")
    stepped(straight, first, range(3))
    resumed.load_state_dict(straight.state_dict())
    stepped(straight, first, range(3, 4))
    stepped(resumed, optimizer_of(resumed, "muon"), range(3, 4))
    assert weights(resumed) != weights(straight)


def test_the_state_of_both_is_in_torchs_form_with_each_index_once():
    model = gpt2()
    optimizer = optimizer_of(model, "muon")
    stepped(model, optimizer, range(1))
    values = optimizer.state_dict()
    indices = [index for group in values["param_groups"] for index in group["params"]]
    assert indices == list(range(len(list(model.parameters()))))
    assert sorted(values["state"]) == indices
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for group in values["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            kinds = {"momentum_buffer"} if "momentum" in group else {"exp_avg", "exp_avg_sq"}
            assert {kind: tuple(values["state"][index][kind].shape) for kind in kinds} == dict.fromkeys(
                kinds, tuple(shapes[name])
            )


def test_setting_a_groups_rate_sets_it_for_both_and_zero_grad_forgets():
    model = gpt2()
    optimizer = optimizer_of(model, "muon", weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    give_gradients(model, 0)
    optimizer.step()
    assert weights(model) == before
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


# Clipping


def clipped_plainly(model: nn.Module, optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    return norm


def clipped(optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
    norm = gradient_norm(optimizer)
    clip_gradients(optimizer, norm, limit=limit)
    optimizer.step()
    return norm


@pytest.mark.parametrize("readers", [("cpu",), ()], ids=["folded", "in a pass of its own, as on MPS"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_clipping_is_torchs_clip_grad_norm(kind, readers, monkeypatch):
    """Steps of unequal gradients, the second below the limit: the moments see by how much each was clipped."""
    monkeypatch.setattr(optim_module, "READS_GRAD_SCALE", readers)
    plain, ours, free = gpt2(), gpt2(), gpt2()
    optimizers = {model: optimizer_of(model, kind) for model in (plain, ours, free)}
    for seed, size in enumerate((30.0, 0.001, 3.0)):
        for model in (plain, ours, free):
            give_gradients(model, seed)
            torch._foreach_mul_([parameter.grad for parameter in model.parameters()], size)
        expected, norm = clipped_plainly(plain, optimizers[plain], 0.5), clipped(optimizers[ours], 0.5)
        optimizers[free].step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        assert (norm > 0.5) == (seed != 1)
    # A matrix's iteration in bfloat16 turns a rounding of the last bit into one of its own; lr is 1e-2.
    matrices = hidden(plain) if kind == "muon" else {}
    for name, parameter in ours.named_parameters():
        tolerance = 1e-3 if name in matrices else 1e-6
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=0, atol=tolerance)
        assert (parameter - free.get_parameter(name)).abs().max() > 3 * tolerance  # the control: clipping was felt


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_clipping_without_a_look_at_the_norm_has_the_same_bits(kind, limit, monkeypatch):
    """As on a GPU: the gradients of steps below the limit are divided by 1."""
    looking, blind = gpt2(), gpt2()
    optimizers = {model: optimizer_of(model, kind) for model in (looking, blind)}
    for seed, size in enumerate((30.0, 0.001, 3.0)):
        for model, behind in ((looking, ()), (blind, ("cpu",))):
            monkeypatch.setattr(optim_module, "BEHIND", behind)
            give_gradients(model, seed)
            torch._foreach_mul_([parameter.grad for parameter in model.parameters()], size)
            norm = gradient_norm(optimizers[model])
            with Waits() as waits:
                clip_gradients(optimizers[model], norm, limit=limit)
            assert waits.count == (1 if limit and not behind else 0)
            optimizers[model].step()
    assert weights(looking) == weights(blind)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("limit", [0.0, 1e6])
def test_below_the_limit_and_without_one_no_bit_changes(kind, limit):
    model, free = gpt2(), gpt2()
    ours, plain = optimizer_of(model, kind), optimizer_of(free, kind)
    for seed in range(3):
        give_gradients(model, seed)
        give_gradients(free, seed)
        clipped(ours, limit)
        plain.step()
    assert weights(model) == weights(free)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_clipping_beside_a_scaler_is_clipping_without(kind):
    """float16's scaler hands the fused kernel a scale of its own; after `unscale_` it keeps ours."""
    model, apart = gpt2(), gpt2()
    ours, plain = optimizer_of(model, kind), optimizer_of(apart, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(3):
        give_gradients(model, seed)
        give_gradients(apart, seed)
        torch._foreach_mul_([parameter.grad for parameter in model.parameters()], scaler.scale(torch.ones(())))
        scaler.unscale_(ours)
        clip_gradients(ours, gradient_norm(ours), limit=0.5)
        scaler.step(ours)
        scaler.update()
        clipped(plain, 0.5)
    assert weights(model) == weights(apart)  # powers of two cost no bits


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_overflow_changes_neither_weights_nor_moments(kind):
    model = gpt2()
    optimizer = optimizer_of(model, kind)
    stepped(model, optimizer, range(1))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    give_gradients(model, 1)
    next(iter(hidden(model).values())).grad[0, 0] = math.inf
    scaler.unscale_(optimizer)
    clip_gradients(optimizer, gradient_norm(optimizer), limit=0.5)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512
    assert weights(model) == before
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
