"""TTT-MLP layers against a plain implementation of the papers: one token, one head, one autograd step at a time, in
float64.
"""

import shutil
from pathlib import Path

import pytest
import torch
from drive import TINY, at_step, command, newest, train
from records import assert_same, gpt2_record
from script import call, script
from torch import Tensor
from torch.nn import functional as F

from milepost import ckpt, config
from milepost.ckpt import CheckpointError
from milepost.ckpt.layouts import WRITERS
from milepost.ckpt.restore import build_model, merged, with_base
from milepost.generation.decoder import Decoder
from milepost.generation.sampling import generate
from models import adapter_counts, build, plain, training_bytes
from models.adapters import is_ttt
from models.gpt2 import GPT2, GPT2Settings
from models.ttt import TTTMLP, TTTSettings

H, HS, B = 2, 3, 2
C = H * HS


def layer(*, seed: int = 0, **settings: float) -> TTTMLP:
    """A float64 layer with every parameter random, and steps large enough that the inner weights move far."""
    torch.manual_seed(seed)
    made = TTTMLP(TTTSettings("0", **{"base_lr": 30.0, "mini_batch_size": 4} | settings), width=C, n_head=H).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return made


def text(T: int, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, C, dtype=torch.float64, generator=generator)


def norm(z: Tensor, made: TTTMLP, h: int) -> Tensor:
    return (z - z.mean()) / (z.var(correction=0) + 1e-6).sqrt() * made.ttt_norm_weight[h] + made.ttt_norm_bias[h]


def inner(x: Tensor, weights: list[Tensor]) -> Tensor:
    """The inner MLP on one key or query (hs,)."""
    W1, b1, W2, b2 = weights
    return F.gelu(x @ W1 + b1[0], approximate="tanh") @ W2 + b2[0]


def reference_head(made: TTTMLP, x: Tensor, h: int) -> tuple[Tensor, list[Tensor]]:
    """Return the output of head h for one text (T, C), and its inner weights afterwards."""
    own, settings = slice(h * HS, (h + 1) * HS), made.settings
    weights = [made.W1[h], made.b1[h], made.W2[h], made.b2[h]]
    begin, out = weights, []
    for t, token in enumerate(x):
        if t % settings.mini_batch_size == 0:
            begin = weights
        q, k, v = ((linear.weight @ token + linear.bias)[own] for linear in (made.wq, made.wk, made.wv))
        q, k = q / q.norm(), k / k.norm()
        share = torch.sigmoid(made.learnable_ttt_lr_weight[h, 0] @ token + made.learnable_ttt_lr_bias[h, 0])
        step = settings.base_lr * share / HS / settings.mini_batch_size
        # f(k) = k + norm(inner(k)) is to give k + norm(v - k).
        loss = (k + norm(inner(k, begin), made, h) - k - norm(v - k, made, h)).square().sum() / 2
        gradients = torch.autograd.grad(loss, begin, create_graph=True)
        weights = [w - step * g for w, g in zip(weights, gradients, strict=True)]
        out.append(q + norm(inner(q, weights), made, h))
    return torch.stack(out), weights


