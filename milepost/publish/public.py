"""What may be public of a checkpoint: no optimizer, no path, no note, nothing of the machine but what the weights depend on."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from milepost import config
from milepost.ckpt import Checkpoint
from milepost.ckpt.record import Json

# owner/name, also with a revision, or one of the first models' names
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)
AFFECTING = ("identity", "math")  # scopes of settings that the weights depend on
PUBLIC_DATA = (
    "name",
    "sha256",
    "characters",
    "documents",
    "conversations",
    "validation_fraction",
    "text_form",
    "template",
)
PUBLIC_RUNTIME = ("torch", "python", "device", "device_name", "dtype", "processes", "compile", "deterministic")


def public_record(record: Checkpoint) -> Checkpoint:
    """Return the record without what was not asked to be published; its weights, tokenizer and settings stay."""
    return dataclasses.replace(
        record,
        optimizer_state=None,
        scaler=None,
        hyperparameters=public_settings(record.hyperparameters),
        data=public_data(record.data),
        runtime={name: record.runtime[name] for name in PUBLIC_RUNTIME if name in record.runtime},
        parent=_picked(record.parent, ("run_id", "step")),
        base=public_base(record.base),
        imported=None,
        notes=[],
    )


def public_settings(values: Mapping[str, Json]) -> dict[str, Json]:
    """Return the settings that affect the weights, of paths to the text only the last name, and no other path."""
    known = {name: each.metadata for name, each in config.VARIABLES.items() if each.metadata["scope"] in AFFECTING}
    kept = {name: value for name, value in values.items() if name in known}
    for name, value in kept.items():
        form = known[name]["form"]
        if form == "source" and isinstance(value, str):
            kept[name] = file_names(value)
        elif form in ("hub", "path", "folder", "paths"):
            kept[name] = hub_name(value)
    return kept


def public_data(values: Mapping[str, Json]) -> dict[str, Json]:
    """Return what describes the text without saying where it lies."""
    kept = {name: values[name] for name in PUBLIC_DATA if name in values}
    source = values.get("source")
    return kept | ({"source": file_names(source)} if isinstance(source, str) else {})


def public_base(base: Mapping[str, Json] | None) -> dict[str, Json] | None:
    """Return the base of adapters: its sha256, and its name if it is on the hub."""
    return None if base is None else {"sha256": base.get("sha256"), "source": hub_name(base.get("source"))}


def hub_name(source: object) -> str | None:
    """Return the name of a model on the hub; None for a path, which a record has as an absolute one."""
    return source if isinstance(source, str) and HUB_NAME.fullmatch(source) else None


def file_names(source: str) -> str:
    """Return of each path or address of a text its last part."""
    parts = (re.split(r"[?#]", part)[0].rstrip("/\\").replace("\\", "/") for part in source.split(","))
    return ",".join(part.rpartition("/")[2] for part in parts)


def _picked(values: Mapping[str, Any] | None, names: tuple[str, ...]) -> dict[str, Any] | None:
    return None if values is None else {name: values[name] for name in names if name in values}
