"""The settings as text: --help, an env file, .env.example and docs/configuration.md.

`python3 -m milepost.config` writes the last two.
"""

import re
import shutil
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from milepost.config.effects import conditions
from milepost.config.parse import as_text, expected, quoted, short_text
from milepost.config.resolve import default_beside, public
from milepost.config.variables import SCOPES, SECRET_FORMS, VARIABLES, Config
from milepost.places import ROOT
from milepost.screen import harmless
from models import MODELS


def as_env(config: Config, resolved: Mapping[str, Any]) -> str:
    """Return the settings, with the values that a run `resolved`, as an env file.

    Used as ENV_FILE, it sets them all again, but for the secret parts of an address, and for secrets.
    """
    lines = ["# The settings of a run. To use them again: ENV_FILE=path/of/this/file python3 training.py"]
    for name in VARIABLES:
        left_out = name == "ENV_FILE" or VARIABLES[name].metadata["form"] in SECRET_FORMS
        text = "" if left_out else as_text(resolved.get(name, public(config, name)))
        lines.append(f"{name}={quoted(text)}" if text else f"# {name}=")
    return "\n".join(lines) + "\n"


def describe(config: Config) -> list[str]:
    """Return lines on the settings that differ from their defaults, each with its source."""
    changed = [name for name in VARIABLES if getattr(config, name.lower()) != default_beside(config, name)]
    shown = [f"{name}={short_text(public(config, name))} ({config.sources[name]})" for name in changed]
    text = "non-default settings: " + (", ".join(shown) or "none")
    return textwrap.wrap(
        harmless(text, one_line=True),
        columns(118),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def columns(most: int) -> int:
    """Return the width of the terminal, at least 50 and at most `most`, which is also the width without a terminal."""
    return max(50, min(most, shutil.get_terminal_size((most, 24)).columns))


def _default_text(name: str) -> str:
    """Return the default of a variable as text, for each model where they differ."""
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
    """Yield each group and its variables, in the order of declaration."""
    for group in dict.fromkeys(each.metadata["group"] for each in VARIABLES.values()):
        yield group, [name for name, each in VARIABLES.items() if each.metadata["group"] == group]


def declared(reads: Sequence[str]) -> dict[str, list[str]]:
    """Return the variables of a script's READS by heading: the names before its first group are its common settings.

    A group stands for its variables but for those that READS names itself, and ENV_FILE, which every script reads. Raises KeyError
    for a name that is neither a variable nor a group.
    """
    groups, words = dict(_groups()), [entry.partition(" if ")[0] for entry in reads]
    heading = "Settings" if set(words) <= VARIABLES.keys() else "Common settings"
    headings: dict[str, list[str]] = {heading: []}
    for word in words:
        if word in VARIABLES:
            headings.setdefault(heading, []).append(word)
        else:
            headings[word] = [name for name in groups[word] if name not in (*words, "ENV_FILE")]
            heading = "Other settings"
    return headings


def help_text(
    script: str, doc: str, reads: Sequence[str], *, only: Collection[str] = (), rows: int | None = None
) -> str:
    """Return the text of --help: usage, the first paragraph of the script's docstring, and the variables that it reads.

    On a screen of so many `rows`, a longer text has the common settings in short, and how to see the others. `only` names
    variables and groups to describe instead.
    """
    width = columns(100)
    summary = textwrap.wrap(doc.strip().partition("\n\n")[0], width)
    about = ("Settings are environment variables, or lines of .env or of the file that ENV_FILE names. "
             "docs/configuration.md describes the variables of all scripts.")  # fmt: skip
    usage = [f"usage: [NAME=value ...] python3 {script}", "", *summary, ""]
    headings = declared(reads)
    full = [*usage, *textwrap.wrap(about, width), *_in_full(headings, reads, width=width, only=only)]
    if only or rows is None or len(full) < rows:
        return "\n".join(full)
    texts = ([*usage, *_in_short(headings, count, width=width)] for count in range(len(full), 0, -1))
    return "\n".join(next((text for text in texts if len(text) < rows), full))


def _in_full(
    headings: Mapping[str, Sequence[str]], reads: Sequence[str], *, width: int, only: Collection[str]
) -> Iterator[str]:
    """Yield the lines on all variables, or on those that `only` names, with defaults, conditions and values."""
    needed = conditions(reads)
    for heading, names in headings.items():
        shown = [
            name for name in names if not only or {name, heading, VARIABLES[name].metadata["group"]}.intersection(only)
        ]
        yield from ["", heading] if shown else []
        for name in shown:
            needs = " and ".join(filter(None, (needed[name], VARIABLES[name].metadata["needs"])))
            heading = f"{name}  (default: {_default_text(name) or 'not set'}{'; only if ' * bool(needs)}{needs})"
            yield from textwrap.wrap(heading, width, initial_indent="  ", subsequent_indent=" " * 6)
            yield from textwrap.wrap(_meaning(name), width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _in_short(headings: Mapping[str, Sequence[str]], count: int, *, width: int) -> Iterator[str]:
    """Yield the lines on the first `count` common settings, then the names of the groups, and how to see more."""
    (_, common), *others = headings.items()
    common, further = common[:count], common[count:]
    indent = max(map(len, common)) + 4
    for name in common:
        first, *more = textwrap.wrap(_clause(name), width - indent)
        yield from [f"  {name:{indent - 2}}{first}", *(" " * indent + line for line in more)]
    yield ""
    groups = [f"{group} ({len(names)})" for group, names in others]
    for label, words in (("Also", further), ("More, by subject", groups)):
        yield from textwrap.wrap(f"{label}: {', '.join(words)}", width, subsequent_indent="  ") if words else []
    yield "--help all: every setting in full. --help NAME: one setting or subject."


def _clause(name: str) -> str:
    """Return the first clause on a variable, with its default and its other choices."""
    rules = VARIABLES[name].metadata
    clause = re.sub(r" \([^)]*\)", "", rules["doc"].partition("; ")[0])
    clause = clause if len(clause) <= 90 else clause.partition(": ")[0]
    default = _default_text(name)
    others = [word for word in (*rules["words"], *rules["choices"]) if word != default]
    others = [] if set(others).intersection(re.findall(r"\w+", clause)) else others  # the clause explains them
    said = ", or ".join(filter(None, [f"default: {default}" if default else "", " ".join(others)]))
    return f"{clause} ({said})" if said else clause


def described(words: Sequence[str], reads: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the variables and groups that words after --help name, in whatever case, and the words that name none."""
    headings = declared(reads)
    groups = {VARIABLES[name].metadata["group"] for names in headings.values() for name in names}
    known = {name.upper(): name for name in (*headings, *groups, *(n for names in headings.values() for n in names))}
    return [known[word.upper()] for word in words if word.upper() in known], [
        w for w in words if w.upper() not in known
    ]


def env_example() -> str:
    """Return the text of .env.example: every variable with its default, commented out."""
    lines = [
        "# Copy this file to .env, remove the # before a setting and change it. Written by: python3 -m milepost.config"
    ]
    for group, names in _groups():
        lines += ["", f"# --- {group} ---"]
        for name in (name for name in names if name != "ENV_FILE"):  # which no env file may set
            by_model = _default_by_model(name)
            default = f" Default: {by_model}." if by_model else ""
            lines += textwrap.wrap(_meaning(name) + default, 118, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"#{name}={quoted(as_text(VARIABLES[name].default))}")
    return "\n".join(lines) + "\n"


def reference() -> str:
    """Return the text of docs/configuration.md."""
    lines = [INTRODUCTION]
    for group, names in _groups():
        lines += [f"## {group}", "", "| Variable | Default | Takes | On resume | Meaning |", "| --- " * 5 + "|"]
        for name in names:
            rules = VARIABLES[name].metadata
            cells = [f"`{name}`", _default_text(name) or "not set", expected(VARIABLES[name])]
            lines.append("| " + " | ".join([*cells, SCOPES[rules["scope"]], rules["doc"]]) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


INTRODUCTION = """# Configuration

Every setting is an environment variable, or a line of the file `.env` in the repository. Scripts take no argument but
`--help`, which lists the variables that the script reads: on a terminal the common ones first, `--help all` every one in
full, `--help LORA_RANK` one, `--help checkpoints` a subject of this page. `python3 -m milepost.config` writes this page and
`.env.example`, which holds the same list to start from.

- The process environment comes first, then `.env`, then the default. `ENV_FILE=other.env` reads that file instead, and
  `PYTHON_DOTENV_DISABLED=1` reads no file. A run starts by logging every setting that is not a default, and its source.
- An empty value counts as unset. Booleans take true, false, 1, 0, yes, no, on and off. Whole numbers may be written
  `5_000` or `1e4`. In an env file, `${NAME}` expands to another variable, which must have a value (`${NAME:-default}` need
  not), text after ` #` is a comment unless the value is in quotes, and a name has only one value.
- Paths that are set are relative to the current folder, default paths to the repository. Where `pip install .` has installed
  the package, there is no repository: default paths and `.env` are those of the current folder.
- All mistakes are reported together, and the exit code is 2. In the env file every unknown name is a mistake. In the
  process environment, which other programs share, a name is a mistake if it can hardly be meant for anything else, such
  as `CHECKPOINT_INTERVALS` or `LORA_R`; a name that is near, or another project's word, such as `LR` or `EPOCHS`, is
  ignored with a warning that names the variable.
- A setting that has no effect is named when a script starts: one that the script does not read (`PROMPT` with
  `training.py`), or one that needs another (`N_LAYER` without `MODEL_TYPE=gpt2`, `CHECKPOINT_INTERVAL` without
  `ENABLE_CHECKPOINTS=true`). Places that are set for all scripts (`DEVICE`, `CHECKPOINT_DIR`, `RUNS_DIR`) are not.
- "On resume" tells what `RESUME` and `MODE=resume` do with a setting. "must match": `RESUME=auto` takes only a
  checkpoint with the same value. "saved": taken from the checkpoint unless set. "saved, else a child run": likewise, and a
  new value starts a child run, because it changes the trained weights. "as set": never taken from a checkpoint.
- Other programs' variables keep their meaning and may stand in the env file: `CUDA_VISIBLE_DEVICES`,
  `OMP_NUM_THREADS`, `HF_HOME`, `HF_HUB_OFFLINE`, `TIKTOKEN_CACHE_DIR`, `NO_COLOR`, `TQDM_DISABLE` and so on.
  `DEBUG=1` shows the traceback of an error.
"""


def write_files() -> None:
    """Write .env.example and docs/configuration.md."""
    for name, text in ((".env.example", env_example()), ("docs/configuration.md", reference())):
        (ROOT / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {name}")
