"""Whether the order of checkpoints is known: our saves are numbered, other programs record only their steps."""

from collections.abc import Iterable

from milepost.ckpt.finding import Found, folder_of, loss_of
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.record import CheckpointError
from milepost.ckpt.tensors import digest

SHOWN = 3  # rivals listed in a message


def rivals(chosen: Found, found: Iterable[Found]) -> list[Found]:
    """Return the checkpoints that may have been meant instead of `chosen`, because nothing records which is newer.

    Those are checkpoints without a save number that are of the same step, of another size, or in another folder, where
    another model may be trained. A copy with the same weights is not a rival. Reads weights only where steps are equal.
    """
    if chosen.metadata.get("save_number"):
        return []
    unnumbered = [each for each in found if not each.problem and not each.metadata.get("save_number")]
    others = [each for each in unnumbered if each.path != chosen.path]
    return [each for each in others if _may_be_meant(each, chosen)]


def _may_be_meant(other: Found, chosen: Found) -> bool:
    sizes = [each.metadata.get("model_settings") for each in (other, chosen)]
    if sizes[0] != sizes[1]:
        return True
    if other.step != chosen.step:
        return folder_of(other.path, other.run_id) != folder_of(chosen.path, chosen.run_id)
    return _weights(other) != _weights(chosen)


def _weights(found: Found) -> str | None:
    """Return the sha256 of the weights; None if they cannot be read."""
    try:
        return digest(known_layout(found.path).read(found.path, optimizer=False).model_state)
    except CheckpointError:
        return None


def ambiguity(chosen: Found, others: list[Found]) -> str:
    """Return the part of a sentence that names `chosen` and its rivals with their steps."""
    listed = ", ".join(map(_described, others[:SHOWN]))
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    return f"nothing records whether {_described(chosen)} is newer than {listed}{more}"


def _described(found: Found) -> str:
    loss = loss_of(found)
    return f"{found.path} (step {found.step}{'' if loss is None else f', validation loss {loss:.4f}'})"
