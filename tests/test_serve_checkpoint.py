"""scripts/serve_checkpoint.py in processes of its own, and the commands of docs/serving.md."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
from drive import ROOT, child_environment, command, train
from model_server import QUICK
from script import NOTHING_OF_TRAINING, call, script
from work import HANGING

SERVE = "scripts/serve_checkpoint.py"
KEY = "sk-a-secret-of-mine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint."""
    folder = tmp_path_factory.mktemp("served")
    assert train(folder, **QUICK, TRAINING_STEPS="2")[0] == 0
    return folder


@contextlib.contextmanager
def started(folder: Path, **changes: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The script, its address, and the lines that it wrote until it listened."""
    values = child_environment(folder, **NOTHING_OF_TRAINING | {"PORT": "0"} | changes)
    process = subprocess.Popen([sys.executable, SERVE], cwd=ROOT, env=values, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    try:
        while not (found := re.match(r"listening on (http://\S+)/v1 ", lines[-1] if lines else "")):
            line = process.stderr.readline()
            assert line, lines
            lines.append(line)
        yield process, found[1], lines
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def ask(address: str, path: str, body: object = None, *, key: str = "") -> dict:
    request = urllib.request.Request(address + path, None if body is None else json.dumps(body).encode())
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=HANGING) as response:
        return json.loads(response.read())


def test_a_signal_lets_running_requests_end_and_the_key_is_never_shown(folder):
    with started(folder, API_KEY=KEY, TEMPERATURE="0.7", SERVE_TIMEOUT="600") as (process, address, lines):
        asked = {"prompt": "Dear", "max_tokens": 2000, "seed": 4, "stream": True}
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=HANGING) as stream:
            body = json.dumps(asked).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
            stream.sendall(head.encode() + body)
            got = b""
            while b"data: " not in got:
                got += stream.recv(1 << 16)
            process.send_signal(signal.SIGTERM)
            while part := stream.recv(1 << 16):
                got += part
        assert b"data: [DONE]" in got
        assert process.wait(HANGING) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=HANGING)
        shown = "".join(lines) + process.stderr.read()
    assert KEY not in shown
    assert "Traceback" not in shown


def test_it_serves_although_nobody_reads_what_it_logs(folder):
    with started(folder) as (process, address, _):
        process.stderr.close()
        assert ask(address, "/v1/completions", {"prompt": "Dear", "max_tokens": 2})["usage"]["completion_tokens"] == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(HANGING) == 0


def test_a_port_that_is_taken_and_names_that_are_equal_are_refused(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = command(SERVE, folder, **NOTHING_OF_TRAINING | {"PORT": port})
    assert (done.returncode, done.stdout) == (2, "")
    assert f"PORT={port}" in done.stderr
    for host in ("a..b", "x" * 64):
        unheard = call(script("serve_checkpoint"), folder, SERVE_HOST=host, PORT=port)
        assert (unheard.code, unheard.out) == (2, "")
        assert f"SERVE_HOST={host} PORT={port}: cannot listen (" in unheard.err
        assert "set SERVE_HOST to an address of this machine" in unheard.err
    twice = call(script("serve_checkpoint"), folder, CHECKPOINT_PATH="latest,latest", PORT="0")
    assert twice.code == 2
    missing = call(script("serve_checkpoint"), folder, CHECKPOINT_PATH="a=missing.pt", PORT="0")
    assert missing.code == 3


PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_commands_of_the_page(folder):
    """The script as it is started there, and the body that curl sends."""
    first, second, third, harness = (block.strip() for block in pages.blocks(PAGE, "bash"))
    starts = [line for block in (first, third) for line in block.splitlines() if SERVE in line]
    assert [line.partition(" python3 ")[2] for line in starts] == [SERVE, SERVE]
    settings = [dict(pair.split("=", 1) for pair in line.partition(" python3 ")[0].split()) for line in starts]
    wren = next((folder / "checkpoints").glob("*.pt"))
    for values in settings:
        here = values | {
            "PORT": "0",
            "CHECKPOINT_PATH": values["CHECKPOINT_PATH"].replace("checkpoints/wren.pt", str(wren)),
        }
        with started(folder, **here) as (_, address, _):
            body = json.loads(re.search(r"-d '(.*)'", second)[1])
            assert f"{address.rpartition(':')[0]}:8000/v1/completions".replace("127.0.0.1", "localhost") in second
            assert ask(address, "/v1/completions", body)["model"] == "latest"
            names = [model["id"] for model in ask(address, "/v1/models")["data"]]
            assert names == [part.partition("=")[0] for part in values["CHECKPOINT_PATH"].split(",")]
    assert harness.startswith("lm_eval --model local-completions ")  # tests/exchange/test_openai_clients.py


def test_the_page_is_served_beside_the_api_and_asks_for_the_key_too(folder):
    with started(folder) as (_, address, _):
        with urllib.request.urlopen(f"{address}/", timeout=HANGING) as page:
            assert page.headers["content-type"].startswith("text/html")
            assert b"</html>" in page.read()
        (run,) = ask(address, "/api/runs")["runs"]
        assert run["step"] == 2
    with started(folder, API_KEY=KEY) as (_, address, _):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(address, "/api/runs")
        assert (caught.value.code, caught.value.headers["www-authenticate"][:5]) == (401, "Basic")
        assert len(ask(address, "/api/runs", key=KEY)["runs"]) == 1
