"""GPT-2 against transformers' implementation, the published sizes and the published initialisation."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from models import build, freeze_base, parameter_count, training_bytes
from models.gpt2 import CHUNK, GPT2, SIZES, GPT2Settings

SMALL = GPT2Settings(vocab_size=97, block_size=32, n_layer=3, n_head=4, n_embd=48)
Pair = tuple[GPT2, GPT2LMHeadModel]
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # stored (in, out)


def reference() -> GPT2LMHeadModel:
    """transformers' GPT-2 of SMALL's shape, every tensor random and large enough that an error in any shows."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=97, n_positions=32, n_layer=3, n_head=4, n_embd=48, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ours(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of transformers' names and shapes under ours."""
    named = {name.removeprefix("transformer."): t for name, t in theirs.items() if name != "lm_head.weight"}
    return {name: t.t() if name.endswith(CONV1D) else t for name, t in named.items()}


@pytest.fixture(scope="module")
def pair() -> Pair:
    theirs, model = reference(), GPT2(SMALL)
    model.load_state_dict(ours(theirs.state_dict()))
    return model, theirs


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(97, (3, 33), generator=torch.Generator().manual_seed(2))  # (B, T + 1)


def test_logits_equal_transformers(pair: Pair, tokens: torch.Tensor) -> None:
    model, theirs = pair
    with torch.no_grad():
        logits, loss, _ = model(tokens[:, :-1])
        expected = theirs(tokens[:, :-1]).logits
    assert loss is None
    assert logits.shape == (3, 32, 97)
    assert expected.std() > 1  # large enough for 1e-4 to mean something
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_exact_gelu_would_be_noticed(pair: Pair, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, theirs = pair
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate: gelu(x))
    with torch.no_grad():
        error = (model(tokens[:, :-1])[0] - theirs(tokens[:, :-1]).logits).abs().max()
    assert error > 1e-4


def test_loss_and_gradients_equal_transformers(tokens: torch.Tensor) -> None:
    theirs, model = reference(), GPT2(SMALL)
    model.load_state_dict(ours(theirs.state_dict()))
    loss = model(tokens[:, :31], tokens[:, 1:32])[1]
    expected = theirs(tokens[:, :32], labels=tokens[:, :32]).loss  # shifts the labels itself
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)
    loss.backward()
    expected.backward()
    gradients = ours({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(name), atol=1e-4, rtol=1e-4, msg=name)
    assert gradients == {}


def test_state_names_and_shapes() -> None:
    settings = GPT2Settings(vocab_size=7, block_size=5, n_layer=1, n_head=2, n_embd=4)
    layer = {
        "ln_1.weight": (4,),
        "ln_1.bias": (4,),
        "attn.c_attn.weight": (12, 4),
        "attn.c_attn.bias": (12,),
        "attn.c_proj.weight": (4, 4),
        "attn.c_proj.bias": (4,),
        "ln_2.weight": (4,),
        "ln_2.bias": (4,),
        "mlp.c_fc.weight": (16, 4),
        "mlp.c_fc.bias": (16,),
        "mlp.c_proj.weight": (4, 16),
        "mlp.c_proj.bias": (4,),
    }
    expected = {"wte.weight": (7, 4), "wpe.weight": (5, 4), "ln_f.weight": (4,), "ln_f.bias": (4,)}
    expected |= {f"h.0.{name}": shape for name, shape in layer.items()}
    model = GPT2(settings)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected  # no head, no buffer
    unbiased = build("gpt2", {**vars(settings), "bias": False})
    assert {name: tuple(t.shape) for name, t in unbiased.state_dict().items()} == {
        name: shape for name, shape in expected.items() if not name.endswith("bias")
    }


def test_a_head_of_its_own_is_two_more_tensors() -> None:
    settings = {"vocab_size": 7, "block_size": 5, "n_layer": 1, "n_head": 2, "n_embd": 4}
    tied = build("gpt2", settings).state_dict()
    model = build("gpt2", settings | {"tied": False})
    untied = model.state_dict()
    assert list(untied) == [*tied, "lm_head.weight", "lm_head.bias"]
    assert (untied["lm_head.weight"].shape, untied["lm_head.bias"].tolist()) == ((7, 4), [0.0] * 7)
    assert parameter_count(model) == sum(t.numel() for t in untied.values())


def test_a_head_of_its_own_makes_the_logits() -> None:
    model = GPT2(replace(SMALL, tied=False))
    assert model.lm_head is not None
    torch.nn.init.normal_(model.lm_head.bias)
    hidden: list[torch.Tensor] = []
    model.ln_f.register_forward_hook(lambda module, inputs, out: hidden.append(out))
    ids = torch.tensor([[1, 2]])
    with torch.no_grad():
        logits = model(ids)[0]
        expected = hidden[0] @ model.lm_head.weight.T + model.lm_head.bias
        torch.testing.assert_close(logits, expected)
        model.wte.weight[50] += 1.0  # no input of these: with a tied head its logit would move
        assert torch.equal(model(ids)[0], logits)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("activation", "theirs"), [("gelu", "gelu_new"), ("gelu_erf", "gelu"), ("relu", "relu")])
