"""Output of a run: log lines and a progress bar on stderr, the same lines in training.log, values in metrics.jsonl."""

import contextlib
import errno
import json
import math
import os
import shlex
import shutil
import string
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from milepost.files import GrowingFile, content_of, replace_content
from milepost.runtime.notices import Notices
from milepost.screen import harmless, show

QUIET_SECONDS = 10  # between plain progress lines without a terminal, at least


def write_own(path: Path, text: str) -> None:
    """Durably replace a run's own file. Raise OSError if a link, a pipe or a device is in its place."""
    replace_content(path, text.encode())


class Log:
    """Write lines to stderr and, once the run has a folder, also to its training.log."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream: TextIO = stream or sys.stderr or open(os.devnull, "w")  # noqa: SIM115
        self.rank = self.local_rank = 0  # of this process in the training, and on its machine
        self.notices = Notices()  # to a webhook
        self._file: GrowingFile | None = None
        self._early: list[str] = []

    def open(self, path: Path) -> None:
        """Write all earlier lines to `path`, and from now on every line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = GrowingFile(path)
        file.flush()
        self._file = file
        for line in self._early:
            self._add(line)

    def notify(self, url: str | None, *, name: str) -> None:
        """Send notices of this training to a webhook, if rank 0 has one; `name` is that of its setting."""
        if url and self.rank == 0:
            self.notices.open(url, name=name, say=self)

    def flush(self) -> None:
        """Write lines of training.log that wait because its file system cannot append."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.flush()

    def _add(self, line: str) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.add((harmless(line) + "\n").encode(errors="backslashreplace"))

    def __call__(self, line: str) -> None:
        """Write one line, above the progress bar if there is one; on rank 0 only.

        What could steer a terminal is escaped. Write errors are ignored (`2>&1 | head`, a full disk): they must not stop
        a run.
        """
        if self.rank == 0:
            self._write(line)

    def error(self, line: str, *, expected: bool) -> None:
        """Log why this process ends.

        An `expected` error occurs in every process of a machine, so only one of them logs it.
        """
        if not (expected and self.local_rank):
            self._write(f"rank {self.rank}: {line}" if self.rank else line)

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError), tqdm.external_write_mode(file=self.stream):
            show(line, self.stream)
        if self._file is None:
            self._early.append(harmless(line))
        else:
            self._add(line)

    def close(self) -> None:
        """Send what waits for the webhook, and close training.log. A write error here is ignored: the lines are on stderr."""
        self.notices.close()
        if self._file:
            self._file.close()
            self._file = None


LEAST_BAR = 10  # columns that the bar itself gets before a figure less important than the loss


def bar_format(figures: Mapping[str, str], *, total: int, columns: int) -> str:
    """Return tqdm's format for a line of `columns`: percentage, bar, step and loss, then what fits, in the order of use to
    its reader. tqdm would cut the end off, whatever stands there.
    """
    left = {"left": "{remaining}"} if total else {}
    order = ["loss", "validation", "left", *(name for name in figures if name not in ("loss", "validation"))]
    known = dict(figures) | left
    taken = len("100%|| ") + 2 * len(str(total)) + 1
    words = ""
    for name in (name for name in order if name in known):
        word = f", {known[name]} left" if name == "left" else f", {name} {known[name]}"
        width = len(word) if name != "left" else len(", 00:00:00 left")
        if name != "loss" and taken + width + LEAST_BAR > columns:
            continue
        words, taken = words + word, taken + width
    bar = "{percentage:3.0f}%|{bar}| " if taken < columns else ""
    return f"{bar}{{n_fmt}}/{{total_fmt}}{words}"


def _columns(stream: TextIO) -> int:
    with contextlib.suppress(OSError, ValueError):  # a ValueError if it is closed, or no file
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80


class Progress:
    """A progress bar from the first step of this process to the last; plain lines if stderr is not a terminal."""

    def __init__(self, log: Log, *, start: int, total: int, plain: bool) -> None:
        self._log = log
        self._plain = plain or log.rank > 0 or not log.stream.isatty()
        self._total = total
        self._logged_at = time.monotonic()
        self._bar = tqdm(
            initial=start, total=total, unit="step", file=log.stream, disable=self._plain, dynamic_ncols=True,
            bar_format=bar_format({}, total=total, columns=_columns(log.stream)),
        )  # fmt: skip
        self.figures: dict[str, str] = {}

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if not self._plain:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, *, seconds_left: float | None = None, **figures: str) -> None:
        """Show `figures` beside the bar, or as a plain line every QUIET_SECONDS. An empty figure is left out from now on."""
        self.figures = {name: value for name, value in (self.figures | figures).items() if value}
        if not self._plain:
            self._bar.bar_format = bar_format(self.figures, total=self._total, columns=_columns(self._log.stream))
        elif time.monotonic() - self._logged_at >= QUIET_SECONDS:
            self._logged_at = time.monotonic()
            left = f", {duration(seconds_left)} left" if seconds_left else ""
            self._log(
                f"step {step}/{self._total}: "
                + ", ".join(f"{name} {value}" for name, value in self.figures.items())
                + left
            )

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()


class Metrics:
    """metrics.jsonl: one strict JSON object per line, appended unbuffered.

    A line torn by a kill or a full disk is tolerated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set_aside = path.with_name(f"{path.stem}.set-aside{path.suffix}")
        self.unreadable = path.with_name(f"{path.stem}.unreadable")  # bytes that stood between lines
        self._file = GrowingFile(path)

    def rewind(self, keep: Callable[[dict[str, Any]], bool], *, until: float = math.inf) -> int:
        """Leave the history of the checkpoint that the run resumes from in metrics.jsonl, and set every other line
        aside.

        `keep` selects the steps that the checkpoint had reached, `until` is when it was saved (Unix seconds). If the
        run had resumed from an earlier step and now resumes from a later one, the lines of the later one return from
        those set aside. What is not a line goes to `unreadable`; return how many such lines there were.
        """
        if not self.path.exists():
            return 0
        current, lost = _read(self.path)
        aside, lost_aside = _read(self.set_aside) if self.set_aside.exists() else ([], [])
        if lost := [*lost, *lost_aside]:
            earlier = content_of(self.unreadable) if self.unreadable.exists() else b""
            replace_content(self.unreadable, earlier + b"".join(text + b"\n" for text in lost))
        history = _history(current, aside, keep=keep, until=until)
        chosen = set(map(json.dumps, history))
        rest = {text: line for line in [*aside, *current] if (text := json.dumps(line)) not in chosen}
        if rest or aside:  # first, so that each line is always in one of the two files
            _replace_lines(self.set_aside, list(rest.values()))
        _replace_lines(self.path, history)
        return len(lost)

    def write(self, **values: Any) -> None:
        """Append one line. NaN and Inf become null: JSON has neither.

        Raise OSError on a write error, and once if the file was deleted since the last line: a new file then has the
        line.
        """
        self._file.add(_as_line(values))

    def flush(self) -> None:
        """Write lines that wait: the file system cannot append, or refused them. Raise OSError if it still does."""
        self._file.flush()

    def close(self) -> int:
        """Write what waits, and close the file; return how many lines could not be written."""
        return self._file.close()


