"""Who sits before this process."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from dpo_kit.supervise import owner as owner_module
from dpo_kit.system.processes import identify


@pytest.mark.parametrize(
    ("command", "headless"),
    [
        (["/venv/bin/python", "/venv/bin/papermill", "a.ipynb", "b.ipynb"], True),
        (["python", "-m", "papermill", "a.ipynb", "b.ipynb"], True),
        (["python3.11", "-W", "ignore", "-u", "-m", "pytest", "--nbval"], True),
        (["/venv/bin/pytest"], True),
        (["python", "/venv/bin/jupyter-nbconvert", "--execute", "a.ipynb"], True),
        (["python", "/venv/bin/jupyter", "nbconvert", "a.ipynb"], True),
        (["python", "/venv/bin/jupyter-execute", "a.ipynb"], True),
        (["python", "-m", "nbconvert", "a.ipynb"], True),
        (["python", "/venv/bin/jupyter-lab"], False),
        (["python", "-m", "jupyterlab", "papermill.ipynb"], False),
        (["python", "/venv/bin/jupyter", "lab", "--notebook-dir=/home/pytest/papermill"], False),
        (["/home/pytest/papermill/bin/python", "/home/papermill/bin/jupyter-lab"], False),
        (["python", "-m", "notebook"], False),
        (["/usr/bin/code", "--papermill"], False),
        (["python", "drive_a_kernel.py"], False),
        ([], False),
    ],
)
def test_programs_that_run_notebooks_are_known_by_their_command(command, headless):
    assert owner_module.runs_notebooks(command) is headless


@pytest.fixture
def outside(monkeypatch):
    """As if neither pytest nor a kernel were around; the environment to play with is `environment`."""
    environment: dict[str, str] = {}
    # Not the real one: pytest sets its variable again before each test and needs it afterwards.
    monkeypatch.setattr(owner_module, "os", SimpleNamespace(environ=environment))
    monkeypatch.setattr(owner_module, "shell", lambda: None)
    monkeypatch.delattr(sys, "ps1", raising=False)
    monkeypatch.environment = environment
    return monkeypatch


def test_pytest_is_headless():
    assert owner_module.is_headless()


def test_a_plain_script_is_headless_and_a_repl_is_not(outside):
    assert owner_module.is_headless()
    outside.setattr(sys, "ps1", ">>> ", raising=False)
    assert not owner_module.is_headless()


def test_a_kernel_is_judged_by_the_program_that_started_it(outside):
    outside.setattr(owner_module, "shell", lambda: SimpleNamespace(kernel=1))
    assert not owner_module.is_headless()
    outside.environment["JPY_PARENT_PID"] = str(os.getpid())
    assert owner_module.is_headless()
    assert [owner["pid"] for owner in owner_module.owners()] == [os.getpid()] * 2
    outside.setattr(owner_module, "runs_notebooks", lambda command: False)
    assert not owner_module.is_headless()


def test_a_script_started_from_a_notebook_is_a_script(outside):
    """`!python train.py` inherits JPY_PARENT_PID of its notebook."""
    outside.environment["JPY_PARENT_PID"] = "999999999"
    assert owner_module.is_headless()
    assert [owner["pid"] for owner in owner_module.owners()] == [os.getpid()]


def test_the_environment_has_the_last_word(outside):
    outside.environment[owner_module.OVERRIDE] = "0"
    assert not owner_module.is_headless()
    outside.environment["PYTEST_CURRENT_TEST"] = "x"
    assert not owner_module.is_headless()
    outside.environment[owner_module.OVERRIDE] = "1"
    outside.setattr(sys, "ps1", ">>> ", raising=False)
    assert owner_module.is_headless()


def test_a_parent_that_is_gone_is_no_parent(outside):
    for text in ("999999999", "1", "", "x"):
        outside.environment["JPY_PARENT_PID"] = text
        assert owner_module.kernel_parent() is None


def test_owners_are_identities(outside):
    assert owner_module.owners() == [identify()]
