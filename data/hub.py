"""The Hugging Face hub, or its cache on this machine."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


def use_cache_if_unreachable() -> None:
    """Without a network, let the hub's libraries look into their cache at once instead of after their retries.

    They read the variable when they are loaded: call this before.
    """
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    if getproxies():
        return  # names are resolved behind the proxy
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
