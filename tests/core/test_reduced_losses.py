"""What a flush's losses come to: the sums of all ranks, of sources and validation sets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_scalebio.core import flush as module
from megatron_scalebio.core.flush import Pass, loss_func, passes_of, reduce_losses
from megatron_scalebio.mixture.objective import Role
from tests.core.test_flush import VALID, Group, U, W, batch, groups, tensor


class OtherRank:
    """Stands for the sum with one more rank, whose part is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, theirs: list[float]) -> None:
        self.theirs, self.ours = theirs, None
        monkeypatch.setattr(module, "summed", self.summed)

    def summed(self, flat: torch.Tensor) -> torch.Tensor:
        assert self.ours is None, "one reduction"
        self.ours = flat.tolist()
        return flat + tensor(self.theirs)


def record(role: Role, groups: list[int], parts: list[float]) -> dict[str, Any]:
    counts_B = torch.ones(len(groups), dtype=torch.bool)
    return {
        "role": role, "group_B": torch.tensor(groups), "part_B": tensor(parts),
        "counts_B": counts_B,
    }  # fmt: skip


RECORDS = [
    record(U, [0, 2, 0], [1.0, 2.0, 4.0]), record(W, [0, 2], [8.0, 16.0]),
    record(U, [1], [32.0]), record(W, [2, 2], [64.0, 128.0]),
    record(VALID, [1, 0], [256.0, 512.0]), record(VALID, [1], [1024.0]),
]  # fmt: skip


PASSES = [
    Pass(U, batch([0], [[1]], tokens=n), *[tensor([1.0])] * 2) for n in (5, 70, 2**24, 0, 0, 0)
]
# Of the other rank: sums and counts of u, of w, of validation; tokens.
THEIRS = [0.5, 0.25, 0.0, 1, 1, 0, 0.125, 0.0, 2.0, 3, 0, 1, 3.0, 5.0, 1, 1, 10.0]


def test_losses_are_the_sums_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = OtherRank(monkeypatch, THEIRS)
    losses = reduce_losses(RECORDS, PASSES, 3, 2, groups())
    assert ranks.ours == [
        5.0, 32.0, 2.0, 2, 1, 1, 8.0, 0.0, 208.0, 1, 0, 3, 512.0, 1280.0, 1, 2, 75.0 + 2**24,
    ]  # fmt: skip
    assert losses.u_S.tolist() == [5.5, 32.25, 2.0]
    assert losses.w_S.tolist() == pytest.approx([8.125, math.nan, 210.0], nan_ok=True), "absent"
    assert losses.validation_V.tolist() == [515.0, 1285.0]
    assert losses.tokens == 85 + 2**24 and isinstance(losses.tokens, int)
    assert losses.culprit == ""
    told = [(this, part_B.tolist()) for this, part_B in losses.parts]
    assert told == list(zip(PASSES, [each["part_B"].tolist() for each in RECORDS], strict=True))


def test_a_source_without_a_target_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    OtherRank(monkeypatch, [0.0] * 17)
    none = batch([1, 0], [[0, 0], [1, 0]])
    [this] = passes_of({U: 1.0}, [none], tensor([0.5, 0.5, 0.0]), "sample", groups())
    _, _, found = loss_func(this, torch.tensor([[3.0, 4.0], [2.0, 9.0]]))
    losses = reduce_losses([found], [this], 3, 2, groups())
    assert losses.u_S.tolist() == pytest.approx([2.0, math.nan, math.nan], nan_ok=True)


@pytest.mark.parametrize("place", [{"pp": Group(0, 2)}, {"tp": Group(1, 2)}])
def test_ranks_that_hold_no_losses_add_none(
    monkeypatch: pytest.MonkeyPatch, place: dict[str, Group]
) -> None:
    ranks = OtherRank(monkeypatch, THEIRS)
    losses = reduce_losses(RECORDS, PASSES, 3, 2, groups(**place))
    assert ranks.ours == [0.0] * 17 and not losses.parts
    assert losses.u_S.tolist() == pytest.approx([0.5, 0.25, math.nan], nan_ok=True)
    assert losses.validation_V.tolist() == [3.0, 5.0] and losses.tokens == 10


def test_the_last_stage_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = OtherRank(monkeypatch, THEIRS)
    reduce_losses(RECORDS, PASSES, 3, 2, groups(pp=Group(1, 2)))
    assert ranks.ours is not None and ranks.ours[0] == 5.0


@pytest.mark.parametrize(
    ("place", "value", "culprit"),
    [
        (1, math.nan, "u: loss of source 1 is nan"),
        (8, math.inf, "w: loss of source 2 is inf"),
        (12, -math.inf, "w: loss of validation set 0 is -inf"),
    ],
)
def test_what_is_not_finite_is_named(
    monkeypatch: pytest.MonkeyPatch, place: int, value: float, culprit: str
) -> None:
    theirs = list(THEIRS)
    theirs[place] = value
    if place == 1:
        theirs[2] = theirs[7] = math.nan  # the first is named
    OtherRank(monkeypatch, theirs)
    losses = reduce_losses(RECORDS, PASSES, 3, 2, groups())
    assert losses.culprit == culprit
