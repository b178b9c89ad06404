"""A tracker: one JSON line per step, continued where the file ends, below a line with TOY_LABEL and the seed."""

import json

from milepost.runtime import trackers
from milepost.runtime.tracking.base import Tracker


class JsonLines(Tracker):
    def __init__(self, *, folder, settings, variables, **_):
        folder.mkdir(exist_ok=True)
        self.path = folder / "rows.jsonl"
        whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0] if self.path.exists() else ""
        whole = whole or json.dumps({"label": variables.get("TOY_LABEL"), "seed": settings["SEED"]})
        self.path.write_text(f"{whole}\n", encoding="utf-8")  # without a line that a kill has torn
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.last = json.loads(whole.splitlines()[-1]).get("step", -1)

    def next_step(self):
        return self.last + 1

    def write(self, step, when, values):
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self):
        self.file.close()


trackers.register("jsonl", JsonLines, variables=("TOY_LABEL",))
