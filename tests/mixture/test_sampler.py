"""The blend sampler: counts, epochs, inclusion, independence of the layout, and its small state."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalebio.mixture.sampler import (
    BlendSampler,
    expected_counts,
    shuffled_index,
    systematic_counts,
)

WEIGHTS = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12).filter(lambda w: sum(w) > 0.01)
SHARES = st.floats(0.01, 1.0)


def probabilities(weights: list[float]) -> np.ndarray:
    return np.array(weights) / sum(weights)


@given(WEIGHTS, st.integers(1, 200), SHARES)
@settings(deadline=None)
def test_expected_counts_fill_the_batch_and_seat_everyone(
    weights: list[float], batch: int, share: float
) -> None:
    expected_S = expected_counts(probabilities(weights), batch, share)
    assert expected_S.sum() == pytest.approx(batch)
    used_S = np.array(weights) / sum(weights) > 0
    floor = 1.0 if batch >= used_S.sum() else batch * share / used_S.sum()
    assert (expected_S[used_S] >= floor - 1e-9).all()
    assert not expected_S[~used_S].any(), "what weighs nothing is not drawn"
    order = np.argsort(weights, kind="stable")
    assert (np.diff(expected_S[order]) >= -1e-9).all(), "a heavier source gets no fewer seats"


@given(st.integers(1, 12), st.integers(1, 200))
@settings(deadline=None)
def test_a_floor_of_one_deals_all_sources_the_same(sources: int, batch: int) -> None:
    weights = [1.0] + [1e-9] * (sources - 1)
    expected_S = expected_counts(probabilities(weights), batch, 1.0)
    np.testing.assert_allclose(expected_S, batch / sources)


@given(WEIGHTS, st.integers(1, 200), SHARES, st.floats(0, 1, exclude_max=True))
@settings(max_examples=200, deadline=None)
def test_counts_add_up_and_round_each_expectation(
    weights: list[float], batch: int, share: float, offset: float
) -> None:
    expected_S = expected_counts(probabilities(weights), batch, share)
    counts_S = systematic_counts(expected_S, offset)
    assert counts_S.sum() == batch
    assert (np.abs(counts_S - expected_S) < 1 + 1e-6).all()
    used_S = expected_S > 0
    assert not counts_S[~used_S].any()
    if batch >= used_S.sum():
        assert (counts_S[used_S] >= 1).all()


def test_counts_have_the_expectation_they_should() -> None:
    expected_S = expected_counts(np.array([0.62, 0.3, 0.08]), 16, 0.25)
    offsets = (np.arange(2000) + 0.5) / 2000
    mean_S = np.mean([systematic_counts(expected_S, offset) for offset in offsets], axis=0)
    np.testing.assert_allclose(mean_S, expected_S, atol=1e-3)


@given(st.integers(1, 500), st.integers(0, 2**32 - 1), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_each_epoch_of_a_source_is_a_permutation(size: int, seed: int, group: int) -> None:
    def epoch(number: int) -> np.ndarray:
        position = np.arange(size) + number * size
        return shuffled_index(position, np.full(size, size), np.full(size, group), seed)

    first, second = epoch(0), epoch(1)
    assert sorted(first) == sorted(second) == list(range(size))
    if size > 20:
        assert not np.array_equal(first, second)
        assert not np.array_equal(first, np.arange(size))


def test_batches_go_through_a_source_before_they_repeat() -> None:
    sizes = [7, 20, 1]
    sampler = BlendSampler(sizes, 6, seed=3, floor_share=0.5)
    seen: list[list[int]] = [[], [], []]
    for _ in range(60):
        picks = sampler.next(np.array([0.5, 0.3, 0.2]))
        assert len(picks.group_B) == 6 and set(picks.group_B) == {0, 1, 2}
        assert list(picks.group_B) == sorted(picks.group_B)
        for group, index in zip(picks.group_B, picks.index_B, strict=True):
            seen[group].append(int(index))
    for group, size in enumerate(sizes):
        for start in range(0, len(seen[group]) - size + 1, size):
            assert sorted(seen[group][start : start + size]) == list(range(size))


def mixed_bits(value: int) -> int:
    """SplitMix64's next(), Steele, Lea & Flood 2014, figure 17: γ added, then the finaliser."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) % 2**64
    return value ^ value >> 31


def place(position: int, size: int, group: int, seed: int) -> int:
    """Four Feistel rounds over the fewest bits, an even number, that hold the source, until the
    value is in range; keyed by seed, group and epoch. With Python's unbounded integers."""
    epoch, value = divmod(position, size)
    key = mixed_bits((group + seed * 0x9E3779B97F4A7C15) % 2**64)
    key = mixed_bits((key + epoch) % 2**64)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = value >> half, value % 2**half
        for turn in range(4):
            mixed = mixed_bits(right ^ mixed_bits((key + turn) % 2**64)) % 2**half
            left, right = right, left ^ mixed
        value = left << half | right
        if value < size:
            return value


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_the_order_of_examples_is_the_documented_one(seed: int) -> None:
    """Runs are repeated by their seed, by later versions as well."""
    sizes = [1, 2, 3, 4, 5, 16, 17, 64, 65, 1000, 4097]
    rows = [(p, n, g) for g, n in enumerate(sizes) for p in (0, 1, n - 1, n, 2 * n + 1, 5 * n + 3)]
    position, size, group = np.array(rows).T
    got = shuffled_index(position, size, group, seed)
    assert got.tolist() == [place(p, n, g, seed) for p, n, g in rows]
    assert got.dtype == np.int64


