"""The page's numbers against the run's files: table, bars, tiles, phases and every chart's points.

Smoothed values are a weighted mean over all steps, of weight (1 − 1/span) ** distance in steps.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_scalebio.formatting import percent, quantity
from megatron_scalebio.logs.interactions import Interaction
from megatron_scalebio.report.html import write_report
from megatron_scalebio.report.load import load_run
from megatron_scalebio.report.sets import Tile, heat_map
from megatron_scalebio.report.summary import cost
from tests.synthetic_run import write_run

STEPS = 300  # one in each of the charts' 240 points or the next
SPAN = STEPS // 40
WORLD = {"tp": 2, "pp": 3, "dp": 4, "cp": 5, "vpp": 6}
INITIAL = [0.1, 0.15, 0.2, 0.25, 0.3]
SKIPPED = [41, 150]


class Page:
    """A run folder with no value at its usual place, and the page of it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.records = self._unlike()
        self.weights = json.loads((run / "weights.json").read_text())
        self.info = json.loads((run / "run.json").read_text())
        self.known = yaml.safe_load((run / "config.yaml").read_text())["data"]["known_weights"]
        self.page = write_report(run).read_text()
        self.text = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", self.page)).split())

    def _unlike(self) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (self.run / "metrics.jsonl").open()]
        for n, record in enumerate(records, 1):
            record["lr_u"], record["alpha"] = 3 * record["lr_w"], 5.0 + n // 100
            record["tokens"], record["memory_bytes"] = 20_000 + n, 2**30 + 2**22 * n
            # Skewed, so that mean and median are far apart.
            record["time_s"] = {k: s * (1 + (n / STEPS) ** 3) for k, s in record["time_s"].items()}
            record["step_time_s"] = sum(record["time_s"].values()) + 0.025
            record["tokens_per_second"] = 40_000 + n * n // 3
            record["skipped"] = "w: gradient norm is nan" if n in SKIPPED else None
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.run / "metrics.jsonl").write_text(lines)
        tree = json.loads((self.run / "weights.json").read_text())
        for entry, initial in zip(tree["sources"], INITIAL, strict=True):
            entry["initial_weight"] = initial
        (self.run / "weights.json").write_text(json.dumps(tree | {"confidence": 0.8}))
        info = json.loads((self.run / "run.json").read_text())
        (self.run / "run.json").write_text(json.dumps(info | {"world": WORLD}))
        config = yaml.safe_load((self.run / "config.yaml").read_text())
        config["bilevel"]["average_fraction"] = 0.3
        (self.run / "config.yaml").write_text(yaml.safe_dump(config))
        return records

    def series(self, field: str, index: int | None = None) -> np.ndarray:
        values = [r[field] if index is None else r[field][index] for r in self.records]
        return np.array([math.nan if value is None else value for value in values])

    def chart(self, title: str) -> str:
        [found] = re.findall(rf'<svg[^>]*aria-label="{re.escape(title)}".*?</svg>', self.page, re.S)
        return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("numbers") / "run"
    return Page(write_run(folder, steps=STEPS, train_iters=400))


def smoothed(values: np.ndarray, span: int = SPAN) -> np.ndarray:
    there = np.isfinite(values)
    distance = np.abs(np.arange(len(values))[:, None] - np.arange(len(values)))
    weight = (1 - 1 / span) ** distance * there
    return (weight * np.where(there, values, 0.0)).sum(1) / weight.sum(1)


def rows(page: Page) -> dict[str, list[tuple[float, str]]]:
    """Each source's cells after its name: the value it is sorted by, and its text."""
    [body] = re.findall(r'<table id="sources">.*?<tbody>(.*?)</tbody>', page.page, re.S)
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", body):
        name = re.findall(r'<td title="([^"]*)">', row)[0]
        cells = re.findall(r'<td data-v="([^"]*)">([^<]*)</td>', row)
        found[name] = [(float(value), text) for value, text in cells]
    return found


