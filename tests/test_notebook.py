"""What the notebooks call: parameters out of cells, the first lines, pairs as text, a heartbeat."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from dpo_kit import config, notebook, preferences
from dpo_kit.config.parameters import parameter_names
from dpo_kit.errors import ConfigError
from dpo_kit.view import tables

CELL = "\n".join(f"{name} = None" for name in parameter_names())


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "params").mkdir()
    text = "actor: {path: tiny-random}\nref: {path: '${actor.path}'}\ntrain_dataset: {path: sample}\n"
    for name in ("demo", "other"):
        (tmp_path / "params" / f"{name}.yaml").write_text(text + f"experiment_name: {name}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebook.launch, "live", lambda fileroot: [])
    return tmp_path


def namespace(*cells: str) -> dict:
    """A notebook's globals after these cells ran."""
    shell: dict = {
        "In": ["", *cells],
        "Out": {},
        "exit": object(),
        "_ih": [],
        "np": np,
        "launch": notebook.launch,
    }
    for cell in cells:
        if not cell.startswith("%"):
            exec(cell, shell)
    return shell


def test_parameters_come_from_the_parameters_cell_and_what_papermill_put_after_it():
    found = notebook.collect(
        namespace("import os", CELL, "# Parameters\nbeta = 0.2\nactor = {'path': 'x'}\n")
    )
    assert found["beta"] == 0.2
    assert found["actor"] == {"path": "x"}
    assert set(found) == set(parameter_names())


def test_a_name_that_papermill_injected_and_nobody_knows_is_found(project):
    cells = namespace(CELL, "# Parameters\nbetta = 0.1\n")
    with pytest.raises(ConfigError, match="betta is not a parameter of this notebook; did you mean beta"):
        notebook.begin(cells)


def test_a_dotted_name_that_papermill_injects_is_refused_in_words(tmp_path):
    papermill = pytest.importorskip("papermill")
    told = (
        "ConfigError: actor.beta is not a parameter of this notebook, dotted names go into overrides; "
        """give -p beta 0.3 or -p overrides "['actor.beta=0.3']\""""
    )
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(
            "notebooks/train.ipynb",
            str(tmp_path / "out.ipynb"),
            {"actor.beta": 0.3, "seed": 3},
            progress_bar=False,
        )
    assert str(caught.value).rstrip().endswith(told)
    assert "AttributeError" not in str(caught.value)


def test_names_that_are_none_of_python_are_refused_and_other_cells_are_left_alone():
    refuse = notebook._refuse_names
    with pytest.raises(
        ConfigError, match="max-steps is not a parameter of this notebook; did you mean max_steps"
    ):
        refuse(["# Parameters\n", "beta = 0.1\n", "max-steps = 3\n"])
    with pytest.raises(ConfigError, match=r"saver, actor|saver\.best, actor\.path are not"):
        refuse(["# Parameters\n", "saver.best = True\n", 'actor.path = "x = y"\n'])
    for lines in (
        [
            "# Parameters\n",
            "beta = 0.1\n",
            'overrides = ["a.b = 1"]\n',
            "actor = {\n",
            '    "a.b": "x = 1",\n',
            "}\n",
        ],
        ["run.name = 3\n"],
        [],
    ):
        assert refuse(lines) is lines


def test_a_misspelt_name_in_the_cell_itself_is_found(project):
    with pytest.raises(ConfigError, match="did you mean beta"):
        notebook.begin(namespace(CELL.replace("beta = None", "betta = 0.1")))


def test_variables_of_other_cells_are_nobodys_business(project):
    cells = namespace(
        "%matplotlib inline", CELL, "run = 1\nsettings = 2\nbetta_result = 3", "not python at all ???"[:0]
    )
    assert set(notebook.collect(cells)) == set(parameter_names())
    assert notebook.begin(cells).experiment_name == "demo"


