"""A Plotly figure as a static picture, drawn by matplotlib from the figure's own traces: no browser is needed.

Where Plotly's script cannot run (an exported page with scripts off, a mail, a code host), the picture stands for
the chart, so it has the chart's size, panels, colours, dashes, markers, axes and legend.

    layout.height, margin, x/yaxis.domain  ->  where each panel lies
    scatter (lines, markers), bar, heatmap ->  what is drawn in it
    annotations                            ->  panel titles

Deliberately not here: making figures (`plots`), what a picture cannot show (`traces`), hover texts, buttons, sliders.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from dpo_kit.plots import traces

DPI = 100
_DASHES: dict[str, Any] = {
    "solid": "-",
    "dash": (0, (5, 3)),
    "dot": (0, (1, 2)),
    "dashdot": (0, (5, 2, 1, 2)),
    "longdash": (0, (9, 3)),
    "longdashdot": (0, (9, 3, 1, 3)),
}
_SYMBOLS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "cross": "P",
    "x": "X",
    "triangle-up": "^",
    "triangle-down": "v",
    "star": "*",
}
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")
INK, GRID, ZERO = "#222222", "#E3E3E3", "#9A9A9A"
_X_MARGIN, _Y_MARGIN = 0.02, 0.06  # of the span of the data
_MOST_TICKS = 40
# Of a legend, in pixels: a letter on average, what stands before a name, a row.
_LETTER, _KEY, _ROW = 7.6, 46, 21
_LONGEST_NAME = 40
_DATE = re.compile(r"\s*\d{4}-\d\d?(-\d\d?([T ].*)?)?\s*")


def png(figure: Any, width: int, height: int) -> bytes:
    """The figure as PNG.

    Args:
        figure: of Plotly; its traces are scatter, bar or heatmap on Cartesian axes.
        width: in pixels.
        height: likewise, where the figure does not set its own.

    Raises:
        ImportError: without matplotlib; the message holds the remedy.
        ValueError: something is set on the figure that is not drawn here.
    """
    traces.check(figure)
    with _quiet():
        try:
            from matplotlib import style
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('matplotlib is missing; run: pip install "dpo-kit[notebook]"') from error
        with style.context("default", after_reset=True):  # somebody's own style would change what is seen
            height = int(figure.layout.height or height)
            drawn = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
            _draw(drawn, figure, width, height)
            out = io.BytesIO()
            drawn.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def _draw(drawn: Any, figure: Any, width: int, height: int) -> None:
    panels = _Panels(drawn, figure, width, height)
    handles = [handle for i, trace in enumerate(figure.data) if (handle := panels.draw(i, trace))]
    panels.finish()
    for note in figure.layout.annotations or ():
        if note.visible is not False:
            _write_annotation(drawn, panels, note)
    if figure.layout.showlegend is not False:
        _draw_legend(drawn, handles, panels.box, width, height)
    if title := figure.layout.title.text:
        y = 1 - _or(figure.layout.margin.t, 100) / 2 / height
        look: dict[str, Any] = {"fontsize": _points(17), "color": INK, "va": "center", "parse_math": False}
        drawn.text(0.05, y, traces.shown(title), **look)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """matplotlib tells of font caches, home folders and letters that its font lacks: no news for a reader."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Panels:
    """The panels of one figure: a matplotlib axes for each pair of Plotly axes."""

    def __init__(self, drawn: Any, figure: Any, width: int, height: int):
        self.drawn, self.figure = drawn, figure
        margin = figure.layout.margin
        left, right = _or(margin.l, 80) / width, _or(margin.r, 80) / width
        top, bottom = _or(margin.t, 100) / height, _or(margin.b, 80) / height
        self.box = (left, bottom, 1 - left - right, 1 - top - bottom)
        self.axes: dict[tuple[str, str], Any] = {}
        self.categories: dict[str, list[str]] = {}
        self.spans: dict[str, list[float]] = {}  # values on each axis, for its range
        self.filled: set[str] = set()  # axes that a heat map fills to the edge

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point in Plotly's `paper` coordinates, as a share of the picture."""
        left, bottom, width, height = self.box
        return left + x * width, bottom + y * height

    def _axis(self, name: str) -> Any:
        """`x2` -> layout.xaxis2."""
        return self.figure.layout[f"{name[0]}axis{name[1:]}"]

    def _panel(self, trace: Any) -> Any:
        key = _key(trace)
        if key not in self.axes:
            x, y = (self._axis(name).domain or (0.0, 1.0) for name in key)
            (x0, y0), (x1, y1) = self.at(x[0], y[0]), self.at(x[1], y[1])
            self.axes[key] = self.drawn.add_axes((x0, y0, x1 - x0, y1 - y0))
        return self.axes[key]

    def _places(self, name: str, values: Sequence[Any]) -> list[float]:
        """Values on an axis as numbers: texts are counted as they come, what is no number leaves a gap."""
        axis, texts = self._axis(name), [value for value in values if isinstance(value, str)]
        if axis.type == "category" or (texts and not traces.are_numbers(texts)):
            if axis.type != "category" and all(_DATE.fullmatch(text) for text in texts):
                raise ValueError("axes of dates are not drawn")
            known = self.categories.setdefault(name, [str(text) for text in axis.categoryarray or ()])
            known += [text for text in dict.fromkeys(map(str, values)) if text not in known]
            places = [float(known.index(str(value))) for value in values]
        else:
            places = [float("nan") if value is None else float(value) for value in values]
        finite = [place for place in places if math.isfinite(place)]
        self.spans.setdefault(name, []).extend(finite)
        return [place if math.isfinite(place) else float("nan") for place in places]

    def draw(self, number: int, trace: Any) -> Any:
        """Draws one trace; what stands for it in the legend and its name, or None."""
        if trace.visible in (False, "legendonly"):
            return None
        layout = self.figure.layout
        cycle = layout.colorway or layout.template.layout.colorway or PALETTE
        draw = {"scatter": self._scatter, "bar": self._bar, "heatmap": self._heatmap}[trace.type]
        handle = draw(trace, cycle[number % len(cycle)])
        wanted = trace.showlegend if trace.showlegend is not None else trace.type != "heatmap"
        return (handle, traces.shown(trace.name)) if wanted and trace.name else None

    def _scatter(self, trace: Any, colour: str) -> Any:
        axes, mode, line, marker = self._panel(trace), trace.mode or "lines+markers", trace.line, trace.marker
        x, y = (self._places(name, v) for name, v in zip(_key(trace), traces.columns(trace), strict=True))
        if trace.connectgaps:
            x, y = map(list, zip(*((a, b) for a, b in zip(x, y, strict=True) if b == b), strict=True))
        own = traces.colour(line.color or marker.color or colour)
        style: dict[str, Any] = {"color": own, "linestyle": "none", "alpha": _or(trace.opacity, 1.0)}
        if "lines" in mode:
            style["linestyle"] = _DASHES.get(line.dash or "solid", "-")
            style["linewidth"] = _points(_or(line.width, 2))
        if "markers" in mode:
            name = str(marker.symbol or "circle")
            if name.removesuffix("-open") not in _SYMBOLS:
                raise ValueError(f"markers of the symbol {name} are not drawn")
            symbol, face = _SYMBOLS[name.removesuffix("-open")], traces.colour(marker.color) or own
            style |= {
                "alpha": _or(marker.opacity, 1.0) * _or(trace.opacity, 1.0),
                "marker": symbol,
                # Plotly gives a diamond's diagonal, matplotlib its side.
                "markersize": _points(_or(marker.size, 6)) * (0.9 if symbol == "D" else 1.0),
                "markerfacecolor": "none" if name.endswith("-open") else face,
                "markeredgecolor": traces.colour(marker.line.color) or face,
                "markeredgewidth": _points(_or(marker.line.width, 1 if name.endswith("-open") else 0)),
            }
        return axes.plot(x, y, clip_on=trace.cliponaxis is not False, zorder=3, **style)[0]

    def _bar(self, trace: Any, colour: str) -> Any:
        axes, key, lying = self._panel(trace), _key(trace), trace.orientation == "h"
        along, across = (key[1], key[0]) if lying else key
        bars = [t for t in self.figure.data if t.type == "bar" and t.visible in (None, True)]
        beside = [t for t in bars if _key(t) == key]
        at = [self._places(along, traces.columns(t)[lying]) for t in beside]
        apart = sorted({place for places in at for place in places})
        unit = min((b - a for a, b in pairwise(apart)), default=1.0)
        nth = next(i for i, other in enumerate(beside) if other is trace)
        width = unit * (1 - _or(self.figure.layout.bargap, 0.2)) / len(beside)
        values = self._places(across, traces.columns(trace)[not lying])
        self.spans[across].append(0.0)
        self.spans[along] += [min(apart, default=0) - unit / 2, max(apart, default=0) + unit / 2]
        places = [place + (nth - (len(beside) - 1) / 2) * width for place in at[nth]]
        draw, face = axes.barh if lying else axes.bar, traces.colour(trace.marker.color or colour)
        return draw(places, values, width, color=face, alpha=_or(trace.opacity, 1.0), zorder=3)

    def _heatmap(self, trace: Any, _: str) -> Any:
        import numpy as np

        axes, key = self._panel(trace), _key(trace)
        z = np.array(traces.rows(trace.z), float)  # None is a gap
        places, edges = [], []
        for name, values, count in zip(key, (trace.x, trace.y), z.shape[::-1], strict=True):
            places.append(self._places(name, traces.listed(values) or range(count)))
            edges.append(_edges(places[-1]))
            self.spans[name] += [min(edges[-1]), max(edges[-1])]
            self.filled.add(name)
        mesh = axes.pcolormesh(*edges, z, cmap=self._colours(trace), vmin=trace.zmin, vmax=trace.zmax)
        if trace.texttemplate:
            for i, j in np.ndindex(*z.shape):
                red, green, blue, _ = mesh.cmap(mesh.norm(z[i, j]))
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
                text = z[i, j] if trace.text is None else trace.text[i][j]
                said = traces.filled(trace.texttemplate, float(z[i, j]), text)
                style: dict[str, Any] = {"color": ink, "fontsize": _points(12), "parse_math": False}
                axes.text(places[0][j], places[1][i], said, ha="center", va="center", **style)
        if trace.showscale is not False:
            self.drawn.colorbar(mesh, ax=axes).outline.set_visible(False)
        return mesh

    def _colours(self, trace: Any) -> Any:
        from matplotlib.colors import LinearSegmentedColormap

        given = trace.colorscale or self.figure.layout.template.layout.colorscale.sequential
        scale = [(share, traces.colour(colour)) for share, colour in given or ()]
        colours = LinearSegmentedColormap.from_list("given", scale or [(0.0, "#FFFFFF"), (1.0, "#0072B2")])
        return colours.reversed() if trace.reversescale else colours

    def finish(self) -> None:
        """Ranges, ticks, titles and grid of every panel, once all traces are drawn."""
        for key, axes in self.axes.items():
            axes.set_axisbelow(True)
            axes.tick_params(colors=INK, labelsize=_points(12), length=0)
            for side in axes.spines.values():
                side.set_visible(False)
            for name, own in zip(key, (axes.xaxis, axes.yaxis), strict=True):
                self._finish_axis(name, axes, own)

    def _finish_axis(self, name: str, axes: Any, own: Any) -> None:
        given, which = self._axis(name), name[0]
        if given.type == "log":
            getattr(axes, f"set_{which}scale")("log")
        low, high = self._range(name, given)
        getattr(axes, f"set_{which}lim")(low, high)
        if given.visible is False:
            own.set_visible(False)
            return
        own.set_label_text(traces.shown(given.title.text), fontsize=_points(13), color=INK, parse_math=False)
        if given.showgrid is not False and name not in self.filled:
            own.grid(True, color=traces.colour(given.gridcolor) or GRID, linewidth=0.8)
        if name in self.categories:
            own.set_ticks(range(len(self.categories[name])))
            own.set_ticklabels([traces.shown(t) for t in self.categories[name]], parse_math=False)
        elif given.type != "log":
            _set_ticks(own, given, abs(high - low), max(abs(low), abs(high)))
        if given.showticklabels is False:
            own.set_tick_params(labelleft=False, labelbottom=False)
        is_inside = min(low, high) < 0 < max(low, high) and name not in {*self.categories, *self.filled}
        if given.zeroline is not False and is_inside:
            line = axes.axvline if which == "x" else axes.axhline
            line(0, color=traces.colour(given.zerolinecolor) or ZERO, linewidth=0.8, zorder=1)

    def _range(self, name: str, given: Any) -> tuple[float, float]:
        """From the layout, or around the values of the axis and of those that must match it."""
        group = {given.matches or name} | {name}
        group |= {other for other in self.spans if (self._axis(other).matches or other) in group}
        values = [value for other in group for value in self.spans.get(other, ())]
        if given.type == "log":
            values = [value for value in values if value > 0]
            low, high = min(values, default=1.0) / 1.2, max(values, default=10.0) * 1.2
        else:
            low, high = min(values, default=0.0), max(values, default=1.0)
            if given.rangemode in ("tozero", "nonnegative"):
                low, high = min(low, 0.0), max(high, 0.0)
            share = 0.0 if name in self.filled else _X_MARGIN if name[0] == "x" else _Y_MARGIN
            space = (high - low or abs(high) or 1.0) * share
            low, high = low - space, high + space
        set_low, set_high = given.range or (None, None)
        if given.type == "log":  # its range is given in exponents
            set_low, set_high = (None if end is None else 10 ** float(end) for end in (set_low, set_high))
        low, high = float(_or(set_low, low)), float(_or(set_high, high))
        return (high, low) if given.autorange == "reversed" else (low, high)


