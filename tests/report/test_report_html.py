"""The report page: what it says, and that no run folder breaks it or runs a script in it."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_scalebio.errors import UserError
from megatron_scalebio.logs.interactions import Interaction
from megatron_scalebio.report import html, summary
from megatron_scalebio.report.html import write_report
from megatron_scalebio.report.load import load_run

MakeRun = Callable[..., Path]
HOSTILE = "<script>alert(1)</script>"


class _Elements(HTMLParser):
    """Counts start tags and collects the text outside <script> and <style>."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] not in ("script", "style"):
            self.text += data


def read_page(run: Path) -> tuple[str, _Elements]:
    page = write_report(run).read_text()
    elements = _Elements()
    elements.feed(page)
    return page, elements


def test_page_of_a_finished_run(make_run: MakeRun) -> None:
    run = make_run()
    page, elements = read_page(run)
    text = " ".join(elements.text.split())
    assert "Converged" in text and "The reported weights are averages" in text
    assert "every 95% interval" in text.lower()
    assert re.search(r"gpt4_alpaca goes up from 20.0% to \d\d.\d%", text)
    assert (run / "blend.txt").read_text().strip() in text
    assert "true mixture of this run is known" in text
    assert "megatron-scalebio reweight --config run.yaml" in text
    assert "w: source 1: loss is nan" in text  # a skipped step
    assert "2 ranks on cpu" in text
    assert page.count('<svg class="chart"') == 9


def test_page_is_one_file_that_loads_nothing(make_run: MakeRun) -> None:
    page, elements = read_page(make_run())
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", page)
    assert elements.tags.count("script") == 1
    assert len(page) < 500_000


def test_every_box_that_scrolls_is_reached_by_keyboard_and_named(make_run: MakeRun) -> None:
    run = make_run(converged=False)
    tree = json.loads((run / "weights.json").read_text())
    names = [entry["name"] for entry in tree["sources"]]
    tree["groups"] = [{"name": "all", "weight": 1.0, "ci_low": 1.0, "ci_high": 1.0, "level": 1}]
    tree["validation"] = [{"name": "v", "weight": 1.0}]
    (run / "weights.json").write_text(json.dumps(tree))
    serves = np.ones((len(names), 1))
    Interaction(np.array(names), np.array(["v"]), serves, serves, serves, 0.95).write(run)
    page, _ = read_page(run)
    boxes = re.findall(r'<(?:div class="scroll"|pre(?! class="wrap">megatron))[^>]*>', page)
    assert len(boxes) == 7
    for box in boxes:
        assert 'tabindex="0" role="region" aria-label="' in box
    assert len({box.partition("aria-label=")[2] for box in boxes}) == len(boxes)


def test_names_from_files_are_escaped_everywhere(make_run: MakeRun) -> None:
    run = make_run([HOSTILE, 'b" onmouseover="alert(2)', "c' {{ 7*7 }} &amp;", "d"], known=True)
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(metrics[-1]) | {"skipped": HOSTILE, "time_s": {HOSTILE: 0.1}}
    (run / "metrics.jsonl").write_text("\n".join([*metrics[:-1], json.dumps(last)]))
    (run / "command.txt").write_text(f"reweight {HOSTILE}")
    (run / "blend.txt").write_text(f"0.5 {HOSTILE} 0.5 </pre>{HOSTILE}")
    info = json.loads((run / "run.json").read_text())
    info |= {"device": HOSTILE, "versions": {HOSTILE: HOSTILE}, "validation": [HOSTILE, "v"]}
    (run / "run.json").write_text(json.dumps(info))
    _, elements = read_page(run)
    assert HOSTILE in elements.text
    assert elements.tags.count("script") == 1
    assert "onmouseover" not in [name for name, _ in elements.attributes]
    assert "c' {{ 7*7 }} &amp;" in elements.text


def test_paths_with_a_space_are_in_the_blend(make_run: MakeRun) -> None:
    run = make_run()
    tree = json.loads((run / "weights.json").read_text())
    for source in tree["sources"]:
        source["path"] = f"all data/{source['path']}"
    (run / "weights.json").write_text(json.dumps(tree))
    words = [word for source in tree["sources"] for word in ("0.2", source["path"])]
    (run / "blend.txt").write_text(shlex.join(words))
    assert all(row.in_blend for row in summary.source_rows(load_run(run)))


