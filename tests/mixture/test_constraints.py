"""Bounds, a pull to a prior and ratios that stay: the exact step, and what it must not break."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from megatron_scalebio.mixture.confidence import weight_intervals
from megatron_scalebio.mixture.constraints import Constraints
from megatron_scalebio.mixture.levels import Levels
from megatron_scalebio.mixture.mixture import Mixture
from tests.mixture.test_mixture import noise

LOW, HIGH = [0.1, 0.0, 0.25, 0.0, 0.2], [0.6, 0.05, 0.25, 1.0, 0.3]  # the third is fixed
PRIOR = [0.1, 0.2, 0.3, 0.2, 0.2]


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(np.maximum(p, 1e-300) / q)).sum())


def least(objective: Any, low: list[float], high: list[float]) -> np.ndarray:
    """The mixture within bounds of least value, by a solver that knows nothing of mirrors."""
    start = np.clip(np.full(len(low), 1 / len(low)), low, high)
    whole = {"type": "eq", "fun": lambda p: p.sum() - 1}
    found = minimize(
        objective, start, bounds=list(zip(low, high, strict=True)), constraints=[whole],
        method="SLSQP", options={"ftol": 1e-15, "maxiter": 1000},
    )  # fmt: skip
    return found.x


@pytest.mark.parametrize("seed", range(6))
def test_the_projection_is_the_nearest_mixture_within_the_bounds(seed: int) -> None:
    q = np.random.default_rng(seed).dirichlet(np.full(5, 0.3)) + 1e-6
    got = Constraints(LOW, HIGH).project(tensor(q))
    assert float(got.sum()) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(got, least(lambda p: kl(p, q), LOW, HIGH), atol=2e-5)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ([0.2] * 5, [0.2] * 5),
        ([0.0] * 5, [0.2] * 5),
        ([0.2] * 5, [1.0] * 5),
        ([0.0] * 5, [1.0] * 5),
        ([0.0, 0.0, 0.0, 0.0, 0.9], [1.0] * 5),
    ],
)
def test_the_projection_holds_at_the_edges(low: list[float], high: list[float]) -> None:
    for q in (*np.random.default_rng(1).dirichlet(np.full(5, 0.05), 50), np.full(5, 0.2)):
        got = Constraints(low, high).project(tensor(q).clamp_min(1e-12))
        assert float(got.sum()) == pytest.approx(1, abs=1e-9)
        assert (got >= tensor(low)).all() and (got <= tensor(high)).all()
        if low == [0.0] * 5 and high == [1.0] * 5:
            np.testing.assert_allclose(got, q, atol=1e-9)


def test_bounds_that_add_up_to_one_but_for_rounding_are_met() -> None:
    """With all sources at their bounds the sum is a rounding below 1, and none is left to move."""
    low, high = [0.2, 0.1, 0.0, 0.0], [0.4, 0.5, 0.2, 0.1]
    q = [1.081495622073144e-06, 0.5181593842123193, 2.0315095239844173e-05, 0.48181921919681886]
    got = Constraints(low, high).project(tensor(q))
    np.testing.assert_allclose(got, [0.2, 0.5, 0.2, 0.1], atol=1e-12)


def test_ten_thousand_bounds_are_met() -> None:
    rng = np.random.default_rng(2)
    low, high = rng.random(10**4) * 5e-5, 2e-5 + rng.random(10**4) * 4e-4
    constraints = Constraints(np.minimum(low, high).tolist(), high.tolist())
    got = constraints.project(tensor(rng.dirichlet(np.full(10**4, 0.01)) + 1e-12))
    assert float(got.sum()) == pytest.approx(1, abs=1e-9)
    assert (got >= constraints.low_S).all() and (got <= constraints.high_S).all()


def test_a_step_is_the_minimum_of_its_parts() -> None:
    """⟨g, p⟩ + κ KL(p ‖ π) + KL(p ‖ p_t) / η within the bounds: η is lr, over a first g's size."""
    kappa, lr, g = 0.7, 0.4, np.array([0.5, -1.0, 2.0, -0.3, 0.1])
    kept = Constraints(LOW, HIGH, prior=PRIOR, kl_to_prior=kappa)
    mixture = Mixture([1.0, 2.0, 3.0, 4.0, 5.0], "eg", kept)
    before = mixture.probs_S.numpy()
    size = lr / math.sqrt((before * g**2).sum())
    mixture.step(tensor(g), lr)

    def whole(p: np.ndarray) -> float:
        return float(g @ p) + kappa * kl(p, np.array(PRIOR)) + kl(p, before) / size

    np.testing.assert_allclose(mixture.probs_S, least(whole, LOW, HIGH), atol=2e-5)