def reference(made: TTTMLP, x: Tensor) -> Tensor:
    """The layer's output for x (B, T, C)."""
    read = torch.stack([torch.cat([reference_head(made, row, h)[0] for h in range(H)], dim=-1) for row in x])
    normed = (read - read.mean(-1, keepdim=True)) / (read.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    normed = normed * made.post_norm.weight + made.post_norm.bias
    return torch.tanh(made.gating_alpha) * (normed @ made.wo.weight.T + made.wo.bias)


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("T", [1, 4, 11])
def test_dual_form_equals_the_reference(T: int, size: int) -> None:
    made, x = layer(mini_batch_size=size), text(T)
    torch.testing.assert_close(made(x), reference(made, x), atol=1e-10, rtol=1e-10)


def test_gradients_equal_those_through_the_reference() -> None:
    made, x = layer(), text(11).requires_grad_()
    wanted = [x, *made.parameters()]
    aim = torch.randn(B, 11, C, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((made(x) * aim).sum(), wanted)
    expected = torch.autograd.grad((reference(made, x) * aim).sum(), wanted)
    names = ["x", *(name for name, _ in made.named_parameters())]
    for name, one, other in zip(names, found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8, msg=name)
        assert other.abs().max() > 1e-4, name  # every one takes part


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [3, 1, 1, 6], [5, 6], [4, 4, 3], [2, 9]])
def test_chunks_of_any_size_equal_the_whole(pieces: list[int]) -> None:
    made, x = layer(), text(11)
    state = made.new_state(B)
    with torch.no_grad():
        read = torch.cat([made(piece, state) for piece in x.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(read, made(x), atol=1e-10, rtol=1e-10)
    assert state.seen == 11


def test_the_state_is_what_gradient_descent_made_of_it() -> None:
    made, x = layer(), text(11)
    state = made.new_state(B)
    with torch.no_grad():
        made(x, state)
    for row in range(B):
        for h in range(H):
            weights = reference_head(made, x[row], h)[1]
            for name, found, expected in zip(["W1", "b1", "W2", "b2"], state.now, weights, strict=True):
                torch.testing.assert_close(found[row * H + h], expected, atol=1e-10, rtol=1e-10, msg=name)
                assert (expected - getattr(made, name)[h]).abs().max() > 0.05  # it has moved


def test_no_token_sees_what_comes_after_it() -> None:
    made, x = layer(), text(11)
    x.requires_grad_()
    for t in (0, 3, 4, 9):
        (seen,) = torch.autograd.grad(made(x)[:, t].sum(), x)
        reached = seen.abs().amax((0, 2)) > 0
        assert reached.tolist() == [True] * (t + 1) + [False] * (10 - t)


@pytest.mark.parametrize("changes", [{"mini_batch_size": 5}, {"base_lr": 29.0}])
def test_control_other_settings_read_something_else(changes: dict[str, float]) -> None:
    assert (layer(**changes)(text(11)) - layer()(text(11))).abs().max() > 1e-4


def test_control_a_state_that_forgets_its_mini_batch_reads_something_else() -> None:
    made, x = layer(), text(11)
    state = made.new_state(B)
    with torch.no_grad():
        made(x[:, :6], state)  # in the middle of the second mini-batch
        state.start = state.now
        assert (made(x[:, 6:], state) - made(x)[:, 6:]).abs().max() > 1e-4


def test_under_autocast_what_is_learned_stays_float32() -> None:
    made, x = layer(base_lr=1.0).float(), text(40).float()
    state = made.new_state(B)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        read = made(x, state)
    assert {each.dtype for each in state.now} == {torch.float32}
    exact = made(x)
    assert 0 < (read - exact).abs().mean() < 0.02 * exact.std()  # what bfloat16 costs the five projections


def test_it_begins_as_published() -> None:
    torch.manual_seed(0)
    made = TTTMLP(TTTSettings("0", initial_gating_alpha=0.1), width=96, n_head=4)
    wanted = {
        **dict.fromkeys(["W1", "W2", "learnable_ttt_lr_weight", *(f"w{one}.weight" for one in "qkvo")], 0.02),
        **dict.fromkeys(["b1", "b2", "learnable_ttt_lr_bias", "ttt_norm_bias", "post_norm.bias"], 0.0),
        **dict.fromkeys([f"w{one}.bias" for one in "qkvo"], 0.0),
        **dict.fromkeys(["ttt_norm_weight", "post_norm.weight"], 1.0),
        "gating_alpha": pytest.approx(0.1),
    }
    assert {name for name, _ in made.named_parameters()} == wanted.keys()
    for name, parameter in made.named_parameters():
        if wanted[name] == 0.02:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
            assert parameter.mean().item() == pytest.approx(0, abs=0.004), name
        else:
            assert {value == wanted[name] for value in parameter.flatten().tolist()} == {True}, name


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layers": ""}, "ttt.layers='': expected numbers of blocks like 1,5,10, the first being 0."),
        ({"layers": "1,1"}, "ttt.layers='1,1': expected each block once."),
        ({"layers": "1, 2"}, "ttt.layers='1, 2': expected numbers of blocks like 1,5,10, the first being 0."),
        ({"layers": "1,²"}, "ttt.layers='1,²': expected numbers of blocks like 1,5,10, the first being 0."),
        ({"layers": "9" * 5000}, f"ttt.layers='{'9' * 79}: expected numbers of blocks like 1,5,10, the first being 0."),
        ({"layers": "0,2"}, "ttt.layers=0,2: the model has n_layer=2 blocks, so expected numbers from 0 to 1."),
        ({"layers": 1}, "layers=1: expected str, got int."),
        ({}, "layers: missing from the settings of ttt."),
        ({"layers": "1", "base_lr": -1.0}, "ttt.base_lr=-1.0: expected a number above 0."),
        ({"layers": "1", "base_lr": float("nan")}, "ttt.base_lr=nan: expected a number above 0."),
        ({"layers": "1", "mini_batch_size": 0}, "mini_batch_size=0: expected a whole number of at least 1."),
        ({"layers": "1", "initial_gating_alpha": float("inf")}, "ttt.initial_gating_alpha=inf: expected a number."),
        ({"layers": "1", "rank": 4}, "rank=4: ttt has layers, base_lr, mini_batch_size, initial_gating_alpha and no such setting."),
        ("1", "ttt='1': expected a mapping, got str."),
    ],
)  # fmt: skip
def test_settings_that_make_no_layer_are_refused(settings: object, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build("gpt2", SMALL | {"ttt": settings})
    assert str(caught.value) == sentence


# ---------------------------------------------------------------------------------------------------------------------
# In a GPT-2.

SMALL = {"vocab_size": 31, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 8}
TTT = {"layers": "1", "base_lr": 20.0, "mini_batch_size": 5}


def gpt2(*, layers: str | None = "1", seed: int = 0, alpha: float = 0.1) -> GPT2:
    """A float64 model with large weights, so that every part shows in the logits."""
    torch.manual_seed(seed)
    ttt = None if layers is None else TTT | {"layers": layers, "initial_gating_alpha": alpha}
    model = build("gpt2", SMALL | {"ttt": ttt}).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("gating_alpha"):
                parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.3)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(31, (3, 25), generator=torch.Generator().manual_seed(2))  # (B, T + 1)


