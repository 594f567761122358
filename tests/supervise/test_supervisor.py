"""One run from start to end, over fake processes: no torch, a second or two each."""

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
from dpo_kit.records import checkpoint_folders, lock, metrics, run_folder
from dpo_kit.records.status import effective, read_rank_errors, read_status, request_stop, stop_requested
from dpo_kit.supervise import start
from dpo_kit.supervise.supervisor import supervise
from dpo_kit.system.files import atomic_write, read_json
from dpo_kit.system.processes import end_tree, identify, is_alive
from dpo_kit.view.progress import Lines
from tests.fake_supervisor import MODULES

CONFIG = """
experiment_name: exp
trial_name: one
cluster: {{fileroot: {fileroot}, n_gpus_per_node: 0, grace_s: {grace_s}, step_timeout_s: {timeout_s}}}
actor: {{path: tiny-random, backend: "fsdp:d{num_ranks}"}}
ref: {{path: tiny-random}}
train_dataset: {{path: sample}}
recover: {{mode: "{recover}", retries: 2}}
evaluator: {{num_samples: {num_samples}}}
"""
LONG = [["train", 600, 0.1]]


@pytest.fixture
def make_run(tmp_path):
    """A run folder whose processes play the given parts."""
    pids = []

    def make(worker, prepare=(), samples=(), num_ranks=2, **settings):
        fileroot = tmp_path / "runs"
        settings = {"grace_s": 5.0, "num_samples": 1, "recover": "disabled", "timeout_s": 60.0, **settings}
        text = CONFIG.format(fileroot=fileroot, num_ranks=num_ranks, **settings)
        run_dir = run_folder.create(fileroot, "exp", "one", config_text=text, manifest={})
        by_rank = worker if isinstance(worker, dict) else {str(rank): worker for rank in range(num_ranks)}
        play = {"prepare": list(prepare), "worker": by_rank, "samples": list(samples)}
        (run_dir / "play.json").write_text(json.dumps(play))
        pids.append(run_dir)
        return run_dir

    yield make
    left = [pid for run_dir in pids for pid in started(run_dir).values() if is_alive({"pid": pid})]
    end_tree(left)
    assert left == []


def started(run_dir):
    return {path.name[4:]: int(path.read_text() or 0) for path in run_dir.glob("pid-*")}


def living(run_dir):
    return [name for name, pid in started(run_dir).items() if pid and is_alive({"pid": pid})]


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.02)


def steps(run_dir):
    return len(metrics.read_metrics(run_dir))


