"""What a Plotly figure holds, as plain Python, and whether a picture can show all of it (`picture` draws).

What is set on a figure and is not drawn (stacked bars, a second y axis, dates, error bars, shapes, ...) is an error
that names it: a picture that shows something else than the chart is worse than none.

Deliberately not here: drawing.
"""

from __future__ import annotations

import base64
import contextlib
import html
import math
import re
from collections.abc import Sequence
from typing import Any

# What may be set on a figure, by where it stands. Keys that begin with words of the first list put no ink on it.
_INKLESS = (
    "hover legend meta uid uirevision customdata ids name type template font showlegend visible xaxis yaxis automargin"
    " fixedrange modebar dragmode clickmode transition autosize width height margin paper plot tracegroupgap bargap"
    " uniform"
)
_UNSET = ("", "linear", "none")
_DRAWN = {
    "scatter": "x y mode line marker opacity cliponaxis connectgaps orientation",
    "scatter.line": "color dash width",
    "scatter.marker": "color size symbol line opacity",
    "bar": "x y orientation marker opacity offsetgroup alignmentgroup textposition",
    "bar.marker": "color line pattern",
    "heatmap": "x y z colorscale reversescale zmin zmax text texttemplate showscale",
    "layout": "annotations barmode colorway title",
    "axis": (
        "anchor domain range autorange rangemode title matches tickformat dtick tickmode showgrid gridcolor gridwidth"
        " zeroline zerolinecolor zerolinewidth showticklabels tickfont ticks ticklen tickcolor showline linecolor"
        " linewidth categoryarray categoryorder"
    ),
}


def check(figure: Any) -> None:
    """Raises ValueError for the first thing that is set and would not be drawn."""
    for trace in figure.data:
        if trace.type not in ("scatter", "bar", "heatmap"):
            raise ValueError(f"{trace.type} traces are not drawn")
        made = trace.to_plotly_json()
        _check_keys(made, trace.type)
        for part in ("line", "marker"):
            inner = made.get(part) or {}
            _check_keys(inner, f"{trace.type}.{part}")
            if any(not isinstance(v, str | int | float | dict) for v in inner.values()):
                raise ValueError(f"{part}s that differ from point to point are not drawn")
            if (inner.get("pattern") or {}).get("shape"):
                raise ValueError("patterns of bars are not drawn")
        if "text" in made.get("mode", ""):
            raise ValueError("texts at points are not drawn")
    layout = figure.layout.to_plotly_json()
    _check_keys(layout, "layout")
    bars = [(t.xaxis, t.yaxis) for t in figure.data if t.type == "bar"]
    if layout.get("barmode", "group") != "group" and len(set(bars)) < len(bars):
        raise ValueError(f"several bar traces with barmode={layout['barmode']} are not drawn")
    for name, axis in layout.items():
        if re.fullmatch(r"[xy]axis[0-9]*", name):
            _check_keys(axis, "axis", name)
            if axis.get("type", "-") not in ("-", "linear", "log", "category"):
                raise ValueError(f"{axis['type']} axes are not drawn")
            if axis.get("categoryorder", "trace") not in ("trace", "array"):
                raise ValueError(f"{name}: categoryorder={axis['categoryorder']} is not drawn")
    for note in layout.get("annotations", ()):
        if {note.get("xref", "x"), note.get("yref", "y")} != {"paper"} or note.get("showarrow", True):
            raise ValueError("annotations inside panels are not drawn")


def _check_keys(made: dict[str, Any], place: str, name: str = "") -> None:
    for key, value in made.items():
        is_set = value is not None and value is not False and not (isinstance(value, str) and value in _UNSET)
        known = key in _DRAWN.get(place, "").split() or key.startswith(tuple(_INKLESS.split()))
        if is_set and not known:
            raise ValueError(f"{name or place}: {key} is not drawn")


def listed(values: Any) -> list[Any]:
    """A column of a trace as texts, numbers and None; Plotly's own JSON holds arrays as bytes.

    Raises:
        ValueError: values of another kind.
    """
    found = [] if values is None else rows(values)
    found = [value.item() if hasattr(value, "item") else value for value in found]
    odd = next((value for value in found if not isinstance(value, str | int | float | None)), None)
    if odd is not None:
        raise ValueError(f"values of type {type(odd).__name__} are not drawn")
    return found


def columns(trace: Any) -> tuple[list[Any], list[Any]]:
    """x and y of a trace; one that is left out counts from 0."""
    x, y = listed(trace.x), listed(trace.y)
    return x or list(range(len(y))), y or list(range(len(x)))


def rows(values: Any) -> list[Any]:
    if not isinstance(values, dict):
        return list(values)
    import numpy as np

    flat = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
    shape = [int(n) for n in str(values.get("shape", len(flat))).split(",")]
    return flat.reshape(shape).tolist()


def are_numbers(texts: Sequence[str]) -> bool:
    with contextlib.suppress(ValueError):
        return all(math.isfinite(float(text)) for text in texts)
    return False


def shown(text: str | None) -> str:
    """What Plotly shows of a text: its line breaks and entities, without its tags."""
    plain = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<br\s*/?>", "\n", text or "")))
    return plain.encode("utf-8", "replace").decode()  # half a character cannot be drawn


def filled(template: str, z: float, text: Any) -> str:
    """`%{z:.3f}` and `%{text}` of a cell."""
    if z != z:
        return ""
    said = re.sub(r"%\{z(?::([^}]*))?\}", lambda found: format(z, found[1] or ""), template)
    return shown(said.replace("%{text}", str(text)))


def colour(colour: str | None) -> Any:
    """CSS's `rgb(...)` and `rgba(...)` as shares of one; every other colour as it is."""
    found = re.fullmatch(r"rgba?\(([^)]*)\)", colour or "")
    if found is None:
        return colour
    *rgb, alpha = [float(part) for part in f"{found[1]},1".split(",")][:4]
    return (*(part / 255 for part in rgb), alpha)
