"""Refusals of the guard as errors in OpenAI's form."""

from starlette.responses import Response

from milepost.serving.faults import ApiError
from milepost.serving.replies import as_json
from milepost.web.guard import HEADERS, Refusal

__all__ = ["HEADERS", "error_response", "refused"]


def refused(path: str, refusal: Refusal) -> Response:
    """Return the error for a request that is not let in. Outside the API, a browser asks its user for the key."""
    kind = "invalid_request_error" if refusal.status == 401 else "permission_error"
    error = ApiError(refusal.status, refusal.message, kind=kind, code=refusal.code)
    return error_response(error, challenge=not path.startswith("/v1/"))


def error_response(error: ApiError, *, challenge: bool = False) -> Response:
    """Return an error as a response; with `challenge`, a browser asks its user for the key."""
    headers = {**HEADERS, **error.headers}
    if error.status == 401:
        headers["www-authenticate"] = 'Basic realm="milepost"' if challenge else "Bearer"
    return Response(as_json(error.body), error.status, headers, media_type="application/json")
