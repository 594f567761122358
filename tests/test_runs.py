"""The handle of a run, and lists of runs; over fake processes."""

from __future__ import annotations

import _thread
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest

from dpo_kit import config as config_module
from dpo_kit import launch, runs
from dpo_kit.errors import RunError, UserError
from dpo_kit.records import lock, metrics, run_folder
from dpo_kit.records.status import stop_requested, update_status
from dpo_kit.supervise import start as supervise_start
from dpo_kit.tools import listing
from tests.fakes import LONG
from tests.supervise.test_supervisor import until


@pytest.fixture
def long_run(fakes):
    fakes.play(LONG)
    run = launch.start(fakes.config("trial_name=one"))
    until(lambda: len(metrics.read_metrics(run.dir)) >= 2)
    return run


def finished(fakes, name, state="done", **status):
    """A run folder that needs no process."""
    text = config_module.to_yaml(fakes.config())
    folder = run_folder.create(fakes.fileroot, "exp", name, config_text=text, manifest={})
    update_status(folder, state=state, **status)
    return runs.Run(folder)


def test_a_handle_is_opened_by_its_folder(fakes, long_run):
    run = runs.open(str(long_run.dir))
    assert (run.name, run.state, run.is_live) == ("exp/one", "running", True)
    assert run.status["step"] >= 1
    assert list(run.metrics().columns) == ["step", "dpo/loss", "dpo/reward_accuracy"]
    with pytest.raises(UserError, match="is no run folder"):
        runs.open(fakes.root)


def test_stop_saves_and_another_process_sees_it(long_run):
    assert runs.open(long_run.dir).stop().state == "stopped"
    assert (long_run.dir / "saved").exists()
    with pytest.raises(
        RunError, match=r"exp/one: stopped at step \d+ of 600: as asked, with the state saved"
    ):
        long_run.wait(show=False)
    assert long_run.stop().state == "stopped"


def test_stop_tells_when_it_takes_too_long(fakes):
    fakes.play([["deaf"], ["sleep", 60]])
    run = launch.start(fakes.config("cluster.grace_s=3"))
    until(lambda: len(fakes.pids()) == 3)
    with pytest.raises(TimeoutError, match=r"is still .* after 0.2 s"):
        run.stop(timeout=0.2)
    until(lambda: not run.is_live)
    assert run.state == "stopped"


def test_wait_gives_up_after_its_timeout_and_the_run_goes_on(long_run):
    with pytest.raises(TimeoutError, match=r"exp/one is still training: step "):
        long_run.wait(timeout=0.3, show=False)
    assert long_run.is_live


def test_wait_is_never_silent(fakes, capsys):
    fakes.play([["progress", {"phase": "load model"}], ["sleep", 5.5]])
    launch.start(fakes.config()).wait()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("load model: ")]
    assert lines[0].startswith("load model: 0 s of about 10 s, a guess")
    assert len(lines) == 3
    assert lines[-1].startswith("load model: done in 5.")


def test_resume_starts_an_ended_run_again(fakes, long_run, capsys):
    long_run.stop()
    fakes.play([["train", 2, 0.01]])
    assert runs.open(long_run.dir).resume().wait().state == "done"
    out = capsys.readouterr().out
    anew = r"has no checkpoint and starts anew \(\d of 600 steps\): what it had made is kept in earlier/attempt-1"
    assert re.search(anew, out)
    assert len(metrics.read_metrics(long_run.dir)) == 2
    runs.open(long_run.dir).resume()
    assert "exp/one is done; nothing to resume" in capsys.readouterr().out


def test_resume_leaves_a_live_run_alone(long_run, capsys):
    before = long_run.status["supervisor"]
    long_run.resume()
    assert long_run.status["supervisor"] == before
    assert "is running; nothing to resume" in capsys.readouterr().out


def test_two_processes_cannot_begin_at_once(fakes):
    run = finished(fakes, "one", "failed")
    supervise_start.begin(run.dir)
    with pytest.raises(UserError, match="is being started by another process"):
        supervise_start.begin(run.dir)


def test_a_supervisor_that_cannot_start_is_told(fakes, monkeypatch):
    command = [sys.executable, "-c", "import sys; sys.exit('no such library')"]

    def start(run_dir, owners):
        with open(run_dir / "logs" / "supervisor.log", "wb") as log:
            return subprocess.Popen(command, stderr=log)

    monkeypatch.setattr(supervise_start, "spawn_detached", start)
    run = launch.start(fakes.config())
    with pytest.raises(
        RunError, match=r"its supervisor ended with status 1: no such library \(logs/supervisor.log"
    ):
        run.wait(show=False)


def test_a_killed_supervisor_is_a_failed_run(long_run):
    process = supervise_start._supervisors[long_run.status["supervisor"]["pid"]]
    process.kill()
    process.wait()
    with pytest.raises(RunError, match=r"failed at step .*: its supervisor \(pid \d+\) ended without a word"):
        long_run.wait(show=False)
    assert long_run.resume().state in ("queued", "running")