def _key(trace: Any) -> tuple[str, str]:
    """The axes that a trace belongs to, `("x2", "y2")`."""
    return trace.xaxis or "x", trace.yaxis or "y"


def _set_ticks(own: Any, given: Any, span: float, largest: float) -> None:
    """As far apart as the figure says, unless they would run together; large numbers in thousands or millions."""
    from matplotlib import ticker

    apart = given.dtick if isinstance(given.dtick, int | float) else 0
    is_fit = apart and span / apart <= _MOST_TICKS
    own.set_major_locator(
        ticker.MultipleLocator(apart) if is_fit else ticker.MaxNLocator(6, steps=[1, 2, 5, 10])
    )
    unit, letter = (1e6, "M") if largest >= 1e7 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    form = given.tickformat

    def said(value: float, _: int) -> str:
        whole = int(value) if form and form.endswith("d") and value == int(value) else value
        text = format(whole, form) if form else f"{value / unit:g}{letter if value else ''}"
        return text.replace("-", "\N{MINUS SIGN}")

    own.set_major_formatter(ticker.FuncFormatter(said))


def _edges(places: list[float]) -> list[float]:
    """Where the cells of a heat map begin and end, halfway between their places."""
    if len(set(places)) < len(places) or places not in (sorted(places), sorted(places, reverse=True)):
        raise ValueError("heat maps with repeated or mixed places are not drawn")
    if len(places) == 1:
        return [places[0] - 0.5, places[0] + 0.5]
    middle = [(a + b) / 2 for a, b in pairwise(places)]
    return [2 * places[0] - middle[0], *middle, 2 * places[-1] - middle[-1]]


