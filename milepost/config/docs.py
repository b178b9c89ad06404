"""The settings as text: --help, an env file, .env.example and docs/configuration.md.

`python3 -m milepost.config` writes the last two anew.
"""

import textwrap
from collections.abc import Iterator

from milepost.config.parse import as_text, expected, quoted, short_text
from milepost.config.resolve import defaults_of
from milepost.config.variables import ROOT, SCOPES, VARIABLES, Config, printable
from models import MODELS


def as_env(config: Config) -> str:
    """The settings as the text of an env file that, given as ENV_FILE, sets them all again."""
    lines = ["# The settings of a run, to be used again: ENV_FILE=path/of/this/file python3 training.py"]
    for name in VARIABLES:
        text = "" if name == "ENV_FILE" else as_text(getattr(config, name.lower()))
        lines.append(f"{name}={quoted(text)}" if text else f"# {name}=")
    return "\n".join(lines) + "\n"


def describe(config: Config) -> list[str]:
    """A few lines on the settings that differ from their defaults, each with its source."""
    values = {name: getattr(config, name.lower()) for name in VARIABLES}
    usual = defaults_of(values)
    changed = [name for name in VARIABLES if values[name] != usual[name]]
    said = [f"{name}={short_text(values[name])} ({config.sources[name]})" for name in changed]
    text = "non-default settings: " + (", ".join(said) or "none")
    return textwrap.wrap(printable(text), 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def default_text(name: str) -> str:
    """The default of a variable in words, for every model where they differ."""
    return _default_by_model(name) or as_text(VARIABLES[name].default)


def _default_by_model(name: str) -> str:
    """Return the default for each model that declares one, and for pretrained weights."""
    rows = [(model, entry.defaults) for model, entry in MODELS.items()]
    rows += [("pretrained", entry.pretrained) for entry in MODELS.values() if entry.pretrained]
    declared = {model: row[name.lower()] for model, row in rows if name.lower() in row}
    return ", ".join(f"{model} {as_text(value) or 'its own'}" for model, value in declared.items())


def _meaning(name: str) -> str:
    return f"{VARIABLES[name].metadata['doc']}. Takes {expected(VARIABLES[name])}."


def _groups() -> Iterator[tuple[str, list[str]]]:
    """The groups of variables in the order of their declaration."""
    for group in dict.fromkeys(each.metadata["group"] for each in VARIABLES.values()):
        yield group, [name for name, each in VARIABLES.items() if each.metadata["group"] == group]


def help_text(script: str) -> str:
    """What --help prints."""
    lines = [f"usage: [NAME=value ...] python3 {script}", "Settings are environment variables, or lines of .env."]
    for group, names in _groups():
        lines += ["", group]
        for name in names:
            lines.append(f"  {name}  (default: {default_text(name) or 'not set'})")
            lines += textwrap.wrap(_meaning(name), 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def env_example() -> str:
    """The text of .env.example: every variable with its default, commented out."""
    lines = [
        "# Copy this file to .env, remove the # before a setting and change it. Made by: python3 -m milepost.config"
    ]
    for group, names in _groups():
        lines += ["", f"# --- {group} ---"]
        for name in names:
            by_model = _default_by_model(name)
            default = f" Default: {by_model}." if by_model else ""
            lines += textwrap.wrap(_meaning(name) + default, 118, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"#{name}={quoted(as_text(VARIABLES[name].default))}")
    return "\n".join(lines) + "\n"


def reference() -> str:
    """The text of docs/configuration.md."""
    lines = [INTRODUCTION]
    for group, names in _groups():
        lines += [f"## {group}", "", "| Variable | Default | Takes | On going on | Meaning |", "| --- " * 5 + "|"]
        for name in names:
            rules = VARIABLES[name].metadata
            cells = [f"`{name}`", default_text(name) or "not set", expected(VARIABLES[name])]
            lines.append("| " + " | ".join([*cells, SCOPES[rules["scope"]], rules["doc"]]) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


INTRODUCTION = """# Configuration

Every setting is an environment variable, or a line of the file `.env` in the repository. Scripts take no argument but
`--help`. This page is written by `python3 -m milepost.config`; `.env.example` holds the same list to start from.

- The process environment comes first, then `.env`, then the default. `ENV_FILE=other.env` reads that file instead, and
  `PYTHON_DOTENV_DISABLED=1` none. The first lines of a run say where each setting that is not a default came from.
- An empty value counts as unset. Switches take true, false, 1, 0, yes, no, on and off. Whole numbers may be written
  `5_000` or `1e4`. In an env file, `${NAME}` stands for another variable.
- Paths that are given are relative to the current folder, defaults to the repository.
- All mistakes are reported together, and the exit code is 2. In the env file every unknown name is one. In the process
  environment only a name of 8 letters or more with an underscore is, if it nearly is a variable here (difflib's ratio
  is at least 0.9), such as `CHECKPOINT_INTERVALS`.
- "On going on" says what `RESUME` and `MODE=resume` do with a setting. "must match": `RESUME=auto` takes only a
  checkpoint that shares it. "saved": taken from the checkpoint when not given. "saved, else a fork": so too, and a new
  value starts a child run, as it changes the trained weights. "as given": never taken from a checkpoint.
- The variables of others keep their meaning, and may stand in the env file too: `CUDA_VISIBLE_DEVICES`,
  `OMP_NUM_THREADS`, `HF_HOME`, `HF_HUB_OFFLINE`, `TIKTOKEN_CACHE_DIR`, `NO_COLOR`, `TQDM_DISABLE` and such.
  `DEBUG=1` shows the traceback of an error.
"""


def write_files() -> None:
    """Writes the two generated files anew."""
    for name, text in ((".env.example", env_example()), ("docs/configuration.md", reference())):
        (ROOT / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {name}")
