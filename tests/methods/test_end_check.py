"""The check after a run's last step: its formula, on a known law, and when it is made."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_scalebio.engine.evaluate import ExampleLosses
from megatron_scalebio.engine.state import TokenCost
from megatron_scalebio.methods import end_check as end_check_module
from megatron_scalebio.methods.end_check import EndCheck, check_steps, end_check, solved
from megatron_scalebio.mixture.lookalikes import joined

# Each source is a law of V outcomes and a model can be any mixture.

V = 12
DRAW = np.random.default_rng(3)
LAW_SV = DRAW.dirichlet(np.full(V, 0.7), size=3)
SETS = [LAW_SV.T @ np.array([0.5, 0.3, 0.2]), 0.7 * LAW_SV[0] + 0.3 * DRAW.dirichlet(np.ones(V))]


def best(counts_V: np.ndarray) -> np.ndarray:
    """The mixture of most likelihood (expectation maximisation)."""
    p = np.full(3, 1 / 3)
    for _ in range(3000):
        p = p * ((LAW_SV / (p @ LAW_SV)) @ (counts_V / counts_V.sum()))
    return p


def gains(p: np.ndarray, outcomes: np.ndarray) -> torch.Tensor:
    """k: what the loss of each outcome falls by with more of each source, [S, outcomes]."""
    return torch.from_numpy((LAW_SV / (p @ LAW_SV) - 1)[:, outcomes])


def checked(
    p: np.ndarray, sets: list[np.ndarray], shares: list[float], n: int, of_sources: int = 40_000
) -> EndCheck:
    source = [gains(p, DRAW.choice(V, of_sources, p=law)) for law in LAW_SV]
    validation = [gains(p, outcomes) for outcomes in sets]
    return solved(validation, shares, [n] * len(sets), source, torch.from_numpy(p), [0, 1, 2])


@pytest.mark.parametrize("shares", [[1.0], [0.6, 0.4]])
def test_it_measures_what_another_draw_of_the_validation_sets_would_change(
    shares: list[float],
) -> None:
    n, laws = 500, SETS[: len(shares)]
    many = [
        best(sum(s * DRAW.multinomial(n, law) for s, law in zip(shares, laws, strict=True)))
        for _ in range(300)
    ]
    right = best(sum(s * law for s, law in zip(shares, laws, strict=True)))
    drawn = [DRAW.choice(V, n, p=law) for law in laws]
    found = checked(right, drawn, shares, n).draw_SS
    # 300 draws tell a standard deviation to 4 %, 500 examples to about as much.
    np.testing.assert_allclose(found.diagonal().sqrt(), np.std(many, axis=0), rtol=0.15)
    np.testing.assert_allclose(found.sum(0), 0, atol=1e-9)
    assert (found.diagonal().sqrt().numpy() > np.sqrt(right * (1 - right) / n)).any()


def test_it_sees_where_the_validation_loss_is_least() -> None:
    drawn = DRAW.choice(V, 4000, p=SETS[0])
    own = best(np.bincount(drawn, minlength=V).astype(float))
    off = own + np.array([0.03, -0.05, 0.02])
    found = checked(off, [drawn], [1.0], 4000)
    assert (np.abs(found.change_S.numpy() - (own - off)) < 4 * found.error_S.numpy()).all()
    assert float(found.error_S.max()) < 0.012


def test_what_is_read_of_a_part_is_told_of_the_whole() -> None:
    """Another draw is one of the whole set; of the change, what was not read is an error."""
    drawn = DRAW.choice(V, 4000, p=SETS[0])
    own = best(np.bincount(drawn, minlength=V).astype(float))
    whole, part = (checked(own, [drawn[:read]], [1.0], 4000) for read in (4000, 400))
    spread = [each.draw_SS.diagonal().sqrt() for each in (whole, part)]
    np.testing.assert_allclose(*spread, rtol=0.2)
    missed = [
        checked(own, [DRAW.permutation(drawn)[:400]], [1.0], 4000).change_S for _ in range(200)
    ]
    np.testing.assert_allclose(np.stack(missed).std(0), part.error_S, rtol=0.2)


def test_few_examples_of_the_sources_are_an_error_of_the_change() -> None:
    drawn = DRAW.choice(V, 4000, p=SETS[0])
    own = best(np.bincount(drawn, minlength=V).astype(float))
    found = [checked(own, [drawn], [1.0], 4000, of_sources=500) for _ in range(200)]
    missed = np.stack([each.change_S for each in found]).std(0)
    np.testing.assert_allclose(missed, np.stack([e.error_S for e in found]).mean(0), rtol=0.15)


def test_any_directions_do() -> None:
    """What w leans to may be mixtures of the sources: the same is found."""
    p = np.array([0.5, 0.3, 0.2])
    leans = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.9, 0.1], [0.3, 0.3, 0.4]]).double()
    drawn = [gains(p, DRAW.choice(V, 400, p=law)) for law in (SETS[1], *LAW_SV)]
    plain, mixed = (
        solved([k[0]], [1.0], [900], k[1:], torch.from_numpy(p), [0, 1, 2])
        for k in (drawn, [leans @ k for k in drawn])
    )
    for name in ("draw_SS", "change_S", "error_S"):
        torch.testing.assert_close(getattr(plain, name), getattr(mixed, name))


def test_of_a_mean_over_tokens_each_example_has_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their mean is the gain of a token; their spread that of the quotient of two sums."""
    targets = torch.from_numpy(DRAW.integers(1, 9, 4000)).double()
    gained = 0.3 * targets * torch.from_numpy(DRAW.random(4000)) + 0.1
    losses = [ExampleLosses(sums, targets, 0) for sums in (5 + gained, torch.full((4000,), 5.0))]
    monkeypatch.setattr(end_check_module, "example_losses_of", lambda *given: losses)
    state: Any = SimpleNamespace(
        config=SimpleNamespace(data=SimpleNamespace(loss_mean="token")),
        data=SimpleNamespace(layout=None), cost=TokenCost(),
    )  # fmt: skip
    model: Any = SimpleNamespace(u=[], w=[])
    k = end_check_module._gains(state, model, Any, np.arange(4000))
    assert float(k.mean()) == pytest.approx(float(gained.sum() / targets.sum()))
    index = torch.from_numpy(DRAW.integers(4000, size=(2000, 4000)))
    quotients = gained[index].sum(1) / targets[index].sum(1)
    assert float(k.std()) / 4000**0.5 == pytest.approx(float(quotients.std()), rel=0.06)
    state.config.data.loss_mean = "sample"
    k = end_check_module._gains(state, model, Any, np.arange(4000))
    torch.testing.assert_close(k, gained / targets)


