"""The fast paths of a training step against the plain ones: attention, the chunked head, GELU, retained memory."""

import copy
import subprocess
import sys

import pytest
import torch
from drive import ROOT
from torch.nn import functional as F
from work import Waits

from milepost.runtime.optim import build_optimizer
from models import attention, build, gelu, head
from models.gpt2 import GPT2

TOKENS = torch.Generator().manual_seed(3)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


# Attention


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 6e-2)]
)
@pytest.mark.parametrize("tokens", [1, 2, 33, 128])
def test_plain_attention_is_the_fused_one(tokens, dtype, tolerance):
    """Values and gradients, against the fused kernel in float64."""
    narrow = [drawn(2, 3, tokens, 16).to(dtype).requires_grad_() for _ in range(3)]
    narrow[1].data.mul_(0.7)
    wide = [one.detach().double().requires_grad_() for one in narrow]
    ours = attention.plain_attention(*narrow, dropout=0.0)
    theirs = F.scaled_dot_product_attention(*wide, is_causal=True)
    for each in (ours, theirs):
        (each.double() * drawn(2, 3, tokens, 16).double()).sum().backward()
    torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)
    for one, other in zip(narrow, wide, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, atol=tolerance, rtol=tolerance)


def test_bfloat16_rounds_large_scores_by_no_more_than_documented():
    """Scores of spread 8, against the fused kernel in float64: the norm of the result's error,
    and of its gradients'.
    """
    q, k, v, weight = drawn(4, 2, 6, 256, 64).bfloat16()
    narrow = [each.clone().requires_grad_() for each in (q * 8, k, v)]
    wide = [one.detach().double().requires_grad_() for one in narrow]
    ours = attention.plain_attention(*narrow, dropout=0.0)
    theirs = F.scaled_dot_product_attention(*wide, is_causal=True)
    pairs = [(ours, theirs)]
    pairs += zip(
        torch.autograd.grad(ours, narrow, weight), torch.autograd.grad(theirs, wide, weight.double()), strict=True
    )
    errors = [((one.double() - other).norm() / other.norm()).item() for one, other in pairs]
    assert errors[0] < 0.015
    assert max(errors[1:]) < 0.03


def test_a_later_token_changes_no_earlier_output():
    q, k, v = (drawn(1, 2, 10, 8) for _ in range(3))
    before = attention.plain_attention(q, k, v, dropout=0.0)
    changed = v.clone()
    changed[:, :, 7] += 1
    after = attention.plain_attention(q, k, changed, dropout=0.0)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.equal(before[:, :, 7:], after[:, :, 7:])


def test_dropout_falls_on_the_weights():
    q, k = drawn(1, 1, 64, 8), drawn(1, 1, 64, 8)
    v = torch.ones(1, 1, 64, 8)
    torch.manual_seed(0)
    dropped = attention.plain_attention(q, k, v, dropout=0.5)
    assert torch.equal(attention.plain_attention(q, k, v, dropout=0.0).round(decimals=5), v)  # weights sum to 1
    assert dropped.mean().item() == pytest.approx(1, abs=0.2)
    assert dropped.std() > 0.05


CHOICES = [
    (capability, dtype, dropout, tokens + more, not more)
    for capability, dtype, dropout, tokens in [
        ("AVX512", torch.float32, 0.0, attention.SHORT),
        ("AVX2", torch.float32, 0.0, attention.SHORT_AVX2),
        ("AVX2", torch.float32, 0.1, attention.SHORT),
        ("AVX2", torch.bfloat16, 0.0, attention.SHORT),
        ("DEFAULT", torch.float32, 0.0, attention.SHORT),
    ]
    for more in (0, 1)
]


