"""A validation loss that did not fall by more than its noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_scalebio.report.advice import advice
from megatron_scalebio.report.learning import stood_still
from megatron_scalebio.report.load import load_run
from megatron_scalebio.report.summary import source_rows

MakeRun = Callable[..., Path]


def run_of(make_run: MakeRun, losses: list[float]) -> Path:
    run = make_run(steps=len(losses), train_iters=len(losses))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, loss in zip(lines, losses, strict=True):
        line["validation_loss"] = loss
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def losses(steps: int, fall: float, noise: float) -> list[float]:
    """Above and below a line in turn, so that each differs from the next by twice the noise."""
    return [4 - fall * t / steps + noise * (-1) ** t for t in range(steps)]


@pytest.mark.parametrize(
    ("steps", "fall", "noise", "still"),
    [
        (100, 0.0, 0.1, True),
        (100, -1.0, 0.1, True),
        # Means of 20 steps: 2 sqrt(4 noise^2 / 20) = 0.0894, of a fall of 0.8 times the whole.
        (100, 0.110, 0.1, True),
        (100, 0.114, 0.1, False),
        (400, 0.056, 0.1, False),
        (19, 0.0, 0.1, False),
        (20, 0.0, 0.1, True),
    ],
)
def test_the_fall_is_held_against_the_noise_between_neighbours(
    make_run: MakeRun, steps: int, fall: float, noise: float, still: bool
) -> None:
    run = load_run(run_of(make_run, losses(steps, fall, noise)))
    assert bool(stood_still(run.history)) == still


def test_steps_without_a_loss_do_not_count(make_run: MakeRun) -> None:
    values = losses(100, 1.0, 0.1)
    values[3] = values[50] = float("nan")
    assert stood_still(load_run(run_of(make_run, values)).history) == ""
    values[:] = [float("nan")] * 100
    assert stood_still(load_run(run_of(make_run, values)).history) == ""


def test_the_report_says_what_to_do_in_place_of_using_the_weights(make_run: MakeRun) -> None:
    run = load_run(run_of(make_run, losses(100, 0.0, 0.1)))
    found = advice(run, source_rows(run))
    assert [each.do for each in found] == ["Raise lr, or make more steps"]
    assert "4 in the first fifth of the steps, 4 in the last, ± 0.089" in found[0].why
    moving = load_run(run_of(make_run, losses(100, 1.0, 0.1)))
    assert [each.do for each in advice(moving, source_rows(moving))] == ["Use the weights"]
