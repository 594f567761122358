"""The notebooks as files: thin, one contract of parameters, and in step with their recordings."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

from dpo_kit.config.parameters import parameter_names
from tests import record_notebooks

NAMES = sorted(p.stem for p in record_notebooks.NOTEBOOKS.glob("*.ipynb"))
MOST_LINES, MOST_BYTES = 15, 300_000


def read(folder: Path, name: str):
    return nbformat.read(folder / f"{name}.ipynb", as_version=4)


def tagged(notebook, tag: str):
    return [c for c in notebook.cells if tag in c.metadata.get("tags", ())]


def code_cells(notebook):
    return [
        c
        for c in notebook.cells
        if c.cell_type == "code" and c not in tagged(notebook, "injected-parameters")
    ]


def assigned(source: str) -> dict[str, ast.expr]:
    return {n.targets[0].id: n.value for n in ast.parse(source).body if isinstance(n, ast.Assign)}


def test_there_are_notebooks():
    assert {"train", "sweep"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_thin_and_without_outputs(name):
    notebook = read(record_notebooks.NOTEBOOKS, name)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert "question" in notebook.cells[0].source
    assert "costs" in notebook.cells[0].source
    for cell in code_cells(notebook):
        assert not cell.outputs
        assert cell.execution_count is None
        if cell in tagged(notebook, "parameters"):
            continue
        assert len(cell.source.split("\n")) <= MOST_LINES, cell.source
        kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef}, cell.source


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_cell_holds_the_contract(name):
    cells = tagged(read(record_notebooks.NOTEBOOKS, name), "parameters")
    assert len(cells) == 1
    given = assigned(cells[0].source)
    assert set(parameter_names()) <= set(given)
    assert set(given) - set(parameter_names()) <= {"betas", "loss_types", "lrs", "seeds"}
    for known in parameter_names():
        assert not ast.literal_eval(given[known]), f"{known} must say nothing by itself"


@pytest.mark.parametrize("name", NAMES)
def test_papermill_reads_every_parameter_of_the_cell(name):
    """Else it warns of an unknown parameter for each that it cannot read, e.g. for a comment behind a value."""
    papermill = pytest.importorskip("papermill")
    found = papermill.inspect_notebook(str(record_notebooks.NOTEBOOKS / f"{name}.ipynb"))
    assert set(found) == set(assigned(tagged(read(record_notebooks.NOTEBOOKS, name), "parameters")[0].source))


@pytest.mark.parametrize("name", NAMES)
def test_recordings_have_the_notebooks_cells(name):
    ours, recorded = read(record_notebooks.NOTEBOOKS, name), read(record_notebooks.RECORDINGS, name)
    told = "re-record with: python -m tests.record_notebooks"
    assert [c.source for c in code_cells(ours)] == [c.source for c in code_cells(recorded)], told
    assert [c.metadata.get("tags") or [] for c in code_cells(ours)] == [
        c.metadata.get("tags") or [] for c in code_cells(recorded)
    ], told


@pytest.mark.parametrize("name", NAMES)
def test_recordings_were_made_with_the_smoke_params_of_today(name):
    papermill = pytest.importorskip("papermill")
    recorded = read(record_notebooks.RECORDINGS, name)
    (injected,) = tagged(recorded, "injected-parameters")
    notebook = papermill.iorw.load_notebook_node(str(record_notebooks.NOTEBOOKS / f"{name}.ipynb"))
    expected = papermill.parameterize.parameterize_notebook(notebook, record_notebooks.parameters(name))
    (wanted,) = tagged(expected, "injected-parameters")
    assert injected.source == wanted.source, "re-record with: python -m tests.record_notebooks"


@pytest.mark.parametrize("name", NAMES)
def test_recordings_are_small_and_say_nothing_of_the_machine(name):
    path = record_notebooks.RECORDINGS / f"{name}.ipynb"
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert str(record_notebooks.ROOT) not in text
    assert "/tmp/" not in text
    assert "widget" not in nbformat.reads(text, as_version=4).metadata
    assert "application/vnd.jupyter.widget-view+json" not in text
    assert tagged(read(record_notebooks.RECORDINGS, name), "nbval-check-output")


def test_cleaning_takes_out_what_differs_between_machines():
    output = nbformat.v4.new_output(
        "display_data",
        {"image/png": "AAAA", "text/plain": "at /home/me/kit/runs/x", "text/html": ["/home/me/kit"]},
    )
    cell = nbformat.v4.new_code_cell(
        "1", outputs=[output], metadata={"papermill": {"duration": 1}, "tags": ["a"]}
    )
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {}, "widgets": {"state": 1}})
    record_notebooks.clean(notebook, {"/home/me/kit": "PROJECT"})
    assert notebook.metadata == {}
    assert cell.metadata == {"tags": ["a"]}
    assert dict(output.data) == {"text/plain": "at PROJECT/runs/x", "text/html": ["PROJECT"]}
