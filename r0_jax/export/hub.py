"""Upload an export to the Hugging Face Hub, with its own client; only when asked to."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors, utils

from r0_jax.errors import InputError, printable


def check(name: str) -> None:
    """Check that models can be uploaded as `name`, "owner/name"; raise InputError if not.

    Asks the Hub who the token's owner is, so that a long export does not end without an upload.
    """
    try:
        utils.validate_repo_id(name)
        huggingface_hub.HfApi().whoami()
    except _ERRORS as error:
        raise InputError(f"--push_to_hub={printable(name)}: {_advice(error)}") from None


def push(folder: Path, name: str, message: str) -> str:
    """Upload the files of an export as the model `name`; return its URL.

    The model is made if it is not there, private. Raise InputError if the Hub does not take it.
    """
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message)
    except _ERRORS as error:
        raise InputError(
            f"{folder} is written, but not uploaded to {printable(name)}: {_advice(error)}; try "
            f"`hf upload {printable(name)} {folder}`"
        ) from None
    return str(url)


# What the client raises for names, tokens, rights, and a Hub that is not reached.
_ERRORS = (
    ValueError,
    errors.HfHubHTTPError,
    errors.LocalTokenNotFoundError,
    errors.OfflineModeIsEnabled,
    errors.HTTPError,
    OSError,
)


def _advice(error: Exception) -> str:
    if isinstance(error, errors.HFValidationError):
        return "not a name of the Hub; write owner/name"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "there is no token; run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the token has no right to write there (HTTP {status}); check it"
        return f"the Hub answered HTTP {status}"
    if isinstance(error, ValueError):
        return printable(str(error))
    return f"the Hub cannot be reached ({printable(str(error)).rstrip('.')})"
