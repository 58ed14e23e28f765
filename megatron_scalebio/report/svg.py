"""Line charts as inline SVG, drawn by matplotlib: they take the page's colours in light and dark,
and need no script to be read. A small script (page.js) adds the values under the pointer.
"""

import io
import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from megatron_scalebio.formatting import printable, shorten

COLOURS = 8  # --s0 ... --s7 of the style sheet
MAX_POINTS = 240
LABEL_CHARS = 40
# Of the colours, in turn: lengths of line and gap in widths of the line.
_DASHES = ((), (5, 1.2), (5, 1.2, 1, 1.2), (2, 1))
_WIDTH = 2
_TOP, _BOTTOM, _LEFT, _RIGHT = 14, 26, 50, 16
_LEAST = 1e-30  # on logarithmic axes
# The style sheet's colours, each with what matplotlib draws in until it takes its place.
_NAMES = (*(f"s{i}" for i in range(COLOURS)), "faint", "grid", "grey", "band")
_INKS = {name: f"#0a{i:02}f0" for i, name in enumerate(_NAMES)}
_STYLE = {
    "axes.autolimit_mode": "round_numbers", "axes.ymargin": 0, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": _INKS["grid"], "font.size": 12, "svg.fonttype": "none",
    "text.parse_math": False, "path.simplify": False,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}tick.color": _INKS["faint"] for axis in "xy"}, "xtick.major.pad": 8,
    **{f"{axis}tick.{ticks}.size": 0 for axis in "xy" for ticks in ("major", "minor")},
}  # fmt: skip


@dataclass
class Line:
    """One series over the chart's steps; NaN leaves a gap.

    Args:
        colour: index of a colour, or None for a thin grey line without label or read-out.
        raw: the unsmoothed values, drawn faintly behind.
    """

    name: str
    values: NDArray[Any]
    colour: int | None = None
    raw: NDArray[Any] | None = None


