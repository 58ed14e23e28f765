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


def test_labels_stand_in_the_order_of_the_last_values() -> None:
    svg = draw(Line("low", RISING, 0), Line("none", NONE, 1), Line("high", 2 * RISING, 2))
    assert texts(svg)[-2:] == ["high", "low"] and "none" not in texts(svg)


def test_nothing_under_a_label_and_nothing_at_all() -> None:
    svg = draw(Line("grey", RISING), Line("none", NONE, 0, raw=NONE))
    assert '<g class="line other"><title>grey</title>' in svg
    for options in ({}, {"log": True}):
        assert "Nothing recorded" in draw(Line("none", NONE, 0), **options)
    assert "Nothing recorded" in draw(Line("no logarithm", 0 * RISING, 0), log=True)


def test_names_that_matplotlib_would_read_otherwise() -> None:
    names = ["$\\frac{$", "_hidden", "\ud800broken\n", "名前"]
    svg = draw(*(Line(name, RISING, i) for i, name in enumerate(names)))
    assert {"$\\frac{$", "_hidden", "\ufffdbroken\ufffd", "名前"} <= set(texts(svg))


def test_values_on_axes_in_words() -> None:
    assert format_value(0.0314, "percent") == "3.14%"
    assert format_value(0.00025, "number") == "0.00025" and format_value(1e-5, "number") == "1e-5"
    zeros = texts(draw(Line("zero", 0 * RISING, 0), zero=True))
    assert zeros[-6:-1] == ["-0.05", "-0.025", "0", "0.025", "0.05"]