@pytest.mark.parametrize("kind", ["eg", "adamw"])
def test_every_step_is_within_the_bounds(kind: str) -> None:
    kept = Constraints(LOW, HIGH)
    mixture = Mixture([1.0] * 5, kind, kept)
    for g_S in [*noise(60, 5), tensor([5.0, -50.0, -50.0, 0.0, 9.0])]:
        mixture.step(g_S, 0.3, memory=1.5)
        for weights_S in (mixture.probs_S, mixture.initial_S):
            assert (weights_S >= kept.low_S - 1e-12).all()
            assert (weights_S <= kept.high_S + 1e-12).all()
    assert float(mixture.probs_S[2]) == pytest.approx(0.25, abs=1e-12)


@pytest.mark.parametrize("kind", ["eg", "adamw"])
def test_a_resume_under_other_bounds_averages_what_is_within_them(kind: str) -> None:
    former = Mixture([1.0] * 5, kind)
    for g_S in noise(60, 5):
        former.step(g_S, 0.3)
    kept = Constraints(LOW, HIGH)
    mixture = Mixture([1.0] * 5, kind, kept)
    mixture.load_state_dict(former.state_dict())
    assert mixture.steps == 60 and kept.holds(mixture.probs_S)
    assert kept.holds(mixture.trajectory.tail().mean(0)), "before another step, too"
    for g_S in noise(3, 5):
        mixture.step(g_S, 0.3)
    assert mixture.trajectory.steps == 4 and kept.holds(mixture.trajectory.tail(1.0).mean(0))


def test_a_resume_under_the_same_bounds_changes_nothing() -> None:
    """Not by rounding; and weights that are back within new bounds are forgotten all the same."""
    former = Mixture([1.0] * 5, "eg", Constraints(LOW, HIGH))
    for g_S in noise(60, 5):
        former.step(g_S, 0.3)
    mixture = Mixture([1.0] * 5, "eg", Constraints(LOW, HIGH))
    mixture.load_state_dict(former.state_dict())
    assert torch.equal(mixture.logits_S, former.logits_S)
    assert torch.equal(mixture.trajectory.whole(), former.trajectory.whole())
    highest = former.trajectory.whole()[:, 3].max()
    assert float(former.probs_S[3]) < float(highest) - 0.01
    closer = [*HIGH[:3], float(highest) - 0.01, HIGH[4]]
    mixture = Mixture([1.0] * 5, "eg", Constraints(LOW, closer))
    mixture.load_state_dict(former.state_dict())
    assert mixture.trajectory.steps == 1
    torch.testing.assert_close(mixture.probs_S, former.probs_S)


@pytest.mark.parametrize("kind", ["eg", "adamw"])
def test_the_pull_ends_where_it_balances_the_objective(kind: str) -> None:
    """κ alone ends at the prior; against g = ∇ of ⟨c, p⟩ at π e^{−c/κ}, normalised."""
    cost_S, prior_S = tensor([0.4, -0.2, 0.1]), tensor([0.5, 0.3, 0.2])
    for kappa, scale in ((1.0, 0.0), (0.5, 1.0), (5.0, 1.0)):
        kept = Constraints([0.0] * 3, [1.0] * 3, prior=[5, 3, 2], kl_to_prior=kappa)
        mixture = Mixture([1.0, 1.0, 8.0], kind, kept)
        for step in range(1500):
            g_S = scale * cost_S + 1e-3 * (-1) ** step
            mixture.step(g_S, 0.3 / (1 + step / 50) if kind == "adamw" else 0.02)
        expected = prior_S * torch.exp(-scale * cost_S / kappa)
        torch.testing.assert_close(mixture.probs_S, expected / expected.sum(), atol=5e-3, rtol=0)


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_tied_sources_keep_their_ratios_and_move_as_one(kappa: float) -> None:
    """As the mixture in which their sum is one source, of their mean gradient and log prior."""
    ratios, prior = tensor([3.0, 2.0, 1.0]) / 6, tensor([0.1, 0.4, 0.3, 0.2])
    merged_prior = tensor([float((ratios * (prior[[0, 1, 3]] / ratios).log()).sum().exp()), 0.3])
    pulled: dict[str, Any] = {"kl_to_prior": kappa}
    tied = Constraints(
        [0.0] * 4, [1.0] * 4, tied=[True, True, False, True], prior=prior.tolist(), **pulled
    )
    free = Constraints([0.0] * 2, [1.0] * 2, prior=merged_prior.tolist(), **pulled)
    mixture, merged = Mixture([3.0, 2.0, 4.0, 1.0], "eg", tied), Mixture([6.0, 4.0], "eg", free)
    for g_S in noise(80, 4):
        mean = float((ratios * g_S[[0, 1, 3]]).sum())
        merged.step(tensor([mean, float(g_S[2])]), 0.05)
        mixture.step(g_S, 0.05)
        # The size of g is that of the mean, within them.
        torch.testing.assert_close(mixture.probs_S[2], merged.probs_S[1])
        held_S = mixture.probs_S[[0, 1, 3]]
        torch.testing.assert_close(held_S / held_S.sum(), ratios)