@pytest.fixture
def background():
    """Starts the real supervisor in a process of its own."""
    processes = []

    def start(run_dir, owners=()):
        command = [sys.executable, "-m", "tests.fake_supervisor", str(run_dir)]
        for owner in owners:
            command += ["--owner", f"{owner['pid']}@{owner['create_time']}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def owner():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_run_ends_done_with_its_phases_and_records(make_run):
    training = [["environment"], ["train", 3, 0.05], ["progress", {"phase": "export"}], ["sleep", 0.2]]
    run_dir = make_run(training, prepare=[["progress", {"phase": "build pairs"}], ["sleep", 0.3]])
    assert supervise(run_dir, **MODULES) == 0
    status = read_status(run_dir)
    assert (status["state"], status["step"], status["total_steps"]) == ("done", 3, 3)
    assert status["samples"] == "made"
    assert [phase["name"] for phase in status["phases"]] == [
        "build pairs",
        "start ranks",
        "training",
        "export",
        "samples",
    ]
    assert status["phases"][0]["seconds"] >= 0.3
    assert status["ended_at"] >= status["started_at"] >= status["created_at"]
    assert (status["supervisor"]["pid"], status["owner"]["kind"]) == (os.getpid(), "foreground")
    assert lock.lock_owner(run_dir) is None
    remembered = read_json(tmp(run_dir) / ".cache" / "phase_seconds.json")
    assert remembered["tiny-random on 2 cpu ranks"]["build pairs"] == status["phases"][0]["seconds"]


def tmp(run_dir):
    return run_dir.parent.parent


def test_ranks_get_their_place_loopback_and_a_fresh_store(make_run):
    run_dir = make_run([["environment"]], num_samples=0)
    assert supervise(run_dir, **MODULES) == 0
    first, second = (json.loads((run_dir / f"environment-{rank}.json").read_text()) for rank in (0, 1))
    assert (first["RANK"], second["RANK"], second["LOCAL_RANK"], second["WORLD_SIZE"]) == ("0", "1", "1", "2")
    store = first["DPO_KIT_INIT_METHOD"].removeprefix("file://")
    assert first["DPO_KIT_INIT_METHOD"] == second["DPO_KIT_INIT_METHOD"] == f"file://{store}"
    assert not os.path.exists(store)
    assert (
        first["GLOO_SOCKET_IFNAME"]
        == first["NCCL_SOCKET_IFNAME"]
        == ("lo" if sys.platform == "linux" else "lo0")
    )
    assert (first["TOKENIZERS_PARALLELISM"], first["DPO_KIT_DEVICE"]) == ("false", "cpu")
    assert int(first["OMP_NUM_THREADS"]) >= 1
    assert "samples" not in read_status(run_dir)


def test_a_failing_rank_is_told_in_one_line_and_ends_the_others(make_run):
    run_dir = make_run(
        {"0": [["deaf"], ["sleep", 600]], "1": [["sleep", 0.3], ["raise", "ValueError", "boom\nsecond line"]]}
    )
    began = time.monotonic()
    assert supervise(run_dir, **MODULES) == 1
    assert time.monotonic() - began < 6
    status = read_status(run_dir)
    assert (status["state"], status["message"]) == ("failed", "rank 1: ValueError: boom (logs/rank-1.log)")
    assert status["ranks"] == []


def test_the_first_failure_is_the_cause(make_run):
    run_dir = make_run(
        {
            "0": [["sleep", 0.55], ["raise", "RuntimeError", "connection closed by peer"]],
            "1": [["sleep", 0.4], ["raise", "ValueError", "boom"]],
        }
    )
    assert supervise(run_dir, **MODULES) == 1
    assert read_status(run_dir)["message"].startswith("rank 1: ValueError: boom")


def test_a_killed_rank_is_the_cause_and_not_those_who_lost_it(make_run):
    run_dir = make_run(
        {
            "0": [["sleep", 0.5], ["raise", "RuntimeError", "connection closed by peer"]],
            "1": [["sleep", 0.4], ["kill", 9]],
        }
    )
    assert supervise(run_dir, **MODULES) == 1
    assert read_status(run_dir)["message"] == (
        "rank 1: ended from outside by SIGKILL (out of memory?) (logs/rank-1.log)"
    )


def test_a_rank_without_a_word_is_told_by_its_log(make_run):
    run_dir = make_run(
        {"0": [["sleep", 600]], "1": [["print", "cannot open shared object\n\n"], ["exit", 7]]}
    )
    assert supervise(run_dir, **MODULES) == 1
    message = read_status(run_dir)["message"]
    assert message == "rank 1: ended with status 7: cannot open shared object (logs/rank-1.log)"


def test_a_users_mistake_in_a_rank_is_status_2(make_run):
    run_dir = make_run({"0": [["raise", "DataError", "the longest pair has 900 tokens"]], "1": []})
    assert supervise(run_dir, **MODULES) == 2
    assert "rank 0: the longest pair has 900 tokens" in read_status(run_dir)["message"]


def test_wrong_data_leaves_nothing_in_the_foreground(make_run, tmp_path):
    run_dir = make_run([], prepare=[["raise", "DataError", "train.jsonl: empty"]])
    with pytest.raises(UserError, match=r"^train.jsonl: empty$"):
        supervise(run_dir, foreground=True, lines=Lines(run_dir), **MODULES)
    assert list(tmp_path.iterdir()) == []


def test_wrong_data_of_a_detached_run_stay_as_its_message(make_run):
    run_dir = make_run([], prepare=[["raise", "DataError", "train.jsonl: empty"]])
    assert supervise(run_dir, **MODULES) == 2
    status = read_status(run_dir)
    assert (status["state"], status["message"]) == ("failed", "train.jsonl: empty")


def test_an_error_in_prepare_keeps_the_folder(make_run, capsys):
    run_dir = make_run([], prepare=[["raise", "ValueError", "odd"]])
    assert supervise(run_dir, foreground=True, lines=Lines(run_dir), **MODULES) == 1
    assert read_status(run_dir)["message"] == "prepare: ValueError: odd (logs/prepare.log)"
    assert "s: prepare: ValueError: odd (logs/prepare.log)" in capsys.readouterr().out


def test_failing_samples_only_leave_a_note(make_run):
    run_dir = make_run([["train", 1, 0.01]], samples=[["raise", "RuntimeError", "no text"]])
    assert supervise(run_dir, **MODULES) == 0
    status = read_status(run_dir)
    assert (status["state"], status["samples"]) == (
        "done",
        "failed: samples: RuntimeError: no text (logs/samples.log)",
    )


def test_a_stop_file_ends_the_run_with_its_state_saved(make_run):
    run_dir = make_run(LONG)

    def stop():
        until(lambda: steps(run_dir) >= 2)
        request_stop(run_dir, "stopped")

    thread = threading.Thread(target=stop)
    thread.start()
    assert supervise(run_dir, **MODULES) == 3
    thread.join()
    status = read_status(run_dir)
    assert (status["state"], status["message"]) == ("stopped", "as asked, with the state saved")
    assert (run_dir / "saved").read_text() == str(status["step"])
    assert stop_requested(run_dir) is None


def test_a_stop_while_pairs_are_built_needs_no_grace(make_run):
    run_dir = make_run([], prepare=[["sleep", 600]], grace_s=60)
    thread = threading.Timer(0.5, request_stop, (run_dir, "stopped"))
    thread.start()
    began = time.monotonic()
    assert supervise(run_dir, **MODULES) == 3
    assert time.monotonic() - began < 5
    assert read_status(run_dir)["state"] == "stopped"
    assert "worker-0" not in started(run_dir)


def waiting(run_dir):
    """Processes of ranks, those that wait to be let go included."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "tests.fake_worker" in words and str(run_dir) in words:
            found.append(process.pid)
    return found


@pytest.mark.parametrize("how", ["fails", "stops", "is killed"])
def test_ranks_that_wait_while_pairs_are_built_leave_no_trace(make_run, background, how):
    said = [["raise", "DataError", "train.jsonl: empty"]] if how == "fails" else [["sleep", 600]]
    run_dir = make_run(
        [["print", "went"]], prepare=[["progress", {"phase": "build pairs"}], ["sleep", 1], *said]
    )
    (run_dir / "logs" / "rank-0.log").write_text("of an earlier attempt\n")
    process = background(run_dir)
    until(lambda: len(waiting(run_dir)) == 2)
    assert read_status(run_dir).get("ranks") in (None, [])
    until(lambda: read_status(run_dir).get("phase") == "build pairs")
    if how == "is killed":
        process.kill()
    elif how == "stops":
        request_stop(run_dir, "stopped")
    until(lambda: not waiting(run_dir) and not living(run_dir))
    process.wait(20)
    assert not [name for name in started(run_dir) if name.startswith("worker")]
    if how != "is killed":
        assert (run_dir / "logs" / "rank-0.log").read_text() == "of an earlier attempt\n"
        assert not (run_dir / "logs" / "rank-1.log").exists()
        assert [error["rank"] for error in read_rank_errors(run_dir)] == ["prepare"] * (how == "fails")
        assert read_status(run_dir)["state"] == ("failed" if how == "fails" else "stopped")


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(make_run):
    run_dir = make_run({"0": LONG, "1": [["deaf"], ["sleep", 600]]}, grace_s=1.5)

    def stop():
        until(lambda: steps(run_dir) >= 1)
        request_stop(run_dir, "preempted")

    thread = threading.Thread(target=stop)
    thread.start()
    began = time.monotonic()
    assert supervise(run_dir, **MODULES) == 3
    thread.join()
    assert 1.5 < time.monotonic() - began < 8
    status = read_status(run_dir)
    assert status["state"] == "preempted"
    assert status["message"] == "as asked; rank 1 did not end within 1.5 s and was killed"


def test_a_rank_stopped_by_somebody_else_stops_the_run(make_run):
    run_dir = make_run(LONG)

    def stop():
        until(lambda: steps(run_dir) >= 1)
        os.kill(started(run_dir)["worker-1"], signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert supervise(run_dir, **MODULES) == 3
    thread.join()
    assert read_status(run_dir)["state"] == "preempted"


@pytest.mark.parametrize(("number", "state"), [(signal.SIGINT, "stopped"), (signal.SIGTERM, "preempted")])
def test_a_signal_stops_with_the_state_saved(make_run, background, number, state):
    run_dir = make_run(LONG)
    process = background(run_dir)
    until(lambda: (run_dir / "metrics.jsonl").exists())
    process.send_signal(number)
    assert process.wait(timeout=20) == 3
    assert read_status(run_dir)["state"] == state
    assert (run_dir / "saved").exists()


def test_a_second_signal_leaves_at_once(make_run, background):
    run_dir = make_run([["deaf"], ["sleep", 600]], grace_s=60)
    process = background(run_dir)
    until(lambda: "worker-1" in started(run_dir))
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # still one request: `timeout` signals the process and its group
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(timeout=20) == 3
    assert time.monotonic() - began < 5
    assert "at once: rank 0, 1 was killed before its state was saved" in read_status(run_dir)["message"]


def test_an_owner_that_is_killed_preempts_the_run(make_run, background, owner):
    run_dir = make_run(LONG)
    process = background(run_dir, [identify(os.getpid()), identify(owner.pid)])
    until(lambda: (run_dir / "metrics.jsonl").exists())
    owner.kill()
    owner.wait()
    assert process.wait(timeout=20) == 3
    status = read_status(run_dir)
    assert status["state"] == "preempted"
    assert (run_dir / "saved").exists()


def test_an_owner_that_is_gone_already_starts_nothing(make_run, owner):
    run_dir = make_run(LONG)
    gone = identify(owner.pid)
    owner.kill()
    owner.wait()
    assert supervise(run_dir, [gone], **MODULES) == 3
    assert read_status(run_dir)["state"] == "preempted"
    assert started(run_dir) == {}


def test_a_killed_supervisor_takes_its_ranks_along(make_run, background):
    run_dir = make_run([["deaf"], ["sleep", 600]])
    process = background(run_dir)
    until(lambda: "worker-1" in started(run_dir) and "worker-0" in started(run_dir))
    process.kill()
    process.wait()
    until(lambda: living(run_dir) == [], 2.0)
    assert lock.lock_owner(run_dir) is None
    status = effective(read_status(run_dir))
    assert status["state"] == "failed"
    assert f"supervisor (pid {process.pid}) ended without a word" in status["message"]


def test_a_second_supervisor_is_refused_and_told_who(make_run, background):
    run_dir = make_run(LONG)
    process = background(run_dir)
    until(lambda: (run_dir / "metrics.jsonl").exists())
    with pytest.raises(UserError, match=f"belongs to process {process.pid} on "):
        supervise(run_dir, **MODULES)
    second = background(run_dir)
    assert second.wait(timeout=20) == 2
    assert f"belongs to process {process.pid}" in second.stdout.read()
    assert read_status(run_dir)["state"] == "running"
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)


def test_the_foreground_says_something_at_once_and_keeps_talking(make_run, capsys):
    run_dir = make_run(
        [
            ["progress", {"phase": "reference pass", "done": 3, "total": 9}],
            ["sleep", 4.6],
            ["train", 10, 0.05],
        ],
        num_samples=0,
    )
    assert supervise(run_dir, foreground=True, lines=Lines(run_dir), **MODULES) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("start ranks: ") for line in lines)
    assert sum(line.startswith("reference pass: 3/9, ") for line in lines) >= 2
    assert any(line.startswith("reference pass: done in 4.") for line in lines)
    assert sum(line.startswith("training: step ") for line in lines) >= 5
    assert any("step 10: loss 0.6000, reward accuracy 50 %" in line for line in lines)
    assert lines[-1].startswith("done after ")


def test_a_rank_that_hangs_after_the_end_does_not_keep_the_run(make_run):
    run_dir = make_run({"0": [["train", 1, 0.01]], "1": [["deaf"], ["sleep", 600]]}, grace_s=1.0)
    assert supervise(run_dir, **MODULES) == 0
    assert read_status(run_dir)["state"] == "done"


def test_a_run_that_is_killed_while_it_makes_samples_is_not_trained_again(make_run, background):
    run_dir = make_run([["train", 3, 0.02], ["checkpoint", 3]], samples=[["sleep", 600]])
    process = background(run_dir)
    until(lambda: "samples" in started(run_dir))
    (run_dir / "model").mkdir()
    assert checkpoint_folders.steps(run_dir / "checkpoints") == [3]
    process.kill()
    process.wait()
    (run_dir / "play.json").write_text(json.dumps({"prepare": [], "worker": {}, "samples": []}))
    start.begin(run_dir)
    assert supervise(run_dir, **MODULES) == 0  # ranks without a part to play would fail
    status = read_status(run_dir)
    assert (status["state"], status["step"], status["samples"]) == ("done", 3, "made")
    assert checkpoint_folders.steps(run_dir / "checkpoints") == []
    assert steps(run_dir) == 3


def test_checkpoints_stay_until_the_run_is_done(make_run):
    """Rank 1 fails when the model is written already: that is no reason to train again."""
    run_dir = make_run(
        {"0": [["train", 3, 0.02], ["checkpoint", 3]], "1": [["sleep", 1.0], ["exit", 1]]},
        num_samples=0,
        recover="auto",
    )
    assert supervise(run_dir, **MODULES) == 0
    assert read_status(run_dir)["attempt"] == 1
    assert checkpoint_folders.steps(run_dir / "checkpoints") == []


def test_a_stop_during_samples_is_a_run_that_is_done(make_run):
    run_dir = make_run([["train", 1, 0.01]], samples=[["sleep", 600]])

    def stop():
        until(lambda: "samples" in started(run_dir))
        request_stop(run_dir, "stopped")

    thread = threading.Thread(target=stop)
    thread.start()
    assert supervise(run_dir, **MODULES) == 0
    thread.join()
    status = read_status(run_dir)
    assert (status["state"], status["samples"]) == ("done", "not made: the run was asked to stop")


def test_an_error_of_the_supervisor_itself_is_a_failed_run(make_run, capfd):
    run_dir = make_run([])
    atomic_write(run_dir / "progress.json", '{"phase": "training"}')
    assert supervise(run_dir, **MODULES) == 1
    assert read_status(run_dir)["message"].startswith("supervisor: KeyError")


# ---------------------------------------------------------------- out of memory

SETTLED = {
    "actor": 8192,
    "ref": 8192,
    "source": {"actor": "estimated", "ref": "estimated"},
    "asked": {"actor": "auto", "ref": "auto"},
    "longest_pair": 900,
    "largest": {"actor": 8000, "ref": 4096},
    "halvings": [],
}
FULL = {"section": "actor", "step": 2}


def broken(settled=SETTLED, where=FULL):
    """An attempt that records two steps and an export, then runs out of memory."""
    return [["budget", settled], ["train", 2, 0.02], ["sleep", 0.3], ["out of memory", where]]


def test_a_rank_that_runs_out_of_memory_goes_on_with_half(make_run, capsys):
    fails, works = broken(), [["train", 3, 0.02]]
    others = [["deaf"], ["sleep", 600]]
    run_dir = make_run(
        {"0": [["attempts", others, fails, works]], "1": [["attempts", fails, others, works]]}, num_samples=0
    )
    assert supervise(run_dir, foreground=True, lines=Lines(run_dir), **MODULES) == 0
    status = read_status(run_dir)
    assert (status["state"], status["attempt"], status["step"], status["total_steps"]) == ("done", 3, 3, 3)
    assert status["message"] == "with 2,048 tokens a micro-batch, after running out of memory with 8,192"
    # Only the last attempt is on record, and no error of the others.
    assert [record["step"] for record in metrics.read_metrics(run_dir)] == [1, 2, 3]
    assert read_rank_errors(run_dir) == []
    made = read_json(run_dir / "budget.json")
    said = "RuntimeError: not enough memory"
    assert (made["actor"], made["ref"]) == (2048, 8192)
    assert made["halvings"] == [
        {"section": "actor", "from": 8192, "to": 4096, "step": 2, "rank": 1, "error": said},
        {"section": "actor", "from": 4096, "to": 2048, "step": 2, "rank": 0, "error": said},
    ]
    command = read_json(run_dir / "manifest.json")["command"]
    assert command.endswith(
        " trial_name=null actor.mb_spec.max_tokens_per_mb=2048 ref.mb_spec.max_tokens_per_mb=8192"
    )
    lines = capsys.readouterr().out.splitlines()
    first = "rank 1 ran out of memory with 8,192 tokens a micro-batch; going on from the start with 4,096 (1 of 3)"
    second = "rank 0 ran out of memory with 4,096 tokens a micro-batch; going on from the start with 2,048 (2 of 3)"
    assert [line for line in lines if "ran out" in line] == [first, second]
    assert "--- attempt 3" in (run_dir / "logs" / "rank-0.log").read_text()
    assert not (tmp(run_dir) / ".cache" / "phase_seconds.json").exists()


def test_a_new_attempt_begins_before_the_first_step(make_run):
    run_dir = make_run({"0": [["attempts", broken(), []]]}, num_ranks=1, num_samples=0)
    assert supervise(run_dir, **MODULES) == 0
    assert read_status(run_dir)["step"] == 0
    assert metrics.read_metrics(run_dir) == []


def test_three_halvings_at_most(make_run):
    run_dir = make_run({"0": broken()}, num_ranks=1)
    assert supervise(run_dir, **MODULES) == 1
    status = read_status(run_dir)
    assert (status["state"], status["attempt"]) == ("failed", 4)
    assert status["message"] == (
        "rank 0: RuntimeError: not enough memory (logs/rank-0.log); given up after 3 halvings"
    )
    assert [entry["to"] for entry in read_json(run_dir / "budget.json")["halvings"]] == [4096, 2048, 1024]


def test_below_the_longest_pair_there_is_nothing_to_halve(make_run):
    run_dir = make_run({"0": broken(SETTLED | {"longest_pair": 5000})}, num_ranks=1)
    assert supervise(run_dir, **MODULES) == 1
    status = read_status(run_dir)
    assert status["attempt"] == 2
    assert status["message"] == (
        "rank 0 ran out of memory, and the longest pair alone (5,000 tokens) does not fit;"
        " lower train_dataset.max_length = 2048 (logs/rank-0.log)"
    )


def test_memory_that_micro_batches_do_not_take_is_no_reason_to_halve(make_run):
    run_dir = make_run({"0": broken(where={"section": None, "step": None})}, num_ranks=1)
    assert supervise(run_dir, **MODULES) == 1
    status = read_status(run_dir)
    assert (status["attempt"], status["message"]) == (
        1,
        "rank 0: RuntimeError: not enough memory (logs/rank-0.log)",
    )
    assert read_json(run_dir / "budget.json")["halvings"] == []


def test_a_run_that_is_being_stopped_is_not_started_again(make_run):
    asked = [["budget", SETTLED], ["deaf"], ["train", 2, 0.02], ["sleep", 1.5], ["out of memory", FULL]]
    run_dir = make_run({"0": asked}, num_ranks=1)

    def stop():
        until(lambda: steps(run_dir) >= 2)
        request_stop(run_dir, "stopped")

    thread = threading.Thread(target=stop)
    thread.start()
    supervise(run_dir, **MODULES)
    thread.join()
    assert read_status(run_dir)["attempt"] == 1
    assert read_json(run_dir / "budget.json")["halvings"] == []


# ---------------------------------------------------------------- starting again, and ranks that hang


def test_a_killed_rank_goes_on_from_the_last_checkpoint(make_run, capsys):
    first = [["train", 2, 0.02], ["checkpoint", 2], ["train", 3, 0.02]]
    others = [["deaf"], ["sleep", 600]]
    run_dir = make_run(
        {
            "0": [["attempts", [*first, ["sleep", 600]], [["train", 4, 0.02]]]],
            "1": [["attempts", [["sleep", 1.0], ["kill", 9]], others[:0]]],
        },
        num_samples=0,
        recover="auto",
    )
    assert supervise(run_dir, foreground=True, lines=Lines(run_dir), **MODULES) == 0
    status = read_status(run_dir)
    assert (status["state"], status["attempt"], status["step"]) == ("done", 2, 4)
    told = [line for line in capsys.readouterr().out.splitlines() if "going on" in line]
    assert told == [
        "rank 1: ended from outside by SIGKILL (out of memory?) (logs/rank-1.log); going on from checkpoint step-2"
        " (failure 1, 2 in a row are allowed)"
    ]
    # What was recorded is cut by the ranks, which load the checkpoint; here nobody did.
    assert steps(run_dir) == 2 + 3 + 4


def test_a_crash_loop_ends_and_says_where(make_run):
    run_dir = make_run({"0": [["train", 3, 0.02], ["sleep", 0.3], ["kill", 9]]}, num_ranks=1, recover="auto")
    assert supervise(run_dir, **MODULES) == 1
    status = read_status(run_dir)
    assert (status["state"], status["attempt"]) == ("failed", 3)
    assert status["message"].endswith("; given up after 3 failures in a row at step 3")


def test_a_new_step_begins_the_count_anew(make_run):
    def attempt(number):
        return [["train", number, 0.02], ["checkpoint", number], ["sleep", 0.3], ["kill", 9]]

    run_dir = make_run(
        {"0": [["attempts", *(attempt(number) for number in (1, 2, 3, 4)), []]]}, num_ranks=1, recover="auto"
    )
    assert supervise(run_dir, **MODULES) == 0
    assert read_status(run_dir)["attempt"] == 5


def test_a_users_mistake_is_not_tried_again(make_run):
    run_dir = make_run({"0": [["raise", "DataError", "bad"]]}, num_ranks=1, recover="auto")
    assert supervise(run_dir, **MODULES) == 2
    assert read_status(run_dir)["attempt"] == 1


TRAINING = ["progress", {"phase": "training", "done": 4, "total": 9}]


def test_a_rank_that_hangs_is_named_with_its_stack(make_run):
    run_dir = make_run({"0": [TRAINING, ["wait"]], "1": [["hang"]]}, timeout_s=1.0)
    assert supervise(run_dir, **MODULES) == 1
    message = read_status(run_dir)["message"]
    assert message.startswith("rank 1: hangs in hang (fake_run.py:")
    assert "nothing moved for 1 s in phase 'training'" in message
    assert "in hang" in (run_dir / "logs" / "rank-1.log").read_text()
    assert living(run_dir) == []


def test_a_rank_that_was_stopped_is_named(make_run):
    run_dir = make_run({"0": [["kill", 19]], "1": [TRAINING, ["wait"]]}, timeout_s=1.0)
    assert supervise(run_dir, **MODULES) == 1
    message = read_status(run_dir)["message"]
    assert message.startswith("rank 0: does not answer (stopped, or stuck in the system)")
    assert living(run_dir) == []


def test_slow_phases_without_steps_are_not_taken_for_hangs(make_run):
    for phase in ("load model", "checkpoint", "export"):
        run_dir = make_run([["progress", {"phase": phase}], ["sleep", 1.5]], timeout_s=0.5, num_samples=0)
        assert supervise(run_dir, **MODULES) == 0
        shutil.rmtree(run_dir)