def test_activations_equal_transformers(activation: str, theirs: str) -> None:
    mlp = GPT2(replace(SMALL, activation=activation)).h[0].mlp
    x = torch.linspace(-4, 4, 480).view(10, 48) * 10
    with torch.no_grad():
        found = mlp(x)
        others = {
            name: mlp.c_proj(ACT2FN[name](mlp.c_fc(x))).sub(found).abs().max() for name in ("gelu_new", "gelu", "relu")
        }
    assert others.pop(theirs) < 1e-6
    assert min(others.values()) > 1e-6


def test_unknown_activations_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"activation='silu': expected one of gelu, gelu_erf, relu\."):
        replace(SMALL, activation="silu")
    with pytest.raises(ValueError, match=r"activation=1: expected str, got int"):
        build("gpt2", {**vars(SMALL), "activation": 1})
    with pytest.raises(ValueError, match=r"tied='no': expected bool, got str"):
        build("gpt2", {**vars(SMALL), "tied": "no"})


def test_head_is_the_token_embedding() -> None:
    model = GPT2(SMALL)
    before = model(torch.tensor([[1, 2]]))[0]
    with torch.no_grad():
        model.wte.weight[50] += 1.0  # a token that is not in the input: only its logit may move
    moved = (model(torch.tensor([[1, 2]]))[0] - before).abs().amax((0, 1)) > 0
    assert moved.nonzero().flatten().tolist() == [50]


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_published_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        assert parameter_count(GPT2(SIZES[name])) == count


def test_initialisation_is_openais() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Settings(vocab_size=500, block_size=256, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        elif ".ln_" in f".{name}":
            assert (parameter == 1).all(), name
        else:
            std = 0.01 if name == "wpe.weight" else 0.02 / 4 if "c_proj" in name else 0.02  # 4 = sqrt(2 * 8 layers)
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert parameter.mean().item() == pytest.approx(0, abs=std / 20), name


@pytest.mark.parametrize("splits", [[32], [1] * 32, [5, 1, 1, 9, 16], [31, 1], [1, 31]])
def test_cached_chunks_equal_the_whole(pair: Pair, tokens: torch.Tensor, splits: list[int]) -> None:
    model, _ = pair
    ids, cache = tokens[:, :-1], model.new_cache(batch_size=3)
    with torch.no_grad():
        whole = model(ids)[0]
        pieces = torch.cat([model(piece, cache=cache)[0] for piece in ids.split(splits, dim=1)], dim=1)
    torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=0)
    assert cache.length == 32
    assert [tuple(k.shape) for k in cache.keys] == [(3, 4, 32, 12)] * 3


def test_a_cache_that_forgot_would_be_noticed(pair: Pair, tokens: torch.Tensor) -> None:
    model, _ = pair
    cache = model.new_cache(batch_size=3)
    with torch.no_grad():
        model(tokens[:, :16], cache=cache)
        cache.values[1][:, :, 3] = 0
        error = (model(tokens[:, 16:20], cache=cache)[0] - model(tokens[:, :20])[0][:, 16:]).abs().max()
    assert error > 1e-3


def test_cache_starts_over_at_length_zero(pair: Pair, tokens: torch.Tensor) -> None:
    model, _ = pair
    cache = model.new_cache(batch_size=3)
    with torch.no_grad():
        model(tokens[:, 3:30], cache=cache)
        cache.length = 0
        again = model(tokens[:, :9], cache=cache)[0]
        torch.testing.assert_close(again, model(tokens[:, :9])[0], atol=1e-4, rtol=0)


