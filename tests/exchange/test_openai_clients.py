"""Other programs' clients of scripts/serve_checkpoint.py: the openai package, and lm-evaluation-harness."""

import asyncio
from pathlib import Path

import numpy as np
import openai
import pytest
from drive import train
from model_server import QUICK, alone, serving
from talks import talks_file

from milepost.evaluate.scoring import log_likelihoods

QUESTION = [{"role": "user", "content": "wren sings?"}]


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Path:
    """A checkpoint with a chat template, of the fast decoder."""
    folder = tmp_path_factory.mktemp("talks")
    text = {"TRAINING_DATA_SOURCE": str(talks_file(folder)), "BLOCK_SIZE": "96"}
    assert train(folder, **QUICK, **text, N_EMBD="256", N_LAYER="1", TRAINING_STEPS="2")[0] == 0
    return folder


@pytest.fixture(scope="module")
def served(talking):
    with serving(talking, CHECKPOINT_PATH="latest", SERVE_SLOTS="16", SERVE_QUEUE="64", key="sk-1") as running:
        yield running


def options(served) -> dict:
    return {"base_url": f"http://127.0.0.1:{served.port}/v1", "api_key": "sk-1", "max_retries": 0}


def test_the_openai_package(served):
    client = openai.OpenAI(**options(served))
    loaded = served.server.catalogue.models["latest"].loaded
    assert [model.id for model in client.models.list()] == ["latest"]
    asked = {"model": "latest", "prompt": "wren", "max_tokens": 20, "seed": 3}
    expected = alone(loaded, "wren", seed=3, tokens=20)
    assert client.completions.create(**asked).choices[0].text == expected
    assert "".join(part.choices[0].text for part in client.completions.create(**asked, stream=True)) == expected
    scored = client.completions.create(**asked, logprobs=2, echo=True).choices[0].logprobs
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.text_offset)
    chat = {"model": "latest", "messages": QUESTION, "max_tokens": 20, "seed": 3}
    whole = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    parts = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage
    assert whole.choices[0].logprobs.content[0].top_logprobs[0].logprob <= 0


def test_the_openai_package_sends_the_message_of_a_reply_back(served):
    """As its guides write a conversation: the message as an object, and as all of its members."""
    client = openai.OpenAI(**options(served))
    asked = {"model": "latest", "max_tokens": 8, "seed": 3}
    answer = client.chat.completions.create(**asked, messages=QUESTION).choices[0].message
    plain = {"role": "assistant", "content": answer.content}
    found = [
        client.chat.completions.create(**asked, messages=[*QUESTION, each, {"role": "user", "content": "owl?"}])
        for each in (plain, answer, answer.model_dump())
    ]
    assert [each.choices for each in found[1:]] == [found[0].choices] * 2


def test_errors_of_the_openai_package(served):
    client = openai.OpenAI(**options(served))
    for kind, asked in [
        (openai.NotFoundError, {"model": "gpt-5", "prompt": "a"}),
        (openai.BadRequestError, {"model": "latest", "prompt": "wren " * 100}),
        (openai.BadRequestError, {"model": "latest", "prompt": "a", "suffix": "b"}),
    ]:
        with pytest.raises(kind) as caught:
            client.completions.create(**asked)
        assert caught.value.body["message"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(**options(served) | {"api_key": "sk-2"}).models.list()


def test_32_requests_at_once(served):
    """Over the async client, mixed lengths and prompts: each text is that of its seed alone."""
    loaded = served.server.catalogue.models["latest"].loaded
    asked = [(["wren", "the owl", "at dawn"][i % 3], i, 10 + i) for i in range(32)]

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(**options(served)) as client:
            calls = (
                client.completions.create(model="latest", prompt=prompt, seed=seed, max_tokens=tokens)
                for prompt, seed, tokens in asked
            )
            return [reply.choices[0].text for reply in await asyncio.gather(*calls)]

    expected = [alone(loaded, prompt, seed=seed, tokens=tokens) for prompt, seed, tokens in asked]
    assert asyncio.run(all_at_once()) == expected


def test_lm_evaluation_harness_finds_the_likelihoods_of_an_evaluation(served, monkeypatch):
    """local-completions, with the tokens of the checkpoint: sums of log-probabilities, and whether the most likely."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    loaded = served.server.catalogue.models["latest"].loaded
    harness = LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{served.port}/v1/completions", model="latest", tokenizer_backend=None,
        tokenized_requests=False, max_length=95, num_concurrent=1, batch_size=2,
    )  # fmt: skip
    pairs = [("wren sings", " at dawn"), ("the owl", " in the hedge"), ("rook", " flies")]
    harness.tokenized_requests, harness.tokenizer = True, loaded.tokenizer  # the harness opens only the hub's
    harness.tok_encode = lambda text, **_: loaded.tokenizer.encode(text)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = harness.loglikelihood(requests)
    for (context, rest), (total, greedy) in zip(pairs, found, strict=True):
        before, whole = loaded.tokenizer.encode(context), loaded.tokenizer.encode(context + rest)
        (each,) = log_likelihoods(loaded.model, [np.array(whole)], batch_size=1)
        assert total == pytest.approx(each[len(before) - 1 :].sum(), abs=1e-4)
        assert greedy is False
