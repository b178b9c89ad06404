"""What a GPU computes is what the CPU and other programs compute, and the program waits for it once in a step."""

import contextlib
import io
import warnings
from collections.abc import Iterator

import pytest
import torch
from drive import environment
from gpus import DEVICE, ON_GPU, WIDE
from work import Waits

import models
import training
from milepost import ckpt, config
from milepost.ckpt.restore import build_model
from milepost.generation import decoder, graphed
from milepost.generation.graphed import GraphDecoder
from milepost.generation.sampling import generate
from milepost.run import fresh
from milepost.runtime import optim
from milepost.runtime.progress import Log
from models import head

SIZES = {"vocab_size": 61, "block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 32}
MODELS = {
    "gpt2": ("gpt2", SIZES),
    "gpt2 without biases": ("gpt2", SIZES | {"bias": False, "activation": "gelu_erf", "tied": False}),
    "gpt2 with TTT": ("gpt2", SIZES | {"ttt": {"layers": "1", "mini_batch_size": 5}}),
    "llama": ("llama", SIZES | {"n_kv_head": 1}),
    "bigram": ("bigram", {"vocab_size": 61, "block_size": 48}),
}
# Relative errors of logits and gradients: rounding, several times over.
CLOSE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}


def pair(name: str, device: torch.device) -> tuple[models.model.Model, models.model.Model]:
    """Equal models on the CPU and on the device, whose weights are larger than at the start of a training."""
    torch.manual_seed(1)
    kind, settings = MODELS[name]
    here, there = (models.build(kind, settings).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in here.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) if parameter.dim() > 1 else 0.05)
    there.load_state_dict(here.state_dict())
    return here, there.to(device)


def ids(rows: int = 3, tokens: int = 40, vocabulary: int = 61) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(2))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double().cpu() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_cpu(name, dtype, device):
    if dtype == "float16" and not ON_GPU:
        pytest.skip("float16 is not for a CPU")
    here, there = pair(name, device)
    text = ids()
    with torch.no_grad():
        expected = here(text).logits
        with training.hardware.autocast(device, dtype):
            found = there(text.to(device)).logits
    assert error(found, expected) < CLOSE[dtype]
    here(text[:, :-1], text[:, 1:]).loss.backward()
    with training.hardware.autocast(device, dtype):
        loss = there(*(part.contiguous().to(device) for part in (text[:, :-1], text[:, 1:]))).loss
    (loss * 64).backward()  # float16 loses small gradients
    gradients = [torch.cat([p.grad.flatten().cpu() for p in model.parameters()]) for model in (here, there)]
    assert error(gradients[1] / 64, gradients[0]) < CLOSE[dtype]
    assert error(gradients[1].roll(1) / 64, gradients[0]) > 0.5  # the control


@pytest.mark.parametrize("ignored", [0, 100])
@pytest.mark.parametrize("chunk", [head.CHUNK, 2**18])
def test_the_head_of_a_large_vocabulary(chunk, ignored, device, monkeypatch):
    """At once and in chunks, with rows added where the device is a GPU."""
    monkeypatch.setattr(head, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(size, 32, generator=generator, dtype=torch.float64) for size in (300, 5003))
    targets = torch.randint(5003, (300,), generator=generator)
    targets[:ignored] = -100
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    expected = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].t(), targets)
    expected.backward()
    ours = [tensor.float().to(device).requires_grad_() for tensor in (x, weight)]
    loss = head.head_loss(*ours, targets.to(device))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(error(one.grad, other.grad) < 1e-4 for one, other in zip(ours, leaves, strict=True))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bigram"])
def test_generating_with_a_cache_is_generating_without(name, device):
    """Also where the window is cut, and the first token is that of the CPU."""
    here, there = pair(name, device)
    drawn = [
        list(generate(model, [1, 2, 3], max_new_tokens=60, temperature=0, use_cache=cached))
        for model, cached in ((there, True), (there, False), (here, True))
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0][:8] == drawn[2][:8]


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_logits_are_those_of_transformers(kind, device, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    names = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    gpt2 = {"n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2}
    llama = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 48,
    }  # fmt: skip
    settings = getattr(transformers, f"{kind}Config")(**names | (gpt2 if kind == "GPT2" else llama))
    theirs = (transformers.GPT2LMHeadModel if kind == "GPT2" else transformers.LlamaForCausalLM)(settings).eval()
    theirs.save_pretrained(tmp_path)
    ours = build_model(ckpt.load(tmp_path), device=device).eval()
    with torch.no_grad():
        expected = theirs.to(device)(ids().to(device)).logits
        assert error(ours(ids().to(device)).logits, expected.cpu()) < CLOSE["float32"]


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_captured_pass_is_the_pass(name, weights, device, monkeypatch):
    """Bit for bit, through a buffer that grows and a window that is cut; in float32 it is the model too."""
    monkeypatch.setattr(decoder, "SMALLEST_ROOM", 16)
    captured, capture = [], graphed._captured
    monkeypatch.setattr(graphed, "_captured", lambda *step: captured.append(capture(*step)) or captured[-1])
    _, model = pair(name, device)
    texts = [drawn(GraphDecoder(model, weights=weights))]
    assert len(captured) == 2  # for 32 tokens, and for all 48
    assert all(each.__name__ == ("replay" if ON_GPU else "step") for each in captured)
    monkeypatch.setattr(graphed, "_captured", lambda step, device: step)
    texts += [drawn(GraphDecoder(model, weights=weights)), drawn(model)]
    assert texts[0] == texts[1]
    assert weights != "float32" or texts[0][0] == texts[2][0]


def drawn(model) -> tuple[list[int], list[bytes]]:
    """Greedy tokens, and the logits that each was chosen by."""
    logits: list[bytes] = []
    prompt = list(range(3, 20))
    note = lambda each: logits.append(each.cpu().numpy().tobytes())  # noqa: E731
    return list(generate(model, prompt, max_new_tokens=60, temperature=0, on_logits=note)), logits


# Waiting for the device


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """Yield a list that gets an entry for each time that the program waits for the device."""
    found: list[str] = []
    if not ON_GPU:
        with Waits() as counted:
            yield found
        found += ["asked for a value"] * counted.count
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [str(each.message) for each in caught if "synchronizing CUDA operation" in str(each.message)]


@pytest.mark.parametrize(
    "changes",
    [
        {"OPTIMIZER": "adamw", "DTYPE": "bfloat16", "GRADIENT_ACCUMULATION_STEPS": "3"},
        {"OPTIMIZER": "muon", "DTYPE": "float32"},
        WIDE | {"OPTIMIZER": "adamw", "DTYPE": "bfloat16"},
    ],
    ids=["adamw", "muon", "wide"],
)
def test_a_step_waits_once(changes, device, tmp_path, monkeypatch):
    """To see that loss and gradients are finite, before the update."""
    for module in (head, optim):
        monkeypatch.setattr(module, "BEHIND", (device.type,))
    run = fresh(config.read(environment(tmp_path, DEVICE=DEVICE, **changes)), Log(io.StringIO()))
    for _ in range(2):
        training.training_step(run, 1e-3)
    with waits() as found:
        training.training_step(run, 1e-3)
    assert len(found) == 1, found
    with waits() as found:
        metrics = training.training_step(run, 1e-3)
        metrics["loss"].item()
    assert len(found) == 2, found  # the control
