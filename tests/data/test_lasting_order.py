"""What a seed decides stays: a checkpoint holds counts alone, and its run continues where they are.

Another order would repeat some examples and leave others out, in silence, where an earlier
version's run is continued. The values are those of the first version.
"""

from __future__ import annotations

import numpy as np

from megatron_scalebio.methods.pool import EpochOrder, random_rows
from megatron_scalebio.mixture.sampler import BlendSampler


def test_the_examples_of_a_batch() -> None:
    sampler = BlendSampler([7, 20, 300], 8, seed=1234, floor_share=0.25)
    mixtures = ([0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2])
    batches = [sampler.next(np.array(probs)) for probs in mixtures]
    assert [batch.group_B.tolist() for batch in batches] == [
        [0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2, 2, 2], [0, 0, 0, 0, 1, 1, 2, 2],
    ]  # fmt: skip
    assert [batch.index_B.tolist() for batch in batches] == [
        [1, 0, 3, 1, 0, 6, 208, 113], [2, 5, 14, 96, 215, 265, 5, 267],
        [4, 6, 5, 2, 10, 11, 24, 216],
    ]  # fmt: skip


def test_the_sources_of_a_batch_that_is_smaller_than_they_are() -> None:
    sampler = BlendSampler([9] * 5, 3, seed=77, floor_share=0.5)
    batches = [sampler.next(np.array([0.5, 0.3, 0.1, 0.1, 1e-9])) for _ in range(3)]
    assert [batch.group_B.tolist() for batch in batches] == [[0, 1, 4], [0, 1, 2], [0, 1, 3]]
    assert [batch.index_B.tolist() for batch in batches] == [[4, 4, 6], [7, 7, 3], [5, 2, 6]]
    # 3 · (p / 2 + 1/10), at most 1
    np.testing.assert_allclose(batches[0].inclusion_S, [1, 0.75, 0.45, 0.45, 0.3], atol=1e-8)


def test_the_order_of_a_pools_rows() -> None:
    order = EpochOrder(np.arange(5, 15), seed=1234)
    assert order.next(7).tolist() == [6, 5, 12, 7, 14, 13, 11]
    assert order.next(7).tolist() == [8, 9, 10, 10, 7, 13, 9]
    assert random_rows(1000, 6, seed=1234).tolist() == [830, 983, 61, 363, 684, 242]
