"""The run folder on disk."""

from __future__ import annotations

import json
import random
import threading
import time

import pytest

from dpo_kit.errors import UserError
from dpo_kit.records import metrics, run_folder
from dpo_kit.records import status as records_status
from dpo_kit.system import files
from dpo_kit.system.processes import identify


@pytest.fixture
def run_dir(tmp_path):
    return run_folder.create(tmp_path / "runs", "exp", "one", config_text="seed: 1\n", manifest={"seed": 1})


def test_create_writes_a_queued_run(run_dir):
    assert (run_dir / "config.yaml").read_text() == "seed: 1\n"
    assert json.loads((run_dir / "manifest.json").read_text()) == {"seed": 1}
    assert records_status.read_status(run_dir)["state"] == "queued"
    assert (run_dir / "logs").is_dir()


def test_create_refuses_a_name_that_exists(run_dir, tmp_path):
    with pytest.raises(UserError, match=r"trial_name = 'one': .* exists"):
        run_folder.create(tmp_path / "runs", "exp", "one", config_text="", manifest={})


@pytest.mark.parametrize(
    "name",
    ["", " a", "a ", "..", ".hidden", "../x", "/abs", "a/b", "a\\b", "a\nb", "-x", "~x", "a\x00b", "x" * 201],
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    for experiment, trial in [("exp", name), (name, "one")]:
        with pytest.raises(UserError, match=r"_name = "):
            run_folder.create(tmp_path / "runs", experiment, trial, config_text="", manifest={})
    assert not (tmp_path / "runs" / "exp").exists()


def test_odd_but_harmless_names_are_allowed(tmp_path):
    for name in ["beta 0.1", "<b>x", "测试", "a.b"]:
        assert run_folder.create(tmp_path, "exp", name, config_text="", manifest={}).name == name


def test_linked_folders_are_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "exp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"experiment_name: .* is a link"):
        run_folder.create(tmp_path / "runs", "exp", "one", config_text="", manifest={})
    (tmp_path / "runs" / "real").mkdir()
    (tmp_path / "runs" / "real" / "one").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"trial_name: .* is a link"):
        run_folder.create(tmp_path / "runs", "real", "one", config_text="", manifest={})
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_failing_create_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(records_status, "reset_status", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_folder.create(tmp_path / "runs", "exp", "one", config_text="", manifest={})
    assert list(tmp_path.iterdir()) == []


def test_fresh_names_are_readable_and_sort_by_time(tmp_path):
    first = run_folder.create(tmp_path, "exp", None, config_text="", manifest={})
    time.sleep(1.1)
    second = run_folder.create(tmp_path, "exp", None, config_text="", manifest={})
    assert first.name < second.name
    assert first.name.count("-") == 6
    assert first.name[10] == "_"
    assert run_folder.list_runs(tmp_path) == [first, second]
    assert (
        run_folder.fresh_trial_name(random.Random(1))[20:]
        == run_folder.fresh_trial_name(random.Random(1))[20:]
    )


def test_list_runs_skips_what_is_no_run(run_dir, tmp_path):
    root = tmp_path / "runs"
    (root / ".cache" / "pairs").mkdir(parents=True)
    (root / "exp" / "half").mkdir()
    (root / "file.txt").write_text("x")
    (root / "exp" / "link").symlink_to(run_dir)
    assert run_folder.list_runs(root) == [run_dir]
    assert run_folder.list_runs(tmp_path / "missing") == []


def test_status_changes_keep_the_other_fields(run_dir):
    records_status.update_status(run_dir, state="running", step=3)
    records_status.update_status(run_dir, step=4)
    status = records_status.read_status(run_dir)
    assert (status["state"], status["step"]) == ("running", 4)


def test_progress_clocks_each_phase(run_dir, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_folder.time, "time", lambda: now[0])
    records_status.write_progress(run_dir, phase="reference pass", done=0, total=8, expected_s=60.0)
    now[0] = 107.0
    records_status.write_progress(run_dir, phase="reference pass", done=4, total=8)
    progress = files.read_json(run_dir / "progress.json")
    assert (progress["started_at"], progress["expected_s"], progress["done"]) == (100.0, 60.0, 4)
    records_status.write_progress(run_dir, phase="training", done=1, total=5)
    now[0] = 110.0
    records_status.write_progress(run_dir, phase="evaluation")
    now[0] = 111.0
    records_status.write_progress(run_dir, phase="training", done=2, total=5)
    now[0] = 114.0
    records_status.write_progress(run_dir, phase="export")
    progress = files.read_json(run_dir / "progress.json")
    assert progress["phases"] == [
        {"name": "reference pass", "seconds": 7.0, "times": 1},
        {"name": "training", "seconds": 6.0, "times": 2},
        {"name": "evaluation", "seconds": 1.0, "times": 1},
    ]
    assert (progress["step"], progress["total_steps"]) == (2, 5)


def test_metrics_turn_undefined_numbers_into_null(run_dir):
    import numpy as np

    metrics.append_metrics(
        run_dir, {"step": 1, "dpo/loss": float("nan"), "lr": float("inf"), "n": np.float64(2.5)}
    )
    assert metrics.read_metrics(run_dir) == [{"step": 1, "dpo/loss": None, "lr": None, "n": 2.5}]


def test_a_torn_tail_is_skipped_and_cut(run_dir):
    path = run_dir / "metrics.jsonl"
    metrics.append_metrics(run_dir, {"step": 1})
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "dpo/l')
    assert metrics.read_metrics(run_dir) == [{"step": 1}]
    metrics.append_metrics(run_dir, {"step": 2})
    assert metrics.read_metrics(run_dir) == [{"step": 1}, {"step": 2}]
    path.write_bytes(b'{"st')
    metrics.append_metrics(run_dir, {"step": 1})
    assert metrics.read_metrics(run_dir) == [{"step": 1}]


def test_a_broken_line_in_the_middle_is_named(run_dir):
    (run_dir / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is not JSON"):
        metrics.read_metrics(run_dir)


def test_readers_never_see_half_a_status(run_dir):
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            seen.append(records_status.read_status(run_dir)["message"])

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(200):
        records_status.update_status(run_dir, message=str(number) * 2000)
    stop.set()
    thread.join()
    assert len(seen) > 5
    assert not list(run_dir.glob(".*.tmp"))


def test_the_first_request_to_stop_stands(run_dir):
    assert records_status.stop_requested(run_dir) is None
    records_status.request_stop(run_dir, "preempted")
    records_status.request_stop(run_dir, "stopped")
    assert records_status.stop_requested(run_dir) == "preempted"
    records_status.clear_stop(run_dir)
    assert records_status.stop_requested(run_dir) is None


def test_the_earliest_error_comes_first(run_dir):
    boom = ValueError("boom\nmore")
    boom.data_rows = (17, 4)
    records_status.write_rank_error(run_dir, 1, boom)
    time.sleep(0.01)
    records_status.write_rank_error(run_dir, 0, RuntimeError("peer closed the connection"))
    records_status.write_rank_error(run_dir, "prepare", UserError("train.jsonl: empty"))
    errors = records_status.read_rank_errors(run_dir)
    assert [error["rank"] for error in errors] == [1, 0, "prepare"]
    assert (errors[0]["error"], errors[0]["rows"]) == ("ValueError: boom", [17, 4])
    assert (errors[2]["error"], errors[2]["user_mistake"]) == ("train.jsonl: empty", True)


def test_a_run_without_its_supervisor_has_failed(run_dir):
    assert records_status.is_live(records_status.read_status(run_dir))
    records_status.update_status(run_dir, state="running", supervisor=identify())
    assert records_status.is_live(records_status.read_status(run_dir))
    gone = {**identify(), "create_time": 1.0}
    status = records_status.update_status(run_dir, supervisor=gone)
    assert not records_status.is_live(status)
    assert records_status.effective(status)["state"] == "failed"
    assert "ended without a word" in records_status.effective(status)["message"]
    never = {**records_status.reset_status(run_dir), "updated_at": time.time() - 100}
    assert "never started" in records_status.effective(never)["message"]
    assert records_status.effective(records_status.update_status(run_dir, state="done"))["state"] == "done"


def test_a_run_of_another_machine_lives_by_its_heartbeat(run_dir):
    status = records_status.update_status(
        run_dir, state="running", supervisor={"pid": 1, "host": "elsewhere"}
    )
    assert records_status.is_live(status)
    assert not records_status.is_live({**status, "updated_at": time.time() - 100})


def test_what_an_attempt_had_made_is_set_aside(run_dir):
    for number in (1, 2):
        metrics.append_metrics(run_dir, {"step": number})
        (run_dir / "logs" / "rank-0.log").write_text("x")
        (run_dir / "model").mkdir()
        (run_dir / "model" / "weights").write_text(str(number))
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        assert run_folder.clear(run_dir) == f"what it had made is kept in earlier/attempt-{number}"
        aside = run_dir / "earlier" / f"attempt-{number}"
        assert sorted(path.name for path in aside.iterdir()) == ["logs", "metrics.jsonl", "model"]
        assert (aside / "model" / "weights").read_text() == str(number)
    left = ["checkpoints", "config.yaml", "earlier", "logs", "manifest.json", "status.json"]
    assert sorted(path.name for path in run_dir.iterdir()) == left


def test_what_is_not_worth_keeping_is_removed(run_dir):
    (run_dir / "logs" / "rank-0.log").write_text("x")
    (run_dir / "progress.json").write_text("{}")
    assert run_folder.clear(run_dir) == ""
    left = ["config.yaml", "logs", "manifest.json", "status.json"]
    assert sorted(path.name for path in run_dir.iterdir()) == left


@pytest.mark.parametrize(
    "text",
    [
        *["", "[]", "null", "{}", "3", '"x"', '{"state": "on"}', '{"state": "done", "step": "x"}'],
        *['{"state": "running", "supervisor": "x"}', '{"state": "running", "created_at": 1e300}'],
        *[
            '{"state": "done", "created_at": NaN}',
            '{"state": "done", "phases": 3}',
            '{"state": "done", "phases": [3]}',
        ],
    ],
)
def test_a_damaged_status_is_that_of_a_failed_run(run_dir, text):
    (run_dir / "status.json").write_text(text)
    status = records_status.effective(records_status.read_status(run_dir))
    assert status["state"] == "failed"
    assert "status.json" in status["message"]
    assert records_status.reset_status(run_dir)["state"] == "queued"
    assert records_status.read_status(run_dir)["attempt"] == 1


def test_lines_that_are_no_records_are_set_aside_when_a_run_goes_on(run_dir):
    good = [{"step": 1, "dpo/loss": 0.7}, {"step": 3, "dpo/loss": 0.5}]
    lines = [json.dumps(good[0]), "{garbage", "[1]", '{"loss": 1}', json.dumps(good[1]), '{"step": 4}']
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run_dir / "evaluations").mkdir()
    (run_dir / "evaluations" / "step-4-Copy1.jsonl").write_text("")  # JupyterLab's Duplicate
    assert metrics.readable_metrics(run_dir) == [*good, {"step": 4}]
    with pytest.raises(UserError, match="line 2 is not JSON"):
        metrics.read_metrics(run_dir)
    notes = metrics.cut_records(run_dir, 3)
    assert "line 2 is not JSON and so are 2 more; the run goes on without" in notes[0]
    assert notes[1] == "metrics.jsonl has no line of 1 of the 3 steps, the first of them 2"
    assert metrics.read_metrics(run_dir) == good
    assert "{garbage" in (run_dir / "metrics.jsonl.damaged").read_text()


def test_an_evaluation_that_is_owed_is_not_there_twice(run_dir):
    for record in ({"step": 1, "dpo/loss": 0.7}, {"step": 1, "dpo-eval/loss": 0.6}):
        metrics.append_metrics(run_dir, record)
    assert metrics.cut_records(run_dir, 1) == []
    assert len(metrics.read_metrics(run_dir)) == 2
    assert metrics.cut_records(run_dir, 1, owes_evaluation=True) == []
    assert metrics.read_metrics(run_dir) == [{"step": 1, "dpo/loss": 0.7}]


def test_a_folder_without_a_run_in_it_is_taken(tmp_path):
    """What a launcher of an older version left when it was killed at once."""
    (tmp_path / "exp" / "one").mkdir(parents=True)
    run_folder.create(tmp_path, "exp", "one", config_text="", manifest={})
    assert records_status.read_status(tmp_path / "exp" / "one")["state"] == "queued"
    (tmp_path / "exp" / "two").write_text("a file")
    with pytest.raises(UserError, match=r"trial_name = 'two': .* exists"):
        run_folder.create(tmp_path, "exp", "two", config_text="", manifest={})
    assert sorted(path.name for path in (tmp_path / "exp").iterdir()) == ["one", "two"]


def test_a_run_that_cannot_be_filled_leaves_nothing(tmp_path):
    def fill(folder):
        raise KeyError

    with pytest.raises(KeyError):
        run_folder.create(tmp_path / "runs", "exp", "one", config_text="", manifest={}, fill=fill)
    assert list(tmp_path.iterdir()) == []


def test_records_are_cut_back_to_a_step(run_dir):
    for step in (0, 1, 2, 2, 3):
        metrics.append_metrics(run_dir, {"step": step, "dpo/loss": 0.5})
    (run_dir / "evaluations").mkdir()
    for step in (0, 2, 3):
        (run_dir / "evaluations" / f"step-{step}.jsonl").write_text("")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "dpo/lo')
    metrics.cut_records(run_dir, 2)
    assert [line["step"] for line in metrics.read_metrics(run_dir)] == [0, 1, 2, 2]
    assert (run_dir / "metrics.jsonl").read_text().endswith("}\n")
    assert sorted(path.name for path in (run_dir / "evaluations").iterdir()) == [
        "step-0.jsonl",
        "step-2.jsonl",
    ]
    metrics.cut_records(run_dir, 0)
    assert metrics.read_metrics(run_dir) == []
