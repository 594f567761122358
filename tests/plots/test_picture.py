"""Pictures without a browser: every panel, colour, dash, marker, bar and cell stands where the figure says."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest

from dpo_kit import plots
from dpo_kit.plots import picture, traces
from tests.plots.test_charts import LINES, line

go = pytest.importorskip("plotly.graph_objects")
image = pytest.importorskip("matplotlib.image")
matplotlib_figure = pytest.importorskip("matplotlib.figure")

WIDTH, HEIGHT = 400, 300
BOX = {"l": 50, "r": 30, "t": 40, "b": 60}  # the panel is 320 x 200 pixels


def drawn(figure) -> np.ndarray:
    """The picture as (height, width, 3) in 0..255."""
    read = image.imread(io.BytesIO(picture.png(figure, WIDTH, HEIGHT)), format="png")
    return np.round(read[..., :3] * 255).astype(int)


def is_colour(pixels: np.ndarray, colour: str) -> np.ndarray:
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return (np.abs(pixels - wanted) <= 2).all(-1)


def bare(*traces, **layout):
    """A figure whose panel is exactly the box, its axes without margins."""
    axis = {"showgrid": False, "zeroline": False, "range": [0, 10]}
    made = {"margin": BOX, "showlegend": False, "xaxis": axis, "yaxis": axis}
    return go.Figure(list(traces), layout={**made, **layout})


def at(x: float, y: float) -> tuple[int, int]:
    """Row and column of a point of the `bare` panel."""
    return round(HEIGHT - 60 - y / 10 * 200), round(50 + x / 10 * 320)


def test_a_line_lies_where_its_points_are():
    pixels = drawn(bare(go.Scatter(x=[1, 9], y=[2, 8], mode="lines", line={"color": "#D55E00", "width": 3})))
    rows, columns = np.nonzero(is_colour(pixels, "#D55E00"))
    for x, y in ((1, 2), (5, 5), (9, 8)):
        row, column = at(x, y)
        assert (abs(rows - row) + abs(columns - column)).min() <= 2, (x, y)
    assert columns.min() >= at(1, 2)[1] - 3
    assert columns.max() <= at(9, 8)[1] + 3


def test_dashes_and_gaps_leave_white():
    def share(**changes):
        trace = {"x": [0, 5, 10], "y": [5, 5, 5], "mode": "lines", "line": {"color": "#000000", "width": 3}}
        return is_colour(drawn(bare(go.Scatter({**trace, **changes})))[at(0, 5)[0]], "#000000").mean()

    whole = share()
    assert whole == pytest.approx(320 / WIDTH, abs=0.02)
    assert 0.4 * whole < share(line={"color": "#000000", "width": 3, "dash": "dash"}) < 0.8 * whole
    assert share(x=[0, 4, 5, 10], y=[5, 5, None, 5]) == pytest.approx(0.4 * whole, abs=0.02)


def test_markers_have_their_colour_and_size():
    marker = {"color": "#009E73", "size": 20, "symbol": "square"}
    pixels = drawn(bare(go.Scatter(x=[5], y=[5], mode="markers", marker=marker)))
    rows, columns = np.nonzero(is_colour(pixels, "#009E73"))
    assert np.ptp(rows) == pytest.approx(20, abs=2)
    assert np.ptp(columns) == pytest.approx(20, abs=2)
    assert (round(rows.mean()), round(columns.mean())) == pytest.approx(at(5, 5), abs=1)


@pytest.mark.parametrize("orientation", ["v", "h"])
def test_bars_are_as_long_as_their_values(orientation):
    names, values = ["a", "b"], [2, 8]
    sides = {"x": names, "y": values} if orientation == "v" else {"x": values, "y": names}
    free = {"showgrid": False, "zeroline": False}
    length = {**free, "range": [0, 10]}
    axes = {"xaxis": free, "yaxis": length} if orientation == "v" else {"xaxis": length, "yaxis": free}
    traces = [
        go.Bar(**sides, orientation=orientation, marker={"color": colour})
        for colour in ("#0072B2", "#E69F00")
    ]
    pixels = drawn(bare(*traces, **axes))
    for colour in ("#0072B2", "#E69F00"):
        found = is_colour(pixels, colour)
        sums = found.sum(0 if orientation == "v" else 1)
        lengths = sorted({int(n) for n in sums if n > 20})
        unit = 20 if orientation == "v" else 32
        assert lengths[0] == pytest.approx(2 * unit, abs=2)
        assert lengths[-1] == pytest.approx(8 * unit, abs=2)


def test_cells_of_a_heat_map_have_the_scales_colours_and_undefined_ones_none():
    scale = [[0, "rgb(0, 0, 255)"], [1, "rgb(255, 0, 0)"]]
    made = go.Heatmap(z=[[0, 1], [0.5, None]], x=["0.1", "0.5"], y=["sigmoid", "ipo"], colorscale=scale)
    made.showscale = False
    free = {"showgrid": False}
    pixels = drawn(bare(made, xaxis=free, yaxis=free))
    cells = {
        name: pixels[at(x, y)].tolist() for name, x, y in zip("abcd", (2, 8, 2, 8), (2, 2, 8, 8), strict=True)
    }
    assert cells["a"] == [0, 0, 255]
    assert cells["b"] == [255, 0, 0]
    assert np.abs(np.array(cells["c"]) - [127, 0, 127]).max() <= 2
    assert cells["d"] == [255, 255, 255]


def test_cells_carry_their_values():
    made = go.Heatmap(z=[[0.25]], texttemplate="%{z:.1%} %{text}", text=[["<b>&lt;x&gt;</b>"]])
    assert traces.filled(made.texttemplate, 0.25, made.text[0][0]) == "25.0% <x>"
    assert traces.filled(made.texttemplate, float("nan"), "") == ""


@pytest.mark.parametrize(
    "figure",
    [
        plots.rewards(("one", LINES)),
        plots.rewards(
            [
                ("_a $x$ <b>", LINES),
                ("a $\\frac{$ b", LINES),
                ("b\n" + "long " * 40, LINES),
                ("日本 \u202e", LINES),
            ]
        ),
        plots.reward_grid([(f"_run {i}", [*LINES, line(9, 1e9, -1e-9, 0.0, 1.0)]) for i in range(4)]),
        plots.loss(("new", [])),
        plots.logps(("one", LINES)),
    ],
)
def test_every_chart_of_the_kit_has_a_picture_of_its_size(figure):
    made = picture.png(figure, plots.WIDTH, plots.HEIGHT)
    read = image.imread(io.BytesIO(made), format="png")
    assert read.shape[:2] == (figure.layout.height, plots.WIDTH)


def test_panels_hold_their_own_curves():
    figure = plots.rewards(("one", LINES))
    read = image.imread(io.BytesIO(picture.png(figure, plots.WIDTH, plots.HEIGHT)), format="png")
    pixels = np.round(read[80:, :, :3] * 255).astype(int)  # below legend and titles
    for colour, panel in (
        (picture.BLUE, 0),
        (picture.VERMILLION, 0),
        (picture.GREEN, 1),
        (picture.PURPLE, 2),
    ):
        _, columns = np.nonzero(is_colour(pixels, colour))
        assert len(columns) > 20
        assert set(np.unique(columns * 3 // plots.WIDTH)) <= {panel, panel + 1} - {3}
        assert (columns * 3 // plots.WIDTH == panel).mean() > 0.8


def test_axes_that_match_have_one_range():
    large = [line(1, 0.5, 0.0, 0.0, 1.0), line(2, 0.5, 50.0, -50.0, 1.0)]
    figure = plots.reward_grid([("large", large), ("small", LINES)])
    drawn_on = picture._Panels(matplotlib_figure.Figure(), figure, 840, 330)
    for trace in figure.data:
        drawn_on.draw(0, trace)
    drawn_on.finish()
    limits = {axes.get_ylim() for axes in drawn_on.axes.values()}
    assert len(limits) == 1
    assert limits.pop()[1] > 50


def test_a_logarithmic_axis_is_one():
    axis = {"type": "log", "showgrid": False, "range": [1, 100]}
    trace = go.Scatter(x=[1, 10, 100], y=[5, 5, 5], mode="markers", marker={"color": "#D55E00", "size": 8})
    figure = bare(trace)
    figure.update_layout(xaxis={**axis, "range": [0, 2]})  # Plotly's ranges of such an axis are exponents
    _, columns = np.nonzero(is_colour(drawn(figure), "#D55E00"))
    assert {round(at) for at in (50, 50 + 160, 50 + 320)} <= set(columns.tolist())


POINTS = {"x": [1, 2], "y": [1, 2]}
OVER = {"overlaying": "y", "side": "right"}


@pytest.mark.parametrize(
    ("figure", "told"),
    [
        (go.Figure(go.Pie(values=[1, 2])), "pie traces"),
        (go.Figure([go.Bar(x=["a"], y=[1]), go.Bar(x=["a"], y=[2])], {"barmode": "stack"}), "barmode=stack"),
        (go.Figure(go.Bar(x=["a"], y=[1], base=[3])), "bar: base"),
        (
            go.Figure(go.Bar(x=["a"], y=[1], marker={"color": ["red"]})),
            "markers that differ from point to point",
        ),
        (go.Figure(go.Scatter(**POINTS, fill="tozeroy")), "scatter: fill"),
        (go.Figure(go.Scatter(**POINTS, error_y={"array": [1, 1]})), "scatter: error_y"),
        (go.Figure(go.Scatter(**POINTS, line={"shape": "hv"})), "scatter.line: shape"),
        (go.Figure(go.Scatter(**POINTS, mode="markers+text")), "texts at points"),
        (go.Figure(go.Scatter(x=["2026-01-01", "2026-01-02"], y=[1, 2])), "axes of dates"),
        (
            go.Figure([go.Scatter(**POINTS), go.Scatter(**POINTS, yaxis="y2")], {"yaxis2": OVER}),
            "yaxis2: overlaying",
        ),
        (go.Figure(go.Scatter(**POINTS), {"shapes": [{"type": "line"}]}), "layout: shapes"),
        (go.Figure(go.Scatter(**POINTS), {"xaxis": {"tickvals": [1], "ticktext": ["one"]}}), "xaxis: tick"),
        (
            go.Figure(go.Scatter(**POINTS), {"annotations": [{"text": "here", "x": 1, "y": 1}]}),
            "annotations inside",
        ),
        (go.Figure(go.Heatmap(z=[[1, 2]], x=["a", "a"])), "heat maps with repeated"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_drawn_is_said_instead_of_a_picture_of_something_else(figure, told):
    with pytest.raises(ValueError, match=told):
        picture.png(figure, WIDTH, HEIGHT)
    bundle = plots.mimebundle(figure)
    assert "image/png" not in bundle
    assert f"(no picture for static viewers: {told}" in bundle["text/plain"] or told in bundle["text/plain"]


def test_whatever_goes_wrong_with_a_picture_the_chart_is_there(monkeypatch):
    monkeypatch.setattr(picture, "png", lambda *_: 1 // 0)
    bundle = plots.mimebundle(plots.loss(("one", LINES)))
    assert "application/vnd.plotly.v1+json" in bundle
    assert "integer division" in bundle["text/plain"]


def test_one_cell_is_a_cell():
    made = go.Heatmap(z=[[3]], x=["a"], y=["b"], colorscale=[[0, "#0072B2"], [1, "#0072B2"]], showscale=False)
    free = {"showgrid": False}
    assert is_colour(drawn(bare(made, xaxis=free, yaxis=free)), "#0072B2").sum() == pytest.approx(
        320 * 200, rel=0.02
    )


def test_columns_of_numpy_and_plotlys_own_json_are_read():
    trace = {"type": "scatter", "x": np.arange(3.0), "y": np.array([2.0, np.inf, 8.0]), "mode": "markers"}
    trace["marker"] = {"color": "#D55E00", "size": 9, "symbol": "square"}
    figure = bare(trace)
    again = go.Figure(figure.to_plotly_json())
    assert isinstance(again.data[0].to_plotly_json()["x"], dict | np.ndarray)
    for made in (figure, again):
        rows, _ = np.nonzero(is_colour(drawn(made), "#D55E00"))
        assert {at(0, 2)[0], at(2, 8)[0]} <= set(rows.tolist())
        assert len(rows) < 2 * 11 * 11


def test_bars_are_as_wide_as_their_distances_allow():
    for apart in (0.1, 100):
        made = go.Bar(x=[apart, 2 * apart, 3 * apart], y=[5, 5, 5], marker={"color": "#0072B2"})
        free = {"showgrid": False, "zeroline": False}
        found = is_colour(drawn(bare(made, xaxis=free)), "#0072B2")
        inside = found[at(0, 2.5)[0], 50:370]
        assert inside.mean() == pytest.approx(0.8, abs=0.05)
        assert np.abs(np.diff(inside.astype(int))).sum() in (5, 6)  # three blocks, apart from each other


def test_a_style_of_ones_own_changes_nothing():
    from matplotlib import rc_context

    figure = plots.rewards(("one", LINES))
    before = picture.png(figure, 840, 340)
    with rc_context(
        {"axes.facecolor": "black", "savefig.bbox": "tight", "lines.linestyle": ":", "text.usetex": True}
    ):
        assert picture.png(figure, 840, 340) == before


def test_ticks_that_would_run_together_are_fewer_and_large_numbers_short():
    many = [line(step, 0.5, 0.1, -0.1, 1.0) for step in range(0, 40_001, 400)]
    figure = plots.loss(("long", many))
    figure.update_xaxes(dtick=1)
    panels = picture._Panels(matplotlib_figure.Figure(), figure, 840, 340)
    for i, trace in enumerate(figure.data):
        panels.draw(i, trace)
    panels.finish()
    (axes,) = panels.axes.values()
    texts = [axes.xaxis.get_major_formatter()(at, 0) for at in axes.xaxis.get_major_locator()()]
    assert len(texts) < 12
    assert {"0", "10k", "20k"} <= set(texts)


def test_a_legend_that_does_not_fit_says_how_many_are_left_out():
    runs = [(f"run {i} " + "x" * 90, LINES) for i in range(60)]
    canvas = matplotlib_figure.Figure(figsize=(8.4, 6.0))
    panels = picture._Panels(canvas, plots.rewards(runs), 840, 600)
    handles = [
        (handle, name) for handle, name in ((canvas.add_artist(picture._nothing()), n) for n, _ in runs)
    ]
    picture._draw_legend(canvas, handles, panels.box, 840, 600)
    names = [text.get_text() for text in canvas.legends[0].get_texts()]
    assert all(len(name) <= 40 for name in names)
    assert names[-1] == f"… and {61 - len(names)} more"


def test_a_home_that_cannot_be_written_and_no_browser_say_nothing(tmp_path):
    code = (
        "from dpo_kit import plots; from dpo_kit.plots import picture; from tests.plots.test_charts import LINES\n"
        "print(len(picture.png(plots.rewards([('日本', LINES)]), 840, 340)) > 5000)"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG", "MPL"))}
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env={**kept, "HOME": str(no_folder), "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize("script", ["sleep 600", "exit 1"], ids=["hangs", "fails"])
def test_a_broken_browser_changes_nothing(tmp_path, script):
    """It is not even asked."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n{script}\n")
        file.chmod(0o755)
    code = (
        "import hashlib; from dpo_kit import plots; from tests.plots.test_charts import LINES\n"
        "bundle = plots.mimebundle(plots.rewards(('one', LINES)))\n"
        "print(hashlib.sha256(bundle['image/png'].encode()).hexdigest(), bundle['text/plain'])"
    )
    with_it, without = (
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        for path in (f"{tmp_path}:{os.environ['PATH']}", os.environ["PATH"])
    )
    assert with_it.stdout == without.stdout
    assert with_it.stderr == ""
    assert not (tmp_path / "asked").exists()
