"""A server of checkpoints on a real socket, in a thread of this process, and a client of the standard library."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import uvicorn
from drive import environment
from script import NOTHING_OF_TRAINING, script
from work import HANGING

from milepost import config
from milepost.config import Config
from milepost.generation.texts import Sampling, texts
from milepost.runtime.progress import Log
from milepost.samples import Loaded, open_named, sampling
from milepost.serving.app import Server, application
from milepost.serving.catalogue import Catalogue
from milepost.serving.generating import Generating
from milepost.serving.preparing import Defaults

QUICK = {"EVAL_INTERVAL": "0", "SAMPLE_INTERVAL": "0", "CHECKPOINT_INTERVAL": "0", "WARMUP_STEPS": "0"}


class Reply(NamedTuple):
    """A response: status, headers in lower case, and body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def value(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str | None, str | None]:
        """Status, code and param of an error, whose form is checked."""
        error = self.value["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return self.status, error["code"], error["param"]

    @property
    def events(self) -> list[Any]:
        """The values of a stream that ended as it should."""
        assert self.headers["content-type"].startswith("text/event-stream")
        *parts, last, rest = self.body.decode().split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        return [json.loads(part.removeprefix("data: ")) for part in parts]


class Served(NamedTuple):
    """A server that runs, and its port."""

    server: Server
    port: int

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Return the response to a request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANGING)
        with contextlib.closing(connection):
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return Reply(response.status, {n.lower(): v for n, v in response.getheaders()}, response.read())

    def complete(self, prompt: Any = "Dear", **fields: Any) -> Reply:
        return self.send("POST", "/v1/completions", {"prompt": prompt, **fields})

    def chat(self, *contents: str, **fields: Any) -> Reply:
        messages = [{"role": "user", "content": content} for content in contents]
        return self.send("POST", "/v1/chat/completions", {"messages": messages, **fields})

    def open_stream(self, prompt: str, **fields: Any) -> socket.socket:
        """Return a connection on which a stream has begun: its first event was read."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=HANGING)
        body = json.dumps({"prompt": prompt, "stream": True, **fields}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        seen = b""
        while b"data: " not in seen:
            seen += connection.recv(1 << 16)
        return connection


def settings_for(folder: Path, **changes: str) -> Config:
    return config.read(environment(folder, **NOTHING_OF_TRAINING | changes), reads=script("serve_checkpoint").READS)


@contextlib.contextmanager
def serving(folder: Path, *, key: str | None = None, log: Any = lambda line: None, **changes: str) -> Iterator[Served]:
    """A server of the checkpoints of a folder, as the script builds it."""
    settings = settings_for(folder, **changes)
    catalogue = Catalogue(
        dict(script("serve_checkpoint").sources(settings, log)), rows=settings.serve_slots, log=log,
        open_one=lambda name, bases: open_named(name, settings, Log(), bases=bases),
    )  # fmt: skip
    generating = Generating(slots=settings.serve_slots, queue=settings.serve_queue)
    defaults = Defaults(sampling=sampling(settings), seed=settings.sample_seed, unknown=settings.unknown_characters)
    server = Server(catalogue, generating, defaults=defaults, timeout=settings.serve_timeout, log=log)
    listener = socket.create_server(("127.0.0.1", 0))
    options = uvicorn.Config(application(server, key=key, names=[]), log_level="warning", access_log=False)
    loop = uvicorn.Server(options)
    thread = threading.Thread(target=loop.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Served(server, listener.getsockname()[1])
    finally:
        server.stop()
        server.ends_at = 0
        loop.should_exit = True
        for each in (thread, *catalogue.threads):
            each.join()


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


def until(happens) -> None:
    """Wait for an event of another thread; a test that hangs here fails by its own limit."""
    while not happens():
        torch.ones(1).add_(1)
