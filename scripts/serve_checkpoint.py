"""Serve checkpoints to programs that speak OpenAI's API: completions and chats, streamed, on this machine.

CHECKPOINT_PATH=latest PORT=8000 python3 scripts/serve_checkpoint.py
CHECKPOINT_PATH=base=checkpoints/base.pt,wren=adapters python3 scripts/serve_checkpoint.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "PORT", "SERVE_HOST", "API_KEY", "MAX_NEW_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "REPETITION_PENALTY", "STOP", "SAMPLE_SEED",
    "SERVE_SLOTS", "SERVE_QUEUE", "SERVE_TIMEOUT", "QUANTIZE", "SPECULATE", "DEVICE", "DEVICE_CHECK", "DTYPE", "CHECKPOINT_DIR", "CACHE_GB", "BASE_CHECKPOINT",
    "GPT2_MODEL_NAME", "INIT_FROM", "TRAINING_DATA_SOURCE", "TEXT_FIELD", "DOCUMENT_SEPARATOR", "PROMPT_FIELD", "ANSWER_FIELD", "TOKENIZER",
    "UNKNOWN_CHARACTERS", "N_HEAD", "RUNS_DIR",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.remote import followed, with_folder
from milepost.runtime.progress import Log
from milepost.samples import open_named, sampling
from milepost.text.unknown import Mode
from milepost.web import listening as web

if TYPE_CHECKING:
    from milepost.mirror.following import Source


def main(settings: Config, log: Log) -> int:
    """Serve the checkpoints of CHECKPOINT_PATH until a signal ends it; return the exit code."""
    web.check_packages()
    with web.listening(settings.serve_host, settings.port) as listener:
        serve(settings, log, listener)
    return 0


def serve(settings: Config, log: Log, listener: socket.socket) -> None:
    """Open the checkpoints and answer requests until a signal."""
    from milepost.page.library import Library
    from milepost.page.routes import routes
    from milepost.serving.app import STOP_SECONDS, Server, application
    from milepost.serving.catalogue import Catalogue
    from milepost.serving.generating import MOST_ROWS, Generating
    from milepost.serving.preparing import Defaults

    found = dict(sources(settings, log))
    settings = with_folder(settings)
    catalogue = Catalogue(
        found,
        open_one=lambda name, bases: open_named(name, settings, log, bases=bases),
        rows=min(settings.serve_slots, MOST_ROWS),
        log=log,
    )
    server = Server(
        catalogue,
        Generating(slots=settings.serve_slots, queue=settings.serve_queue),
        defaults=Defaults(
            sampling=sampling(settings), seed=settings.sample_seed, unknown=cast(Mode, settings.unknown_characters)
        ),
        timeout=settings.serve_timeout,
        log=log,
    )
    address = web.address(listener)
    log(f"listening on {address}v1 (Ctrl-C ends it); runs, and a box to try prompts: {address}")
    library = Library(Path(settings.runs_dir), Path(settings.checkpoint_dir))
    pages = routes(library, stopping=lambda: server.generating.stopping)
    app = application(server, key=settings.api_key, names=[settings.serve_host], pages=pages)
    web.serve(app, listener, on_stop=server.stop, grace=STOP_SECONDS + 2)


def sources(settings: Config, log: Log) -> Iterator[tuple[str, "Source"]]:
    """Yield what to open by the name that requests use. Raise ConfigError if a name occurs twice."""
    from milepost.serving.catalogue import on_disk, parts

    seen: set[str] = set()
    for part in parts(settings.checkpoint_path):
        name, source = followed(part, settings, log) or on_disk(part, Path(settings.checkpoint_dir))
        if name in seen:
            remedy = f"name them, as in CHECKPOINT_PATH=one=path,{name}=path"
            raise ConfigError([f"CHECKPOINT_PATH: several checkpoints would be called {name}: {remedy}"])
        seen.add(name)
        yield name, source


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
