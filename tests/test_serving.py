"""Checkpoints over HTTP, in this process: texts, forms, refusals, queue, ends."""

import base64
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from drive import at_step, train
from model_server import serving, settings_for
from script import family, train_family
from talks import talks_file

from milepost import ckpt
from milepost.evaluate.scoring import log_likelihoods
from milepost.generation.decoder import Decoder
from milepost.generation.texts import Sampling, texts
from milepost.mirror.following import Source
from milepost.runtime.progress import Log
from milepost.samples import Loaded, open_named
from milepost.serving import app, generating
from milepost.serving.app import BODY_LIMIT
from milepost.serving.catalogue import Catalogue, on_disk
from milepost.serving.generating import Job

QUICK = {"EVAL_INTERVAL": "0", "SAMPLE_INTERVAL": "0", "CHECKPOINT_INTERVAL": "0", "WARMUP_STEPS": "0"}
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


def alone(loaded: Loaded, prompt: str | list[int], *, seed: int, tokens: int, number: int = 0, **how) -> str:
    """What the model writes after a prompt when nothing else runs."""
    ids = loaded.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    how = {"temperature": 0.8, "top_k": 200} | how
    drawn = texts(
        loaded.generator, loaded.tokenizer, ids, sampling=Sampling(max_new_tokens=tokens, **how), seed=seed, first=number,
        count=1,
    )  # fmt: skip
    return "".join(next(drawn))


def texts_of(reply) -> list[str]:
    assert reply.status == 200, reply.body
    return [choice["text"] for choice in reply.value["choices"]]


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
    assert value["usage"] == {"prompt_tokens": 4, "completion_tokens": 30, "total_tokens": 34}
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


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


