"""Schedules of mixtures: read as they are, and refused where no training can follow them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_scalebio.data.blend_schedule import read_schedule
from megatron_scalebio.errors import UserError
from megatron_scalebio.methods.stages import stages_of
from megatron_scalebio.mixture.confidence import TrajectoryBlocks

GOOD: list[dict[str, Any]] = [
    {"step": 0, "weights": {"a": 3.0, "b": 1.0}},
    {"step": 4, "weights": {"b": 0.5, "c": 0.5}},
]


def read(tmp_path: Path, stages: Any) -> Any:
    path = tmp_path / "blend_schedule.json"
    path.write_text(json.dumps({"stages": stages}))
    return read_schedule(path, ["a", "b", "c"])


def test_a_stage_lasts_until_the_next_one(tmp_path: Path) -> None:
    schedule = read(tmp_path, GOOD)
    assert [schedule.at(step) for step in (0, 3)] == [[0.75, 0.25, 0.0]] * 2
    assert [schedule.at(step) for step in (4, 900)] == [[0.0, 0.5, 0.5]] * 2
    assert read_schedule(tmp_path, ["a", "b", "c"]) == schedule  # the folder of a run


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([GOOD[0], {**GOOD[1], "step": 0}], "stages[1].step: 0 does not come after 0"),
        ([GOOD[0], GOOD[1], {**GOOD[1], "step": 3}], "stages[2].step: 3 does not come after 4"),
        ([GOOD[1]], "stages[0].step: 4 leaves the steps before it no mixture"),
        ([GOOD[0], {**GOOD[1], "step": 4.5}], "stages[1].step: 4.5 is not a step"),
        ([{**GOOD[0], "step": -1}, GOOD[1]], "stages[0].step: -1 is not a step"),
        ([], "stages is empty"),
        ([GOOD[0], {"step": 4, "weights": {"c": 1, "d": 1}}], "no source is named d"),
        ([GOOD[0]], "has no weight of c in any stage"),
        ([GOOD[0], {"step": 4, "weights": {"c": -1}}], "stages[1]: the weight of 'c' is -1.0"),
        ([GOOD[0], {"step": 4, "weights": {"c": 0}}], "stages[1]: no source has a weight above 0"),
        ([GOOD[0], {"step": 4}], "holds no schedule (KeyError('weights'))"),
        ([GOOD[0], {"step": 4, "weights": [1]}], "holds no schedule (AttributeError("),
    ],
)
def test_what_is_no_schedule_is_refused(tmp_path: Path, changed: Any, words: str) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, changed)
    assert words in str(refused.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read: No such file"):
        read_schedule(tmp_path / "none.json", ["a"])
    (tmp_path / "text.json").write_text("no")
    with pytest.raises(UserError, match="holds no schedule"):
        read_schedule(tmp_path / "text.json", ["a"])


def test_stages_begin_where_the_mixture_has_changed() -> None:
    path = TrajectoryBlocks(2, 32)
    for step in range(512):  # eight pieces of 64
        first = 0.3 if step < 192 else 0.5 if step < 384 else 0.52
        path.append(torch.tensor([first, 1 - first]))
    assert [step for step, _ in stages_of(path, tolerance=0.05)] == [0, 192]
    # From 384 on 2 % of what is drawn are of another source; weights of both sources differ by it.
    assert [step for step, _ in stages_of(path, tolerance=0.021)] == [0, 192]
    assert [step for step, _ in stages_of(path, tolerance=0.01)] == [0, 192, 384]
    assert [step for step, _ in stages_of(path, 0.01, scale=0.5)] == [0, 96, 192]
    assert [step for step, _ in stages_of(path, 0.01, scale=1e-3)] == [0]
    assert [step for step, _ in stages_of(path, 0.05, 0.5, before=100)] == [0, 146]
    first, second = (weights for _, weights in stages_of(path, tolerance=0.05))
    assert first == pytest.approx([0.3, 0.7]) and second == pytest.approx([0.508, 0.492])
    assert stages_of(TrajectoryBlocks(2), 0.05) == []
