"""A run on several nodes, whose agents are all on this machine: real agents and files, fake ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from dpo_kit.errors import UserError
from dpo_kit.records.status import read_status, request_stop
from dpo_kit.supervise import nodes
from dpo_kit.supervise.supervisor import supervise
from dpo_kit.system.files import read_json
from dpo_kit.system.processes import is_alive
from tests.fake_supervisor import MODULES
from tests.supervise.test_supervisor import LONG, living, make_run, steps, until  # noqa: F401

NODES = {**MODULES, "starter_module": "tests.fake_nodes"}


@pytest.fixture
def make_nodes(make_run):  # noqa: F811
    """A run of four ranks on two nodes."""

    def make(worker, *, bent=None, **settings):
        run_dir = make_run(worker, num_ranks=4, **settings)
        config = run_dir / "config.yaml"
        text = config.read_text().replace("cluster: {", "scheduler: {type: ray}\ncluster: {n_nodes: 2, ")
        config.write_text(text)
        (run_dir / "nodes.json").write_text(json.dumps({"count": 2, **(bent or {})}))
        return run_dir

    return make


def agents(run_dir):
    return [int(path.read_text()) for path in sorted(run_dir.glob("agent-*"))]


def nobody_is_left(run_dir):
    return not living(run_dir) and not any(is_alive({"pid": pid}) for pid in agents(run_dir))


def supervised(run_dir):
    """A supervisor in a process of its own, some steps into its run."""
    code = (
        "import sys; from pathlib import Path; from dpo_kit.supervise.supervisor import supervise;"
        "from tests.supervise.test_nodes import NODES; supervise(Path(sys.argv[1]), **NODES)"
    )
    child = psutil.Popen([sys.executable, "-c", code, str(run_dir)])
    until(lambda: steps(run_dir) > 2, 40)
    return child


def test_ranks_of_two_nodes_make_one_run(make_nodes):
    run_dir = make_nodes([["environment"], ["train", 3, 0.05]])
    assert supervise(run_dir, **NODES) == 0
    status = read_status(run_dir)
    assert (status["state"], status["step"], status["samples"]) == ("done", 3, "made")
    assert status["phases"][0]["name"] == "find nodes"
    given = [json.loads((run_dir / f"environment-{rank}.json").read_text()) for rank in range(4)]
    assert [one["RANK"] for one in given] == ["0", "1", "2", "3"]
    assert [one["LOCAL_RANK"] for one in given] == ["0", "1", "0", "1"]
    assert {one["WORLD_SIZE"] for one in given} == {"4"}
    # All on one host: a file, and nothing listens.
    assert len({one["DPO_KIT_INIT_METHOD"] for one in given}) == 1
    assert given[0]["DPO_KIT_INIT_METHOD"].startswith("file://")
    assert {one["GLOO_SOCKET_IFNAME"] for one in given} == {"lo"}
    assert nobody_is_left(run_dir)
    assert not nodes.folder(run_dir).exists()


def test_hosts_that_differ_meet_over_tcp_on_the_first_ones_address(make_nodes):
    run_dir = make_nodes([["environment"]], bent={"hosts": ["a", "b"]}, num_samples=0)
    assert supervise(run_dir, **NODES) == 0
    given = [json.loads((run_dir / f"environment-{rank}.json").read_text()) for rank in range(4)]
    (method,) = {one["DPO_KIT_INIT_METHOD"] for one in given}
    assert method.startswith("tcp://127.0.0.1:")
    assert {one["GLOO_SOCKET_IFNAME"] for one in given} == {"lo"}  # which has that address here


@pytest.mark.parametrize(
    ("bent", "told"),
    [
        ({"facts": {"1": {"versions": {"dpo-kit": "0"}}}}, "has dpo-kit 0, and"),
        (
            {"facts": {"1": {"code": "beef"}}, "hosts": ["a", "b"]},
            "b (127.0.0.1) has other code of dpo_kit beef than",
        ),
        ({"facts": {"1": {"free_disk": 5}}}, "and 0.0 MiB are free; use recover.keep=1"),
        ({"facts": {"1": {"free_host_bytes": 10**6}}}, "on 4 CPU ranks, and 0.00 GiB are free"),
        ({"token": {"1": "x"}}, "not the same folder on"),
        ({"count": 0}, "what started the nodes ended with status"),
    ],
)
def test_nodes_that_do_not_fit_are_named_before_any_rank_starts(make_nodes, bent, told, tmp_path):
    run_dir = make_nodes(LONG, bent=bent)
    (tmp_path / "model").mkdir()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("path: tiny-random", f"path: {tmp_path / 'model'}"))
    if bent.get("count") == 0:
        assert supervise(run_dir, **NODES) == 1
        assert told in read_status(run_dir)["message"]
    else:
        with pytest.raises(UserError, match=told.replace("(", r"\(").replace(")", r"\)")):
            supervise(run_dir, foreground=True, **NODES)
        assert not run_dir.exists()
    assert nobody_is_left(run_dir)


def test_a_stop_reaches_all_nodes(make_nodes):
    run_dir = make_nodes(LONG)
    threading.Timer(0, lambda: (until(lambda: steps(run_dir) > 2), request_stop(run_dir, "stopped"))).start()
    assert supervise(run_dir, **NODES) == 3
    assert read_status(run_dir)["state"] == "stopped"
    assert nobody_is_left(run_dir)


def test_a_rank_that_fails_elsewhere_is_told_and_ends_the_others(make_nodes):
    deaf = [["deaf"], ["sleep", 600]]
    run_dir = make_nodes(
        {"0": deaf, "1": deaf, "2": deaf, "3": [["sleep", 0.3], ["raise", "ValueError", "boom"]]}
    )
    assert supervise(run_dir, **NODES) == 1
    assert read_status(run_dir)["message"] == "rank 3: ValueError: boom (logs/rank-3.log)"
    assert nobody_is_left(run_dir)


def test_a_lost_node_is_found_again_and_the_run_goes_on(make_nodes):
    run_dir = make_nodes(LONG, recover="auto")

    def lose_one():
        until(lambda: steps(run_dir) > 2)
        gone = agents(run_dir)[1]
        os.kill(gone, signal.SIGKILL)
        until(lambda: read_status(run_dir)["attempt"] == 2 and steps(run_dir) > 2)
        told.append(read_status(run_dir)["message"])
        request_stop(run_dir, "stopped")

    told: list[str] = []
    thread = threading.Thread(target=lose_one)
    thread.start()
    assert supervise(run_dir, **NODES) == 3
    thread.join()
    assert "going on from the start" in told[0]
    assert nobody_is_left(run_dir)


def test_a_stop_while_lost_nodes_are_found_again_ends_at_once(make_nodes):
    run_dir = make_nodes(LONG, recover="auto")

    def lose_one_and_stop():
        until(lambda: steps(run_dir) > 2)
        (run_dir / "nodes.json").write_text(json.dumps({"count": 1}))  # the other never comes
        os.kill(agents(run_dir)[1], signal.SIGKILL)
        until(lambda: read_status(run_dir)["phase"] == "find nodes" and read_status(run_dir)["attempt"] == 2)
        request_stop(run_dir, "stopped")

    thread = threading.Thread(target=lose_one_and_stop)
    thread.start()
    assert supervise(run_dir, **NODES) == 3
    thread.join()
    status = read_status(run_dir)
    assert status["state"] == "stopped"
    assert status["message"] == "before its ranks were started again; nothing was lost"
    assert nobody_is_left(run_dir)


def test_what_a_starter_said_in_passing_is_no_reason(make_nodes):
    run_dir = make_nodes(LONG, bent={"count": 0, "says": f"{nodes.NOTE}all is well"})
    assert supervise(run_dir, **NODES) == 1
    assert read_status(run_dir)["message"] == "what started the nodes ended with status 1"


def test_a_library_may_talk_on_after_the_reason(make_nodes):
    run_dir = make_nodes(LONG, bent={"count": 0, "says": f"{nodes.REASON}b is lost\n(raylet) chatter"})
    assert supervise(run_dir, **NODES) == 1
    assert read_status(run_dir)["message"] == "b is lost"


def test_a_run_of_torchrun_without_it_fails_in_words(make_run):  # noqa: F811
    run_dir = make_run(LONG)
    config = run_dir / "config.yaml"
    config.write_text("scheduler: {type: torchrun}\n" + config.read_text())
    assert supervise(run_dir, **MODULES) == 2
    assert "was started by torchrun: give the same command again" in read_status(run_dir)["message"]


def test_what_is_each_machines_own_is_not_handed_on(monkeypatch):
    for name in ("HF_HOME", "HF_TOKEN", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "HOME"):
        monkeypatch.setenv(name, "x")
    handed = nodes.handed_on()
    assert {"HF_HOME", "NCCL_DEBUG"} <= set(handed)
    assert not {"HF_TOKEN", "NCCL_SOCKET_IFNAME", "HOME"} & set(handed)


def test_a_silent_agent_is_lost(make_nodes, monkeypatch):
    monkeypatch.setattr(nodes, "SILENCE_S", 2.0)
    run_dir = make_nodes(LONG)
    timer = threading.Thread(
        target=lambda: (until(lambda: steps(run_dir) > 2), os.kill(agents(run_dir)[1], signal.SIGSTOP))
    )
    timer.start()
    assert supervise(run_dir, **NODES) == 1
    timer.join()
    assert "is lost: no word for 2 s" in read_status(run_dir)["message"]
    assert nobody_is_left(run_dir)


def test_agents_end_when_their_supervisor_says_nothing(make_nodes):
    run_dir = make_nodes(LONG, bent={"silence_s": 1.5})
    child = supervised(run_dir)
    child.suspend()
    until(lambda: nobody_is_left(run_dir), 10)
    child.kill()
    child.wait()


def test_agents_and_ranks_end_with_a_killed_supervisor(make_nodes):
    run_dir = make_nodes(LONG)
    child = supervised(run_dir)
    child.kill()
    child.wait()
    until(lambda: nobody_is_left(run_dir), 5)


def test_a_schedulers_warning_to_an_agent_saves_and_ends_the_run(make_nodes):
    run_dir = make_nodes(LONG)
    threading.Timer(
        0, lambda: (until(lambda: steps(run_dir) > 2), os.kill(agents(run_dir)[1], signal.SIGTERM))
    ).start()
    assert supervise(run_dir, **NODES) == 3
    assert read_status(run_dir)["state"] == "preempted"


def test_a_rank_that_hangs_on_another_node_is_named(make_nodes):
    hang = [["progress", {"phase": "training", "done": 1, "total": 9}], ["sleep", 600]]
    run_dir = make_nodes({str(rank): hang for rank in range(4)}, timeout_s=1.5)
    assert supervise(run_dir, **NODES) == 1
    assert "nothing moved for" in read_status(run_dir)["message"]
    assert nobody_is_left(run_dir)


def test_silence_counts_what_passed_between_looks_and_not_a_look_that_hung():
    silence = nodes.Silence()
    assert silence.hear("a") == 0.0
    silence.at -= 600.0  # the file system hung
    assert silence.hear("a") == 1.0
    time.sleep(0.05)
    assert 1.05 <= silence.hear("a") < 2.0
    assert silence.hear("b") == 0.0


def test_ranks_are_shared_out_evenly():
    assert nodes.shares(8, 2) == [4, 4]
    assert nodes.shares(5, 3) == [2, 2, 1]
    assert read_json(nodes.folder(nodes.Path("/nowhere")) / "orders.json", {}) == {}


def test_an_agent_whose_run_has_ended_without_a_word_to_it_ends(tmp_path):
    folder = nodes.folder(tmp_path)
    folder.mkdir()
    nodes.write(folder / "orders.json", {"token": "t", "beat": 0, "start": None})
    command = [sys.executable, "-m", "dpo_kit.supervise.agent", str(tmp_path), "t", "0", "127.0.0.1"]
    with subprocess.Popen(command) as process:
        until(lambda: (folder / "node-0.json").exists(), 30)
        shutil.rmtree(folder)
        assert process.wait(10) == 0
    assert not folder.exists()
