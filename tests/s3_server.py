"""A server that speaks S3, moto's, behind a proxy of the tests' own that breaks requests. Both listen on 127.0.0.1."""

import contextlib
import http.client
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

BUCKET = "bucket"
Fault = Callable[["Proxy"], bool]  # breaks a request; returns whether it is answered by that


class Proxy(BaseHTTPRequestHandler):
    """Hands a request on, unless a fault is due."""

    protocol_version = "HTTP/1.1"
    upstream: tuple[str, int]
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

    def hand_on(self) -> None:
        """Ask the server, and return its answer."""
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
        self.wfile.write(content if self.command != "HEAD" else b"")

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


@contextlib.contextmanager
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Proxy]]:
    """Run server and proxy with one bucket; the environment of this process leads to the proxy."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in {
        "ACCESS_KEY_ID": "key",
        "SECRET_ACCESS_KEY": "hidden-secret",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with contextlib.closing(http.client.HTTPConnection(*server.get_host_and_port())) as plain:
        plain.request("POST", "/moto-api/reset")  # what an earlier server of this process held
        plain.getresponse().read()
    handler = type("Handler", (Proxy,), {"upstream": server.get_host_and_port(), "faults": [], "seen": [], "sent": []})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    try:
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        handler.seen.clear()
        handler.sent.clear()
        yield handler
        handler.faults.clear()
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()