def test_cache_takes_autocasts_dtype(pair: Pair, tokens: torch.Tensor) -> None:
    model, _ = pair
    cache = model.new_cache(batch_size=3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(tokens[:, :20])[0].float()
        model(tokens[:, :12], cache=cache)
        rest = model(tokens[:, 12:20], cache=cache)[0].float()
    assert {k.dtype for k in cache.keys + cache.values} == {torch.bfloat16}
    assert (rest - whole[:, 12:]).abs().mean() < 0.02 * whole.std()


def test_last_only_is_the_last_position(pair: Pair, tokens: torch.Tensor) -> None:
    model, _ = pair
    with torch.no_grad():
        logits = model(tokens[:, :20], last_only=True)[0]
        torch.testing.assert_close(logits, model(tokens[:, :20])[0][:, -1:], atol=1e-5, rtol=0)


def test_more_tokens_than_the_context_are_refused(pair: Pair, tokens: torch.Tensor) -> None:
    model, _ = pair
    with pytest.raises(ValueError, match=r"the input has 33 tokens, but the model's context is block_size=32 tokens"):
        model(tokens)
    cache = model.new_cache(batch_size=3)
    model(tokens[:, :30], cache=cache)
    with pytest.raises(ValueError, match="3 tokens after 30 in the cache"):
        model(tokens[:, 30:], cache=cache)
    assert cache.length == 30


def test_dropout_acts_on_embeddings_attention_and_residuals_and_only_in_training() -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": 97, "block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.5}
    model = build("gpt2", settings)
    ids, zeros = torch.arange(32)[None], []
    places = [model.get_submodule(name) for name in ("drop", "h.0.attn.drop", "h.0.mlp.drop")]
    for place in places:
        place.register_forward_hook(lambda module, inputs, out: zeros.append((out == 0).float().mean().item()))
    model(ids)
    assert zeros == pytest.approx([0.5] * 3, abs=0.12)
    for place in places:
        place.eval()
    assert not torch.equal(model(ids)[0], model(ids)[0])  # what is left drops attention weights
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])


# Peak resident memory, in MB, of three AdamW steps in a process of its own, freed memory kept as in training, minus the
# peak before the model: torch 2.13, Linux, a 2-core CPU (AVX-512 bfloat16). V, layers, heads, C, T, B.
MEASURED = [
    ((65, 6, 6, 384, 256, 32), {}, 4, 2326),
    ((65, 6, 6, 384, 256, 32), {}, 2, 1508),
    ((65, 6, 6, 384, 256, 32), {"dropout": 0.2}, 4, 3473),
    ((65, 2, 6, 384, 1024, 8), {}, 4, 889),
    ((65, 2, 6, 384, 1024, 8), {"dropout": 0.2}, 4, 3067),
    ((65, 2, 6, 384, 1024, 8), {"dropout": 0.2}, 2, 3248),
    ((50257, 1, 12, 768, 256, 32), {}, 2, 2402),
    ((50257, 1, 12, 768, 1024, 8), {}, 2, 2307),
    ((50257, 2, 12, 768, 512, 16), {}, 4, 4082),
    ((50257, 12, 12, 768, 256, 4), {}, 2, 3244),
    ((50257, 12, 12, 768, 256, 4), {"lora": {"rank": 8, "alpha": 16.0}}, 2, 1982),
    ((50257, 12, 12, 768, 1024, 8), {}, 2, 6545),
    ((5000, 2, 4, 256, 256, 8), {"tied": False}, 4, 463),
]


@pytest.mark.parametrize(("sizes", "more", "bytes_per_value", "peak"), MEASURED)
def test_training_memory_is_within_1_5x_of_the_measured(sizes, more, bytes_per_value, peak) -> None:
    fields = dict(zip(("vocab_size", "n_layer", "n_head", "n_embd", "block_size"), sizes, strict=False))
    with torch.device("meta"):
        model = build("gpt2", fields | more)
    if "lora" in more:
        freeze_base(model)
    estimate = training_bytes(model, sizes[-1], bytes_per_value=bytes_per_value) / 1e6
    assert 1 / 1.5 < estimate / peak < 1.5


def test_memory_of_another_device_than_the_weights_are_on():
    """On CUDA attention keeps no scores, and a compiler may hold all logits."""
    model = GPT2(GPT2Settings(vocab_size=300_000, block_size=128, n_layer=2, n_head=2, n_embd=8))
    assert model.activation_bytes(3, bytes_per_value=2, device_type="cpu") == model.activation_bytes(
        3, bytes_per_value=2
    )
    by_hand = 3 * 3 * 128 * 22 * 8 * 2 + 3 * 128 * 300_000 * (2 + 12) + 8 * 300_000 * 8
    assert model.activation_bytes(3, bytes_per_value=2, device_type="cuda") == by_hand
    scores = 3 * 3 * 128 * 2 * 128 * 2
    on_cpu = by_hand + scores - (3 * 128 * 300_000 - CHUNK) * (2 + 12)
    assert model.activation_bytes(3, bytes_per_value=2) == on_cpu