def test_sources_that_are_not_in_use_stay_out() -> None:
    p = torch.tensor([0.6, 0.0, 0.4], dtype=torch.float64)
    at = np.array([0.6, 0.0, 0.4])
    drawn, *of_used = (
        gains(at, DRAW.choice(V, 300, p=law))[[0, 2]] for law in (SETS[0], LAW_SV[0], LAW_SV[2])
    )
    found = solved([drawn], [1.0], [300], of_used, p, [0, 2])
    assert found.change_S[1] == found.error_S[1] == 0 and not found.draw_SS[1].any()
    assert found.draw_SS[0, 0] == pytest.approx(float(found.draw_SS[2, 2])) != 0


def test_alike_sources_cost_no_more_than_being_told() -> None:
    """K is singular then: a pseudo-inverse, no error."""
    drawn = gains(np.full(3, 1 / 3), DRAW.choice(V, 300, p=SETS[0]))
    twice = [torch.stack([row, row]) for row in (drawn[0], drawn[0])]
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert solved([twice[0]], [1.0], [300], twice, p, [0, 1]).draw_SS.isfinite().all()


@pytest.mark.parametrize(("like", "groups"), [(0.01, [[1, 4]]), (0.0, [[1, 4]]), (1.0, [])])
def test_sources_that_w_leans_to_alike_are_named(like: float, groups: list[list[int]]) -> None:
    """Numbers 0, 1, 3 and 4 of five are in use; the last differs from number 1 in a share."""
    other = DRAW.dirichlet(np.full(V, 0.7))
    laws = [*LAW_SV, (1 - like) * LAW_SV[1] + like * other]
    leans = np.stack([law / np.mean(laws, axis=0) - 1 for law in laws])
    sources = [torch.from_numpy(leans[:, DRAW.choice(V, 4000, p=law)]) for law in laws]
    drawn = torch.from_numpy(leans[:, DRAW.choice(V, 4000, p=SETS[0])])
    p = torch.tensor([0.4, 0.3, 0.0, 0.2, 0.1], dtype=torch.float64)
    found = solved([drawn], [1.0], [4000], sources, p, [0, 1, 3, 4])
    assert found.lookalikes == groups
    if groups:  # they count as one source, in which each has its share
        merge = torch.tensor([[1.0, 0, 0, 0], [0, 0.75, 0, 0.25], [0, 0, 1, 0]]).double()
        pooled = [sources[0], torch.cat([sources[1]] * 3 + [sources[3]], 1), sources[2]]
        one = solved(
            [merge @ drawn], [1.0], [4000], [merge @ k for k in pooled],
            torch.tensor([0.4, 0.4, 0.2]).double(), [0, 1, 2],
        )  # fmt: skip
        at = torch.zeros(5, 3, dtype=torch.float64)
        at[[0, 1, 3, 4], [0, 1, 2, 1]] = torch.tensor([1.0, 0.75, 1.0, 0.25]).double()
        torch.testing.assert_close(found.change_S, at @ one.change_S)
        torch.testing.assert_close(found.draw_SS, at @ one.draw_SS @ at.T)


