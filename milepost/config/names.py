"""Names that are not variables of this project: those of other programs, and probable misspellings of ours."""

import difflib
import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from milepost.config.variables import VARIABLES
from milepost.runtime.trackers import TRACKERS

NEAR_MISS = 0.9  # difflib ratio from which a name in the process environment counts as a misspelt variable

# Prefixes of other programs' variables. An env file may hold them; they enter the process environment before torch is imported.
FOREIGN_PREFIXES = (
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "SAFETENSORS_", "TOKENIZERS_", "TIKTOKEN_", "DATA_GYM_", "TQDM_",
    "MPL", "WANDB_", "TRACKIO_", "GRADIO_", "TORCH", "PYTORCH_", "PYTHON", "CUDA_", "CUBLAS_", "CUDNN_",
    "NVIDIA_", "NCCL_", "GLOO_", "MPS_", "TRITON_", "ATEN_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_",
    "XDG_", "SSL_CERT_", "LC_",
)  # fmt: skip

FOREIGN_NAMES = (
    "NO_COLOR", "FORCE_COLOR", "DEBUG", "CI", "TERM", "COLUMNS", "LANG", "TZ", "TMPDIR", "RANK", "LOCAL_RANK",
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY",
    "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip

# Names of these settings in other projects, used in suggestions.
OTHER_WORDS = {
    "LR": "LEARNING_RATE", "MIN_LR": "MIN_LEARNING_RATE", "WARMUP": "WARMUP_STEPS", "WARMUP_ITERS": "WARMUP_STEPS",
    "STEPS": "TRAINING_STEPS", "MAX_STEPS": "TRAINING_STEPS", "MAX_ITERS": "TRAINING_STEPS", "BSZ": "BATCH_SIZE",
    "GRAD_ACCUM": "GRADIENT_ACCUMULATION_STEPS", "GRADIENT_ACCUMULATION": "GRADIENT_ACCUMULATION_STEPS",
    "EVAL_ITERS": "EVAL_STEPS", "RANDOM_SEED": "SEED", "PRECISION": "DTYPE",
    "MODEL": "MODEL_TYPE", "CONTEXT_LENGTH": "BLOCK_SIZE", "SEQ_LEN": "BLOCK_SIZE", "SEQ_LENGTH": "BLOCK_SIZE",
    "MAX_SEQ_LEN": "BLOCK_SIZE", "NUM_LAYERS": "N_LAYER", "N_LAYERS": "N_LAYER", "NUM_HEADS": "N_HEAD", "N_HEADS": "N_HEAD",
    "HIDDEN_SIZE": "N_EMBD", "D_MODEL": "N_EMBD", "EMBED_DIM": "N_EMBD",
    "DATA": "TRAINING_DATA_SOURCE", "DATASET": "TRAINING_DATA_SOURCE", "DATA_PATH": "TRAINING_DATA_SOURCE",
    "TRAIN_FILE": "TRAINING_DATA_SOURCE",
    "OUT_DIR": "CHECKPOINT_DIR", "OUTPUT_DIR": "CHECKPOINT_DIR", "SAVE_DIR": "CHECKPOINT_DIR",
    "CHECKPOINT": "CHECKPOINT_PATH", "CKPT": "CHECKPOINT_PATH", "CKPT_PATH": "CHECKPOINT_PATH", "MODEL_PATH": "CHECKPOINT_PATH",
    "LEGACY_CHECKPOINT": "CHECKPOINT_PATH", "SAVE_INTERVAL": "CHECKPOINT_INTERVAL", "SAVE_STEPS": "CHECKPOINT_INTERVAL",
    "EVERY_N_TRAIN_STEPS": "CHECKPOINT_INTERVAL", "SAVE_MODEL_ONLY": "CHECKPOINT_MODEL_ONLY", "FILENAME_PREFIX": "CHECKPOINT_PREFIX",
    "RESUME_FROM_CHECKPOINT": "RESUME", "RESUME_FROM": "RESUME", "START": "PROMPT", "MAX_TOKENS": "MAX_NEW_TOKENS",
    "CONFIG": "ENV_FILE", "CONFIG_FILE": "ENV_FILE", "MODEL_NAME": "CHECKPOINT_DIR", "MODEL_NAME_OR_PATH": "GPT2_MODEL_NAME",
}  # fmt: skip

# The variable that a bare file name on the command line probably means, by its suffix.
SUFFIXES = {
    ".pt": "CHECKPOINT_PATH", ".pth": "CHECKPOINT_PATH", ".ckpt": "CHECKPOINT_PATH", ".safetensors": "CHECKPOINT_PATH",
    ".txt": "TRAINING_DATA_SOURCE", ".md": "TRAINING_DATA_SOURCE", ".env": "ENV_FILE", ".yaml": "ENV_FILE", ".yml": "ENV_FILE",
    ".toml": "ENV_FILE",
}  # fmt: skip
CONFIG_SUFFIXES = (".yaml", ".yml", ".toml", ".json")  # of configuration files that are not env files
CONFIG_BYTES = 2**16  # read of such a file
CONFIG_LINE = re.compile(r"""\s*["']?([A-Za-z_][\w.-]*)["']?\s*[:=]\s*(.*?),?\s*(?:\s#.*)?""")

LONG_NAMES = [name for name in VARIABLES if "_" in name and len(name) >= 8]


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
            close = closest_variable(name)
            hint = f"did you mean {close}?" if close else "docs/configuration.md lists them"
            yield f"{label}: {name} is not a variable; {hint}"


def unknown_in_environment(names: Iterable[str]) -> Iterator[str]:
    """Yield one sentence for each near miss of a long name; all else in the process environment belongs to other programs."""
    for name in names:
        if "_" in name and len(name) >= 8 and name not in VARIABLES and not is_foreign(name):
            for close in difflib.get_close_matches(name.upper(), LONG_NAMES, 1, NEAR_MISS):
                yield f"{name} is not a variable; did you mean {close}?"


def closest_variable(word: str) -> str | None:
    """Return the variable that `word` is another name for or is closest to, if any. For a question, not for a command."""
    return variable_meant(word) or next(iter(difflib.get_close_matches(_as_name(word), VARIABLES, 1)), None)


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
    rest, settings, unknown = list(arguments), Settings(), []
    while rest:
        argument = rest.pop(0)
        word, equals, value = argument.partition("=")
        named = bool(equals) or argument.startswith("-")
        if named and not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if named:
            name = variable_meant(word.lstrip("-"))
        else:
            name, word, value = SUFFIXES.get(Path(argument).suffix), "", argument
        if name == "CHECKPOINT_PATH" and name not in reads and "RESUME" in reads:
            name = "RESUME"  # the checkpoint that training.py begins with
        if name == "ENV_FILE" and Path(value).suffix in CONFIG_SUFFIXES:
            unknown += settings.add_file(value)
        elif name:
            settings.add(name, value, word=word)
        else:
            unknown.append(argument)
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
    found = (match.groups() for line in lines if (match := CONFIG_LINE.fullmatch(line)))
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