@pytest.mark.parametrize("kind", ["eg", "adamw"])
def test_tied_sources_keep_their_ratios_whatever_else_moves_them(kind: str) -> None:
    """A prior of other ratios, and two groups."""
    tied = Constraints(
        [0.0] * 4, [1.0] * 4, tied=[True, True, False, True], prior=[1.0] * 4, kl_to_prior=0.5
    )
    mixture = Mixture([3.0, 2.0, 4.0, 1.0], kind, tied, Levels([[0, 1, 1, 0]]))
    for g_S in noise(80, 4):
        mixture.step(g_S, 0.05)
    held_S = mixture.probs_S[[0, 1, 3]]
    torch.testing.assert_close(held_S / held_S.sum(), tensor([3, 2, 1]) / 6, rtol=1e-6, atol=0)


def test_with_groups_the_pull_goes_by_the_size_of_the_whole_step() -> None:
    """The first step: g of usual size 0.2, in groups 0.1 and within them √0.03."""
    p_S, prior_S, g_S = tensor([0.2, 0.3, 0.5]), tensor([0.6, 0.2, 0.2]), tensor([0.4, -0.1, -0.1])
    kept = Constraints([0.0] * 3, [1.0] * 3, prior=prior_S.tolist(), kl_to_prior=2.0)
    mixture = Mixture(p_S.tolist(), "eg", kept, Levels([[0, 0, 1]]))
    mixture.step(g_S, 0.1)
    step_S = 0.1 * (tensor([0.1, 0.1, -0.1]) / 0.1 + tensor([0.3, -0.2, 0.0]) / 0.03**0.5)
    pull = 2.0 * 0.1 / 0.2
    wanted_S = ((p_S.log() - step_S).log_softmax(0) + pull * prior_S.log()) / (1 + pull)
    torch.testing.assert_close(mixture.probs_S, wanted_S.softmax(0))


def test_without_constraints_nothing_changes() -> None:
    plain, kept = (
        Mixture([1.0, 2.0, 3.0], "eg"),
        Mixture([1.0, 2.0, 3.0], "eg", Constraints([0.0] * 3, [1.0] * 3)),
    )
    for g_S in noise(50, 3):
        for mixture in (plain, kept):
            mixture.step(g_S, 0.05, memory=1.5)
    torch.testing.assert_close(plain.probs_S, kept.probs_S, rtol=1e-10, atol=0)


def test_intervals_end_at_the_bounds() -> None:
    blocks_BS = torch.rand(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks_BS[:, 2] = 0.25
    free = weight_intervals(blocks_BS / 3, validation_examples=50)
    found = Constraints(LOW, HIGH).narrow(free)
    assert (found.low_S >= tensor(LOW)).all() and (found.high_S <= tensor(HIGH)).all()
    assert found.low_S[2] == found.high_S[2] == 0.25 and found.half_width_S[2] == 0
    assert free.half_width_S[1] > 0.05 and found.half_width_S[1] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("low", "high", "options"),
    [
        ([0.6, 0.6], [1.0, 1.0], {}),
        ([0.0, 0.0], [0.4, 0.5], {}),
        ([0.5, 0.0], [0.4, 1.0], {}),
        ([0.0, 0.0], [0.0, 1.0], {}),
        ([-0.1, 0.0], [1.0, 1.0], {}),
        ([0.0, 0.0], [1.0, 1.0], {"prior": [1.0, 0.0], "kl_to_prior": 0.1}),
        ([0.0, 0.0], [1.0, 1.0], {"prior": [1.0, 1.0], "kl_to_prior": -0.1}),
    ],
)
def test_what_no_mixture_can_keep_to_is_refused(low: list, high: list, options: dict) -> None:
    with pytest.raises(ValueError, match=r"within the bounds|a prior needs"):
        Constraints(low, high, **options)


