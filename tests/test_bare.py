"""Each notebook through papermill on the smoke params, on a machine that has no browser and a new home.

The gate runs this file first, under `.ci/bare`; it is no part of `make test`, whose nbval runs the same cells.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
PARAMETERS = {"sweep": ["-p", "betas", "[0.1, 0.5]"]}

pytestmark = pytest.mark.bare


def run(*words: str, **more: str) -> str:
    """What a command of the environment prints; it has to end well."""
    command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **more}, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def charts_of(notebook: Path) -> list[dict]:
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return [output["data"] for output in outputs if PLOTLY in output.get("data", {})]


def test_there_is_no_browser_here():
    assert [name for name in ("chromium", "google-chrome", "chrome", "firefox") if shutil.which(name)] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chart_of_a_notebook_is_a_picture_without_scripts(notebook, tmp_path):
    out = tmp_path / "out.ipynb"
    words = ["-f", "params/smoke.yaml", "-p", "overrides", f'["cluster.fileroot={tmp_path / "runs"}"]']
    said = run("papermill", str(notebook), str(out), *words, *PARAMETERS.get(notebook.stem, []))
    said += run("jupyter", "nbconvert", "--log-level=ERROR", "--to", "html", str(out))
    assert "Traceback" not in said
    charts = charts_of(out)
    assert charts
    assert all("image/png" in chart for chart in charts)
    page = re.sub(r"<script\b.*?</script>", "", out.with_suffix(".html").read_text("utf-8"), flags=re.DOTALL)
    assert page.count('src="data:image/png;base64,') == len(charts)
