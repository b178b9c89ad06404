"""Read the settings from the environment, the env file and the defaults, and merge them with those of a checkpoint.

All mistakes are reported together, before torch is imported.
"""

import dataclasses
import functools
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dotenv import dotenv_values

from milepost.config.env_lines import readable_lines, unread_file
from milepost.config.names import is_foreign, not_an_env_file, unknown_in_environment, unknown_in_file
from milepost.config.parse import absolute_path, parse_saved, parse_value, refusal, short_text
from milepost.config.variables import (
    ADAMW_N_EMBD,
    ADDRESS_FORMS,
    ALLOW_BLANK,
    DATA_VARIABLES,
    DEFAULT_MODEL,
    DERIVED_SOURCES,
    DIRECT_SOURCES,
    LORA_DEFAULTS,
    LORA_OPTIONS,
    MUON_MIN_TOKENS,
    PER_MACHINE,
    SECRET_FORMS,
    TTT_OPTIONS,
    VARIABLES,
    Config,
    ConfigError,
    Json,
)
from milepost.places import SHIPPED, base_folder
from milepost.runtime.optimizers import OPTIMIZERS
from milepost.text.addresses import HIDDEN, masked
from milepost.text.sources import with_places
from models import FINE_TUNING, MODELS, with_trait

# What the shell of Windows shows before a command: $P is the folder, $G is >, and conda puts its environment before them.
PROMPT_OF_CMD = re.compile(r"(?:[(\[][^()\[\]]*[)\]] *)*(?:\$[A-Za-z_$+])*\$[Pp](?:\$[A-Za-z_$+])*")


def read(
    environ: Mapping[str, str] | None = None,
    *,
    cwd: str | os.PathLike[str] | None = None,
    reads: Iterable[str] = (),
    source: str = "environment",
) -> Config:
    """Return the settings: those of `environ` (default: the process environment), then of the env file, then the defaults.

    Paths that are set are relative to `cwd` (default: the current folder), default paths to the checkout. Other programs'
    variables in the env file enter the process environment, unless `environ` is passed. `reads` are a script's READS;
    `source` is what messages call `environ`, one of DIRECT_SOURCES.
    Raises ConfigError with every problem.
    """
    variables = os.environ if environ is None else environ
    folder = _current_folder() if cwd is None else os.path.abspath(cwd)
    problems: list[str] = []
    label, in_file = _read_env_file(variables, folder, problems)
    if environ is None:
        for name in filter(is_foreign, in_file):
            os.environ.setdefault(name, in_file[name])
    # cuBLAS reads this when it starts. Without it, its workspaces may change the order of sums, and torch refuses products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    mistakes, notes = unknown_in_environment(variables)
    if not variables.get("ENV_FILE", "").strip() and "PYTHON_DOTENV_DISABLED" not in variables:
        notes += unread_file(Path(folder, ".env"), read=base_folder() / ".env")
    problems += [*mistakes, *unknown_in_file(in_file, label)]
    texts = {name: (in_file[name], label) for name in VARIABLES if _is_set(name, in_file.get(name, ""))}
    for name in VARIABLES:
        text = variables.get(name, "")
        if _is_set(name, text) and not (name == "PROMPT" and PROMPT_OF_CMD.fullmatch(text)):
            texts[name] = text, source
    overridden = frozenset(
        name for name, (text, _) in texts.items() if _is_set(name, in_file.get(name, "")) and text != in_file[name]
    )
    values: dict[str, Any] = {}
    for name, (text, origin) in texts.items():
        try:
            values[name] = parse_value(VARIABLES[name], text, folder)
        except ValueError:
            problems.append(refusal(VARIABLES[name], text, origin))
    try:
        config = _finish(values, {name: origin for name, (_, origin) in texts.items()}, problems, reads=reads)
    except ConfigError as error:
        raise ConfigError([*error.problems, *notes]) from None
    return dataclasses.replace(config, notes=tuple(notes), overridden=overridden)


def _current_folder() -> str:
    """Return the current folder, from which paths start. Raise ConfigError if it is gone, or if files that name it could
    not be read again.
    """
    try:
        folder = os.getcwd()
        for place in (folder, str(base_folder())):
            place.encode()  # bytes that are not UTF-8 arrive as lone surrogates
    except OSError as error:
        problem = f"the current folder cannot be used ({error.strerror}); was it deleted?"
        raise ConfigError([f"{problem} Change to a folder that exists, with cd"]) from None
    except UnicodeEncodeError:
        raise ConfigError([f"{place}: this folder's name is not valid UTF-8: rename it, or use another"]) from None
    return folder


