"""Uploads to the Hugging Face hub. huggingface_hub does it; here are the order of things and its errors in a sentence."""

from pathlib import Path

# What may be published of a checkpoint. Such a file of an earlier one would be read beside the new ones: weights beside adapters, for
# example. Other files of a repository are its owner's.
WRITTEN = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "adapter_config.json",
    "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "milepost.json", "loss.svg",
)  # fmt: skip


class HubError(OSError):
    """The hub did not take what was to be published; the sentence says what to do."""


def push(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Create the repository `name` if it is not there, upload the folder as one commit, and return its address. What was
    published there before and is not in the folder goes with the same commit.

    Raise HubError, also if the repository is public and `private` asks for a private one. Files that an earlier, broken
    attempt uploaded are not sent again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi(library_name="milepost")
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        if private and not hub.model_info(name).private:
            raise HubError(f"{name} is public on the hub: choose another name, or publish to it with HUB_PRIVATE=false")
        commit = hub.upload_folder(
            folder_path=folder, repo_id=name, commit_message=message, delete_patterns=list(WRITTEN)
        )
    except HFValidationError as error:
        raise HubError(
            f"{name} is not a name of the hub ({str(error).splitlines()[0]}): expected owner/name"
        ) from error
    except HfHubHTTPError as error:
        raise HubError(_refused(name, error.response.status_code, error.server_message or "")) from error
    except HubError:
        raise
    except Exception as error:  # no network: each version of the client has errors of its own
        raise HubError(_unreachable(name, error)) from error
    return str(commit.commit_url)


def _refused(name: str, code: int, message: str) -> str:
    reason = f"the hub answers {code}{f' ({message:.120})' if message else ''}"
    if code in (401, 403):
        return f"{name}: {reason}: log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
    return f"{name}: {reason}: try again; what was uploaded is not sent again"


def _unreachable(name: str, error: Exception) -> str:
    return f"{name}: the hub cannot be reached ({type(error).__name__}): try again; what was uploaded is not sent again"
