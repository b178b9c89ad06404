"""The order in which a resume tries the checkpoints of several runs and folders."""

from collections.abc import Callable

from milepost.ckpt.index import Found


def in_order(found: list[Found], elsewhere: list[Found]) -> list[Found]:
    """Merge the checkpoints of two folders, each list oldest save first.

    Save numbers order those of one run, since they continue in the fallback folder. Only between runs does the clock
    decide.
    """
    left, right, newest_first = list(found), list(elsewhere), []
    while left and right:
        newest_first.append((left if _is_newer(left[-1], right[-1]) else right).pop())
    return [*left, *right, *reversed(newest_first)]


def _is_newer(one: Found, other: Found) -> bool:
    if one.run_id == other.run_id is not None:
        return one.save_order >= other.save_order
    return (one.metadata.get("saved_at") or "") >= (other.metadata.get("saved_at") or "")


def exact_first(newest_first: list[Found], has_same: Callable[[Found], bool] = lambda found: True) -> list[Found]:
    """Sort by run, the run of the newest checkpoint first; within a run, checkpoints without optimizer state come last.

    Runs whose newest checkpoint `has_same` settings as are set come before the others: of several runs in a folder, each
    is resumed by the command that started it. Other programs' checkpoints, which record no run, count among the others.
    """
    newest_of: dict[str | None, Found] = {}
    for found in newest_first:
        newest_of.setdefault(found.run_id, found)
    order = {
        run_id: (run_id is None or not has_same(found), place)
        for place, (run_id, found) in enumerate(newest_of.items())
    }
    return sorted(newest_first, key=lambda found: (*order[found.run_id], not found.resumable))
