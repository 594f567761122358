from __future__ import annotations

import socket

import pytest

from dpo_kit import hub


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)


def test_reachable_asks_for_a_connection(no_proxy):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert hub.reachable(endpoint)
    assert not hub.reachable(endpoint)


def test_a_proxy_counts_as_reachable(monkeypatch):
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub.reachable("https://127.0.0.1:1")


@pytest.mark.parametrize("answers", [True, False])
def test_the_clients_are_offline_inside_and_as_before_outside(monkeypatch, answers):
    from huggingface_hub import constants

    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(hub, "reachable", lambda endpoint: answers)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    with hub.cache_only_when_unreachable():
        assert constants.HF_HUB_OFFLINE is config.HF_HUB_OFFLINE is not answers
    assert constants.HF_HUB_OFFLINE is config.HF_HUB_OFFLINE is False


def test_an_error_inside_puts_the_setting_back(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "reachable", lambda endpoint: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    context = hub.cache_only_when_unreachable()
    context.__enter__()
    assert constants.HF_HUB_OFFLINE
    assert not context.__exit__(KeyError, KeyError(), None)
    assert not constants.HF_HUB_OFFLINE
