"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal

import pytest

from dpo_kit.model import model_folder
from dpo_kit.system.processes import end_tree
from tests.fakes import Fakes
from tests.ranks import Ranks

# Tiny models: two threads that wait for each other take up to 30 times the processor time of one. Ranks have their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job is started deaf to SIGINT, and so would be all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory):
    """Built-in models are made in a temporary folder; what was downloaded before is linked in."""
    folder = tmp_path_factory.mktemp("models")
    for made in model_folder.cache_dir().glob("smollm2*"):
        if made.is_dir():
            (folder / made.name).symlink_to(made, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_KIT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def ranks():
    """Two gloo ranks for the whole session; see `tests.ranks`."""
    pool = Ranks(2)
    yield pool
    pool.close()
    pool.folder.cleanup()


@pytest.fixture(scope="session")
def four_ranks():
    """Four of them."""
    pool = Ranks(4)
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
