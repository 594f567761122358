"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Two gloo ranks for the whole session; see `tests.ranks`."""
    pool = Ranks(2)
    yield pool
    pool.close()
    pool.folder.cleanup()