def dealt(expected: list[Fraction], offset: Fraction) -> list[int]:
    """Marks offset + 0, 1, 2, … in each stretch (from, to] of the cumulated expectations."""
    edges = [sum(expected[:i], Fraction(0)) for i in range(len(expected) + 1)]
    marks = [offset + k for k in range(int(edges[-1]) + 1)]
    return [sum(a < m <= b for m in marks) for a, b in itertools.pairwise(edges)]


def test_counts_are_marks_in_stretches() -> None:
    eighths = [13, 4, 22, 1, 24]  # of a seat; 64 in all
    expected = [Fraction(n, 8) for n in eighths]
    for sixteenth in range(1, 16):
        counts_S = systematic_counts(np.array(eighths) / 8, sixteenth / 16)
        assert counts_S.tolist() == dealt(expected, Fraction(sixteenth, 16)), sixteenth
    assert counts_S.dtype == np.int64
    # A mark on an edge: none for the start, one for the end.
    assert systematic_counts(np.array([1.0, 2.0, 1.0]), 0.0).tolist() == [1, 2, 1]
    # 0.1 + 0.2 + 2.7 and 5 × 6.4 miss 3 and 32 by rounding.
    for expected_S in (np.array([0.1, 0.2, 2.7]), np.full(5, 6.4)):
        for offset in (0.0, 1e-12, 1 - 1e-12, 0.4, 0.3):
            assert systematic_counts(expected_S, offset).sum() == round(expected_S.sum())


def seats(probs: list[float], batch: int, floor: float) -> list[float]:
    """B ((1 − f) p_i + f / S); where B ≥ S one each, the others by what is asked above one."""
    asked = [batch * ((1 - floor) * p + floor / len(probs)) for p in probs]
    if batch < len(probs):
        return asked
    above = [max(x - 1, 0.0) for x in asked]
    return [1 + (batch - len(probs)) * x / sum(above) if sum(above) else 1.0 for x in above]


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 7, 32])
@pytest.mark.parametrize("floor", [0.05, 0.5, 1.0])
def test_expected_counts_are_their_equation(batch: int, floor: float) -> None:
    probs_S = np.array([0.6, 0.02, 0.3, 0.08])
    want = seats(probs_S.tolist(), batch, floor)
    np.testing.assert_allclose(expected_counts(probs_S, batch, floor), want, rtol=1e-12)
    np.testing.assert_allclose(expected_counts(np.full(4, 0.25), 4, floor), 1.0)
    if batch < 4:
        rounded_S = probs_S * 1.001  # as sums of weights in single precision are
        assert expected_counts(rounded_S, batch, floor).sum() == pytest.approx(batch, rel=1e-12)


@pytest.mark.parametrize(("batch", "floor"), [(3, 0.3), (4, 0.3), (13, 0.1)])
def test_batches_are_what_the_definition_gives(batch: int, floor: float) -> None:
    """Counts by the step's own offset; each source continues where its last batch ended."""
    sizes, seed, drawn = [9, 5, 70, 3], 11, [0, 0, 0, 0]
    sampler = BlendSampler(sizes, batch, seed, floor)
    mixtures = np.random.default_rng(2).dirichlet([3, 1, 1, 0.5], size=25)
    for step, probs_S in enumerate(mixtures):
        expected = seats(probs_S.tolist(), batch, floor)
        offset = np.random.default_rng((seed, step)).random()
        counts = dealt([Fraction(x).limit_denominator(10**8) for x in expected], Fraction(offset))
        picks = sampler.next(probs_S)
        want = [
            (group, place(drawn[group] + k, sizes[group], group, seed))
            for group, count in enumerate(counts)
            for k in range(count)
        ]
        assert list(zip(picks.group_B.tolist(), picks.index_B.tolist(), strict=True)) == want
        drawn = [n + count for n, count in zip(drawn, counts, strict=True)]
        assert sampler.state_dict() == {"step": step + 1, "drawn": drawn}
        want_inclusion = [min(1.0, x) for x in expected]
        np.testing.assert_allclose(picks.inclusion_S, want_inclusion, rtol=0, atol=2e-9)
        if batch >= len(sizes):
            assert (picks.inclusion_S == 1.0).all()


