"""Names that are not variables of this project: those of other programs, and probable misspellings of ours."""

import difflib
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from milepost.config.variables import VARIABLES
from milepost.text.addresses import masked

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

# Names of these settings in other projects, and the variable for a bare file name, by its suffix. Used in suggestions.
OTHER_WORDS = {
    "LR": "LEARNING_RATE",
    "STEPS": "TRAINING_STEPS",
    "MAX_STEPS": "TRAINING_STEPS",
    "MAX_ITERS": "TRAINING_STEPS",
    "MODEL": "MODEL_TYPE",
    "CONTEXT_LENGTH": "BLOCK_SIZE",
    "OUT_DIR": "CHECKPOINT_DIR",
    "CHECKPOINT": "CHECKPOINT_PATH",
    ".pt": "CHECKPOINT_PATH",
    ".safetensors": "CHECKPOINT_PATH",
    ".env": "ENV_FILE",
    ".txt": "TRAINING_DATA_SOURCE",
    "DATA": "TRAINING_DATA_SOURCE",
    "DATASET": "TRAINING_DATA_SOURCE",
    ".md": "TRAINING_DATA_SOURCE",
    "CONFIG": "ENV_FILE",
    ".yaml": "ENV_FILE",
    "MODEL_NAME": "CHECKPOINT_PREFIX",
}

LONG_NAMES = [name for name in VARIABLES if "_" in name and len(name) >= 8]


def is_foreign(name: str) -> bool:
    """Return whether the variable belongs to another program: Hugging Face, CUDA, torchrun, the terminal, ..."""
    known = name.upper() in FOREIGN_NAMES or name.upper().startswith(FOREIGN_PREFIXES)
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
    """Return the variable that `word` is another name for or is closest to, if any."""
    name = word.upper().replace("-", "_")
    return OTHER_WORDS.get(name) or next(iter(difflib.get_close_matches(name, VARIABLES, 1)), None)


def refuse_arguments(script: str, arguments: Sequence[str]) -> str:
    """Return the sentence that refuses command-line arguments and names the variables to set instead."""
    rest, settings, unknown = list(map(masked, arguments)), [], []
    while rest:
        argument = rest.pop(0)
        word, equals, value = argument.partition("=")
        named = bool(equals) or argument.startswith("-")
        name = closest_variable(word.lstrip("-")) if named else OTHER_WORDS.get(Path(argument).suffix)
        if named and not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else ("auto" if name == "RESUME" else "true")
        settings += [f"{name}={shlex.quote(value if named else argument)}"] if name else []
        unknown += [] if name else [argument]
    use = f"use {' '.join(settings)} python3 {script}" if settings else f"python3 {script} --help lists them"
    about = f" (unknown: {' '.join(unknown)})" if unknown else ""
    return f"{script} takes no arguments, settings are environment variables{about}: {use}"
