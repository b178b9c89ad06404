"""Which requests are let in: by their Host, their Origin and their key."""

import base64
import binascii
import hmac
import ipaddress
import socket
from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from milepost.serving.faults import ApiError
from milepost.serving.replies import as_json

OPEN: Final = ("/health",)  # paths that need no key
HEADERS: Final = {
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Refuse requests without the key, and those that a page of another site may have caused.

    Such a page sends its Origin. Or it makes a name of its own point here (DNS rebinding), so without a key a Host must be an
    address or one of `names`; with a key it may be any, because that page cannot know the key.
    """

    def __init__(self, app: ASGIApp, *, key: str | None, names: Collection[str]) -> None:
        self.app, self._key = app, key
        self._names = {"localhost", socket.gethostname().lower(), *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = self._problem(scope["path"], Headers(scope=scope))
        if error is None:
            await self.app(scope, receive, send)
        else:
            await error_response(error, challenge=not scope["path"].startswith("/v1/"))(scope, receive, send)

    def _problem(self, path: str, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._key is None and not self._is_own(host):
            problem = f"the host {host!r:.80} is not known here: use http://localhost or the address in numbers"
            return ApiError(421, problem, kind="permission_error", code="unknown_host")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return ApiError(403, "requests from other sites are refused", kind="permission_error", code="other_origin")
        if self._key is not None and path not in OPEN and not has_key(headers.get("authorization", ""), self._key):
            return ApiError(401, "no valid API key: send Authorization: Bearer KEY", code="invalid_api_key")
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self._names:
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


def error_response(error: ApiError, *, challenge: bool = False) -> Response:
    """Return an error as a response; with `challenge`, a browser asks its user for the key."""
    headers = {**HEADERS, **error.headers}
    if error.status == 401:
        headers["www-authenticate"] = 'Basic realm="milepost"' if challenge else "Bearer"
    return Response(as_json(error.body), error.status, headers, media_type="application/json")
