"""What a run tells: lines and one bar on stderr, the same lines in training.log, figures in metrics.jsonl."""

import contextlib
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

QUIET_SECONDS = 10  # without a terminal: at most one plain progress line in so many seconds


class Log:
    """Lines to stderr and, once a run has a folder, to its training.log too."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.rank = self.local_rank = 0  # of this process among those of its training, and of its machine
        self._file: TextIO | None = None
        self._early: list[str] = []

    def open(self, path: Path) -> None:
        """From now on lines go to `path` too, those said so far first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (it lives as long as the run)
        self._file.writelines(line + "\n" for line in self._early)
        self._file.flush()

    def __call__(self, line: str) -> None:
        """Says one line, above the bar if there is one; of several processes, the first does.

        A run does not end because nobody hears it (`2>&1 | head`, a full disk).
        """
        if self.rank == 0:
            self._say(line)

    def error(self, line: str, *, expected: bool) -> None:
        """Says why this process ends. What is `expected` befalls every process of a machine alike, so that one of them suffices."""
        if not (expected and self.local_rank):
            self._say(f"rank {self.rank}: {line}" if self.rank else line)

    def _say(self, line: str) -> None:
        with tqdm.external_write_mode(file=self.stream), contextlib.suppress(OSError):
            print(line, file=self.stream, flush=True)
        if self._file is None:
            self._early.append(line)
            return
        with contextlib.suppress(OSError):
            print(line, file=self._file, flush=True)

    def close(self) -> None:
        """Ends training.log. What a full disk refuses now was told on stderr."""
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


class Progress:
    """One bar from the resumed step to the planned end; plain lines where stderr is no terminal."""

    def __init__(self, log: Log, *, start: int, total: int, plain: bool) -> None:
        self._log = log
        self._plain = plain or log.rank > 0 or not log.stream.isatty()
        self._total = total
        self._said = time.monotonic()
        self._bar = tqdm(
            initial=start, total=total, unit="step", file=log.stream, disable=self._plain, dynamic_ncols=True
        )
        self.figures: dict[str, str] = {}

    def advance(self, step: int) -> None:
        """Shows that `step` optimizer steps are done."""
        if not self._plain:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, *, seconds_left: float | None = None, **figures: str) -> None:
        """Shows `figures` beside the bar, or as a plain line once in a while."""
        self.figures |= figures
        if not self._plain:
            self._bar.set_postfix(self.figures, refresh=False)
        elif time.monotonic() - self._said >= QUIET_SECONDS:
            self._said = time.monotonic()
            left = f", {duration(seconds_left)} left" if seconds_left else ""
            self._log(
                f"step {step}/{self._total}: "
                + ", ".join(f"{name} {value}" for name, value in self.figures.items())
                + left
            )

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


class Metrics:
    """metrics.jsonl: one strict JSON object a line, appended and flushed; a torn last line is tolerated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keeps only the lines that `keep` says yes to, and drops a torn one, so that going on leaves no doubled steps."""
        if not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if keep(line)]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in kept), encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Appends one line. A number that is not finite becomes null: JSON has no word for it."""
        if self._file is None:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (it lives as long as the run)
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        print(json.dumps(finite, allow_nan=False), file=self._file, flush=True)

    def close(self) -> None:
        """Ends the file."""
        if self._file:
            with contextlib.suppress(OSError):  # each line was flushed, or its refusal told, when it was written
                self._file.close()
            self._file = None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` at the end, or leaves it as it was if something is raised."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, NaN as null; a line that is no whole JSON object (the last one after a kill) is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text, parse_constant=lambda _: None)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def duration(seconds: float) -> str:
    """`seconds` as people say it: 45 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def amount(count: float, unit: str = "") -> str:
    """`count` with three figures and a thousand's letter: 0.81M, 1.54G."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size / 2:
            return f"{count / size:.3g}{letter}{unit}"
    return f"{count:.3g}{unit}"


def shown(path: Path | str) -> str:
    """The path as short as it can be typed from the current folder; an address or a list of paths stays as it is."""
    inside = Path(path).is_relative_to(Path.cwd())
    return str(Path(path).relative_to(Path.cwd())) if inside else str(path)


def command_line(script: Path, *, processes: int | None = None, **variables: object) -> str:
    """A command that can be pasted into a shell in the current folder: variables quoted, script and Python where they are.

    Of so many `processes` on this machine, torchrun's; it takes the place of Python.
    """
    python = "python3" if shutil.which("python3") == sys.executable else shlex.quote(shown(sys.executable))
    if processes is not None:
        python += f" -m torch.distributed.run --nproc_per_node={processes}"
    words = [
        f"{name}={shlex.quote(shown(value) if isinstance(value, Path) else str(value))}"
        for name, value in variables.items()
    ]
    return " ".join([*words, python, shlex.quote(shown(script))])


def tell(text: str) -> None:
    """Print to stdout; on a terminal, nothing in the text can steer it. A reader that is gone is no reason to stop."""
    text = text.encode("utf-8", "backslashreplace").decode()  # a file's name may be no UTF-8
    try:
        print(harmless(text) if sys.stdout.isatty() else text, flush=True)
    except BrokenPipeError:
        ignore_stdout()


def ignore_stdout() -> None:
    """Leads stdout nowhere: Python would complain about a closed pipe once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def harmless(text: str) -> str:
    """`text` without what could steer a terminal: control characters but newline and tab, and bidirectional overrides, become U+FFFD."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _steers(char) else char for char in text)


def _steers(char: str) -> bool:
    code = ord(char)
    return (
        (code < 32 and char not in "\n\t")
        or 0x7F <= code <= 0x9F
        or 0x202A <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
    )
