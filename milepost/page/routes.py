"""The page and its data over HTTP, as routes of Starlette for whoever serves them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from milepost.page.html import page
from milepost.page.library import Library
from milepost.page.series import AXES, Window
from milepost.web.guard import HEADERS, Guard

MOST_RUNS = 32  # of a request
MOST_LISTENERS = 64
TICK = 1.0  # seconds between two looks for a listener


def application(library: Library, *, names: Collection[str] = (), stopping: Callable[[], bool]) -> Starlette:
    """Return a server of the page alone. `names` are host names of its own, besides addresses and localhost."""
    return Starlette(routes=routes(library, stopping=stopping), middleware=[Middleware(Guard, names=names)])


def routes(library: Library, *, stopping: Callable[[], bool]) -> list[Route]:
    """Return the routes `/` and `/api/...` of a library, for an application with a Guard. Streams end when `stopping` returns True."""
    html, policy = page()
    listeners: set[object] = set()
    verifying = asyncio.Lock()  # verifications wait here and not in threads, which all other requests need

    async def show(request: Request) -> Response:
        return Response(html, media_type="text/html", headers={**HEADERS, "content-security-policy": policy})

    async def runs(request: Request) -> Response:
        await run_in_threadpool(library.look)
        return answer(await run_in_threadpool(library.summaries))

    async def curves(request: Request) -> Response:
        try:
            window = window_of(request)
        except ValueError:
            return PlainTextResponse(f"expected axis ({', '.join(AXES)}), from and to, numbers\n", 400, HEADERS)
        await run_in_threadpool(library.look)
        return answer(await run_in_threadpool(library.curves, ids_of(request), window))

    async def details(request: Request) -> Response:
        await run_in_threadpool(library.look)
        return answer(await run_in_threadpool(library.details, ids_of(request)))

    async def verify(request: Request) -> Response:
        ids = [request.query_params.get(name, "") for name in ("run", "checkpoint")]
        async with verifying:
            problems = await run_in_threadpool(library.verify, *ids)
        return PlainTextResponse("no such checkpoint\n", 404, HEADERS) if problems is None else answer(problems)

    async def events(request: Request) -> Response:
        if len(listeners) >= MOST_LISTENERS:
            return PlainTextResponse("too many pages are open\n", 503, {**HEADERS, "retry-after": "10"})
        since = request.query_params.get("since", "")
        stream = changes(library, int(since) if since.isdecimal() and len(since) < 16 else -1, listeners, stopping)
        return StreamingResponse(stream, media_type="text/event-stream", headers=HEADERS)

    ends = {"/": show, "/api/runs": runs, "/api/curves": curves, "/api/details": details, "/api/events": events}
    posted = Route("/api/verify", verify, methods=["POST"])  # reads the whole checkpoint: no link is to start that
    return [*(Route(path, end, methods=["GET"]) for path, end in ends.items()), posted]


def answer(value: Any) -> Response:
    """Return a value as JSON."""
    return JSONResponse(value, headers=HEADERS)


def ids_of(request: Request) -> list[str]:
    """Return the ids of runs that a request names."""
    return request.query_params.getlist("run")[:MOST_RUNS]


def window_of(request: Request) -> Window | None:
    """Return the part of an axis that a request asks for; None for all. Raise ValueError if it is none."""
    if "axis" not in request.query_params:
        return None
    axis, low, high = (request.query_params.get(name, "") for name in ("axis", "from", "to"))
    if axis not in AXES:
        raise ValueError(axis)
    return axis, float(low), float(high)


async def changes(
    library: Library, since: int, listeners: set[object], stopping: Callable[[], bool]
) -> AsyncIterator[bytes]:
    """Yield an event for each change of the library after a version, and a comment each tick, which shows a closed page."""
    listeners.add(me := object())
    try:
        while not stopping():
            version = await run_in_threadpool(library.look)
            if version != since:
                found = await run_in_threadpool(library.summaries, since if since <= version else -1)
                since = found["version"]
                yield b"data: " + json.dumps(found, allow_nan=False).encode() + b"\n\n"
            else:
                yield b": no change\n\n"
            await asyncio.sleep(TICK if not library.unread else 0)
    finally:
        listeners.discard(me)
