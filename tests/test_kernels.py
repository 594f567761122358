"""Runs and ranks started from real Jupyter kernels and from papermill: displays, interrupts, ends by signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from dpo_kit import runs
from dpo_kit.records import checkpoint_folders, metrics
from tests.fakes import LONG
from tests.supervise.test_supervisor import until
from tests.test_ranks import wait_for_pids, wait_gone

pytestmark = pytest.mark.notebook

ROOT = Path(__file__).parents[1]

START = """
import functools
from dpo_kit import config, launch
from dpo_kit.supervise import start
from tests.fakes import TREE
start.spawn_detached = functools.partial(start.spawn_detached, module="tests.fake_supervisor")
c = config.from_tree(TREE, ["cluster.fileroot={root}/runs"], root="{root}")
run = launch.start(c)
"""


def notebook(*cells):
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(metadata={"kernelspec": spec})
    book.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    return book


@pytest.fixture
def execute(monkeypatch):
    """Runs cells in a fresh kernel, as if a person sat before it, and returns the outputs of the last one."""

    def execute(*cells):
        monkeypatch.setenv("DPO_KIT_HEADLESS", "0")
        book = notebook(*cells)
        NotebookClient(book, timeout=120, kernel_name="python3").execute()
        return book.cells[-1].outputs

    return execute


def test_waiting_shows_a_bar_and_a_chart_that_is_left_as_a_picture(fakes, execute):
    fakes.play([["train", 30, 0.2]])
    outputs = execute(START.format(root=fakes.root), "run.wait();")
    bar, chart = (output.data for output in outputs if output.output_type == "display_data")
    assert ": done after " in bar["text/plain"]
    assert "width:100.0%" in bar["text/html"]
    assert "application/vnd.plotly.v1+json" in chart
    assert "application/vnd.jupyter.widget-view+json" not in chart
    curves = chart["application/vnd.plotly.v1+json"]["data"]
    assert any(len(curve.get("x") or ()) for curve in curves)
    assert not any(output.output_type == "stream" for output in outputs)


def test_watching_lets_the_next_cells_run(fakes, execute):
    fakes.play([["train", 60, 0.2]])
    outputs = execute(
        START.format(root=fakes.root),
        "run.watch()",
        "import threading\n"
        "thread, = [t for t in threading.enumerate() if t.name == 'watch']\n"
        "print(run.is_live); thread.join(60); print(run.state, thread.is_alive())",
    )
    assert "".join(output.text for output in outputs) == "True\ndone False\n"


def test_without_anywidget_there_is_the_bar_and_a_word(fakes, execute):
    fakes.play([["train", 30, 0.1]])
    hide = "import sys; sys.modules['anywidget'] = None\n"
    outputs = execute(hide + START.format(root=fakes.root), "run.wait();")
    text = [output.data["text/plain"] for output in outputs if output.output_type == "display_data"]
    assert any(line.startswith("no live chart: ") and "pip install" in line for line in text)


def test_a_restarted_kernel_attaches(fakes, execute):
    fakes.play(LONG)
    execute(START.format(root=fakes.root))
    outputs = execute(START.format(root=fakes.root))
    assert "attached to the live run" in "".join(output.text for output in outputs)
    assert len(fakes.folders()) == 1
    assert runs.find(fakes.folders()[0], fakes.fileroot).status["owner"]["kind"] == "interactive"


def test_ranks_reduce_in_a_cell(execute):
    outputs = execute(
        "from dpo_kit import launch; from tests import rank_functions",
        "launch.spawn(rank_functions.sum_of_ranks, 3)",
    )
    assert outputs[0].data["text/plain"] == "[7.0, 7.0]"


def test_an_interrupted_cell_leaves_no_rank(tmp_path):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        client.execute(
            "from dpo_kit import launch; from tests import rank_functions\n"
            f"launch.spawn(rank_functions.sleep_and_tell, {str(tmp_path)!r}, 600)"
        )
        pids = wait_for_pids(tmp_path)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=30)
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        assert wait_gone(pids, 0.5)
        until(lambda: client.execute("1 + 1", reply=True, timeout=30)["content"]["status"] == "ok")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture
def papermill(fakes):
    """papermill on a notebook that starts a run and waits, in mid-training."""
    processes = []

    def start():
        path = fakes.root / "in.ipynb"
        nbformat.write(notebook(START.format(root=fakes.root), "run.wait()"), path)
        names = ("PYTEST_CURRENT_TEST", "DPO_KIT_HEADLESS")
        environment = {key: value for key, value in os.environ.items() if key not in names}
        environment["PYTHONPATH"] = os.getcwd()
        process = subprocess.Popen(
            [sys.executable, "-m", "papermill", str(path), str(fakes.root / "out.ipynb"), "--log-output"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_papermill_that_is_ended_takes_its_run_along(papermill, fakes, number):
    fakes.play(LONG)
    process = papermill()
    until(lambda: list(fakes.fileroot.glob("*/*/metrics.jsonl")), 60)
    run = runs.Run(fakes.fileroot / fakes.folders()[0])
    assert run.status["owner"]["kind"] == "headless"
    process.send_signal(number)
    process.wait(timeout=60)
    assert process.returncode != 0
    until(lambda: not run.is_live)
    assert run.state == "preempted"
    assert (run.dir / "saved").exists()
    assert fakes.living() == []


def test_the_same_papermill_command_goes_on_and_then_skips(tmp_path):
    """A real run of the training notebook on two ranks, ended in mid-training, then the same command twice."""
    overrides = [
        "recover.mode=auto",
        "recover.freq_steps=1",
        "actor.backend=fsdp:d2",
        "cluster.n_gpus_per_node=0",
    ]
    overrides += [f"cluster.fileroot={tmp_path / 'runs'}", "total_train_epochs=100", "total_train_steps=40"]
    command = [sys.executable, "-m", "papermill", "notebooks/train.ipynb", str(tmp_path / "out.ipynb")]
    command += [
        "-f",
        "params/smoke.yaml",
        "-p",
        "trial_name",
        "one",
        "-y",
        yaml.safe_dump({"overrides": overrides}),
    ]
    run_dir = tmp_path / "runs" / "smoke" / "one"

    def begin():
        with open(tmp_path / "log", "wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)

    process = begin()
    until(lambda: len(checkpoint_folders.steps(run_dir / "checkpoints")) >= 2, 120)
    process.terminate()
    process.wait(timeout=90)
    run = runs.Run(run_dir)
    until(lambda: not run.is_live, 60)
    assert run.state == "preempted"
    stopped_at = run.status["step"]
    assert 2 <= stopped_at < 40
    assert begin().wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert run.state == "done"
    losses = [line["step"] for line in metrics.read_metrics(run_dir) if "dpo/loss" in line]
    assert losses == list(range(1, 41))
    assert f"resumed from checkpoint step-{stopped_at}" in (run_dir / "logs" / "rank-0.log").read_text()
    before = (run_dir / "status.json").read_bytes()
    assert begin().wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert (run_dir / "status.json").read_bytes() == before
    assert "smoke/one is done at step 40: skipped" in (tmp_path / "out.ipynb").read_text()


def test_papermill_exits_with_the_cause_in_the_last_cell(papermill, fakes):
    fakes.play({"0": [["sleep", 60]], "1": [["raise", "ValueError", "boom"]]})
    process = papermill()
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "failed after" in out
    book = nbformat.read(fakes.root / "out.ipynb", as_version=4)
    error = book.cells[-1].outputs[-1]
    assert error.ename == "RunError"
    assert "failed: rank 1: ValueError: boom (logs/rank-1.log)" in error.evalue
    assert "to start anew (it has no checkpoint): dpo-kit runs resume" in error.evalue
