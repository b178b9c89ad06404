"""The page over HTTP: who may ask, what is answered, what a change sends, and the script that serves it."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from drive import ROOT, child_environment
from page_runs import BASE, CUT, family, line
from script import NOTHING_OF_TRAINING, call, script
from serving import served
from work import HANGING

from milepost.page import library as page_library
from milepost.page import routes as page_routes
from milepost.page.library import Library, id_of
from milepost.page.routes import application
from milepost.web.guard import is_own_host

watch = script("watch_runs")
BASE_ID, CUT_ID = id_of(Path(BASE)), id_of(Path(CUT))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return family(tmp_path)


@pytest.fixture
def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    monkeypatch.setattr(page_library, "BUDGET", float("inf"))  # on a slow machine, too, a look reads all runs
    library = Library(folder / "runs", folder / "checkpoints")
    with (
        served(application(library, stopping=lambda: False)) as address,
        httpx.Client(base_url=address, timeout=HANGING) as client,
    ):
        yield client


def test_runs_in_what_is_no_folder_are_refused(tmp_path):
    (tmp_path / "runs").write_text("a file")
    said = call(watch, tmp_path, PORT="0")
    assert (said.code, said.err) == (
        2,
        f"error: RUNS_DIR={tmp_path / 'runs'}: is not a folder; set the folder of the runs\n",
    )


def test_the_page_and_its_data(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "script-src 'sha256-" in page.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    found = client.get("/api/runs").json()
    assert (len(found["runs"]), found["ids"], found["unread"]) == (4, 4, 0)
    curves = client.get("/api/curves", params={"run": [BASE_ID, CUT_ID]}).json()
    assert set(curves["curves"]) == {BASE_ID, CUT_ID}
    details = client.get("/api/details", params={"run": BASE_ID}).json()
    assert len(details[BASE_ID]["checkpoints"]) == 3
    part = client.get("/api/curves", params={"run": BASE_ID, "axis": "step", "from": "10", "to": "20"}).json()
    assert part["curves"][BASE_ID]["train"]["loss"]["shown"]["step"] == [10, 12, 14, 16, 18, 20]
    for answer in (page, client.get("/api/runs")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in answer.headers


PATHS = ["/", "/api/runs", "/api/curves", "/api/details", "/api/events"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::1"]
)
def test_a_name_that_another_site_made_point_here_is_refused(path: str, host: str, client: httpx.Client) -> None:
    assert client.get(path, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost"])
def test_a_request_of_another_site_is_refused(path: str, origin: str, client: httpx.Client) -> None:
    assert client.get(path, headers={"Origin": origin}).status_code == 403


def test_its_own_origin_is_not_refused(client: httpx.Client) -> None:
    assert client.get("/api/runs", headers={"Origin": str(client.base_url).rstrip("/")}).status_code == 200


@pytest.mark.parametrize(("host", "own"), [
    ("localhost:8000", True), ("LOCALHOST", True), ("127.0.0.1:8000", True), ("[::1]:8000", True), ("192.168.1.9", True), ("box:1", True),
    ("evil.example", False), ("127.1.evil", False), ("0x7f.1", False), ("a@localhost.evil", False), ("", False), ("[", False),
])  # fmt: skip
def test_own_hosts(host: str, own: bool) -> None:
    assert is_own_host(host, {"box", "localhost"}) == own


@pytest.mark.parametrize("run", ["../../etc/passwd", "%2e%2e%2f", BASE, "/etc/passwd", "\x00", "a" * 5000])
def test_a_request_names_no_path(run: str, client: httpx.Client) -> None:
    assert client.get("/api/details", params={"run": run}).json() == {}
    assert client.get("/api/curves", params={"run": run}).json() == {"labels": {}, "curves": {}}
    assert client.get(f"/api/{quote(run[:99], safe='')}").status_code == 404


@pytest.mark.parametrize(
    "query", [{"axis": "step"}, {"axis": "odd", "from": "1", "to": "2"}, {"axis": "step", "from": "x", "to": "2"}]
)
def test_a_window_that_is_none_is_refused(query: dict[str, str], client: httpx.Client) -> None:
    assert client.get("/api/curves", params={"run": BASE_ID} | query).status_code == 400
    assert client.get("/api/curves", params={"run": BASE_ID, "axis": "step", "from": "nan", "to": "inf"}).json()[
        "curves"
    ] == {BASE_ID: {"train": {}, "validation": {}}}


def test_a_checkpoint_is_verified_when_asked_and_shown_so_until_it_is_written_anew(
    client: httpx.Client, folder: Path
) -> None:
    def shown() -> list[dict[str, object]]:
        client.get("/api/runs")
        return client.get("/api/details", params={"run": BASE_ID}).json()[BASE_ID]["checkpoints"]

    first, second, _ = shown()
    assert (first["problems"], second["problems"]) == (None, None)
    flip_a_byte(folder, str(second["path"]))
    asked = [{"run": BASE_ID, "checkpoint": each["id"]} for each in (first, second)]
    intact, damaged = (client.post("/api/verify", params=each).json() for each in asked)
    assert intact == []
    assert "damaged" in damaged[0]
    assert [each["problems"] for each in shown()] == [intact, damaged, None]
    for wrong in (
        {"run": BASE_ID},
        {"run": CUT_ID, "checkpoint": first["id"]},
        {"run": "..", "checkpoint": "/etc/passwd"},
    ):
        assert client.post("/api/verify", params=wrong).status_code == 404
    assert client.get("/api/verify", params=asked[0]).status_code == 405
    assert client.post("/api/verify", params=asked[0], headers={"Origin": "http://evil.example"}).status_code == 403


def test_verifications_that_wait_leave_the_page_to_others(folder: Path) -> None:
    """More of them than the server has threads, while one takes its time."""
    library = Library(folder / "runs", folder / "checkpoints")
    library.look()
    (base,) = (each for each in library.details([BASE_ID]).values())
    path = f"/api/verify?run={BASE_ID}&checkpoint={base['checkpoints'][0]['id']}"
    with served(application(library, stopping=lambda: False)) as address:
        with library._verifying:
            asked = [posted(address, path) for _ in range(60)]
            assert len(httpx.get(f"{address}/api/runs", timeout=HANGING).json()["runs"]) == 4
        assert [whole(each).endswith(b"\r\n\r\n[]") for each in asked] == [True] * 60


def posted(address: str, path: str) -> socket.socket:
    """A connection on which a request was sent."""
    host, _, port = address.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=HANGING)
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
    return connection


def whole(connection: socket.socket) -> bytes:
    """All that is answered on a connection."""
    with connection, connection.makefile("rb") as file:
        return file.read()


def flip_a_byte(folder: Path, name: str) -> None:
    """Change a byte of the tensors of a checkpoint, and neither its size nor its time."""
    (path,) = (folder / "checkpoints").glob(Path(name).name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_nothing_but_reading_is_answered(client: httpx.Client) -> None:
    assert [client.request(method, "/api/runs").status_code for method in ("POST", "PUT", "DELETE")] == [405] * 3


def events(response: httpx.Response) -> Iterator[dict[str, object]]:
    """The events of a stream."""
    for text in response.iter_lines():
        if text.startswith("data: "):
            yield json.loads(text.removeprefix("data: "))


def test_a_line_that_is_written_arrives(client: httpx.Client, folder: Path) -> None:
    since = client.get("/api/runs").json()["version"]
    with client.stream("GET", "/api/events", params={"since": since}) as response:
        with open(folder / "runs" / CUT / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line(302, "train", 1.25, since=1.79e9))
        event = next(events(response))
    assert [(run["id"], run["step"], run["loss"]) for run in event["runs"]] == [(CUT_ID, 302, 1.25)]
    assert event["version"] > since


def test_a_version_of_an_earlier_server_gets_everything(client: httpx.Client) -> None:
    with client.stream("GET", "/api/events", params={"since": "999999"}) as response:
        assert len(next(events(response))["runs"]) == 4


def test_too_many_listeners_are_asked_to_wait(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_routes, "MOST_LISTENERS", 1)
    with client.stream("GET", "/api/events") as first:
        stream = events(first)  # a stream that nobody refers to would be closed
        next(stream)
        refused = client.get("/api/events")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "10")


# ---------------------------------------------------------------------------------------------------------------------
# The script


def started(folder: Path, **changes: str) -> tuple[subprocess.Popen[str], str]:
    """The script in a process of its own, and the address that it logged."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "watch_runs.py")], stderr=subprocess.PIPE, text=True,
        env=child_environment(folder, **NOTHING_OF_TRAINING, PORT="0", **changes),
    )  # fmt: skip
    for text in process.stderr:
        if "http://" in text:
            return process, text[text.index("http://") :].split()[0]
    raise AssertionError(process.wait())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_script_serves_until_a_signal_while_a_page_is_open(number: int, folder: Path) -> None:
    process, address = started(folder)
    try:
        with httpx.stream("GET", f"{address}api/events", timeout=HANGING) as response:
            assert len(next(events(response))["runs"]) == 4
            os.kill(process.pid, number)
            assert process.wait(HANGING) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_port_that_is_taken_is_a_mistake_in_the_settings(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = call(watch, folder, PORT=str(taken.getsockname()[1]))
    assert (said.code, said.out) == (2, "")
    assert "PORT" in said.err


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = call(watch, folder, PORT="0")
    assert said.code == 2
    assert f"pip install {package}" in said.err


def test_a_host_that_is_not_this_machines_is_a_mistake(folder: Path) -> None:
    said = call(watch, folder, SERVE_HOST="203.0.113.7", PORT="0")  # of documentation (RFC 5737)
    assert said.code == 2
    assert "SERVE_HOST" in said.err