def _history(
    current: list[dict[str, Any]], aside: list[dict[str, Any]], *, keep: Callable[[dict[str, Any]], bool], until: float
) -> list[dict[str, Any]]:
    """Return the lines that lead to a checkpoint: those of the file that were written before it, then those set aside.

    If the clock was set back in between, later lines fill the steps that remain.
    """
    early = [number for number, line in enumerate(current, 1) if _was_written(line, until)]
    end = early[-1] if early else 0
    history = [line for line in current[:end] if keep(line)]
    for source in ([line for line in aside if _was_written(line, until)], current[end:], aside):
        reached = max(map(_place, history), default=(-1, 0))
        more = {_place(line): line for line in source if keep(line) and _place(line) > reached}
        history += [more[place] for place in sorted(more)]
    return history


def _was_written(line: dict[str, Any], until: float) -> bool:
    when = line.get("time")
    return not isinstance(when, int | float) or when <= until + 0.001  # times are rounded to milliseconds


def _place(line: dict[str, Any]) -> tuple[int, int]:
    """Return the sort key of a line: its step, and at equal steps training before validation."""
    step = line.get("step")
    return (step if isinstance(step, int) else -1, int(line.get("split") == "validation"))


def _replace_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    replace_content(path, b"".join(map(_as_line, lines)))


