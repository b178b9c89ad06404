"""A hub name or a folder's name -> a local folder in the Hugging Face layout."""

from pathlib import Path

from milepost.ckpt.record import CheckpointError
from milepost.ckpt.weight_files import PICKLED, SAFETENSORS

# Nothing that could be code. The weights from safetensors; from a torch archive, which is looked through first, only where there are none.
SMALL = ["config.json", "generation_config.json"]
TOKENS = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
]
FIRST = [*SMALL, *TOKENS, SAFETENSORS.whole, SAFETENSORS.index, SAFETENSORS.shards]
ELSE = [PICKLED.whole, PICKLED.index, PICKLED.shards]


def local_folder(name: str) -> Path:
    """The folder that GPT2_MODEL_NAME means: itself if it is one, else its files from the hub (HF_HOME's cache first, HF_HUB_OFFLINE honoured).

    Raises CheckpointError naming the folder form if the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"GPT2_MODEL_NAME={name}: there is no such folder; expected one with config.json and model.safetensors"
        )
    folder = _fetched(name, FIRST)
    return folder if any(folder.glob("model*.safetensors")) else _fetched(name, ELSE)


def _fetched(name: str, patterns: list[str]) -> Path:
    """The folder in the hub's cache with the files of these patterns; raises CheckpointError."""
    # Imported only here: it takes a third of a second that no other run should pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"GPT2_MODEL_NAME={name}: the hub has no such model, or one that HF_TOKEN is needed for; check the name, or "
            "set GPT2_MODEL_NAME to a folder that holds its config.json and model.safetensors"
        ) from error
    except (OSError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"GPT2_MODEL_NAME={name}: could not be fetched from the hub ({reason:.120}); without a network, "
            f"set GPT2_MODEL_NAME to a folder that holds its config.json and model.safetensors"
        ) from error