def test_run_in_progress(make_run: MakeRun) -> None:
    _, elements = read_page(make_run(converged=None, steps=37))
    assert "step 37 of 600" in elements.text
    assert "no weights.json yet" in elements.text
    assert "the reported weights will be averages" in elements.text


def test_a_run_that_converged_and_goes_on_can_be_used(make_run: MakeRun) -> None:
    run = make_run()
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"ended": None}))
    assert summary.verdict(load_run(run)).status == "converged"
    (run / "weights.json").unlink()
    assert summary.verdict(load_run(run)).status == "running"


def test_not_converged_says_why(make_run: MakeRun) -> None:
    _, elements = read_page(make_run(converged=False))
    assert "treat the weights as provisional" in elements.text
    assert "wider than the tolerance" in elements.text


def test_torn_last_line_is_left_out_and_said(make_run: MakeRun) -> None:
    run = make_run(steps=20)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 21, "weights": [0.2, 0.\xff')
    _, elements = read_page(run)
    assert "1 unreadable line(s) left out (line 21)" in elements.text


@pytest.mark.parametrize("kept", ["metrics.jsonl", "run.json", "weights.json"])
def test_page_from_any_single_file(make_run: MakeRun, kept: str) -> None:
    run = make_run(steps=20)
    for path in run.iterdir():
        if path.name != kept:
            path.unlink()
    read_page(run)


def test_page_of_one_step_and_of_none(make_run: MakeRun) -> None:
    run = make_run(steps=1, converged=None)
    read_page(run)
    (run / "metrics.jsonl").write_text("")
    _, elements = read_page(run)
    assert "Nothing recorded yet" in elements.text


def test_the_picture_shows_the_heaviest_twenty_and_says_what_is_left(make_run: MakeRun) -> None:
    run = make_run([f"shard {i:02d}" for i in range(24)], known=False)
    page, elements = read_page(run)
    entries = json.loads((run / "weights.json").read_text())["sources"]
    rest = sum(sorted(entry["weight"] for entry in entries)[:4])
    said = f"The 20 largest of 24 sources. The others share {100 * rest:.1f}%"
    assert said in " ".join(elements.text.split())
    assert page.count('<i class="bar" style') == 20


def test_many_sources_still_make_a_page(make_run: MakeRun) -> None:
    run = make_run([f"shard {i:04d}" for i in range(1000)], steps=30, known=False)
    page, elements = read_page(run)
    assert "shard 0999" in elements.text
    assert len(page) < 1_500_000


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("weights.json", "{", r"weights.json:1: not valid JSON"),
        ("weights.json", "[1]", "not a JSON object"),
        ("weights.json", '{"sources": [{"name": "a"}]}', r"sources\[0\]: 'weight' is None"),
        ("weights.json", '{"sources": [{"name": "a", "weight": 0.5}]}', "other sources"),
        ("run.json", '{"sources": [1, 2]}', "'sources' is not a list of names"),
        (
            "metrics.jsonl",
            '{"step": 1, "weights": [0.5, 0.5]}',
            r"metrics.jsonl:1: 'weights' has 2",
        ),
        ("config.yaml", "a: [1", "config.yaml"),
    ],
)
def test_malformed_files_are_user_errors(
    make_run: MakeRun, name: str, content: str, complaint: str
) -> None:
    run = make_run(steps=5)
    (run / name).write_text(content)
    with pytest.raises(UserError, match=complaint):
        write_report(run)


@pytest.mark.parametrize(
    "change",
    [
        {"world": "x", "natural": [1, 2], "versions": [], "started": 5, "ended": "soon"},
        {"world": {"tp": "two", "dp": None}, "natural": "x", "parameters": "many", "device": None},
        {"validation": ["v"] * 2, "started": 1.5, "ended": 3},
    ],
)
def test_odd_values_in_run_json_do_no_harm(make_run: MakeRun, change: dict) -> None:
    run = make_run(steps=5)
    info = json.loads((run / "run.json").read_text()) | change
    (run / "run.json").write_text(json.dumps(info))
    read_page(run)


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no metrics.jsonl.*output folder of `reweight`"):
        write_report(tmp_path)