@pytest.mark.parametrize(("capability", "dtype", "dropout", "tokens", "plain"), CHOICES)
def test_the_kernel_is_chosen_by_size_and_processor(capability, dtype, dropout, tokens, plain, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(attention, "plain_attention", lambda q, k, v, *, dropout: taken.append("plain"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: taken.append("fused"))
    attention.causal_attention(*(torch.zeros(1, 1, tokens, 4, dtype=dtype) for _ in range(3)), dropout=dropout)
    assert taken == ["plain" if plain else "fused"]
    size = 2 if dtype == torch.bfloat16 else 4
    scores = attention.square_bytes(tokens, size, dropout=dropout)
    assert scores == ((4 * size if dropout else size) if plain else (16 if dropout else 0))


# The head


def losses_and_gradients(x, weight, targets, *, chunk, monkeypatch, scale=1.0):
    monkeypatch.setattr(head, "CHUNK", chunk)
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = head.head_loss(x, weight, targets)
    (loss * scale).backward()
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("rows", [1, 7, 64, 99, 100, 1000])
def test_the_chunked_loss_is_the_plain_one(rows, monkeypatch):
    """In float64, with 100 rows cut where they do not divide evenly."""
    x, weight = drawn(100, 24).double(), drawn(53, 24).double()
    targets = torch.randint(53, (100,), generator=TOKENS)
    plain = losses_and_gradients(x, weight, targets, chunk=10**9, monkeypatch=monkeypatch, scale=0.25)
    chunked = losses_and_gradients(x, weight, targets, chunk=rows * 53, monkeypatch=monkeypatch, scale=0.25)
    for one, other in zip(chunked, plain, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=2e-6, rtol=2e-6)  # its softmax is float32
        assert other.abs().max() > 1e-3


@pytest.mark.parametrize("ignored", [0, 1, 40])
@pytest.mark.parametrize("chunk", [10**9, 530, 53])
def test_as_a_gpu_computes_it_the_loss_is_the_same(chunk, ignored, monkeypatch):
    """With rows added to the vocabulary, and without ever asking how many targets count."""
    x, weight = drawn(100, 24).double(), drawn(53, 24).double()
    targets = torch.randint(53, (100,), generator=TOKENS)
    targets[torch.randperm(100, generator=TOKENS)[:ignored]] = -100
    plain = losses_and_gradients(x, weight, targets, chunk=10**9, monkeypatch=monkeypatch, scale=0.25)
    monkeypatch.setattr(head, "BEHIND", ("cpu",))
    monkeypatch.setattr(head, "PADDED_FROM", 50)
    assert head.rows_to_add(53) == 11
    with Waits() as waits:
        behind = losses_and_gradients(x, weight, targets, chunk=chunk, monkeypatch=monkeypatch, scale=0.25)
    assert waits.count == 0
    for one, other in zip(behind, plain, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=2e-6, rtol=2e-6)
    assert (plain[1].abs().sum(1) == 0).sum() == ignored
    assert torch.equal(behind[1].abs().sum(1) == 0, plain[1].abs().sum(1) == 0)


@pytest.mark.parametrize(("vocabulary", "added"), [(65, 0), (4095, 0), (4096, 0), (50257, 47), (50304, 0), (50305, 63)])
def test_rows_added_to_a_vocabulary(vocabulary, added):
    assert head.rows_to_add(vocabulary) == added


def test_in_bfloat16_it_is_as_near_to_float64_as_autocast(monkeypatch):
    x, weight = drawn(96, 64), drawn(500, 64, scale=0.3)
    targets = torch.randint(500, (96,), generator=TOKENS)
    exact = losses_and_gradients(x.double(), weight.double(), targets, chunk=10**9, monkeypatch=monkeypatch)
    errors = {}
    for name, chunk in (("plain", 10**9), ("chunked", 500 * 16)):
        with torch.autocast("cpu", torch.bfloat16):
            found = losses_and_gradients(x, weight, targets, chunk=chunk, monkeypatch=monkeypatch)
        assert [one.dtype for one in found] == [torch.float32] * 3
        errors[name] = [(one - other).norm() / other.norm() for one, other in zip(found, exact, strict=True)]
    assert all(error < 1e-2 for error in errors["plain"])
    assert all(ours < 1.5 * theirs + 1e-4 for ours, theirs in zip(errors["chunked"], errors["plain"], strict=True))


def test_a_hopeless_row_has_a_finite_loss(monkeypatch):
    """A target 200 nats behind has a probability of 0 in float32, but not a loss of infinity."""
    x, weight = torch.tensor([[200.0]]).repeat(4, 1), torch.tensor([[1.0], [0.0], [-1.0]])
    monkeypatch.setattr(head, "CHUNK", 3)
    assert head.head_loss(x, weight, torch.tensor([0, 1, 2, 2])).item() == pytest.approx((0 + 200 + 400 + 400) / 4)


def test_without_gradients_only_the_loss_is_made(monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 40)
    x, weight, targets = drawn(30, 8), drawn(20, 8), torch.arange(30) % 20
    with torch.no_grad():
        loss = head.head_loss(x, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.t(), targets))
    assert not loss.requires_grad


def test_at_most_one_chunk_is_held():
    """Peak memory of a long batch, in a process of its own: all logits in float32 would take 1 GB by themselves."""
    script = (
        "import resource, torch\n"
        "from models import head\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "x, weight = torch.randn(8192, 32, requires_grad=True), torch.randn(32768, 32, requires_grad=True)\n"
        "before = peak()\n"
        "head.head_loss(x, weight, torch.zeros(8192, dtype=torch.long)).backward()\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT)
    assert (
        float(done.stdout) < 600
    )  # MB: logits, their float32 copy and softmax of one chunk, 128 MB each, and gradients


# A whole step


def stepped(model: GPT2, x, y, *, dtype: torch.dtype | None) -> tuple[float, dict[str, torch.Tensor]]:
    optimizer = build_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99))
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(x, y)[1]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return loss.item(), gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 6e-2)])
def test_one_step_of_the_fast_paths_is_the_plain_one_in_float64(dtype, tolerance, monkeypatch):
    """Loss and every gradient, by their norms: chunked head, plain attention and, in bfloat16,
    the other GELU together.
    """
    torch.manual_seed(5)
    sizes = {"vocab_size": 97, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 64}
    fast = build("gpt2", sizes)
    plain = copy.deepcopy(fast).double()
    x, y = torch.randint(97, (2, 4, 32), generator=TOKENS)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "SHORT", 0)
        expected, exact = stepped(plain, x, y, dtype=None)
    monkeypatch.setattr(head, "CHUNK", 97 * 10)
    loss, gradients = stepped(fast, x, y, dtype=dtype)
    assert loss == pytest.approx(expected, rel=tolerance / 10)
    for name, gradient in gradients.items():
        assert (gradient - exact[name]).norm() <= tolerance * exact[name].norm(), name
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 2.1e-3, name  # Adam's first step is lr long, whatever the gradient's size


