"""A run: from nothing, from other weights, or from a checkpoint. `state` has its parts, `build` puts them together."""

from milepost.run.build import (
    assemble,
    build_device,
    changeable,
    check_batch_size,
    fresh,
    memory_needed,
    planned,
    refused,
    shapes,
)
from milepost.run.device_check import device_problem, first_token_problem
from milepost.run.replay import check_unchanged, checked, left_by_step, why_not_replayed
from milepost.run.state import TRY_INSTEAD, Run, Saved, State, is_due, to_record
from milepost.run.text import Text, open_source, read_text, scan_source, scan_text
from milepost.run.weights import (
    adapter_variables,
    agreed,
    completed,
    lineage,
    names_complete_tokenizer,
    with_heads,
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
    "check_unchanged",
    "checked",
    "completed",
    "device_problem",
    "first_token_problem",
    "fresh",
    "is_due",
    "left_by_step",
    "lineage",
    "memory_needed",
    "names_complete_tokenizer",
    "open_source",
    "planned",
    "read_text",
    "refused",
    "scan_source",
    "scan_text",
    "shapes",
    "to_record",
    "why_not_replayed",
    "with_heads",
    "with_its_base",
    "with_tokenizer",
]
