"""Weights & Biases."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from milepost.runtime.tracking.base import LACKING, Tracker


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases under our run id. Online it continues after the last step that the server has.

    Offline, recorded steps can be neither read nor removed, so the whole series is recorded again and replaces the
    earlier one.
    """

    def __init__(
        self,
        *,
        folder: Path,
        run_id: str,
        settings: Mapping[str, Any],
        variables: Mapping[str, str],
        log: Callable[[str], None],
    ) -> None:
        import wandb

        mode, project = mode_and_project(variables)
        if mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
            log("wandb: no API key is configured, so nothing is sent; run `wandb login` or set WANDB_API_KEY")
            mode = "offline"
        earlier = set(folder.glob(f"offline-run-*-{run_id}")) if mode == "offline" else set()
        self._run = wandb.init(
            project=project, id=run_id, name=run_id, dir=str(folder.parent), config=dict(settings), mode=mode,
            resume="allow" if mode in ("online", "shared") else None,
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        own = Path(self._run.dir).parent
        if mode == "offline":
            log(f"wandb: recorded offline; send it with: wandb sync {own}")
        elif self._run.url:
            log(f"wandb: {self._run.url}")
        self._earlier, self._log = earlier - {own}, log

    def next_step(self) -> int:
        return int(self._run.step)

    def write(self, step: int, when: float, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def caught_up(self) -> None:
        for folder in self._earlier:
            shutil.rmtree(folder)

    def keep_earlier(self) -> None:
        if self._earlier:
            self._log(
                f"{LACKING}; what was recorded offline so far stays in {', '.join(map(str, sorted(self._earlier)))}"
            )

    def close(self) -> None:
        self._run.finish()


def mode_and_project(variables: Mapping[str, str]) -> tuple[str, str]:
    """Return WANDB_MODE and WANDB_PROJECT. Without an API key the mode is offline,
    so that wandb never asks for a login.
    """
    mode = "online" if "WANDB_API_KEY" in variables else "offline"
    return variables.get("WANDB_MODE", mode), variables.get("WANDB_PROJECT", "milepost")
