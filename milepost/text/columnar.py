"""Rows of .parquet and .arrow files: only the columns that are used, a few rows at a time, so that memory stays flat."""

import contextlib
import importlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from milepost.text.blocks import BLOCK, PACKED, refuse_pointer
from milepost.text.errors import DataError

SUFFIXES = (".parquet", ".arrow")
ROWS_AT_ONCE = 256  # at most; fewer where rows are long
BYTES_AT_ONCE = 4 * BLOCK  # of the rows read at once, by the average of their row group
ARROW_FILE = b"ARROW1"  # begins an Arrow file; what begins otherwise is a stream, as the datasets library writes it


def columns_of(path: Path) -> list[str]:
    """Return the names of the columns. Raise DataError if the file cannot be read."""
    with _errors_named(path), _opened(path) as file:
        return list(_schema(file).names)


def columnar_rows(path: Path, fields: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its place, as the values of the columns among `fields`; of the other columns the value is None.

    Raise DataError if the file or a row cannot be read.
    """
    number = 0
    with _errors_named(path), _opened(path) as file:
        names = list(_schema(file).names)
        blank, wanted = dict.fromkeys(names), [name for name in names if name in fields]
        if repeated := next((name for name in wanted if wanted.count(name) > 1), None):
            raise DataError(f"{path} has two columns {repeated!r}: rename or remove one of them")
        for batch in _batches(path, file, wanted):
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                for row in _as_python(batch.slice(start, ROWS_AT_ONCE), path, number):
                    number += 1
                    yield f"{path} row {number}", blank | row


def _batches(path: Path, file: Any, names: list[str]) -> Iterator[Any]:
    """Yield the rows of a file as record batches of these columns."""
    if hasattr(file, "iter_batches"):  # parquet
        for group in range(file.num_row_groups):
            size = _rows_at_once(file.metadata.row_group(group), names)
            yield from file.iter_batches(size, row_groups=[group], columns=names, use_threads=False)
        return
    numbers = [file.schema.get_field_index(name) for name in names]
    ipc = _library(path).ipc
    with _opened(path, ipc.IpcReadOptions(included_fields=numbers, use_threads=False)) as chosen:
        if hasattr(chosen, "num_record_batches"):
            yield from map(chosen.get_batch, range(chosen.num_record_batches))
        else:
            yield from chosen


def _rows_at_once(group: Any, names: list[str]) -> int:
    """Return how many rows of a row group to hold, by the size of the columns in it."""
    columns = map(group.column, range(group.num_columns))
    size = sum(each.total_uncompressed_size for each in columns if each.path_in_schema.split(".")[0] in names)
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE * group.num_rows // max(1, size)))


def _as_python(batch: Any, path: Path, before: int) -> list[dict[str, Any]]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                problem = f"holds text that is not valid UTF-8 ({error.reason})"
                raise DataError(f"{path} row {before + number + 1}: {problem}: leave the row out") from None
        raise


@contextlib.contextmanager
def _opened(path: Path, options: Any = None) -> Iterator[Any]:
    """Yield a reader of the file: of parquet, of an Arrow file or of an Arrow stream."""
    if path.suffix.lower() in PACKED:
        raise DataError(
            f"{path}: {' and '.join(SUFFIXES)} are read as they are, because they pack their columns: unpack it"
        )
    arrow = _library(path)
    refuse_pointer(path)
    if path.name.lower().endswith(".parquet"):
        with arrow.parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            yield file
        return
    with arrow.memory_map(str(path)) as source:
        is_file = source.read(len(ARROW_FILE)) == ARROW_FILE
        source.seek(0)
        with (arrow.ipc.open_file if is_file else arrow.ipc.open_stream)(source, options=options) as file:
            yield file


def _schema(file: Any) -> Any:
    return getattr(file, "schema_arrow", None) or file.schema


@contextlib.contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, _library(path).ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        kind = path.suffix.lower().removeprefix(".")
        raise DataError(f"{path} cannot be read as {kind} ({reason:.200}): copy or download it again") from error


def _library(path: Path) -> Any:
    """Return pyarrow. Raise DataError if it is not installed."""
    try:
        for module in ("pyarrow.parquet", "pyarrow.ipc"):
            importlib.import_module(module)
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise DataError(f"{path} is read with pyarrow, which is not installed: pip install pyarrow") from error
