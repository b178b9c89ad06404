"""Settings without effect, by one rule from the declarations: those that a script does not read, and those that others switch off.

A condition is `NAME` (not its default), `NAME=a|b`, `NAME!=a` or `not NAME`, or several of these joined by ` or `. A script's READS
has them behind ` if `, a variable that needs another in every script has one in `needs`.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from milepost.config.parse import as_text, short_text
from milepost.config.resolve import default_beside, public, settled
from milepost.config.variables import DIRECT_SOURCES, VARIABLES, Config
from models import MODELS, fields_of

# Of a machine or an account: one exports them for all scripts, whatever each of these reads.
EVERYWHERE = (
    "ENV_FILE", "DEVICE", "CHECKPOINT_DIR", "CHECKPOINT_FALLBACK_DIR", "CHECKPOINT_MIRROR", "RUNS_DIR", "PORT", "SERVE_HOST", "API_KEY",
)  # fmt: skip
# What a script's requests or commands may set otherwise while it runs.
CHANGES_LATER = {"chat.py": ("TEMPERATURE",), "serve_checkpoint.py": ("TEMPERATURE",)}
NOT_SIZES = ("MODEL_TYPE", "GPT2_MODEL_NAME", "PRETRAINED")  # of the group Model; the others are of a model's class

# (a variable of another script, a variable that this script reads) -> what to set here.
INSTEAD = {
    ("CHECKPOINT_PATH", "RESUME"): "RESUME=path resumes a checkpoint, INIT_FROM=path starts from its weights",
    ("MODE", "RESUME"): "RESUME=auto resumes",
    ("RESUME_TRAINING_STEPS", "RESUME"): "TRAINING_STEPS is the total, with those of an earlier part",
    ("RESUME_LEARNING_RATE", "RESUME"): "LEARNING_RATE is the peak of the whole run",
    ("OUTPUT", "RUNS_DIR"): "files go to CHECKPOINT_DIR and RUNS_DIR",
    ("RESUME", "CHECKPOINT_PATH"): "CHECKPOINT_PATH names the checkpoint",
    ("TRAINING_STEPS", "RESUME_TRAINING_STEPS"): "MODE=resume adds RESUME_TRAINING_STEPS",
    ("LEARNING_RATE", "RESUME_LEARNING_RATE"): "MODE=resume follows RESUME_LEARNING_RATE",
}  # fmt: skip


def conditions(reads: Sequence[str]) -> dict[str, str]:
    """Return the variables of a script's READS, each with its condition or "". A name goes before the group that holds it."""
    pairs = [entry.partition(" if ")[::2] for entry in reads]
    groups = {word: condition for word, condition in pairs if word not in VARIABLES}
    of_groups = {n: groups[each.metadata["group"]] for n, each in VARIABLES.items() if each.metadata["group"] in groups}
    return of_groups | {word: condition for word, condition in pairs if word in VARIABLES}


def no_effect(config: Config, script: str) -> list[str]:
    """Return a sentence for each kind of setting that is set and has no effect in the script, whose READS `config` holds."""
    if not config.reads:
        return []
    reads, names = conditions(config.reads), [name for name in VARIABLES if _counts(config, name)]
    unread = [name for name in names if name not in reads and name not in EVERYWHERE]
    switched_off: dict[str, list[str]] = {}
    mode, resume = (getattr(config if n in reads else Config(), n.lower()) for n in ("MODE", "RESUME"))
    asked, config = config, dataclasses.replace(config, mode=mode, resume=resume)
    for name in (name for name in names if name in reads):
        of_models = _of_other_models(config, name) if "MODEL_TYPE" in reads else ()
        for condition in (reads[name], VARIABLES[name].metadata["needs"], *of_models):
            if condition and not _holds(config, condition, later=CHANGES_LATER.get(script, ())):
                switched_off.setdefault(condition, []).append(name)
                break
    return [*_unread(asked, unread, reads, script), *(_needs(config, *each) for each in switched_off.items())]


def no_effect_beside(config: Config) -> list[str]:
    """Return a sentence for each kind of setting that is set and has no effect with what the first weights have brought: their
    model and tokenizer were not known when the script started.
    """
    found: dict[str, list[str]] = {}
    for name in (name for name in VARIABLES if _counts(config, name)):
        for condition in (VARIABLES[name].metadata["needs"], *_of_other_models(config, name)):
            terms = _terms(condition) if condition else ()
            brought = any(config.sources[each] == "checkpoint" for each, _, _ in terms)
            if brought and not _holds(config, condition):
                found.setdefault(condition, []).append(name)
                break
    return [_needs(config, *each) for each in found.items()]


def _counts(config: Config, name: str) -> bool:
    """Return whether the variable was set for this run: an env file may list all of them with their defaults."""
    if not config.is_set(name):
        return False
    return config.sources[name] in DIRECT_SOURCES or getattr(config, name.lower()) != default_beside(config, name)


def _of_other_models(config: Config, name: str) -> Iterator[str]:
    """Yield the condition of a setting that only other models have."""
    of_class = VARIABLES[name].metadata["group"] == "Model" and name not in NOT_SIZES
    if of_class and name.lower() not in fields_of(config.model_type):
        yield "MODEL_TYPE=" + "|".join(model for model in MODELS if name.lower() in fields_of(model))


def _terms(condition: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield name, operator and values of each term."""
    for term in condition.split(" or "):
        name, sign, values = re.fullmatch(r"(?:not )?(\w+)(!?=|)(.*)", term).groups()  # type: ignore[union-attr]
        yield name, "not" if term.startswith("not ") else sign, tuple(values.split("|"))


def _holds(config: Config, condition: str, *, later: Sequence[str] = ()) -> bool:
    """Return whether the condition holds, or may hold once a checkpoint has brought its settings, or variables of `later` change."""
    for name, sign, values in _terms(condition):
        value = getattr(config, name.lower())
        if sign in ("", "not"):
            true = (value != VARIABLES[name].default) == (sign == "")
        else:
            true = (as_text(value) in values) == (sign == "=")
        known = settled(config, name) or config.sources[name] == "checkpoint"
        if true or name in later or not known:
            return True
    return False


def _shown(config: Config, names: Sequence[str]) -> str:
    return ", ".join(f"{name}={short_text(public(config, name))} ({config.sources[name]})" for name in names)


def _needs(config: Config, condition: str, names: Sequence[str]) -> str:
    """Return the sentence on settings whose condition does not hold."""
    others = list(dict.fromkeys(name for name, _, _ in _terms(condition)))
    now = f"{others[0]}={as_text(getattr(config, others[0].lower())) or '(not set)'}"
    bare = r"\b(ENABLE_\w+|REPLAY)\b(?!=)"  # booleans
    needed = (
        re.sub(bare, r"\1=true", condition).replace("|", " or ").replace("!=", " other than ").replace("not ", "no ")
    )
    return f"{_shown(config, names)}: no effect with {now} ({config.sources[others[0]]}); needs {needed}"


def _unread(config: Config, names: Sequence[str], reads: dict[str, str], script: str) -> Iterator[str]:
    """Yield a sentence on the settings that the script does not read, or nothing."""
    if not names:
        return
    hints = [hint for (name, here), hint in INSTEAD.items() if name in names and here in reads]
    yield f"not used by {script}: {_shown(config, names)}; {'; '.join([*hints, f'{script} --help lists what is'])}"
