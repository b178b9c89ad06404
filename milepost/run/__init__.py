"""A run: from nothing, from other weights, or from a checkpoint. `state` has its parts, `build` puts them together."""

from milepost.run.build import (
    assemble,
    build_device,
    changeable,
    check_batch_size,
    fresh,
    memory_needed,
    planned,
    shapes,
)
from milepost.run.state import TRY_INSTEAD, Run, Saved, State, is_due, to_record
from milepost.run.text import Text, open_source, read_text, scan_source
from milepost.run.weights import (
    adapter_variables,
    agreed,
    lineage,
    names_complete_tokenizer,
    with_its_base,
    with_tokenizer,
)

__all__ = [
    "TRY_INSTEAD",
    "Run",
    "Saved",
    "State",
    "Text",
    "adapter_variables",
    "agreed",
    "assemble",
    "build_device",
    "changeable",
    "check_batch_size",
    "fresh",
    "is_due",
    "lineage",
    "memory_needed",
    "names_complete_tokenizer",
    "open_source",
    "planned",
    "read_text",
    "scan_source",
    "shapes",
    "to_record",
    "with_its_base",
    "with_tokenizer",
]
