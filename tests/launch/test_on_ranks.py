"""`launch.spawn`: a function on N ranks for the length of a cell."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from dpo_kit.errors import UserError
from dpo_kit.launch.on_ranks import spawn
from dpo_kit.system import processes
from tests import rank_functions
from tests.test_ranks import pids_of_a_killed_parent, wait_for_pids, wait_gone


def test_results_come_in_rank_order():
    (rank0, size, threads), (rank1, _, _) = spawn(rank_functions.rank_and_size)
    assert (rank0, rank1, size) == (0, 1, 2)
    assert threads == max(1, processes.physical_cores() // 2)


def test_a_raising_rank_ends_the_others_and_shows_its_cause(tmp_path):
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^rank 1: ValueError: boom") as caught:
        spawn(rank_functions.raise_on, 1, timeout_s=60)
    assert "in raise_on" in caught.value.__notes__[0]
    assert time.monotonic() - started < 40


def test_a_dying_rank_is_named():
    with pytest.raises(RuntimeError, match=r"^rank 1: ended with status 7 without a message"):
        spawn(rank_functions.leave, 7, timeout_s=60)


def test_what_pickle_does_not_take_is_an_error_of_the_rank():
    with pytest.raises(RuntimeError, match=r"^rank 0: .*[Pp]ickl"):
        spawn(rank_functions.returns_a_lambda, num_ranks=1)


def test_a_slow_rank_is_ended(tmp_path):
    with pytest.raises(RuntimeError, match=r"^rank 0: not done after 8 s"):
        spawn(rank_functions.sleep_and_tell, str(tmp_path), 600, num_ranks=1, timeout_s=8)
    assert wait_gone(wait_for_pids(tmp_path, 1), 1.0)


def test_functions_out_of_reach_are_refused():
    def inner():
        return 1

    with pytest.raises(UserError, match="a lambda or defined inside another function"):
        spawn(lambda: 1)
    with pytest.raises(
        UserError, match=r"inner is a lambda or defined inside another function; write it into"
    ):
        spawn(inner)
    own = type(sys)("own")
    exec("def cell(): return 1", {"__name__": "__main__"}, own.__dict__)
    with pytest.raises(UserError, match="cell is defined in the notebook or script itself"):
        spawn(own.cell)
    with pytest.raises(UserError, match="num_ranks = 0 is not a number of ranks"):
        spawn(rank_functions.rank_and_size, num_ranks=0)
    with pytest.raises(UserError, match="backend = 'mpi' is not one of gloo, nccl"):
        spawn(rank_functions.rank_and_size, backend="mpi")


def test_an_interrupted_cell_leaves_no_process(tmp_path):
    pids = []

    def interrupt():
        pids.extend(wait_for_pids(tmp_path))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        spawn(rank_functions.sleep_and_tell, str(tmp_path), 60)
    thread.join()
    assert wait_gone(pids, 0.1)


def test_a_killed_parent_leaves_no_process(tmp_path):
    code = (
        "import sys; from dpo_kit.launch.on_ranks import spawn; from tests import rank_functions\n"
        "spawn(rank_functions.sleep_and_tell, sys.argv[1], 60)"
    )
    assert wait_gone(pids_of_a_killed_parent(code, tmp_path), 3.0)