REFUSED = [
    ({"bogus": 1}, "bogus"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"top_p": 0}, "top_p"),
    ({"stop": [""]}, "stop"),
    ({"seed": -1}, "seed"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "\u2603"}, "prompt"),  # not in the vocabulary
]
CHATS_REFUSED = [
    ({"tools": [{}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"top_logprobs": 2}, "top_logprobs"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=str)
def test_a_completion_that_is_refused_names_the_field(served, fields, param):
    assert served.complete(**{"prompt": "Dear"} | fields).error == (400, None, param)


@pytest.mark.parametrize(("fields", "param"), CHATS_REFUSED, ids=str)
def test_a_chat_that_is_refused_names_the_field(served, fields, param):
    reply = served.send("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]} | fields)
    assert reply.error == (400, None, param)


def test_what_cannot_be_answered_is_refused_in_the_same_form(served):
    context = served.server.catalogue.models["latest"].loaded.model.settings.block_size
    assert served.complete("a" * context, max_tokens=1).status == 200
    assert served.complete("a" * (context + 1)).error == (400, "context_length_exceeded", "prompt")
    assert served.complete(model="/etc/passwd").error == (404, "model_not_found", "model")
    assert served.complete(model="../checkpoints").error == (404, "model_not_found", "model")
    assert served.send("GET", "/v1/models/%2e%2e%2fetc").error == (404, "model_not_found", "model")
    assert served.chat("hello").error == (400, "no_chat_template", "model")
    assert served.send("GET", "/v1/nothing").error == (404, None, None)
    assert served.send("GET", "/v1/completions").error == (405, None, None)
    for body in (b"", b"{", b"[1]", b"[" * 100_000, b'{"n": ' + b"9" * 10_000 + b"}", b"\xff"):
        assert served.send("POST", "/v1/completions", body).error == (400, None, None)
    assert served.send("POST", "/v1/completions", b" " * (BODY_LIMIT + 1)).error == (413, "body_too_large", None)
    assert served.complete("Dear", max_tokens=1, user="someone", seed=None, metadata={"a": "b"}).status == 200


def test_halves_of_surrogate_pairs_in_a_name_are_shown_escaped(served):
    """JSON can write them, UTF-8 cannot."""
    reply = served.send("POST", "/v1/completions", b'{"prompt": "Dear", "\\ud800": 1}')
    assert reply.error == (400, None, "\ud800")


def test_what_nobody_foresaw_is_an_error_in_the_same_form(folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("a secret of the machine")

    monkeypatch.setattr(app, "work_for", fail)
    with serving(folder, CHECKPOINT_PATH="latest") as running:
        reply = running.complete("Dear")
    assert (reply.error, reply.value["error"]["type"]) == ((500, None, None), "server_error")
    assert b"secret" not in reply.body


def test_pages_of_other_sites_and_their_names_are_refused(served):
    own = f"http://localhost:{served.port}"
    assert served.send("GET", "/v1/models", Host="evil.example").error == (421, "unknown_host", None)
    assert served.send("GET", "/v1/models", Host="[::1").error == (421, "unknown_host", None)
    assert served.send("GET", "/v1/models", Origin="http://evil.example").error == (403, "other_origin", None)
    for origin in ("null", "http://[", "http://[::1", "://", " "):
        assert served.send("GET", "/v1/models", Origin=origin).error == (403, "other_origin", None)
    assert served.send("GET", "/v1/models", Host=f"localhost:{served.port}", Origin=own).status == 200
    assert served.send("GET", "/v1/models", Host="192.168.1.7").status == 200
    assert "access-control-allow-origin" not in served.send("GET", "/v1/models").headers


def test_the_key_opens_everything_and_nothing_else_does(folder):
    with serving(folder, key="correct horse", CHECKPOINT_PATH="latest") as running:
        basic = base64.b64encode(b"any:correct horse").decode()
        for header in ("Bearer correct horse", f"Basic {basic}"):
            assert running.send("GET", "/v1/models", Authorization=header, Host="any.example").status == 200
        wrong = base64.b64encode(b"correct horse:x").decode()
        for header in (
            "",
            "Bearer",
            "Bearer correct hors",
            "Bearer \xe9",
            f"Basic {wrong}",
            "Basic ?",
            "correct horse",
        ):
            reply = running.send("GET", "/v1/models", Authorization=header)
            assert reply.error == (401, "invalid_api_key", None)
            assert b"horse" not in reply.body
        assert running.complete("Dear").error == (401, "invalid_api_key", None)
        assert running.send("GET", "/metrics").status == 401
        assert running.send("GET", "/health").value == {"status": "ok"}


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


def until(happens) -> None:
    """Wait for an event of another thread; a test that hangs here fails by its own limit."""
    while not happens():
        torch.ones(1).add_(1)


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


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_several_models_by_name_and_the_newest_of_a_folder(folder):
    steps = family(folder)
    paths = f"two={steps[2]},latest,{steps[4]}"
    with serving(folder, CHECKPOINT_PATH=paths) as running:
        shown = {model["id"]: model["step"] for model in running.send("GET", "/v1/models").value["data"]}
        assert shown == {"two": 2, "latest": 6, steps[4].stem: 4}
        assert running.send("GET", "/v1/models/two").value["step"] == 2
        assert running.complete("Dear").error == (404, "model_not_found", "model")  # which of them?
        first, second = (
            running.complete("Dear", model=name, seed=1, temperature=0, max_tokens=16) for name in ("two", "latest")
        )
        assert first.value["system_fingerprint"] != second.value["system_fingerprint"]


def test_latest_follows_a_run_while_a_request_ends_on_its_weights(tmp_path):
    assert train(tmp_path, **QUICK, TRAINING_STEPS="4")[0] == 0
    with serving(tmp_path, CHECKPOINT_PATH="latest") as running:
        generating = running.server.generating
        before = running.server.catalogue.models["latest"].loaded
        pool = ThreadPoolExecutor(1)
        asked = {"max_tokens": 4000, "seed": 3, "temperature": 1}
        early = pool.submit(running.complete, "Dear", **asked)
        until(lambda: generating.running)
        again = {"RESUME": str(at_step(tmp_path, 4)), "LEARNING_RATE": "0.5", "TRAINING_STEPS": "8"}
        assert train(tmp_path, **QUICK, **again)[0] == 0
        until(lambda: running.server.catalogue.models["latest"].loaded.record.step == 8)
        reply = early.result().value
        assert reply["system_fingerprint"].endswith("-step4")
        assert reply["choices"][0]["text"] == alone(before, "Dear", seed=3, tokens=4000, temperature=1.0)
        late = running.complete("Dear", **asked | {"max_tokens": 50}).value
        assert late["system_fingerprint"].endswith("-step8")
        assert late["choices"][0]["text"] != reply["choices"][0]["text"][:50]


def test_a_newer_checkpoint_that_cannot_be_opened_leaves_the_earlier_one(folder, tmp_path):
    settings, said = settings_for(folder), []
    opened = open_named(str(family(folder)[2]), settings, Log())

    def open_one(name, bases):
        if "step0006" in name:
            raise ckpt.CheckpointError(name, "is damaged", "use another")
        return opened

    catalogue = Catalogue(dict([on_disk("latest", folder / "checkpoints")]), open_one=open_one, rows=1, log=said.append)
    catalogue._seen["latest"] = tmp_path  # as if an earlier one had been the latest
    for _ in range(2):
        catalogue.look("latest")
    assert catalogue.models["latest"].loaded is opened
    assert sum("is damaged" in line for line in said) == 1


def test_no_thread_lives_on_that_has_computed_but_does_not_generate(folder):
    """OpenMP would keep threads for it, and with more of them than cores generation is slower by a third."""
    settings, threads = settings_for(folder), []

    def open_one(name, bases):
        threads.append(threading.current_thread())
        return open_named(name, settings, Log(), bases=bases)

    steps = {f"step{step}": Source(str(path)) for step, path in family(folder).items()}
    Catalogue(steps, open_one=open_one, rows=2, log=lambda line: None)
    assert len(threads) == len(steps)
    assert not any(thread.is_alive() for thread in threads)


def test_adapters_share_their_base(tmp_path):
    """The base is read once; its weights that no adapter changes are the same memory."""
    assert train(tmp_path, **QUICK, TRAINING_STEPS="2")[0] == 0
    base = at_step(tmp_path, 2)
    for name, seed in (("one", "1"), ("two", "2")):
        lora = {"LORA_RANK": "2", "INIT_FROM": str(base), "CHECKPOINT_DIR": str(tmp_path / name), "SEED": seed}
        assert train(tmp_path, **QUICK, **lora, TRAINING_STEPS="2", CHECKPOINT_ADAPTERS_ONLY="true")[0] == 0
    paths = f"base={base},one={tmp_path / 'one'},two={tmp_path / 'two'}"
    with serving(tmp_path, CHECKPOINT_PATH=paths) as running:
        models = {name: each.loaded.record.model_state for name, each in running.server.catalogue.models.items()}
        pointers = {state["wte.weight"].data_ptr() for state in models.values()}
        assert len(models) == 3
        assert len(pointers) == 1
        texts = {
            texts_of(running.complete("Dear", model=name, seed=1, max_tokens=40, temperature=1))[0] for name in models
        }
        assert len(texts) >= 2


def test_metrics_are_in_the_form_of_prometheus(served):
    served.complete("Dear", max_tokens=2)
    lines = served.send("GET", "/metrics").body.decode().splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    assert values['milepost_generated_tokens_total{model="latest"}'] >= 2
    assert values["milepost_first_token_seconds_count"] >= 1
    assert values['milepost_model_step{model="latest"}'] == 6
    assert {line.split()[2] for line in lines if line.startswith("# TYPE")} >= {
        "milepost_request_seconds",
        "milepost_requests_running",
    }
