"""olmix without models: its law of losses, and the best mixture under it, by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_scalebio.methods.log_linear import (
    DELTA,
    PARTS,
    Law,
    best_mixture,
    fit,
    left_out_error,
)
from megatron_scalebio.methods.mixture_regression import draw_mixture
from megatron_scalebio.mixture.constraints import Constraints

PRIOR = np.array([0.5, 0.3, 0.2])
SLOPES = np.array([[-1.2, 0.3, -0.6], [0.2, -1.5, -0.4]])
SHARES = np.array([0.75, 0.25])


def simplex(parts: int) -> np.ndarray:
    """All mixtures of three sources whose shares are whole numbers of so many parts."""
    pairs = itertools.product(range(parts + 1), repeat=2)
    return np.array([(a, b, parts - a - b) for a, b in pairs if a + b <= parts]) / parts


def swarm(count: int, sources: int = 3) -> np.ndarray:
    prior = np.full(sources, 1 / sources)
    return np.stack([draw_mixture(prior, 2, number) for number in range(count)])


def test_a_law_is_found_from_what_it_says() -> None:
    drawn = swarm(12)
    for slope in SLOPES:
        law = fit(drawn, 2.5 + np.exp(drawn @ slope))
        assert law.floor == pytest.approx(2.5, abs=1e-3)
        assert law.slope_S == pytest.approx(slope, abs=3e-3)


def test_one_wild_loss_pulls_as_one_that_is_a_little_off() -> None:
    """Huber: what is missed by more than δ counts by its size, not by its square."""
    drawn = swarm(40)
    told = 2.5 + np.exp(drawn @ SLOPES[0])
    wild = told.copy()
    wild[7] += 3.0
    law = fit(drawn, wild)
    assert np.abs(law.predict(drawn) - told).max() < DELTA
    half = fit(drawn, np.where(np.arange(40) == 7, told + 1.5, told))
    assert law.predict(drawn) == pytest.approx(half.predict(drawn), abs=1e-4)


def test_left_out_error_is_that_of_laws_which_have_not_seen_it() -> None:
    drawn = swarm(23)
    noise = np.random.default_rng(3).normal(0, 0.01, (23, 2))
    losses = np.stack([2 + np.exp(drawn @ slope) for slope in SLOPES], axis=1) + noise
    missed = []
    for part in range(PARTS):
        rows = np.arange(part, 23, PARTS)
        rest = np.setdiff1d(np.arange(23), rows)
        said = [fit(drawn[rest], losses[rest, v]).predict(drawn[rows]) for v in range(2)]
        missed += [0.75 * (said[0] - losses[rows, 0]) + 0.25 * (said[1] - losses[rows, 1])]
    want = np.sqrt(np.mean(np.concatenate(missed) ** 2))
    got = left_out_error(drawn, losses, SHARES)
    assert got == pytest.approx(want) and 0.005 < got < 0.02


@pytest.mark.parametrize("pull", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize(
    ("low", "high"),
    [((0, 0, 0), (1, 1, 1)), ((0, 0, 0.3), (1, 0.35, 1)), ((0.2, 0.2, 0.2), (0.25, 1, 1))],
)
def test_the_mixture_is_the_best_of_a_grid(pull: float, low: tuple, high: tuple) -> None:
    """The loss and the pull of every mixture within the bounds, in steps of 1/400."""
    grid = simplex(400)
    grid = grid[((grid >= np.array(low) - 1e-9) & (grid <= np.array(high) + 1e-9)).all(axis=1)]

    def objective(at_NS: np.ndarray) -> np.ndarray:
        kl_N = np.sum(at_NS * np.log(np.maximum(at_NS, 1e-12) / PRIOR), axis=1)
        return np.exp(at_NS @ SLOPES.T) @ SHARES + pull * kl_N

    kept = Constraints(low, high, prior=PRIOR.tolist(), kl_to_prior=pull)
    laws = [Law(floor, slope) for floor, slope in zip((2.0, 3.0), SLOPES, strict=True)]
    got = best_mixture(laws, SHARES, kept, PRIOR)
    assert got.sum() == pytest.approx(1) and (got >= np.array(low) - 1e-9).all()
    assert (got <= np.array(high) + 1e-9).all()
    assert np.abs(got - grid[objective(grid).argmin()]).max() < 1 / 300
    assert objective(got[None])[0] <= objective(grid).min() + 1e-12


def test_sources_that_keep_their_ratios_are_one() -> None:
    """The third alone moves against the sum of the first two, which stay three to one."""
    kept = Constraints(
        [0, 0, 0], [1, 1, 1], prior=PRIOR.tolist(), kl_to_prior=0.05, tied=[True, True, False]
    )
    got = best_mixture([Law(2.0, SLOPES[0])], np.ones(1), kept, np.array([0.45, 0.15, 0.4]))
    assert got[0] / got[1] == pytest.approx(3.0)
    share_N = np.linspace(0, 1, 2001)[1:-1]
    line_NS = np.stack([0.75 * share_N, 0.25 * share_N, 1 - share_N], axis=1)
    whole_N = np.exp(line_NS @ SLOPES[0]) + 0.05 * np.sum(line_NS * np.log(line_NS / PRIOR), 1)
    assert got == pytest.approx(line_NS[whole_N.argmin()], abs=1e-3)


def test_steep_laws_and_many_sources_end_where_no_slope_is_left() -> None:
    """At the minimum the loss's slope plus κ (log p / π + 1) is one number for all sources."""
    generator = np.random.default_rng(0)
    prior, slope = np.full(20, 0.05), generator.normal(0, 5, 20)
    kept = Constraints([0] * 20, [1] * 20, prior=prior.tolist(), kl_to_prior=0.1)
    got = best_mixture([Law(1.0, slope)], np.ones(1), kept, prior)
    slope_S = np.exp(got @ slope) * slope + 0.1 * np.log(got / prior)
    assert np.ptp(slope_S) < 1e-6
