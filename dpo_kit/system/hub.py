"""One quick answer where the model hub cannot be reached.

The hub's client tries each file six times with growing pauses, 24 s for a data set and 50 s for a tokenizer on a
laptop without a network, and writes a line for each. Here the host is asked once for an answer, of whatever kind;
when none comes, the client works from its local cache only, and so it does when a hub falls silent later: some
of its questions have no deadline of their own.

Deliberately not here: downloading, and any choice between hub and local files.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import sys
import time
import urllib.error
from collections.abc import Iterator
from typing import Any

TIMEOUT_S = 3.0
ANSWER_S = 10.0
SILENT_S = 30.0  # of a hub that has answered before


@contextlib.contextmanager
def cache_only_when_unreachable() -> Iterator[str]:
    """Inside, the hub's clients of this process use what they have cached, if the hub cannot be reached.

    Gives what to say then of something that is not there; empty where the hub is asked.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or reachable(constants.ENDPOINT):
        with _patience():
            yield ""
        return
    modules = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield f"{constants.ENDPOINT} gives no answer, and its local cache does not hold it"
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Inside, the hub's client is offline from when it has waited SILENT_S for an answer, over all its attempts."""
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    unanswered_since: float | None = None

    def asks(request: Any) -> None:
        nonlocal unanswered_since
        now = time.monotonic()
        if unanswered_since is not None and now - unanswered_since > SILENT_S:
            raise OfflineModeIsEnabled(f"{request.url} has not answered for {SILENT_S:g} s")
        unanswered_since = unanswered_since or now
        limits = request.extensions.get("timeout") or {}
        given = {part: limits.get(part) or SILENT_S for part in ("connect", "read", "write", "pool")}
        request.extensions["timeout"] = given

    def hears(response: Any) -> None:
        nonlocal unanswered_since
        unanswered_since = None

    hooks = get_session().event_hooks
    hooks["request"].append(asks)
    hooks["response"].append(hears)
    try:
        yield
    finally:
        hooks["request"].remove(asks)
        hooks["response"].remove(hears)


def reachable(endpoint: str) -> bool:
    """Whether the endpoint's host takes a connection within TIMEOUT_S, and its API says something within ANSWER_S.

    Behind a proxy the host's name may mean nothing to this machine: there the proxy is asked.
    """
    if not urllib.request.getproxies():
        url = urllib.parse.urlsplit(endpoint)
        port = url.port or (80 if url.scheme == "http" else 443)
        try:
            socket.create_connection((url.hostname or "", port), timeout=TIMEOUT_S).close()
        except OSError:
            return False
    # Nothing is sent or believed, so no certificate matters.
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    try:
        question = urllib.request.Request(f"{endpoint}/api/whoami-v2", method="HEAD")
        urllib.request.urlopen(question, timeout=ANSWER_S, context=unchecked).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True
