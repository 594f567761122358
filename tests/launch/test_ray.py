"""What is said and chosen when Ray is asked, over a Ray that is played."""

from __future__ import annotations

import types

import pytest

from dpo_kit import config as config_module
from dpo_kit.config import project_root
from dpo_kit.errors import UserError
from dpo_kit.launch import ray as launcher
from dpo_kit.supervise import nodes


@pytest.fixture
def played(monkeypatch):
    """A Ray whose cluster is at an address; without one none answers."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def make(address=None):
        def init(**options):
            asked.append(options["address"])
            if address is None and options["address"] != "local":
                raise ConnectionError("nobody is there")

        context = types.SimpleNamespace(gcs_address=address)
        return types.SimpleNamespace(init=init, get_runtime_context=lambda: context, asked=asked)

    return make


def settings(*words):
    return config_module.load(project_root() / "params" / "smoke.yaml", ["scheduler.type=ray", *words])


def test_a_cluster_without_a_token_is_used_with_one_warning(played, tmp_path, capsys, monkeypatch):
    launcher._connect(played("10.0.0.1:6379"), settings(), tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{nodes.NOTE}Ray: the cluster at 10.0.0.1:6379",
        f"{nodes.WARNING}10.0.0.1:6379 takes anybody's jobs: start it with RAY_AUTH_MODE=token",
    ]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    launcher._connect(played("10.0.0.1:6379"), settings("scheduler.address=10.0.0.1:6379"), tmp_path)
    assert nodes.WARNING not in capsys.readouterr().out
    assert played().asked == ["auto", "10.0.0.1:6379"]


def test_a_cluster_that_is_named_must_answer(played, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"no Ray cluster answers at 10.0.0.1:1 \(nobody is there\); one that wants a token"
    ):
        launcher._connect(played(), settings("scheduler.address=10.0.0.1:1"), tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:2")
    with pytest.raises(UserError, match=r"answers at RAY_ADDRESS=10\.0\.0\.2:2"):
        launcher._connect(played(), settings(), tmp_path)


def test_a_cluster_of_ones_own_is_one_node_and_begins_with_a_token(played, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="one of the run's own has 1 node"):
        launcher._connect(played(), settings("cluster.n_nodes=2", "actor.backend=fsdp:d2"), tmp_path)
    begun = []
    monkeypatch.setattr(launcher.os, "execve", lambda path, words, env: begun.append((words, env)))
    nodes.folder(tmp_path).mkdir()
    launcher._connect(played(), settings(), tmp_path)
    ((words, environment),) = begun
    assert words[1:3] == ["-m", "dpo_kit.launch.ray"]
    token = nodes.folder(tmp_path) / "ray-token"
    assert (environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN_PATH"]) == ("token", str(token))
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64


def test_hub_files_of_several_nodes_go_to_one_place_unless_one_is_named(played, monkeypatch):
    played()
    two = settings("cluster.n_nodes=2", "actor.backend=fsdp:d2", "cluster.fileroot=/nfs")
    assert nodes.variables(two) == {"HF_HUB_CACHE": "/nfs/.cache/hub"}
    assert nodes.variables(settings()) == {}
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    assert nodes.variables(two) == {}
