"""The pool of ranks that the other tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests import rank_functions


def test_results_come_in_rank_order(ranks):
    assert [result[:2] for result in ranks.run(rank_functions.rank_and_size)] == [(0, 2), (1, 2)]
    assert ranks.run(rank_functions.sum_of_ranks, 3) == [7.0, 7.0]


def test_functions_of_a_test_module_are_found(ranks):
    assert ranks.run(its_pid)[0] != os.getpid()


def its_pid():
    return os.getpid()


def test_the_pool_is_started_once(ranks):
    assert ranks.run(its_pid) == ranks.run(its_pid)


def test_fsdp_runs_on_fresh_groups(ranks):
    first, second = ranks.run(rank_functions.sharded_norm), ranks.run(rank_functions.sharded_norm)
    assert first == second
    assert first[0] == first[1] > 0


def test_a_raising_rank_is_named_and_the_pool_goes_on(ranks):
    with pytest.raises(RuntimeError, match=r"^rank 1: ValueError: boom") as caught:
        ranks.run(rank_functions.raise_on, 1)
    assert "in raise_on" in caught.value.__notes__[0]
    assert ranks.run(rank_functions.sum_of_ranks, 0) == [1.0, 1.0]


def test_all_ranks_raising_keeps_them(ranks):
    before = ranks.run(its_pid)
    with pytest.raises(RuntimeError, match=r"^rank [01]: KeyError: 'both'"):
        ranks.run(rank_functions.raise_everywhere)
    assert ranks.run(its_pid) == before


def test_ranks_end_with_their_session(tmp_path):
    code = (
        "import sys, time; from tests.ranks import Ranks; from tests import rank_functions\n"
        "Ranks(2).run(rank_functions.sleep_and_tell, sys.argv[1], 60)"
    )
    assert wait_gone(pids_of_a_killed_parent(code, tmp_path), 3.0)


def pids_of_a_killed_parent(code, folder):
    """What a process that runs this code had started (`rank_functions.sleep_and_tell`) before it was killed."""
    parent = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    try:
        return wait_for_pids(folder)
    finally:
        parent.kill()
        parent.wait()


def wait_for_pids(folder, num_ranks=2, timeout_s=90.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        files = [folder / f"pid-{rank}" for rank in range(num_ranks)]
        if all(file.is_file() and file.read_text() for file in files):
            return [int(file.read_text()) for file in files]
        time.sleep(0.1)
    raise AssertionError("the ranks did not come up")


def wait_gone(pids, seconds):
    from dpo_kit.system.processes import is_alive

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(is_alive({"pid": pid}) for pid in pids):
            return True
        time.sleep(0.05)
    return False
