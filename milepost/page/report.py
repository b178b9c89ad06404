"""The page of some runs as one file, to send to somebody: it holds the data and asks nobody for anything."""

import time
from pathlib import Path

from milepost.files import replacing
from milepost.page.html import page
from milepost.page.library import Library
from milepost.plots.curves import Drawn


def write_report(runs: list[Drawn], output: Path, *, checkpoint_dir: Path, runs_dir: Path) -> None:
    """Write the page of the runs to `output`, atomically."""
    library = Library(runs_dir, checkpoint_dir)
    ids = library.hold(runs)
    held = {
        "written": time.time(),
        "runs": library.summaries() | {"damaged": []},
        "curves": library.curves(ids),
        "details": library.details(ids),
    }
    html, _ = page(held)
    with replacing(output) as temporary:
        temporary.write_text(html, encoding="utf-8")
