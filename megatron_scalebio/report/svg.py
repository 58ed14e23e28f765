"""Line charts as inline SVG: they weigh a few KB, take the page's colours in light and dark, and
need no script to be read. A small script (page.js) adds the values under the pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from megatron_scalebio.formatting import shorten

COLOURS = 8  # classes c0 ... c7 of the style sheet
MAX_POINTS = 240
LABEL_CHARS = 20
_TOP, _BOTTOM, _LEFT = 14, 26, 50
_LABEL_HEIGHT = 14
_LEAST = 1e-30  # on logarithmic axes


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
        targets: (colour, value) of dashed horizontal lines.
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


def render(chart: Chart) -> Markup:
    """The chart as an <svg> element, or a sentence where there is nothing to draw."""
    values = _all_values(chart)
    if not len(chart.steps) or not len(values):
        return Markup('<p class="empty">Nothing recorded yet.</p>')
    right = (150 if chart.width > 600 else 110) if chart.labels else 16
    x = _scale(float(chart.steps[0]), float(chart.steps[-1]), _LEFT, chart.width - right, log=False)
    ticks = _log_ticks(values) if chart.log else _linear_ticks(values, chart.zero)
    y = _scale(ticks[0], ticks[-1], chart.height - _BOTTOM, _TOP, chart.log)
    pick = _pick_points(len(chart.steps))
    parts = _axes(chart, x, y, ticks, chart.width - right)
    if chart.band is not None:
        parts.append(_area(chart.steps, *chart.band, x, y, pick, "band"))
    for line in chart.lines:
        parts += _draw_line(chart, line, x, y, pick)
    if chart.labels:
        parts += _labels(chart, y, chart.width - right + 8)
    parts.append(f'<line class="cursor" y1="{_TOP}" y2="{chart.height - _BOTTOM}"/>')
    read_out = escape(json.dumps(_read_out(chart, pick, x), separators=(",", ":")))
    return Markup(  # every text in it is escaped or a formatted number
        f'<svg class="chart" viewBox="0 0 {chart.width} {chart.height}" role="img" '
        f'aria-label="{escape(chart.title)}" data-chart="{read_out}">{"".join(parts)}</svg>'
    )


Scale = Callable[[float], float]


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Scale:
    if log:
        low, high = math.log10(low), math.log10(high)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        position = math.log10(value) if log else value
        return start + (end - start) * (position - low) / span

    return place


def _all_values(chart: Chart) -> NDArray[Any]:
    """Finite values that the y axis has to hold; raw ones without their far tails."""
    drawn = [line.values for line in chart.lines]
    drawn += [np.array([value for _, value in chart.targets])]
    drawn += list(chart.band or ())
    for line in chart.lines:
        if line.raw is not None:
            raw = line.raw[np.isfinite(line.raw)]
            drawn.append(np.quantile(raw, [0.005, 0.995]) if len(raw) else raw)
    values = np.concatenate([np.asarray(array, np.float64).ravel() for array in drawn])
    values = values[np.isfinite(values)]
    return values[values > _LEAST] if chart.log else values


def _linear_ticks(values: NDArray[Any], zero: bool) -> list[float]:
    low, high = float(values.min()), float(values.max())
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-12):
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(values: NDArray[Any]) -> list[float]:
    first = math.floor(math.log10(float(values.min())) + 1e-9)
    last = math.ceil(math.log10(float(values.max())) - 1e-9)
    last = max(last, first + 1)
    stride = math.ceil((last - first) / 6)
    return [10.0**i for i in range(first, last + stride, stride)]


def format_value(value: float, kind: str) -> str:
    if kind == "percent":
        return f"{100 * value:.3g}%"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def _axes(chart: Chart, x: Scale, y: Scale, ticks: list[float], right: float) -> list[str]:
    parts = []
    for tick in ticks:
        kind = "axis" if tick == 0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{_LEFT}" x2="{right}" '
            f'y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text class="tick" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">'
            f"{format_value(tick, chart.kind)}</text>"
        )
    for step in _step_ticks(chart):
        parts.append(
            f'<text class="tick" x="{x(step):.1f}" y="{chart.height - 6}" text-anchor="middle">'
            f"{step:,}</text>"
        )
    return parts


def _step_ticks(chart: Chart) -> list[int]:
    first, last = int(chart.steps[0]), int(chart.steps[-1])
    if first == last:
        return [first]
    count = 6 if chart.width > 600 else 4
    rough = max(1.0, (last - first) / count)
    power = 10 ** math.floor(math.log10(rough))
    step = next(int(power * m) for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    return [tick for tick in range(0, last + 1, step) if tick >= first]


def _pick_points(count: int) -> NDArray[np.int64]:
    """Evenly spread positions, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(np.int64))


