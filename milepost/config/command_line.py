"""The settings of a script that is started from a command line, or its help, or what is wrong with them."""

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from milepost.config.docs import help_text
from milepost.config.host import debug
from milepost.config.names import arguments_refused
from milepost.config.resolve import read
from milepost.config.variables import Config, ConfigError, printable


def from_command_line(argv: Sequence[str]) -> Config:
    """What every script calls first, with sys.argv: the settings; else help (exit 0) or what is wrong (exit 2)."""
    refuse_arguments(argv)
    try:
        return read()
    except ConfigError as error:
        if debug():
            raise
        print_once(str(error), sys.stderr)
        raise SystemExit(2) from None


def print_once(text: str, stream: TextIO) -> None:
    """Prints what every process that torchrun starts would print: the first one of each machine does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=stream, flush=True)


def refuse_arguments(argv: Sequence[str]) -> None:
    """Print help and exit 0 for --help; exit 2 for any other argument, naming the variable that was probably meant."""
    if {"-h", "--help"}.intersection(argv[1:]):
        try:
            print_once(help_text(argv[0]), sys.stdout)
        except BrokenPipeError:  # as by `| head`; without this, Python complains once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    if argv[1:]:
        print_once(printable(arguments_refused(argv)), sys.stderr)
        raise SystemExit(2)
