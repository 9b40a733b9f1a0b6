"""Push an export to the Hugging Face hub, or to a server with the same interface (HF_ENDPOINT)."""

from __future__ import annotations

from pathlib import Path

from ecar_dist.errors import CheckpointError, ConfigError
from ecar_dist.storage.redaction import redact_text
from ecar_dist.storage.untrusted import printable


def check_hub(name: str) -> None:
    """Raises ConfigError if `name` cannot be a repository, or if there is no token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ConfigError(
            f"--push-to-hub {printable(name, 100)!r} is not the name of a repository; give OWNER/NAME, of letters, "
            "digits, '-', '_' and '.'"
        ) from None
    if get_token() is None:
        raise ConfigError("--push-to-hub needs a token with write access; run `hf auth login`, or set HF_TOKEN")


def push_to_hub(folder: Path, name: str) -> str:
    """Upload the files of an export as one commit; returns the URL of the repository.

    A repository that does not exist is created as private; its page has a switch to publish it. Raises CheckpointError.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="ecar_dist")
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:  # of the library or its dependencies: the export exists, whatever happened
        reason = printable(redact_text(str(error)), 300)
        raise CheckpointError(
            f"{folder} was written, but cannot be pushed to {name}: {reason}; fix that, then run `ecar-dist checkpoint "
            f"export {folder} --push-to-hub {name}`"
        ) from None
    return str(repository)
