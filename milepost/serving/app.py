"""The server's routes."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from milepost.runtime.progress import Log
from milepost.serving import requests
from milepost.serving.catalogue import Catalogue, Served
from milepost.serving.faults import ApiError, invalid, stopping, timed_out, unknown_model
from milepost.serving.generating import Generating, Job
from milepost.serving.guard import HEADERS, error_response, refused
from milepost.serving.metrics import Metrics, series
from milepost.serving.pieces import Piece, Work
from milepost.serving.preparing import Defaults, work_for
from milepost.serving.replies import Chunks, Usage, as_json, event, new_head, whole
from milepost.serving.requests import Asked
from milepost.web.guard import Guard

BODY_LIMIT: Final = 4 << 20  # bytes
CLIENT_GONE: Final = 499  # the status that proxies log then
SHORT: Final = 1000  # characters, or tokens
SLOWEST_READ: Final = 60.0  # seconds that a client may leave a part of a stream unread
STOP_SECONDS: Final = 8.0  # in which running requests may end after a signal; docker waits for 10


class Server:
    """What the routes share: models, the generating thread, counts and limits."""

    def __init__(
        self, catalogue: Catalogue, generating: Generating, *, defaults: Defaults, timeout: float, log: Log
    ) -> None:
        self.catalogue, self.generating, self.defaults = catalogue, generating, defaults
        self.timeout, self.log = timeout, log
        self.metrics = Metrics()
        self.ends_at = float("inf")  # when requests end because the server stops

    def stop(self) -> None:
        """Refuse further requests, and give those that were accepted STOP_SECONDS to end."""
        self.generating.stop()
        self.ends_at = min(self.ends_at, time.monotonic() + STOP_SECONDS)

    def model(self, name: str | None) -> Served:
        """Return the model of this name; raise ApiError. A request need not name the only one."""
        models = self.catalogue.models
        if name is None and len(models) == 1:
            return next(iter(models.values()))
        if name not in models:
            raise unknown_model(name, list(models))
        return models[name]


def application(server: Server, *, key: str | None, names: Sequence[str], pages: Sequence[BaseRoute] = ()) -> Starlette:
    """Return the server's application. `names` are host names of its own; `pages` are routes that are served beside the API."""
    routes = [
        Route("/v1/completions", answering(server, requests.completion), methods=["POST"]),
        Route("/v1/chat/completions", answering(server, requests.chat), methods=["POST"]),
        Route("/v1/models", models_of(server)),
        Route("/v1/models/{name:path}", models_of(server)),
        Route("/health", health_of(server)),
        Route("/metrics", metrics_of(server)),
        *pages,
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, key=key, names=names, refuse=refused)],
        exception_handlers={HTTPException: not_routed, Exception: failed},
        lifespan=working(server),
    )


