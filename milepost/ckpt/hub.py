"""Turn the name of a hub model, or of a folder, into a local folder in the Hugging Face layout.

`owner/name@revision` names a model at a branch, a tag or a commit.
"""

import re
from pathlib import Path
from typing import TypeGuard

from milepost.ckpt.foreign.importing import UNREAD
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
    "chat_template.jinja",
    "special_tokens_map.json",
    *UNREAD,  # where one of them lies, no other tokenizer is guessed
]
FIRST = [*SMALL, *TOKENS, SAFETENSORS.whole, SAFETENSORS.index, SAFETENSORS.shards]
ELSE = [PICKLED.whole, PICKLED.index, PICKLED.shards]
PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")
NAMED = re.compile(r"\w[\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
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
    pinned = f"{name.partition('@')[0]}@{folder.name}"
    return folder if any(folder.glob("model*.safetensors")) else _fetched(pinned, ELSE)


def pinned_name(name: str) -> str:
    """Return the name of a hub model with the commit that its revision is at. Raise CheckpointError as local_folder does."""
    return f"{name.partition('@')[0]}@{local_folder(name).name}"


def is_pinned(name: object) -> TypeGuard[str]:
    """Return whether this is the name of a hub model with a commit."""
    return isinstance(name, str) and bool(PINNED.fullmatch(name))


def is_hub_name(name: object) -> TypeGuard[str]:
    """Return whether this has the form of the name of a hub model, not of an absolute path or an address."""
    return isinstance(name, str) and bool(NAMED.fullmatch(name))


def is_same_model(name: object, pinned: object) -> bool:
    """Return whether `name` may mean the model that `pinned` names with its commit: a branch may have moved since."""
    if name == pinned:
        return True
    return is_pinned(pinned) and not is_pinned(name) and str(name).partition("@")[0] == str(pinned).partition("@")[0]


def _fetched(name: str, patterns: list[str]) -> Path:
    """Return the folder in the hub's cache with the files that match `patterns`; raise CheckpointError."""
    # Imported only here: it takes a third of a second.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        repository, _, revision = name.partition("@")
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except RevisionNotFoundError as error:
        problem = "the hub has the model, but no such revision of it"
        raise CheckpointError(name, problem, "check what follows the @", kind="not found") from error
    except GatedRepoError as error:  # a RepositoryNotFoundError too
        problem = "the hub gives this model only to accounts that have accepted its terms"
        remedy = f"accept them at huggingface.co/{repository} and set HF_TOKEN to a token of the account"
        raise CheckpointError(name, problem, remedy, kind="not found") from error
    except RepositoryNotFoundError as error:
        problem = "the hub has no such model, or it needs HF_TOKEN"
        raise CheckpointError(name, problem, f"check the name, or {FOLDER}", kind="not found") from error
    except (OSError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        problem = f"could not be fetched from the hub ({reason:.120})"
        raise CheckpointError(name, problem, f"without a network, {FOLDER}", kind="not found") from error