def test_what_is_within_the_noise_of_few_examples_is_not_called_alike() -> None:
    p = np.full(3, 1 / 3)
    few = [0.1 * gains(p, DRAW.choice(V, 4, p=law)) + 0.9 for law in LAW_SV]
    noise = [k + torch.from_numpy(DRAW.normal(size=k.shape)) for k in few]
    found = solved([noise[0]], [1.0], [4], noise, torch.from_numpy(p), [0, 1, 2])
    assert found.lookalikes == []


@pytest.mark.parametrize(
    ("apart", "error", "alike"),
    [
        (1.99, 0.0, True), (2.01, 0.0, False),  # a fifth of the median pair's
        (1.49, 0.25, True), (1.51, 0.25, False),  # however unlucky the noise was
        (-10.0, 4.99, True), (-10.0, 5.01, False),  # there is no measure
    ],
)  # fmt: skip
def test_alike_is_what_is_surely_far_less_apart_than_the_median_pair(
    apart: float, error: float, alike: bool
) -> None:
    D_AA = torch.zeros(4, 4, dtype=torch.float64)
    D_AA[tuple(torch.triu_indices(4, 4, 1))] = torch.tensor([apart, 9, 11, 12, 13, 10]).double()
    # Examples of one source are noisier than those of another: a pair has the noise of both.
    noise_A = error**2 * torch.tensor([1.0, 3.0, 3.0, 1.0]).double() / 8
    noise_AAA = noise_A[:, None, None] * torch.eye(4).double()
    surely_AA, _ = end_check_module._lookalikes(-D_AA, noise_AAA)
    assert joined(surely_AA) == ([[0, 1]] if alike else [])


@pytest.mark.parametrize(
    ("weights", "examples", "kept", "begins"),
    [
        ([0.5, 0.5], 5, None, True), ([0.5, 0.5], 5, "bounds", False),
        ([0.5, 0.5] + [0.0] * 254, 5, None, True), ([0.5, 0.5] + [0.0] * 255, 5, None, False),
        ([0.5, 0.5], 2, None, True), ([0.5, 0.5], 1, None, False),
        ([0.99, 0.01], 5, None, True), ([0.991, 0.009], 5, None, False),  # one in use
    ],
)  # fmt: skip
def test_what_can_not_be_checked_is_not_begun(
    weights: list[float],
    examples: int,
    kept: str | None,
    begins: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(end_check_module.runtime, "on_main", lambda work: work())
    config = SimpleNamespace(
        bilevel=SimpleNamespace(final_check=True, resync_interval=10),
        train=SimpleNamespace(train_iters=2000), lisa=SimpleNamespace(lisa_layers=None),
        parallel=SimpleNamespace(low_precision=None),
    )  # fmt: skip
    sources = [range(9), range(examples), *[range(1)] * (len(weights) - 2)]
    sampler = SimpleNamespace(sizes_S=[len(source) for source in sources])
    data = SimpleNamespace(sources=sources, validation=[range(5)], sampler=sampler)
    state: Any = SimpleNamespace(config=config, data=data)
    bio: Any = SimpleNamespace(mixture=SimpleNamespace(constraints=kept))
    weight_S = torch.tensor(weights, dtype=torch.float64)

    def begin(line: str) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError) if begins else nullcontext():
        assert end_check(state, bio, weight_S, [1.0], begin) is None


