"""What a device computes is compared with the CPU before it trains or generates.

No device is at hand but the CPU, so the device under test is a CPU whose operations are changed on the way.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from device_faults import Products as Faulty
from device_faults import from_row_9, zeros
from drive import environment, newest, train
from script import call, script
from torch import Tensor
from torch.nn import functional as F

from milepost import config, samples
from milepost.ckpt.restore import build_model
from milepost.run import build
from milepost.run.device_check import Products, attention, device_problem, first_token_problem
from milepost.runtime.distributed import SINGLE, ElsewhereError, World
from milepost.runtime.hardware import DeviceError
from models.bigram import Bigram, BigramSettings
from models.gpt2 import GPT2, GPT2Settings, LoraSettings
from models.ttt import TTTSettings

CPU, MPS = torch.device("cpu"), torch.device("mps")
SIZES = {"vocab_size": 503, "block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 64}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "its own head, no biases, dropout": {"tied": False, "bias": False, "dropout": 0.2},
    "fused attention": {"block_size": 520},
    "LoRA": {"lora": LoraSettings(rank=2, alpha=4.0)},
    "TTT": {"ttt": TTTSettings(layers="0,1")},
}


def gpt2(**changes: Any) -> GPT2:
    return GPT2(GPT2Settings(**SIZES | changes))


def problem(
    model: Any,
    *,
    dtype: str = "float32",
    fault: Callable[[Tensor], None] | None = None,
    rows: int = 4,
    backward: bool = True,
) -> str | None:
    def compute(work: Callable[[], Any]) -> Any:
        if fault is None:
            return work()
        with Faulty(fault):
            return work()

    return device_problem(model, device=CPU, dtype=dtype, rows=rows, seed=7, backward=backward, compute=compute)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_device_that_is_right_passes(name, dtype):
    assert problem(gpt2(**MODELS[name]), dtype=dtype) is None


def test_a_bigram_passes():
    assert problem(Bigram(BigramSettings(vocab_size=60, block_size=16))) is None


def nans(out: Tensor) -> None:
    out.fill_(float("nan"))


def slightly_wrong(out: Tensor) -> None:
    out.mul_(1.01)


@pytest.mark.parametrize("fault", [from_row_9, zeros, nans])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_device_whose_products_are_wrong_is_found(name, dtype, fault):
    assert problem(gpt2(**MODELS[name]), dtype=dtype, fault=fault)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_by_itself_is_looked_at(name, dtype):
    model = gpt2(**MODELS[name])
    assert problem(model, dtype=dtype, backward=False) is None
    for fault in (from_row_9, zeros, nans):
        assert problem(model, dtype=dtype, fault=fault, backward=False)


def test_a_forward_pass_by_itself_computes_no_gradient():
    """What is wrong only in a backward pass does not matter to an evaluation."""
    seen: list[Tensor] = []
    assert problem(gpt2(), fault=seen.append, backward=False) is None
    whole: list[Tensor] = []
    assert problem(gpt2(), fault=whole.append) is None
    assert not any(each.requires_grad for each in seen)
    assert 0 < len(seen) < len(whole) / 2


def test_a_percent_is_too_much_in_float32():
    assert problem(gpt2(), fault=slightly_wrong)
    assert problem(gpt2(), dtype="bfloat16", fault=slightly_wrong) is None  # a few of its roundings


SHORT = {"vocab_size": 90}  # 256 rows at most: those of the gradient of c_fc


def large_only(fault: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """The fault, in nothing but products of more rows than the short look at SHORT has."""
    return lambda out: fault(out) if out.dim() == 2 and len(out) > 300 else None


def last_columns(out: Tensor) -> None:
    out[:, out.shape[1] - 3 :] = 0


@pytest.mark.parametrize("fault", [from_row_9, zeros, last_columns])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_wrong_only_at_the_size_of_a_step_is_found_with_its_figures(fault, dtype):
    found = problem(gpt2(**SHORT), dtype=dtype, fault=large_only(fault), rows=8)  # 384 rows
    assert found
    assert "on the CPU" in found
    assert "row" in found
    assert problem(gpt2(**SHORT), dtype=dtype, fault=large_only(fault), rows=4) is None  # control: 192 rows


class OneKind(Faulty):
    """A device on which the `number`-th kind and shape of product is wrong from row 9 on; it lists those of 10 rows."""

    def __init__(self, number: int) -> None:
        super().__init__(zeros)
        self.number, self.kinds = number, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm") and out.shape[-2] > 9:
            kind = (func._schema.name, *(tuple(each.shape) for each in args if isinstance(each, Tensor)))
            self.kinds += [kind] if kind not in self.kinds else []
            if self.kinds.index(kind) == self.number:
                out[..., 9:, :] = out[..., :1, :].clone() + 1
        return out


def wrong_kind(model: Any, number: int, dtype: str) -> tuple[str | None, int]:
    """What is said if one kind of product is wrong at the step's own size, and how many kinds there are."""
    device, calls = OneKind(number), []

    def compute(work: Callable[[], Any]) -> Any:
        calls.append(1)
        if len(calls) == 1:  # the short look sees nothing of it
            return work()
        with device:
            return work()

    return device_problem(model, device=CPU, dtype=dtype, rows=4, seed=number + 1, compute=compute), len(device.kinds)


