"""Terminal output: plain lines where there is no terminal, and nothing in a name is obeyed."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_scalebio.engine import loop
from megatron_scalebio.logs.console import RunConsole, SourceLine, plain
from megatron_scalebio.logs.interactions import Interaction


def make_console(names: list[str], *, terminal: bool) -> tuple[RunConsole, io.StringIO]:
    out = io.StringIO()
    share = 1 / len(names)
    sources = [SourceLine(name, 100, 5000, share, share) for name in names]
    console = Console(file=out, force_terminal=terminal, width=100, highlight=False)
    return RunConsole(sources, train_iters=20, log_interval=10, console=console), out


def show_run(console: RunConsole, run: Path) -> None:
    console.banner({"layout": "TP 2 x PP 1", "output": run})
    console.start()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        console.step(json.loads(line))
    weights = json.loads((run / "weights.json").read_text())
    console.result(weights, {"report": run / "report.html"}, {"gpt4_alpaca": 1.0})


def test_plain_lines_every_interval(make_run: Callable[..., Path]) -> None:
    run = make_run(steps=20, train_iters=20)
    console, out = make_console(
        json.loads((run / "run.json").read_text())["sources"], terminal=False
    )
    show_run(console, run)
    lines = out.getvalue().splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/20", "10/20", "20/20"]
    assert "validation " in steps[0] and "ETA " in steps[0] and "gpt4_alpaca" in steps[0]
    assert any("known" in line and "95% interval" in line for line in lines)
    assert any(line.startswith("distance from the known mixture") for line in lines)
    assert any(line.split() == ["report", str(run / "report.html")] for line in lines)
    assert "\x1b" not in out.getvalue()


def test_slow_steps_have_a_line_every_minute(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 25 s: lines of the first, of each that ends a minute, and of every tenth."""
    run, now = make_run(steps=11, train_iters=20), 1000.0
    console, out = make_console(
        json.loads((run / "run.json").read_text())["sources"], terminal=False
    )
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        now += 25
        console.step(json.loads(line))
    shown = [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines()]
    assert shown == [1, 4, 7, 10]


def test_few_steps_have_no_interval_and_the_verdict_all_the_same() -> None:
    console, out = make_console(["a"], terminal=False)
    entry = {"name": "a", "weight": 1.0, "initial_weight": 1.0, "ci_low": None, "ci_high": None}
    told = {"confidence": 0.95, "converged": False, "reason": "only 2 steps are averaged"}
    console.result({"sources": [entry], **told}, {})
    lines = out.getvalue().splitlines()
    assert lines[1].split()[:3] == ["a", "100.0%", "–"]
    assert lines[-1] == "not converged: only 2 steps are averaged"


def test_progress_bar_on_a_terminal(make_run: Callable[..., Path]) -> None:
    run = make_run(steps=20, train_iters=20)
    console, out = make_console(
        json.loads((run / "run.json").read_text())["sources"], terminal=True
    )
    show_run(console, run)
    assert "20/20" in out.getvalue()
    assert "step 10/20" not in out.getvalue()


