"""The sweep panel: choices of beta and loss_type, one Start, one Stop, live reward curves side by side.

A thin view over `sweep`: the panel holds no run of its own, and everything it does can be done without it.
Without a person in front of it (papermill, nbconvert, pytest) `show` makes the runs and prints lines.

Deliberately not here: what a run is, charts (`plots`), anything that needs a browser: setting `.value` and
calling `.click()` drives the panel in a test.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from dpo_kit import plots, sweep
from dpo_kit.config import Config, read_list
from dpo_kit.errors import UserError
from dpo_kit.loss_types import LOSS_TYPES
from dpo_kit.supervise import owner
from dpo_kit.view import html

BETAS = (0.05, 0.1, 0.2, 0.5)
_REFRESH_S = 1.0
_MOST_PANELS = 12


class SweepPanel:
    """Widgets over one `sweep.Sweep` at a time; `.sweep` is the last one started, or None."""

    def __init__(self, config: Config, *, betas: Any, loss_types: Any, lrs: Any, seeds: Any):
        import ipywidgets as w

        self.config = config
        self.sweep: sweep.Sweep | None = None
        self._fixed = {"lrs": lrs, "seeds": seeds}
        picked_betas = read_list("betas", betas, float) or [config.actor.beta]
        picked_losses = read_list("loss_types", loss_types, str) or [config.actor.loss_type]
        self.betas = _choices(w, sorted({*BETAS, *picked_betas}), picked_betas)
        self.loss_types = _choices(w, list(dict.fromkeys([*LOSS_TYPES, *picked_losses])), picked_losses)
        self.start = w.Button(description="Start", button_style="success", icon="play")
        self.stop = w.Button(description="Stop", button_style="danger", icon="stop", disabled=True)
        self.message, self.results, self.chart = w.HTML(), w.HTML(), w.VBox([])
        self.start.on_click(lambda _: self._on_start())
        self.stop.on_click(lambda _: self._on_stop())
        for toggle in (*self.betas.children, *self.loss_types.children):
            toggle.observe(lambda _: self._say_plan(), names="value")
        narrow = w.Layout(width="6em")
        rows = [
            w.HBox([w.Label("beta", layout=narrow), self.betas]),
            w.HBox([w.Label("loss_type", layout=narrow), self.loss_types]),
            w.HBox([self.start, self.stop, self.message]),
        ]
        self.view = w.VBox([*rows, self.chart, self.results])
        self._say_plan()

    @property
    def picked(self) -> dict[str, Any]:
        """What the toggles say now, with the lists that have no toggle."""
        return {
            "betas": [toggle.choice for toggle in self.betas.children if toggle.value],
            "loss_types": [toggle.choice for toggle in self.loss_types.children if toggle.value],
            **self._fixed,
        }

    def trials(self) -> list[sweep.Trial]:
        """The runs that Start would make now."""
        if not self.picked["betas"] or not self.picked["loss_types"]:
            raise UserError("pick at least one beta and one loss_type")
        return sweep.expand(self.config, sweep.axes(**self.picked))

    def show(self) -> None:
        """Shows the panel; without a person to press Start, makes the runs and returns when they are done.

        Raises:
            RunError: headless, when a run did not end `done`.
        """
        if owner.is_headless():
            self.sweep = sweep.Sweep(self.trials())
            self.sweep.run()
            if owner.in_notebook():  # the lines of progress were for the log
                html.replace_output(sweep.phases(self.sweep.trials))
        else:
            from IPython.display import display as show

            show(self.view)

    def curves(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """(label, metric records) of the runs so far, for `plots`; empty before Start."""
        return self.sweep.curves() if self.sweep is not None else []

    def table(self) -> html.Html:
        """What the runs so far ended with."""
        if self.sweep is None:
            return html.paragraph("No run yet: press Start in the panel, then run this cell again.")
        return sweep.table(self.sweep.trials)

    def _say_plan(self) -> None:
        if self.sweep is not None and self.sweep.is_running:
            return
        try:
            count = len(self.trials())
        except UserError as error:
            self._say(str(error).split("\n", 1)[0])
            self.start.disabled = True
            return
        self.start.disabled = False
        self._say(f"{count} run{'s' if count > 1 else ''}, one after the other")

    def _say(self, text: str) -> None:
        self.message.value = html.paragraph(text).markup

    def _on_start(self) -> None:
        if self.sweep is not None and self.sweep.is_running:
            return
        try:
            self.sweep = sweep.Sweep(self.trials())
            figure = plots.reward_grid(self.sweep.curves()[:_MOST_PANELS])
            self.chart.children = (plots.live(figure),)
        except UserError as error:
            self._say(str(error))
            return
        self.start.disabled, self.stop.disabled = True, False
        self.sweep.start()
        threading.Thread(target=self._follow, args=(self.sweep,), name="sweep panel", daemon=True).start()

    def _on_stop(self) -> None:
        if self.sweep is not None:
            self.stop.disabled = True
            self._say("stopping: the run under way saves its state and ends")
            self.sweep.stop()

    def _follow(self, running: sweep.Sweep) -> None:
        """Brings chart, table and message up to date until the sweep ends."""
        while not running.wait(_REFRESH_S):
            self.refresh(running)
        self.refresh(running)
        self.start.disabled, self.stop.disabled = False, True

    def refresh(self, running: sweep.Sweep) -> None:
        """One update of everything that changes while runs are made."""
        plots.refresh(self.chart.children[0], plots.reward_grid(running.curves()[:_MOST_PANELS]))
        self.results.value = sweep.table(running.trials)._repr_html_()
        self._say(_progress(running))


def sweep_panel(
    config: Config, *, betas: Any = None, loss_types: Any = None, lrs: Any = None, seeds: Any = None
) -> SweepPanel:
    """The panel for a configuration, with the given choices picked.

    Args:
        config: what all runs share.
        betas: picked at the start, beside the usual choices; empty means the configuration's own.
        loss_types: likewise.
        lrs: learning rates to go through; there is no toggle for them.
        seeds: likewise.

    Raises:
        UserError: without ipywidgets.
        ConfigError: a value of another type.
    """
    try:
        import ipywidgets  # noqa: F401
    except ImportError as exc:
        raise UserError('the sweep panel needs ipywidgets; run: pip install "dpo-kit[notebook]"') from exc
    return SweepPanel(config, betas=betas, loss_types=loss_types, lrs=lrs, seeds=seeds)


def _choices(widgets: Any, options: Sequence[Any], picked: Sequence[Any]) -> Any:
    toggles = []
    for option in options:
        toggle = widgets.ToggleButton(description=str(option), value=option in picked)
        toggle.layout.width = "auto"
        toggle.choice = option
        toggles.append(toggle)
    return widgets.HBox(toggles)


def _progress(running: sweep.Sweep) -> str:
    done = sum(t.state == "done" for t in running.trials)
    now = next((t for t in running.trials if t.state == "running"), None)
    errors = "; ".join(f"{t.label}: {t.error}" for t in running.trials if t.error)
    said = [f"{done} of {len(running.trials)} runs done"]
    if now is not None and now.run is not None and running.is_running:
        status = now.run.status
        said.append(f"{now.label}: {status.get('phase') or 'starting'}, step {status.get('step') or 0}")
    if running.stopping:
        said.append("stopped" if not running.is_running else "stopping")
    return " · ".join([*said, errors] if errors else said)
