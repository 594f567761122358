"""No file of a run and no message holds a secret."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dpo_kit import config
from dpo_kit.errors import ConfigError, UserError
from dpo_kit.records import status
from dpo_kit.redaction import SHOWN, found_in, redact
from tests.supervise import test_kills

SECRET = "hush-2718281828"
TOKEN = "hf_" + "aB3" * 12  # looks like an access token; no environment variable holds it


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_API_KEY", SECRET)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    monkeypatch.setenv("HTTP_PASSWORD", "short")
    monkeypatch.setenv("MODEL_TOKEN", "tiny-random")
    monkeypatch.setenv("SSH_PRIVATE_KEY", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"key={SECRET}!", f"key={SHOWN}!"),
        (f"token {TOKEN}.", f"token {SHOWN}."),
        ("https://me:pa55word@host/x", f"https://{SHOWN}@host/x"),
        ("sk-proj-" + "a1B" * 14, SHOWN),
        ("ghp_" + "a1" * 18, SHOWN),
        ("AKIA" + "A1" * 8, SHOWN),
    ],
)
def test_secrets_are_redacted(text, shown):
    assert redact(text) == shown
    assert found_in(text)
    assert str(UserError(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "falsefalse",
        "short",
        "https://host:80/a@b",
        "a:b@c",
        "hf_model",
        "task-" + "a" * 30,
        "step 3: loss 0.69",
        "sk-learn-baseline-comparison",
        "/data/hf_ultrafeedbackbinarized",
        "tiny-random",  # a plain word that a variable holds
        f"a{SECRET}b",  # a longer word
    ],
)
def test_what_is_no_secret_stays(text, tmp_path):
    assert redact(text) == text
    assert found_in(text) is None
    assert redact(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"experiment_name": SECRET},
        {"train_dataset": {"path": f"/data/{SECRET}.jsonl"}},
        {"actor": {"path": TOKEN}},
        {"valid_dataset": {"path": "https://me:pa55word@host/pairs.jsonl"}},
    ],
)
def test_a_configuration_with_a_secret_is_refused_without_showing_it(change):
    base = {"actor": {"path": "tiny-random"}, "train_dataset": {"path": "sample"}}
    with pytest.raises(ConfigError, match=r"holds what|holds a password") as caught:
        config.from_tree({**base, **change})
    assert SECRET not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert "pa55" not in str(caught.value)


def test_a_secret_from_the_environment_is_refused_by_name():
    tree = {"experiment_name": "${oc.env:MY_API_KEY}", "actor": {"path": "tiny-random"}}
    with pytest.raises(
        ConfigError, match="experiment_name holds what the environment variable MY_API_KEY holds"
    ):
        config.from_tree(tree)


def test_the_message_about_an_unknown_key_does_not_show_its_secret():
    with pytest.raises(ConfigError) as caught:
        config.from_tree({"actor": {"path": "tiny-random", "beta": TOKEN, "hub_token": SECRET}})
    assert "actor.hub_token" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_what_a_process_of_a_run_prints_is_redacted(tmp_path):
    """A rank, dataset/prepare and tools/samples all start through `dpo_kit.system.child`."""
    (tmp_path / "says.py").write_text(
        "import os, sys, warnings\n"
        "secret = os.environ['MY_API_KEY']\n"
        "print('out', secret)\n"
        "sys.stderr.writelines(['err ', secret])\n"
        "warnings.warn(secret)\n"
        "raise RuntimeError(secret)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "dpo_kit.system.child", "says"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"out {SHOWN}" in done.stdout
    assert f"RuntimeError: {SHOWN}" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_the_cause_of_a_failure_is_redacted(tmp_path):
    status.write_rank_error(tmp_path, 0, RuntimeError(f"no access with {SECRET}"))
    text = (tmp_path / "logs" / "rank-0.error.json").read_text()
    assert SECRET not in text
    assert f"no access with {SHOWN}" in text


def test_no_file_of_a_run_holds_a_secret(tmp_path, monkeypatch):
    """Secrets in the environment and below keys of the seed's system that mean nothing here."""
    extra = {
        "stats_logger": {"tensorboard": True, "wandb": {"mode": "online", "api_key": TOKEN}},
        "total_train_steps": 2,
    }
    monkeypatch.setattr("tests.supervise.test_kills.PARAMS", {**test_kills.PARAMS, **extra})
    assert test_kills.start(tmp_path, "one").wait() == 0, (tmp_path / "one.log").read_text()
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "manifest.json", "status.json", "metrics.jsonl", "rank-0.log"} <= names
    for path in [*files, tmp_path / "one.log"]:
        data = path.read_bytes()
        assert SECRET.encode() not in data, path
        assert TOKEN.encode() not in data, path
