"""Run records -> Plotly figures: pure functions, one chart each.

A function takes one run or several (a `Run`, or a pair of a name and its list of metric records) and returns
a `plotly` figure. With one run the colours tell chosen from rejected; with several they tell the runs apart,
and chosen is solid, rejected dashed. Points are held-out pairs, lines are training steps. The palette is
Okabe and Ito's, which stays distinct for colour-blind readers; the page behind a chart is always white, so
that it reads the same on a dark page.

Deliberately not here: reading runs beyond their metrics, layout of notebooks, what the curves mean
(`analysis.reading`).
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpo_kit.errors import UserError
from dpo_kit.plots import picture
from dpo_kit.plots.picture import BLUE, GREEN, GRID, INK, PALETTE, PURPLE, VERMILLION, ZERO
from dpo_kit.records import metrics

if TYPE_CHECKING:
    import plotly.graph_objects as go


# JupyterLab shows the PNG, pixel for pixel, until the pointer is over the chart: hence no scaling.
WIDTH, HEIGHT = 840, 340
_MOST_TICKS = 7

Records = Sequence[Mapping[str, Any]]
# What a panel draws: metric, title, colour and dash while there is one run
Curve = tuple[str, str, str, str]

REWARDS: tuple[Curve, ...] = (
    ("chosen_reward", "chosen", BLUE, "solid"),
    ("rejected_reward", "rejected", VERMILLION, "dash"),
)
MARGIN: tuple[Curve, ...] = (("reward_margin", "margin", GREEN, "solid"),)
ACCURACY: tuple[Curve, ...] = (("reward_accuracy", "accuracy", PURPLE, "solid"),)
LOSS: tuple[Curve, ...] = (("loss", "loss", "#000000", "solid"),)
LOGPS: tuple[Curve, ...] = (
    ("chosen_logps", "chosen", BLUE, "solid"),
    ("rejected_logps", "rejected", VERMILLION, "dash"),
)


def rewards(runs: Any) -> go.Figure:
    """Chosen and rejected rewards, their margin, and the reward accuracy over the steps of the runs."""
    named = _named(runs)
    first = "reward" if len(named) == 1 else "reward (solid: chosen, dashed: rejected)"
    figure = _panels(named, ((first, REWARDS), ("reward margin", MARGIN), ("reward accuracy", ACCURACY)))
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", col=3)
    return figure


def loss(runs: Any) -> go.Figure:
    """The training loss and the held-out loss over the steps of one or more runs."""
    return _panels(_named(runs), (("loss", LOSS),))


def logps(runs: Any) -> go.Figure:
    """Summed log-probs of the chosen and the rejected responses under the policy.

    Rewards are differences to the reference; this panel shows whether the chosen answers themselves became
    more or less likely.
    """
    return _panels(_named(runs), (("log-prob of a response (nats)", LOGPS),))


def reward_grid(runs: Any, columns: int = 3) -> go.Figure:
    """One small chart of chosen and rejected rewards a run, side by side on common axes."""
    named = _named(runs)
    columns = max(1, min(columns, len(named)))
    rows = max(1, -(-len(named) // columns))
    figure = _plotly("subplots").make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes="all",
        shared_yaxes="all",
        subplot_titles=[_label(name) for name, _ in named],
        horizontal_spacing=0.03,
        vertical_spacing=0.3 / (rows + 1),
    )
    for i, (_, lines) in enumerate(named):
        for curve in REWARDS:
            row, col = i // columns + 1, i % columns + 1
            _draw(figure, lines, curve, row=row, col=col, group=curve[1], legend=i == 0)
    _finish(figure, height=100 + 230 * rows)
    for i in range(max(0, len(named) - columns), len(named)):  # the lowest chart of each column
        figure.update_xaxes(title_text="step", showticklabels=True, row=i // columns + 1, col=i % columns + 1)
    figure.update_yaxes(title_text="reward", col=1)
    return figure


def _panels(named: list[tuple[str, Records]], panels: Sequence[tuple[str, Sequence[Curve]]]) -> go.Figure:
    """One row of panels; every run draws its curves into each."""
    titles = [title for title, _ in panels]
    figure = _plotly("subplots").make_subplots(
        rows=1, cols=len(panels), subplot_titles=titles, horizontal_spacing=0.07
    )
    single = len(named) == 1
    for i, (name, lines) in enumerate(named):
        for column, (_, curves) in enumerate(panels, start=1):
            for curve in curves:
                own = curve if single else (*curve[:2], PALETTE[i % len(PALETTE)], curve[3])
                named_once = len(curves) > 1 if single else (column, curve) == (1, curves[0])
                group = curve[1] if single else name
                _draw(figure, lines, own, row=1, col=column, group=group, legend=named_once)
    _finish(figure, height=HEIGHT, legend_rows=1 if single else 1 + len(named) // 4)
    figure.update_xaxes(title_text="step")
    return figure


def _draw(
    figure: go.Figure, lines: Records, curve: Curve, *, row: int, col: int, group: str, legend: bool
) -> None:
    """Adds a line for the training steps and points for the held-out pairs of one curve."""
    metric, title, colour, dash = curve
    name = title if group == title else f"{group} {title}"
    common = {"legendgroup": group, "hovertemplate": "%{y:.4g}<extra>%{meta}</extra>", "row": row, "col": col}
    x, y = _series(lines, f"dpo/{metric}")
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines" if sum(value is not None for value in y) > 2 else "lines+markers",
        line={"color": colour, "width": 2, "dash": dash},
        name=_label(group if legend else name),
        meta=_label(name),
        showlegend=legend,
        **common,
    )
    x, y = _series(lines, f"dpo-eval/{metric}")
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers",
        marker={"color": colour, "size": 9, "symbol": "diamond", "line": {"color": "#FFFFFF", "width": 1}},
        name=_label(f"{name}, held-out"),
        meta=_label(f"{name}, held-out"),
        showlegend=False,
        cliponaxis=False,
        **common,
    )


def _series(lines: Records, key: str) -> tuple[list[int], list[float | None]]:
    """Steps and values of the lines that carry a metric; undefined values stay None, which leaves a gap."""
    carried = [line for line in lines if key in line]
    return [line["step"] for line in carried], [line[key] for line in carried]


def _finish(figure: go.Figure, height: int, legend_rows: int = 1) -> None:
    """The common looks, and one legend entry that says what the points are."""
    held_out = {"color": "#FFFFFF", "size": 9, "symbol": "diamond", "line": {"color": "#777777", "width": 2}}
    figure.add_scatter(
        x=[None], y=[None], mode="markers", marker=held_out, name="held-out pairs", hoverinfo="skip"
    )
    font = {"family": "system-ui, Segoe UI, Helvetica, Arial, sans-serif", "size": 13, "color": INK}
    figure.update_layout(
        template="none",
        paper_bgcolor="#FFFFFF",
        plot_bgcolor="#FFFFFF",
        font=font,
        height=height + 24 * (legend_rows - 1),
        margin={"l": 60, "r": 20, "t": 72 + 24 * (legend_rows - 1), "b": 55},
        hovermode="x unified",
        hoverlabel={"namelength": -1},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "yref": "container", "y": 1, "yanchor": "top"},
        uirevision="keep",
    )
    last = max((x for trace in figure.data for x in trace.x if x is not None), default=0)
    figure.update_xaxes(
        gridcolor=GRID, zeroline=False, rangemode="tozero", dtick=_tick(last), title_font_size=13
    )
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=ZERO, automargin=True, title_font_size=13)
    figure.update_annotations(font_size=13)


def _tick(last: int) -> int:
    """Steps between two ticks, 1, 2 or 5 times a power of ten: Plotly by itself sets ticks between two steps."""
    steps = (factor * 10**power for power in range(20) for factor in (1, 2, 5))
    return next(step for step in steps if last <= step * _MOST_TICKS)


def _named(runs: Any) -> list[tuple[str, Records]]:
    """One run or several as (name, records)."""
    single = hasattr(runs, "dir") or (isinstance(runs, tuple) and len(runs) == 2 and isinstance(runs[0], str))
    out: list[tuple[str, Records]] = []
    for run in [runs] if single else runs:
        if isinstance(run, tuple):
            out.append((str(run[0]), list(run[1])))
        else:
            out.append((str(run.name), metrics.read_metrics(run.dir)))
    return out


def _label(text: str) -> str:
    """Text that Plotly shows as it is: it reads a little HTML in names and titles, and only some entities."""
    return html.escape(text).replace("&quot;", "&#34;")


def live(figure: go.Figure) -> Any:
    """The figure as a widget that `refresh` can update while it is on screen.

    Raises:
        UserError: without anywidget, which Plotly's FigureWidget needs.
    """
    try:
        return _plotly("graph_objects").FigureWidget(figure)
    except ImportError as exc:
        raise UserError('live charts need anywidget; run: pip install "dpo-kit[notebook]"') from exc


def refresh(widget: Any, figure: go.Figure) -> None:
    """Brings a widget made from an earlier figure of the same runs up to date, in one message to the page."""
    assert len(widget.data) == len(figure.data), (len(widget.data), len(figure.data))
    with widget.batch_update():
        for old, new in zip(widget.data, figure.data, strict=True):
            if list(old.x or ()) != list(new.x or ()) or list(old.y or ()) != list(new.y or ()):
                old.update(x=new.x, y=new.y, mode=new.mode)
        widget.update_xaxes(dtick=figure.layout.xaxis.dtick)


def mimebundle(figure: go.Figure) -> dict[str, Any]:
    """What a notebook saves for a figure: Plotly's own JSON, a picture for static viewers, one line of text.

    Where there is no picture (no matplotlib, a kind of trace that it does not draw) the line says why.
    """
    text = describe(figure)
    bundle: dict[str, Any] = {"application/vnd.plotly.v1+json": figure.to_plotly_json()}
    try:
        bundle["image/png"] = base64.b64encode(picture.png(figure, WIDTH, HEIGHT)).decode("ascii")
    except Exception as error:  # a picture beside the chart: whatever went wrong, the chart itself is there
        why = " ".join(str(error).split())[:160] or type(error).__name__
        text += f" (no picture for static viewers: {why})"
    return {**bundle, "text/plain": text}


def describe(figure: go.Figure) -> str:
    """One line on a figure: the title of each panel and the last training value of each of its curves."""
    panels = [_unlabel(a.text) for a in figure.layout.annotations or ()]
    curves = [trace for trace in figure.data if trace.type == "scatter" and isinstance(trace.meta, str)]
    if not curves or not panels:
        return f"Chart ({', '.join(sorted({trace.type for trace in figure.data}))})."
    said: dict[str, list[str]] = {}
    for trace in curves:
        values = [y for y in (trace.y if trace.y is not None else ()) if isinstance(y, int | float)]
        number = int((trace.xaxis or "x")[1:] or 1)
        if values and trace.mode != "markers" and number <= len(panels):
            said.setdefault(panels[number - 1], []).append(f"{_unlabel(trace.meta)} {values[-1]:.3f}")
    parts = [f"{panel}: {', '.join(curves)}" for panel, curves in said.items()]
    return "Chart of the last values. " + (". ".join(parts) if parts else "Nothing recorded yet") + "."


def _unlabel(text: str | None) -> str:
    return html.unescape(text or "")


def _plotly(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"plotly.{module}")
    except ImportError as exc:
        raise UserError('charts need plotly; run: pip install "dpo-kit[notebook]"') from exc
