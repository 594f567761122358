"""A run on screen while it works: bar with elapsed and expected time, and the reward curves as they grow.

    cell output   [=======>      ]  training: step 23/60, 58 s of about 150 s
                  chosen and rejected rewards, a FigureWidget; at the end the same chart as a picture

A FigureWidget stores 5 MB of state in a notebook, so that at the end it is replaced by Plotly's own JSON and
a PNG, and closed. Without plotly or anywidget there is the bar alone.

Deliberately not here: plain lines (`progress`), waiting (runs), what the chart shows (plots).
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from dpo_kit import plots
from dpo_kit.records import findings
from dpo_kit.records.status import ENDED, read_status
from dpo_kit.view import progress
from dpo_kit.view.html import Html, escape, notice, stack

_BAR_S = 0.5
_CHART_S = 1.0


class View:
    """The display of one run in one notebook cell. `update` a few times a second, then `close`."""

    def __init__(self, run: Any):
        self.run = run
        self.bar_at = self.chart_at = 0.0
        self.size = -1
        self.chart: Any = None
        self.widget: Any = None
        self.opened = False
        self.bar = _show(self._bar(read_status(run.dir)))
        # Plotly takes seconds to import; the bar moves on meanwhile.
        self.importing = threading.Thread(target=_import_plotly, name="import plotly", daemon=True)
        self.importing.start()

    def open(self) -> None:
        """Shows the chart, or a word on why there is none."""
        self.importing.join()
        self.opened = True
        try:
            self.widget = plots.live(plots.rewards(self.run))
        except (ImportError, ValueError) as error:
            _show(Html(f"<small>no live chart: {escape(error)}</small>", f"no live chart: {error}"))
        else:
            self.chart = _show(self.widget)

    def update(self, status: dict[str, Any]) -> None:
        """Brings bar and chart up to date, when it is time."""
        now = time.monotonic()
        if now - self.bar_at > _BAR_S:
            self.bar_at = now
            self.bar.update(self._bar(status))
        if not self.opened and not self.importing.is_alive():
            self.open()
        if self.widget is not None and now - self.chart_at > _CHART_S:
            self.chart_at = now
            self._refresh()

    def close(self, status: dict[str, Any]) -> None:
        """The last state, and a chart that needs no live widget."""
        self.bar.update(self._bar(status))
        if self.widget is None:
            return
        self.chart.update(plots.mimebundle(plots.rewards(self.run)), raw=True)
        self.widget.close()
        self.widget = None

    def _bar(self, status: dict[str, Any]) -> Html:
        known = findings.read(self.run.dir) if status.get("phase") not in progress.BEFORE_FINDINGS else []
        return stack(bar(self.run.name, status), *(notice(f.level, f.told) for f in known))

    def _refresh(self) -> None:
        lines = self.run.dir / "metrics.jsonl"
        size = lines.stat().st_size if lines.exists() else 0
        if size != self.size:
            self.size = size
            plots.refresh(self.widget, plots.rewards(self.run))


def bar(name: str, status: dict[str, Any]) -> Html:
    """Name, share done and words on the phase in hand, as HTML with a plain text twin."""
    state = status.get("state", "unknown")
    text = f"{name}: {progress.describe(status)}"
    colours = {"failed": "#D55E00", "stopped": "#E69F00", "preempted": "#E69F00", "done": "#009E73"}
    colour = colours.get(state, "#0072B2")
    share = 100 * (1.0 if state in ENDED else progress.share_done(status))
    markup = (
        '<div style="border:1px solid rgba(127,127,127,.5);border-radius:4px;height:.8em;max-width:40em">'
        f'<div style="width:{share:.1f}%;height:100%;border-radius:3px;background:{colour}"></div>'
        f'</div><div style="margin:.2em 0">{escape(text)}</div>'
    )
    return Html(markup, text)


def _import_plotly() -> None:
    with contextlib.suppress(ImportError):
        import plotly.graph_objects  # noqa: F401


def _show(thing: Any) -> Any:
    from IPython.display import display

    return display(thing, display_id=True)
