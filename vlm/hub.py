"""Whether the Hugging Face hub can be asked."""

import os
import socket
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
