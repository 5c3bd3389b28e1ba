"""Whether the Hugging Face hub can be asked, and what of it is here already."""

import os
import socket
from collections.abc import Iterable
from functools import cache
from urllib.parse import urlsplit

_SECONDS = 5.0


@cache
def is_reachable() -> bool:
    """False with `HF_HUB_OFFLINE`, or where no connection is to be had.

    Asked once, and before the client is: that one tries again for half a minute, file by file.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) or os.environ.get(name.lower()) for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")):
        return True  # only the proxy knows
    endpoint = urlsplit(constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=_SECONDS).close()
    except OSError:
        return False
    return True


def is_cached(hub_id: str, names: Iterable[str]) -> bool:
    """Whether one of these files of a repository has been fetched before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in names)
    except HFValidationError:  # a path that does not exist
        return False
