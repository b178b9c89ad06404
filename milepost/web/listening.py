"""A socket to listen on, for an application that is served until a signal ends it. Imports starlette and uvicorn only to serve."""

import contextlib
import errno
import importlib.util
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from milepost.config import ConfigError
from milepost.files import in_words

if TYPE_CHECKING:
    from starlette.types import ASGIApp

PACKAGES = ("starlette", "uvicorn")  # of the extra `serve`
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def check_packages() -> None:
    """Raise ConfigError if the packages that serve are not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError([f"serving needs {' and '.join(missing)}: pip install {' '.join(missing)}"])


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens on SERVE_HOST and PORT. Raise ConfigError if it cannot."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        return socket.create_server((str(where[0]), port), family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name is empty or has over 63 characters
        problem = in_words(error) if isinstance(error, OSError) else "not a host name"
        taken = isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES)
        remedy = "set another PORT, 0 for any that is free" if taken else "set SERVE_HOST to an address of this machine"
        raise ConfigError([f"SERVE_HOST={host} PORT={port}: cannot listen ({problem}): {remedy}"]) from error


def address(listener: socket.socket) -> str:
    """Return the address that is listened on, with a slash at its end."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(app: "ASGIApp", listener: socket.socket, *, on_stop: Callable[[], object], grace: float) -> None:
    """Serve on the socket. After SIGINT or SIGTERM no connection is accepted, `on_stop` is called, and open requests have `grace`
    seconds to end. A second signal ends them at once.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn's, but a signal is no error: the process ends with an exit code of its own choice."""

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
            on_stop()

    options = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, proxy_headers=False, ws="none",
        timeout_graceful_shutdown=int(grace),
    )  # fmt: skip
    Server(options).run(sockets=[listener])