def _write_annotation(drawn: Any, panels: _Panels, note: Any) -> None:
    x, y = panels.at(_or(note.x, 0.5), _or(note.y, 1.0))
    across = {"left": "left", "right": "right"}.get(note.xanchor, "center")
    along = {"top": "top", "middle": "center"}.get(note.yanchor, "bottom")
    style: dict[str, Any] = {"color": INK, "fontsize": _points(_or(note.font.size, 13)), "parse_math": False}
    turned = -_or(note.textangle, 0)
    drawn.text(x, y, traces.shown(note.text), ha=across, va=along, rotation=turned, **style)


def _draw_legend(
    drawn: Any, handles: list[tuple[Any, str]], box: Sequence[float], width: int, height: int
) -> None:
    """Above the panels, in as many rows as the names need and the margin holds; the rest is counted."""
    if not handles:
        return
    left, bottom, _, panel = box
    names = [text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…" for _, text in handles]
    wide = max(map(len, names)) * _LETTER + _KEY
    columns = max(1, min(len(names), int((1 - left) * width / wide)))
    margin = (1 - bottom - panel) * height
    room = columns * max(1, int((margin - 20) / _ROW))
    shown = [handle for handle, _ in handles]
    if len(names) > room:
        names = [*names[: room - 1], f"… and {len(names) - room + 1} more"]
        shown = [*shown[: room - 1], drawn.add_artist(_nothing())]
    # Letters before the first "_": matplotlib leaves names that begin with it out of legends.
    legend = drawn.legend(
        shown,
        [" " if text.startswith("_") else text for text in names],
        loc="upper left",
        bbox_to_anchor=(left, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=_points(13),
        labelcolor=INK,
        handlelength=2.2,
        handletextpad=0.5,
        columnspacing=1.2,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def _nothing() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none")


def _or(value: Any, default: float) -> float:
    return default if value is None else value


def _points(pixels: float) -> float:
    return pixels * 72 / DPI