def wrong_kinds(name: str, dtype: str) -> tuple[int, int]:
    """How many kinds of product were found to be wrong, of how many."""
    model = gpt2(**MODELS[name])
    clean, count = wrong_kind(model, -1, dtype)
    assert clean is None
    return sum(wrong_kind(model, number, dtype)[0] is not None for number in range(count)), count


@pytest.mark.parametrize(
    ("name", "dtype"), [("its own head, no biases, dropout", "float32"), ("fused attention", "bfloat16")]
)
def test_each_kind_of_product_is_looked_at(name, dtype):
    found, count = wrong_kinds(name, dtype)
    assert found == count > 12


@pytest.mark.soak
def test_each_kind_of_product_of_every_model_is_looked_at():
    results = [wrong_kinds(name, dtype) for name in MODELS for dtype in ("float32", "bfloat16", "float16")]
    print(results, sum(found for found, _ in results))
    assert all(found == count for found, count in results)


class Nothing(Faulty):
    """A device that answers every operation with zeros."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple) else (out,):
            if isinstance(each, Tensor) and each.is_floating_point() and not func.is_view:
                each.data.zero_()
        return out


@pytest.mark.parametrize(
    "model", [gpt2(), Bigram(BigramSettings(vocab_size=60, block_size=16))], ids=["gpt2", "bigram"]
)
def test_a_device_that_returns_zeros_is_found(model):
    def compute(work: Callable[[], Any]) -> Any:
        with Nothing(zeros):
            return work()

    assert device_problem(model, device=CPU, dtype="float32", rows=4, seed=0, compute=compute)


def test_linear_layers_that_are_one_operation_are_looked_at():
    """MPS computes a linear layer so, and its gradients."""
    x, weight, bias, upstream = torch.randn(3, 5, 8), torch.randn(40, 8), torch.randn(40), torch.randn(3, 5, 40)
    forward = {"input": x, "weight": weight, "bias": bias}
    backward = {"self": x, "grad_output": upstream, "weight": weight}
    gradients = (upstream @ weight, torch.einsum("abo,abi->oi", upstream, x), None)
    for name, named, out in (("linear", forward, F.linear(x, weight, bias)), ("linear_backward", backward, gradients)):
        assert Products(0)._checked(name, named, out) is None
    wrong = F.linear(x, weight, bias)
    wrong[2:] = 0
    assert "linear" in str(Products(0)._checked("linear", forward, wrong))
    assert Products(0)._checked("linear_backward", backward, (gradients[0], gradients[1] * 2, None))
    assert Products(0)._checked("linear_backward", backward, (gradients[0] * 2, gradients[1], None))


def test_attention_and_its_gradients_agree_with_torch():
    q, k, v = (torch.randn(1, 1, 30, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    plain = [each.detach()[0, 0].numpy() for each in (q, k, v)]
    (forward,) = attention(*plain, scale=0.3, causal=True, gradient=None)
    assert np.allclose(forward, out.detach()[0, 0].numpy())
    backward = attention(*plain, scale=0.3, causal=True, gradient=upstream[0, 0].numpy())
    for got, parameter in zip(backward, (q, k, v), strict=True):
        assert np.allclose(got, parameter.grad[0, 0].numpy())


class WrongAttention(Faulty):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in func._schema.name:
            out[0][:, :, 9:] = 0
        return out


def test_fused_attention_is_looked_at():
    def compute(work: Callable[[], Any]) -> Any:
        with WrongAttention(zeros):
            return work()

    found = device_problem(gpt2(block_size=520), device=CPU, dtype="float32", rows=2, seed=0, compute=compute)
    assert "scaled_dot_product" in str(found)


def test_nothing_of_the_run_changes():
    model = gpt2(lora=LoraSettings(rank=2, alpha=4.0))
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    assert problem(model) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# At the door.


def test_a_wrong_device_is_refused_with_the_ways_on(tmp_path, monkeypatch):
    settings = config.read(environment(tmp_path))
    monkeypatch.setattr(build, "device_problem", lambda model, **_: "row 9 is zero")
    with pytest.raises(DeviceError) as caught:  # exit code 2
        build.check_device(settings, SINGLE, device=MPS, dtype="float32", model=gpt2())
    for part in ("DEVICE=mps", torch.__version__, "row 9 is zero", "DEVICE=cpu", "DEVICE_CHECK=false"):
        assert part in str(caught.value)
    build.check_device(settings, SINGLE, device=CPU, dtype="float32", model=gpt2())  # which is the reference
    off = dataclasses.replace(settings, device_check=False)
    build.check_device(off, SINGLE, device=MPS, dtype="float32", model=gpt2())


def test_all_processes_end_if_the_device_of_one_is_wrong(tmp_path, monkeypatch):
    settings = config.read(environment(tmp_path))
    monkeypatch.setattr(build, "device_problem", lambda model, **_: None)
    monkeypatch.setattr(World, "any", lambda self, here: True)
    with pytest.raises(ElsewhereError):
        build.check_device(settings, World(rank=1, size=2), device=MPS, dtype="float32", model=gpt2())


def test_the_first_token_is_compared_before_a_text_is_generated(tmp_path):
    assert train(tmp_path, TRAINING_STEPS="2")[0] == 0
    record, settings = newest(tmp_path), config.read(environment(tmp_path))
    right = build_model(record, device=CPU).eval()
    samples.check_device(record, right, [1, 2, 3], settings, device=MPS)
    wrong = build_model(record, device=CPU).eval()
    wrong.forward = lambda *ids, **how: right(*ids, **how)._replace(logits=torch.eye(1, 65)[None])  # token 0 for ever
    with pytest.raises(DeviceError, match="first token"):
        samples.check_device(record, wrong, [1, 2, 3], settings, device=MPS)
    samples.check_device(record, wrong, [1, 2, 3], settings, device=CPU)
    samples.check_device(record, wrong, [1, 2, 3], dataclasses.replace(settings, device_check=False), device=MPS)


def test_a_batch_is_compared_before_a_checkpoint_is_evaluated(tmp_path, monkeypatch):
    assert train(tmp_path, TRAINING_STEPS="2")[0] == 0
    evaluator, asked = script("evaluate_checkpoint"), []
    monkeypatch.setattr(evaluator, "device_problem", lambda model, **how: asked.append(how) or "row 9 is zero")
    plain = evaluator.check_device

    def elsewhere(model, settings, *, device, dtype):
        before = len(asked)
        plain(model, settings, device=device, dtype=dtype)
        assert len(asked) == before  # the CPU is the reference
        plain(model, settings, device=MPS, dtype=dtype)

    monkeypatch.setattr(evaluator, "check_device", elsewhere)
    path = newest(tmp_path).path
    done = call(evaluator, tmp_path, CHECKPOINT_PATH=path, BATCH_SIZE="3")
    assert done.code == 2
    assert "row 9 is zero" in done.err
    assert (asked[0]["rows"], asked[0]["device"], asked[0]["backward"]) == (3, MPS, False)
    assert call(evaluator, tmp_path, CHECKPOINT_PATH=path, DEVICE_CHECK="false").code == 0
    assert len(asked) == 1


def test_a_fault_in_the_first_token_is_found():
    model = gpt2().eval()

    def compute(work: Callable[[], Any]) -> Any:
        with Faulty(zeros):
            return work()

    assert first_token_problem(model, model, [1, 2, 3]) is None
    assert first_token_problem(model, model, [1, 2, 3], compute=compute)