def test_names_in_the_state() -> None:
    base, model = gpt2(layers=None), gpt2(layers="0,1")
    own = [
        "W1",
        "b1",
        "W2",
        "b2",
        "learnable_ttt_lr_weight",
        "learnable_ttt_lr_bias",
        "ttt_norm_weight",
        "ttt_norm_bias",
        "gating_alpha",
        *(f"{part}.{kind}" for part in ("wq", "wk", "wv", "wo", "post_norm") for kind in ("weight", "bias")),
    ]
    expected = {f"h.{block}.ttt.{name}" for block in (0, 1) for name in own}
    assert model.state_dict().keys() - base.state_dict().keys() == expected
    assert {name for name in model.state_dict() if is_ttt(name)} == expected
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    counted = f"{sum(sizes[name] for name in expected):,} elements of {sum(sizes.values()):,}"
    assert adapter_counts(shapes) == {"ttt": f"38 TTT tensors, {counted}"}
    assert adapter_counts({name: tensor.shape for name, tensor in base.state_dict().items()}) == {}


@pytest.mark.parametrize("name", ["ttt.W1", "h.1.mlp.ttt.W1", "h.1.tttx.W1", "h.1.attn.W1", "wttte.weight", "h.1.ttt"])
def test_a_name_that_only_resembles_a_ttt_tensor_is_not_one(name: str) -> None:
    assert not is_ttt(name)


def test_one_seed_gives_one_base_with_layers_or_without() -> None:
    states = []
    for ttt in (None, {"layers": "0,1"}):
        torch.manual_seed(7)
        states.append(build("gpt2", SMALL | {"ttt": ttt}).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_with_a_gate_of_zero_it_is_the_base(ids: Tensor) -> None:
    base, model = gpt2(layers=None), gpt2(layers="0,1", alpha=0.0)
    model.load_state_dict(base.state_dict(), strict=False)
    losses = [one(ids[:, :-1], ids[:, 1:])[1] for one in (base, model)]
    assert torch.equal(model(ids[:, :-1])[0], base(ids[:, :-1])[0])
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    gates = [block.ttt.gating_alpha for block in model.h]
    assert all(gate.grad.abs().max() > 0 for gate in gates)  # it can open
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=0, atol=1e-12)
    with torch.no_grad():
        gates[1][3] = 0.01
        assert not torch.equal(model(ids[:, :-1])[0], base(ids[:, :-1])[0])


