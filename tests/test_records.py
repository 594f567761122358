"""The run folder on disk."""

from __future__ import annotations

import json
import random
import threading
import time

import pytest

from dpo_kit import records
from dpo_kit.errors import UserError
from dpo_kit.processes import identify


@pytest.fixture
def run_dir(tmp_path):
    return records.create(tmp_path / "runs", "exp", "one", config_text="seed: 1\n", manifest={"seed": 1})


def test_create_writes_a_queued_run(run_dir):
    assert (run_dir / "config.yaml").read_text() == "seed: 1\n"
    assert json.loads((run_dir / "manifest.json").read_text()) == {"seed": 1}
    assert records.read_status(run_dir)["state"] == "queued"
    assert (run_dir / "logs").is_dir()


def test_create_refuses_a_name_that_exists(run_dir, tmp_path):
    with pytest.raises(UserError, match=r"trial_name = 'one': .* exists"):
        records.create(tmp_path / "runs", "exp", "one", config_text="", manifest={})


@pytest.mark.parametrize(
    "name",
    ["", " a", "a ", "..", ".hidden", "../x", "/abs", "a/b", "a\\b", "a\nb", "-x", "~x", "a\x00b", "x" * 201],
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    for experiment, trial in [("exp", name), (name, "one")]:
        with pytest.raises(UserError, match=r"_name = "):
            records.create(tmp_path / "runs", experiment, trial, config_text="", manifest={})
    assert not (tmp_path / "runs" / "exp").exists()


def test_odd_but_harmless_names_are_allowed(tmp_path):
    for name in ["beta 0.1", "<b>x", "测试", "a..b"]:
        assert records.create(tmp_path, "exp", name, config_text="", manifest={}).name == name


def test_linked_folders_are_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "exp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"experiment_name: .* is a link"):
        records.create(tmp_path / "runs", "exp", "one", config_text="", manifest={})
    (tmp_path / "runs" / "real").mkdir()
    (tmp_path / "runs" / "real" / "one").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"trial_name: .* is a link"):
        records.create(tmp_path / "runs", "real", "one", config_text="", manifest={})
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_failing_create_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "reset_status", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        records.create(tmp_path / "runs", "exp", "one", config_text="", manifest={})
    assert list(tmp_path.iterdir()) == []


def test_fresh_names_are_readable_and_sort_by_time(tmp_path):
    first = records.create(tmp_path, "exp", None, config_text="", manifest={})
    time.sleep(1.1)
    second = records.create(tmp_path, "exp", None, config_text="", manifest={})
    assert first.name < second.name
    assert first.name.count("-") == 6
    assert first.name[10] == "_"
    assert records.list_runs(tmp_path) == [first, second]
    assert records.fresh_trial_name(random.Random(1))[20:] == records.fresh_trial_name(random.Random(1))[20:]


def test_list_runs_skips_what_is_no_run(run_dir, tmp_path):
    root = tmp_path / "runs"
    (root / ".cache" / "pairs").mkdir(parents=True)
    (root / "exp" / "half").mkdir()
    (root / "file.txt").write_text("x")
    (root / "exp" / "link").symlink_to(run_dir)
    assert records.list_runs(root) == [run_dir]
    assert records.list_runs(tmp_path / "missing") == []


def test_status_changes_keep_the_other_fields(run_dir):
    records.update_status(run_dir, state="running", step=3)
    records.update_status(run_dir, step=4)
    status = records.read_status(run_dir)
    assert (status["state"], status["step"]) == ("running", 4)


