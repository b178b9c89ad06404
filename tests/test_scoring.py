"""milepost/evaluate/scoring.py against one prediction at a time, against transformers,
and against the table of a bigram.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from records import gpt2_record, record
from transformers import GPT2LMHeadModel

import models
from milepost import ckpt
from milepost.ckpt.restore import build_model
from milepost.evaluate import scoring
from milepost.evaluate.scoring import Window, log_likelihoods, windows

CPU = torch.device("cpu")
SETTINGS = {"vocab_size": 23, "block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 8}


@pytest.fixture(scope="module")
def model():
    """A GPT-2 with weights so large that its context matters."""
    torch.manual_seed(3)
    built = models.build("gpt2", SETTINGS).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return built


def ids(length, seed=0):
    return np.random.default_rng(seed).integers(SETTINGS["vocab_size"], size=length).astype(np.uint16)


@torch.no_grad()
def one_by_one(model, sequence, first_read):
    """Every prediction in a separate pass; `first_read[i]` is the first id used for prediction i."""
    found = []
    for i, start in enumerate(first_read):
        logits = model(torch.tensor(sequence[start : i + 1].astype(np.int64))[None])[0][0, -1]
        found.append(float(logits.double().log_softmax(-1)[int(sequence[i + 1])]))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# windows


def test_windows_are_adjacent_except_the_last():
    assert list(windows(11, context=4, stride=4)) == [Window(0, 0, 4), Window(4, 4, 8), Window(6, 8, 10)]


def test_windows_that_overlap():
    assert list(windows(10, context=4, stride=2)) == [
        Window(0, 0, 4),
        Window(2, 4, 6),
        Window(4, 6, 8),
        Window(5, 8, 9),
    ]


@pytest.mark.parametrize("length", [0, 1])
def test_nothing_is_predicted_without_two_ids(length):
    assert list(windows(length, context=4, stride=4)) == []


@given(st.integers(2, 200), st.integers(1, 20), st.data())
def test_each_prediction_is_made_once_with_enough_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    found = list(windows(length, context=context, stride=stride))
    assert [i for one in found for i in range(one.first, one.end)] == list(range(length - 1))
    for one in found:
        assert one.end - one.start <= context
        for i in range(one.first, one.end):
            assert i - one.start + 1 >= min(i + 1, context - stride + 1)


# ---------------------------------------------------------------------------------------------------------------------
# log_likelihoods


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_adjacent_windows_equal_one_prediction_at_a_time(model, batch_size):
    sequences = [ids(length, seed=length) for length in (15, 2, 6, 1, 7, 9)]
    found = log_likelihoods(model, sequences, batch_size=batch_size)
    # 15 ids make 14 predictions: windows of 6 read from 0 and 6, and the last one reads the six before the end, from 8.
    reads = {15: [0] * 6 + [6] * 6 + [8] * 2, 2: [0], 6: [0] * 5, 1: [], 7: [0] * 6, 9: [0] * 6 + [2] * 2}
    for sequence, each in zip(sequences, found, strict=True):
        assert each.dtype == np.float64
        np.testing.assert_allclose(each, one_by_one(model, sequence, reads[len(sequence)]), atol=1e-5)


def test_a_stride_of_one_gives_each_prediction_the_full_context(model):
    sequence = ids(20)
    (found,) = log_likelihoods(model, [sequence], batch_size=4, stride=1)
    np.testing.assert_allclose(found, one_by_one(model, sequence, [max(0, i - 5) for i in range(19)]), atol=1e-5)
    (apart,) = log_likelihoods(model, [sequence], batch_size=4)
    assert np.abs(found - apart).max() > 0.01  # the context matters to this model, so the above could have failed


def test_sequences_are_independent(model):
    sequences = [ids(length, seed=length) for length in (3, 14, 8)]
    together = log_likelihoods(model, sequences, batch_size=9)
    for sequence, each in zip(sequences, together, strict=True):
        np.testing.assert_allclose(each, log_likelihoods(model, [sequence], batch_size=1)[0], atol=1e-5)


def test_a_batch_with_too_many_logits_is_made_smaller(model, monkeypatch):
    sequences = [ids(30)]
    before = log_likelihoods(model, sequences, batch_size=100)[0]
    rows = []
    monkeypatch.setattr(scoring, "LOGITS", 2 * 6 * 23)
    monkeypatch.setattr(model, "forward", lambda ids, inner=model.forward: rows.append(len(ids)) or inner(ids))
    np.testing.assert_allclose(log_likelihoods(model, sequences, batch_size=100)[0], before, atol=1e-5)
    assert rows == [2, 2, 1]


def test_the_model_is_left_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    log_likelihoods(model, [ids(20)], batch_size=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_bigram_is_its_table():
    one = record(1, size=8)
    found = log_likelihoods(build_model(one, device=CPU).eval(), [np.array([3, 1, 4, 1, 5, 2, 6])], batch_size=2)[0]
    table = one.model_state["token_embedding_table.weight"].double().numpy()
    probabilities = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    expected = [np.log(probabilities[a, b]) for a, b in [(3, 1), (1, 4), (4, 1), (1, 5), (5, 2), (2, 6)]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_transformers_finds_the_same_loss(tmp_path):
    one = gpt2_record(5, settings={"vocab_size": 12, "block_size": 6})
    home = ckpt.save(one, tmp_path, layout="huggingface")
    theirs = GPT2LMHeadModel.from_pretrained(home).eval()
    sequence = np.random.default_rng(1).integers(12, size=6)
    with torch.no_grad():
        loss = float(theirs(torch.tensor(sequence)[None], labels=torch.tensor(sequence)[None]).loss)
    found = log_likelihoods(build_model(one, device=CPU).eval(), [sequence], batch_size=1)[0]
    assert -found.mean() == pytest.approx(loss, abs=1e-5)