def test_table_of_sources(page: Page) -> None:
    [head] = re.findall(r'<table id="sources">\s*<thead>(.*?)</thead>', page.page)
    titles = re.findall(r">([^<]+)</th>", head)
    assert titles == [
        "Source", "Weight", "Low", "High", "Initial", "Change", "Natural", "Known", "Excess loss",
        "Loss", "Examples",
    ]  # fmt: skip
    found = rows(page)
    by_weight = sorted(page.weights["sources"], key=lambda entry: -entry["weight"])
    assert list(found) == [entry["name"] for entry in by_weight]
    for i, entry in enumerate(page.weights["sources"]):
        excess = smoothed(page.series("excess_loss", i))[-1]
        loss = smoothed(page.series("loss_w", i))[-1]
        expected = [
            (entry["weight"], percent(entry["weight"])),
            (entry["ci_low"], percent(entry["ci_low"])),
            (entry["ci_high"], percent(entry["ci_high"])),
            (INITIAL[i], f"{100 * INITIAL[i]:.1f}%"),
            (entry["weight"] / INITIAL[i], f"× {entry['weight'] / INITIAL[i]:.2g}"),
            (page.info["natural"][i], percent(page.info["natural"][i])),
            (page.known.get(entry["name"], 0.0), percent(page.known.get(entry["name"], 0.0))),
            (excess, f"{excess:+.2g}"),
            (loss, f"{loss:.3f}"),
            (entry["examples"], f"{entry['examples']:,}"),
        ]
        values, texts = zip(*expected, strict=True)
        assert [value for value, _ in found[entry["name"]]] == pytest.approx(values, rel=1e-6)
        assert [text for _, text in found[entry["name"]]] == list(texts)


def test_bars_and_marks_stand_at_their_shares(page: Page) -> None:
    entries = page.weights["sources"]
    every = [e[k] for e in entries for k in ("weight", "ci_high", "initial_weight")]
    whole = math.ceil(20 * max(*every, *page.info["natural"], *page.known.values())) / 20
    for i, entry in enumerate(entries):
        [track] = re.findall(
            rf'<div class="name" title="{entry["name"]}">.*?<div class="value">', page.page, re.S
        )

        def at(kind: str, place: str, track: str = track) -> float:
            [style] = re.findall(rf'<i class="{kind}" style="([^"]*)"', track)
            return float(re.findall(rf"{place}:([\d.]+)%", style)[0])

        low, high = entry["ci_low"], entry["ci_high"]
        expected = {
            ("bar", "width"): entry["weight"], ("whisker", "left"): low,
            ("whisker", "width"): high - low, ("initial", "left"): INITIAL[i],
            ("natural", "left"): page.info["natural"][i],
            ("known", "left"): page.known.get(entry["name"], 0.0),
        }  # fmt: skip
        for (kind, place), share in expected.items():
            assert at(kind, place) == pytest.approx(100 * share / whole, abs=0.006), kind


def test_head_and_tiles(page: Page) -> None:
    entries = page.weights["sources"]
    away = sum(abs(e["weight"] - page.known.get(e["name"], 0.0)) for e in entries)
    assert f"the learned one is {away:.3f} away from it" in page.text
    moved = sorted(entries, key=lambda e: -abs(e["weight"] - e["initial_weight"]))[:3]
    for entry in moved:
        weight, initial = entry["weight"], entry["initial_weight"]
        words = f"{entry['name']} goes {'up' if weight > initial else 'down'} from "
        words += f"{percent(initial)} to {percent(weight)}"
        if weight > initial:
            words += f", {weight / initial:.2g} times its initial share"
        assert words in page.text
    assert page.text.count(" goes ") == 3
    losses = page.series("validation_loss")
    first, last = losses[:15].mean(), losses[-15:].mean()  # a twentieth
    assert f"Validation loss {last:.3f} from {first:.3f}" in page.text
    assert "Steps 300 of 400" in page.text
    tokens = sum(20_000 + n for n in range(1, STEPS + 1))
    per_second = tokens / np.sum(page.series("step_time_s"))
    assert (
        f"Tokens {quantity(tokens)} {quantity(per_second)} per second (training steps only)"
        in page.text
    )
    assert f"{tokens:,}, at {quantity(per_second)} per second (training steps only)" in page.text
    assert "Time 4 min wall clock" in page.text  # 250 s
    assert f"CPU hours {120 * 250 / 3600:.3g} 120 ranks × cpu" in page.text
    assert "Layout TP 2 × CP 5 × PP 3 × DP 4 × VPP 6" in page.text
    assert "Peak memory 2.17 GiB" in page.text  # 2**30 + 300 · 2**22
    assert "with 80% confidence" in page.text and "over the last 30.0% of the steps" in page.text
    assert f"Smoothed over {SPAN} steps" in page.text
    assert "2 of 300 steps" in page.text and "41 w: gradient norm is nan" in page.text
    assert "the share it has in all data (by examples)" in page.text
    seconds = page.series("step_time_s").sum()
    assert cost(load_run(page.run)).step_seconds == pytest.approx(seconds)
    assert f"Time in steps {round(seconds / 60)} min" in page.text and seconds > 120


