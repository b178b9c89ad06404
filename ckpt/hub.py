"""A hub name or a folder's name -> a local folder in the Hugging Face layout."""

from pathlib import Path

from ckpt.record import CheckpointError

# Weights from safetensors alone: a .bin is a pickle, and no code from a hub ever runs here.
WANTED = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
]


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
    # Imported only here: it takes a third of a second that no other run should pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (OSError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"GPT2_MODEL_NAME={name}: could not be fetched from the hub ({reason:.120}); without a network, "
            f"set GPT2_MODEL_NAME to a folder that holds its config.json and model.safetensors"
        ) from error
