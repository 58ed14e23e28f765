"""Groups of sources by their names."""

from __future__ import annotations

import pytest
import torch

from megatron_scalebio.methods.groups import coarse_weights, levels_of

NAMES = ["math/web/a", "math/web/b", "math/books/c", "code/web/d", "chat"]


def test_levels_are_the_parts_of_names_that_tell_sources_apart() -> None:
    coarse, fine = levels_of(NAMES)
    assert (coarse.depth, coarse.names) == (1, ["math", "code", "chat"])
    assert (fine.depth, fine.names) == (2, ["math/web", "math/books", "code/web", "chat"])
    assert (coarse.group_S, fine.group_S) == ([0, 0, 0, 1, 2], [0, 0, 1, 2, 3])


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b"],
        ["math/a", "math/b"],  # one group of all
        ["math/a", "code/b"],  # each its own
    ],
)
def test_levels_that_tell_nothing_are_none(names: list[str]) -> None:
    assert levels_of(names) == []
    assert coarse_weights(levels_of(names), torch.ones(2)) is None


def test_a_level_that_adds_no_group_is_left_out() -> None:
    """The second part of these names is the same throughout."""
    assert [level.depth for level in levels_of(["a/x/1", "a/x/2", "b/x/3", "b/x/4"])] == [1]


def test_records_have_the_weights_of_few_groups() -> None:
    weight_S = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
    found = coarse_weights(levels_of(NAMES), weight_S)
    assert found == pytest.approx({"math": 0.6, "code": 0.15, "chat": 0.25})
    many = levels_of([f"{n % 101}/{n}" for n in range(202)])
    assert coarse_weights(many, torch.full((202,), 1 / 202)) is None
