"""Groups of sources: what each level adds to g, and that groups are found before their sources."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_scalebio.mixture.levels import Levels
from megatron_scalebio.mixture.mixture import Mixture
from tests.mixture.test_mixture import noise, rarely_seen

GROUPS = [[0, 0, 0, 1, 1], [0, 0, 1, 2, 2]]


def test_levels_add_up_and_each_is_the_mean_of_its_groups() -> None:
    g_S, p_S = noise(2, 5)
    p_S = p_S.softmax(0)
    coarse, fine, own = Levels(GROUPS).parts(g_S, p_S)
    assert len(Levels(GROUPS)) == 3
    torch.testing.assert_close(coarse + fine + own, g_S - (p_S * g_S).sum())
    for number in (0, 1):
        members = torch.tensor(GROUPS[0]) == number
        mean = (p_S * g_S)[members].sum() / p_S[members].sum() - (p_S * g_S).sum()
        torch.testing.assert_close(coarse[members], mean.expand(int(members.sum())))
    # Nothing of a finer level is left in a coarser one.
    for part, level in ((fine, 0), (own, 1)):
        sums = Levels(GROUPS).sums((p_S * part)[None], level)
        torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-12, rtol=0)


@pytest.mark.parametrize("memory", [1.0, 4.0])
def test_a_step_is_each_level_in_units_of_its_own_size(memory: float) -> None:
    """And, once u remembers, of what lasts of it: of the first level all, of others little."""
    levels = Levels(GROUPS)
    mixture = Mixture([1.0, 2.0, 3.0, 1.0, 2.0], "eg", levels=levels)
    squares, lasting, shares = [0.0] * 3, [0.0] * 3, []
    before_S = torch.zeros(5, dtype=torch.float64)
    lasts_S = torch.tensor([9.0, 9.0, 9.0, -9.0, -9.0]).double()
    for number, g_S in enumerate(noise(40, 5) + lasts_S, 1):
        p_S = mixture.probs_S
        if number == 2 and memory > 1:
            assert mixture.is_slow, "λ starts from its average once, before its first slow step"
        expected_S, shares = p_S.log(), []
        for level, (part_S, old_S) in enumerate(
            zip(levels.parts(g_S, p_S), levels.parts(before_S, p_S), strict=True)
        ):
            squares[level] = 0.99 * squares[level] + 0.01 * float((p_S * part_S**2).sum())
            lasting[level] = 0.99 * lasting[level] + 0.01 * float((p_S * part_S * old_S).sum())
            size = (squares[level] / (1 - 0.99**number)) ** 0.5
            rate = 0.05
            if memory > 1:
                shares.append(max(1 / memory, min(1.0, lasting[level] / squares[level])))
                rate *= 0.5 / (memory + 9) / shares[-1] ** 0.5
            expected_S = expected_S - rate * part_S / size
        before_S = before_S + (g_S - before_S) / min(10, number)
        mixture.step(g_S, 0.05, memory)
        torch.testing.assert_close(mixture.probs_S, expected_S.softmax(0), rtol=1e-9, atol=0)
    assert memory == 1 or (shares[0] > 0.8 and shares[2] == 1 / memory), shares


def test_groups_are_found_long_before_their_sources_are() -> None:
    """576 sources of 24 topics in batches of 64: flat, topic 0 has a seventh after 50 steps."""
    shares = {}
    for name, levels in (("flat", None), ("grouped", Levels([(np.arange(576) % 24).tolist()]))):
        mixture, _, topic_S = rarely_seen(576, 64, 60, levels)
        shares[name] = np.bincount(topic_S, mixture.probs_S.numpy())
    assert shares["grouped"].argmax() == 0 and shares["grouped"][0] > 0.7
    assert shares["flat"][0] < 0.3


@pytest.mark.parametrize("cut", [1, 17])
def test_resume_is_exact(cut: int) -> None:
    path, levels = noise(40, 5), Levels(GROUPS)
    whole, resumed = (Mixture([1.0] * 5, "eg", levels=levels) for _ in range(2))
    for number, g_S in enumerate(path):
        if number == cut:
            resumed.load_state_dict(whole.state_dict())
        whole.step(g_S, 0.05, memory=2.5)
        if number >= cut:
            resumed.step(g_S, 0.05, memory=2.5)
    assert torch.equal(whole.probs_S, resumed.probs_S)


def test_sums_of_the_trajectory_are_those_of_groups() -> None:
    blocks_BS = noise(4, 5)
    sums_BG = Levels(GROUPS).sums(blocks_BS, 1)
    torch.testing.assert_close(sums_BG[:, 0], blocks_BS[:, 0] + blocks_BS[:, 1])
    torch.testing.assert_close(sums_BG[:, 1], blocks_BS[:, 2])
    assert sums_BG.shape == (4, 3)