def test_phases_are_medians_and_the_rest(page: Page) -> None:
    medians = {
        phase: float(np.median([r["time_s"][phase] for r in page.records]))
        for phase in page.records[0]["time_s"]
    }
    step = float(np.median(page.series("step_time_s")))
    medians["other"] = step - sum(medians.values())
    assert 0.015 < medians["other"] < 0.045, "less than a tenth"
    for phase, seconds in medians.items():
        words = f"{phase} {1000 * seconds:.3g} {percent(seconds / step)}"
        assert words in page.text, words


# title: the lines' names, and what each shows of a record
CHARTS: dict[str, dict[str, Callable[[Page], np.ndarray]]] = {
    "Validation loss": {
        "gpt4_val": lambda p: smoothed(p.series("validation_losses", 0)),
        "code_val": lambda p: smoothed(p.series("validation_losses", 1)),
        "L1, all sets": lambda p: smoothed(p.series("validation_loss")),
    },
    "Training loss of w and u": {
        "L2(w) model": lambda p: smoothed(p.series("train_loss_w")),
        "L2(u) reference": lambda p: smoothed(p.series("train_loss_u")),
    },
    "Gap between w and u": {
        "L2(w) − L2(u)": lambda p: smoothed(p.series("train_loss_w") - p.series("train_loss_u"))
    },
    "Gradient norms": {
        role: lambda p, role=role: smoothed(p.series(f"grad_norm_{role}"))
        for role in ("w", "u", "lambda")
    },
    "Learning rates": {
        role: lambda p, role=role: p.series(f"lr_{role}") for role in ("w", "u", "lambda")
    },
    "Alpha": {"alpha": lambda p: p.series("alpha")},
    "Step time": {"seconds": lambda p: smoothed(p.series("step_time_s"))},
    "Weight of each source by step": {
        name: lambda p, i=i: p.series("weights", i)
        for i, name in enumerate(
            ("gpt4_alpaca", "alpaca", "stdlib_code", "shuffled_words", "random_bytes")
        )
    },
    "Excess loss of each source by step": {
        name: lambda p, i=i: smoothed(p.series("excess_loss", i))
        for i, name in enumerate(
            ("gpt4_alpaca", "alpaca", "stdlib_code", "shuffled_words", "random_bytes")
        )
    },
}


@pytest.mark.parametrize("title", CHARTS)
def test_chart_shows_the_series_at_their_steps(page: Page, title: str) -> None:
    svg = page.chart(title)
    shown = json.loads(html.unescape(re.findall(r'data-chart="([^"]*)"', svg)[0]))
    steps = shown["step"]
    assert steps[0] == 1 and steps[-1] == STEPS and len(steps) == 240
    assert {line["name"] for line in shown["lines"]} == set(CHARTS[title])
    to_value = value_at_height(svg, title in ("Gradient norms", "Learning rates"))
    for line in shown["lines"]:
        expected = CHARTS[title][line["name"]](page)[np.array(steps) - 1]
        assert line["y"] == pytest.approx(expected.tolist(), rel=6e-4, abs=1e-9)
        [(colour, path)] = re.findall(
            rf'<g class="line (c\d)"><title>{re.escape(line["name"])}</title>\s*<path d="([^"]*)"',
            svg,
        )
        assert colour == f"c{line['colour']}" and f"stroke: var(--s{line['colour']})" in svg
        drawn = expected > 0 if title == "Learning rates" else expected < math.inf
        x, y = points(path)
        assert x == pytest.approx(np.array(shown["x"])[drawn], abs=0.051)
        heights = to_value(y)
        off = np.abs(heights - (np.log10(expected[drawn]) if "rates" in title or "norms" in title
                                else expected[drawn]))  # fmt: skip
        assert off.max() <= to_value.half_pixel, line["name"]  # type: ignore[attr-defined]


def points(path: str) -> np.ndarray:
    """x and y of a path's points."""
    return np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float).T


def edges(area: str, count: int) -> np.ndarray:
    """Heights of an area's upper and lower edge, from left to right."""
    [path] = re.findall(r'<path d="([^"]*)z', area)
    _, y = points(path)
    y = np.append(y, y[0])[: 2 * count]  # one point where the edges meet
    return np.stack([y[:count], y[count:][::-1]])


