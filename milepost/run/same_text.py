"""Whether the texts that the settings name are those of a checkpoint: for training, and for validation."""

from typing import Any

from milepost.ckpt import Checkpoint
from milepost.config import Config
from milepost.run.text import Text, fraction_of, scan_text, scan_validation
from milepost.runtime.progress import Log
from milepost.text.addresses import masked
from milepost.text.known import known_text


def text_differences(record: Checkpoint, wanted: Config, log: Log) -> tuple[list[str], list[str]]:
    """Return in words how the training text, and how the validation text, differs from the record's; nothing if it is the same."""
    known = known_text(record.data, record.tokenizer)
    corpus, scanned = scan_text(wanted, log, known)
    other, data = [], record.data
    if scanned.sha256 != data.get("sha256"):
        was = masked(str(data.get("source")))
        other = [f"the text of {corpus.source} is not the text that the checkpoint was trained on ({was})"]
    given = scan_validation(wanted, log, known, corpus)
    if (given and given[1].sha256) != data.get("validation_sha256"):
        now, was = given[0].source if given else _part(fraction_of(wanted)), validation_of(data)
        return other, [f"the validation text is {now}, the checkpoint's {'is' if now != was else 'was another'} {was}"]
    if fraction_of(wanted) != data.get("validation_fraction"):
        now, was = str(wanted.validation_fraction), str(data.get("validation_fraction"))
        return other, [f"VALIDATION_FRACTION is {now}, the checkpoint has {was}"]
    return other, []


def validation_of(data: dict[str, Any]) -> str:
    """Return in words what a fingerprint says of the validation text."""
    return str(data.get("validation_source") or _part(data.get("validation_fraction")))


def _part(fraction: object) -> str:
    return f"the last {fraction} of the training text"


def same_texts(record: Checkpoint, text: Text) -> tuple[bool, bool]:
    """Return whether the training text, and whether a text for validation, is the record's."""
    now, training = text.fingerprint(), ("sha256", "validation_fraction", "unknown_characters")
    same = [{name: data.get(name) for name in training} for data in (record.data, now)]
    return same[0] == same[1], record.data.get("validation_sha256") == now.get("validation_sha256")
