"""The hypergradient: its zeros, its invariances, and its expectation where batches miss sources."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalebio.mixture.objective import (
    Role,
    hypergradient,
    logits_gradient,
    mixed,
    mixture_probs,
    role_scale,
)

LOSSES = st.lists(st.floats(-5, 5), min_size=2, max_size=6)


def everywhere(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.float64)


def tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(LOSSES, st.floats(0.1, 1000))
@settings(deadline=None)
def test_u_equal_to_w_gives_no_hypergradient(losses: list[float], alpha: float) -> None:
    loss_S = tensor(losses)
    probs_S = mixture_probs(loss_S)
    g_S = hypergradient(loss_S - loss_S, probs_S, everywhere(len(losses)), alpha)
    assert torch.equal(g_S, torch.zeros_like(g_S))
    assert torch.equal(logits_gradient(g_S, probs_S), torch.zeros_like(g_S))


@given(LOSSES, st.floats(-10, 10))
@settings(deadline=None)
def test_a_constant_on_every_excess_loss_changes_nothing(losses: list[float], shift: float) -> None:
    excess_S = tensor(losses)
    probs_S = mixture_probs(-excess_S)
    plain = hypergradient(excess_S, probs_S, everywhere(len(losses)), 7.0)
    shifted = hypergradient(excess_S + shift, probs_S, everywhere(len(losses)), 7.0)
    torch.testing.assert_close(plain, shifted, rtol=0, atol=1e-9)


def test_a_missing_source_stays_where_it_is_and_does_not_move_the_others() -> None:
    excess_S, probs_S = tensor([0.3, math.nan, -0.1]), tensor([0.5, 0.2, 0.3])
    g_S = hypergradient(excess_S, probs_S, everywhere(3), 2.0)
    assert g_S[1] == 0
    without = hypergradient(excess_S[[0, 2]], probs_S[[0, 2]] / 0.8, everywhere(2), 2.0)
    torch.testing.assert_close(g_S[[0, 2]], without)


def test_gradient_of_the_logits_is_that_of_autograd() -> None:
    logits_S = tensor([0.2, -1.0, 0.7]).requires_grad_()
    excess_S = tensor([0.4, -0.2, 0.1])
    alpha = 10.0
    (alpha * (mixture_probs(logits_S) * excess_S).sum()).backward()
    probs_S = mixture_probs(logits_S.detach())
    got = logits_gradient(hypergradient(excess_S, probs_S, everywhere(3), alpha), probs_S)
    torch.testing.assert_close(got, logits_S.grad)


def test_equal_excess_losses_are_a_fixed_point_whichever_sources_are_missing() -> None:
    excess_S = tensor([0.4, math.nan, 0.4, math.nan, 0.4])
    g_S = hypergradient(excess_S, tensor([0.1, 0.2, 0.3, 0.2, 0.2]), 0.5 * everywhere(5), 3.0)
    torch.testing.assert_close(g_S, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_batches_that_miss_sources_point_the_right_way_on_average() -> None:
    """Over all batches there can be. Centring over those present shrinks a step a little, as ratio
    estimates do."""
    excess_S = tensor([0.5, -0.3, 0.2, 0.0, -0.6, 0.1])
    probs_S = tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    inclusion_S = tensor([1.0, 0.9, 0.7, 0.6, 0.5, 0.45])
    mean_S = torch.zeros(6, dtype=torch.float64)
    for row in itertools.product([False, True], repeat=6):
        present_S = torch.tensor(row)
        chance = torch.where(present_S, inclusion_S, 1 - inclusion_S).prod()
        if chance > 0:
            seen_S = torch.where(present_S, excess_S, math.nan)
            mean_S += chance * hypergradient(seen_S, probs_S, inclusion_S, 1.0)
    exact_S = hypergradient(excess_S, probs_S, everywhere(6), 1.0)
    assert torch.nn.functional.cosine_similarity(mean_S, exact_S, dim=0) > 0.99
    assert mean_S.norm() == pytest.approx(float(exact_S.norm()), rel=0.1)


def test_hypergradient_is_its_equation() -> None:
    """g_i = α (e_i − Σ p_j e_j / Σ p_j) / π_i over the sources j that are present, 0 elsewhere."""
    excess, probs = [0.3, math.nan, -0.1, 0.7, math.nan], [0.35, 0.05, 0.3, 0.2, 0.1]
    inclusion, alpha = [1.0, 0.4, 0.8, 0.5, 0.7], 7.0
    here = [i for i in range(5) if not math.isnan(excess[i])]
    mean = sum(probs[i] * excess[i] for i in here) / sum(probs[i] for i in here)
    want = [alpha * (excess[i] - mean) / inclusion[i] if i in here else 0.0 for i in range(5)]
    got = hypergradient(tensor(excess), tensor(probs), tensor(inclusion), alpha)
    assert got.tolist() == pytest.approx(want, rel=1e-12)


def test_logits_gradient_is_the_product_with_the_jacobian_of_softmax() -> None:
    """J = diag(p) − p pᵀ; of a g that is not centred yet."""
    probs_S, g_S = tensor([0.5, 0.3, 0.15, 0.05]), tensor([1.0, 4.0, -2.0, 3.0])
    jacobian_SS = torch.diag(probs_S) - torch.outer(probs_S, probs_S)
    torch.testing.assert_close(logits_gradient(g_S, probs_S), jacobian_SS.T @ g_S)


def test_probabilities_are_softmax_in_double_precision() -> None:
    logits = [0.5, -2.0, 3.25]
    whole = sum(math.exp(x) for x in logits)
    got = mixture_probs(torch.tensor(logits, dtype=torch.float32))
    assert got.tolist() == pytest.approx([math.exp(x) / whole for x in logits], rel=1e-14)


def test_mixed_loss_is_the_mean_under_the_weights_of_the_sources_that_are_there() -> None:
    probs_S, loss_S = tensor([0.5, 0.2, 0.3]), tensor([2.0, math.nan, 5.0])
    always = everywhere(3)
    assert mixed(probs_S, loss_S, always) == pytest.approx((0.5 * 2.0 + 0.3 * 5.0) / 0.8, rel=1e-12)
    assert mixed(probs_S, tensor([1.0, 2.0, 4.0]), always) == pytest.approx(2.1, rel=1e-12)
    assert mixed(probs_S, tensor([1.0, math.inf, 4.0]), always) == math.inf, "damage is seen"
    assert math.isnan(mixed(probs_S, tensor([math.nan] * 3), always))


def test_a_mean_of_those_there_is_that_of_all_where_all_are_alike() -> None:
    """57 validation sets of loss 2, of which a batch has places for 32."""
    loss_V = torch.full((57,), 2.0, dtype=torch.float64)
    loss_V[torch.randperm(57, generator=torch.Generator().manual_seed(0))[:25]] = math.nan
    shares_V = mixture_probs(torch.linspace(-1, 1, 57))
    assert mixed(shares_V, loss_V, 0.3 + 0.7 * shares_V / shares_V.max()) == pytest.approx(2.0)
    assert math.isnan(mixed(shares_V, torch.full_like(loss_V, math.nan), everywhere(57)))


def test_a_mean_of_those_there_is_right_on_average() -> None:
    generator = np.random.default_rng(1)
    loss_S, probs_S = tensor([1.0, 4.0, 2.0, 3.0] * 8), tensor([0.07, 0.01, 0.02, 0.025] * 8)
    inclusion_S = tensor([0.9, 0.3, 0.5, 0.6] * 8)
    present = torch.from_numpy(generator.random((2000, 32))) < inclusion_S
    means = [mixed(probs_S, loss_S.masked_fill(~row, math.nan), inclusion_S) for row in present]
    exact = float((probs_S * loss_S).sum())
    # A ratio of two unbiased sums: its own bias falls with the number of sources.
    assert np.mean(means) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("alpha", [1e-9, 1.0, 100.0])
def test_scales_add_up_to_one(alpha: float) -> None:
    assert role_scale(Role.TRAIN_U, alpha) == 1.0
    assert role_scale(Role.VALID_W, alpha) == pytest.approx(1 / (1 + alpha))
    whole = role_scale(Role.TRAIN_W, alpha) + role_scale(Role.VALID_W, alpha)
    assert whole == pytest.approx(1.0)
    # α → 0 is plain training of w on the validation set, α → ∞ on the mixture.
    assert role_scale(Role.TRAIN_W, alpha) == pytest.approx(alpha / (1 + alpha))
