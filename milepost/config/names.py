"""Names that are not variables of this project: those of other programs, and probable misspellings of ours."""

import difflib
import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from milepost.config.variables import VARIABLES
from milepost.config.words import (
    FAMILIES,
    FLAGS,
    FOREIGN_NAMES,
    FOREIGN_PREFIXES,
    NO_WARNING,
    OTHER_UNITS,
    OTHER_WORDS,
    SUFFIXES,
)
from milepost.runtime.trackers import TRACKERS
from milepost.text.addresses import masked

NEAR_MISS = 0.9  # difflib ratio from which a name with an underscore can hardly be anything but a misspelt variable
CLOSE = 0.83  # and from which a name of the process environment is reported

CONFIG_SUFFIXES = (".yaml", ".yml", ".toml", ".json")  # of configuration files that are not env files
CONFIG_BYTES = 2**16  # read of such a file
CONFIG_LINE = re.compile(r"""\s*["']?([A-Za-z_][\w.-]*)["']?\s*[:=]\s*(.*?),?\s*(?:\s#.*)?""")


def is_foreign(name: str) -> bool:
    """Return whether the variable belongs to another program: Hugging Face, CUDA, torchrun, the terminal, a tracker, ..."""
    of_trackers = (name for entry in TRACKERS.values() for name in entry.variables)
    known = name.upper() in (*FOREIGN_NAMES, *of_trackers) or name.upper().startswith(FOREIGN_PREFIXES)
    return known and name not in VARIABLES and "=" not in name


def unknown_in_file(names: Iterable[str], label: str) -> Iterator[str]:
    """Yield one sentence for each name in the env file that is not a variable."""
    for name in names:
        if name == "ENV_FILE":
            yield f"{label}: ENV_FILE can only be set in the process environment"
        elif name not in VARIABLES and not is_foreign(name):
            yield f"{label}: {name} is not a variable; {_suggestion(name, closest_variable(name))}"