def test_it_reads_what_attention_adds_and_adds_to_the_stream(ids: Tensor) -> None:
    model, seen = gpt2(), {}
    block = model.h[1]
    for name in ("", "attn", "ttt", "ln_2", "mlp"):
        part = block.get_submodule(name)
        part.register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: (inputs[0], out)}))
    with torch.no_grad():
        model(ids[:, :-1])
    assert torch.equal(seen["ttt"][0], seen["attn"][1])
    stream = seen[""][0] + seen["attn"][1] + seen["ttt"][1]
    torch.testing.assert_close(seen["ln_2"][0], stream)
    torch.testing.assert_close(seen[""][1], stream + seen["mlp"][1])
    expected = torch.cat([own_reference(block.ttt, row[None]) for row in seen["ttt"][0][:2]])
    torch.testing.assert_close(seen["ttt"][1][:2], expected, atol=1e-10, rtol=1e-10)


def own_reference(made: TTTMLP, x: Tensor) -> Tensor:
    """`reference` for a layer of another width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.HS", x.size(-1) // made.n_head)
        patch.setattr(f"{__name__}.H", made.n_head)
        with torch.enable_grad():
            return reference(made, x).detach()


@pytest.mark.parametrize("pieces", [[24], [1] * 24, [7, 1, 1, 9, 6], [5, 5, 14], [23, 1]])
def test_cached_chunks_equal_the_whole(ids: Tensor, pieces: list[int]) -> None:
    model, ids = gpt2(layers="0,1"), ids[:, :-1]
    cache = model.new_cache(batch_size=3)
    with torch.no_grad():
        whole = model(ids)[0]
        for _ in range(2):  # the second time in the same buffers
            read = torch.cat([model(piece, cache=cache)[0] for piece in ids.split(pieces, dim=1)], dim=1)
            torch.testing.assert_close(read, whole, atol=1e-10, rtol=1e-10)
            cache.length = 0


def test_what_was_learned_cannot_be_forgotten_in_part(ids: Tensor) -> None:
    model = gpt2()
    cache = model.new_cache(batch_size=3)
    with torch.no_grad():
        model(ids[:, :9], cache=cache)
        cache.length = 8
        with pytest.raises(ValueError, match=r"set to 8 tokens, but a TTT layer has learned from 9: .* set length = 0"):
            model(ids[:, 8:9], cache=cache)


def test_generation_with_a_cache_and_without_past_the_context(ids: Tensor) -> None:
    model, slid = gpt2(layers="0,1"), []
    texts = [
        list(generate(model, ids[0, :7].tolist(), max_new_tokens=60, temperature=1.0, use_cache=cached,
                      generator=torch.Generator().manual_seed(5), on_slide=lambda: slid.append(1)))
        for cached in (True, False)
    ]  # fmt: skip
    assert texts[0] == texts[1]
    assert len(slid) == 2
    assert len(set(texts[0])) > 10


def test_a_decoder_refuses_it() -> None:
    with pytest.raises(ValueError, match="a Decoder has no TTT layers"):
        Decoder(gpt2().float(), weights="float32")


def test_training_memory_is_near_what_was_measured() -> None:
    # As in test_gpt2.py, minus what the same model without the layers took: 609 MB with mini-batches of 16, 1615 MB
    # with those of 4.
    fields = {"vocab_size": 65, "block_size": 128, "n_layer": 3, "n_head": 4, "n_embd": 256}
    for size, measured in ((16, 609e6), (4, 1615e6)):
        with torch.device("meta"):
            base, model = (
                build("gpt2", fields | {"ttt": ttt}) for ttt in (None, {"layers": "0,1,2", "mini_batch_size": size})
            )
        more = model.activation_bytes(16, bytes_per_value=4) - base.activation_bytes(16, bytes_per_value=4)
        assert more / measured == pytest.approx(1, abs=0.4)
        assert training_bytes(model, 16, bytes_per_value=4) > training_bytes(base, 16, bytes_per_value=4) + more


# ---------------------------------------------------------------------------------------------------------------------
# In checkpoints and scripts.

OURS = [layout for layout in WRITERS if layout != "huggingface"]
loader, converter = script("load_checkpoint"), script("convert_checkpoint")


@pytest.mark.parametrize("layout", OURS)
def test_every_layout_of_ours_holds_it(tmp_path: Path, layout: str) -> None:
    saved = gpt2_record(settings={"ttt": {"layers": "0,1", "mini_batch_size": 3}})
    read = ckpt.load(ckpt.save(saved, tmp_path, layout=layout))
    assert_same(saved, read)
    model = build_model(read, device=torch.device("cpu"))
    assert model.settings.ttt == TTTSettings("0,1", mini_batch_size=3)
    assert {name for name in model.state_dict() if is_ttt(name)} == {name for name in saved.model_state if is_ttt(name)}


def test_transformers_has_no_place_for_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    path = ckpt.save(gpt2_record(settings={"ttt": {"layers": "0"}}), tmp_path / "checkpoints")
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CHECKPOINT_LAYOUT="huggingface")
    assert said.code == 3
    assert f"{path}: has TTT layers, which have no place in transformers' model: keep it in another layout" in said.err
    assert [one.path for one in ckpt.find(tmp_path / "checkpoints")] == [path]


def test_missing_layers_in_a_file_are_named(tmp_path: Path) -> None:
    saved = gpt2_record(settings={"ttt": {"layers": "1"}})
    del saved.model_state["h.1.ttt.W2"]
    with pytest.raises(CheckpointError, match=r"h\.1\.ttt\.W2 \(2, 16, 4\) is missing"):
        build_model(saved, device=torch.device("cpu"))


ONE = {
    "TRAINING_STEPS": "1",
    "WARMUP_STEPS": "0",
    "LEARNING_RATE": "1e-30",
    "WEIGHT_DECAY": "0",
}  # a step that moves nothing
ANY_SHAPE = dict.fromkeys(TINY) | {"DEVICE": "cpu", "TRAINING_DATA_SOURCE": None}
SETTINGS = {"TTT_LAYERS": "1", "TTT_MINI_BATCH_SIZE": "5", "TTT_BASE_LR": "2"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with layers and checkpoints at steps 4 and 8."""
    folder = tmp_path_factory.mktemp("trained")
    assert train(folder, **SETTINGS)[0] == 0
    return folder


