"""λ's two ways to step: what must not move, what must move where, and exact resume."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_scalebio.mixture.constraints import Constraints
from megatron_scalebio.mixture.levels import Levels
from megatron_scalebio.mixture.mixture import LARGEST_STEP, LEAST_SHARE, SIZE_WARMUP, Mixture
from megatron_scalebio.mixture.objective import hypergradient, logits_gradient, mixture_probs
from megatron_scalebio.mixture.sampler import BlendSampler
from tests.distributed import naive_loop
from tests.mixture.test_lookalikes import hypergradients

KINDS = ["eg", "adamw"]


def noise(steps: int, sources: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, sources, generator=generator, dtype=torch.float64)


def centred(g_S: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    return g_S - (mixture.probs_S * g_S).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_are_normalised(kind: str) -> None:
    mixture = Mixture([1, 3], kind)
    torch.testing.assert_close(mixture.probs_S, torch.tensor([0.25, 0.75], dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_no_hypergradient_moves_nothing(kind: str) -> None:
    mixture = Mixture([1.0, 2.0, 5.0], kind)
    before = mixture.probs_S
    for _ in range(20):
        assert mixture.step(torch.zeros(3, dtype=torch.float64), 0.1) == 0.0
    torch.testing.assert_close(mixture.probs_S, before, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_source_of_all_weight_never_moves(kind: str) -> None:
    mixture = Mixture([1.0], kind)
    for g_S in noise(50, 1):
        mixture.step(centred(g_S, mixture), 0.1)
    assert mixture.probs_S.tolist() == [1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_favours_the_source_with_the_least_excess_loss(kind: str) -> None:
    mixture = Mixture([1.0, 1.0, 1.0], kind)
    g_S = torch.tensor([0.4, -0.5, 0.1], dtype=torch.float64)
    norm = mixture.step(g_S, 0.1)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert norm == pytest.approx(float(logits_gradient(g_S, uniform).norm()))
    assert mixture.probs_S[1] > mixture.probs_S[2] > mixture.probs_S[0]


def test_exponentiated_gradient_moves_logits_by_the_hypergradient_in_its_usual_size() -> None:
    mixture = Mixture([1.0, 1.0], "eg")
    g_S = torch.tensor([0.3, -0.3], dtype=torch.float64)
    mixture.step(g_S, 0.1)
    # Its usual size is 0.3 after one step, so the logits part by 2 · 0.1.
    log_ratio = float(mixture.probs_S[1].log() - mixture.probs_S[0].log())
    assert log_ratio == pytest.approx(0.2)


def exponentiated_gradient(
    initial: list[float], path: list[list[float]], rates: list[float]
) -> tuple[list[list[float]], list[float], float]:
    """The weights after each step, the norms of Jᵀ g, and v: the equations of `mixture`, by hand.

    v ← .99 v + .01 Σ_i p_i g_i²,  λ_i −= lr g_i / √(v / (1 − .99ᵗ)), cut at 15 lr, no p below
    1e-4 / S. From step 31 on a g of more than 6 √(v / (1 − .99ᵗ⁻¹)) is cut to that size, if there
    is a size.
    """
    probs = [x / sum(initial) for x in initial]
    v, trajectory, norms = 0.0, [], []
    for number, (g, lr) in enumerate(zip(path, rates, strict=True), start=1):
        mean = sum(p * x for p, x in zip(probs, g, strict=True))
        norms.append(math.hypot(*(p * (x - mean) for p, x in zip(probs, g, strict=True))))
        square = sum(p * x * x for p, x in zip(probs, g, strict=True))
        if number > 30:
            most = 36 * v / (1 - 0.99 ** (number - 1))
            if square > most > 0:
                g = [x * math.sqrt(most / square) for x in g]
                square = most
        v = 0.99 * v + 0.01 * square
        size = math.sqrt(v / (1 - 0.99**number)) or 1.0
        sizes = [max(-15.0, min(15.0, x / size)) for x in g]
        raised = [p * math.exp(-lr * x) for p, x in zip(probs, sizes, strict=True)]
        raised = [max(x / sum(raised), 1e-4 / len(raised)) for x in raised]
        probs = [x / sum(raised) for x in raised]
        trajectory.append(probs)
    return trajectory, norms, v


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_exponentiated_gradient_is_its_equations_step_by_step(scale: float) -> None:
    initial = [3.0, 1.0, 0.5, 2.5, 0.001]
    path = scale * noise(60, 5, seed=3)
    # A spike before any is cut, two that are cut, and ones that are a little too small for that.
    for number, factor in ((29, 12.0), (30, 60.0), (36, 8.0), (44, 15.0), (50, 0.0), (52, 90.0)):
        path[number] *= factor
    rates = [0.05 if number % 3 else 0.2 for number in range(60)]
    mixture = Mixture(initial, "eg")
    want, want_norms, v = exponentiated_gradient(initial, path.tolist(), rates)
    for g_S, lr, weights, norm in zip(path, rates, want, want_norms, strict=True):
        assert mixture.step(g_S, lr) == pytest.approx(norm, rel=1e-9)
        assert mixture.probs_S.tolist() == pytest.approx(weights, rel=1e-9)
    assert mixture.squares[0] == pytest.approx(v, rel=1e-9)
    assert mixture.steps == 60
    assert mixture.trajectory.tail(1.0).flatten().tolist() == pytest.approx(
        [weight for weights in want for weight in weights], rel=1e-9
    )
    assert mixture.initial_S.tolist() == pytest.approx([x / 7.001 for x in initial], rel=1e-12)


def test_the_first_hypergradient_after_none_moves_the_mixture() -> None:
    """As after many steps in which u is w."""
    path = torch.cat([torch.zeros(40, 3, dtype=torch.float64), noise(3, 3)])
    want, _, _ = exponentiated_gradient([1.0, 1.0, 2.0], path.tolist(), [0.1] * 43)
    mixture = Mixture([1.0, 1.0, 2.0], "eg")
    for g_S, weights in zip(path, want, strict=True):
        mixture.step(g_S, 0.1)
        assert mixture.probs_S.tolist() == pytest.approx(weights, rel=1e-9)


def test_exponentiated_gradient_does_not_see_the_scale_of_the_loss() -> None:
    small, large = Mixture([1.0] * 4, "eg"), Mixture([1.0] * 4, "eg")
    for g_S in noise(30, 4):
        small.step(centred(g_S, small), 0.1)
        large.step(centred(1000 * g_S, large), 0.1)
    torch.testing.assert_close(small.probs_S, large.probs_S)


def test_a_spike_neither_throws_the_mixture_nor_holds_it_still() -> None:
    mixture, undisturbed = Mixture([1.0] * 4, "eg"), Mixture([1.0] * 4, "eg")
    for number, g_S in enumerate(noise(200, 4)):
        undisturbed.step(centred(g_S, undisturbed), 0.02)
        mixture.step(centred(g_S * (1e4 if number == 100 else 1), mixture), 0.02)
        if number == 99:
            before_S = mixture.logits_S.clone()
        if number == 100:
            moved_S = (mixture.logits_S - before_S).abs()
            assert float(moved_S.max()) < 0.02 * LARGEST_STEP / float(mixture.probs_S.min()) ** 0.5
    assert mixture.squares[0] < 1.5 * undisturbed.squares[0]


def test_a_lasting_change_of_size_is_followed() -> None:
    mixture = Mixture([1.0] * 4, "eg")
    for number, g_S in enumerate(noise(400, 4)):
        mixture.step(centred(g_S * (100 if number >= 200 else 1), mixture), 0.02)
    fresh = Mixture([1.0] * 4, "eg")
    for g_S in noise(200, 4):
        fresh.step(centred(g_S * 100, fresh), 0.02)
    assert mixture.squares[0] == pytest.approx(fresh.squares[0], rel=0.5)


def test_copies_of_one_source_stay_uniform() -> None:
    """Noise around no difference must average out, over seeds and sources."""
    sources, seeds, steps = 4, 24, 200
    tails = []
    for seed in range(seeds):
        mixture = Mixture([1.0] * sources, "eg")
        for g_S in noise(steps, sources, seed):
            mixture.step(centred(g_S, mixture), 0.02)
        tails.append(mixture.trajectory.tail(0.5).mean(0))
    weights = torch.stack(tails)
    error_S = weights.std(0) / math.sqrt(seeds)
    assert ((weights.mean(0) - 1 / sources).abs() <= 4 * error_S).all(), (weights.mean(0), error_S)


def test_a_lost_source_can_come_back() -> None:
    mixture = Mixture([1.0, 1.0], "eg")
    for _ in range(500):
        mixture.step(centred(torch.tensor([1.0, 0.0], dtype=torch.float64), mixture), 1.0)
    assert mixture.probs_S[0] == pytest.approx(1e-4 / 2, rel=1e-3)
    mixture = Mixture([1e-4, 1.0], "eg")
    for _ in range(200):
        mixture.step(centred(torch.tensor([-1.0, 0.0], dtype=torch.float64), mixture), 0.1)
    assert mixture.probs_S[0] > 0.9


def test_adamw_is_torch_adamw_on_the_logits() -> None:
    mixture = Mixture([1.0, 2.0, 3.0], "adamw")
    logits_S = torch.tensor([1 / 6, 2 / 6, 3 / 6], dtype=torch.float64).log().requires_grad_()
    reference = torch.optim.AdamW([logits_S], weight_decay=0.0)
    weights = []
    for number, g_S in enumerate(noise(10, 3)):
        logits_S.grad = logits_gradient(g_S, mixture_probs(logits_S.detach()))
        reference.param_groups[0]["lr"] = lr = 0.01 * (1 + number % 4)
        assert mixture.step(g_S, lr) == float(logits_S.grad.norm())
        reference.step()
        weights.append(mixture_probs(logits_S.detach()))
        assert torch.equal(mixture.probs_S, weights[-1])
        assert not mixture.probs_S.requires_grad
    assert torch.equal(mixture.trajectory.tail(1.0), torch.stack(weights))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_definition(kind: str) -> None:
    """Over spikes within the first 30 steps, which are not cut, and after; then with memory.

    What lasts of g is at first nothing, then more and more.
    """
    mixture, naive = Mixture([1.0, 2.0, 7.0], kind), naive_loop.Mixture([1.0, 2.0, 7.0], kind)
    shares = set()
    for number, g_S in enumerate(noise(200, 3)):
        g_S = g_S * {20: 9.0, 29: 30.0, 30: 80.0, 60: 15.0}.get(number, 1.0)
        if number >= 120:
            g_S = 0.2 * g_S + 2.0 * noise(1, 3)[0]
        g_S = centred(g_S, mixture)
        lr = 0.3 / (1 + number % 3)
        memory = max(1.0, number / 20) if number < 90 else 40.0
        norm = mixture.step(g_S, lr, memory)
        assert norm == pytest.approx(naive.step(g_S.numpy(), lr, memory))
        assert mixture.probs_S.tolist() == pytest.approx(naive.p.tolist(), rel=1e-9)
        if kind == "eg" and memory > 1:
            share = naive.lasting / naive.v
            shares.add("least" if share < 1 / min(memory, 25) else "some")
    assert kind != "eg" or shares == {"least", "some"}


def test_no_more_lasts_than_there_is() -> None:
    """Of a g that dies away, what came before is larger than what comes."""
    mixture, naive = Mixture([1.0, 1.0], "eg"), naive_loop.Mixture([1.0, 1.0], "eg")
    for number in range(30):
        g_S = torch.tensor([1.0, -1.0]).double() * 0.9 ** max(0, number - 5)
        g_S = centred(g_S, mixture)
        mixture.step(g_S, 0.05, memory=4.0)
        naive.step(g_S.numpy(), 0.05, memory=4.0)
        assert mixture.probs_S.tolist() == pytest.approx(naive.p.tolist(), rel=1e-9)
    assert naive.lasting > naive.v


def rarely_seen(
    sources: int, places: int, steps: int, levels: Levels | None = None
) -> tuple[Mixture, list[float], np.ndarray]:
    """A batch of few places, and excess losses of a heavy tail around those of 24 topics.

    Returns:
        The mixture; its largest weight after each step; the topic of each source. Topic 0 is the
        best, topic 1 half as good, all others are bad.
    """
    generator = np.random.default_rng(0)
    topic_S = np.arange(sources) % 24
    worth_S = np.where(topic_S == 0, -1.0, np.where(topic_S == 1, -0.5, 0.3))
    mixture = Mixture([1.0] * sources, "eg", levels=levels)
    sampler = BlendSampler([10**4] * sources, places, 0)
    largest = []
    for step in range(steps):
        probs_S = mixture.probs_S
        picks = sampler.next(probs_S.numpy())
        count_S = np.bincount(picks.group_B, minlength=sources)
        there = count_S > 0
        excess_S = np.full(sources, np.nan)
        tail = generator.standard_t(3, there.sum()) / np.sqrt(count_S[there])
        # u is reset to w every ten steps, and parts from it over five.
        excess_S[there] = min(1.0, step % 10 / 5) * (worth_S[there] + tail)
        inclusion_S = torch.from_numpy(picks.inclusion_S)
        g_S = hypergradient(torch.from_numpy(excess_S), probs_S, inclusion_S, 10.0)
        mixture.step(g_S, 0.1)
        largest.append(float(mixture.probs_S.max()))
    return mixture, largest, topic_S


@pytest.mark.parametrize(("sources", "places"), [(6000, 128), (1000, 64)])
def test_no_example_decides_where_batches_are_smaller_than_the_sources(
    sources: int, places: int
) -> None:
    """Each stands for 50 or more that are not there; uncut, it makes its source the mixture."""
    mixture, largest, topic_S = rarely_seen(sources, places, 400)
    assert largest[2] < 20 / sources, "by step 3"
    assert max(largest) < 0.15
    share = np.bincount(topic_S, mixture.probs_S.numpy())
    assert share.argmax() == 0 and share[0] > 0.35 and share[0] > 2 * share[1] > 0.04


def test_a_spike_is_cut_to_what_is_largest() -> None:
    """One of ten times the usual size moves λ as one of LARGEST_STEP times does."""
    direction_S = torch.tensor([1.0, -1.0], dtype=torch.float64)  # of size 1 at equal weights
    moved = []
    for size in (LARGEST_STEP, 10.0):
        mixture = Mixture([1.0, 1.0], "eg")
        for step in range(2 * SIZE_WARMUP):
            mixture.step(direction_S * (-1) ** step, lr=1e-9)
        mixture.step(size * direction_S, lr=0.01)
        moved.append(mixture.logits_S)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=0.0)


def test_the_sources_that_look_alike_are_those_of_its_steps() -> None:
    """s1 and s3 are the same; s3 began with a fortieth of the other's weight, and keeps it."""
    path = hypergradients([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0.02]], 1500, 0)
    mixture = Mixture([0.4, 0.39, 0.2, 0.01], "eg")
    for g_S in torch.tensor(path):
        mixture.step(g_S, lr=1e-6)
    tail_BS = mixture.trajectory.tail()
    assert mixture.lookalike_groups(tail_BS) == [[1, 3]]
    other = Mixture([0.25] * 4, "eg")
    other.load_state_dict(mixture.state_dict())
    assert other.lookalike_groups(tail_BS) == [[1, 3]]


def test_a_source_of_no_weight_may_have_bounds() -> None:
    mixture = Mixture([1.0, 0.0], "eg", Constraints([0.0, 0.0], [1.0, 1.0]))
    assert mixture.initial_S[1] == pytest.approx(LEAST_SHARE / 2, rel=1e-3)
    assert len(mixture.state_dict()["squares"]) == 1, "there are no groups"
