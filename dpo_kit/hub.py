"""One quick answer where the model hub cannot be reached.

The hub's client tries each file six times with growing pauses, 24 s for a data set and 50 s for a tokenizer on a
laptop without a network, and writes a line for each. Here the host is asked once for a connection; when none
comes about, the client works from its local cache only.

Deliberately not here: downloading, and any choice between hub and local files.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator

TIMEOUT_S = 3.0


@contextlib.contextmanager
def cache_only_when_unreachable() -> Iterator[None]:
    """Inside, the hub's clients of this process use what they have cached, if the hub cannot be reached."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or reachable(constants.ENDPOINT):
        yield
        return
    modules = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


def reachable(endpoint: str) -> bool:
    """Whether a connection to the endpoint's host comes about within TIMEOUT_S.

    Behind a proxy the host's name may mean nothing to this machine, so a proxy counts as reachable.
    """
    if urllib.request.getproxies():
        return True
    url = urllib.parse.urlsplit(endpoint)
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        with socket.create_connection((url.hostname or "", port), timeout=TIMEOUT_S):
            return True
    except OSError:
        return False