def unknown_in_environment(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return one sentence for each name that can only be meant for us, and one for each that may be another program's."""
    mistakes, notes = [], []
    for name in names:
        meant = None if name in VARIABLES or is_foreign(name) else meant_by(name)
        if meant and _only_ours(name, meant):
            mistakes.append(f"{name} is not a variable; {_suggestion(name, meant)}")
        elif meant:
            notes.append(f"{name} in the environment is not a variable and is ignored; {_suggestion(name, meant)}")
    return mistakes, notes


def meant_by(name: str) -> str | None:
    """Return the variable that an unknown name of the process environment may be meant for; None if none is near."""
    word = _as_name(name)
    if word in NO_WARNING:
        return None
    if word in OTHER_WORDS or word in OTHER_UNITS:
        return OTHER_WORDS.get(word) or OTHER_UNITS[word][0]
    if word.startswith(FAMILIES):
        return closest_variable(word)
    return _close(word)


def _close(word: str) -> str | None:
    return next(iter(difflib.get_close_matches(word, VARIABLES, 1, CLOSE)), None)


def _only_ours(name: str, meant: str) -> bool:
    word = _as_name(name)
    near = difflib.SequenceMatcher(None, word, meant).ratio() >= NEAR_MISS
    return "_" in word and (near or word.startswith(FAMILIES))


def _suggestion(name: str, meant: str | None) -> str:
    if meant is None:
        return "docs/configuration.md lists them"
    _, unit = OTHER_UNITS.get(_as_name(name), (None, ""))
    return f"did you mean {meant}{', ' * bool(unit)}{unit}?"


def closest_variable(word: str) -> str | None:
    """Return the variable that `word` is another name for or is closest to, if any. For a question, not for a command."""
    unit, _ = OTHER_UNITS.get(_as_name(word), (None, ""))
    return unit or variable_meant(word) or next(iter(difflib.get_close_matches(_as_name(word), VARIABLES, 1)), None)


def _as_name(word: str) -> str:
    return word.upper().replace("-", "_").replace(".", "_")


def variable_meant(word: str) -> str | None:
    """Return the variable that `word` names, in our words, in another project's, or misspelt by a letter; None if none is sure.

    Of `checkpoint.resume` the whole is looked up, then its last part.
    """
    names = [_as_name(word), _as_name(word.rpartition(".")[2])]
    known = [OTHER_WORDS.get(name, name) for name in names]
    found = [name for name in known if name in VARIABLES]
    return found[0] if found else next(iter(difflib.get_close_matches(names[0], VARIABLES, 1, NEAR_MISS)), None)


def refuse_arguments(script: str, arguments: Sequence[str], reads: Collection[str] = ()) -> str:
    """Return the sentence that refuses command-line arguments and names the variables to set instead.

    `reads` are the variables that the script reads, if known.
    """
    rest, settings, unknown = list(map(masked, arguments)), Settings(), []
    name: str | None
    while rest:
        argument = rest.pop(0)
        word, equals, value = argument.partition("=")
        named = bool(equals) or argument.startswith("-")
        if named and not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        option = _as_name(word.lstrip("-"))
        if named and value == "true" and option in FLAGS:
            name, value = FLAGS[option]
        elif named:
            name = None if option in OTHER_UNITS else variable_meant(word.lstrip("-"))
        else:
            name, word, value = SUFFIXES.get(Path(argument).suffix), "", argument
        if name == "CHECKPOINT_PATH" and name not in reads and "RESUME" in reads:
            name = "RESUME"  # the checkpoint that training.py begins with
        if name == "ENV_FILE" and Path(value).suffix in CONFIG_SUFFIXES:
            unknown += settings.add_file(value)
        elif name:
            settings.add(name, value, word=word)
        else:
            other = OTHER_UNITS.get(option, (_close(option),))[0] if named else None
            unknown.append(f"{argument} (compare {other})" if other else argument)
    use = f"use {settings.text()} python3 {script}" if settings.values else f"python3 {script} --help lists them"
    about = f" (unknown: {' '.join(unknown)})" if unknown else ""
    return f"{script} takes no arguments, settings are environment variables{about}: {use}"


class Settings:
    """Variables to set instead of another program's options."""

    def __init__(self) -> None:
        self.values: dict[str, list[str]] = {}

    def add(self, name: str, value: str, *, word: str = "") -> None:
        """Add an option `word` that means the variable `name`, with its value in our words."""
        if name == "RESUME":
            value = {"true": "auto", "yes": "auto", "1": "auto", "false": "never", "no": "never"}.get(
                value.lower(), value
            )
        elif word.lstrip("-").lower() in ("model_name", "model-name"):  # the name of a folder, or of pretrained weights
            name, value = ("GPT2_MODEL_NAME", value) if "gpt2" in value else (name, f"checkpoints/{value}")
        self.values.setdefault(name, []).append(value)
        if name == "RESUME_STEP":
            self.values.setdefault("RESUME", ["auto"])

    def add_file(self, path: str) -> list[str]:
        """Add the keys of a YAML, TOML or JSON file; return those that name no variable, or the file if it has none."""
        keys, before = config_keys(path), len(self.values)
        known = {key: name for key in keys if (name := variable_meant(key))}
        for key, name in known.items():
            self.add(name, keys[key], word=key)
        return [key for key in keys if key not in known] if len(self.values) > before else [path]

    def text(self) -> str:
        """Return the assignments as a shell takes them."""
        return " ".join(f"{name}={shlex.quote(','.join(values))}" for name, values in self.values.items())


def config_keys(path: str) -> dict[str, str]:
    """Return keys and plain values of the lines of a YAML, TOML or JSON file; nothing if it cannot be read."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            lines = file.read(CONFIG_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    found = (match.groups() for line in lines if len(line) < 1000 and (match := CONFIG_LINE.fullmatch(line)))
    pairs = {key: value.strip("\"' ") for key, value in found}
    return {key: value for key, value in pairs.items() if value and value[0] not in "{[|>&*" and value != "null"}


def not_an_env_file(path: str) -> str | None:
    """Return what to write instead of the YAML, TOML or JSON file at `path`; None if it is neither by its suffix."""
    if Path(path).suffix not in CONFIG_SUFFIXES:
        return None
    settings = Settings()
    unknown = settings.add_file(path)
    lines = " ".join(settings.text().split("\n"))
    keys = f" (no variable: {', '.join(unknown)})" if unknown and settings.values else ""
    remedy = (
        f"write its keys as {lines}, one a line{keys}"
        if settings.values
        else "docs/configuration.md lists the variables"
    )
    return f"{path} is not an env file, which has NAME=value on each line: {remedy}"
