"""The sweep panel without a browser: values are set, buttons are clicked, runs are faked."""

from __future__ import annotations

import time

import pytest

from dpo_kit import widgets
from dpo_kit.errors import ConfigError
from tests.test_sweep import FakeRun, base, started  # noqa: F401  (fixtures)

pytest.importorskip("ipywidgets")
pytest.importorskip("anywidget")


@pytest.fixture
def panel(base, started, monkeypatch):  # noqa: F811
    monkeypatch.setattr(widgets, "_REFRESH_S", 0.02)
    return widgets.sweep_panel(base, betas="[0.05, 0.3]", loss_types=["ipo"])


def toggle(box, choice):
    return next(t for t in box.children if t.choice == choice)


def until(what, seconds=10):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def test_given_values_are_picked_beside_the_usual_ones(panel):
    assert [t.choice for t in panel.betas.children] == [0.05, 0.1, 0.2, 0.3, 0.5]
    assert panel.picked["betas"] == [0.05, 0.3]
    assert panel.picked["loss_types"] == ["ipo"]
    assert "2 runs" in panel.message.value


def test_without_lists_the_configuration_is_picked(base):  # noqa: F811
    panel = widgets.sweep_panel(base)
    assert panel.picked["betas"] == [base.actor.beta]
    assert panel.picked["loss_types"] == [base.actor.loss_type]


def test_a_loss_that_is_known_by_another_name_is_told_ours(base):  # noqa: F811
    panel = widgets.sweep_panel(base, loss_types="dpo")
    assert "did you mean sigmoid?" in panel.message.value
    assert panel.start.disabled


def test_toggles_change_the_plan(panel):
    toggle(panel.loss_types, "sigmoid").value = True
    assert "4 runs" in panel.message.value
    for t in panel.betas.children:
        t.value = False
    assert panel.start.disabled
    assert "pick at least one" in panel.message.value
    toggle(panel.betas, 0.1).value = True
    assert not panel.start.disabled


def test_start_makes_the_runs_and_draws_them(panel, started):  # noqa: F811
    panel.start.click()
    until(lambda: not panel.start.disabled and panel.sweep is not None)
    assert [r.config.actor.beta for r in started] == [0.05, 0.3]
    assert all(r.config.actor.loss_type == "ipo" for r in started)
    (chart,) = panel.chart.children
    drawn = [t for t in chart.data if t.meta == "chosen"]
    assert [tuple(t.y) for t in drawn] == [(0.05,), (0.3,)]
    assert "beta 0.3" in panel.results.value
    assert "2 of 2 runs done" in panel.message.value
    assert panel.stop.disabled
    assert len(panel.curves()) == 2


def test_stop_ends_it_and_start_can_be_pressed_again(panel, started, monkeypatch):  # noqa: F811
    monkeypatch.setattr(FakeRun, "hold", True)
    panel.start.click()
    until(lambda: started)
    assert panel.start.disabled
    panel.start.click()  # a second press while it runs does nothing
    panel.stop.click()
    until(lambda: not panel.start.disabled)
    assert [t.state for t in panel.sweep.trials] == ["stopped", "not started"]
    assert len(started) == 1
    assert "stopped" in panel.message.value
    monkeypatch.setattr(FakeRun, "hold", False)
    panel.start.click()
    until(lambda: not panel.start.disabled)
    assert len(started) == 3


def test_headless_show_makes_the_runs(panel, started, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(widgets.owner, "is_headless", lambda: True)
    assert panel.show() is None
    assert len(started) == 2
    assert "run 2 of 2" in capsys.readouterr().out
    assert "beta 0.05" in panel.table().text
    assert panel.chart.children == ()


def test_headless_in_a_notebook_the_lines_of_progress_give_way_to_a_table(panel, started, monkeypatch):  # noqa: F811
    shown = []
    monkeypatch.setattr(widgets.owner, "is_headless", lambda: True)
    monkeypatch.setattr(widgets.owner, "in_notebook", lambda: True)
    monkeypatch.setattr(widgets.html, "replace_output", shown.append)
    panel.show()
    assert "beta 0.3" in shown[0].text


def test_before_start_there_is_nothing_to_draw_and_it_says_so(panel):
    assert panel.curves() == []
    assert "press Start" in panel.table().text


def test_wrong_lists_are_refused_when_the_panel_is_made(base):  # noqa: F811
    with pytest.raises(ConfigError, match="betas"):
        widgets.sweep_panel(base, betas="[much]")


def test_names_in_messages_are_inert(panel):
    panel._say("<script>alert(1)</script>")
    assert "<script" not in panel.message.value