def test_training_teaches_every_tensor_of_a_layer(trained: Path) -> None:
    before, after = ckpt.load(at_step(trained, 4)), newest(trained)
    assert after.model_settings["ttt"] == {
        "layers": "1",
        "base_lr": 2.0,
        "mini_batch_size": 5,
        "initial_gating_alpha": 0.1,
    }
    own = [name for name in after.model_state if is_ttt(name)]
    assert len(own) == 19
    assert [name for name in own if torch.equal(before.model_state[name], after.model_state[name])] == []


def test_loaded_layers_are_reported(trained: Path) -> None:
    record = newest(trained)
    counts = adapter_counts({name: tensor.shape for name, tensor in record.model_state.items()})["ttt"]
    done = command(
        "scripts/load_checkpoint.py",
        trained,
        PROMPT="Dear",
        MAX_NEW_TOKENS="40",
        SPECULATE="lookup",
        SAMPLE_SEED="1",
        **ANY_SHAPE,
    )
    assert done.returncode == 0, done.stderr
    assert f"\nLoaded {counts}\n" in done.stderr
    assert "SPECULATE=lookup is not used: TTT layers learn from each token, and cannot take it back" in done.stderr
    assert len(done.stdout) == 4 + 40 + 1
    said = call(loader, trained, QUANTIZE="int8")
    assert (said.code, "QUANTIZE=int8 needs a fast decoder: TTT layers learn" in said.err) == (2, True)


def test_fresh_layers_on_other_weights_leave_them_as_they_are(tmp_path: Path) -> None:
    assert train(tmp_path, **ONE)[0] == 0
    base = newest(tmp_path)
    state = {}
    for seed in ("1", "1", "2"):
        folder = tmp_path / f"on {len(state)}"
        folder.mkdir()
        code, said = train(folder, INIT_FROM=str(base.path), SEED=seed, **SETTINGS, **ONE)
        assert code == 0, said
        assert "TTT parameters added: 19 TTT tensors, " in said
        state[folder.name] = newest(folder).model_state
    first, again, other = state.values()
    assert all(torch.allclose(first[name], tensor, rtol=0, atol=1e-20) for name, tensor in base.model_state.items())
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())
    assert not torch.equal(first["h.1.ttt.W1"], other["h.1.ttt.W1"])
    assert first["h.1.ttt.W1"].std().item() == pytest.approx(0.02, rel=0.2)