def test_it_objects_to_what_is_large_and_sure() -> None:
    def said(change: float, error: float) -> str:
        both = torch.tensor([change, -change]).double()
        return EndCheck(torch.zeros(2, 2), both, torch.full((2,), error).double(), []).objection(
            ["a", "b"], 0.05
        )

    assert "the weight of a changes by +0.090 ± 0.020" in said(0.09, 0.02)
    assert not said(0.09, 0.031) and not said(0.049, 0.001) and said(0.051, 0.001)


def test_weights_json_has_standard_deviations() -> None:
    variances = torch.diag(torch.tensor([0.04, 0.09])).double()
    change, error = torch.tensor([[0.1, -0.1], [0.03, 0.02]]).double()
    assert EndCheck(variances, change, error, []).told(["a", "b"]) == {
        "change": {"a": pytest.approx(0.1), "b": pytest.approx(-0.1)},
        "standard_error": {"a": pytest.approx(0.03), "b": pytest.approx(0.02)},
        "draw": {"a": pytest.approx(0.2), "b": pytest.approx(0.3)},
    }


def test_it_costs_a_twentieth_at_most() -> None:
    def steps(iters: int, used: int, precision: str | None = None, **given: Any) -> int:
        bilevel = {"final_check": True, "resync_interval": 10, **given}
        config: Any = SimpleNamespace(
            bilevel=SimpleNamespace(**bilevel), train=SimpleNamespace(train_iters=iters),
            lisa=SimpleNamespace(lisa_layers=None, lisa_interval=6),
            parallel=SimpleNamespace(low_precision=precision),
        )  # fmt: skip
        return check_steps(config, used)

    assert [steps(n, 3) for n in (479, 480, 720, 2000)] == [0, 4, 6, 10]
    assert steps(2000, 1) == steps(2000, 3, final_check=False) == steps(2000, 3, "hybrid") == 0
    assert steps(2000, 3, resync_interval=None) == 0 and steps(2000, 3, resync_interval=5) == 5


@pytest.mark.parametrize(
    ("split", "of_sum", "alike"),
    [
        (0.16, 0.02, True), (0.14, 0.02, False),  # of .3: two standard errors are all of it
        (0.16, 0.10, True), (0.16, 0.11, False),  # a third of the difference's, 2 × .16
    ],
)  # fmt: skip
def test_what_another_validation_set_might_split_in_any_way_is_alike(
    split: float, of_sum: float, alike: bool
) -> None:
    """Standard errors of half the difference of two weights, .2 and .1, and of their sum."""
    own, both = split**2 + of_sum**2 / 4, of_sum**2 / 4 - split**2
    draw_AA = torch.diag(torch.tensor([0.0, own, own, 0.0]).double())
    draw_AA[1, 2] = draw_AA[2, 1] = both
    p_A = torch.tensor([0.4, 0.2, 0.1, 0.3]).double()
    found_AA = end_check_module._any_split(draw_AA, p_A)
    assert joined(found_AA) == ([[1, 2]] if alike else [])


def test_sources_whose_difference_drowns_in_noise_count_as_one() -> None:
    """D of the first two is too noisy to be surely small; their split is known to no use."""
    rng = np.random.default_rng(1)
    leans = np.stack([LAW_SV[0], 0.98 * LAW_SV[0] + 0.02 * LAW_SV[1], LAW_SV[2]])
    at = leans / leans.mean(0) - 1

    def noisy(law: np.ndarray, n: int) -> torch.Tensor:
        return torch.from_numpy(at[:, rng.choice(V, n, p=law)] + 2 * rng.normal(size=(3, n)))

    sources = [noisy(law, 2000) for law in leans]
    drawn = noisy(leans[0], 300)
    p = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    found = solved([drawn], [1.0], [300], sources, p, [0, 1, 2])
    K_AA = torch.stack([k.mean(1) for k in sources], 1)
    surely_AA, _ = end_check_module._lookalikes(
        K_AA, torch.stack([torch.cov(k) / k.shape[1] for k in sources])
    )
    assert joined(surely_AA) == [] and found.lookalikes == [[0, 1]]
    assert float(found.draw_SS.diagonal().max()) < 0.2**2
