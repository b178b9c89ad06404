"""Show the runs in a browser: curves, checkpoints and samples, live, on one page that this script serves.

python3 scripts/watch_runs.py
PORT=8080 RUNS_DIR=/data/runs python3 scripts/watch_runs.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = ("PORT", "SERVE_HOST", "RUNS_DIR", "CHECKPOINT_DIR")
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import threading
from pathlib import Path

from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.page.library import Library
from milepost.runtime.progress import Log, shown
from milepost.web.listening import address, check_packages, listening, serve

GRACE = 3  # seconds in which open requests may end after a signal


def main(settings: Config, log: Log) -> int:
    """Serve the page until a signal ends it; return the exit code."""
    check_packages()
    runs_dir = Path(settings.runs_dir)
    if runs_dir.exists() and not runs_dir.is_dir():
        raise ConfigError([f"RUNS_DIR={runs_dir}: is not a folder; set the folder of the runs"])
    library, stopped = Library(runs_dir, Path(settings.checkpoint_dir)), threading.Event()
    with listening(settings.serve_host, settings.port) as listener:
        from milepost.page.routes import application

        if not runs_dir.is_dir():
            log(f"{shown(runs_dir)} is not there yet; training creates it")
        log(f"runs of {shown(runs_dir)}: {address(listener)} (Ctrl-C ends it)")
        app = application(library, names=[settings.serve_host], stopping=stopped.is_set)
        serve(app, listener, on_stop=stopped.set, grace=GRACE)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
