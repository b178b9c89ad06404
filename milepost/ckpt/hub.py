"""Turn the name of a hub model, or of a folder, into a local folder in the Hugging Face layout."""

from pathlib import Path

from milepost.ckpt.record import CheckpointError
from milepost.ckpt.weight_files import PICKLED, SAFETENSORS

# Only files that cannot be code. Weights from safetensors; only where there are none, from a torch archive, which is
# checked first.
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
FOLDER = "name a folder that holds config.json and model.safetensors"


def local_folder(name: str) -> Path:
    """Return `name` if it is a folder, else the folder of its files from the hub (HF_HOME's cache first; HF_HUB_OFFLINE
    works).

    Raises CheckpointError naming the folder form if the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")):
        raise CheckpointError(name, "there is no such folder", FOLDER, kind="not found")
    folder = _fetched(name, FIRST)
    return folder if any(folder.glob("model*.safetensors")) else _fetched(name, ELSE)


def _fetched(name: str, patterns: list[str]) -> Path:
    """Return the folder in the hub's cache with the files that match `patterns`; raise CheckpointError."""
    # Imported only here: it takes a third of a second.
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
        problem = "the hub has no such model, or it needs HF_TOKEN"
        raise CheckpointError(name, problem, f"check the name, or {FOLDER}", kind="not found") from error
    except (OSError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        problem = f"could not be fetched from the hub ({reason:.120})"
        raise CheckpointError(name, problem, f"without a network, {FOLDER}", kind="not found") from error
