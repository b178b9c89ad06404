"""Atomic, durable writes: write to a temporary hidden name, fsync, rename, fsync the folder.

The one place that writes durably, and that knows what a folder's file system lacks and what is done instead: see
docs/filesystems.md.
"""

from milepost.files.appearing import (
    UNFINISHED,
    delete_marked,
    is_unfinished,
    link_or_copy,
    naming_path,
    new_file,
    new_folder,
    new_group,
    new_path,
    remove,
    reveal,
    unfinished,
)  # fmt: skip
from milepost.files.file_system import (
    APPEND,
    LOCKS,
    RENAME,
    RENAME_FOLDERS,
    TEMPORARY,
    check_writable,
    discard,
    forget,
    free_space,
    hidden_name,
    instead,
    lacks,
    largest_file,
    look,
    may_go_away,
)  # fmt: skip
from milepost.files.growing import GrowingFile, content_of, replace_content, replacing
from milepost.files.leaving import OWN_NAME, has_writer, remove_abandoned
from milepost.files.mounting import check_mounted, note_mount
from milepost.files.owner_file import OwnerFile
from milepost.files.reaching import (
    UNREACHABLE,
    Entry,
    MadeEntry,
    below,
    entries_with_made,
    if_it_answers,
    in_words,
    is_unreachable,
    remember,
    steadily,
)  # fmt: skip
from milepost.files.reading import bring_in, open_steadily, read_steadily
from milepost.files.watching import Watch
from milepost.files.writing import (
    BEGINNING,
    BLOCK,
    CHUNK,
    NewFile,
    flush_to_disk,
    make_folder,
    sync_file,
    sync_folder,
    write_json,
    written,
)  # fmt: skip

__all__ = [
    "APPEND", "BEGINNING", "BLOCK", "CHUNK", "LOCKS", "OWN_NAME", "RENAME", "RENAME_FOLDERS", "TEMPORARY", "UNFINISHED",
    "UNREACHABLE",
    "Entry", "GrowingFile", "MadeEntry", "NewFile",
    "OwnerFile", "Watch", "below", "bring_in", "check_mounted", "check_writable",
    "content_of", "delete_marked", "discard", "entries_with_made", "flush_to_disk", "forget", "free_space", "has_writer", "hidden_name", "if_it_answers", "in_words", "instead",
    "is_unfinished", "is_unreachable", "lacks", "largest_file", "link_or_copy", "look", "make_folder", "may_go_away", "naming_path",
    "new_file", "new_folder", "new_group", "new_path", "note_mount", "open_steadily", "read_steadily", "remember", "remove", "remove_abandoned", "replace_content", "replacing",
    "reveal", "steadily", "sync_file", "sync_folder", "unfinished", "write_json", "written",
]  # fmt: skip
