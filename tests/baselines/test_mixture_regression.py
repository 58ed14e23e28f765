"""RegMix without models: the mixtures it tries, its regression, the mixture it ends in."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_scalebio.baselines import mixture_regression as regression


def mixtures(prior: list[float], count: int) -> np.ndarray:
    return np.stack([regression.draw_mixture(np.array(prior), 5, k) for k in range(count)])


def test_mixtures_lie_around_the_warmed_prior() -> None:
    drawn = mixtures([0.81, 0.09, 0.09, 0.01], 4000)
    assert drawn.sum(axis=1) == pytest.approx(1.0)
    assert not ((drawn > 0) & (drawn < regression.LEAST_SHARE)).any()
    # square roots .9 .3 .3 .1, made whole
    assert drawn.mean(axis=0) == pytest.approx(np.array([0.9, 0.3, 0.3, 0.1]) / 1.6, abs=0.02)
    assert (drawn == mixtures([0.81, 0.09, 0.09, 0.01], 4000)).all()


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
    x = regression.FEATURES[features](drawn)
    x = np.c_[np.ones(9), (x - x.mean(0)) / x.std(0)]
    shrink = np.diag(np.r_[0.0, np.full(x.shape[1] - 1, penalty * 9)])
    errors = []
    for left_out in range(9):
        rows = np.arange(9) != left_out
        solved = np.linalg.solve(x[rows].T @ x[rows] + shrink, x[rows].T @ loss[rows])
        errors.append(loss[left_out] - x[left_out] @ solved)
    assert got.error == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-5)
    whole = np.linalg.solve(x.T @ x + shrink, x.T @ loss)
    assert got.predict(drawn) == pytest.approx(x @ whole, rel=1e-6)


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
