"""The weights of validation sets: in the worst case, under bounds, and as they are given."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_scalebio.mixture.goals import LEAST, Goals


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def followed(goals: Goals, steps: int, gain: float, lag: float = 200.0) -> np.ndarray:
    """Weights over the steps of a run whose losses follow them late, and are equal at .7, .3."""
    noise, felt_V, path = np.random.default_rng(0), np.full(2, 0.5), []
    for _ in range(steps):
        shares_V = goals.shares_V.numpy()
        felt_V += (shares_V - felt_V) / lag
        losses_V = 2.0 - gain * (felt_V - [0.7, 0.3]) + 0.05 * noise.standard_normal(2)
        goals.step(torch.from_numpy(losses_V))
        path.append(shares_V)
    return np.array(path)


def test_a_mean_stays_as_it_is() -> None:
    goals = Goals([2.0, 1.0, 1.0])
    goals.step(vector(9.0, 1.0, math.nan))
    assert goals.shares_V.tolist() == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("gain", [0.3, 1.0])
def test_the_worst_case_makes_losses_equal(gain: float) -> None:
    path = followed(Goals([1.0, 1.0], worst_case=True), 2000, gain)
    np.testing.assert_allclose(path[1000:].mean(0), [0.7, 0.3], atol=0.03)
    assert path[300:1000].std(0).max() < 0.045  # it does not swing


@pytest.mark.parametrize("gain", [0.3, 1.0])
def test_a_bound_gets_the_weight_that_keeps_it(gain: float) -> None:
    path = followed(Goals([1.0, 1.0], bounded=[False, True], reference=[0.0, 2.0]), 2000, gain)
    assert path[0].tolist() == [1.0, 0.0]
    np.testing.assert_allclose(path[1000:, 1].mean(), 0.3, atol=0.03)


def test_a_bound_that_is_kept_anyway_weighs_nothing() -> None:
    goals = Goals([1.0, 3.0, 1.0], bounded=[False, False, True], reference=[0.0, 0.0, 2.0])
    for _ in range(300):
        goals.step(vector(5.0, 1.0, 1.9))
    assert goals.shares_V.tolist() == [0.25, 0.75, 0.0]
    for _ in range(30):  # and is felt as soon as it is not
        goals.step(vector(5.0, 1.0, 2.1))
    assert goals.shares_V[2] > 0.2


def test_what_counts_is_the_loss_above_the_reference() -> None:
    goals = Goals([1.0, 1.0], worst_case=True, reference=[1.0, 3.0])
    for _ in range(100):
        goals.step(vector(1.1, 3.0))
    assert goals.shares_V[0] > 0.6


def test_a_set_with_a_bound_is_no_measure_of_the_others() -> None:
    alone = Goals([1.0, 1.0], worst_case=True)
    beside = Goals([1.0, 1.0, 1.0], worst_case=True, bounded=[False, False, True])
    for _ in range(50):
        alone.step(vector(2.0, 1.95))
        beside.step(vector(2.0, 1.95, 7.0))
    free_V = beside.shares_V[:2]
    torch.testing.assert_close(free_V / free_V.sum(), alone.shares_V)


def test_a_set_comes_back_from_nothing() -> None:
    goals = Goals([1.0, 1.0], worst_case=True)
    for _ in range(20000):
        goals.step(vector(2.0, 1.0))
    assert goals.shares_V[1] == pytest.approx(LEAST, rel=0.01)
    for _ in range(1000):
        goals.step(vector(1.0, 2.0))
    assert goals.shares_V[1] > 0.9


@pytest.mark.parametrize("side", [1, -1])
def test_a_loss_counts_as_a_tenth_of_a_nat_off_at_most(side: int) -> None:
    """A bound that was far from being reached is felt as soon as one that was near."""
    near, far = (Goals([1.0, 1.0], bounded=[False, True], reference=[0.0, 2.0]) for _ in range(2))
    for _ in range(100):
        near.step(vector(5.0, 2.0 + 0.1 * side))
        far.step(vector(5.0, 2.0 + 1.9 * side))
    for goals in (near, far):
        for _ in range(30):
            goals.step(vector(5.0, 2.1))
    assert far.shares_V.tolist() == pytest.approx(near.shares_V.tolist())
    assert far.shares_V[1] > 0.2


def test_an_absent_set_goes_on_as_it_did() -> None:
    seen, absent = (Goals([1.0, 1.0], worst_case=True) for _ in range(2))
    for goals in (seen, absent):
        for _ in range(200):
            goals.step(vector(1.02, 1.0))
    seen.step(vector(1.02, 1.0))
    absent.step(vector(math.nan, 1.0))
    assert absent.shares_V[0] == pytest.approx(float(seen.shares_V[0]), abs=0.02)
    assert absent.shares_V.isfinite().all()


def test_a_swing_is_no_part_of_what_is_learned() -> None:
    """Each loss counts from their mean by the weights without it, 0.75 · 1.03 + 0.25 · 1.0."""
    goals = Goals([3.0, 1.0], worst_case=True)
    goals.swing_V = vector(-0.25, 0.25)
    goals.step(vector(1.03, 1.0))
    assert goals.sums_2V[0].tolist() == pytest.approx([0.0075, -0.0225])


def test_no_set_without_a_bound_is_no_goal() -> None:
    with pytest.raises(ValueError, match="one has to be the goal"):
        Goals([1.0, 1.0], bounded=[True, True])
