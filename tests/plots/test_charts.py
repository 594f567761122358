"""Charts from hand-made records: what is drawn is what was recorded, and names cannot become markup."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import pytest

from dpo_kit import plots
from dpo_kit.plots import charts
from dpo_kit.records import metrics

pytest.importorskip("plotly")


def line(step, loss, chosen, rejected, accuracy, prefix="dpo"):
    return {
        "step": step,
        f"{prefix}/loss": loss,
        f"{prefix}/chosen_reward": chosen,
        f"{prefix}/rejected_reward": rejected,
        f"{prefix}/reward_margin": chosen - rejected,
        f"{prefix}/reward_accuracy": accuracy,
        f"{prefix}/chosen_logps": -10.0 + chosen,
        f"{prefix}/rejected_logps": -12.0 + rejected,
    }


LINES = [
    line(0, 0.693, 0.0, 0.0, None, "dpo-eval"),
    line(1, 0.693, 0.0, 0.0, None),
    line(2, 0.6, 0.1, -0.2, 0.75),
    line(2, 0.61, 0.05, -0.1, 0.7, "dpo-eval"),
]


class FakeRun:
    def __init__(self, folder: Path, name: str):
        self.dir, self.name = folder, name


def traces(figure):
    return {(t.xaxis, t.meta): t for t in figure.data if t.meta}


def test_curves_are_metrics_with_a_name():
    curves = (*charts.REWARDS, *charts.MARGIN, *charts.ACCURACY, *charts.LOSS, *charts.LOGPS)
    recorded = metrics.means([1.0] * len(metrics.SUMS), "dpo")
    assert all(f"dpo/{metric}" in recorded for metric, *_ in curves)


def test_rewards_draws_what_was_recorded():
    drawn = traces(plots.rewards(("one", LINES)))
    assert drawn["x", "chosen"].x == (1, 2)
    assert drawn["x", "chosen"].y == (0.0, 0.1)
    assert drawn["x", "rejected, held-out"].x == (0, 2)
    assert drawn["x", "rejected, held-out"].y == (0.0, -0.1)
    assert drawn["x2", "margin"].y == (0.0, 0.1 + 0.2)
    assert drawn["x3", "accuracy"].y == (None, 0.75)  # undefined is a gap, never 0
    assert drawn["x3", "accuracy, held-out"].y == (None, 0.7)


def test_loss_and_logps():
    assert traces(plots.loss(("one", LINES)))["x", "loss"].y == (0.693, 0.6)
    assert traces(plots.logps(("one", LINES)))["x", "rejected"].y == (-12.0, -12.2)


def test_runs_are_read_from_their_folders(tmp_path):
    for record in LINES:
        metrics.append_metrics(tmp_path, record)
    run = FakeRun(tmp_path, "from-disk")
    assert traces(plots.rewards(run))["x", "chosen"].y == (0.0, 0.1)
    assert len(plots.rewards([run, run]).data) == 2 * len(plots.rewards(run).data) - 1


def test_several_runs_are_told_apart_by_colour_and_named_once():
    figure = plots.rewards([("a", LINES), ("b", LINES)])
    named = [t.name for t in figure.data if t.showlegend]
    assert named == ["a", "b"]
    drawn = traces(figure)
    assert drawn["x", "a chosen"].line.color != drawn["x", "b chosen"].line.color
    assert (
        drawn["x", "a chosen"].line.color
        == drawn["x", "a rejected"].line.color
        == drawn["x2", "a margin"].line.color
    )
    assert (drawn["x", "a chosen"].line.dash, drawn["x", "a rejected"].line.dash) == ("solid", "dash")


@pytest.mark.parametrize(("runs", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 3)])
def test_grid_holds_every_run_beside_the_others(runs, rows, columns):
    figure = plots.reward_grid([(f"run {i}", LINES) for i in range(runs)])
    assert [a.text for a in figure.layout.annotations] == [f"run {i}" for i in range(runs)]
    assert len({t.xaxis for t in figure.data if t.meta}) == runs
    assert max(a.y for a in figure.layout.annotations) <= 1
    assert len({round(a.x, 3) for a in figure.layout.annotations}) == columns
    assert len({round(a.y, 3) for a in figure.layout.annotations}) == rows
    labelled = [axis for axis in figure.select_xaxes() if axis.title.text == "step" and axis.showticklabels]
    assert len(labelled) == columns


def test_a_run_without_records_is_an_empty_chart():
    figure = plots.rewards(("new", []))
    assert "Nothing recorded" in plots.describe(figure)
    assert plots.reward_grid(("new", [])).data


def test_names_cannot_become_markup():
    nasty = "<b onclick='x'>\"&"
    figure = plots.rewards([(nasty, LINES), ("b", LINES)])
    assert all("<b" not in (t.name + (t.meta or "")) for t in figure.data)
    assert nasty in plots.describe(figure)


def test_description_names_panels_and_last_values():
    text = plots.describe(plots.rewards(("one", LINES)))
    assert text == (
        "Chart of the last values. reward: chosen 0.100, rejected -0.200. reward margin: margin 0.300. "
        "reward accuracy: accuracy 0.750."
    )


def test_bundle_holds_chart_picture_and_one_line():
    bundle = plots.mimebundle(plots.loss(("one", LINES)))
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/png", "text/plain"}
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"] == plots.describe(plots.loss(("one", LINES)))


def test_bundle_without_matplotlib_keeps_the_chart_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bundle = plots.mimebundle(plots.loss(("one", LINES)))
    assert set(bundle) == {"application/vnd.plotly.v1+json", "text/plain"}
    assert 'matplotlib is missing; run: pip install "dpo-kit[notebook]"' in bundle["text/plain"]


def test_a_figure_of_ones_own_is_shown_too():
    graph_objects = pytest.importorskip("plotly.graph_objects")
    bundle = plots.mimebundle(graph_objects.Figure(graph_objects.Bar(x=["a"], y=[1])))
    assert bundle["text/plain"] == "Chart (bar)."
    assert "image/png" in bundle
    bundle = plots.mimebundle(graph_objects.Figure(graph_objects.Pie(values=[1, 2])))
    assert bundle["text/plain"] == "Chart (pie). (no picture for static viewers: pie traces are not drawn)"


def test_live_widget_follows_the_records():
    pytest.importorskip("anywidget")
    widget = plots.live(plots.rewards(("one", LINES[:2])))
    plots.refresh(widget, plots.rewards(("one", LINES)))
    chosen = next(t for t in widget.data if t.meta == "chosen")
    assert chosen.y == (0.0, 0.1)
    assert widget.layout.xaxis.dtick == 1
    many = [line(step, 0.5, 0.1, 0.0, 0.9) for step in range(1, 40)]
    plots.refresh(widget, plots.rewards(("one", many)))
    assert widget.layout.xaxis.dtick == 10
    plots.refresh(widget, plots.rewards(("one", LINES)))
    assert chosen.mode == "lines+markers"


@pytest.mark.parametrize(("last", "tick"), [(0, 1), (7, 1), (8, 2), (35, 5), (36, 10), (1000, 200)])
def test_ticks_lie_on_steps(last, tick):
    assert charts._tick(last) == tick
