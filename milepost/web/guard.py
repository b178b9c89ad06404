"""Which requests are let in: by their Host, their Origin and their key."""

import base64
import binascii
import hmac
import ipaddress
import socket
from collections.abc import Callable, Collection
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN: Final = ("/health",)  # paths that need no key
HEADERS: Final = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Refusal(NamedTuple):
    """Why a request is not let in."""

    status: int
    code: str
    message: str


def in_text(path: str, refusal: Refusal) -> Response:
    """Return a refusal as plain text."""
    return PlainTextResponse(f"{refusal.message}\n", refusal.status, HEADERS)


class Guard:
    """Refuse requests without the key, and those that a page of another site may have caused.

    Such a page sends its Origin. Or it makes a name of its own point here (DNS rebinding), so without a key a Host must be an
    address or one of `names`; with a key it may be any, because that page cannot know the key.
    """

    def __init__(
        self, app: ASGIApp, *, names: Collection[str], key: str | None = None, refuse: Callable[[str, Refusal], Response] = in_text
    ) -> None:  # fmt: skip
        self.app, self._key, self._refuse = app, key, refuse
        self._names = frozenset({"localhost", socket.gethostname().lower(), *(name.lower() for name in names)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        answering = self.app if refusal is None else self._refuse(scope["path"], refusal)
        await answering(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> Refusal | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._key is None and not is_own_host(host, self._names):
            problem = f"the host {host!r:.80} is not known here: use http://localhost or the address in numbers"
            return Refusal(421, "unknown_host", problem)
        if origin is not None and not is_of(origin, host):
            remedy = "open this server's own address, or let the proxy pass Host on"
            return Refusal(403, "other_origin", f"requests from other sites are refused: {remedy}")
        if self._key is not None and path not in OPEN and not has_key(headers.get("authorization", ""), self._key):
            return Refusal(401, "invalid_api_key", "no valid API key: send Authorization: Bearer KEY")
        return None


def is_of(origin: str, host: str) -> bool:
    """Return whether an Origin header names the host of a Host header."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def is_own_host(host: str, names: Collection[str]) -> bool:
    """Return whether a Host header names this server: by an address, which no other site can make point here, or by one of `names`."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name in names:
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def has_key(header: str, key: str) -> bool:
    """Return whether an Authorization header holds the key, as a bearer token or as the password that a browser asks for."""
    scheme, _, value = header.partition(" ")
    value = value.strip()
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode("latin-1").partition(":")[2]
        except (binascii.Error, ValueError):
            value = ""
    elif scheme.lower() != "bearer":
        value = ""
    return hmac.compare_digest(value.encode("utf-8", "replace"), key.encode())