def _is_set(name: str, text: str) -> bool:
    """Return whether a value counts as set. Empty text does not, and blank text only where ALLOW_BLANK says so.

    RESUME_STEP=-1, other programs' word for the latest, does not either.
    """
    if (name, text.strip()) == ("RESUME_STEP", "-1"):
        return False
    return bool(text if name in ALLOW_BLANK else text.strip())


def from_saved(current: Config, saved: Mapping[str, Any]) -> Config:
    """Return `current` with the unset settings of training taken from `saved`, which `to_dict` wrote.

    Unknown names and names of scope "session" in `saved` are ignored: another version may have written them. Raises
    ConfigError if a saved value is invalid or contradicts one that is set.
    """
    values, sources = _set_values(current)
    problems: list[str] = []
    for name, each in VARIABLES.items():
        if each.metadata["scope"] != "session" and name in saved and not current.is_set(name):
            sources[name] = "checkpoint"
            try:
                values[name] = parse_saved(each, saved[name], str(SHIPPED))
            except ValueError:
                problems.append(refusal(each, saved[name], "checkpoint"))
    merged = _finish(values, sources, problems, merged=True)
    return dataclasses.replace(merged, overridden=current.overridden)


def frozen_base(config: Config) -> bool:
    """Return whether the base is frozen and only adapters train."""
    return config.lora_rank > 0 or config.checkpoint_adapters_only


def contradictions(current: Config, saved: Mapping[str, Any]) -> list[tuple[str, Json, Json]]:
    """Return (name, set value, saved value) of each model or tokenizer setting that is set and differs from `saved`.

    TOKENIZER=auto contradicts nothing. The data source is left out: a text is known by its hash, not by its name.
    """
    compared = [n for n, each in VARIABLES.items() if each.metadata["scope"] == "identity" and n not in DATA_VARIABLES]
    return [(name, now, before) for name, (before, now) in _differences(current, saved, compared).items()]


def changes(current: Config, saved: Mapping[str, Any]) -> dict[str, list[Json]]:
    """Return {name: [saved value, set value]} of each setting that is set, changes the trained weights and differs from `saved`."""
    return _differences(current, saved, [name for name, each in VARIABLES.items() if each.metadata["scope"] == "math"])


def with_values(current: Config, values: Mapping[str, Any], *, source: str) -> Config:
    """Return `current` with `values` by variable, as if the user had set them in `source`."""
    named = {name.lower(): value for name, value in values.items()}
    return dataclasses.replace(current, **named, sources={**current.sources, **dict.fromkeys(values, source)})


def with_text(current: Config, name: str, text: str, *, source: str) -> Config:
    """Return `current` with the variable set to the value that `text` is. Raise ConfigError if it is not valid."""
    try:
        value = parse_value(VARIABLES[name], text, _current_folder())
    except (ValueError, OverflowError) as error:
        raise ConfigError([refusal(VARIABLES[name], text, source)]) from error
    return with_values(current, {name: value}, source=source)


def without(current: Config, names: Iterable[str]) -> Config:
    """Return `current` as if `names` were not set."""
    values, sources = _set_values(current)
    left = {name: value for name, value in values.items() if name not in set(names)}
    return _build(left, {name: sources[name] for name in left})


def _differences(current: Config, saved: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[Json]]:
    values, _ = _set_values(current)
    shared = [name for name in names if name in values and name in saved and values[name] != "auto"]
    return {name: [saved[name], values[name]] for name in shared if saved[name] != values[name]}


