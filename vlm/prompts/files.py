"""Where the files of a tokenizer are."""

import re
from pathlib import Path

from vlm.errors import UserError
from vlm.hub import is_reachable

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_file(path: str, name: str, expected: str) -> Path:
    """The file `name` of a folder, a file itself, or that of a Hugging Face repository.

    Raises:
        UserError: there is none; says what was `expected`.
    """
    local = Path(path).expanduser()
    file = local / name if local.is_dir() else local
    if file.is_file():
        return file
    if not local.exists() and _HUB_ID.fullmatch(path):
        found = download(path, name)
        if found is not None:
            return found
        how = (
            "is the name right, and may this account read it?"
            if is_reachable()
            else f"the hub cannot be reached: fetch it where it can (`hf download {path}`), or give a folder"
        )
        raise UserError(
            f"tokenizer {path!r}: neither on this disk nor to be had from the hub; expected {expected}; {how}"
        )
    raise UserError(f"tokenizer {path!r}: {file} does not exist; expected {expected}")


def download(repository: str, name: str) -> Path | None:
    """A file of a Hugging Face repository, from the cache if it is there; None if it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, local_files_only=not is_reachable()))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