GROUPS = [([1, 2], 0.05, 0.2), ([0, 1, 2, 3], 0.3, 0.5), ([4, 5], 0.1, 1.0), ([6], 0.0, 0.15)]
NESTED_LOW = [0.0, 0.02, 0.0, 0.1, 0.0, 0.05, 0.0, 0.0]
NESTED_HIGH = [1.0, 0.1, 1.0, 0.3, 0.2, 1.0, 1.0, 0.4]


def least_kl_in_groups(q: np.ndarray) -> np.ndarray:
    """The nearest mixture, by a solver that knows nothing of factors."""
    rows = [np.isin(np.arange(8), of).astype(float) for of, _, _ in GROUPS]
    ends = [(low, high) for _, low, high in GROUPS]
    bounds = [
        {"type": "ineq", "fun": lambda p, row=row, end=end, sign=sign: sign * (row @ p - end)}
        for row, pair in zip(rows, ends, strict=True)
        for sign, end in zip((1.0, -1.0), pair, strict=True)
    ]
    whole = {"type": "eq", "fun": lambda p: p.sum() - 1}
    found = minimize(
        lambda p: kl(p, q), [0.2, 0.05, 0.05, 0.15, 0.1, 0.2, 0.1, 0.15],
        jac=lambda p: np.log(np.maximum(p, 1e-300) / q) + 1,
        bounds=list(zip(NESTED_LOW, NESTED_HIGH, strict=True)), constraints=[whole, *bounds],
        method="SLSQP", options={"ftol": 1e-15, "maxiter": 2000},
    )  # fmt: skip
    return found.x


@pytest.mark.parametrize("seed", range(12))
def test_the_projection_is_the_nearest_within_bounds_of_groups_in_groups(seed: int) -> None:
    q = np.random.default_rng(seed).dirichlet(np.full(8, 0.4)) + 1e-6
    got = Constraints(NESTED_LOW, NESTED_HIGH, groups=GROUPS).project(tensor(q)).numpy()
    assert got.sum() == pytest.approx(1, abs=1e-12)
    for of, low, high in GROUPS:
        assert low - 1e-12 <= got[of].sum() <= high + 1e-12
    want = least_kl_in_groups(q)
    assert kl(got, q) <= kl(want, q) + 1e-9
    np.testing.assert_allclose(got, want, atol=3e-4)


def test_a_resume_goes_by_the_bounds_of_groups() -> None:
    def bounded(most: float) -> Mixture:
        return Mixture(
            [1.0] * 4, "eg", Constraints([0.0] * 4, [1.0] * 4, groups=[([0, 2], 0, most)])
        )

    former = bounded(0.3)
    for g_S in noise(60, 4) - tensor([1.0, 0.0, 1.0, 0.0]):
        former.step(g_S, 0.3)
    assert float(former.probs_S[[0, 2]].sum()) == pytest.approx(0.3, abs=1e-12)
    same, narrower = bounded(0.3), bounded(0.2)
    for mixture in (same, narrower):
        mixture.load_state_dict(former.state_dict())
    assert torch.equal(same.trajectory.whole(), former.trajectory.whole())
    assert narrower.trajectory.steps == 1
    assert float(narrower.probs_S[[0, 2]].sum()) == pytest.approx(0.2, abs=1e-12)


@pytest.mark.parametrize("kind", ["eg", "adamw"])
def test_every_step_is_within_the_bounds_of_groups(kind: str) -> None:
    kept = Constraints(NESTED_LOW, NESTED_HIGH, groups=GROUPS)
    mixture = Mixture([1.0] * 8, kind, kept, Levels([[0, 0, 0, 0, 1, 1, 2, 3]]))
    for g_S in [*noise(60, 8), tensor([5.0, -50.0, -50.0, 0.0, 9.0, 1.0, -40.0, 3.0])]:
        mixture.step(g_S, 0.3, memory=1.5)
        for weights_S in (mixture.probs_S, mixture.initial_S):
            for of, low, high in GROUPS:
                assert low - 1e-12 <= float(weights_S[of].sum()) <= high + 1e-12


@pytest.mark.parametrize("groups", [[([0, 1], 0.0, 0.3)], [([0, 1], 0.7, 1.0)]])
def test_groups_that_no_mixture_keeps_to_are_refused(groups: Any) -> None:
    low, high = ([0.2, 0.2, 0.0], [0.3, 0.3, 1.0])
    with pytest.raises(ValueError, match="within the bounds"):
        Constraints(low, high, groups=groups)