def test_the_exact_gelu_stands_for_its_approximation_only_in_bfloat16():
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    worst = (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max().item()
    assert 1e-4 < worst < 5e-4  # a quarter of bfloat16's half unit at 1, 2**-9
    model = (
        build("gpt2", {"vocab_size": 9, "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 8, "bias": False})
        .h[0]
        .mlp
    )
    model.c_fc.weight.data, model.c_proj.weight.data = torch.eye(32, 8), torch.eye(8, 32)
    values = torch.linspace(-3, 3, 8)
    torch.testing.assert_close(model(values), F.gelu(values, approximate="tanh"), atol=1e-6, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        fast = model(values)
    torch.testing.assert_close(fast, F.gelu(values.bfloat16()), atol=1e-5, rtol=0)
    assert (fast - F.gelu(values.bfloat16(), approximate="tanh")).abs().max() > 1e-4


@pytest.mark.parametrize("transposed", [False, True])
def test_gelu_by_the_sigmoid_and_its_gradient_are_those_of_tanh(transposed):
    """Against float64, where PyTorch's own kernel computes tanh; the bounds are twice its own error in float32."""
    x = torch.linspace(-30, 30, 60_000).view(300, 200)
    x = (x.T if transposed else x).requires_grad_()
    weights = drawn(*x.shape)
    exact = x.detach().double().requires_grad_()
    ours, expected = gelu.tanh_gelu(x), F.gelu(exact, approximate="tanh")
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=2e-7)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=8e-6, rtol=2e-6)
    assert type(ours.grad_fn).__name__ != type(F.gelu(x, approximate="tanh").grad_fn).__name__  # it is the fast one


@pytest.mark.parametrize("reason", ["no gradient", "frozen", "large", "float64"])
def test_all_else_is_left_to_the_kernel_of_gelu(reason, monkeypatch):
    x = drawn(50, 40, dtype=torch.float64 if reason == "float64" else torch.float32).requires_grad_(reason != "frozen")
    monkeypatch.setattr(gelu, "LARGEST", x.numel() - (reason == "large"))
    with torch.set_grad_enabled(reason != "no gradient"):
        ours = gelu.tanh_gelu(x)
    assert torch.equal(ours, F.gelu(x, approximate="tanh"))
    assert getattr(ours.grad_fn, "name", lambda: "GeluBackward0")() == "GeluBackward0"


# Memory that is kept


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step():
    """Without it every step has its pages zeroed anew; the control is the same process without the call."""
    script = (
        "import ctypes, resource, sys, torch\n"
        "from milepost.runtime import hardware\n"
        "ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)\n"  # PR_SET_THP_DISABLE: pages of the usual size on every machine
        "hardware.keep_freed_memory() if sys.argv[1] == 'keep' else None\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "make = lambda: torch.ones(16 * 2**20)\n"  # 64 MB
        "for _ in range(10): make()\n"  # until the heap has found its form
        "before = faults()\n"
        "for _ in range(5): make()\n"
        "print(faults() - before)"
    )
    found = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", script, how], check=True, capture_output=True, text=True, cwd=ROOT
            ).stdout
        )
        for how in ("keep", "default")
    }
    assert found["keep"] < 100
    assert found["default"] > 1000
