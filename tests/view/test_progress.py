"""Where a run is, in words."""

from __future__ import annotations

import pytest

from dpo_kit.records import durations, metrics
from dpo_kit.records.status import write_rank_error
from dpo_kit.supervise.restarts import child_failure, rank_failure
from dpo_kit.system.files import last_line, read_json
from dpo_kit.view import progress


def status(**fields):
    base = {
        "state": "running",
        "created_at": 90.0,
        "phase": "training",
        "phase_started_at": 100.0,
        "phases": [],
    }
    return {**base, **fields}


def test_expected_seconds_follow_the_count():
    """4 of 16 steps in 20 s, so 12 more take 60 s: 80 s in all."""
    counted = status(phase_done=4, phase_total=16)
    assert progress.timing(counted, now=120.0) == (20.0, 80.0, "count")
    assert progress.share_done(counted) == 0.25


def test_training_counts_its_turns_before_an_evaluation():
    """10 steps took 50 s, then an evaluation; since then 2 steps in 10 s, and 8 are left at 5 s each."""
    again = status(
        phase_done=12,
        phase_total=20,
        phase_started_done=10,
        phases=[{"name": "training", "seconds": 50.0}, {"name": "evaluation", "seconds": 7.0}],
    )
    assert progress.timing(again, now=110.0) == (60.0, 100.0, "count")


def test_without_a_count_the_expectation_is_a_memory_or_a_stated_guess():
    guess = status(phase="load model", phase_expected_s=30.0, phase_expected_from="guess")
    assert progress.timing(guess, now=112.0) == (12.0, 30.0, "guess")
    assert progress.share_done(guess, now=112.0) == pytest.approx(0.4)
    known = status(phase="load model", phase_expected_s=10.0, phase_expected_from="earlier run")
    assert progress.timing(known, now=112.0) == (12.0, 10.0, "earlier run")
    assert progress.share_done(known, now=112.0) == 0.99
    unknown = status(phase="load model")
    assert progress.timing(unknown, now=112.0) == (12.0, None, "")
    assert progress.share_done(unknown, now=112.0) == 0.0


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"phase_done": 4, "phase_total": 16}, "training: step 4/16, 20 s of about 80 s"),
        ({"phase": "reference pass", "phase_total": 9}, "reference pass: 0/9, 20 s"),
        (
            {"phase": "export", "phase_expected_s": 30.0, "phase_expected_from": "guess"},
            "export: 20 s of about 30 s, a guess",
        ),
        ({"phase": "export", "phase_expected_s": 5.0}, "export: 20 s, longer than the expected 5 s"),
        ({"phase": None, "state": "queued"}, "starting the supervisor: 30 s"),
        ({"state": "failed", "message": "rank 1: boom"}, "failed: rank 1: boom"),
        ({"state": "done", "started_at": 100.0, "ended_at": 195.2}, "done after 95 s"),
    ],
)
def test_one_line_tells_the_phase(fields, line):
    assert progress.describe(status(**fields), now=120.0) == line


def test_seconds_of_a_run_are_expected_of_the_next_one_like_it(tmp_path):
    phases = [
        {"name": "load model", "seconds": 4.0, "times": 1},
        {"name": "training", "seconds": 60.0, "times": 3},
        {"name": "evaluation", "seconds": 9.0, "times": 3},
    ]
    assert durations.expected_seconds(tmp_path, "tiny") == {}
    durations.remember_seconds(tmp_path, "tiny", phases)
    durations.remember_seconds(tmp_path, "other", phases[:1])
    durations.remember_seconds(tmp_path, "tiny", [{"name": "load model", "seconds": 5.0}])
    assert durations.expected_seconds(tmp_path, "tiny") == {
        "load model": 5.0,
        "training": 60.0,
        "evaluation": 3.0,
    }
    assert durations.expected_seconds(tmp_path, "other") == {"load model": 4.0}


@pytest.mark.parametrize("text", ["{", "[]", '{"tiny": {"load model": "x"}}', "null"])
def test_a_damaged_memory_is_no_memory(tmp_path, text):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "phase_seconds.json").write_text(text)
    assert durations.expected_seconds(tmp_path, "tiny") == {}
    durations.remember_seconds(tmp_path, "tiny", [{"name": "export", "seconds": 1.0}])
    assert read_json(tmp_path / ".cache" / "phase_seconds.json")["tiny"]["export"] == 1.0


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(progress.time, "time", lambda: self.now)


def test_lines_come_within_2_s_and_then_at_least_every_5(tmp_path, monkeypatch):
    clock, told = Clock(monkeypatch), []
    lines = progress.Lines(tmp_path, lambda text: told.append((clock.now - 1000.0, text)))
    for _ in range(200):
        clock.now += 0.1
        lines.update(status(phase=None, state="queued", created_at=1000.0))
    times = [at for at, _ in told]
    assert times[0] < 2.0
    assert max(b - a for a, b in zip(times, [*times[1:], 20.0], strict=True)) < 5.0


