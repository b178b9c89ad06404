"""Requests that a server of checkpoints refuses, each with one sentence in OpenAI's form."""

import base64
from pathlib import Path

import pytest
from model_server import serving
from script import train_family

from milepost.serving import app
from milepost.serving.app import BODY_LIMIT


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of two runs at steps 2, 4, 5, 6 and 8, in one folder."""
    return train_family(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def served(folder):
    with serving(folder, CHECKPOINT_PATH="latest", SERVE_SLOTS="4", SERVE_QUEUE="4") as running:
        yield running


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
    ({"prompt": ["a"] * 17, "n": 128}, "n"),
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


def test_a_refusal_says_what_to_do(served):
    """A limit of the texts of a request, characters that the model has never seen, a proxy that writes another Host."""
    said = [
        reply.value["error"]["message"]
        for reply in (
            served.complete(["a"] * 17, n=128),
            served.complete("\u2603"),
            served.send("GET", "/v1/models", Host="localhost", Origin="https://runs.example"),
        )
    ]
    assert said[0] == "17 prompts with n=128 are 2176 texts: expected at most 2048; send several requests"
    assert said[1].endswith("; remove them, or start the server with UNKNOWN_CHARACTERS=skip or replace")
    assert "let the proxy pass Host on" in said[2]


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
