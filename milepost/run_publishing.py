"""What a finished run publishes: its last checkpoint, on the hub, if PUSH_TO_HUB names a model there."""

import tempfile
from pathlib import Path
from typing import Any

from milepost import ckpt
from milepost.config import Config, ConfigError
from milepost.places import SCRIPTS_FOLDER
from milepost.run import Run
from milepost.runtime.progress import amount, command_line

PUBLISH = SCRIPTS_FOLDER / "publish_checkpoint.py"


def check_publishing(settings: Config) -> None:
    """Raise ConfigError if the run is to publish and no token of the hub is there: it would be noticed at its end only."""
    if settings.push_to_hub is None or settings.dry_run or not settings.enable_checkpoints:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        remedy = "log in with `hf auth login` or set HF_TOKEN, or publish later with scripts/publish_checkpoint.py"
        raise ConfigError([f"PUSH_TO_HUB={settings.push_to_hub}: there is no token of the hub: {remedy}"])


def publishing_command(settings: Config, path: Path | None) -> str:
    """Return the command that publishes the checkpoint as the settings say."""
    openly: dict[str, Any] = {} if settings.hub_private else {"HUB_PRIVATE": "false"}
    return command_line(PUBLISH, CHECKPOINT_PATH=path, PUSH_TO_HUB=settings.push_to_hub, **openly, DRY_RUN="false")


def publish_last(run: Run) -> bool:
    """Publish the last checkpoint on rank 0, or report what would be published if DRY_RUN is true.

    Return False if that failed, after a line that says why and how to publish it later. The saved run stays as it is.
    """
    name, path = run.settings.push_to_hub, run.saved.path
    if name is None or path is None or run.saved.failed or not run.world.is_rank0:
        return not (name and run.saved.failed)
    again = publishing_command(run.settings, path)
    try:
        _publish(run, name, path, again)
    except Exception as error:  # whatever it is, the run is finished and saved
        known = isinstance(error, OSError | ckpt.CheckpointError | ImportError)
        run.log(f"not published: {error if known else f'{type(error).__name__}: {error}'}; to publish it: {again}")
        return False
    return True


def _publish(run: Run, name: str, path: Path, again: str) -> None:
    from milepost.publish.folder import write
    from milepost.publish.hub import push

    settings, record = run.settings, ckpt.load(path, optimizer=False)
    privacy = "private" if settings.hub_private else "public, unless it is private there already"
    with tempfile.TemporaryDirectory(prefix="milepost-") as place:
        folder = Path(place) / "published"
        write(record, name, folder, runs_dir=Path(settings.runs_dir), say=run.log)
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
        what = f"step {record.step} as {name} ({privacy}, {len(sizes)} files, {amount(sum(sizes), 'B')})"
        if settings.dry_run:
            run.log(f"not published, because DRY_RUN is true: {what}; to publish it: {again}")
        else:
            run.log(
                f"published {what}: {push(folder, name, private=settings.hub_private, message=f'Step {record.step}')}"
            )
