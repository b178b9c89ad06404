"""Packed conversations: the loss and gradients of each alone, an order that is a function, and exact resumes."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from drive import at_step, logged, newest, tensor_bytes, train
from talks import rows, talks_file
from torch.nn import functional as F

import models
from milepost.text import tokenization
from milepost.text.corpus import open_corpus
from milepost.text.errors import DataError
from milepost.text.examples import Examples, prepare_examples
from milepost.text.packing import IGNORED, PackedBatches, Packing, best_fit, packed, validation_batches
from milepost.text.scan import scan
from models.model import Model

T = 128
ROOMY = {"block_size": T, "batch_size": 4, "accumulation": 3, "seed": 5}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    folder = tmp_path_factory.mktemp("talks")
    corpus = open_corpus(str(talks_file(folder, count=60)), data_dir=folder)
    byte = tokenization.from_dict({"kind": "byte"})
    return prepare_examples(corpus, scan(corpus), byte, template=None, validation_fraction=0, cache_dir=folder).train


def made(kind: str, **changes: object) -> Model:
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "block_size": T, "n_layer": 2, "n_head": 2, "n_embd": 16} | changes
    if kind == "bigram":
        shape = {"vocab_size": 256, "block_size": T}
    model = models.build(kind, shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # so that attention looks at single tokens
                parameter.mul_(4)
    return model


def alone(examples: Examples, packing: Packing, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one conversation, read straight from the token file."""
    start = int(examples.ends[number - 1]) if number else 0
    tokens = torch.from_numpy(np.asarray(examples.tokens[start : int(examples.ends[number])]).astype(np.int64))[: T + 1]
    targets = torch.where(tokens[1:] % 2 == 1, tokens[1:] // 2, IGNORED)
    return tokens[None, :-1] // 2, targets


def gpt2_by_hand(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The logits (T, V) of a GPT-2 of two blocks and two heads for one text, in plain torch."""
    w, n = weights, ids.size(1)
    x = w["wte.weight"][ids[0]] + w["wpe.weight"][:n]
    future = torch.ones(n, n).triu(1).bool()
    for block in ("h.0", "h.1"):
        a = F.layer_norm(x, (16,), w[f"{block}.ln_1.weight"], w[f"{block}.ln_1.bias"])
        q, k, v = (a @ w[f"{block}.attn.c_attn.weight"].T + w[f"{block}.attn.c_attn.bias"]).split(16, -1)
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            scores = (q[:, part] @ k[:, part].T / math.sqrt(8)).masked_fill(future, -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, -1) @ w[f"{block}.attn.c_proj.weight"].T + w[f"{block}.attn.c_proj.bias"]
        a = F.layer_norm(x, (16,), w[f"{block}.ln_2.weight"], w[f"{block}.ln_2.bias"])
        a = F.gelu(a @ w[f"{block}.mlp.c_fc.weight"].T + w[f"{block}.mlp.c_fc.bias"], approximate="tanh")
        x = x + a @ w[f"{block}.mlp.c_proj.weight"].T + w[f"{block}.mlp.c_proj.bias"]
    x = F.layer_norm(x, (16,), w["ln_f.weight"], w["ln_f.bias"])
    return x @ w["wte.weight"].T


def gradients(model: Model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def loss_alone(kind: str, model: Model, examples: Examples, packing: Packing) -> torch.Tensor:
    """The mean over all counted targets, of each conversation by itself, without padding."""
    total, count = torch.zeros(()), 0
    weights = dict(model.named_parameters())
    for number in packing.used.tolist():
        x, targets = alone(examples, packing, number)
        logits = gpt2_by_hand(weights, x) if kind == "gpt2" else model(x).logits[0]
        total = total + F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        count += int((targets >= 0).sum())
    return total / count


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bigram"])
@pytest.mark.parametrize("pack", [True, False])
def test_a_packed_batch_has_the_loss_and_gradients_of_each_conversation_alone(
    kind: str, pack: bool, examples: Examples
) -> None:
    model, packing = made(kind), packed(examples, block_size=T, pack=pack, answers=True)
    (batch,) = validation_batches(packing, batch_size=1000, steps=0, positions=model.packs)
    assert packing.windows < len(packing.used) if pack else packing.windows == len(packing.used)
    ours = model(*batch).loss
    theirs = loss_alone(kind, model, examples, packing)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    expected = gradients(model, theirs)
    for name, gradient in gradients(model, ours).items():
        assert torch.allclose(gradient, expected[name], rtol=0, atol=1e-5), name
    if pack and kind != "bigram":  # the negative control: attention that crosses, or positions that go on
        for wrong in ((), (torch.where(batch[2] == 0, 1, batch[2]),)):
            crossing = gradients(model, model(*batch[:2], *wrong).loss)
            assert max((crossing[name] - expected[name]).abs().max() for name in expected) > 1e-3


def test_a_fused_kernel_and_a_chunked_head_agree(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    model, packing = made("gpt2"), packed(examples, block_size=T, pack=True, answers=True)
    (batch,) = validation_batches(packing, batch_size=1000, steps=0, positions=True)
    expected, wanted = (loss := model(*batch).loss).item(), gradients(model, loss)
    monkeypatch.setattr("models.attention.SHORT", 0)
    monkeypatch.setattr("models.head.CHUNK", 256 * 100)
    loss = model(*batch).loss
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert all(torch.allclose(g, wanted[name], rtol=0, atol=1e-5) for name, g in gradients(model, loss).items())


def test_accumulated_and_shared_batches_are_one_big_batch(examples: Examples) -> None:
    """To 1e-6: the mean over processes of the sums over micro-batches."""
    model, packing = made("gpt2"), packed(examples, block_size=T, pack=True, answers=True)
    shape = {name: ROOMY[name] for name in ("batch_size", "accumulation", "seed")}
    whole = PackedBatches(packing, **{**shape, "batch_size": 12, "accumulation": 1})  # type: ignore[arg-type]
    big = gradients(model, model(*(part[0] for part in whole.at(2))).loss)
    means = gradients(model, model(*(part[0] for part in whole.at(2))).loss)
    for processes in (1, 2, 4):
        total = dict.fromkeys(big, torch.zeros(()))
        loss, unweighted = 0.0, 0.0
        for rank in range(processes):
            rows = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
            own = PackedBatches(packing, **shape, rows=rows)  # type: ignore[arg-type]
            for micro, divisor in zip(zip(*own.at(2), strict=True), own.divisors(2), strict=True):
                part = model(*micro).loss
                loss, unweighted = loss + part.item() / divisor / processes, unweighted + part.item() / 3 / processes
                for name, gradient in gradients(model, part / divisor / processes).items():
                    total[name] = total[name] + gradient
        assert loss == pytest.approx(model(*(part[0] for part in whole.at(2))).loss.item(), abs=1e-6)
        assert all(torch.allclose(total[name], means[name], rtol=0, atol=1e-6) for name in big)
        assert abs(unweighted - loss) > 1e-6  # the control: a mean of means is another number


@pytest.mark.parametrize("pack", [True, False])
def test_every_epoch_has_every_conversation_once_in_another_order(pack: bool, examples: Examples) -> None:
    packing = packed(examples, block_size=T, pack=pack, answers=True)
    batches = PackedBatches(packing, batch_size=1, seed=5)
    numbers = np.arange(3 * packing.windows).reshape(3, -1)
    epochs = [[tuple(window) for window in batches._windows(each)] for each in numbers]
    for windows in epochs:
        assert sorted(member for window in windows for member in window) == list(range(len(packing.used)))
        assert all(packing.lengths[list(window)].sum() <= T for window in windows)
    assert epochs[0] != epochs[1] != epochs[2]
    if pack:  # the neighbours change too
        assert {frozenset(window) for window in epochs[0]} != {frozenset(window) for window in epochs[1]}


def test_any_step_is_found_without_those_before_it(examples: Examples) -> None:
    packing = packed(examples, block_size=T, pack=True, answers=True)
    shape = {"batch_size": 4, "accumulation": 3, "seed": 5}
    straight = PackedBatches(packing, **shape)  # type: ignore[arg-type]
    seen = [straight.at(step) for step in range(9)]
    for step in (8, 3, 0, 7):
        fresh = PackedBatches(packing, **shape, start_step=step, start_window=straight.windows_seen(step))  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(fresh.at(step), seen[step], strict=True))
    halves = [PackedBatches(packing, **shape, rows=rows).at(4) for rows in (slice(0, 2), slice(2, 4))]  # type: ignore[arg-type]
    assert all(torch.equal(torch.cat(parts, 1), whole) for *parts, whole in zip(*halves, seen[4], strict=True))
    other = PackedBatches(packing, **{**shape, "seed": 6}).at(4)  # type: ignore[arg-type]
    assert not torch.equal(other[0], seen[4][0])


def test_best_fit_fills_windows() -> None:
    draw = np.random.default_rng(0)
    lengths = np.sort(draw.integers(1, 65, size=2000))[::-1]
    windows = best_fit(lengths, 64)
    fullness = np.bincount(windows, weights=lengths)
    assert fullness.max() <= 64
    assert len(fullness) <= math.ceil(lengths.sum() / 64) * 1.02
    assert best_fit(np.array([5, 4, 3, 2, 1]), 6).tolist() == [0, 1, 2, 1, 0]


def test_long_conversations_are_cut_or_left_out_and_counted() -> None:
    question, answer = [2 * 7] * 6, [2 * 8 + 1] * 4
    tokens = np.array([*question, *answer, *question * 3, *answer, *question[:2], *answer], dtype=np.uint32)
    ends = np.cumsum([10, 22, 6]).astype(np.int64)
    packing = packed(Examples(tokens, ends), block_size=7, pack=True, answers=True)
    assert (packing.used.tolist(), packing.cut, packing.left_out) == ([0, 2], 1, 1)
    assert (packing.lengths.tolist(), packing.counted.tolist()) == ([7, 5], [2, 4])
    everything = packed(Examples(tokens, ends), block_size=7, pack=False, answers=False)
    assert (everything.used.tolist(), everything.counted.tolist(), everything.cut) == ([0, 1, 2], [7, 7, 5], 2)
    with pytest.raises(DataError, match="block size of 2"):
        packed(Examples(tokens[:10], ends[:1]), block_size=2, pack=True, answers=True)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.

RUNS = {
    "gpt2, accumulation": {"GRADIENT_ACCUMULATION_STEPS": "2"},
    "gpt2, bpe, bfloat16, all tokens": {"TOKENIZER": "bpe", "BPE_VOCAB_SIZE": "300", "DTYPE": "bfloat16", "LOSS_ON": "all"},
    "gpt2 with TTT layers, which cannot pack": {"TTT_LAYERS": "0", "TTT_MINI_BATCH_SIZE": "8"},
    "gpt2, padded": {"PACKING": "false"},
    "gpt2, compiled": {"COMPILE": "true"},
    "llama": {"MODEL_TYPE": "llama"},
    "bigram": {"MODEL_TYPE": "bigram"},
}  # fmt: skip


def test_a_part_of_the_text_without_conversations_is_refused(tmp_path: Path) -> None:
    """Of one conversation nothing is left to train on once a part is held out; those held out may all be too long."""
    one = talks_file(tmp_path, count=1)
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(one), BLOCK_SIZE="64")
    assert (code, "no conversation is left to train on: use more, or hold out" in said) == (4, True), said
    assert train(tmp_path, TRAINING_DATA_SOURCE=str(one), BLOCK_SIZE="64", VALIDATION_FRACTION="0")[0] == 0
    long = rows(tmp_path / "long.jsonl", [{"prompt": "why? " * 100, "completion": "so"}])
    for interval in ("1", "0"):  # 0: the first evaluation comes after the last step
        changes = {"VALIDATION_DATA": str(long), "BLOCK_SIZE": "64", "EVAL_INTERVAL": interval}
        code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(one), **changes)
        assert code == 4
        assert "none of 1 conversations to validate on has an answer within a block size of 64" in said
        assert "after step" not in said  # it is known before anything is trained


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    changes = RUNS[name] | {"TRAINING_DATA_SOURCE": str(talks_file(tmp_path, count=30)), "BLOCK_SIZE": "128"}
    straight = tmp_path / "straight"
    straight.mkdir()
    code, said = train(straight, CHECKPOINT_INTERVAL="1", REPLAY_CHECK_INTERVAL="0", **changes)
    assert code == 0, said
    assert "template" in newest(straight).data
    for step in (3, 4):
        again = tmp_path / f"from {step}"
        (again / "checkpoints").mkdir(parents=True)
        shutil.copy(at_step(straight, step), again / "checkpoints")
        shutil.copytree(straight / "runs", again / "runs")
        code, said = train(again, RESUME="auto", REPLAY_CHECK_INTERVAL="2", **changes)
        assert code == 0, said
        assert tensor_bytes(newest(straight)) == tensor_bytes(newest(again))
        assert logged(straight) == logged(again)


def test_settings_of_conversations_change_the_weights(tmp_path: Path) -> None:
    source = str(talks_file(tmp_path, count=30))
    results = []
    for number, changes in enumerate([{}, {"LOSS_ON": "all"}, {"PACKING": "false"}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert train(folder, TRAINING_DATA_SOURCE=source, BLOCK_SIZE="128", TRAINING_STEPS="4", **changes)[0] == 0
        results.append(tensor_bytes(newest(folder)))
    assert all(results[i] != results[j] for i, j in ((0, 1), (0, 2), (1, 2)))
