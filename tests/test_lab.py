"""Hostile text in JupyterLab, over a live kernel and widgets: shown as text, nothing runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import nbformat
import pytest

from dpo_kit.system.processes import end_tree
from tests.plots.test_payloads import BROWSER, PAYLOADS, RUN, needs_browser

ROOT = Path(__file__).parents[1]
# What a person sees who sweeps and watches a run whose names, messages and errors are hostile.
SHOW = """
import os, sys
os.environ["DPO_KIT_HEADLESS"] = "0"
sys.path.insert(0, {root!r})
from tests import test_lab
panel, view = test_lab.hostile_widgets({folder!r})
"""
CONTROL = f'from IPython.display import HTML; HTML("""<img src=x onerror="{RUN}">""")'


def hostile_widgets(folder: str) -> tuple[Any, Any]:
    """Shows a sweep panel in the middle of a sweep and the live view of a run, all of their texts payloads."""
    from IPython.display import display

    from dpo_kit import config, plots, sweep, widgets
    from dpo_kit.records import metrics
    from dpo_kit.records.status import reset_status
    from dpo_kit.runs import Run
    from dpo_kit.view import live

    tree = {
        "ref": {"path": "tiny-random"},
        "train_dataset": {"path": "sample"},
        "cluster": {"fileroot": folder},
    }
    settings = config.from_tree({"actor": {"path": "tiny-random"}, **tree})
    panel = widgets.sweep_panel(settings, betas=[0.1], loss_types=["sigmoid"])
    panel.show()
    run_dir = Path(folder) / "exp" / PAYLOADS[3].replace("/", "|")
    (run_dir / "logs").mkdir(parents=True)
    reset_status(run_dir)
    metrics.append_metrics(
        run_dir, {"step": 1, "dpo/loss": 0.6, "dpo/chosen_reward": 0.1, "dpo/rejected_reward": 0.0}
    )
    run = Run(run_dir)
    trials = [sweep.Trial(payload, settings, run, error=payload, state="failed") for payload in PAYLOADS]
    running = sweep.Sweep(trials)
    panel.chart.children = (plots.live(plots.reward_grid(running.curves()[:12])),)
    panel.refresh(running)
    view = live.View(run)
    view.open()
    view.update({"state": "failed", "message": " ".join(PAYLOADS)})
    status = {"state": "failed", "message": " ".join(PAYLOADS), "step": 1}
    view.bar.update(live.bar(" ".join(PAYLOADS), status))
    display(run, sweep.table(trials))
    print("ALL" + " SHOWN")
    return panel, view


class Page:
    """A page of a headless browser, over its debugging protocol."""

    def __init__(self, url: str):
        import websocket

        self.socket = websocket.create_connection(url, suppress_origin=True, timeout=60)
        self.number = 0

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; promises are waited for."""
        self.number += 1
        params = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        self.socket.send(json.dumps({"id": self.number, "method": "Runtime.evaluate", "params": params}))
        while (reply := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        return reply["result"].get("result", {}).get("value")

    def until(self, expression: str, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.ask(expression):
            assert time.monotonic() < deadline, (
                f"never true: {expression}; the page says {self.text()[-2000:]}"
            )
            time.sleep(0.3)

    def text(self) -> str:
        return self.ask("document.body.innerText") or ""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    """Opens a notebook in JupyterLab in a browser; both end with the test."""
    started: list[subprocess.Popen] = []
    opened: list[Page] = []

    def begin(command: list[str]) -> None:
        environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "jupyter"), "PYTHONPATH": str(ROOT)}
        with open(tmp_path / f"{len(started)}.log", "wb") as log:
            kept = {"stdout": log, "stderr": log, "cwd": tmp_path, "env": environment}
            started.append(subprocess.Popen(command, start_new_session=True, **kept))

    def open_notebook(name: str) -> Page:
        port, debug = free_port(), free_port()
        begin(
            [
                *[sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1"],
                *[f"--port={port}", f"--ServerApp.root_dir={tmp_path}", "--IdentityProvider.token="],
                *["--ServerApp.password=", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url="],
            ]
        )
        wait_for(f"http://127.0.0.1:{port}/api/status")
        begin(
            [
                *[
                    BROWSER,
                    "--headless=new",
                    "--no-sandbox",
                    "--disable-gpu",
                    f"--user-data-dir={tmp_path / 'profile'}",
                ],
                *[f"--remote-debugging-port={debug}", f"http://127.0.0.1:{port}/lab/tree/{name}?reset"],
            ]
        )
        pages = json.loads(wait_for(f"http://127.0.0.1:{debug}/json/list"))
        opened.append(Page(next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")))
        return opened[-1]

    yield open_notebook
    for page in opened:
        page.socket.close()
    end_tree([process.pid for process in started])
    for process in started:
        process.wait()


def wait_for(url: str, seconds: float = 60.0) -> bytes:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.read()
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.2)


@needs_browser
def test_live_widgets_in_jupyterlab_show_text_and_run_nothing(tmp_path, lab):
    cells = [nbformat.v4.new_code_cell(SHOW.format(root=str(ROOT), folder=str(tmp_path / "runs")))]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "hostile.ipynb")
    page = lab("hostile.ipynb")
    page.until(
        "!!(window.jupyterapp && jupyterapp.shell.currentWidget && document.querySelector('.jp-Notebook'))"
    )
    page.until("jupyterapp.shell.currentWidget.context && jupyterapp.shell.currentWidget.context.isReady")
    page.until("jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'")
    page.ask("jupyterapp.commands.execute('notebook:run-all-cells').then(() => true)")
    page.until("document.body.innerText.includes('ALL SHOWN')")
    page.until("document.querySelectorAll('.jp-OutputArea .js-plotly-plot').length >= 2")
    page.until("document.querySelectorAll('.jupyter-widgets button').length >= 4")
    time.sleep(2.0)  # for whatever comes late
    assert page.ask("document.body.getAttribute('data-ran')") is None
    shown = page.text()
    for payload in (PAYLOADS[0], PAYLOADS[3], PAYLOADS[6], PAYLOADS[25]):
        assert shown.count(payload) >= 3, payload  # the panel's message, its table, the live view
    # The same page would run a payload that is not escaped.
    page.ask(
        "(async () => { const w = jupyterapp.shell.currentWidget;"
        f" w.content.activeCell.model.sharedModel.setSource({json.dumps(CONTROL)});"
        " await jupyterapp.commands.execute('notebook:run-cell'); return true; })()"
    )
    page.until("document.body.getAttribute('data-ran') !== null")
