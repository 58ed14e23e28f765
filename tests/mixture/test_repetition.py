"""Caps on repetition that depend on the mixture's mean length: every projection keeps to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_scalebio.mixture.constraints import Constraints
from megatron_scalebio.mixture.mixture import Mixture
from megatron_scalebio.mixture.repetition import Repetition
from tests.mixture.test_constraints import kl, least, tensor
from tests.mixture.test_mixture import noise


def passes(p: torch.Tensor, repetition: Repetition) -> torch.Tensor:
    """Of each source, as a share of the most that is allowed."""
    return p / (repetition.cap_S * repetition.mean_length(p))


@pytest.mark.parametrize("seed", range(20))
def test_a_projection_keeps_to_the_caps_of_its_own_mean_length(seed: int) -> None:
    """Examples of 3 to 1,000 tokens; all sources hold 1.05 to 3 times what may be passed."""
    rng = np.random.default_rng(seed)
    length, size = np.exp(rng.uniform(1, 7, 6)), np.exp(rng.uniform(0, 5, 6))
    caps = size * rng.uniform(1.05, 3) / (size @ length)
    repetition = Repetition(caps.tolist(), length.tolist())
    kept = Constraints([0.0] * 6, [1.0] * 6, repetition=repetition)
    for _ in range(20):
        q = tensor(rng.dirichlet(np.full(6, 0.3)) + 1e-9)
        p = kept.project(q)
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)
        assert float(passes(p, repetition).max()) <= 1 + 1e-10
        torch.testing.assert_close(kept.project(p), p, rtol=1e-9, atol=0)
        fixed = Constraints([0.0] * 6, kept.highest(p).tolist()).project(q)
        torch.testing.assert_close(p, fixed, rtol=1e-8, atol=1e-12)


def test_with_equal_lengths_the_caps_are_bounds() -> None:
    q, caps = np.array([0.6, 0.3, 0.1]), np.array([0.04, 0.2, 0.1])
    kept = Constraints([0.0] * 3, [1.0] * 3, repetition=Repetition(caps.tolist(), [5.0] * 3))
    wanted = least(lambda p: kl(p, q), [0.0] * 3, np.minimum(1, 5 * caps).tolist())
    np.testing.assert_allclose(kept.project(tensor(q)), wanted, atol=1e-5)


def test_bounds_hold_beside_the_caps() -> None:
    """The long source's share has an upper bound; the short one may be passed as often as that."""
    repetition = Repetition([0.5, 0.5, 0.001], [1.0, 2.0, 100.0])
    kept = Constraints([0.0, 0.2, 0.0], [1.0, 0.6, 0.01], repetition=repetition)
    p = kept.project(tensor([0.98, 0.01, 0.01]))
    assert p[1] >= 0.2 and p[2] <= 0.01 and float(passes(p, repetition).max()) <= 1 + 1e-12


def test_averages_of_steps_keep_to_the_caps() -> None:
    repetition = Repetition([0.02, 0.01, 0.02], [10.0, 30.0, 90.0])
    kept = Constraints([0.0] * 3, [1.0] * 3, repetition=repetition)
    mixture = Mixture([1.0] * 3, "eg", kept)
    for g_S in noise(200, 3):
        mixture.step(g_S - tensor([1.0, 0.0, -1.0]), 0.3)
        assert float(passes(mixture.probs_S, repetition).max()) <= 1 + 1e-12
    average = mixture.trajectory.tail().mean(0)
    assert 0.9 < float(passes(average, repetition).max()) <= 1 + 1e-12


@pytest.mark.parametrize(
    ("low", "high", "caps"),
    [
        ([0.0, 0.0], [1.0, 1.0], [0.04, 0.005]),  # .04 + .5 of the tokens
        ([0.0, 0.0], [1.0, 0.001], [0.5, 1.0]),  # too few of the long one for one pass of the rest
        ([0.9, 0.0], [1.0, 1.0], [0.05, 1.0]),  # .9 at a mean length of 10.9 is .83 of the tokens
    ],
)
def test_what_no_mixture_can_keep_to_is_refused(low: list, high: list, caps: list) -> None:
    with pytest.raises(ValueError, match="within the bounds"):
        Constraints(low, high, repetition=Repetition(caps, [1.0, 100.0]))