def test_progress_clocks_each_phase(run_dir, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(records.time, "time", lambda: now[0])
    records.write_progress(run_dir, phase="reference pass", done=0, total=8, expected_s=60.0)
    now[0] = 107.0
    records.write_progress(run_dir, phase="reference pass", done=4, total=8)
    progress = records.read_json(run_dir / "progress.json")
    assert (progress["started_at"], progress["expected_s"], progress["done"]) == (100.0, 60.0, 4)
    records.write_progress(run_dir, phase="training", done=1, total=5)
    now[0] = 110.0
    records.write_progress(run_dir, phase="evaluation")
    now[0] = 111.0
    records.write_progress(run_dir, phase="training", done=2, total=5)
    now[0] = 114.0
    records.write_progress(run_dir, phase="export")
    progress = records.read_json(run_dir / "progress.json")
    assert progress["phases"] == [
        {"name": "reference pass", "seconds": 7.0, "times": 1},
        {"name": "training", "seconds": 6.0, "times": 2},
        {"name": "evaluation", "seconds": 1.0, "times": 1},
    ]
    assert (progress["step"], progress["total_steps"]) == (2, 5)


def test_metrics_turn_undefined_numbers_into_null(run_dir):
    import numpy as np

    records.append_metrics(
        run_dir, {"step": 1, "dpo/loss": float("nan"), "lr": float("inf"), "n": np.float64(2.5)}
    )
    assert records.read_metrics(run_dir) == [{"step": 1, "dpo/loss": None, "lr": None, "n": 2.5}]


def test_a_torn_tail_is_skipped_and_cut(run_dir):
    path = run_dir / "metrics.jsonl"
    records.append_metrics(run_dir, {"step": 1})
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "dpo/l')
    assert records.read_metrics(run_dir) == [{"step": 1}]
    records.append_metrics(run_dir, {"step": 2})
    assert records.read_metrics(run_dir) == [{"step": 1}, {"step": 2}]
    path.write_bytes(b'{"st')
    records.append_metrics(run_dir, {"step": 1})
    assert records.read_metrics(run_dir) == [{"step": 1}]


def test_a_broken_line_in_the_middle_is_named(run_dir):
    (run_dir / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is not JSON"):
        records.read_metrics(run_dir)


def test_readers_never_see_half_a_status(run_dir):
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            seen.append(records.read_status(run_dir)["message"])

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(200):
        records.update_status(run_dir, message=str(number) * 2000)
    stop.set()
    thread.join()
    assert len(seen) > 5
    assert not list(run_dir.glob(".*.tmp"))


def test_the_first_request_to_stop_stands(run_dir):
    assert records.stop_requested(run_dir) is None
    records.request_stop(run_dir, "preempted")
    records.request_stop(run_dir, "stopped")
    assert records.stop_requested(run_dir) == "preempted"
    records.clear_stop(run_dir)
    assert records.stop_requested(run_dir) is None


def test_the_earliest_error_comes_first(run_dir):
    boom = ValueError("boom\nmore")
    boom.data_rows = (17, 4)
    records.write_rank_error(run_dir, 1, boom)
    time.sleep(0.01)
    records.write_rank_error(run_dir, 0, RuntimeError("peer closed the connection"))
    records.write_rank_error(run_dir, "prepare", UserError("train.jsonl: empty"))
    errors = records.read_rank_errors(run_dir)
    assert [error["rank"] for error in errors] == [1, 0, "prepare"]
    assert (errors[0]["error"], errors[0]["rows"]) == ("ValueError: boom", [17, 4])
    assert (errors[2]["error"], errors[2]["user_mistake"]) == ("train.jsonl: empty", True)


def test_a_run_without_its_supervisor_has_failed(run_dir):
    assert records.is_live(records.read_status(run_dir))
    records.update_status(run_dir, state="running", supervisor=identify())
    assert records.is_live(records.read_status(run_dir))
    gone = {**identify(), "create_time": 1.0}
    status = records.update_status(run_dir, supervisor=gone)
    assert not records.is_live(status)
    assert records.settle(status)["state"] == "failed"
    assert "ended without a word" in records.settle(status)["message"]
    never = {**records.reset_status(run_dir), "updated_at": time.time() - 100}
    assert "never started" in records.settle(never)["message"]
    assert records.settle(records.update_status(run_dir, state="done"))["state"] == "done"


def test_a_run_of_another_machine_lives_by_its_heartbeat(run_dir):
    status = records.update_status(run_dir, state="running", supervisor={"pid": 1, "host": "elsewhere"})
    assert records.is_live(status)
    assert not records.is_live({**status, "updated_at": time.time() - 100})


def test_clear_removes_the_work_and_names_it(run_dir):
    records.append_metrics(run_dir, {"step": 1})
    (run_dir / "logs" / "rank-0.log").write_text("x")
    (run_dir / "checkpoints").mkdir()
    assert records.clear(run_dir) == ["metrics.jsonl", "logs/"]
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "logs",
        "manifest.json",
        "status.json",
    ]


def test_records_are_cut_back_to_a_step(run_dir):
    for step in (0, 1, 2, 2, 3):
        records.append_metrics(run_dir, {"step": step, "dpo/loss": 0.5})
    (run_dir / "evaluations").mkdir()
    for step in (0, 2, 3):
        (run_dir / "evaluations" / f"step-{step}.jsonl").write_text("")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "dpo/lo')
    records.cut_records(run_dir, 2)
    assert [line["step"] for line in records.read_metrics(run_dir)] == [0, 1, 2, 2]
    assert (run_dir / "metrics.jsonl").read_text().endswith("}\n")
    assert sorted(path.name for path in (run_dir / "evaluations").iterdir()) == [
        "step-0.jsonl",
        "step-2.jsonl",
    ]
    records.cut_records(run_dir, 0)
    assert records.read_metrics(run_dir) == []