def _set_values(config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values that the user set, and their sources."""
    values = {name: getattr(config, name.lower()) for name in VARIABLES if config.is_set(name)}
    return values, {name: config.sources[name] for name in values}


def to_dict(config: Config) -> dict[str, Json]:
    """Return the settings that a checkpoint stores: every variable but those of a session, and DEVICE for information.

    A data source inside the repository is stored relative to it, so that the repository can move; an address without the parts
    of it that may be secret.
    """
    stored = [name for name, each in VARIABLES.items() if each.metadata["scope"] != "session" or name == "DEVICE"]
    values = {name: getattr(config, name.lower()) for name in stored}
    for name in stored:
        if VARIABLES[name].metadata["form"] == "source" and values[name]:
            values[name] = with_places(public(config, name), _portable)
    return values


def public(config: Config, name: str) -> Any:
    """Return the value of a variable as it may be stored and shown: addresses without passwords and queries, of a secret
    only that it is set.
    """
    value, form = getattr(config, name.lower()), VARIABLES[name].metadata["form"]
    if value and form in SECRET_FORMS:
        return HIDDEN
    return masked(value) if value and form in ADDRESS_FORMS else value


def _portable(path: str) -> str:
    return Path(path).relative_to(SHIPPED).as_posix() if Path(path).is_relative_to(SHIPPED) else path


def _finish(
    values: dict[str, Any],
    sources: dict[str, str],
    problems: list[str],
    *,
    merged: bool = False,
    reads: Iterable[str] = (),
) -> Config:
    """Return the Config of `values` and the defaults. Raise ConfigError if there are problems or contradictions."""
    bad = sources.keys() - values.keys()
    config = dataclasses.replace(_build(values, sources), reads=tuple(reads))
    for names, sentence in _clashes(config):
        known = merged or all(settled(config, name) for name in names)
        concerns = any(config.is_set(name) and not _is_compared(config, name) for name in names)
        if known and concerns and not bad.intersection(names):
            problems.append(sentence)
    if problems:
        raise ConfigError(problems)
    return config


def settled(config: Config, name: str) -> bool:
    """Return whether no checkpoint can change the variable: a resumed run, and a script that opens a checkpoint, take unset
    values from it, so their defaults contradict nothing before that.
    """
    scope, resumes = VARIABLES[name].metadata["scope"], config.resume != "never" or config.mode == "resume"
    weights = config.init_from or config.pretrained
    brought = resumes or (weights is not None and scope == "identity") or _is_compared(config, name)
    return not brought or config.is_set(name) or scope == "session"


def _is_compared(config: Config, name: str) -> bool:
    """Return whether the script does not read the variable, because its checkpoint brings it: there it is compared if it is set."""
    words = {entry.partition(" if ")[0] for entry in config.reads}
    is_read = not words or not words.isdisjoint((name, VARIABLES[name].metadata["group"]))
    return not is_read and VARIABLES[name].metadata["scope"] == "identity"


def default_beside(config: Config, name: str) -> object:
    """Return the value that the variable would have if only it were not set: defaults depend on other variables."""
    return defaults_of({each: getattr(config, each.lower()) for each in VARIABLES if each != name})[name]


def _build(values: dict[str, Any], sources: Mapping[str, str]) -> Config:
    resolved = {name.lower(): value for name, value in (defaults_of(values) | values).items()}
    return Config(**resolved, sources={name: sources.get(name, "default") for name in VARIABLES})


def _pair(config: Config, first: str, second: str, text: str) -> tuple[tuple[str, ...], str]:
    """Return both variables, and `text` with their settings in the place of its braces."""
    settings = [f"{n}={short_text(public(config, n))} ({config.sources[n]})" for n in (first, second)]
    return (first, second), text.format(*settings)


def _clashes(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield settings that are valid but contradict each other: the variables concerned and the sentence."""
    pair = functools.partial(_pair, config)
    yield from _adapter_clashes(config)
    heads, width, model = config.n_head, config.n_embd, MODELS[config.model_type]
    if config.gpt2_model_name and not model.pretrained:
        yield pair("GPT2_MODEL_NAME", "MODEL_TYPE", _needs_model("pretrained"))
    named = [n for n in ("PRETRAINED", "GPT2_MODEL_NAME", "INIT_FROM") if getattr(config, n.lower())]
    for first, second in itertools.pairwise(named):
        yield pair(first, second, "{} and {} both name the first weights: unset one")
    if "n_head" in model.defaults and not config.gpt2_model_name and heads and width and width % heads:
        wider = max(1, round(width / heads / 16)) * 16 * heads
        near = (n for away in range(16) for n in (heads + away, heads - away) if n > 0 and width % n == 0)
        options = [*(f"N_HEAD={n}" for n in itertools.islice(near, 1)), f"N_EMBD={wider}"]
        yield pair("N_EMBD", "N_HEAD", f"{{}} must be a multiple of {{}}: set {' or '.join(options)}")
    groups = config.n_kv_head if "n_kv_head" in model.defaults else None
    if groups and heads and heads % groups:
        fitting = max(n for n in range(1, min(groups, heads) + 1) if heads % n == 0)
        yield pair("N_KV_HEAD", "N_HEAD", f"{{}} must divide {{}}: set N_KV_HEAD={fitting}, or none")
    if OPTIMIZERS[config.optimizer].hidden_matrices and not model.hidden_matrices:
        yield pair("OPTIMIZER", "MODEL_TYPE", _needs_model("hidden_matrices") + ", which has no hidden matrices")
    # MODE=resume plans a schedule of its own, from RESUME_TRAINING_STEPS and RESUME_LEARNING_RATE.
    if config.mode != "resume" and config.warmup_steps > config.training_steps:
        yield pair("WARMUP_STEPS", "TRAINING_STEPS", "{} is more than {}: set fewer WARMUP_STEPS")
    if config.mode != "resume" and (config.min_learning_rate or 0) > config.learning_rate:
        yield pair("MIN_LEARNING_RATE", "LEARNING_RATE", "{} is above {}: set a lower MIN_LEARNING_RATE")
    if (config.run_name or "").lower() == "latest":
        yield pair("RUN_NAME", "RUN", "{}: RUN=latest is the newest run: take another name")
    if config.prompt is not None and config.prompt_file is not None:
        yield pair("PROMPT", "PROMPT_FILE", "{} and {} are both set: unset one")
    fraction = VARIABLES["VALIDATION_FRACTION"].default
    if config.validation_data and config.is_set("VALIDATION_FRACTION") and config.validation_fraction != fraction:
        yield pair(
            "VALIDATION_DATA",
            "VALIDATION_FRACTION",
            "{} and {} both name the validation text: unset one",
        )
    if config.checkpoint_keep_every and not config.checkpoint_keep_last:
        yield pair(
            "CHECKPOINT_KEEP_EVERY",
            "CHECKPOINT_KEEP_LAST",
            "{} thins what {} would delete, and that keeps everything: set CHECKPOINT_KEEP_LAST",
        )
    if config.resume_step is not None and config.mode == "resume":
        yield pair(
            "RESUME_STEP",
            "MODE",
            "{} is for RESUME in training.py; with {} name the step in CHECKPOINT_PATH: checkpoints/*_step2000_*.pt",
        )
    elif config.resume_step is not None and config.resume == "never":
        yield pair("RESUME_STEP", "RESUME", "{} needs RESUME=auto or RESUME=a path, not {}")


def _needs_model(trait: str, value: str | None = None) -> str:
    """Return the sentence, for `_pair`, that a setting needs a model with the trait of its registry entry."""
    return f"{{}} needs MODEL_TYPE={' or '.join(with_trait(trait, value))}, not {{}}"


def _adapter_clashes(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the contradictions among the settings of adapters."""
    pair = functools.partial(_pair, config)
    taken, layers = MODELS[config.model_type].adapters, MODELS[config.model_type].lora_layers
    if config.lora_rank and "lora" not in taken:
        yield pair("LORA_RANK", "MODEL_TYPE", _needs_model("adapters", "lora"))
    elif config.lora_rank and (others := set(config.lora_targets.split(",")) - set(layers)):
        yield pair("LORA_TARGETS", "MODEL_TYPE", f"{{}} names {min(others)}, but {{}} has {', '.join(layers)}")
    if config.ttt_layers and "ttt" not in taken:
        yield pair("TTT_LAYERS", "MODEL_TYPE", _needs_model("adapters", "ttt"))
    elif config.ttt_layers and config.n_layer and int(config.ttt_layers.split(",")[-1]) >= config.n_layer:
        blocks = f"0 to {config.n_layer - 1}"
        yield pair("TTT_LAYERS", "N_LAYER", f"{{}} names a missing block: {{}} has blocks {blocks}")
    for switch, options in (("LORA_RANK", LORA_OPTIONS), ("TTT_LAYERS", TTT_OPTIONS)):
        for name in options:
            default = MODELS[config.model_type].defaults.get(name.lower(), VARIABLES[name].default)
            if not getattr(config, switch.lower()) and getattr(config, name.lower()) != default:
                yield pair(name, switch, f"{{}} has no effect without {switch}: set that, or unset {name}")
    freezes = "LORA_RANK" if config.lora_rank else "CHECKPOINT_ADAPTERS_ONLY"
    if (
        frozen_base(config)
        and config.resume == "never"
        and config.mode != "resume"
        and not (config.pretrained or config.gpt2_model_name or config.init_from)
    ):
        yield pair(
            freezes,
            "GPT2_MODEL_NAME",
            "{} freezes the base: name it with PRETRAINED, GPT2_MODEL_NAME or INIT_FROM",
        )
    if config.checkpoint_adapters_only and not config.lora_rank and not config.ttt_layers:
        yield pair(
            "CHECKPOINT_ADAPTERS_ONLY", "LORA_RANK", "{} saves adapters, but {} adds none: set LORA_RANK or TTT_LAYERS"
        )
    if config.lora_rank and config.checkpoint_layout == "huggingface":
        yield pair(
            "LORA_RANK",
            "CHECKPOINT_LAYOUT",
            "{} and {}: transformers cannot hold adapters; train in another layout, then convert with "
            "CONVERT_TO=peft or merge them (scripts/merge_adapters.py)",
        )
    if config.ttt_layers and config.checkpoint_layout == "huggingface":
        yield pair(
            "TTT_LAYERS", "CHECKPOINT_LAYOUT", "{} and {}: transformers has no TTT layers; train in another layout"
        )


def defaults_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default of every variable, which may depend on `values`. Paths are absolute, as milepost.places says."""
    model = MODELS[values.get("MODEL_TYPE", DEFAULT_MODEL)]
    row: dict[str, Any] = dict(model.defaults)
    if values.get("GPT2_MODEL_NAME"):
        row = dict(next(entry.pretrained for entry in MODELS.values() if entry.pretrained))
    elif values.get("PRETRAINED"):
        row |= FINE_TUNING
    elif model.adamw_learning_rate and values.get("OPTIMIZER", _default_optimizer(values, row)) == "adamw":
        n_embd = max(ADAMW_N_EMBD, values.get("N_EMBD") or ADAMW_N_EMBD)
        learning_rate = float(f"{model.adamw_learning_rate * ADAMW_N_EMBD / n_embd:.2g}")
        row |= {"learning_rate": learning_rate, "optimizer": "adamw"}
    if values.get("LORA_RANK"):
        row = row | LORA_DEFAULTS
    defaults = {name: row.get(each.name, each.default) for name, each in VARIABLES.items()}
    for name, each in VARIABLES.items():
        is_path = each.metadata["form"] in ("path", "folder", "paths", "source")
        if is_path and defaults[name] not in (None, *each.metadata["words"]):
            base = SHIPPED if each.metadata["form"] == "source" else base_folder()
            defaults[name] = absolute_path(defaults[name], str(base))
    steps = values.get("TRAINING_STEPS", defaults["TRAINING_STEPS"])
    between = values.get("EVAL_INTERVAL", defaults["EVAL_INTERVAL"])
    return defaults | {"WARMUP_STEPS": min(defaults["WARMUP_STEPS"], steps // 10), "SAMPLE_INTERVAL": between}


def _default_optimizer(values: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return the default optimizer of a model that declares Muon in `row`: a fixed rule on N_EMBD and the tokens per step."""
    sizes = [values.get(name, row[name.lower()]) for name in ("BATCH_SIZE", "BLOCK_SIZE", "N_EMBD")]
    batch_size, block_size, n_embd = sizes
    tokens = batch_size * block_size * values.get("GRADIENT_ACCUMULATION_STEPS", 1)
    return str(row["optimizer"]) if tokens >= MUON_MIN_TOKENS * (n_embd or 0) else "adamw"


def _read_env_file(environ: Mapping[str, str], folder: str, problems: list[str]) -> tuple[str, dict[str, str]]:
    """Return the env file's name for messages, and its variables. Add what is wrong with it to `problems`."""
    name = environ.get("ENV_FILE", "") if environ.get("ENV_FILE", "").strip() else None
    label = f"./{name}" if name in (*DIRECT_SOURCES, *DERIVED_SOURCES) else name or ".env"
    if environ.get("PYTHON_DOTENV_DISABLED", "").casefold() in ("1", "true", "t", "yes", "y"):
        if name:
            problems.append(f"ENV_FILE={name!r} is not read while PYTHON_DOTENV_DISABLED is set: unset one of them")
        return label, {}
    path = Path(absolute_path(name, folder) if name else base_folder() / ".env")
    if not name and (path.is_dir() or not path.exists()):  # a folder .env may be a virtual environment
        return label, {}
    try:
        if path.is_fifo() or (path.is_char_device() and str(path) != os.devnull):  # reading it might never end
            raise OSError("not a regular file")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        problems.append(f"{label} cannot be read ({error}): expected UTF-8 text, one NAME=value per line")
        return label, {}
    if problem := not_an_env_file(str(path)):
        problems.append(problem)
        return label, {}
    readable, wrong = readable_lines(text, label)
    problems += wrong
    return label, {key: value or "" for key, value in dotenv_values(stream=io.StringIO(readable)).items()}


def shared_settings(config: Config) -> dict[str, Json]:
    """Return the settings that must be equal in all processes of one training: all but those of PER_MACHINE."""
    return {name: getattr(config, name.lower()) for name in VARIABLES if name not in PER_MACHINE}