def test_layers_are_transferred_to_a_run_that_begins_with_them(trained: Path, tmp_path: Path) -> None:
    source = newest(trained)
    changes = {"INIT_FROM": str(source.path), **ONE}
    code, said = train(tmp_path, **changes)
    assert code == 0, said
    assert "TTT parameters transferred: 19 TTT tensors, " in said
    taken = newest(tmp_path)
    assert taken.model_settings == source.model_settings
    close = [
        torch.allclose(taken.model_state[name], one, rtol=0, atol=1e-20) for name, one in source.model_state.items()
    ]
    assert all(close)
    code, said = train(tmp_path, **changes, TTT_LAYERS="0")
    assert (code, "TTT_LAYERS=0: the initial weights have 1; unset TTT_LAYERS" in said) == (2, True)


def test_blocks_that_the_weights_do_not_have_are_refused(tmp_path: Path) -> None:
    assert train(tmp_path, **ONE)[0] == 0
    code, said = train(tmp_path, INIT_FROM="latest", TTT_LAYERS="0,2", N_LAYER=None)
    assert (
        code,
        "TTT_LAYERS=0,2 (environment) names a missing block: N_LAYER=2 (checkpoint) has blocks 0 to 1" in said,
    ) == (2, True)
    code, said = train(tmp_path, RESUME="auto", TTT_LAYERS="0")
    assert (code, "TTT_LAYERS is '0', the checkpoint has None" in said) == (2, True)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("TTT_LAYERS", "0", "'0', the checkpoint has '1'"), ("TTT_BASE_LR", "1", "1.0, the checkpoint has 2.0"),
     ("TTT_MINI_BATCH_SIZE", "16", "16, the checkpoint has 5"), ("TTT_INITIAL_GATING_ALPHA", "0", "0.0, the checkpoint has 0.1")],
)  # fmt: skip
def test_a_resume_takes_no_other_layers(trained: Path, name: str, value: str, told: str) -> None:
    code, said = train(trained, RESUME="auto", **{name: value})
    assert (code, f"{name} is {told}" in said) == (2, True)


def test_a_resume_reports_the_layers_as_restored(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(trained, RESUME="auto")[0] == 0  # finished
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("adapters"))
    assert row.split()[1:5] == ["restored", "19", "TTT", "tensors,"]


def test_settings_are_plain_values_and_come_back() -> None:
    settings = GPT2Settings(**SMALL, ttt=TTTSettings("1,0"))
    assert build("gpt2", plain(settings)).settings == settings