def value_at_height(svg: str, log: bool) -> Callable[[np.ndarray], np.ndarray]:
    """What a height in the drawing stands for, by the ticks beside the axis (their log10)."""
    grid = r'<path d="M 50 ([\d.]+) [^>]*stroke: var\(--grid\)[^>]*>.*?<text[^>]*>([^<]*)<'
    ticks = re.findall(grid, svg, re.S)
    heights = np.array([float(y) for y, _ in ticks])
    numbers = [float(t.rstrip("%")) / (100 if t.endswith("%") else 1) for _, t in ticks]
    values = np.log10(numbers) if log else np.array(numbers)
    assert len(ticks) >= 2
    slope = (values[-1] - values[0]) / (heights[-1] - heights[0])

    def to_value(y: np.ndarray) -> np.ndarray:
        return values[0] + slope * (y - heights[0])

    assert np.abs(to_value(heights) - values).max() <= 0.11 * abs(slope), "ticks are even"
    to_value.half_pixel = 0.2 * abs(slope)  # type: ignore[attr-defined]
    return to_value


def test_dotted_lines_are_at_the_known_weights(page: Page) -> None:
    svg = page.chart("Weight of each source by step")
    to_value = value_at_height(svg, log=False)
    dotted = dict(re.findall(r'<g class="target(\d)">\s*<path d="M 50 ([\d.]+)', svg))
    names = dict(re.findall(r'<g class="line c(\d)"><title>([^<]*)<', svg))
    assert len(dotted) == 5
    for colour, height in dotted.items():
        known = page.known.get(names[colour], 0.0)
        assert to_value(np.array([float(height)]))[0] == pytest.approx(known, abs=0.001)


def test_faint_lines_hold_what_was_measured(page: Page) -> None:
    """Behind a smoothed line: least and greatest value from each drawn step up to the next, without
    the far tails."""
    svg = page.chart("Step time")
    to_value = value_at_height(svg, log=False)
    [area] = re.findall(r'<g class="raw0">.*?</g>', svg, re.S)
    high, low = to_value(edges(area, 240))
    raw = page.series("step_time_s")
    raw = np.clip(raw, *np.quantile(raw, [0.005, 0.995]))
    shown = json.loads(html.unescape(re.findall(r'data-chart="([^"]*)"', svg)[0]))["step"]
    for n, (first, end) in enumerate(zip(shown, [*shown[1:], STEPS + 1], strict=True)):
        between = raw[first - 1 : end - 1]
        half = to_value.half_pixel  # type: ignore[attr-defined]
        assert high[n] == pytest.approx(between.max(), abs=half)
        assert low[n] == pytest.approx(between.min(), abs=half)


def test_grey_area_holds_nine_tenths_of_many_sources(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [f"s{i:02d}" for i in range(80)], steps=20, known=False)
    page = write_report(run).read_text()
    [svg] = re.findall(r'<svg[^>]*aria-label="Weight of each source by step".*?</svg>', page, re.S)
    [area] = re.findall(r'<g class="band">.*?</g>', svg, re.S)
    to_value = value_at_height(svg, log=False)
    upper, lower = to_value(edges(area, 20))
    weights = np.array([json.loads(line)["weights"] for line in (run / "metrics.jsonl").open()])
    final = [e["weight"] for e in json.loads((run / "weights.json").read_text())["sources"]]
    others = np.sort(weights[:, np.argsort(final)[:-8]])  # all but the eight in colour
    assert others.shape == (20, 72)
    place = 0.95 * 71  # between the 68th and the 69th
    high = others[:, 67] + (place - 67) * (others[:, 68] - others[:, 67])
    place = 0.05 * 71
    low = others[:, 3] + (place - 3) * (others[:, 4] - others[:, 3])
    half = to_value.half_pixel  # type: ignore[attr-defined]
    np.testing.assert_allclose(upper, high, atol=half)
    np.testing.assert_allclose(lower, low, atol=half)
    rest = sum(sorted(final)[:-20])
    assert f"The others share {percent(rest)}" in page


def test_tiles_of_what_serves_what_are_in_units_of_the_largest() -> None:
    """Their intervals, too: here an eighth of what was fitted."""
    serves = np.array([[4.0, -1.0], [2.0, 0.5], [-8.0, 3.0]])
    found = Interaction(
        np.array(["a", "b", "c"]), np.array(["x", "y"]), serves, serves - 1, serves + 2, 0.9
    )
    assert heat_map(found, ["c", "left out of the run", "a"]) == [
        ("c", [Tile(-1.0, True, "-1.12 to -0.75"), Tile(0.375, True, "+0.25 to +0.62")]),
        ("a", [Tile(0.5, True, "+0.38 to +0.75"), Tile(-0.125, False, "-0.25 to +0.12")]),
    ]
    assert heat_map(None, ["a"]) == []