def _draw_line(chart: Chart, line: Line, x: Scale, y: Scale, pick: NDArray[np.int64]) -> list[str]:
    colour = "other" if line.colour is None else f"c{line.colour}"
    name = escape(line.name)
    parts = []
    if line.raw is not None:
        low, high = _envelope(line.raw, pick)
        parts.append(_area(chart.steps, low, high, x, y, pick, f"raw {colour}", chart.log))
    path = _path(chart.steps[pick], line.values[pick], x, y, chart.log)
    parts.append(f'<path class="line {colour}" d="{path}"><title>{name}</title></path>')
    for target_colour, value in chart.targets:
        if target_colour == line.colour:
            parts.append(
                f'<line class="target {colour}" x1="{_LEFT}" x2="{x(float(chart.steps[-1])):.1f}" '
                f'y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            )
    return parts


def _path(steps: NDArray[Any], values: NDArray[Any], x: Scale, y: Scale, log: bool) -> str:
    path, pen_up = [], True
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        if not math.isfinite(value) or (log and value <= _LEAST):
            pen_up = True
            continue
        path.append(f"{'M' if pen_up else 'L'}{x(step):.1f} {y(value):.1f}")
        pen_up = False
    if len(path) == 1:  # a single point shows as a dot: the style sheet rounds line ends
        path.append(path[0].replace("M", "L"))
    return "".join(path)


def _envelope(values: NDArray[Any], pick: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Least and greatest value from each picked point up to the next, placed at the point."""
    low, high = np.full(len(values), math.nan), np.full(len(values), math.nan)
    filled = np.where(np.isfinite(values), values, math.inf)
    low[pick] = np.minimum.reduceat(filled, pick)
    high[pick] = np.maximum.reduceat(np.where(np.isfinite(values), values, -math.inf), pick)
    return low, high


def _area(
    steps: NDArray[Any], low: NDArray[Any], high: NDArray[Any], x: Scale, y: Scale,
    pick: NDArray[np.int64], style: str, log: bool = False,
) -> str:  # fmt: skip
    keep = pick[
        np.isfinite(low[pick]) & np.isfinite(high[pick]) & ((low[pick] > _LEAST) | (not log))
    ]
    there = [f"{x(float(steps[i])):.1f} {y(float(high[i])):.1f}" for i in keep]
    back = [f"{x(float(steps[i])):.1f} {y(float(low[i])):.1f}" for i in keep[::-1]]
    return f'<path class="{style}" d="M{"L".join(there + back)}Z"/>' if there else ""


def _labels(chart: Chart, y: Scale, left: float) -> list[str]:
    """Names at the right end of their lines, pushed apart where they would overlap."""
    ends: list[tuple[float, Line]] = []
    for line in chart.lines:
        finite = line.values[np.isfinite(line.values)]
        finite = finite[finite > _LEAST] if chart.log else finite
        if line.colour is not None and len(finite):
            ends.append((y(float(finite[-1])), line))
    ends.sort(key=lambda end: end[0])
    places: list[float] = []
    for wanted, _ in ends:
        places.append(max(wanted, places[-1] + _LABEL_HEIGHT if places else _TOP))
    limit = chart.height - _BOTTOM + 4.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - _LABEL_HEIGHT
    return [
        f'<text class="label c{line.colour}" x="{left:.0f}" y="{place + 4:.1f}">'
        f"{escape(shorten(line.name, LABEL_CHARS))}<title>{escape(line.name)}</title></text>"
        for place, (_, line) in zip(places, ends, strict=True)
    ]


def _read_out(chart: Chart, pick: NDArray[np.int64], x: Scale) -> dict[str, Any]:
    """What the page's script shows under the pointer; NaN as null."""
    lines = [line for line in chart.lines if line.colour is not None]
    return {
        "kind": chart.kind,
        "step": chart.steps[pick].tolist(),
        "x": [round(x(float(step)), 1) for step in chart.steps[pick]],
        "lines": [
            {
                "name": line.name,
                "colour": line.colour,
                "y": [float(f"{v:.4g}") if math.isfinite(v) else None for v in line.values[pick]],
            }
            for line in lines
        ],
    }