def working(server: Server) -> Callable[[Starlette], contextlib.AbstractAsyncContextManager[None]]:
    """Return a lifespan in which texts are generated, and the models follow the checkpoints that their names select."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server.generating.start()
        server.catalogue.start()
        yield
        server.catalogue.stop()

    return lifespan


async def not_routed(request: Request, error: Exception) -> Response:
    """Return the error for a path or a method that is not offered."""
    assert isinstance(error, HTTPException)
    return error_response(ApiError(error.status_code, f"{request.method} {request.url.path[:80]!r}: {error.detail}"))


async def failed(request: Request, error: Exception) -> Response:
    """Return the error for a request that no other answer was foreseen for; the log has its traceback."""
    return error_response(ApiError(500, f"the request failed: {type(error).__name__}", kind="server_error"))


# ---------------------------------------------------------------------------------------------------------------------
# What is known without generating


def models_of(server: Server) -> Callable[[Request], Any]:
    """Return the endpoint that lists the models, or shows one."""

    async def models(request: Request) -> Response:
        name = request.path_params.get("name")
        try:
            listed = [server.model(name)] if name else list(server.catalogue.models.values())
        except ApiError as error:
            return error_response(error)
        shown = [described(served) for served in listed]
        return json_response(shown[0] if name else {"object": "list", "data": shown})

    return models


def described(served: Served) -> dict[str, Any]:
    """Return a model as OpenAI lists it, and what the weights are."""
    record, model = served.loaded.record, served.loaded.model
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "milepost",
        "max_model_len": model.settings.block_size,
        "step": record.step,
        "run_id": record.run_id,
        "chat": served.chats,
    }


def health_of(server: Server) -> Callable[[Request], Any]:
    """Return the endpoint that says whether requests are accepted."""

    async def health(request: Request) -> Response:
        stops = server.generating.stopping
        return json_response({"status": "stopping" if stops else "ok"}, 503 if stops else 200)

    return health


def metrics_of(server: Server) -> Callable[[Request], Any]:
    """Return the endpoint that Prometheus reads."""

    async def metrics(request: Request) -> Response:
        running, waiting = server.generating.requests()
        gauges: dict[str, float] = {"requests_running": running, "requests_waiting": waiting}
        for name, served in server.catalogue.models.items():
            gauges[series("model_step", {"model": name})] = served.loaded.record.step
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(server.metrics.text(gauges), headers={**HEADERS, "content-type": kind})

    return metrics


def json_response(value: Any, status: int = 200) -> Response:
    """Return a value as a response."""
    return Response(as_json(value), status, HEADERS, media_type="application/json")


# ---------------------------------------------------------------------------------------------------------------------
# Requests that generate


def answering(server: Server, parse: Callable[[Any], Asked]) -> Callable[[Request], Any]:
    """Return the endpoint that generates what the body of a request asks for."""

    async def answer(request: Request) -> Response:
        began = time.monotonic()
        try:
            async with asyncio.timeout(server.timeout):
                server.generating.check_room()
                asked = parse(await body_of(request))
                served = server.model(asked.model)
                work = await prepared(asked, served, server.defaults)
            job = Job(work, server.generating.prefixes, together=served.together, streams=asked.stream)
            server.generating.submit(job)
            answer = Answer(server, job, request, served=served, asked=asked, began=began)
            response = Stream(answer) if asked.stream else await answer.whole()
        except TimeoutError:
            response = error_response(timed_out(server.timeout))
        except ApiError as error:
            response = error_response(error)
        server.metrics.add("requests_total", path=request.url.path, status=str(response.status_code))
        return response

    return answer


async def prepared(asked: Asked, served: Served, defaults: Defaults) -> Work:
    """Return the work that a request asks for: short prompts are encoded sooner than a thread for it would begin."""
    if asked.messages is None and sum(map(len, asked.prompts)) <= SHORT:
        return work_for(asked, served, defaults)
    return await asyncio.to_thread(work_for, asked, served, defaults)


async def body_of(request: Request) -> Any:
    """Return the JSON of a request; raise ApiError if it has more than BODY_LIMIT bytes or is not JSON."""
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > BODY_LIMIT:
                raise ApiError(413, f"the body has more than {BODY_LIMIT:,} bytes", code="body_too_large")
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not valid JSON ({error!s:.80})") from error
    except ClientDisconnect as error:
        raise invalid("the client has gone") from error


class Answer:
    """The answer to one request, as its pieces come. The work ends when the client has gone, or the time is up."""

    def __init__(
        self, server: Server, job: Job, request: Request, *, served: Served, asked: Asked, began: float
    ) -> None:
        self._server, self._job, self._request, self._asked, self._began = server, job, request, asked, began
        self._head = new_head(served, chat=asked.messages is not None)
        self._generated, self._kept, self._gone = 0, 0, False

    @property
    def _usage(self) -> Usage:
        return Usage(sum(map(len, self._job.work.prompts)), self._generated, self._kept)

    async def whole(self) -> Response:
        """Return the response once all texts are complete."""
        async with contextlib.aclosing(self._pieces()) as all_made:
            pieces = [piece async for made in all_made for piece in made]
        if self._gone:
            return Response(status_code=CLIENT_GONE)  # nobody reads it
        scored = self._asked.logprobs is not None
        return json_response(whole(self._head, pieces, scored=scored, usage=self._usage))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a response that streams."""
        asked = self._asked
        chunks = Chunks(self._head, scored=asked.logprobs is not None, include_usage=asked.include_usage)
        try:
            async with contextlib.aclosing(self._pieces()) as all_made:
                async for made in all_made:
                    if data := b"".join(event(chunk) for piece in made for chunk in chunks.of(piece)):
                        yield data
            if asked.include_usage:
                yield event(chunks.usage(self._usage))
        except ApiError as error:
            yield event(error.body)

    async def _pieces(self) -> AsyncGenerator[list[Piece], None]:
        """Yield the pieces as they come. Raise ApiError if the work fails or the time is up."""
        job, server = self._job, self._server
        watch = asyncio.create_task(self._watch())
        try:
            while True:
                await self._ready()
                made, done = job.take()
                self._generated += sum(piece.tokens for piece in made)
                self._kept += sum(piece.kept for piece in made)
                yield made
                if done or self._gone:
                    break
            if job.error is not None:
                server.log(f"a request failed: {type(job.error).__name__}: {job.error}")
                raise ApiError(500, f"the request failed: {job.error!s:.300}", kind="server_error")
        finally:
            watch.cancel()
            server.generating.cancel(job)
            self._count()

    async def _ready(self) -> None:
        """Wait for pieces; raise ApiError once the time is up or the server ends."""
        job, server = self._job, self._server
        while True:
            now = time.monotonic()
            left = self._began + server.timeout - now
            if now >= server.ends_at:
                raise stopping()
            if left <= 0:
                raise timed_out(server.timeout)
            if job.ready.is_set():
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, 1.0)):  # `ends_at` may change
                    await job.ready.wait()

    async def _watch(self) -> None:
        """Note when the client has gone."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._job.ready.set()

    def note_unread(self) -> None:
        """Log that the client reads its stream no longer."""
        self._server.log(f"a stream was left unread for {SLOWEST_READ:g} seconds: its request is ended")

    def _count(self) -> None:
        metrics, usage = self._server.metrics, self._usage
        name, first = self._head.fields["model"], self._job.first_token
        metrics.add("prompt_tokens_total", usage.prompt, model=name)
        metrics.add("kept_tokens_total", usage.kept, model=name)
        metrics.add("generated_tokens_total", usage.generated, model=name)
        if first is not None:
            metrics.observe("first_token_seconds", first - self._began)
        metrics.observe("request_seconds", time.monotonic() - self._began)


class Stream(Response):
    """A response of server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with contextlib.aclosing(self._answer.events()) as events:
                async for data in events:
                    await _send(send, data)
            await _send(send, b"data: [DONE]\n\n", last=True)
        except TimeoutError:
            self._answer.note_unread()  # with the return the connection is closed


async def _send(send: Send, data: bytes, *, last: bool = False) -> None:
    """Send a part of a body; raise TimeoutError if the client leaves it unread for SLOWEST_READ."""
    async with asyncio.timeout(SLOWEST_READ):
        await send({"type": "http.response.body", "body": data, "more_body": not last})
