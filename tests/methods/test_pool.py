"""Rows of the pool: where they lie, in which order they come, which ones are best."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_scalebio.config import OptimizerConfig
from megatron_scalebio.data.sources import ExampleSource
from megatron_scalebio.methods.adam_moments import AdamMoments, adam_update
from megatron_scalebio.methods.pool import EpochOrder, Pool, highest, random_rows
from megatron_scalebio.methods.pool_training import PoolState
from tests.markov import write_source


def pool_of(folder: Path, sizes: list[int]) -> Pool:
    """Sources whose n-th example is as long as its number, over all of them, plus 2."""
    sources, at = [], 0
    for name, size in zip("abc", sizes, strict=True):
        rows = [np.full(at + i + 3, at + i) for i in range(size)]
        sources.append(ExampleSource(name, Path(write_source(folder, name, rows)), 99))
        at += size
    return Pool(sources)


def test_rows_are_the_sources_in_their_order(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, [3, 1, 4])
    assert len(pool) == 8
    source_N, index_N = pool.locate(np.arange(8))
    assert source_N.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert index_N.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    for row in range(8):
        assert pool.length(row) == row + 2
        assert pool.example(row)[0].tolist() == [row] * (row + 3)
    assert pool.input_tokens() == sum(range(2, 10))
    assert pool.split(np.array([7, 0, 7, 2])) == [[0, 2], [], [3]]
    assert pool.shares(np.array([1.0, 1, 2, 0, 4, 0, 0, 0])) == [0.5, 0.0, 0.5]
    assert pool.counts(np.array([7, 0, 7, 2])).tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("loss_mean", "shares"),
    [("sample", [0.5, 0.25, 0.25]), ("token", [6 / 20, 5 / 20, 9 / 20])],
)
def test_all_rows_of_a_batch_weigh_alike_or_all_their_targets(
    tmp_path: Path, loss_mean: str, shares: list[float]
) -> None:
    """A row's first token is none, whatever its mask says of it."""
    state, pool = PoolState.__new__(PoolState), pool_of(tmp_path, [3, 1, 4])
    state.pool = pool
    state.config = SimpleNamespace(data=SimpleNamespace(loss_mean=loss_mean))  # type: ignore
    state.data = SimpleNamespace(sources=pool.sources)  # type: ignore[assignment]
    picks = state.deal(np.array([7, 0, 3, 2]))  # of 9, 2, 5 and 4 targets
    assert picks.group_B.tolist() == [0, 0, 1, 2] and picks.index_B.tolist() == [0, 2, 0, 3]
    assert state.probs_S.tolist() == pytest.approx(shares) and picks.inclusion_S.tolist() == [1] * 3


def test_an_update_is_the_move_that_torchs_adam_would_make() -> None:
    """An eps as large as gradients are, so that the moments' own size shows."""
    given = OptimizerConfig(lr=0.1, adam_beta1=0.7, adam_beta2=0.8, adam_eps=0.5)
    gradients = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.zeros(6))
    adam = torch.optim.Adam([weight], lr=0.1, betas=(0.7, 0.8), eps=0.5)
    for weight.grad in gradients[:3]:
        adam.step()
    state, before = adam.state[weight], weight.detach().clone()
    moments = AdamMoments(state["exp_avg"].clone(), state["exp_avg_sq"].clone(), 3)
    weight.grad = gradients[3]
    adam.step()
    move = (before - weight.detach()) / 0.1
    for part in (slice(0, 4), slice(4, 6)):
        found = adam_update(gradients[3][part], moments, part, given)
        torch.testing.assert_close(found, move[part])


def test_every_epoch_is_another_permutation() -> None:
    order = EpochOrder(np.array([3, 5, 8, 9, 11]), seed=3)
    epochs = [[*order.next(2).tolist(), *order.next(3).tolist()] for _ in range(20)]
    assert all(sorted(epoch) == [3, 5, 8, 9, 11] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10
    again = EpochOrder(np.array([3, 5, 8, 9, 11]), seed=3)
    again.position = 5
    assert again.next(5).tolist() == epochs[1]


def test_random_rows_are_distinct_and_even() -> None:
    drawn = np.zeros(50)
    for seed in range(400):
        rows = random_rows(50, 10, seed)
        assert len(set(rows.tolist())) == 10
        drawn[rows] += 1
    assert abs(drawn - 80).max() < 5 * np.sqrt(80 * 0.8)


def test_what_is_not_finite_is_never_among_the_best() -> None:
    assert highest(np.array([1.0, np.nan, 3.0, -np.inf, 2.0, 3.0]), 4).tolist() == [2, 5, 4, 0]
