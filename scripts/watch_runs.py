"""Show the runs in a browser: curves, checkpoints and samples, live, on one page that this script serves.

python3 scripts/watch_runs.py
PORT=8080 RUNS_DIR=/data/runs python3 scripts/watch_runs.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = ("PORT", "SERVE_HOST", "RUNS_DIR", "CHECKPOINT_DIR")
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import importlib.util
import socket
from pathlib import Path

from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.files import in_words
from milepost.page.library import Library
from milepost.runtime.progress import Log, shown

PACKAGES = ("starlette", "uvicorn")
GRACE = 3  # seconds in which open requests may end after a signal


def main(settings: Config, log: Log) -> int:
    """Serve the page until a signal ends it; return the exit code."""
    check_packages()
    runs_dir = Path(settings.runs_dir)
    library = Library(runs_dir, Path(settings.checkpoint_dir))
    with listening(settings.serve_host, settings.port) as server:
        if not runs_dir.is_dir():
            log(f"{shown(runs_dir)} is not there yet; training creates it")
        log(f"runs of {shown(runs_dir)}: {address(server)} (Ctrl-C ends it)")
        serve(library, server, settings.serve_host)
    return 0


def check_packages() -> None:
    """Raise ConfigError if the packages that serve are not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError([f"serving a page needs {' and '.join(missing)}: pip install {' '.join(missing)}"])


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Raise ConfigError if it cannot."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        return socket.create_server(where[:2], family=family)
    except OSError as error:
        remedy = "set another PORT, 0 for any that is free" if port else "set SERVE_HOST to an address of this machine"
        raise ConfigError(
            [f"SERVE_HOST={host} PORT={port}: cannot be listened on ({in_words(error)}): {remedy}"]
        ) from error


def address(server: socket.socket) -> str:
    """Return the address of the page."""
    host, port = server.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(library: Library, server: socket.socket, host: str) -> None:
    """Serve the page on a socket until a signal arrives."""
    import uvicorn
    from starlette.applications import Starlette

    from milepost.page.routes import routes

    app = Starlette(routes=routes(library, names=[host], stopping=lambda: server_of.should_exit))
    options = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=GRACE,
        server_header=False,
    )  # fmt: skip
    server_of = uvicorn.Server(options)
    server_of.run(sockets=[server])


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
