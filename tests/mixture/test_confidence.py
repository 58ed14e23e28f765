"""Random-scaling intervals of the weights, and what else widens them."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_scalebio.mixture.confidence import (
    CRITICAL_VALUES,
    RESOLUTION,
    drift_left,
    random_scaling_half_width,
    weight_intervals,
)
from tests.mixture.paths import PUBLISHED, ar1_paths, half_width, left, mixture_path, path_of


@pytest.mark.parametrize("confidence", sorted(CRITICAL_VALUES))
@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_intervals_cover_the_mean_of_correlated_noise(memory: float, confidence: float) -> None:
    path = ar1_paths(2000, 1500, memory, seed=0)
    half_width = random_scaling_half_width(path, confidence)
    coverage = float((path.mean(0).abs() <= half_width).double().mean())
    # two to three standard errors of 2000 trials, and the bias of a finite path: at 600 steps and
    # memory 0.9 (60 relaxation times) the intervals cover 0.77 where 0.80 is asked
    assert coverage == pytest.approx(confidence, abs=0.025)


def test_blocks_cover_like_steps() -> None:
    path = ar1_paths(2000, 2048, 0.9, seed=1)
    blocks = path.view(256, 8, -1).mean(1)
    coverage = (blocks.mean(0).abs() <= random_scaling_half_width(blocks)).double().mean()
    assert float(coverage) == pytest.approx(0.95, abs=0.025)


def test_half_widths_equal_the_formula() -> None:
    x = torch.randn(37, 3, generator=torch.Generator().manual_seed(2)) * torch.tensor([1, 9, 0.2])
    for confidence in PUBLISHED:
        want = [half_width(column, confidence) for column in x.double().T.tolist()]
        got = random_scaling_half_width(x, confidence)
        assert got.tolist() == pytest.approx(want, rel=1e-12)
    assert torch.equal(random_scaling_half_width(x), random_scaling_half_width(x, 0.95))
    two = random_scaling_half_width(torch.tensor([[0.2], [0.6]], dtype=torch.float64))
    assert float(two) == pytest.approx(6.747 * 0.2 / 8**0.5)
    assert sorted(PUBLISHED) == sorted(CRITICAL_VALUES)


def test_intervals_are_shares_and_reach_zero_below_the_resolution() -> None:
    probs = torch.tensor([0.897, 0.1, 0.003], dtype=torch.float64)
    noise = 0.001 * ar1_paths(3, 200, 0.5, seed=3)
    intervals = weight_intervals(probs + noise - noise.mean(0))
    torch.testing.assert_close(intervals.weight_S, probs)
    assert torch.all(intervals.low_S >= 0) and torch.all(intervals.high_S <= 1)
    assert float(intervals.low_S[1]) > 0.085 and float(intervals.low_S[2]) == 0.0
    wide = weight_intervals(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert wide.low_S.tolist() == [0.0, 0.0] and wide.high_S.tolist() == [1.0, 1.0]


def test_intervals_are_the_weights_and_half_widths_cut_to_shares() -> None:
    columns = [[0.01, 0.02, 0.05, 0.08], [0.9, 0.93, 0.97, 1.0], [0.5, 0.52, 0.48, 0.49]]
    got = weight_intervals(torch.tensor(columns, dtype=torch.float64).T, 0.90)
    assert got.confidence == 0.90
    for i, column in enumerate(columns):
        half = math.hypot(half_width(column, 0.90), left(column), RESOLUTION)
        weight = sum(column) / 4
        assert float(got.wandering_S[i]) == pytest.approx(half_width(column, 0.90))
        assert float(got.drift_S[i]) == pytest.approx(left(column))
        assert float(got.sampling_S[i]) == 0.0
        assert float(got.weight_S[i]) == pytest.approx(weight)
        assert float(got.half_width_S[i]) == pytest.approx(half)
        assert float(got.low_S[i]) == pytest.approx(max(weight - half, 0.0))
        assert float(got.high_S[i]) == pytest.approx(min(weight + half, 1.0))
    assert float(got.low_S[0]) == 0.0 and float(got.high_S[1]) == 1.0


def test_what_cannot_be_told_apart_is_in_every_interval() -> None:
    """Weights that stand still are known to 0.01; with over 20 sources, to that share of equal."""
    still = weight_intervals(torch.tensor([[0.5, 0.3, 0.2, 0.0, 0.0]] * 2).double())
    assert still.half_width_S.tolist() == pytest.approx([0.01] * 5)
    assert still.low_S.tolist() == pytest.approx([0.49, 0.29, 0.19, 0, 0])
    assert still.high_S.tolist() == pytest.approx([0.51, 0.31, 0.21, 0.01, 0.01])
    for sources, known in ((20, 0.01), (21, 0.01 * 20 / 21), (80, 0.0025)):
        many = weight_intervals(torch.full((2, sources), 1 / sources).double())
        assert many.half_width_S.tolist() == pytest.approx([known] * sources)
    # Of many, too, what is under 0.01 may be nothing, and what is above 0.99 all there is.
    few_S = torch.tensor([0.9, 0.0099, 0.0101] + [0.08 / 77] * 77).double()
    assert (weight_intervals(few_S.repeat(2, 1)).low_S[1:3] > 0).tolist() == [False, True]
    for weight, whole in ((0.9899, False), (0.9901, True)):
        one_S = torch.tensor([weight] + [(1 - weight) / 79] * 79).double()
        assert (float(weight_intervals(one_S.repeat(2, 1)).high_S[0]) == 1.0) == whole


def test_one_block_knows_nothing() -> None:
    intervals = weight_intervals(torch.tensor([[0.25, 0.75]]))
    assert intervals.low_S.tolist() == [0.0, 0.0] and intervals.high_S.tolist() == [1.0, 1.0]


def test_the_validation_sets_own_draw_widens_them() -> None:
    """Of 300 examples from .5/.3/.2 the sets' own shares have these standard errors."""
    torch.manual_seed(0)  # draws of one seed in seventy cover less
    weights = [0.5, 0.3, 0.2]
    draws = torch.distributions.Multinomial(300, torch.tensor(weights)).sample((4000,)) / 300
    got = weight_intervals(torch.tensor([weights] * 2), 0.95, 300)
    known = (got.sampling_S.square() + RESOLUTION**2).sqrt()
    assert got.half_width_S.tolist() == pytest.approx(known.tolist())
    covered = ((draws - torch.tensor(weights)).abs() <= got.sampling_S).double().mean(0)
    assert covered.tolist() == pytest.approx([0.95] * 3, abs=0.015)
    narrow = weight_intervals(torch.tensor([weights] * 2), 0.80, 1200)
    assert (narrow.sampling_S / got.sampling_S).tolist() == pytest.approx(
        [1.2816 / 1.96 / 2] * 3, rel=1e-4
    )


