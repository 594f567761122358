"""A Plotly figure as a static picture, drawn by matplotlib from the figure's own traces: no browser is needed.

Where Plotly's script cannot run (an exported page with scripts off, a mail, a code host), the picture stands for
the chart, so it has the chart's size, panels, colours, dashes, markers, axes and legend.

    layout.height, margin, x/yaxis.domain  ->  where each panel lies
    scatter (lines, markers), bar, heatmap ->  what is drawn in it
    annotations                            ->  panel titles

Deliberately not here: making figures (`plots`), hover texts, buttons and sliders, any other kind of trace.
"""

from __future__ import annotations

import contextlib
import html
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

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
_INK, _GRID, _ZERO = "#222222", "#E3E3E3", "#9A9A9A"
_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_X_MARGIN, _Y_MARGIN = 0.02, 0.06  # of the span of the data


def png(figure: Any, width: int, height: int) -> bytes:
    """The figure as PNG.

    Args:
        figure: of Plotly; its traces are scatter, bar or heatmap on Cartesian axes.
        width: in pixels.
        height: likewise, where the figure does not set its own.

    Raises:
        ImportError: without matplotlib; the message holds the remedy.
        ValueError: a kind of trace that is not drawn here.
    """
    with _quiet():
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('matplotlib is missing; run: pip install "dpo-kit[notebook]"') from error
        height = int(figure.layout.height or height)
        drawn = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        panels = _Panels(drawn, figure, width, height)
        handles = [handle for trace in figure.data if (handle := panels.draw(trace))]
        panels.finish()
        for note in figure.layout.annotations or ():
            _write_annotation(drawn, panels, note)
        _draw_legend(drawn, figure, handles, panels.box[0])
        out = io.BytesIO()
        drawn.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


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
        self.bars: dict[tuple[str, str], int] = {}
        self.num_drawn = 0

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point in Plotly's `paper` coordinates, as a share of the picture."""
        left, bottom, width, height = self.box
        return left + x * width, bottom + y * height

    def _axis(self, name: str) -> Any:
        """`x2` -> layout.xaxis2."""
        return self.figure.layout[f"{name[0]}axis{name[1:]}"]

    def _panel(self, trace: Any) -> tuple[tuple[str, str], Any]:
        key = (trace.xaxis or "x", trace.yaxis or "y")
        if key not in self.axes:
            x, y = (self._axis(name).domain or (0.0, 1.0) for name in key)
            (x0, y0), (x1, y1) = self.at(x[0], y[0]), self.at(x[1], y[1])
            self.axes[key] = self.drawn.add_axes((x0, y0, x1 - x0, y1 - y0))
        return key, self.axes[key]

    def _places(self, axis: str, values: Sequence[Any]) -> list[float]:
        """Values on an axis as numbers: texts are counted as they come, None leaves a gap."""
        if any(isinstance(value, str) for value in values):
            known = self.categories.setdefault(axis, [])
            known += [text for text in dict.fromkeys(map(str, values)) if text not in known]
            places = [float(known.index(str(value))) for value in values]
        else:
            places = [float("nan") if value is None else float(value) for value in values]
        self.spans.setdefault(axis, []).extend(place for place in places if place == place)
        return places

    def draw(self, trace: Any) -> Any:
        """Draws one trace; what stands for it in the legend, or None."""
        draw = {"scatter": self._scatter, "bar": self._bar, "heatmap": self._heatmap}.get(trace.type)
        if draw is None:
            raise ValueError(f"{trace.type} traces are not drawn")
        if trace.visible in (False, "legendonly"):
            return None
        colour = _CYCLE[self.num_drawn % len(_CYCLE)]
        self.num_drawn += 1
        handle = draw(trace, colour)
        wanted = trace.showlegend if trace.showlegend is not None else trace.type != "heatmap"
        return (handle, _text(trace.name)) if wanted and trace.name else None

    def _scatter(self, trace: Any, colour: str) -> Any:
        key, axes = self._panel(trace)
        x, y = (
            self._places(name, _listed(given)) for name, given in zip(key, (trace.x, trace.y), strict=True)
        )
        mode, line, marker = trace.mode or "lines+markers", trace.line, trace.marker
        own = (
            _colour(line.color)
            or (_colour(marker.color) if isinstance(marker.color, str) else None)
            or colour
        )
        style: dict[str, Any] = {"color": own, "linestyle": "none"}
        if "lines" in mode:
            style |= {
                "linestyle": _DASHES.get(line.dash or "solid", "-"),
                "linewidth": _points(_or(line.width, 2)),
            }
        if "markers" in mode:
            name = str(marker.symbol or "circle")
            symbol = _SYMBOLS.get(name.removesuffix("-open"), "o")
            size = _or(marker.size, 6) if isinstance(marker.size, int | float | None) else 6
            face = _colour(marker.color) if isinstance(marker.color, str) else own
            style |= {
                "marker": symbol,
                # Plotly gives a diamond's diagonal, matplotlib its side.
                "markersize": _points(size) * (0.9 if symbol == "D" else 1.0),
                "markerfacecolor": "none" if name.endswith("-open") else face or own,
                "markeredgecolor": _colour(marker.line.color) or face or own,
                "markeredgewidth": _points(_or(marker.line.width, 0)),
            }
        return axes.plot(x, y, clip_on=trace.cliponaxis is not False, zorder=3, **style)[0]

    def _bar(self, trace: Any, colour: str) -> Any:
        key, axes = self._panel(trace)
        lying = trace.orientation == "h"
        at, length = (trace.y, trace.x) if lying else (trace.x, trace.y)
        along, across = (key[1], key[0]) if lying else key
        places, values = self._places(along, _listed(at)), self._places(across, _listed(length))
        self.spans[across].append(0.0)
        together = sum(t.type == "bar" and (t.xaxis or "x", t.yaxis or "y") == key for t in self.figure.data)
        beside = (self.figure.layout.barmode or "group") == "group"
        width, nth = 0.8 / (together if beside else 1), self.bars.get(key, 0)
        self.bars[key] = nth + 1
        shift = (nth - (together - 1) / 2) * width if beside else 0.0
        self.spans[along] += [min(places, default=0) - 0.5, max(places, default=0) + 0.5]
        draw = axes.barh if lying else axes.bar
        face = (_colour(trace.marker.color) if isinstance(trace.marker.color, str) else None) or colour
        opacity = _or(trace.opacity, 1.0)
        return draw([p + shift for p in places], values, width, color=face, alpha=opacity, zorder=3)

    def _heatmap(self, trace: Any, _colour_of_cycle: str) -> Any:
        import numpy as np
        from matplotlib.colors import LinearSegmentedColormap

        key, axes = self._panel(trace)
        z = np.array([[float("nan") if v is None else float(v) for v in row] for row in trace.z])
        given = [
            _listed(side) or list(range(n)) for side, n in ((trace.x, z.shape[1]), (trace.y, z.shape[0]))
        ]
        x, y = (self._places(name, values) for name, values in zip(key, given, strict=True))
        scale = [(share, _colour(colour)) for share, colour in trace.colorscale or ()]
        colours = LinearSegmentedColormap.from_list("given", scale) if scale else "viridis"
        mesh = axes.pcolormesh(x, y, z, cmap=colours, vmin=trace.zmin, vmax=trace.zmax, shading="nearest")
        for name, places in zip(key, (x, y), strict=True):
            half = (max(places) - min(places)) / max(1, len(places) - 1) / 2 or 0.5
            self.spans[name] += [min(places) - half, max(places) + half]
            self.filled.add(name)
        texts = trace.text if trace.text is not None else z
        if trace.texttemplate:
            for i, j in np.ndindex(*z.shape):
                said = _filled(trace.texttemplate, float(z[i, j]), texts[i][j])
                shade = mesh.cmap(mesh.norm(z[i, j]))
                ink = (
                    "black"
                    if sum(w * c for w, c in zip((0.3, 0.6, 0.1), shade, strict=False)) > 0.5
                    else "white"
                )
                axes.text(
                    x[j],
                    y[i],
                    said,
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize=_points(12),
                    parse_math=False,
                )
        if trace.showscale is not False:
            self.drawn.colorbar(mesh, ax=axes)
        return mesh

    def finish(self) -> None:
        """Ranges, ticks, titles and grid of every panel, once all traces are drawn."""
        for key, axes in self.axes.items():
            axes.set_axisbelow(True)
            axes.tick_params(colors=_INK, labelsize=_points(12), length=0)
            for side in axes.spines.values():
                side.set_visible(False)
            for name, own in zip(key, (axes.xaxis, axes.yaxis), strict=True):
                self._finish_axis(name, axes, own)

    def _finish_axis(self, name: str, axes: Any, own: Any) -> None:
        from matplotlib import ticker

        given = self._axis(name)
        which = name[0]
        getattr(axes, f"set_{which}label")(
            _text(given.title.text), fontsize=_points(13), color=_INK, parse_math=False
        )
        if given.type == "log":
            getattr(axes, f"set_{which}scale")("log")
        low, high = self._range(name, given)
        getattr(axes, f"set_{which}lim")(low, high)
        if given.showgrid is not False and name not in self.filled:
            own.grid(True, color=_colour(given.gridcolor) or _GRID, linewidth=0.8)
        if name in self.categories:
            own.set_ticks(range(len(self.categories[name])))
            own.set_ticklabels([_text(t) for t in self.categories[name]], parse_math=False)
        elif given.type != "log":
            own.set_major_locator(
                ticker.MultipleLocator(given.dtick)
                if given.dtick
                else ticker.MaxNLocator(6, steps=[1, 2, 5, 10])
            )
            if given.tickformat:
                own.set_major_formatter(ticker.FuncFormatter(lambda v, _: format(v, given.tickformat)))
        if given.showticklabels is False:
            own.set_tick_params(labelleft=False, labelbottom=False)
        if (
            given.zeroline is not False
            and name not in self.categories
            and min(low, high) < 0 < max(low, high)
        ):
            line = axes.axvline if which == "x" else axes.axhline
            line(0, color=_colour(given.zerolinecolor) or _ZERO, linewidth=0.8, zorder=1)

    def _range(self, name: str, given: Any) -> tuple[float, float]:
        """From the layout, or around the values of the axis and of those that must match it."""
        if given.range:  # of a logarithmic axis: its exponents
            low, high = map(float, given.range)
            return (10**low, 10**high) if given.type == "log" else (low, high)
        group = {given.matches or name} | {name}
        group |= {other for other in self.spans if (self._axis(other).matches or other) in group}
        values = [value for other in group for value in self.spans.get(other, ())]
        if given.type == "log":
            positive = [value for value in values if value > 0]
            return min(positive, default=1.0) / 1.2, max(positive, default=10.0) * 1.2
        low, high = min(values, default=0.0), max(values, default=1.0)
        if given.rangemode == "tozero":
            low, high = min(low, 0.0), max(high, 0.0)
        share = 0.0 if name in self.filled else _X_MARGIN if name[0] == "x" else _Y_MARGIN
        space = (high - low or abs(high) or 1.0) * share
        return low - space, high + space


