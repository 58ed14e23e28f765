"""What the style of the pages owes to readers: contrast, and no meaning in colours alone."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from megatron_scalebio.report.svg import COLOURS

STYLE = resources.files("megatron_scalebio.report").joinpath("page.css").read_text()
LIGHT, DARK = re.findall(r":root \{(.*?)\}", STYLE, re.S)
READABLE = 4.5  # WCAG 2.2, 1.4.3


def colours(root: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", root))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("root", [LIGHT, DARK])
def test_text_can_be_read(root: str) -> None:
    of = colours(root)
    pairs = [(text, on) for text in ("ink", "soft", "faint") for on in ("page", "card", "track")]
    pairs += [(state, f"{state}-bg") for state in ("good", "warn", "busy")]
    low = {pair: contrast(of[pair[0]], of[pair[1]]) for pair in pairs}
    assert min(low.values()) >= READABLE, low


def test_the_parts_of_a_bar_differ_by_more_than_their_colours() -> None:
    patterns = {}
    for number in range(1, COLOURS):
        head = re.escape(f".stack .c{number}, .swatch.c{number} {{")
        [patterns[number]] = re.findall(head + r"(.*?)\}", STYLE, re.S)
    assert len(set(patterns.values())) == COLOURS - 1
    assert all("var(--hatch)" in pattern for pattern in patterns.values())
    assert not re.search(r"\.(stack i|swatch) \{[^}]*background:", STYLE), "which would undo them"


def test_tiles_leave_no_place_empty() -> None:
    """A grid would, where their number is no multiple of the columns."""
    [tiles] = re.findall(r"^\.tiles \{(.*?)\}", STYLE, re.S | re.M)
    [tile] = re.findall(r"^\.tiles div \{(.*?)\}", STYLE, re.S | re.M)
    assert "display: flex; flex-wrap: wrap" in tiles and "flex: 1 1" in tile