def test_a_saved_state_does_not_change_with_later_batches() -> None:
    sampler, probs_S = BlendSampler([9, 5], 7, 4, 0.25), np.array([0.7, 0.3])
    sampler.next(probs_S)
    state = sampler.state_dict()
    kept, loaded = json.dumps(state), BlendSampler([9, 5], 7, 4, 0.25)
    loaded.load_state_dict(state)
    for _ in range(3):
        assert sampler.next(probs_S).index_B.tolist() == loaded.next(probs_S).index_B.tolist()
    assert json.dumps(state) == kept
    assert loaded.state_dict() == sampler.state_dict()


@pytest.mark.parametrize("size", [20, 100])
def test_shuffle_is_even(size: int) -> None:
    """Every example is as often in every place, by chi-square over the epochs.

    (Below some 16 examples the network's few bits show: places are uneven by 8 %, which only
    matters to the order within an epoch.)
    """
    epochs = 2000
    position = np.arange(size * epochs)
    index = shuffled_index(position, np.full_like(position, size), np.zeros_like(position), 11)
    table = np.zeros((size, size))
    np.add.at(table, (position % size, index), 1)
    expected, freedom = epochs / size, (size - 1) ** 2
    chi_square = float(((table - expected) ** 2 / expected).sum())
    assert (chi_square - freedom) / np.sqrt(2 * freedom) < 5, chi_square


def test_a_batch_smaller_than_the_sources_includes_each_as_often_as_it_says() -> None:
    sources, batch, steps = 9, 4, 4000
    probs_S = probabilities([8, 4, 2, 1, 1, 1, 1, 1, 1])
    values_S = np.linspace(-1, 2, sources)
    sampler = BlendSampler([50] * sources, batch, seed=5, floor_share=0.3)
    present_S, estimate = np.zeros(sources), 0.0
    for _ in range(steps):
        picks = sampler.next(probs_S)
        here = np.unique(picks.group_B)
        present_S[here] += 1 / steps
        # Horvitz-Thompson: Σ p_i v_i from the sources that are there.
        estimate += (probs_S * values_S / picks.inclusion_S)[here].sum() / steps
    inclusion_S = picks.inclusion_S
    sigma_S = np.sqrt(inclusion_S * (1 - inclusion_S) / steps)
    assert (np.abs(present_S - inclusion_S) <= 4 * sigma_S + 1e-6).all()
    assert estimate == pytest.approx((probs_S * values_S).sum(), abs=0.03)


def test_order_is_a_function_of_the_seed() -> None:
    def run(seed: int) -> list[int]:
        sampler = BlendSampler([30, 40], 8, seed, 0.25)
        return [int(i) for _ in range(5) for i in sampler.next(np.array([0.5, 0.5])).index_B]

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize("cut", [0, 1, 13])
def test_resume_is_exact_and_the_state_is_a_few_integers(cut: int) -> None:
    generator = np.random.default_rng(0)
    mixtures = generator.dirichlet([1, 1, 1], size=30)
    whole, resumed = (BlendSampler([9, 5, 70], 7, 4, 0.25) for _ in range(2))
    for number, probs_S in enumerate(mixtures):
        if number == cut:
            state = whole.state_dict()
            assert set(state) == {"step", "drawn"} and len(state["drawn"]) == 3
            resumed.load_state_dict(json.loads(json.dumps(state)))
        expected = whole.next(probs_S)
        if number >= cut:
            got = resumed.next(probs_S)
            assert np.array_equal(got.group_B, expected.group_B)
            assert np.array_equal(got.index_B, expected.index_B)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sizes_S": [3, 0]}, "sizes_S is 0 somewhere"), ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 4.5}, "batch_size is 4.5"), ({"floor_share": 0.0}, "floor_share is 0.0"),
        ({"floor_share": 1.5}, "floor_share is 1.5"),
    ],
)  # fmt: skip
def test_numbers_out_of_their_range_are_refused(given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BlendSampler(**{"sizes_S": [3, 4], "batch_size": 4, "seed": 1, "floor_share": 0.5, **given})


@pytest.mark.parametrize("weights", [[1.0], [0.5, math.nan], [1.5, -0.5], [0.0, 0.0]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    sampler = BlendSampler([3, 4], 4, 1)
    assert sampler.next([0.5, 0.5]).group_B.tolist() == [0, 0, 1, 1], "a list will do"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for 2 sources"):
        sampler.next(np.array(weights))
    with pytest.raises(ValueError, match="a state of 3 sources for 2"):
        sampler.load_state_dict(BlendSampler([3, 4, 5], 4, 1).state_dict())


def test_a_source_without_weight_is_not_drawn() -> None:
    sampler = BlendSampler([3, 4], 4, 1)
    for _ in range(3):
        picks = sampler.next(np.array([1.0, 0.0]))
        assert picks.group_B.tolist() == [0, 0, 0, 0]


def test_the_smallest_numbers_are_taken() -> None:
    assert BlendSampler([1], 1, 0, floor_share=1.0).next(np.array([1.0])).index_B.tolist() == [0]
    assert BlendSampler([1], 1, 0).floor_share == 0.25