def test_an_error_in_a_run_leaves_the_terminal_in_order_and_the_run_without_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    log: Any = SimpleNamespace(close=lambda: told.append("close"), end=lambda: told.append("end"))
    state: Any = None
    monkeypatch.setattr(loop, "run_steps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.logged_steps(state, state, log, None)
    assert told == ["close"]
    monkeypatch.setattr(loop, "run_steps", lambda *_: True)
    assert loop.logged_steps(state, state, log, None)
    assert told == ["close", "close", "end"]


def test_skipped_step_is_a_warning(make_run: Callable[..., Path]) -> None:
    run = make_run(steps=1)
    record = json.loads((run / "metrics.jsonl").read_text())
    console, out = make_console(["a"] * 5, terminal=False)
    console.step(record | {"skipped": "w: source junk: loss is nan", "validation_loss": None})
    assert "warning: step 1 was not applied: w: source junk: loss is nan" in out.getvalue()


def test_names_are_shown_and_not_obeyed() -> None:
    console, out = make_console(["[red]x[/red]", "\x1b[2Jcleared"], terminal=False)
    console.banner({})
    assert "[red]x[/red]" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert plain("a\nb\x07").plain == "a\ufffdb\ufffd"


def test_many_sources_are_cut_and_counted() -> None:
    console, out = make_console([f"s{i}" for i in range(1000)], terminal=False)
    console.banner({})
    assert "and 985 more sources" in out.getvalue()
    assert len(out.getvalue().splitlines()) < 25


def test_the_largest_sources_are_shown_and_all_are_counted() -> None:
    """Of 20: in the banner by tokens, in the result by weight."""
    out = io.StringIO()
    quiet = Console(file=out, width=100, highlight=False)
    sources = [SourceLine(f"s{i}", 100 - i, 1000 + i, 0.05, 0.05) for i in range(20)]
    console = RunConsole(sources, train_iters=20, console=quiet)
    console.banner({})
    shown = out.getvalue().splitlines()[1:]
    assert [line.split()[0] for line in shown[:15]] == [f"s{i}" for i in range(19, 4, -1)]
    assert shown[15:] == ["... and 5 more sources"]
    learned = [(i + 1) / 210 for i in range(20)]
    entries = [
        {"name": f"s{i}", "weight": w, "initial_weight": 0.05, "ci_low": None, "ci_high": None}
        for i, w in enumerate(learned)
    ]
    out.truncate(out.seek(0))
    console.result({"sources": entries}, {}, {f"s{i}": 0.05 for i in range(20)})
    shown = out.getvalue().splitlines()[1:]
    assert [line.split()[0] for line in shown[:15]] == [f"s{i}" for i in range(19, 4, -1)]
    distance = sum(abs(weight - 0.05) for weight in learned)
    assert shown[15:] == [
        "... and 5 more sources",
        f"distance from the known mixture: {distance:.3f} (sum of absolute differences)",
    ]  # fmt: skip


def test_held_out_losses_are_shown_as_they_are() -> None:
    console, out = make_console(["a"], terminal=False)
    entry = {"name": "goal", "examples": 1234, "sample_mean": 2.34567, "token_mean": 1.98768,
             "perplexity": 1043.21}  # fmt: skip
    console.losses([entry, {**entry, "name": "test", "perplexity": 7.29876}])
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert rows[0] == ["held-out", "set", "examples", "loss", "per", "token", "perplexity"]
    assert rows[1] == ["goal", "1,234", "2.3457", "1.9877", "1043.2"]
    assert rows[2][-1] == "7.2988"


def test_time_left_goes_by_the_median_of_the_last_fifty_steps(
    make_run: Callable[..., Path],
) -> None:
    record = json.loads((make_run(steps=1) / "metrics.jsonl").read_text())
    out = io.StringIO()
    source = SourceLine("a", 1, 1, 1.0, 1.0)
    quiet = Console(file=out, width=200, highlight=False)
    console = RunConsole([source] * 5, train_iters=200, log_interval=70, console=quiet)
    for step in range(1, 71):  # the slow ones first, which the last fifty don't hold
        took_s = 9.0 if step <= 20 else 0.5 if step % 5 > 1 else 3.0
        console.step(record | {"step": step, "step_time_s": took_s, "skipped": None})
    assert "ETA 65 s  500 ms/step" in out.getvalue().splitlines()[-1]
    assert out.getvalue().splitlines()[-1].startswith("step 70/200  ")


def test_with_groups_a_line_shows_the_largest_of_them(make_run: Callable[..., Path]) -> None:
    record = json.loads((make_run(steps=1) / "metrics.jsonl").read_text())
    names = [f"topic{t:02d}/format{f}/part" for t in range(4) for f in range(3)]
    console, out = make_console(names, terminal=False)
    groups = {"topic00": 0.1, "topic01": 0.5, "topic02": 0.2, "topic03": 0.2}
    grouped = {"weights": [1 / 12] * 12, "group_weights": groups, "skipped": None, "step": 1}
    console.step({**record, **grouped})
    assert out.getvalue().strip().endswith("topic01 50%, topic02 20%, topic03 20%")


def test_a_training_line_shows_its_loss(make_run: Callable[..., Path]) -> None:
    record = json.loads((make_run(steps=1) / "metrics.jsonl").read_text())
    console, out = make_console(["a"], terminal=False)
    trained = {k: record[k] for k in ("train_loss_w", "step_time_s")}
    console.step({**trained, "step": 1, "validation_loss": 9.9})
    assert f"loss {record['train_loss_w']:.4f}  ETA" in out.getvalue()


def test_what_serves_what_is_in_units_of_the_largest() -> None:
    """The heaviest source first; a point where the interval holds 0."""
    console, out = make_console(["a", "b"], terminal=False)
    serves = np.array([[4.0, -1.0], [2.0, -8.0]])
    names, sets = np.array(["a", "b"]), np.array(["x", "y"])
    console.interaction(
        Interaction(names, sets, serves, serves - 1.5, serves + 1.5, 0.9), [0.3, 0.7]
    )
    assert [line.split() for line in out.getvalue().splitlines()[1:3]] == [
        ["b", "+0.25", "-1.00"], ["a", "+0.50", "·"],
    ]  # fmt: skip
