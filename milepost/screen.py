"""What people read on a screen: text that cannot steer a terminal, and streams that may be closed, full or of a small
encoding.

No output decides what a program does: what cannot be written is lost, and the program continues. A command whose only product is
its report asks `report_lost` at its end.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from typing import TextIO

LEAVES_THE_LINE = ("Cc", "Cs", "Zl", "Zp")  # categories: control characters, lone surrogates, line separators
_LOST: list[OSError | ValueError] = []  # why reports of this process did not reach stdout
REORDERS = (*range(0x200E, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x061C)  # bidirectional controls


def harmless(text: str, *, one_line: bool = False) -> str:
    """Return `text` with every character that could steer a terminal written as its escape in Python.

    Newlines and tabs stay, unless `one_line`, for names, values and errors: then every unprintable character is
    escaped.
    """
    return "".join(char if char.isprintable() or (not one_line and _is_text(char)) else _escape(char) for char in text)


def _is_text(char: str) -> bool:
    return char in "\n\t" or (unicodedata.category(char) not in LEAVES_THE_LINE and ord(char) not in REORDERS)


def _escape(char: str) -> str:
    return ascii(char)[1:-1]


def show(text: str, stream: TextIO | None, *, colored: bool = False) -> OSError | ValueError | None:
    """Print text and a newline, harmless unless it is `colored` by this program; return the error if it cannot be
    written.
    """
    if stream is None:  # closed before the program began
        return None
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text = text if colored else harmless(text)
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except (OSError, ValueError) as error:  # a ValueError if the stream was closed since
        return error
    return None


def put(text: str) -> None:
    """Write text to stdout at once. Raise OSError saying that it is lost, or BrokenPipeError if its reader has gone."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"the text is lost: stdout cannot be written ({error.strerror})") from error


def put_pieces(pieces: Iterable[str]) -> str:
    """Write pieces of text to stdout as they come; what could steer a terminal is escaped if it is one. Return them joined."""
    clean = harmless if sys.stdout.isatty() else str
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    written = []
    for piece in pieces:
        put(clean(piece))
        written.append(piece)
    return "".join(written)


def write_stdout(text: str, *, colored: bool = False) -> None:
    """Print a report to stdout. If that is impossible, report it once on stderr; a closed pipe is not reported."""
    if error := show(text, sys.stdout, colored=colored):
        ignore(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            _LOST.append(error)
            show(f"stdout cannot be written ({error}): the rest of this report is lost", sys.stderr)


def report_lost() -> bool:
    """Return whether `write_stdout` failed in this process, other than at a closed pipe."""
    return bool(_LOST)


def stdout_columns() -> int | None:
    """Return the width of the terminal that stdout is, at least 40; None for a pipe or a file."""
    return max(40, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def write_json(values: object) -> None:
    """Print one JSON object to stdout, as `write_stdout` does. Paths become text, NaN and Inf null: JSON has neither."""
    write_stdout(json.dumps(_finite(values), indent=1, allow_nan=False, default=str))


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def open_streams() -> None:
    """Open the null device in the place of each of stdin, stdout and stderr that is closed.

    Otherwise the next file that is opened, such as a checkpoint, would get its number and whatever is printed.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def flush_streams() -> None:
    """Flush stdout and stderr. For a full disk or a closed pipe, Python would otherwise set its own exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # a ValueError if it is closed
            ignore(stream)


def ignore(stream: TextIO | None) -> None:
    """Redirect a stream to the null device: at exit Python would try once more to write what it could not."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it has no file, or none that is open
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # type: ignore[union-attr]
        os.close(null)
