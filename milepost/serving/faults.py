"""Errors in OpenAI's form."""

from typing import Any

RETRY_AFTER = 1  # seconds


class ApiError(Exception):
    """A request that is refused or ended: its status and the fields of OpenAI's error."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None,
        param: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param

    @property
    def body(self) -> dict[str, Any]:
        """The error as a JSON value."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with the status. OpenAI's clients repeat a request after 5xx unless they are told not to."""
        if self.status == 429:
            return {"retry-after": str(RETRY_AFTER)}
        return {"x-should-retry": "false"} if self.code == "timeout" else {}


def invalid(message: str, param: str | None = None, *, code: str | None = None) -> ApiError:
    """Return the error for a request that cannot be answered as it is."""
    return ApiError(400, message, code=code, param=param)


def unknown_model(name: object, served: list[str]) -> ApiError:
    """Return the error for a model that is not served."""
    problem = "the request names no model" if name is None else f"the model {name!r:.80} does not exist"
    return ApiError(404, f"{problem}; there are {', '.join(served)}", code="model_not_found", param="model")


def queue_full(waiting: int) -> ApiError:
    """Return the error for a request that found the queue full."""
    return ApiError(429, f"{waiting} requests are waiting already; try again later", kind="rate_limit_error",
                    code="queue_full")  # fmt: skip


def timed_out(seconds: float) -> ApiError:
    """Return the error for a request that took too long."""
    return ApiError(504, f"the request took longer than {seconds:g} seconds, waiting included; ask for fewer tokens",
                    kind="timeout_error", code="timeout")  # fmt: skip


def stopping() -> ApiError:
    """Return the error for a request that comes while the server stops, or that it ended."""
    return ApiError(503, "the server is stopping", kind="server_error", code="stopping")
