"""Checkpoints over HTTP, in this process: texts, forms, refusals, queue, ends."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drive import train
from model_server import QUICK, alone, serving, texts_of, until
from script import call, script, train_family
from talks import talks_file

from milepost.evaluate.scoring import log_likelihoods
from milepost.generation.decoder import Decoder
from milepost.serving import app, generating
from milepost.serving.generating import Job

PROMPTS = ["Dear", "Dear Wren", "I am", "the w", "", "a", "Dear letter", "so"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of two runs at steps 2, 4, 5, 6 and 8, in one folder."""
    return train_family(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A checkpoint that the fast decoder generates from in float32."""
    folder = tmp_path_factory.mktemp("wide")
    assert train(folder, **QUICK, N_EMBD="256", N_LAYER="1", BLOCK_SIZE="32", TRAINING_STEPS="2")[0] == 0
    return folder


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Path:
    """A checkpoint that was trained on conversations."""
    folder = tmp_path_factory.mktemp("talks")
    text = {"TRAINING_DATA_SOURCE": str(talks_file(folder)), "BLOCK_SIZE": "96"}
    assert train(folder, **QUICK, **text, TRAINING_STEPS="2")[0] == 0
    return folder


@pytest.fixture(scope="module")
def served(folder):
    with serving(folder, CHECKPOINT_PATH="latest", SERVE_SLOTS="4", SERVE_QUEUE="4") as running:
        yield running


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """A checkpoint of the fast decoder with a context of several chunks of a prompt."""
    folder = tmp_path_factory.mktemp("long")
    assert train(folder, **QUICK, N_EMBD="256", N_LAYER="1", BLOCK_SIZE="256", TRAINING_STEPS="2")[0] == 0
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def test_a_completion_is_the_text_of_the_seed(served):
    loaded = served.server.catalogue.models["latest"].loaded
    reply = served.complete("Dear", seed=7, max_tokens=30)
    assert texts_of(reply) == [alone(loaded, "Dear", seed=7, tokens=30)]
    assert texts_of(served.complete("Dear", seed=8, max_tokens=30)) != texts_of(reply)
    value = reply.value
    assert (value["object"], value["model"], value["choices"][0]["finish_reason"]) == (
        "text_completion",
        "latest",
        "length",
    )
    usage = {"prompt_tokens": 4, "completion_tokens": 30, "total_tokens": 34}
    assert value["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    assert value["system_fingerprint"].endswith(f"-step{loaded.record.step}")


def test_several_prompts_and_several_texts_of_each(served):
    loaded = served.server.catalogue.models["latest"].loaded
    ids = loaded.tokenizer.encode("Wren")
    asked = {"n": 2, "seed": 3, "max_tokens": 9, "temperature": 1.2, "top_p": 0.9}
    expected = [
        alone(loaded, prompt, seed=3, tokens=9, number=number, temperature=1.2, top_p=0.9)
        for prompt in ("Dear", "Wren")
        for number in (0, 1)
    ]
    assert texts_of(served.complete(["Dear", "Wren"], **asked)) == expected
    assert texts_of(served.complete([loaded.tokenizer.encode("Dear"), ids], **asked)) == expected
    assert texts_of(served.complete(ids, **asked)) == expected[2:]
    assert expected[0] != expected[1]
    assert expected[:2] != expected[2:]


def test_texts_that_begin_alike_read_their_beginning_once(long, monkeypatch):
    read: list[int] = []
    follow = Decoder._follow

    def counted(self, ids, cache):
        read.append(len(ids))
        return follow(self, ids, cache)

    monkeypatch.setattr(Decoder, "_follow", counted)
    said = "Dear Wren, I am the winter of the letters. " * 4
    with serving(long, CHECKPOINT_PATH="latest", SERVE_SLOTS="4") as running:
        loaded = running.server.catalogue.models["latest"].loaded
        for prompt, n, kept in ((said, 2, 0), (said + "so", 1, 128), ("so" + said, 1, 0)):
            expected = [alone(loaded, prompt, seed=3, tokens=5, number=number) for number in range(n)]
            read.clear()
            reply = running.complete(prompt, seed=3, max_tokens=5, n=n)
            assert texts_of(reply) == expected
            assert reply.value["usage"]["prompt_tokens_details"] == {"cached_tokens": kept}
            first = sum(count for count in read if count > 1)  # a prompt; further tokens are read one by one
            assert first == len(loaded.tokenizer.encode(prompt)) - kept + (n - 1) * (len(said) - 128)
        assert 'milepost_kept_tokens_total{model="latest"} 128\n' in running.send("GET", "/metrics").body.decode()


def test_stops_and_echo(served):
    (text,) = texts_of(served.complete("Dear", seed=7, max_tokens=30))
    stop = text[10:12]
    reply = served.complete("Dear", seed=7, max_tokens=30, stop=[stop, "\u2603"], echo=True)
    assert texts_of(reply) == ["Dear" + text.partition(stop)[0]]
    assert reply.value["choices"][0]["finish_reason"] == "stop"


def test_a_stream_has_the_same_text_and_ends_with_its_usage(served):
    asked = {"seed": 7, "max_tokens": 20, "n": 2, "logprobs": 1}
    whole = served.complete("Dear", **asked)
    events = served.complete("Dear", **asked, stream=True, stream_options={"include_usage": True}).events
    *chunks, last = events
    assert (last["choices"], last["usage"]) == ([], whole.value["usage"])
    for choice in whole.value["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == ["length"]
        scores = [part["logprobs"] for part in own if part["logprobs"]]
        for name, values in choice["logprobs"].items():
            assert [value for part in scores for value in part[name]] == values
    assert all(chunk["usage"] is None for chunk in chunks)


def test_log_probabilities_of_a_prompt_are_those_of_an_evaluation(served):
    """echo with one token more, as lm-evaluation-harness asks; text_offset counts characters."""
    loaded = served.server.catalogue.models["latest"].loaded
    prompt = "Dear Wren, I am"
    ids = loaded.tokenizer.encode_array(prompt)
    (reply,) = served.complete(prompt, max_tokens=1, echo=True, logprobs=3, temperature=0).value["choices"]
    found = reply["logprobs"]
    (expected,) = log_likelihoods(loaded.model, [ids], batch_size=1)
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(found["token_logprobs"]) == len(ids) + 1
    assert found["text_offset"] == list(range(len(prompt) + 1))
    assert "".join(found["tokens"]) == reply["text"]
    assert all(len(top) == 3 for top in found["top_logprobs"][1:])
    greedy = found["top_logprobs"][-1]
    assert max(greedy.values()) == found["token_logprobs"][-1]  # equal to the bit: clients compare so
    only = served.complete(prompt, max_tokens=0, echo=True, logprobs=0).value["choices"][0]
    assert (only["text"], only["logprobs"]["token_logprobs"]) == (prompt, found["token_logprobs"][:-1])


def test_the_token_that_begins_a_text_precedes_a_prompt(tmp_path):
    """As in load_checkpoint. It counts, and is listed as a token without characters, for echo does not show it."""
    how = {"TOKENIZER": "sentencepiece", "BPE_VOCAB_SIZE": "320", "N_LAYER": "1", "TRAINING_STEPS": "20"}
    assert train(tmp_path, **QUICK, **how)[0] == 0
    with serving(tmp_path, CHECKPOINT_PATH="latest", TEMPERATURE="0", MAX_NEW_TOKENS="9") as running:
        loaded = running.server.catalogue.models["latest"].loaded
        plain = loaded.tokenizer.encode("Dear Wren")
        ids = [loaded.tokenizer.begin_of_text, *plain]
        reply = running.complete("Dear Wren")
        assert running.complete(ids).value["choices"] == reply.value["choices"]
        assert (running.complete(ids).value["usage"], reply.value["usage"]["prompt_tokens"]) == (
            reply.value["usage"],
            len(ids),
        )
        assert running.complete(plain).value["usage"]["prompt_tokens"] == len(plain)
        (echoed,) = running.complete("Dear Wren", echo=True, logprobs=1).value["choices"]
    printed = call(
        script("load_checkpoint"), tmp_path, CHECKPOINT_PATH="latest", PROMPT="Dear Wren", TEMPERATURE="0", MAX_NEW_TOKENS="9"
    )  # fmt: skip
    assert (printed.code, printed.out) == (0, f"Dear Wren{texts_of(reply)[0]}\n"), printed.err
    assert echoed["text"] == loaded.tokenizer.decode(plain) + texts_of(reply)[0]
    scores = echoed["logprobs"]
    shown = [loaded.tokenizer.decode([each]) for each in plain]
    assert scores["tokens"][: len(ids)] == ["", *shown]
    assert scores["text_offset"][: len(ids)] == [0, *(len("".join(shown[:at])) for at in range(len(shown)))]
    (expected,) = log_likelihoods(loaded.model, [np.array(ids)], batch_size=1)
    assert scores["token_logprobs"][0] is None
    assert scores["token_logprobs"][1 : len(ids)] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_that_are_read_together_are_those_alone(wide, dtype, monkeypatch):
    """16 requests at once over one decoder, to the bit; each text stays a function of its prompt and its seed."""
    together = []
    plain = Decoder.read_ahead
    monkeypatch.setattr(Decoder, "read_ahead", lambda self, t, c: (together.append(len(t)), plain(self, t, c)))
    go_on = held_up(monkeypatch)
    with serving(wide, CHECKPOINT_PATH="latest", DTYPE=dtype) as running, ThreadPoolExecutor(16) as pool:
        model = running.server.catalogue.models["latest"]
        asked = [(prompt, seed) for prompt in PROMPTS for seed in (1, 2)]
        replies = pool.map(lambda each: running.complete(each[0], seed=each[1], max_tokens=60, logprobs=2), asked)
        until(lambda: sum(running.server.generating.requests()) == len(asked))
        go_on.set()
        found = [texts_of(reply)[0] for reply in replies]
        one = running.complete(PROMPTS[0], seed=1, max_tokens=60, logprobs=2).value["choices"][0]["logprobs"]
        many = [running.complete(PROMPTS[0], seed=1, max_tokens=60, logprobs=2).value["choices"][0]["logprobs"]]
    assert found == [alone(model.loaded, prompt, seed=seed, tokens=60) for prompt, seed in asked]
    assert many == [one]
    assert len(set(found)) == len(found)
    assert isinstance(model.loaded.generator, Decoder)
    if not model.together:
        pytest.skip("on this processor a pass for several texts has other bits or no gain, so requests take turns")
    assert max(together) == len(asked)


def held_up(monkeypatch) -> threading.Event:
    """What lets the generating thread take steps: until it is set, requests only gather."""
    go_on, plain = threading.Event(), generating.take_step
    monkeypatch.setattr(generating, "take_step", lambda text, running: go_on.wait() and plain(text, running))
    return go_on


def test_the_texts_of_a_request_are_read_together_too(wide, monkeypatch):
    together = []
    plain = Decoder.read_ahead
    monkeypatch.setattr(Decoder, "read_ahead", lambda self, t, c: (together.append(len(t)), plain(self, t, c)))
    with serving(wide, CHECKPOINT_PATH="latest", SERVE_SLOTS="3", DTYPE="float32") as running:
        model = running.server.catalogue.models["latest"]
        found = texts_of(running.complete(["Dear", "Wren"], n=4, seed=5, max_tokens=20, echo=True, logprobs=1))
    assert found == [
        prompt + alone(model.loaded, prompt, seed=5, tokens=20, number=number)
        for prompt in ("Dear", "Wren")
        for number in range(4)
    ]
    if not model.together:
        pytest.skip("on this processor a pass for several texts has other bits, so they take turns")
    assert max(together) == 3  # the slots


def test_a_request_with_many_texts_leaves_slots_to_others(folder, monkeypatch):
    ended, end = [], Job.end
    monkeypatch.setattr(Job, "end", lambda job, error: (ended.append(job.work.n), end(job, error)))
    go_on = held_up(monkeypatch)
    with (
        serving(folder, CHECKPOINT_PATH="latest", SERVE_SLOTS="2", SERVE_QUEUE="1") as running,
        ThreadPoolExecutor(2) as pool,
    ):
        many = pool.submit(running.complete, "Dear", n=32, max_tokens=50, seed=1)
        until(lambda: len(running.server.generating.running) == 2)
        one = pool.submit(running.complete, "Wren", max_tokens=3)
        until(lambda: running.server.generating.requests() == (1, 1))
        go_on.set()
        assert len(texts_of(one.result())) == 1
        assert len(set(texts_of(many.result()))) > 25
        assert running.server.generating.requests() == (0, 0)
    assert ended == [1, 32]


DEMANDING = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message comes first') }}{% endif %}"
    "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
)


def test_a_template_that_demands_a_system_message_answers_a_conversation_that_has_one(talking):
    """The conversation of which the server learns how answers end has none."""
    system = {"role": "system", "content": "Be brief."}
    with serving(talking, CHECKPOINT_PATH="latest", SAMPLE_SEED="1", MAX_NEW_TOKENS="4", TEMPERATURE="0") as running:
        models = running.server.catalogue.models
        loaded = models["latest"].loaded
        record = replace(loaded.record, data=loaded.record.data | {"template": DEMANDING})
        models["latest"] = replace(models["latest"], loaded=loaded._replace(record=record))
        asked = {"messages": [system, {"role": "user", "content": "wren?"}]}
        reply = running.send("POST", "/v1/chat/completions", asked)
        refused = running.chat("wren?")
    expected = alone(loaded, loaded.tokenizer.encode("Be brief.\nwren?\n"), seed=1, tokens=4, temperature=0.0)
    assert (reply.status, reply.value["choices"][0]["message"]["content"]) == (200, expected)
    assert refused.error == (400, None, "messages")
    assert "a system message comes first" in refused.value["error"]["message"]


def test_a_chat_is_answered_by_the_template(talking):
    with serving(talking, CHECKPOINT_PATH="latest") as running:
        reply = running.chat("wren sings?", max_tokens=12, seed=1, logprobs=True, top_logprobs=2)
        assert reply.status == 200, reply.body
        (choice,) = reply.value["choices"]
        content = choice["logprobs"]["content"]
        drawn = bytes(byte for token in content for byte in token["bytes"]).decode()
        assert choice["message"] == {"role": "assistant", "content": choice["message"]["content"], "refusal": None}
        assert drawn.startswith(choice["message"]["content"])
        assert all(len(token["top_logprobs"]) == 2 for token in content)
        events = running.chat("wren sings?", max_completion_tokens=12, seed=1, stream=True).events
        deltas = [event["choices"][0]["delta"] for event in events]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
        parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "wren sings?"}]}], "seed": 1}
        again = running.send("POST", "/v1/chat/completions", parts | {"max_tokens": 12})
        assert again.value["choices"][0]["message"] == choice["message"]
        assert running.chat("who " * 100).error == (400, "context_length_exceeded", "messages")


def test_the_message_of_a_reply_is_taken_back_as_it_was_sent(talking):
    """Its members that are null, which the openai package sends back, are as good as left out."""
    with serving(talking, CHECKPOINT_PATH="latest", SAMPLE_SEED="1", MAX_NEW_TOKENS="4") as running:
        question = {"role": "user", "content": "wren?"}
        answer = running.chat("wren?").value["choices"][0]["message"]
        more = {"tool_calls": None, "function_call": None, "audio": None, "annotations": None}
        replies = [
            running.send("POST", "/v1/chat/completions", {"messages": [question, each, question]})
            for each in ({"role": "assistant", "content": answer["content"]}, answer, answer | more)
        ]
        refused = answer | {"tool_calls": [{}]}
        assert running.send("POST", "/v1/chat/completions", {"messages": [question, refused]}).error == (
            400,
            None,
            "messages.1",
        )
    assert [reply.status for reply in replies] == [200] * 3
    assert [reply.value["choices"] for reply in replies[1:]] == [replies[0].value["choices"]] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Many requests


ENDLESS = {"max_tokens": 1 << 20, "seed": 1}


def test_a_full_queue_refuses_and_clients_that_go_free_their_slots(folder):
    with serving(folder, CHECKPOINT_PATH="latest", SERVE_SLOTS="2", SERVE_QUEUE="1") as running:
        streams = [running.open_stream("Dear", **ENDLESS) for _ in range(2)]
        pool = ThreadPoolExecutor(1)
        waiting = pool.submit(running.complete, "Wren", seed=5, max_tokens=3)
        until(lambda: len(running.server.generating.waiting) == 1)
        refused = running.complete("Dear")
        assert refused.error == (429, "queue_full", None)
        assert int(refused.headers["retry-after"]) >= 1
        streams[0].close()
        assert len(texts_of(waiting.result())) == 1  # the other still generates
        assert running.server.generating.requests() == (1, 0)
        streams[1].close()
        until(lambda: not running.server.generating.running)
        assert running.complete("Dear", max_tokens=2).status == 200
        lines = running.send("GET", "/metrics").body.decode().splitlines()
        assert 'milepost_requests_total{path="/v1/completions",status="429"} 1' in lines
        assert "milepost_requests_running 0" in lines


def test_a_client_that_reads_no_more_frees_its_slot(folder, monkeypatch):
    """Its buffers fill, and no traceback but a line tells of it."""
    said, refused = [], []
    monkeypatch.setattr(app, "SLOWEST_READ", 0.01)
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "error", lambda *args, **more: refused.append((args, more)))
    with serving(folder, log=said.append, CHECKPOINT_PATH="latest") as running:
        with running.open_stream("Dear", **ENDLESS, logprobs=20):
            until(lambda: any("left unread" in line for line in said))
            until(lambda: not running.server.generating.running)
        assert running.complete("Dear", max_tokens=2).status == 200
    assert not any(more.get("exc_info") for _, more in refused)


def test_requests_take_turns(folder):
    """A short request ends while a long one that came before it still runs."""
    with serving(folder, CHECKPOINT_PATH="latest", SERVE_SLOTS="2") as running:
        stream = running.open_stream("Dear", **ENDLESS)
        assert running.complete("Wren", max_tokens=5).status == 200
        assert running.server.generating.requests() == (1, 0)
        stream.close()


def test_a_request_that_takes_too_long_ends_with_an_error(folder):
    """The time is up once the request runs, however fast this machine is."""
    with serving(folder, CHECKPOINT_PATH="latest") as running, ThreadPoolExecutor(1) as pool:
        for stream in (False, True):
            running.server.timeout = 600.0
            asked = pool.submit(running.complete, "Dear", **ENDLESS, stream=stream)
            until(lambda: running.server.generating.running)
            running.server.timeout = 1e-3
            reply = asked.result()
            error = reply.events[-1]["error"] if stream else reply.value["error"]
            assert error["code"] == "timeout"
            assert stream or (reply.status, reply.headers["x-should-retry"]) == (504, "false")
            until(lambda: not running.server.generating.running)
        assert running.complete("Dear", **ENDLESS).error == (504, "timeout", None)  # before it runs


def test_a_server_that_stops_refuses_and_ends_what_runs(folder):
    with serving(folder, CHECKPOINT_PATH="latest") as running, ThreadPoolExecutor(1) as pool:
        stream = pool.submit(running.complete, "Dear", **ENDLESS, stream=True)
        until(lambda: running.server.generating.running)
        running.server.stop()
        assert running.complete("Dear").error == (503, "stopping", None)
        assert running.send("GET", "/health").status == 503
        running.server.ends_at = 0
        assert stream.result().events[-1]["error"]["code"] == "stopping"


def metrics(served) -> tuple[list[str], dict[str, float]]:
    """The lines of the metrics, and their values by name and labels."""
    lines = served.send("GET", "/metrics").body.decode().splitlines()
    return lines, {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")
    }


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_to_the_first_token_is_not_that_of_the_last(folder, monkeypatch, stream):
    """Nor is the prompt that echo shows a token that was generated."""
    ended, end = [], Job.end
    monkeypatch.setattr(Job, "end", lambda job, error: (ended.append((job, time.monotonic())), end(job, error)))
    with serving(folder, CHECKPOINT_PATH="latest") as running:
        assert running.complete("Dear", max_tokens=0, echo=True, stream=stream).status == 200
        assert "milepost_first_token_seconds_count" not in metrics(running)[1]
        before = metrics(running)[1]["milepost_request_seconds_sum"]
        assert running.complete("Dear", max_tokens=200, echo=True, stream=stream).status == 200
        _, values = metrics(running)
    job, at = ended[-1]
    assert values["milepost_first_token_seconds_count"] == 1
    whole = values["milepost_request_seconds_sum"] - before
    assert whole - values["milepost_first_token_seconds_sum"] >= (at - job.first_token) * 0.999 > 0


def test_metrics_are_in_the_form_of_prometheus(served):
    served.complete("Dear", max_tokens=2)
    lines, values = metrics(served)
    assert values['milepost_generated_tokens_total{model="latest"}'] >= 2
    assert values["milepost_first_token_seconds_count"] >= 1
    assert values['milepost_model_step{model="latest"}'] == 6
    assert {line.split()[2] for line in lines if line.startswith("# TYPE")} >= {
        "milepost_request_seconds",
        "milepost_requests_running",
    }
