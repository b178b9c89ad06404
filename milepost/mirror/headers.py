"""A checkpoint of a mirror without its tensors: files as long as they are there, with holes where the tensors lie.

Whatever reads metadata and headers of a checkpoint on the disk reads them of such files, which take a few reads of ranges.
"""

import contextlib
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path, PurePosixPath

from milepost.ckpt import zip_reader
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.record import CheckpointError
from milepost.ckpt.tensor_listing import held
from milepost.files import BEGINNING
from milepost.mirror.contents import CHECKPOINTS, EARLIER, Part, Save
from milepost.mirror.fetching import Pause, check_not_deleted, content
from milepost.mirror.retrying import attempted
from milepost.mirror.store import Store, StoreError

TAIL = 2**16  # bytes at the end of a torch archive, where its directory lies
GAP = 2**16  # bytes between two ranges that are read with them: one request costs as much
LONGEST_HEADER = 100 * 2**20  # bytes of a safetensors header, as its library allows
Span = tuple[int, int]


def write_headers(store: Store, save: Save, folder: Path, *, pause: Pause) -> Path:
    """Write the checkpoint of a save below `folder`, an empty one, without its tensors; return its path.

    Raise CheckpointError if it is damaged there as far as that shows, or was deleted there ("not found"), StoreError if the
    store does not answer.
    """
    try:
        for part in save.checkpoint_parts:
            target = folder / PurePosixPath(part.place).relative_to(CHECKPOINTS)
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_part(store, part, target, pause=pause)
    except (CheckpointError, StoreError):
        check_not_deleted(store, save, pause=pause)
        raise
    path = folder / save.checkpoint
    try:
        metadata = known_layout(path).read_metadata(path)
        held(path)
    except CheckpointError as error:
        raise CheckpointError(_where(store, save), error.problem or str(error), EARLIER, kind=error.kind) from error
    if metadata.get("save_id") != save.metadata.get("save_id"):
        raise CheckpointError(_where(store, save), "is of another save than its manifest", EARLIER, kind="damaged")
    return path


def _where(store: Store, save: Save) -> str:
    return f"{store.shown}/{save.checkpoint}"


def _write_part(store: Store, part: Part, target: Path, *, pause: Pause) -> None:
    if part.size <= BEGINNING:
        target.write_bytes(content(store, part, pause=pause))
        return
    try:
        size = attempted(lambda: store.size(part.object), pause=pause)
    except StoreError as error:
        if error.kind != "missing":
            raise
        raise CheckpointError(str(error), kind="damaged") from error
    if size != part.size:
        problem = f"has {size} bytes, {part.size} were sent"
        raise CheckpointError(f"{store.shown}/{part.object}", problem, EARLIER, kind="damaged")
    with open(target, "wb", buffering=0) as file:
        file.truncate(size)

        def fill(spans: list[Span]) -> None:
            for begin, data in attempted(lambda: store.ranges(part.object, joined(spans)), pause=pause):
                file.seek(begin)
                file.write(data)

        fill([(0, BEGINNING)])
        with open(target, "rb") as written:
            begins = written.read(8)
            if begins.startswith(b"PK"):
                _fill_archive(written, size, fill)
            elif target.suffix == ".safetensors":
                fill([(BEGINNING, min(8 + int.from_bytes(begins, "little"), LONGEST_HEADER, size))])
            else:
                fill([(BEGINNING, size)])


def _fill_archive(written: BufferedReader, size: int, fill: Callable[[list[Span]], None]) -> None:
    """Fill in all of a torch archive but the bytes of its tensors. What is no archive is left to its reader to report."""
    fill([(size - TAIL, size)])
    with contextlib.suppress(ValueError):
        fill([(zip_reader.directory_start(written), size - TAIL)])
        fill(zip_reader.outline(written))


def joined(spans: list[Span]) -> list[Span]:
    """Return the spans sorted, those with less than GAP between them as one, and without empty ones."""
    found: list[Span] = []
    for begin, end in sorted(span for span in spans if span[0] < span[1]):
        if found and begin - found[-1][1] < GAP:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found