def test_a_folder_may_be_renamed_and_copied(long_run, fakes):
    long_run.stop()
    moved = long_run.dir.with_name("renamed")
    long_run.dir.rename(moved)
    shutil.copytree(moved, moved.with_name("copy"))
    assert [runs.find(name, fakes.fileroot).state for name in ("renamed", "exp/copy")] == [
        "stopped",
        "stopped",
    ]
    fakes.play([["train", 1, 0.01]])
    assert runs.open(moved).resume().wait(show=False).state == "done"


def test_runs_are_found_by_path_name_and_trial(fakes):
    one, two = finished(fakes, "one"), finished(fakes, "two")
    folder = run_folder.create(fakes.fileroot, "other", "two", config_text="", manifest={})
    assert runs.find("one", fakes.fileroot).dir == one.dir
    assert runs.find("exp/two", fakes.fileroot).dir == two.dir
    assert runs.find(str(two.dir), fakes.root / "elsewhere").dir == two.dir
    with pytest.raises(UserError, match="'two' names 2 runs: exp/two, other/two; give one of them"):
        runs.find("two", fakes.fileroot)
    with pytest.raises(UserError, match=r"'exp/twoo' is no run .*; did you mean 'exp/two'\?"):
        runs.find("exp/twoo", fakes.fileroot)
    assert folder.is_dir()


def test_the_list_is_newest_first_and_survives_a_broken_run(fakes):
    assert listing.list_table(fakes.fileroot) == f"no runs under {fakes.fileroot}"
    finished(fakes, "old", total_steps=9, step=9)
    time.sleep(0.01)
    finished(fakes, "new", "failed", message="rank 1: boom")
    broken = finished(fakes, "broken")
    (broken.dir / "status.json").write_text("{")
    lines = listing.list_table(fakes.fileroot).splitlines()
    assert lines[0].split() == ["run", "state", "step", "started"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["exp/new", "failed"],
        ["exp/old", "done"],
        ["exp/broken", "failed"],
    ]
    assert "rank 1: boom" in lines[1]
    assert "9 of 9" in lines[2]


def test_show_tells_state_figures_and_places(long_run):
    text = listing.show_text(long_run)
    assert "  state    training: step " in text
    assert "dpo/loss 0." in text
    assert f"supervisor {long_run.status['supervisor']['pid']} on " in text
    assert f"  stop     dpo-kit runs stop {long_run.dir}" in text
    long_run.stop()
    text = listing.show_text(long_run)
    assert "  state    stopped after " in text
    assert "s: as asked, with the state saved\n" in text
    assert f"  next     to start anew (it has no checkpoint): dpo-kit runs resume {long_run.dir}" in text


def test_only_an_ended_run_is_removed_and_only_when_told(long_run, fakes, capsys):
    with pytest.raises(UserError, match="exp/one is running; stop it first"):
        runs.remove(long_run, yes=True)
    long_run.stop()
    assert runs.remove(long_run) is False
    assert "MiB) would be removed; add --yes" in capsys.readouterr().out
    assert runs.remove(long_run, yes=True) is True
    assert not long_run.dir.exists()


def test_markup_in_names_and_messages_stays_text(fakes):
    payload = "<img src=x onerror=alert(1)>"
    run = finished(fakes, payload, "failed", message=payload, samples=payload)
    html = run._repr_html_()
    assert "<img" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") >= 3


def interrupt_soon():
    threading.Timer(0.3, _thread.interrupt_main).start()


def test_an_interrupted_wait_ends_a_run_of_this_process(long_run, capsys):
    """This process lives on, so that it is not the supervisor that ends the run for want of its owner."""
    interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        long_run.wait()
    assert "interrupted: exp/one saves and ends" in capsys.readouterr().out
    until(lambda: not long_run.is_live)
    assert long_run.state == "preempted"


def test_an_interrupted_wait_of_somebody_elses_run_does_not_stop_it(fakes, capsys):
    """Opened by another process, a headless run belongs to the one that started it."""
    run = finished(fakes, "one", "running", owner={"kind": "headless", "pid": 999999999})
    with lock.lock(run.dir):
        update_status(run.dir, supervisor=lock.lock_owner(run.dir))
        interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            run.wait()
        assert stop_requested(run.dir) is None
        update_status(run.dir, state="done")
    assert "exp/one goes on" in capsys.readouterr().out


def test_only_what_is_a_run_is_removed(fakes, tmp_path, capsys):
    folder = fakes.fileroot / "exp" / "thesis"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"foo": 1}')
    (folder / "chapter").write_text("one")
    with pytest.raises(UserError, match=r"holds no manifest.json of a run"):
        runs.remove(runs.open(folder), yes=True)
    run = finished(fakes, "one")
    (tmp_path / "link").symlink_to(run.dir)
    with pytest.raises(UserError, match="is a link"):
        runs.remove(runs.open(tmp_path / "link"), yes=True)
    assert (folder / "chapter").exists()
    assert (run.dir / "status.json").exists()
    # One whose status is damaged can go, and stands in nobody's way.
    (run.dir / "status.json").write_text("")
    assert runs.remove(runs.open(run.dir), yes=True)
    assert not run.dir.exists()
