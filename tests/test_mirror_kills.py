"""The whole machine is lost while a checkpoint is mirrored: a fresh one resumes from the mirror and ends with the same bytes.

Every kill is at an operation on the store, before it or in the middle of a file. The mirror is a folder whose files are
seen while they are written, as on a store that is less careful than those that we know.
"""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drive import ROOT, logged, newest, tensor_bytes
from mirrors import SMALL, halves, in_folder, taken
from work import HANGING

from milepost import ckpt

STEP_OF_KILL = 5  # operations between two kills
OPERATIONS = 23  # of the uploads of a run at least
FILES_OF_RUN = 4  # which are sent with the first checkpoint
SOAK_KILLS = 200  # over the layouts that follow
SOAK_LAYOUTS = ("unified", "separated", "directory", "huggingface", "stepfiles", "consolidated")


def life(operation: int | None, *, halves: bool = False, layout: str = "unified", **changes: Any) -> dict[str, Any]:
    name = f"{layout}-{'whole' if operation is None else operation}{'-half' * halves}{'-first' * bool(changes)}"
    variables = SMALL | {"CHECKPOINT_LAYOUT": layout, "CHECKPOINT_ASYNC": "false"}  # the operations come in one order
    return {"name": name, "variables": variables, "operation": operation, "halves": halves, **changes}


def lived(folder: Path, lives: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Path, int, int | None]]:
    """Yield each life, its folder, the status of the run that was killed, and that of the run on the fresh machine."""
    command = [sys.executable, str(ROOT / "tests" / "mirror_lives.py"), str(folder), json.dumps(lives)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGING * len(lives), check=False)
    assert done.returncode == 0, done.stderr
    for one, line in zip(lives, done.stdout.splitlines(), strict=True):
        name, status, again = json.loads(line)
        assert name == one["name"]
        yield one, folder / name, status, again


def mirrored_step(folder: Path) -> int:
    """The last step that the killed run reported as mirrored."""
    file = folder / "left" / "reported"
    return int(file.read_text().split()[-1]) if file.exists() else 0


def newest_in(folder: Path) -> int:
    """The newest step in what the killed run left of the mirror."""
    return max((saved.found.step for saved in taken(in_folder(folder / "left"))), default=0)


def check(kills: list[dict[str, Any]], folder: Path) -> None:
    layouts = sorted({one["variables"]["CHECKPOINT_LAYOUT"] for one in kills})
    results = list(lived(folder, [*(life(None, layout=layout) for layout in layouts), *kills]))
    whole = {}
    for one, place, status, _ in results[: len(layouts)]:
        assert status == 0, (place / "said").read_text()
        whole[one["variables"]["CHECKPOINT_LAYOUT"]] = (tensor_bytes(newest(place)), logged(place))
    known = []
    for one, place, status, again in results[len(layouts) :]:
        assert (status, again) == (-9, 0), one["name"]
        known.append(mirrored_step(place))
        assert newest_in(place) >= known[-1], one["name"]  # nothing that was reported is lost
        assert halves(in_folder(place / "left")) == [], one["name"]
        assert (tensor_bytes(newest(place)), logged(place)) == whole[one["variables"]["CHECKPOINT_LAYOUT"]], one["name"]
        assert [found.problem for found in ckpt.find(place / "checkpoints") if found.problem] == []
    assert len({*known}) > 2, known  # the kills came at every stage


def test_a_machine_lost_at_any_operation_costs_no_bit(tmp_path):
    check([life(at, halves=at % 2 == 0) for at in range(0, OPERATIONS, STEP_OF_KILL)], tmp_path)


def test_with_the_manifest_first_a_reader_would_see_a_half(tmp_path):
    """Control: the same kills, and an order of writing that is wrong."""
    ((_, place, *_),) = lived(tmp_path, [life(FILES_OF_RUN + 1, manifest_first=True)])
    assert halves(in_folder(place / "left")) != []


@pytest.mark.soak
def test_two_hundred_machines_lost(tmp_path):
    draw = random.Random(18)
    kills = {
        (one := life(at, halves=half, layout=layout))["name"]: one
        for at in range(OPERATIONS)
        for half in (False, True)
        for layout in SOAK_LAYOUTS
    }
    chosen = draw.sample(sorted(kills), SOAK_KILLS)
    check([kills[name] for name in chosen], tmp_path)
