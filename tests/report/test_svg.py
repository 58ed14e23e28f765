"""Charts of values that a run rarely has."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from megatron_scalebio.report.svg import Chart, Line, format_value, render

RISING = np.arange(1.0, 31.0)
NONE = np.full(30, np.nan)


def draw(*lines: Line, **options: Any) -> str:
    return render(Chart(np.arange(1, 31), lines, "title", **options))


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)<", svg)


def legend(chart: str) -> list[str]:
    return re.findall(r"</svg>([^<]*)</span>", chart)


def test_the_legend_has_the_lines_in_the_order_of_their_last_values_and_as_they_are_drawn() -> None:
    drawn = draw(Line("low", RISING, 0), Line("none", NONE, 1), Line("high", 2 * RISING, 2))
    assert legend(drawn) == ["high", "low"] and "none" not in texts(drawn)
    [sample] = re.findall(r'class="c2"><svg class="key"><path [^>]*stroke-dasharray="(.*?)"', drawn)
    [line] = re.findall(r'class="line c2">.*?stroke-dasharray: ([^;]*);', drawn, flags=re.S)
    assert sample.split() == line.replace(",", " ").split()
    assert 'class="legend"' not in draw(Line("one", RISING, 0), labels=False)


def test_the_last_number_of_the_axis_of_steps_says_what_it_counts() -> None:
    assert [text for text in texts(draw(Line("one", RISING, 0))) if "step" in text] == ["step 30"]
    long = render(Chart(np.arange(1, 1235), [Line("one", np.arange(1234.0), 0)], "title"))
    assert [text for text in texts(long) if "step" in text] == ["step 1,000"]
    single = render(Chart(np.array([7]), [Line("one", np.ones(1), 0)], "title"))
    assert "step 8" in texts(single)


def test_nothing_under_a_label_and_nothing_at_all() -> None:
    svg = draw(Line("grey", RISING), Line("none", NONE, 0, raw=NONE))
    assert '<g class="line other"><title>grey</title>' in svg
    for options in ({}, {"log": True}):
        assert "Nothing recorded" in draw(Line("none", NONE, 0), **options)
    assert "Nothing recorded" in draw(Line("no logarithm", 0 * RISING, 0), log=True)


def test_names_that_matplotlib_would_read_otherwise() -> None:
    names = ["$\\frac{$", "_hidden", "\ud800broken\n", "名前"]
    svg = draw(*(Line(name, RISING, i) for i, name in enumerate(names)))
    assert {"$\\frac{$", "_hidden", "\ufffdbroken\ufffd", "名前"} <= {*legend(svg)}


def test_values_on_axes_in_words() -> None:
    assert format_value(0.0314, "percent") == "3.14%"
    assert format_value(0.00025, "number") == "0.00025" and format_value(1e-5, "number") == "1e-5"
    zeros = texts(draw(Line("zero", 0 * RISING, 0), zero=True))
    assert zeros[-5:] == ["-0.05", "-0.025", "0", "0.025", "0.05"]
