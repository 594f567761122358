"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest

from dpo_kit.processes import end_tree
from tests.fakes import Fakes
from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Two gloo ranks for the whole session; see `tests.ranks`."""
    pool = Ranks(2)
    yield pool
    pool.close()
    pool.folder.cleanup()


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Runs over fake processes, under `tmp_path`; none is left behind."""
    made = Fakes(tmp_path, monkeypatch)
    yield made
    left = made.end()
    end_tree(left)
    assert left == []