def _as_line(values: dict[str, Any]) -> bytes:
    """Return a line of metrics.jsonl, with null for NaN and Inf."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return (json.dumps(finite, allow_nan=False) + "\n").encode()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, NaN as null, without lines that are not a complete JSON object (torn by a
    kill).
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Return the lines as `read_metrics` does, and those that it leaves out, but for the end of the file, which a kill tore, and
    lines without content: a file system may fill with zeros what it lost.
    """
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise OSError(errno.EINVAL, "is not a regular file, expected the metrics of a run: remove it", str(path))
    texts = content_of(path).split(b"\n")
    lines = [parse_line(text.decode(errors="replace")) for text in texts]
    lost = [text for text, line in zip(texts, lines[:-1], strict=False) if line is None and text.strip(b"\0 \t\r")]
    return [line for line in lines if line is not None], lost


def parse_line(text: str) -> dict[str, Any] | None:
    """Return the object of a line; if the next line was appended to a torn one, the next line's object."""
    text = text.removeprefix("\ufeff")  # which an editor may write at the beginning of a file
    for start in sorted({0, max(0, text.rfind('{"'))}):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text[start:], parse_constant=lambda _: None)
            if isinstance(line, dict) and (start == 0 or isinstance(line.get("step"), int)):
                return line
    return None


def duration(seconds: float) -> str:
    """Format a duration: under 1 s, 45 s, 3 min, 2 h 05 min."""
    if seconds < 0.95:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def amount(count: float, unit: str = "") -> str:
    """Format a count with three digits and an SI letter: 0.81M, 1.54G."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size / 2:
            return f"{count / size:.3g}{letter}{unit}"
    return f"{count:.3g}{unit}"


def shown(path: Path | str) -> str:
    """Return the path relative to the current folder if it is inside, else as it is (also a URL or a list of paths);
    what could steer a terminal is escaped.
    """
    return harmless(_relative(path), one_line=True)


def _relative(path: Path | str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):  # outside, or the current folder was deleted while this program ran
        return str(path)


def _quoted(text: str) -> str:
    """Return `text` as a word of a shell command: bytes that are no printable text as bash, zsh and ksh write them."""
    if text.isprintable():
        return shlex.quote(text)
    plain = frozenset(string.ascii_letters + string.digits + "/._-")
    letters = (chr(byte) if chr(byte) in plain else f"\\{byte:03o}" for byte in os.fsencode(text))
    return f"$'{''.join(letters)}'"


def command_line(script: Path, *, processes: int | None = None, **variables: object) -> str:
    """Return a shell command for the current folder: quoted variables, this Python and the script; with `processes`,
    through torchrun.
    """
    python = "python3" if shutil.which("python3") == sys.executable else _quoted(_relative(sys.executable))
    if processes is not None:
        python += f" -m torch.distributed.run --nproc_per_node={processes}"
    words = [
        f"{name}={_quoted(_relative(value) if isinstance(value, Path) else str(value))}"
        for name, value in variables.items()
    ]
    return " ".join([*words, python, _quoted(_relative(script))])