@dataclass
class Chart:
    """A line chart over training steps.

    Args:
        steps: (T,) increasing.
        lines: series of length T; drawn in order, so the last lies on top.
        kind: how values read: "percent" or "number".
        log: logarithmic y axis; values that are not positive are left out.
        zero: the y axis includes zero.
        band: (low, high), each (T,): a grey area behind the lines.
        targets: (colour, value) of dotted horizontal lines.
        width: of the drawing, in px of its own scale.
    """

    steps: NDArray[Any]
    lines: Sequence[Line]
    title: str
    kind: str = "number"
    log: bool = False
    zero: bool = False
    band: tuple[NDArray[Any], NDArray[Any]] | None = None
    targets: Sequence[tuple[int, float]] = ()
    width: int = 960
    height: int = 320
    labels: bool = True

    def shown(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values that the axis has a place for, and NaN."""
        return np.where(np.isfinite(values) & ((values > _LEAST) | (not self.log)), values, np.nan)


def render(chart: Chart) -> Markup:
    """The chart as an <svg> element under its legend; a sentence where nothing is to be drawn."""
    # Here, so that a run does not load it at its start.
    from matplotlib import style
    from matplotlib.figure import Figure

    if not any(np.isfinite(chart.shown(line.values)).any() for line in chart.lines):
        return Markup('<p class="empty">Nothing recorded yet.</p>')
    pick = _pick_points(len(chart.steps))
    drawing = io.StringIO()
    # matplotlib warns of letters that its own font lacks, which the page does not use.
    with style.context(["default", _STYLE]), warnings.catch_warnings(action="ignore"):
        figure = Figure((chart.width / 72, chart.height / 72), dpi=72)
        figure.subplots_adjust(
            _LEFT / chart.width, _BOTTOM / chart.height,
            1 - _RIGHT / chart.width, 1 - _TOP / chart.height,
        )  # fmt: skip
        axes = figure.add_subplot()
        _draw(axes, chart, pick)
        figure.savefig(drawing, format="svg", transparent=True)
    x = axes.transData.transform([(step, 1.0) for step in chart.steps[pick]])[:, 0]
    read_out = escape(json.dumps(_read_out(chart, pick, x), separators=(",", ":")))
    return _legend(chart) + Markup(  # every text in it is escaped or a formatted number
        f'<svg class="chart" viewBox="0 0 {chart.width} {chart.height}" role="img" tabindex="0" '
        f'aria-label="{escape(chart.title)}" data-chart="{read_out}">'
        f"{_page_svg(drawing.getvalue(), chart)}"
        f'<line class="cursor" y1="{_TOP}" y2="{chart.height - _BOTTOM}"/></svg>'
    )


def _legend(chart: Chart) -> Markup:
    """The coloured lines' names by their last values, apart from the drawing, which may shrink."""
    ends = []
    for line in chart.lines if chart.labels else ():
        values = chart.shown(line.values)
        values = values[np.isfinite(values)]
        if line.colour is not None and len(values):
            ends.append((-values[-1], line.colour, printable(shorten(line.name, LABEL_CHARS))))
    entry = Markup('<span class="c{}"><svg class="key"><path d="M0 8h22"{}/></svg>{}</span>')
    entries = [entry.format(colour, _dashes_of(colour), name) for _, colour, name in sorted(ends)]
    whole = Markup('<div class="legend">{}</div>')
    return whole.format(Markup().join(entries)) if entries else Markup()


def _dashes_of(colour: int) -> Markup:
    lengths = " ".join(f"{_WIDTH * length:g}" for length in _DASHES[colour % len(_DASHES)])
    return Markup(' stroke-dasharray="{}"').format(lengths) if lengths else Markup()


def _draw(axes: Any, chart: Chart, pick: NDArray[np.int64]) -> None:
    steps = chart.steps[pick]
    _set_axes(axes, chart)
    if chart.band is not None:
        _fill(axes, steps, *(edge[pick] for edge in chart.band), color=_INKS["band"], gid="band")
    for i, line in enumerate(chart.lines):
        ink = _INKS["grey" if line.colour is None else f"s{line.colour}"]
        if line.raw is not None:
            raw = chart.shown(line.raw)
            raw = np.clip(raw, *np.nanquantile(raw, [0.005, 0.995]))  # a spike squeezes all else
            low, high = np.fmin.reduceat(raw, pick), np.fmax.reduceat(raw, pick)
            _fill(axes, steps, low, high, color=ink, alpha=0.2, gid=f"raw{i}")
        values = chart.shown(line.values)
        width, marker = 1 if line.colour is None else _WIDTH, "o" if len(steps) == 1 else ""
        dashes = () if line.colour is None else _DASHES[line.colour % len(_DASHES)]
        axes.plot(
            steps, values[pick], color=ink, linewidth=width, dashes=dashes, marker=marker,
            gid=f"line{i}",
        )  # fmt: skip
    for colour, value in chart.targets:
        ink = _INKS[f"s{colour}"]
        axes.axhline(value, color=ink, linewidth=1.5, linestyle=":", gid=f"target{colour}")


def _fill(
    axes: Any, steps: NDArray[Any], low: NDArray[Any], high: NDArray[Any], **style: Any
) -> None:
    there = np.isfinite(low) & np.isfinite(high)
    steps, low, high = steps[there], low[there], high[there]
    axes.fill([*steps, *steps[::-1]], [*high, *low[::-1]], **style)


def _set_axes(axes: Any, chart: Chart) -> None:
    first, last = chart.steps[0], chart.steps[-1]
    axes.set_xlim(first, max(last, first + 1))
    axes.locator_params("x", nbins=chart.width // 150, steps=[1, 2, 5, 10], integer=True)
    end = max(step for step in axes.get_xticks() if step <= max(last, first + 1))
    axes.xaxis.set_major_formatter(lambda x, _: ("step " if x == end else "") + f"{x:,.0f}")
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.locator_params("y", nbins=5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=4)
    axes.yaxis.set_major_formatter(lambda y, _: format_value(y, chart.kind))
    if chart.zero:
        axes.plot((first, last), (0, 0), color=_INKS["grey"], linewidth=1)


def _page_svg(drawing: str, chart: Chart) -> str:
    """What matplotlib has drawn, in the page's colours, with the lines' names for the pointer."""

    def name(line: re.Match[str]) -> str:
        found = chart.lines[int(line[1])]
        kind = "line other" if found.colour is None else f"line c{found.colour}"
        return f'<g class="{kind}"><title>{escape(found.name)}</title>'

    body = drawing[drawing.index('<g id="figure_1">') : drawing.rindex("</svg>")]
    body = re.sub(r'<g id="line(\d+)">', name, body)
    body = re.sub(r'<g id="(raw\d+|target\d|band)">', r'<g class="\1">', body)
    body = re.sub(r' (id|clip-path)="[^"]*"|<defs>.*?</defs>|<!--.*?-->', "", body, flags=re.S)
    for colour, ink in _INKS.items():
        body = body.replace(f": {ink}", f": var(--{colour})")
    return body


def format_value(value: float, kind: str) -> str:
    if kind == "percent":
        return f"{100 * value:.3g}%"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def _pick_points(count: int) -> NDArray[np.int64]:
    """Evenly spread positions, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(np.int64))


def _read_out(chart: Chart, pick: NDArray[np.int64], x: NDArray[Any]) -> dict[str, Any]:
    """What the page's script shows under the pointer; NaN as null."""
    lines = [line for line in chart.lines if line.colour is not None]
    return {
        "kind": chart.kind,
        "step": chart.steps[pick].tolist(),
        "x": x.round(1).tolist(),
        "lines": [
            {
                "name": line.name,
                "colour": line.colour,
                "y": [float(f"{v:.4g}") if math.isfinite(v) else None for v in line.values[pick]],
            }
            for line in lines
        ],
    }
