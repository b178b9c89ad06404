"""A script on a terminal of its own: what is typed there, and what appears."""

import os
import pty
import re
import select
import sys
import time
from pathlib import Path

import programs
from drive import ROOT, child_environment
from forkserver import own_terminal
from work import HANGING


class Terminal:
    """A script that runs on a terminal; `shown` is all that appeared so far, stderr too."""

    def __init__(self, script: str, folder: Path, **changes: str) -> None:
        self.master, slave = pty.openpty()
        env = child_environment(folder, **{"TERM": "xterm", "NO_COLOR": "1"} | changes)
        self.process = programs.start(
            [sys.executable, script], cwd=ROOT, env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=own_terminal,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        """Send keys; \\x03 is Ctrl-C and \\x04 Ctrl-D."""
        os.write(self.master, text.encode())

    def until(self, pattern: str, *, after: int = 0) -> int:
        """Read until the pattern appears at or after a position of `shown`; return where it ends."""
        deadline = time.monotonic() + HANGING
        while not (found := re.compile(pattern).search(self.shown, after)):
            assert select.select([self.master], [], [], deadline - time.monotonic())[0], self.shown
            assert self._read(), f"ended without {pattern!r}: {self.shown}"
        return found.end()

    def _read(self) -> bool:
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # the other side is closed
            return False
        self.shown += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)

    def ended(self) -> int:
        """Read to the end; return the exit code."""
        while self._read():
            pass
        os.close(self.master)
        return self.process.wait(timeout=HANGING)