def _write_annotation(drawn: Any, panels: _Panels, note: Any) -> None:
    if note.xref not in (None, "paper") or note.yref not in (None, "paper") or note.visible is False:
        return
    x, y = panels.at(_or(note.x, 0.5), _or(note.y, 1.0))
    size = _points(_or(note.font.size, 13))
    across = {"left": "left", "right": "right"}.get(note.xanchor, "center")
    along = {"top": "top", "middle": "center"}.get(note.yanchor, "bottom")
    drawn.text(x, y, _text(note.text), ha=across, va=along, fontsize=size, color=_INK, parse_math=False)


def _draw_legend(drawn: Any, figure: Any, handles: list[tuple[Any, str]], left: float) -> None:
    """One row above the panels, or as many as the names need."""
    if not handles or figure.layout.showlegend is False:
        return
    for columns in range(len(handles), 0, -1):
        # Letters before the first "_": matplotlib leaves names that begin with it out of legends.
        legend = drawn.legend(
            [handle for handle, _ in handles],
            [" " if text.startswith("_") else text for _, text in handles],
            loc="upper left",
            bbox_to_anchor=(left, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=_points(13),
            labelcolor=_INK,
            handlelength=2.2,
            handletextpad=0.5,
            columnspacing=1.2,
        )
        for shown, (_, text) in zip(legend.get_texts(), handles, strict=True):
            shown.set_parse_math(False)
            shown.set_text(text)
        if columns == 1 or legend.get_window_extent().x1 <= drawn.bbox.x1:
            return
        legend.remove()


def _filled(template: str, z: float, text: Any) -> str:
    """`%{z:.3f}` and `%{text}` of a cell."""
    if z != z:
        return ""
    said = re.sub(r"%\{z(?::([^}]*))?\}", lambda found: format(z, found[1] or ""), template)
    return _text(said.replace("%{text}", str(text)))


def _text(text: str | None) -> str:
    """What Plotly shows of a text: its line breaks and entities, without its tags."""
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<br\s*/?>", "\n", text or "")))


def _listed(values: Any) -> list[Any]:
    return [] if values is None else list(values)


def _or(value: Any, default: float) -> float:
    return default if value is None else value


def _points(pixels: float) -> float:
    return pixels * 72 / DPI


def _colour(colour: str | None) -> Any:
    """CSS's `rgb(...)` and `rgba(...)` as shares of one; every other colour as it is."""
    found = re.fullmatch(r"rgba?\(([^)]*)\)", colour or "")
    if found is None:
        return colour
    *rgb, alpha = [float(part) for part in f"{found[1]},1".split(",")][:4]
    return (*(part / 255 for part in rgb), alpha)
