"""Which sources a run says it can't tell apart, from hypergradients of a linear system."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from megatron_scalebio.mixture.confidence import judge_convergence, weight_intervals
from megatron_scalebio.mixture.lookalikes import BLOCK, LAGS, MOST_SOURCES, Lookalikes


def hypergradients(gradients_SD: list[list[float]], steps: int, seed: int) -> np.ndarray:
    """g_S = gradients · d + noise of the step's examples; d is what lasts from step to step."""
    draw = np.random.default_rng(seed)
    basis = np.array(gradients_SD)
    d, found = np.zeros(basis.shape[1]), []
    for _ in range(steps):
        d = 0.9 * d + draw.normal(size=len(d))
        found.append(basis @ d + draw.normal(0.0, 3.0, size=len(basis)))
    return np.array(found)


def seen(path: np.ndarray) -> Lookalikes:
    lookalikes = Lookalikes(path.shape[1])
    for g_S in path:
        lookalikes.append(torch.tensor(g_S))
    return lookalikes


CASES = {
    "apart": ([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], []),
    "twins": ([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0.02]], [[1, 3]]),
    "three of a kind": ([[1, 0, 0], [0, 1, 0], [0.01, 1, 0], [0, 1, 0.02], [0, 0, 1]], [[1, 2, 3]]),
    "two pairs": ([[1, 0, 0], [0, 1, 0], [1, 0, 0.01], [0, 1, 0.01]], [[0, 2], [1, 3]]),
    # All but one source are the same; the median pair is then one of them, and nothing is said.
    "no measure": ([[1, 0, 0]] * 4 + [[0, 1, 0]], []),
    "two sources": ([[1, 0], [1, 0]], []),
}


@pytest.mark.parametrize("name", CASES)
def test_lookalikes_are_found_and_no_others(name: str) -> None:
    gradients, expected = CASES[name]
    found = [
        seen(hypergradients(gradients, 1500, seed)).groups(torch.ones(len(gradients)))
        for seed in range(20)
    ]
    # Noise hides one pair in twenty.
    assert found.count(expected) >= 20 - max(1, len(expected)), found


def test_what_has_come_to_differ_thirtyfold_has_been_told_apart() -> None:
    lookalikes = seen(hypergradients([[1, 0], [0, 1], [0, 1]], 1500, 0))
    assert lookalikes.groups(torch.tensor([1.0, 0.1, 2.9])) == [[1, 2]]
    assert lookalikes.groups(torch.tensor([1.0, 2.9, 0.1])) == [[1, 2]]
    assert lookalikes.groups(torch.tensor([1.0, 0.1, 3.1])) == []
    assert lookalikes.groups(torch.tensor([1.0, 3.1, 0.1])) == []


def test_squares_are_those_of_the_last_steps() -> None:
    """Against a loop over pairs of steps, whatever came before."""
    path = hypergradients([[1, 0], [0, 1], [1, 1]], 700, 5)
    path[:200] *= 1000.0
    lookalikes = seen(path)
    block = [
        np.mean([
            (path[t, 0] - path[t, 1]) * np.mean(path[t - LAGS : t, 0] - path[t - LAGS : t, 1])
            for t in range(start, start + BLOCK)
        ])
        for start in range(LAGS, 700 - BLOCK + 1, BLOCK)
    ]  # fmt: skip
    kept = block[16:]  # of 34: the last power of two is 32, the one before it 16
    assert int(lookalikes._blocks_2.sum()) == len(kept) == 18
    total, squares = lookalikes._sums_22SS.sum(0)[:, 0, 1].tolist()
    assert total == pytest.approx(sum(kept)) and squares == pytest.approx(np.square(kept).sum())


def test_nothing_is_said_early_or_of_too_many() -> None:
    twins = [[1, 0], [0, 1], [0, 1]]
    assert seen(hypergradients(twins, LAGS + 4 * BLOCK, 0)).groups(torch.ones(3)) == []
    many = Lookalikes(MOST_SOURCES + 1)
    many.append(torch.zeros(MOST_SOURCES + 1))
    assert (
        many.groups(torch.ones(MOST_SOURCES + 1)) == [] and many.state_dict()["sums"].numel() == 0
    )


@pytest.mark.parametrize("cut", [1, 350, 643])
def test_resume_is_exact(cut: int) -> None:
    path = hypergradients([[1, 0], [0, 1], [0, 1]], 800, 1)
    file = io.BytesIO()
    torch.save(seen(path[:cut]).state_dict(), file)
    file.seek(0)
    resumed = Lookalikes(3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for g_S in path[cut:]:
        resumed.append(torch.tensor(g_S))
    whole = seen(path).state_dict()
    assert whole.keys() == resumed.state_dict().keys()
    for name, value in resumed.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(whole[name])), name