# ---------------------------------------------------------------------------------------------------------------------
# Adapters alone, beside a frozen base.


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains and saves only the layers, on the weights of `base.pt`, and beside it the same run saved with
    all weights.
    """
    folder = tmp_path_factory.mktemp("apart")
    assert train(folder, **ONE | {"LEARNING_RATE": "0.01"})[0] == 0
    newest(folder).path.rename(folder / "base.pt")
    for name in ("whole", "alone"):
        (folder / name).mkdir()
        shutil.copy(folder / "letters.txt", folder / name)
        only = {"CHECKPOINT_ADAPTERS_ONLY": "true"} if name == "alone" else {"LORA_RANK": "2"}
        code, said = train(folder / name, INIT_FROM=str(folder / "base.pt"), **SETTINGS, **only)
        assert code == 0, said
    return folder


def test_only_the_layers_are_trained_and_saved_and_the_base_is_required(apart: Path) -> None:
    base, record = ckpt.load(apart / "base.pt"), newest(apart / "alone")
    assert record.parts == ["adapters", "optimizer"]
    assert len(record.model_state) == len(record.optimizer_state["state"]) == 19
    assert all(is_ttt(name) for name in record.model_state)
    whole = with_base(record, base)
    assert all(torch.equal(whole.model_state[name], tensor) for name, tensor in base.model_state.items())
    build_model(whole, device=torch.device("cpu"))
    moved = (apart / "base.pt").rename(apart / "moved.pt")
    said = call(loader, apart / "alone", PROMPT="a")
    moved.rename(apart / "base.pt")
    assert (said.code, "holds only adapters: set GPT2_MODEL_NAME or BASE_CHECKPOINT" in said.err) == (2, True)
    code, said = train(apart / "alone", RESUME="auto", BASE_CHECKPOINT=str(apart / "base.pt"), TRAINING_STEPS="9")
    assert code == 0, said
    assert newest(apart / "alone").parts == ["adapters", "optimizer"]


def test_beside_lora_both_kinds_are_trained_on_a_frozen_base(apart: Path) -> None:
    base, record = ckpt.load(apart / "base.pt"), newest(apart / "whole")
    assert all(torch.equal(record.model_state[name], tensor) for name, tensor in base.model_state.items())
    counts = adapter_counts({name: tensor.shape for name, tensor in record.model_state.items()})
    assert [text.split(",")[0] for text in counts.values()] == ["16 LoRA tensors", "19 TTT tensors"]
    assert len(record.optimizer_state["state"]) == 16 + 19
    whole = merged(record)
    assert whole.model_settings.keys() - base.model_settings.keys() == {"ttt"}
    ids = torch.arange(16)[None] % 20
    one, other = (build_model(each, device=torch.device("cpu")).eval()(ids)[0] for each in (record, whole))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_checkpoint_of_adapters_needs_a_named_base() -> None:
    values = {"PYTHON_DOTENV_DISABLED": "1", "MODEL_TYPE": "gpt2", "CHECKPOINT_ADAPTERS_ONLY": "true"}
    with pytest.raises(
        config.ConfigError,
        match=r"^CHECKPOINT_ADAPTERS_ONLY=true \(environment\) freezes the base: name it with PRETRAINED, GPT2_MODEL_NAME or",
    ):
        config.read(values | {"TTT_LAYERS": "1"})
    with pytest.raises(config.ConfigError, match=r"adds none: set LORA_RANK or TTT_LAYERS$"):
        config.read(values | {"GPT2_MODEL_NAME": "gpt2"})
    assert config.read(values | {"INIT_FROM": "x.pt"}).checkpoint_adapters_only  # the weights may bring them


# ---------------------------------------------------------------------------------------------------------------------
# What it is for: remembering what it has read.

KEYS, VALUES, WIDTH = 8, 8, 32


class Recall(torch.nn.Module):
    """The layer between embeddings and a head, without attention: only its inner weights carry anything to a later token."""

    def __init__(self, base_lr: float) -> None:
        super().__init__()
        settings = TTTSettings("0", base_lr=base_lr, mini_batch_size=4, initial_gating_alpha=1.0)
        self.layer = TTTMLP(settings, width=WIDTH, n_head=2)
        self.key, self.value = torch.nn.Embedding(KEYS, WIDTH), torch.nn.Embedding(VALUES + 1, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VALUES)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        read = self.layer(self.key(keys) + self.value(values))
        return self.head(read[:, KEYS:])  # (B, KEYS, VALUES), of the tokens that ask


def pairs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values of texts that tell a value for each key, drawn anew, and then ask for each in another order;
    and the answers.
    """
    keys, order = (torch.rand(count, KEYS, generator=generator).argsort(1) for _ in range(2))
    values = torch.randint(VALUES, (count, KEYS), generator=generator)
    nothing = torch.full_like(values, VALUES)
    return torch.cat([keys, keys.gather(1, order)], 1), torch.cat([values, nothing], 1), values.gather(1, order)


def recalled(base_lr: float, *, steps: int) -> float:
    """Train and return the share of right answers in new texts."""
    torch.manual_seed(0)
    model, generator = Recall(base_lr), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 6e-3 * min(1.0, 2 * (steps - step) / steps)
        keys, values, wanted = pairs(32, generator)
        F.cross_entropy(model(keys, values).flatten(0, 1), wanted.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    keys, values, wanted = pairs(1000, generator)
    with torch.no_grad():
        return (model(keys, values).argmax(-1) == wanted).float().mean().item()


def test_the_layer_recalls_what_it_has_read() -> None:
    assert recalled(1.0, steps=200) > 0.99


def test_control_without_inner_steps_it_recalls_nothing() -> None:
    """One of eight values is right by chance."""
    assert 0.1 < recalled(1e-8, steps=200) < 0.15
