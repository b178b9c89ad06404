"""The first call of every script: its settings, its help, or the list of mistakes."""

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from milepost.config.docs import declared, described, help_text
from milepost.config.host import debug
from milepost.config.names import refuse_arguments
from milepost.config.resolve import read
from milepost.config.variables import Config, ConfigError
from milepost.runtime.interrupt import exit_on_signal
from milepost.screen import harmless, ignore, open_streams, show


def from_command_line(module: str, doc: str | None, reads: Sequence[str]) -> Config:
    """Return the settings of the script whose __name__ and __doc__ these are; print its help (exit 0) or the mistakes
    (exit 2).

    `reads` names the variables that the script reads, and groups of variables; --help lists them. Call it before torch
    is imported, so that a mistake is reported at once and a signal ends the import. A script that is imported, not run,
    gets the declared defaults.
    """
    if module != "__main__":
        return Config()
    open_streams()
    exit_on_signal()
    script, *arguments = sys.argv
    if {"-h", "--help"}.intersection(arguments):
        raise SystemExit(_help(script, doc or "", reads, [word for word in arguments if word not in ("-h", "--help")]))
    if arguments:
        read_here = {name for names in declared(reads).values() for name in names}
        _print_once(harmless(refuse_arguments(script, arguments, read_here), one_line=True), sys.stderr)
        raise SystemExit(2)
    try:
        settings = read(reads=reads)
        if sys.stderr.isatty():  # torch takes seconds to import, in which nothing else can be shown
            _print_once("loading PyTorch ...", sys.stderr)
        return settings
    except ConfigError as error:
        if debug():
            raise
        _print_once(str(error), sys.stderr)
        raise SystemExit(2) from None


def _help(script: str, doc: str, reads: Sequence[str], words: list[str]) -> int:
    """Print the help, of all settings after `--help all`, or of those that the words name; return the exit code."""
    everything = [word.lower() for word in words] == ["all"]
    only, unknown = ([], []) if everything else described(words, reads)
    if unknown:
        subjects = ", ".join(declared(reads))
        _print_once(
            harmless(f"--help {' '.join(unknown)}: no setting of {script}; subjects: {subjects}", one_line=True),
            sys.stderr,
        )
        return 2
    rows = shutil.get_terminal_size().lines if sys.stdout.isatty() and not everything else None
    _print_once(help_text(script, doc, reads, only=only, rows=rows), sys.stdout)
    return 0


def _print_once(text: str, stream: TextIO) -> None:
    """Print in one process per machine, as torchrun's processes would all print the same."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and show(text, stream):  # such as a pipe that `| head` closed
        ignore(stream)