def test_only_the_last_parameters_cell_counts():
    # a person misspelt a name, saw the error, and mended the cell; the old variable is still in the kernel
    cells = namespace(CELL + "\nbetta = 0.1", CELL.replace("beta = None", "beta = 0.3"))
    found = notebook.collect(cells)
    assert "betta" not in found
    assert found["beta"] == 0.3


def test_without_a_history_of_cells_the_known_names_are_found():
    cells = namespace(CELL, "# Parameters\nbeta = 0.2\n", "rows = 3")
    cells["In"] = [""]
    found = notebook.collect(cells)
    assert found["beta"] == 0.2
    assert set(found) == set(parameter_names())


def test_a_plain_dict_will_do(project):
    with pytest.raises(ConfigError, match="did you mean beta"):
        notebook.begin({"betta": 0.1})
    given = {"beta": 0.2, "config": "params/other.yaml", "np": np, "helper": len, "_x": 1}
    assert notebook.begin(given).actor.beta == 0.2


def test_sweep_lists_are_known_where_the_notebook_says_so(project):
    cells = namespace(CELL + "\nbetas = [0.1]")
    with pytest.raises(ConfigError, match="betas is not a parameter"):
        notebook.begin(cells)
    assert notebook.begin(cells, extra=notebook.SWEEP_NAMES).actor.beta == 0.1


def test_the_first_lines_say_root_fileroot_origin_and_live_runs(project, capsys, monkeypatch):
    status = {"created_at": 0.0, "step": 7, "total_steps": 50}
    run = types.SimpleNamespace(name="demo/brave-fox", status=status, dir=Path("/runs/demo/brave fox"))
    monkeypatch.setattr(notebook.launch, "live", lambda fileroot: [run])
    notebook.begin({"beta": 0.2})
    out = capsys.readouterr().out
    assert f"project root: {config.project_root()}" in out
    assert f"runs go to:   {project / 'runs'}" in out
    assert "configuration: params/demo.yaml" in out
    assert "actor.beta = 0.2 (from beta)" in out
    assert "demo/brave-fox: step 7 of 50, started" in out
    assert "dpo-kit runs stop '/runs/demo/brave fox'" in out


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (600, "10 min"), (9000, "2.5 h")])
def test_ages_are_readable(seconds, text):
    assert notebook._duration(seconds) == text