def test_of_lookalikes_the_sum_is_known() -> None:
    """Two sources trade weight for ever; their sum stands still but for a little noise."""
    draw = np.random.default_rng(2)
    trade = 0.2 * np.sin(np.arange(400) / 60) + 0.25
    noise = draw.normal(0, 0.002, 400)
    blocks_BS = torch.tensor(np.stack([trade, 0.5 - trade + noise, 0.5 - noise], 1))
    apart = weight_intervals(blocks_BS)
    known = weight_intervals(blocks_BS, lookalikes=[[0, 1]])
    assert known.low_S[:2].tolist() == [0.0, 0.0] and known.low_S[2] == apart.low_S[2]
    assert 0.5 < known.high_S[0] == known.high_S[1] < 0.51 and known.high_S[2] == apart.high_S[2]
    assert torch.equal(known.weight_S, apart.weight_S)
    names = ["a", "b", "c"]
    assert not judge_convergence(blocks_BS, names).converged
    said = judge_convergence(blocks_BS, names, lookalikes=[[0, 1]])
    assert said.converged and "only the sum of a, b is known" in said.reason


def test_of_two_groups_the_sums_are_judged_each_as_one_source() -> None:
    trade = 0.1 * np.sin(np.arange(400) / 60)
    still = np.random.default_rng(3).normal(0, 0.002, 400)
    pairs = [0.25 + trade, 0.25 - trade + still, 0.25 + trade, 0.25 - trade - still]
    blocks_BS, groups = torch.tensor(np.stack(pairs, 1)), [[0, 1], [2, 3]]
    assert judge_convergence(blocks_BS, lookalikes=groups).converged
    sums_BS = torch.stack([blocks_BS[:, group].sum(1) for group in groups], 1)
    for level, share, converged in ((0.95, 1.01, True), (0.95, 0.99, False), (0.8, 1.01, True)):
        known = float(weight_intervals(sums_BS, level).half_width_S.max())
        said = judge_convergence(
            blocks_BS, lookalikes=groups, tolerance=share * known, confidence=level
        )
        assert said.converged == converged and f"±{known:.3f}" in said.reason


def test_lookalikes_that_nobody_uses_are_not_spoken_of() -> None:
    blocks_BS = torch.tensor([[0.001, 0.001, 0.998]] * 400) + 1e-5 * torch.randn(400, 3)
    said = judge_convergence(blocks_BS, lookalikes=[[0, 1]])
    assert said.converged and "sum" not in said.reason


def test_each_of_a_group_reaches_from_nothing_to_the_sums_upper_end() -> None:
    """The sum's interval is at its own level, and with the draw of the validation set."""
    draw = np.random.default_rng(4)
    blocks_BS = torch.tensor(draw.normal((0.3, 0.3, 0.4), 0.004, (64, 3)))
    sum_B1 = blocks_BS[:, :2].sum(1, keepdim=True)
    found = weight_intervals(blocks_BS, 0.8, 900, [[0, 1], [2]])
    assert found.lookalikes == [[0, 1]], "one alone is no group"
    assert found.low_S[:2].tolist() == [0.0, 0.0] and found.low_S[2] > 0.3
    assert found.high_S[:2].tolist() == weight_intervals(sum_B1, 0.8, 900).high_S.tolist() * 2
    assert found.high_S[0] != weight_intervals(sum_B1, 0.8).high_S[0]


@pytest.mark.parametrize(("each", "known"), [(0.005, True), (0.0049, False)])
def test_groups_below_what_can_be_resolved_are_none(each: float, known: bool) -> None:
    blocks_BS = torch.tensor([[each, each, 1 - 2 * each]] * 8, dtype=torch.float64)
    assert bool(weight_intervals(blocks_BS, lookalikes=[[0, 1]]).lookalikes) == known


def test_the_verdict_of_a_group_counts_the_draw_of_the_validation_set() -> None:
    draw = np.random.default_rng(5)
    blocks_BS = torch.tensor(draw.normal((0.3, 0.3, 0.4), 0.001, (256, 3)))
    told = {n: judge_convergence(blocks_BS, lookalikes=[[0, 1]], validation_examples=n)
            for n in (100, 10_000)}  # fmt: skip
    assert told[10_000].converged and "too small to tell" in told[100].reason
