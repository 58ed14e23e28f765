"""Rows of the pool: where they lie, in which order they come, which ones are best."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_scalebio.data.sources import ExampleSource
from megatron_scalebio.methods.pool import EpochOrder, Pool, highest, random_rows
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