class Letters:
    """A tokenizer whose token ids are characters; id 0 is the end token."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join("" if skip_special_tokens and i == 0 else "<end>" if i == 0 else chr(i) for i in ids)


def store_of(folder, pairs, context=2):
    texts = [([*map(ord, c), 0], [*map(ord, r), 0]) for c, r in pairs]
    shared = [preferences.longest_common_prefix(c, r) for c, r in texts]
    arrays = {
        "chosen_ids": np.concatenate([c for c, _ in texts]),
        "chosen_offsets": np.cumsum([0] + [len(c) for c, _ in texts]),
        "rejected_ids": np.concatenate([r for _, r in texts]),
        "rejected_offsets": np.cumsum([0] + [len(r) for _, r in texts]),
        "shared": np.array(shared),
        "prompt": np.array(shared),
        "context": np.full(len(texts), context),
        "index": np.arange(len(texts)),
    }
    return preferences.write_store(folder, arrays, {"tokenizer": {"path": "letters"}, "report": {}})


def test_pairs_mark_the_shared_prefix_and_are_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "tokenizer_of", lambda store: Letters())
    store = store_of(
        tmp_path / "s", [("Q: a<b>", "Q: a<i>"), ("same start", "same end"), ("x", "y")], context=0
    )
    shown = notebook.pairs(store, count=2)
    assert "row 0: 5 tokens shared, scored from token 5; chosen 3 and rejected 3 more" in shown.text
    assert "row 1: 5 tokens shared" in shown.text
    assert "row 2" not in shown.text
    assert "<b>" not in shown.markup
    assert "Q: a&lt;</span>" in shown.markup
    assert "b&gt;&lt;end&gt;</span>" in shown.markup
    assert "row 2" in notebook.pairs(store, count=9, start=2).text


def test_a_long_prefix_is_cut_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "tokenizer_of", lambda store: Letters())
    shown = notebook.pairs(store_of(tmp_path / "s", [("x" * 2000 + "a", "x" * 2000 + "b")]))
    assert "(500 earlier characters)" in shown.text


def test_waiting_leaves_one_line_a_phase_where_nobody_watches(monkeypatch):
    shown, waited = [], []
    status = {"state": "done", "phases": [{"name": "training", "seconds": 2.0}]}
    run = types.SimpleNamespace(name="a/b", status=status, wait=lambda: waited.append(1))
    monkeypatch.setattr(notebook.html, "replace_output", shown.append)
    for in_notebook, headless in ((True, False), (False, True), (True, True)):
        monkeypatch.setattr(notebook.owner, "in_notebook", lambda answer=in_notebook: answer)
        monkeypatch.setattr(notebook.owner, "is_headless", lambda answer=headless: answer)
        notebook.wait(run)
    assert len(waited) == 3
    assert [s.text.split("\n")[-1] for s in shown] == ["training  2.0 s"]


def test_a_heartbeat_breaks_long_silence_and_ends_with_the_work(capsys):
    import threading
    import time

    with notebook._heartbeat("build pairs", every_s=0.02) as say:
        say("12 of 40 rows")
        time.sleep(0.1)
    assert "build pairs: 12 of 40 rows, 0 s" in capsys.readouterr().out
    assert not any(t.name == "build pairs" for t in threading.enumerate())


def test_pairs_are_built_with_their_warnings_as_lines(project, capsys):
    rows = [
        {"chosen": f"\n\nHuman: {i}?\n\nAssistant: yes {i}", "rejected": f"\n\nHuman: {i}?\n\nAssistant: no"}
        for i in range(8)
    ]
    rows += [{"chosen": "\n\nHuman: x\n\nAssistant: same", "rejected": "\n\nHuman: x\n\nAssistant: same"}] * 2
    (project / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["train_dataset.path=mine.jsonl", "valid_dataset.path=mine.jsonl", "valid_dataset.num_rows=4"]
    settings = notebook.begin({"overrides": overrides})
    train, held_out = notebook.build_pairs(settings)
    assert (len(train), len(held_out)) == (8, 4)
    assert "warning: train_dataset: 2 of 10 rows" in capsys.readouterr().out
    report = notebook.data_report(train, held_out)
    assert "kept 8, dropped 2" in report.text
    assert "4 of 4 pairs have a prompt that is also in training" in report.text
    assert "\n" in notebook.pairs(train, count=1).text
    assert notebook.build_pairs(notebook.begin({"overrides": overrides[:1]}))[1] is None


def test_the_viewing_room_imports_nothing_heavy():
    names = [
        "view.html",
        "view.analysis",
        "view.baselines",
        "plots",
        "sweep",
        "widgets",
        "view.tables",
        "notebook",
    ]
    heavy = ["torch", "transformers", "pandas", "plotly", "ipywidgets", "IPython", "datasets"]
    code = "\n".join(["import sys", *(f"import dpo_kit.{n}" for n in names)])
    told = f"\nprint([m for m in {heavy} if m in sys.modules])"

    def found(program: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", program + told], capture_output=True, text=True
        ).stdout.strip()

    assert found(code) == "[]"
    assert found(code + "\nimport plotly") == "['plotly']"


def test_lines_of_ones_own_in_the_injected_cell_are_no_parameters():
    """A person may edit what papermill wrote."""
    own = ["# beta = 0.2", "x: int = 3", "a, b = 1, 2", "d['x'] = 3", "plots.WIDTH = 900", "%env X = 3"]
    assert notebook._refuse_names(["# Parameters\n", *(f"{line}\n" for line in own)])
    assert notebook._refuse_names(["# Parameters of my plot\n", "actor.beta = 3\n"])
    for name in ("actor.beta", "max-steps"):
        with pytest.raises(ConfigError, match=name):
            notebook._refuse_names(["# Parameters\n", f"{name} = 3\n"])
