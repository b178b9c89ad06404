"""NOTIFY_URL: a webhook, a real server on this computer, is told how a training goes, and no file or line holds its address."""

import base64
import http.server
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from drive import ROOT, child_environment, command, newest, tensor_bytes, train
from test_faults import size_limit

from milepost import api, config
from milepost.runtime.notices import LONGEST, Notice, Notices, form

SECRET = "T0ken-of-the-webhook"


class Webhook(http.server.ThreadingHTTPServer):
    """Keeps what is posted, and answers with the next of `answers`, then with 200."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.posts: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        self.open = threading.Event()  # answers wait for it
        self.open.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{SECRET}?key={SECRET}"

    @property
    def events(self) -> list[dict[str, object]]:
        return [json.loads(body) for _, body in self.posts]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((dict(self.headers), body))
        self.server.open.wait()
        self.send_response(self.server.answers.pop(0) if self.server.answers else 200)
        self.send_header("Location", self.server.url)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    server = Webhook()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.open.set()
    server.shutdown()
    server.server_close()


def kinds(webhook: Webhook) -> list[object]:
    return [event["event"] for event in webhook.events]


# ---------------------------------------------------------------------------------------------------------------------
# What is told.


def test_a_run_tells_that_it_finished_and_a_resumed_one_where_it_began(webhook, tmp_path):
    assert train(tmp_path, NOTIFY_URL=webhook.url, CHECKPOINT_KEEP_BEST="0")[0] == 0
    (event,) = webhook.events
    assert (event["source"], event["event"]) == ("milepost", "finished")
    record = newest(tmp_path)
    assert event["run_id"] == record.run_id
    assert "8 steps" in event["text"]
    assert f"{record.validation_loss:.4f}" in event["text"]
    record.path.unlink()
    assert train(tmp_path, NOTIFY_URL=webhook.url, RESUME="auto")[0] == 0
    assert kinds(webhook)[1:] == ["resumed", "finished"]
    assert "step 4 of 8" in webhook.events[1]["text"]
    assert train(tmp_path, NOTIFY_URL=webhook.url, RESUME="auto")[0] == 0  # nothing is left to do
    assert len(webhook.events) == 3


def test_a_run_tells_why_it_failed_once(webhook, tmp_path):
    code, said = train(tmp_path, NOTIFY_URL=webhook.url, LEARNING_RATE="1e30", OPTIMIZER="adamw", GRAD_CLIP="0")
    assert code == 1
    (event,) = webhook.events
    assert event["event"] == "failed"
    reason = next(line for line in said.splitlines() if line.startswith("error: "))
    assert event["text"].startswith(reason)
    assert "stopped after step" in event["text"]


def test_a_run_that_cannot_begin_tells_why(webhook, tmp_path):
    code, _ = train(tmp_path, NOTIFY_URL=webhook.url, RESUME=str(tmp_path / "none.pt"))
    assert code == 3
    assert kinds(webhook) == ["failed"]
    assert "none.pt" in webhook.events[0]["text"]


def test_a_disk_that_refuses_is_told_once_and_so_is_the_end(webhook, tmp_path):
    with size_limit(30_000):
        assert train(tmp_path, NOTIFY_URL=webhook.url, CHECKPOINT_INTERVAL="2")[0] == 5
    assert kinds(webhook) == ["disk", "finished"]
    assert "step 2 could not be saved" in webhook.events[0]["text"]
    assert "NOT saved" in webhook.events[1]["text"]


def test_a_mirror_that_falls_behind_is_told_when_it_does_and_at_the_end(webhook, tmp_path):
    """While it lasts, the machine must not be lost."""
    (tmp_path / "mirror" / "latest.json").mkdir(parents=True)  # a folder where a file should be
    assert train(tmp_path, NOTIFY_URL=webhook.url, CHECKPOINT_MIRROR=f"file://{tmp_path}/mirror")[0] == 8
    assert kinds(webhook) == ["mirror", "finished"]
    first, last = (str(event["text"]) for event in webhook.events)
    assert first.startswith("step 4 is not mirrored (")
    assert "latest.json" in first
    assert last.endswith("; the mirror lacks the last checkpoint")


def test_a_signal_is_told(webhook, tmp_path):
    variables = child_environment(tmp_path, NOTIFY_URL=webhook.url, TRAINING_STEPS="1000000")
    with subprocess.Popen(
        [sys.executable, "training.py"], cwd=ROOT, env=variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as running:  # fmt: skip
        next(line for line in running.stderr if line.startswith("plan:"))
        running.send_signal(signal.SIGTERM)
        running.stderr.read()
    assert running.returncode == 130
    assert kinds(webhook) == ["interrupted"]
    assert webhook.events[0]["text"].startswith("after step ")


def test_the_python_interface_waits_until_all_is_sent(webhook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    api.train(notify_url=webhook.url, training_steps=2, runs_dir=str(tmp_path / "runs"))
    assert kinds(webhook) == ["finished"]


def test_generating_tells_nothing(webhook, tmp_path):
    assert train(tmp_path)[0] == 0
    done = command(
        "scripts/load_checkpoint.py", tmp_path, NOTIFY_URL=webhook.url, CHECKPOINT_PATH="latest", MAX_NEW_TOKENS="4"
    )
    assert done.returncode == 0
    done = command(
        "scripts/load_checkpoint.py", tmp_path, NOTIFY_URL=webhook.url, CHECKPOINT_PATH=str(tmp_path / "none")
    )
    assert done.returncode == 3
    assert webhook.posts == []


# ---------------------------------------------------------------------------------------------------------------------
# What it must not do.


def test_the_weights_are_those_of_a_run_that_tells_nothing(webhook, tmp_path):
    runs = tmp_path / "told", tmp_path / "silent"
    for folder in runs:
        folder.mkdir()
    assert train(runs[0], NOTIFY_URL=webhook.url)[0] == train(runs[1])[0] == 0
    assert tensor_bytes(newest(runs[0])) == tensor_bytes(newest(runs[1]))


@pytest.mark.parametrize("answer", [200, 404])
def test_the_address_stands_nowhere(answer, webhook, tmp_path):
    webhook.answers = [answer]
    code, said = train(tmp_path, NOTIFY_URL=webhook.url)
    assert code == 0
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(b"TRAINING_STEPS" in content for content in files.values())  # the settings do stand there
    assert [path for path, content in files.items() if SECRET.encode() in content] == []
    assert SECRET not in said
    assert "NOTIFY_URL=***" in said
    (written,) = tmp_path.rglob("config.env")
    again = config.read({"ENV_FILE": str(written)})
    assert again.notify_url is None


def test_a_wrong_address_is_refused_and_not_shown():
    for wrong in (f"ftp://host/{SECRET}", f"host/{SECRET}", f"https:///{SECRET}"):
        with pytest.raises(config.ConfigError) as caught:
            config.read({"NOTIFY_URL": wrong})
        assert SECRET not in str(caught.value)
        assert "NOTIFY_URL" in str(caught.value)


@pytest.mark.parametrize("answer", [302, 404])
def test_a_server_that_refuses_is_reported_once_and_costs_nothing_else(answer, webhook, tmp_path):
    assert train(tmp_path, CHECKPOINT_KEEP_BEST="0")[0] == 0
    newest(tmp_path).path.unlink()
    webhook.answers = [answer] * 2
    code, said = train(tmp_path, NOTIFY_URL=webhook.url, RESUME="auto")
    assert code == 0
    assert len(webhook.posts) == 2  # neither asked again nor followed
    assert said.count("NOTIFY_URL: ") == 1
    assert f"answered {answer}" in said


def sent_by(webhook: Webhook, *texts: str, wait: float = 60.0) -> list[str]:
    """Return what is reported while a message of each text is sent, with short pauses."""
    said: list[str] = []
    notices = Notices(timeout=60, pauses=(0.001, 0.001), wait=wait)
    notices.open(webhook.url, name="NOTIFY_URL", say=said.append)
    for kind, text in zip(("resumed", "finished"), texts, strict=False):
        notices.send(kind, text)
    notices.close()
    return said


def test_a_server_in_trouble_is_asked_again(webhook):
    webhook.answers = [503, 429]
    assert sent_by(webhook, "one") == []
    assert [event["text"] for event in webhook.events] == ["one"] * 3
    webhook.answers = [500] * 3
    (line,) = sent_by(webhook, "two", "three")
    assert "500" in line
    assert [event["text"] for event in webhook.events[3:]] == ["two"] * 3 + ["three"]


def test_an_end_does_not_wait_for_a_server_that_hangs(webhook):
    webhook.open.clear()
    assert sent_by(webhook, "one", wait=0.01) == []
    assert not webhook.open.is_set()  # it still hangs


def test_nobody_listens(webhook):
    webhook.shutdown()
    webhook.server_close()
    (line,) = sent_by(webhook, "one", "two")
    assert "cannot be reached" in line
    assert SECRET not in line


def test_nothing_is_sent_without_an_address(webhook):
    notices = Notices()
    notices.send("finished", "one")
    notices.close()
    assert webhook.posts == []


# ---------------------------------------------------------------------------------------------------------------------
# The forms of known receivers: https://api.slack.com/messaging/webhooks, https://docs.discord.com/developers/resources/webhook,
# https://docs.ntfy.sh/publish.

NOTICE = Notice("failed", "a < b & c > d @everyone", "run-1", 1.5)


def test_slack_reads_text_without_its_markup():
    for url in ("https://hooks.slack.com/services/T/B/x", "https://chat.example.com/hooks/x"):
        address, headers, body = form(url, NOTICE)
        assert address == url
        assert headers["Content-Type"] == "application/json"
        assert json.loads(body) == {"text": "milepost run run-1, failed: a &lt; b &amp; c &gt; d @everyone"}


def test_discord_reads_content_and_calls_nobody():
    assert (
        form("https://discord.com/api/v10/webhooks/1/x", NOTICE)[2]
        == form("https://discord.com/api/webhooks/1/x", NOTICE)[2]
    )
    values = json.loads(form("https://discord.com/api/webhooks/1/x", NOTICE)[2])
    assert values == {"content": f"milepost run run-1, failed: {NOTICE.text}", "allowed_mentions": {"parse": []}}
    longest = form("https://discord.com/api/webhooks/1/x", NOTICE._replace(text="x" * LONGEST))[2]
    assert len(json.loads(longest)["content"]) <= 2000


def test_ntfy_reads_the_body_as_text():
    for url in ("https://ntfy.sh/topic", "https://ntfy.example.com/topic"):
        _, headers, body = form(url, NOTICE)
        assert body.decode() == NOTICE.text
        assert headers["Title"] == "milepost run run-1, failed"


def test_a_user_in_the_address_becomes_a_header():
    address, headers, _ = form("https://me:p%40ss@host:8443/topic?a=1", NOTICE)
    assert address == "https://host:8443/topic?a=1"
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"me:p@ss"


def test_other_letters_in_an_address_are_encoded_and_what_is_encoded_stays():
    address, _, _ = form("https://me:\u00e9@host/a%20b/\u00fc?q=\u6f22&r=%C3%A9+1", NOTICE)
    assert address == "https://host/a%20b/%C3%BC?q=%E6%BC%A2&r=%C3%A9+1"


def test_every_other_server_reads_json():
    values = json.loads(form("https://example.com/x", NOTICE._replace(run_id=None))[2])
    assert values == {"source": "milepost", "event": "failed", "run_id": None, "text": NOTICE.text, "time": 1.5}
