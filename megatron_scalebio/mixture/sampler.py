"""Which examples make up each global batch: a function of (seed, mixture, examples drawn so far).

Every rank computes the same global batch without communication and takes its own part, so the
order of examples does not depend on the data-parallel size or the micro-batch size. The state is
the step and one count per source.

    counts   n_i of a batch of B: systematic sampling of B · ((1 − f) p_i + f / S), f = floor share,
             each source at least once where B ≥ S
    examples the next n_i of source i in a pseudo-random order, without replacement in an epoch
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Picks:
    """The examples of one global batch.

    Attributes:
        group_B: source of each example, ascending.
        index_B: its index within that source.
        inclusion_S: probability that each source is in the batch at all (1 where it always is).
    """

    group_B: Ints
    index_B: Ints
    inclusion_S: Floats


def expected_counts(probs_S: Floats, batch_size: int, floor_share: float) -> Floats:
    """B · ((1 − f) p_i + f / S), raised to a seat each where there are as many; p = 0: none."""
    used_S = probs_S > 0
    sources = np.count_nonzero(used_S)
    share_S = (1 - floor_share) * probs_S + floor_share * used_S / sources
    expected_S = batch_size * share_S / share_S.sum()
    if batch_size < sources:
        return expected_S
    above_S = np.maximum(expected_S - 1, 0)
    return used_S + above_S * ((batch_size - sources) / max(above_S.sum(), 1e-12))


def systematic_counts(expected_S: Floats, offset: float) -> Ints:
    """Whole counts of given expectation, each its floor or ceiling, adding up to their sum.

    Systematic sampling (Madow 1949): marks at offset + 0, 1, 2, … on the cumulated expectations.
    """
    edges = np.cumsum(expected_S)
    edges[-1] = round(edges[-1])
    # Sums such as 5 × 6.4 miss whole numbers by rounding; a mark must not fall in that gap.
    # (Nor on an edge: an offset that rounds to zero would put one mark too many into the batch.)
    marks = np.floor(np.round(edges - max(offset, 1e-8), 9)) + 1
    return np.diff(marks, prepend=0.0).astype(np.int64)


class BlendSampler:
    """Draws global batches from S sources.

    Args:
        sizes_S: examples in each source.
        batch_size: examples per global batch (B).
        seed: decides the order of examples and the rounding of counts.
        floor_share: f, the share of a batch that is split equally among the sources, in (0, 1].

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self, sizes_S: list[int], batch_size: int, seed: int, floor_share: float = 0.25
    ) -> None:
        self.sizes_S = np.asarray(sizes_S, dtype=np.int64)
        if (self.sizes_S < 1).any():
            raise ValueError(f"sizes_S is {min(sizes_S)} somewhere: every source needs an example")
        if batch_size < 1 or batch_size != int(batch_size):
            raise ValueError(f"batch_size is {batch_size}, it must be a whole number above 0")
        if not 0 < floor_share <= 1:
            raise ValueError(f"floor_share is {floor_share}, it must be in (0, 1]")
        self.batch_size, self.seed, self.floor_share = batch_size, seed, floor_share
        self.step = 0
        self.drawn_S = np.zeros(len(sizes_S), dtype=np.int64)

    def next(self, probs_S: Floats) -> Picks:
        """The next global batch under mixture p, one weight for each source.

        Raises:
            ValueError: if p has another length, a negative weight, or only zeros.
        """
        probs_S = np.asarray(probs_S, dtype=np.float64)
        if probs_S.shape != self.sizes_S.shape or not ((probs_S >= 0).all() and probs_S.any()):
            raise ValueError(f"weights {probs_S} for {len(self.sizes_S)} sources")
        expected_S = expected_counts(probs_S, self.batch_size, self.floor_share)
        offset = np.random.default_rng((self.seed, self.step)).random()
        counts_S = systematic_counts(expected_S, offset)
        group_B = np.repeat(np.arange(len(counts_S)), counts_S)
        within_B = np.arange(self.batch_size) - np.repeat(np.cumsum(counts_S) - counts_S, counts_S)
        position_B = self.drawn_S[group_B] + within_B
        index_B = shuffled_index(position_B, self.sizes_S[group_B], group_B, self.seed)
        self.step += 1
        self.drawn_S += counts_S
        return Picks(group_B, index_B, np.minimum(1.0, expected_S + 1e-9))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "drawn": self.drawn_S.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        drawn_S = np.asarray(state["drawn"], dtype=np.int64)
        if drawn_S.shape != self.sizes_S.shape:
            raise ValueError(f"a state of {len(drawn_S)} sources for {len(self.sizes_S)}")
        self.drawn_S = drawn_S


def shuffled_index(position_B: Ints, size_B: Ints, group_B: Ints, seed: int) -> Ints:
    """Example at each position of a source's endless order; each epoch is its own permutation.

    A four-round Feistel network over the smallest even number of bits that holds the source, with
    cycle walking back into range (Black & Rogaway 2002): a permutation of any size, computed at
    one position in constant memory, where a shuffled index of every source and epoch would be
    held by every rank.
    """
    epoch_B, offset_B = np.divmod(position_B, size_B)
    bits_B = np.maximum(1, (np.ceil(np.log2(np.maximum(size_B, 2))).astype(np.int64) + 1) // 2)
    half_B = bits_B.astype(np.uint64)
    low_B = (np.uint64(1) << half_B) - np.uint64(1)
    start = np.uint64(seed * int(_ODD) % 2**64)
    key_B = _mix(_mix(group_B.astype(np.uint64) + start) + epoch_B.astype(np.uint64))
    value_B = offset_B.astype(np.uint64)
    outside_B = np.ones(len(value_B), dtype=bool)
    while outside_B.any():
        left, right = value_B >> half_B, value_B & low_B
        for turn in range(4):
            left, right = right, left ^ (_mix(right ^ _mix(key_B + np.uint64(turn))) & low_B)
        walked_B = (left << half_B) | right
        value_B = np.where(outside_B, walked_B, value_B)
        outside_B = value_B >= size_B.astype(np.uint64)
    return value_B.astype(np.int64)


_ODD = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), wrapping at 64 bits."""
    with np.errstate(over="ignore"):
        value = value + _ODD
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
