"""Hubs that do not answer: one quick question, then the cache, whatever asks."""

from __future__ import annotations

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dpo_kit.dataset import tokens
from dpo_kit.errors import UserError
from dpo_kit.model import builtin, model_folder
from dpo_kit.system import hub


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)


@contextlib.contextmanager
def answering(status: int):
    """A server that gives every question one status; what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def silent_hub(monkeypatch, no_proxy, tmp_path):
    """A hub that takes connections and never says a word."""
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "ANSWER_S", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        yield endpoint


@pytest.mark.parametrize("status", [200, 302, 401, 404, 503])
def test_any_answer_will_do(no_proxy, status):
    with answering(status) as (endpoint, asked):
        assert hub.reachable(endpoint)
    assert asked == ["/api/whoami-v2"]


def test_nobody_there_is_no_answer(no_proxy):
    with answering(200) as (endpoint, _):
        pass
    assert not hub.reachable(endpoint)


def test_silence_is_no_answer(silent_hub):
    assert not hub.reachable(silent_hub)


def test_behind_a_proxy_the_proxy_is_asked(monkeypatch):
    with answering(200) as (proxy, asked):
        monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"http": proxy})
        assert hub.reachable("http://hub.invalid")
    assert asked == ["http://hub.invalid/api/whoami-v2"]
    assert not hub.reachable("http://hub.invalid")  # the proxy is gone


def test_a_model_on_a_silent_hub_is_told_as_one(silent_hub):
    expected = f"'org/model' is neither .*{silent_hub} gives no answer, and its local cache does not hold it"
    with pytest.raises(UserError, match=expected):
        model_folder.snapshot("org/model")
    with pytest.raises(UserError, match="tokenizer 'org/model' cannot be loaded"):
        tokens.load_tokenizer("org/model")


def test_a_hub_that_falls_silent_after_its_first_answer_is_an_error(monkeypatch, silent_hub):
    """The client asks for a model's files without a deadline."""
    monkeypatch.setattr(hub, "reachable", lambda endpoint: True)
    monkeypatch.setattr(hub, "SILENT_S", 0.3)
    with pytest.raises(UserError, match="'org/other' is neither a local folder nor a model the hub gives"):
        model_folder.snapshot("org/other")


def test_a_silent_hub_is_not_asked_for_file_after_file(monkeypatch):
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    monkeypatch.setattr(hub, "reachable", lambda endpoint: True)
    with hub.cache_only_when_unreachable():
        session = get_session()
        asks, hears = session.event_hooks["request"][-1], session.event_hooks["response"][-1]
        request = session.build_request("GET", "http://hub.invalid")
        monkeypatch.setattr(hub, "SILENT_S", -1.0)
        asks(request)
        hears(None)
        asks(request)
        with pytest.raises(OfflineModeIsEnabled, match=r"hub\.invalid has not answered"):
            asks(request)


def test_the_clients_own_deadlines_are_left(monkeypatch):
    from huggingface_hub.utils import get_session

    monkeypatch.setattr(hub, "reachable", lambda endpoint: True)
    before = {name: list(hooks) for name, hooks in get_session().event_hooks.items()}
    with hub.cache_only_when_unreachable():
        (asks,) = [hook for hook in get_session().event_hooks["request"] if hook not in before["request"]]
        for given, found in ((7.0, 7.0), (None, hub.SILENT_S)):
            request = get_session().build_request("GET", "http://hub.invalid", timeout=given)
            asks(request)
            assert set(request.extensions["timeout"].values()) == {found}
    assert get_session().event_hooks == before


def test_what_lies_in_a_folder_asks_no_hub(silent_hub, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda endpoint: pytest.fail("asked"))
    path = builtin.ensure("tiny-random")
    assert str(model_folder.snapshot(path)) == path
    assert builtin.load_tokenizer(path).eos_token_id == 256


def test_only_the_weights_that_are_read_are_fetched(monkeypatch, tmp_path):
    """Two questions: the small files, then what the index names; nothing twice, nothing pickled."""
    import huggingface_hub

    asked = []

    def download(path, **patterns):
        asked.append(patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "reachable", lambda endpoint: True)
    assert model_folder.snapshot("org/model") == model_folder.snapshot("org/model") == tmp_path
    assert len(asked) == 2  # and not asked again
    model_folder._fetched.cache_clear()
    assert asked[1] == {"allow_patterns": ["model.safetensors"]}
    (tmp_path / model_folder.INDEX).write_text(
        '{"weight_map": {"a": "x-2.safetensors", "b": "x-1.safetensors"}}'
    )
    model_folder.snapshot("org/model")
    model_folder._fetched.cache_clear()
    assert asked[3] == {"allow_patterns": ["x-1.safetensors", "x-2.safetensors"]}
    wanted = huggingface_hub.utils.filter_repo_objects(
        [
            "config.json",
            model_folder.INDEX,
            "merges.txt",
            "tokenizer.model",
            "chat_template.jinja",
            "LICENSE",
            "model.safetensors",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "original/params.json",
        ],
        **asked[0],
    )
    assert list(wanted) == [
        "config.json",
        model_folder.INDEX,
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
    ]


@pytest.mark.parametrize("answers", [True, False])
def test_the_clients_are_offline_inside_and_as_before_outside(monkeypatch, answers):
    from huggingface_hub import constants

    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(hub, "reachable", lambda endpoint: answers)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    with hub.cache_only_when_unreachable() as told:
        assert constants.HF_HUB_OFFLINE is config.HF_HUB_OFFLINE is not answers
        assert bool(told) is not answers
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