def test_a_measured_draw_counts_where_it_is_larger() -> None:
    """Its covariance goes into sums, of near-duplicates and of what is judged, as a whole."""
    blocks_BS = torch.tensor([[0.5, 0.3, 0.2]] * 2).double()
    spread = torch.tensor([[4.0, -3.0, -1.0], [-3.0, 4.0, -1.0], [-1.0, -1.0, 2.0]]).double()
    draw_SS = 2.5e-3 * spread
    got = weight_intervals(blocks_BS, 0.95, 300, draw_SS=draw_SS)
    assert got.sampling_S.tolist() == pytest.approx([0.196] * 2 + [0.098 * 2**0.5], 1e-4)
    counted = weight_intervals(blocks_BS, 0.95, 300)
    smaller = weight_intervals(blocks_BS, 0.95, 300, draw_SS=1e-4 * draw_SS)
    assert torch.equal(smaller.sampling_S, counted.sampling_S)
    # Errors of the first two cancel in their sum.
    summed = weight_intervals(blocks_BS, 0.95, 300, [[0, 1]], draw_SS)
    half = math.hypot(0.098 * 2**0.5, RESOLUTION)
    assert summed.high_S[:2].tolist() == pytest.approx([0.8 + half] * 2, 1e-4)
    rounded = weight_intervals(blocks_BS, draw_SS=torch.full((3, 3), -1e-20).double())
    assert rounded.sampling_S.tolist() == [0.0] * 3


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_what_is_left_of_a_drift_is_seen_from_its_course(power: float) -> None:
    """A weight that nears its end like 1 / t is off by what is said; one that hurries, by less."""
    steps = torch.arange(1000, 2000, dtype=torch.float64)
    path = 0.3 + 100 * 1000 ** (power - 1) / steps**power
    intervals = weight_intervals(torch.stack([path, 1 - path], 1))
    off = float(path.mean()) - 0.3
    said = float(intervals.drift_S[0])
    assert off == pytest.approx(said, rel=1e-3) if power == 1.0 else 0.6 * said < off < said


def test_of_an_odd_number_of_blocks_the_middle_one_counts_as_late() -> None:
    column = [0.1, 0.2, 0.6, 0.3, 0.2]
    assert float(weight_intervals(path_of(column)).drift_S[0]) == pytest.approx(left(column))


def test_untabulated_confidence_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence"):
        weight_intervals(torch.rand(10, 2), confidence=0.93)


def test_intervals_are_in_double_whatever_the_blocks_are() -> None:
    blocks_BS = mixture_path(0.01)[:8].float()
    found = weight_intervals(blocks_BS)
    parts = (found.weight_S, found.low_S, found.high_S, found.wandering_S, found.drift_S)
    assert {part.dtype for part in parts} == {torch.float64}
    assert random_scaling_half_width(blocks_BS[:1]).dtype == torch.float64
    exact = random_scaling_half_width(blocks_BS.double())
    assert torch.equal(random_scaling_half_width(blocks_BS), exact)


def test_one_block_does_not_drift() -> None:
    drift_S = drift_left(torch.tensor([[0.4, 0.6]]))
    assert drift_S.tolist() == [0.0, 0.0] and drift_S.dtype == torch.float64


def test_a_weight_a_bit_above_one_by_rounding_has_a_draw_of_nothing() -> None:
    above = torch.tensor([[1.0 + 2**-52]], dtype=torch.float64)
    assert weight_intervals(above.repeat(4, 1), validation_examples=10).sampling_S.tolist() == [0.0]


def test_a_sum_that_rounds_to_more_than_one_is_one() -> None:
    whole = torch.tensor([[0.7 + 0.1 + 0.2 + 2**-52, 0.0]] * 30, dtype=torch.float64)
    assert float(whole.mean(0)[0]) > 1
    found = weight_intervals(whole)
    assert float(found.weight_S[0]) == float(found.high_S[0]) == 1
