"""The lines of an env file, and what is wrong with them: python-dotenv passes over most of it in silence."""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from dotenv.parser import Binding, parse_stream
from dotenv.variables import Variable, parse_variables

from milepost.config.variables import VARIABLES


def readable_lines(text: str, label: str) -> tuple[str, list[str]]:
    """Return the lines of an env file that set a name or are a comment, and a sentence for each mistake; `label` names the file."""
    lines = list(parse_stream(io.StringIO(text)))
    bad = [line for line in lines if line.error or "\0" in line.original.string or (line.key and line.value is None)]
    good = [line for line in lines if line not in bad]
    problems = [f"{label}, line {_number(line)}: expected NAME=value{_about_quotes(line)}" for line in bad]
    problems += [*_two_values(good, label), *_unset_parts(good, label)]
    return "".join(line.original.string for line in good), problems


def _number(line: Binding) -> int:
    """Return the number of the line on which a statement begins; python-dotenv counts from the empty lines before it."""
    text = line.original.string
    return line.original.line + text[: len(text) - len(text.lstrip())].count("\n")


def _about_quotes(line: Binding) -> str:
    """Return the end of the sentence on a line whose value begins with a quotation mark that does not end it."""
    quote = line.original.string.partition("=")[2].strip()[:1]
    return f", with the closing {quote} at its end (\\{quote} writes one inside)" if quote in ("'", '"') else ""


def _two_values(lines: Iterable[Binding], label: str) -> Iterator[str]:
    """Yield a sentence for each name with two values, of which python-dotenv takes the last."""
    first: dict[str, Binding] = {}
    for line in lines:
        if line.key and line.value != (earlier := first.setdefault(line.key, line)).value:
            yield f"{label}, lines {_number(earlier)} and {_number(line)}: {line.key} has two values; remove one of them"


def _unset_parts(lines: Iterable[Binding], label: str) -> Iterator[str]:
    """Yield a sentence for each `${NAME}` without a value, which python-dotenv expands to nothing: ${SCRATCH}/runs would be a
    folder of the root.
    """
    known = set(os.environ)
    for line in lines:
        for part in parse_variables(line.value or ""):
            if isinstance(part, Variable) and part.default is None and part.name not in known:
                problem = f"${{{part.name}}} has no value in the environment or in the lines above"
                yield f"{label}, line {_number(line)}: {problem}; set it, or write ${{{part.name}:-}} for an empty text"
        known |= {line.key} if line.key else set()


def unread_file(path: Path, *, read: Path) -> Iterator[str]:
    """Yield a sentence if the file at `path` sets variables of ours and is another than the one to `read`.

    Other programs have names of one word, such as PORT, and API_KEY in their files too.
    """
    with contextlib.suppress(OSError, ValueError):
        if not path.is_file() or path.parent.samefile(read.parent):
            return
        lines = parse_stream(io.StringIO(path.read_text(encoding="utf-8-sig")))
        ours = [line.key for line in lines if line.key in VARIABLES and "_" in line.key and line.key != "API_KEY"]
        if ours:
            yield f"{path} ({', '.join(ours[:3])}{', ...' * (len(ours) > 3)}) is not read; ENV_FILE=.env reads it"
