"""Publish a checkpoint on the Hugging Face hub, with a model card made from its record; without DRY_RUN=false, only show what would be.

CHECKPOINT_PATH=best PUSH_TO_HUB=me/name python3 scripts/publish_checkpoint.py                 # shows files and card
CHECKPOINT_PATH=best PUSH_TO_HUB=me/name DRY_RUN=false python3 scripts/publish_checkpoint.py   # uploads them
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "PUSH_TO_HUB", "DRY_RUN", "HUB_PRIVATE", "OUTPUT", "CHECKPOINT_DIR", "CACHE_GB", "RUNS_DIR",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.cli import guarded, naming_output
from milepost.config import Config, ConfigError
from milepost.publish.folder import write
from milepost.publish.hub import push
from milepost.remote import local
from milepost.run_publishing import publishing_command
from milepost.runtime.progress import Log, amount, shown
from milepost.screen import write_stdout


def main(settings: Config, log: Log) -> int:
    """Write what is published into a folder, show it, and upload it unless DRY_RUN is true; return the exit code."""
    name = settings.push_to_hub
    if name is None:
        raise ConfigError(["PUSH_TO_HUB: not set; set it to owner/name, as the hub names a model"])
    settings = local(settings, log)
    record = ckpt.load_named(settings.checkpoint_path, Path(settings.checkpoint_dir), say=log, optimizer=False)
    with destination(settings) as written:
        write(record, name, written, runs_dir=Path(settings.runs_dir), say=log)
        files = sorted(path for path in written.rglob("*") if path.is_file())
        privacy = "private" if settings.hub_private else "public, unless it is private there already"
        write_stdout(f"{shown(record.path or 'checkpoint')} -> {name} ({privacy})")
        for path in files:
            write_stdout(f"  {path.relative_to(written)}  {amount(path.stat().st_size, 'B')}")
        if settings.dry_run:
            show(record, settings, written, log)
        else:
            write_stdout(push(written, name, private=settings.hub_private, message=f"Step {record.step}"))
    return 0


def show(record: Checkpoint, settings: Config, written: Path, log: Log) -> None:
    """Show the card, or where it lies, and the command that publishes."""
    if settings.output is None:
        write_stdout("\n" + (written / "README.md").read_text(encoding="utf-8"))
    else:
        log(f"the files are in {shown(settings.output)}")
    log(f"nothing was uploaded, because DRY_RUN is true; to publish: {publishing_command(settings, record.path)}")


@contextlib.contextmanager
def destination(settings: Config) -> Iterator[Path]:
    """Yield the path of the folder that is published; afterwards it lies in OUTPUT, or nowhere if that is not set."""
    target = Path(settings.output) if settings.output else None
    if target and target.exists():
        raise ConfigError([f"OUTPUT={target}: exists already; name a new folder"])
    with contextlib.ExitStack() as held:
        if target:
            held.enter_context(naming_output(target))
            target.parent.mkdir(parents=True, exist_ok=True)
        place = held.enter_context(
            tempfile.TemporaryDirectory(prefix=".publish-", dir=target.parent if target else None)
        )
        yield Path(place) / "published"
        if target:
            (Path(place) / "published").rename(target)


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS, reports=True))
