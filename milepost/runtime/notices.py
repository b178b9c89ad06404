"""Messages to a webhook about how a training goes: sent by a thread of its own, each kind once, never in its way.

Slack, Discord and ntfy get the forms that they read, every other server {"source", "event", "run_id", "text", "time"} as JSON.
"""

import base64
import json
import queue
import re
import string
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Kind = Literal["resumed", "finished", "interrupted", "failed", "disk", "mirror"]

TIMEOUT = 5.0  # seconds of a request
PAUSES = (1.0, 2.0)  # seconds before a request that failed is tried again
WAIT = 20.0  # seconds that an end waits for what is not sent: all attempts of one message
LONGEST = 1900  # characters of a text; Discord takes 2,000
PRINTED = string.punctuation  # of an address, what stays as it is: letters of other alphabets are encoded
DISCORD = re.compile(r"/api(/v[0-9]+)?/webhooks/")


class Notice(NamedTuple):
    """A message before it is put into the form of its receiver."""

    kind: Kind
    text: str
    run_id: str | None
    time: float  # Unix seconds


class Notices:
    """The messages of one training. Without a webhook nothing is sent."""

    def __init__(self, *, timeout: float = TIMEOUT, pauses: tuple[float, ...] = PAUSES, wait: float = WAIT) -> None:
        self.run_id: str | None = None
        self._timeout, self._pauses, self._wait = timeout, pauses, wait
        self._kinds: set[Kind] = set()
        self._queue: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def open(self, url: str, *, name: str, say: Callable[[str], object]) -> None:
        """Send to `url` from now on. The first failure is reported once by `say`, under the `name` of the setting."""
        self._thread = threading.Thread(target=self._send_all, args=(url, name, say), daemon=True)
        self._thread.start()

    def send(self, kind: Kind, text: str) -> None:
        """Send a message and return at once, unless one of its kind was sent."""
        if self._thread is not None and kind not in self._kinds:
            self._kinds.add(kind)
            self._queue.put(Notice(kind, text[:LONGEST], self.run_id, round(time.time(), 3)))

    def close(self) -> None:
        """Wait until all is sent, but not for long."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(self._wait)
            self._thread = None

    def _send_all(self, url: str, name: str, say: Callable[[str], object]) -> None:
        reported = False
        while (notice := self._queue.get()) is not None:
            problem = self._sent(url, notice)
            if problem and not reported:
                reported = True
                say(f"{name}: {problem}, so it was not told: {notice.kind}; training does not need it")

    def _sent(self, url: str, notice: Notice) -> str | None:
        """Return why the message could not be sent, after several attempts; None if it was."""
        for pause in (*self._pauses, None):
            problem, passing = post(url, notice, timeout=self._timeout)
            if problem is None or pause is None or not passing:
                break
            time.sleep(pause)
        return problem


def post(url: str, notice: Notice, *, timeout: float) -> tuple[str | None, bool]:
    """Send a message; return what went wrong, without the address, which is a secret, and whether that may pass."""
    import http.client
    import urllib.error
    import urllib.request

    class Unmoved(urllib.request.HTTPRedirectHandler):
        """Follows no redirect: it would turn the message into a request without a body."""

        def redirect_request(self, *_: Any) -> None:
            return None

    address, headers, body = form(url, notice)
    host = urllib.parse.urlsplit(address).hostname
    try:
        request = urllib.request.Request(address, body, headers)
        with urllib.request.build_opener(Unmoved).open(request, timeout=timeout):
            return None, False
    except urllib.error.HTTPError as error:
        error.close()
        return f"{host} answered {error.code}", error.code == 429 or error.code >= 500
    except (OSError, http.client.HTTPException) as error:  # no answer, or one that is not HTTP
        reason = getattr(error, "reason", error)
        return f"{host} cannot be reached ({getattr(reason, 'strerror', None) or type(reason).__name__})", True
    except Exception as error:  # a thread that only reports must not end with a traceback
        return f"{host} cannot be asked ({type(error).__name__})", False


def form(url: str, notice: Notice) -> tuple[str, dict[str, str], bytes]:
    """Return the address without a user, the headers and the body of a message, as the receiver reads it."""
    address, headers = without_user(url)
    parts = urllib.parse.urlsplit(address)
    host, path = parts.hostname or "", parts.path
    title = f"milepost{f' run {notice.run_id}' if notice.run_id else ''}, {notice.kind}"
    text = f"{title}: {notice.text}"
    if host.startswith("ntfy."):
        return address, headers | {"Title": title}, notice.text.encode()
    values: dict[str, Any]
    if host == "hooks.slack.com" or path.startswith("/hooks/"):  # Mattermost and Rocket.Chat read Slack's form
        values = {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
    elif DISCORD.match(path):
        values = {"content": text, "allowed_mentions": {"parse": []}}
    else:
        values = {"source": "milepost", "event": notice.kind}
        values |= {"run_id": notice.run_id, "text": notice.text, "time": notice.time}
    return address, headers | {"Content-Type": "application/json"}, json.dumps(values).encode()


def without_user(url: str) -> tuple[str, dict[str, str]]:
    """Return the address in ASCII without `user:password@`, and the headers, one of which holds the user and the password."""
    headers = {"User-Agent": "milepost"}  # Discord refuses urllib's own
    parts = urllib.parse.urlsplit(url)
    user, at, place = parts.netloc.rpartition("@")
    if at:
        secret = urllib.parse.unquote(user).encode()
        headers["Authorization"] = f"Basic {base64.b64encode(secret).decode()}"
    path, query = (urllib.parse.quote(part, safe=PRINTED) for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit(parts._replace(netloc=place, path=path, query=query)), headers
