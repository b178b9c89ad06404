"""An application on a socket, until a signal ends it."""

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from milepost.serving.app import STOP_SECONDS

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Server(uvicorn.Server):
    """uvicorn's server, which ends with an exit code of its own choice after a signal, and says that it begins to stop."""

    on_stop: Callable[[], None]
    should_exit: bool
    force_exit: bool

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self.on_stop()


def run(app: ASGIApp, listener: socket.socket, *, on_stop: Callable[[], None]) -> None:
    """Serve on the socket. After SIGINT or SIGTERM no connection is accepted, `on_stop` is called, and open requests may end.

    A second signal ends them at once.
    """
    options = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=int(STOP_SECONDS) + 2,
    )
    server = _Server(options)
    server.on_stop = on_stop
    server.run(sockets=[listener])