def test_lines_tell_each_tenth_of_the_steps_and_each_phase_that_ended(tmp_path, monkeypatch):
    clock, told = Clock(monkeypatch), []
    lines = progress.Lines(tmp_path, told.append)
    lines.update(status(phase="reference pass", phase_started_at=1000.0))
    clock.now += 1.0
    phases = [{"name": "reference pass", "seconds": 1.0}]
    for step in range(100):
        metrics.append_metrics(tmp_path, {"step": step + 1, "dpo/loss": 0.5, "dpo/reward_accuracy": None})
        clock.now += 0.01
        lines.update(status(phase_started_at=1001.0, phase_done=step + 1, phase_total=100, phases=phases))
    assert told[1] == "reference pass: done in 1.0 s"
    steps = [line for line in told if line.startswith("training: step ")]
    assert [line.split()[2].rstrip(",") for line in steps] == ["1/100", *(f"{k}0/100" for k in range(1, 11))]
    assert steps[-1].endswith("; step 100: loss 0.5000")


def test_lines_are_not_spoiled_by_evaluations_between_steps(tmp_path, monkeypatch):
    clock, told = Clock(monkeypatch), []
    lines = progress.Lines(tmp_path, told.append)
    lines.update(status(phase_done=5, phase_total=10))
    clock.now += 1
    lines.update(status(phase="evaluation", phases=[{"name": "training", "seconds": 9.0}]))
    clock.now += 3
    turns = [{"name": "training", "seconds": 9.0}, {"name": "evaluation", "seconds": 3.0}]
    lines.update(status(phase_done=5, phase_total=10, phase_started_done=5, phases=turns))
    assert [line.split(":")[0] for line in told] == [
        "training",
        "training",
        "evaluation",
        "evaluation",
        "training",
    ]
    assert (told[1], told[3]) == ("training: done in 9.0 s", "evaluation: done in 3.0 s")


def test_the_last_training_record_is_read_from_the_end(tmp_path):
    assert metrics.last_record(tmp_path) is None
    for step in range(1, 400):
        metrics.append_metrics(tmp_path, {"step": step, "dpo/loss": 0.5, "note": "x" * 100})
    metrics.append_metrics(tmp_path, {"step": 399, "dpo-eval/loss": 0.1})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 400, "dpo/lo')
    assert metrics.last_record(tmp_path)["step"] == 399


# ---------------------------------------------------------------- failures


def test_the_last_line_of_a_log_is_short_and_not_empty(tmp_path):
    log = tmp_path / "x.log"
    assert last_line(log) == ""
    log.write_bytes(b"first\n" + b"y" * 20000 + b"\nlast \xff words\n\n  \n")
    assert last_line(log) == "last � words"
    log.write_text("z" * 1000)
    assert last_line(log) == "z" * 300


def test_stopped_ranks_are_no_failure(tmp_path):
    (tmp_path / "logs").mkdir()
    assert rank_failure(tmp_path, [0, 0], stopping=False) is None
    assert rank_failure(tmp_path, [3, 3], stopping=True) is None
    # ended while they imported torch, or killed after the grace: what their peers say is no cause
    assert rank_failure(tmp_path, [-15, 1], stopping=True) is None
    assert rank_failure(tmp_path, [None, 1], stopping=True) is None
    # but a rank that fails while it saves has not saved
    write_rank_error(tmp_path, 0, OSError("disk full"))
    assert (
        rank_failure(tmp_path, [1, 3], stopping=True).message
        == "rank 0: OSError: disk full (logs/rank-0.log)"
    )


def test_a_failure_names_the_row(tmp_path):
    error = FloatingPointError("loss is nan")
    error.data_rows = (17,)
    write_rank_error(tmp_path, 1, error)
    told = rank_failure(tmp_path, [None, 1], stopping=False)
    assert told.message == "rank 1: FloatingPointError: loss is nan, data row 17 (logs/rank-1.log)"
    assert told.mistake is False
    error.data_rows = tuple(range(10))
    write_rank_error(tmp_path, 1, error)
    told = rank_failure(tmp_path, [None, 1], stopping=False)
    assert ", data rows 0, 1, 2, 3, 4, 5, 6, 7 and 2 more (" in told.message


def test_a_child_without_words_is_told_by_its_end(tmp_path):
    (tmp_path / "logs").mkdir()
    assert child_failure(tmp_path, "samples", 1).message == (
        "samples: ended with status 1 without a word (logs/samples.log)"
    )
    assert "ended from outside by SIGSEGV" in child_failure(tmp_path, "samples", -11).message


def test_saving_between_steps_is_told_only_when_it_is_slow(tmp_path, monkeypatch):
    clock, told = Clock(monkeypatch), []
    lines = progress.Lines(tmp_path, told.append)
    for step in range(100):
        clock.now += 0.01
        seconds = 0.01 * step
        phases = [{"name": "training", "seconds": seconds}, {"name": "checkpoint", "seconds": seconds}]
        lines.update(status(phase_done=step + 1, phase_total=100, phases=phases))
        lines.update(status(phase="checkpoint", phase_done=0, phase_total=None, phases=phases))
    assert [line.split(":")[0] for line in told] == ["training"] * 11
    clock.now += 5.0
    lines.update(status(phase="checkpoint", phase_done=0, phase_total=None))
    assert told[-1].startswith("checkpoint: ")
    lines.finish(status(state="done", phases=[{"name": "checkpoint", "seconds": 6.0}], ended_at=1006.0))
    assert "checkpoint: done in 6.0 s" in told