def test_unwritable_output_keeps_the_old_page(make_run: MakeRun) -> None:
    run = make_run(steps=2)
    with pytest.raises(UserError, match=r"run.json: is a file, and a folder"):
        write_report(run, run / "run.json" / "page.html")


def test_command_line(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    html.add_arguments(parser)
    page = tmp_path / "page.html"
    assert html.run(parser.parse_args([str(make_run(steps=2)), "--output", str(page)])) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert page.read_text().startswith("<!doctype html>")


def test_smoothing_keeps_a_constant_follows_a_ramp_and_ignores_gaps() -> None:
    ramp = np.arange(400.0)
    ramp[5::7] = np.nan
    smoothed = summary.smooth(ramp)
    assert np.allclose(smoothed[60:-60], np.arange(400.0)[60:-60], atol=0.2)
    assert np.allclose(summary.smooth(np.full((9, 2), 3.0)), 3.0)
    assert np.isnan(summary.smooth(np.full(5, np.nan))).all()


def test_change_is_sure_only_beyond_the_interval(make_run: MakeRun) -> None:
    rows = summary.source_rows(load_run(make_run(converged=False)))
    changes = {change.name: change.sure for change in summary.biggest_changes(rows, count=5)}
    for row in rows:
        if row.name in changes:
            assert row.low is not None and row.high is not None and row.initial is not None
            assert changes[row.name] == (not row.low <= row.initial <= row.high)


def moved(count: int, move: float) -> list[summary.SourceRow]:
    """Sources of equal weights, but for the first, which moved."""
    rows = [summary.SourceRow(f"s{i}", "", 1 / count, initial=1 / count) for i in range(count)]
    rows[0].weight += move
    return rows


@pytest.mark.parametrize(
    ("move", "words"),
    [
        (0.035, "up from 25.0% to 28.5%"),
        (0.04, "up from 25.0% to 29.0%, 1.2 times its initial share"),
        (-0.2, "down from 25.0% to 5.0%"),
    ],
)
def test_how_many_times_the_initial_share_is_said_where_it_tells(move: float, words: str) -> None:
    assert [change.words for change in summary.biggest_changes(moved(4, move))] == [words]


def test_a_large_multiple_is_a_plain_number() -> None:
    rows = [summary.SourceRow(f"s{i}", "", 0.001, initial=0.001) for i in range(1000)]
    rows[0].weight = 0.2004
    [change] = summary.biggest_changes(rows)
    assert change.words == "up from 0.10% to 20.0%, 200 times its initial share"


def test_of_many_sources_a_uniform_share_is_a_notable_change() -> None:
    """Below 2 % of the mixture, or below a uniform share of more than fifty, it isn't told."""

    def told(count: int, move: float) -> bool:
        return [change.name for change in summary.biggest_changes(moved(count, move))] == ["s0"]

    assert [told(10, move) for move in (0.019, 0.021)] == [False, True]
    assert [told(200, move) for move in (0.0049, 0.0051)] == [False, True]


def test_a_step_that_comes_again_replaces_what_came_after_it(tmp_path: Path) -> None:
    lines = [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (2, 0.5), (3, 0.6)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s, "alpha": a}) + "\n" for s, a in lines))
    history = load_run(tmp_path).history
    assert history.steps.tolist() == [1, 2, 3]
    assert history.scalars["alpha"].tolist() == [0.1, 0.5, 0.6]


def test_cost_is_ranks_times_wall_clock(make_run: MakeRun) -> None:
    cost = summary.cost(load_run(make_run()))
    assert cost.ranks == 2
    assert cost.tokens == 600 * 24576
    assert cost.device_hours == pytest.approx(2 * 250 / 3600)


def test_cost_of_a_resumed_run_is_that_of_its_steps(make_run: MakeRun) -> None:
    """Its clock is that of the last start only."""
    run = make_run()
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"started": "2025-03-01T10:04:05+00:00"}))
    cost = summary.cost(load_run(run))
    assert cost.wall_seconds is None and cost.step_seconds > 5
    assert cost.device_hours == pytest.approx(2 * cost.step_seconds / 3600)
