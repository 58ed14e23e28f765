"""RegMix without models: the mixtures it tries, its regression, the mixture it ends in."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_scalebio.methods import mixture_regression as regression
from tests.methods.naive_regmix import Ridge, least_error


def mixtures(prior: list[float], count: int) -> np.ndarray:
    return np.stack([regression.draw_mixture(np.array(prior), 5, k) for k in range(count)])


def test_mixtures_lie_around_the_warmed_prior() -> None:
    drawn = mixtures([0.81, 0.09, 0.09, 0.01], 4000)
    assert drawn.sum(axis=1) == pytest.approx(1.0)
    assert not ((drawn > 0) & (drawn < regression.LEAST_SHARE)).any()
    # square roots .9 .3 .3 .1, made whole
    assert drawn.mean(axis=0) == pytest.approx(np.array([0.9, 0.3, 0.3, 0.1]) / 1.6, abs=0.02)
    assert (drawn == mixtures([0.81, 0.09, 0.09, 0.01], 4000)).all()


def test_mixtures_spread_as_the_published_strengths_say() -> None:
    """Var p_i = q̃_i (1 − q̃_i) / (s + 1), its mean over 15 s from 0.1 to 5, even in logarithm."""
    drawn = mixtures([0.64, 0.16, 0.04, 0.16], 4000)
    warmed = np.array([0.8, 0.4, 0.2, 0.4]) / 1.8
    strengths = 0.1 * 50.0 ** (np.arange(15) / 14)
    want = warmed * (1 - warmed) * np.mean(1 / (strengths + 1))
    # A variance of 4,000 draws is off by 2 %, one standard deviation.
    assert ((drawn - warmed) ** 2).mean(axis=0) == pytest.approx(want, rel=0.08)
    # Strengths of at most 5 and not, say, 2: sources of one mixture seldom all come to much.
    product = np.mean(np.prod(drawn, axis=1))
    alphas = strengths[:, None] * warmed
    rising = [s * (s + 1) * (s + 2) * (s + 3) for s in strengths]
    assert product == pytest.approx(np.mean(np.prod(alphas, axis=1) / rising), rel=0.15)
    assert 2e-4 <= drawn[drawn > 0].min() < 2.5e-4


def test_the_answer_is_the_mean_of_the_best_128_of_100_000_around_the_prior() -> None:
    prior = np.array([0.5, 0.3, 0.15, 0.05])
    seen: list[np.ndarray] = []

    class Told:
        def predict(self, mixture_NS: np.ndarray) -> np.ndarray:
            seen.append(mixture_NS)
            return mixture_NS @ np.array([3.0, 1.0, 2.0, 1.5])

    got = regression.best_mixture(Told(), prior, seed=3)  # type: ignore[arg-type]
    drawn = np.concatenate(seen)
    assert drawn.shape == (100_000, 4)
    assert drawn.mean(axis=0) == pytest.approx(prior, abs=0.005)
    # Dirichlet(q) itself: its strength is 1
    assert drawn.var(axis=0) == pytest.approx(prior * (1 - prior) / 2, rel=0.02)
    best = np.argsort(drawn @ [3.0, 1.0, 2.0, 1.5], kind="stable")[:128]
    assert got == pytest.approx(drawn[best].mean(axis=0), abs=1e-12)


def test_the_regression_is_the_one_that_errs_least_on_what_it_has_not_seen() -> None:
    generator = np.random.default_rng(4)
    drawn = mixtures([0.5, 0.3, 0.2], 30)
    loss = 3 + drawn[:, 0] * drawn[:, 1] + 0.01 * generator.standard_normal(30)
    fitted = regression.fit(drawn, loss)
    want, error = least_error(drawn, loss)
    assert want.features == "quadratic" and error < 0.03
    assert (fitted.features, fitted.penalty) == (want.features, pytest.approx(want.penalty))
    assert fitted.error == pytest.approx(error, rel=1e-5)


def test_many_sources_and_tiny_priors_give_whole_mixtures() -> None:
    prior = np.r_[1.0, np.full(199, 1e-5)]
    drawn = mixtures((prior / prior.sum()).tolist(), 50)
    assert np.isfinite(drawn).all() and drawn.sum(axis=1) == pytest.approx(1.0)


@pytest.mark.parametrize("features", regression.FEATURES)
@pytest.mark.parametrize("penalty", [1e-4, 0.1, 10.0])
def test_left_out_error_is_that_of_leaving_out(features: str, penalty: float) -> None:
    """Against N ridge regressions, each solved in its primal form without one row."""
    generator = np.random.default_rng(1)
    drawn = mixtures([0.5, 0.3, 0.2], 9)
    loss = 3 + drawn @ [0.3, -0.2, 0.5] + 0.1 * generator.standard_normal(9)
    got = regression._ridge(features, drawn, loss, penalty)
    want = Ridge(features, penalty)
    assert got.error == pytest.approx(want.left_out_error(drawn, loss), rel=1e-5)
    others = mixtures([0.2, 0.3, 0.5], 7)
    assert got.predict(others) == pytest.approx(want.predict(others, drawn, loss), rel=1e-6)


def test_finds_the_optimum_of_a_bowl() -> None:
    truth = np.array([0.5, 0.3, 0.2, 0.0])
    drawn = mixtures([0.25] * 4, 30)
    fitted = regression.fit(drawn, 3 + ((drawn - truth) ** 2).sum(axis=1))
    assert fitted.features != "linear" and fitted.error < 0.01
    best = regression.best_mixture(fitted, np.full(4, 0.25), seed=0)
    assert best.sum() == pytest.approx(1.0)
    assert best == pytest.approx(truth, abs=0.06)


def test_a_slope_ends_in_its_corner() -> None:
    drawn = mixtures([0.4, 0.3, 0.3], 4)
    fitted = regression.fit(drawn, 2 + drawn @ [0.5, -0.5, 0.2])
    best = regression.best_mixture(fitted, np.array([0.4, 0.3, 0.3]), seed=0)
    assert best[1] > 0.98


def test_equal_losses_leave_the_prior() -> None:
    """With nothing to choose by, the first of the simulated mixtures are averaged."""
    drawn = mixtures([0.6, 0.4], 5)
    fitted = regression.fit(drawn, np.full(5, 2.0))
    best = regression.best_mixture(fitted, np.array([0.6, 0.4]), seed=0)
    assert best == pytest.approx([0.6, 0.4], abs=0.1)
