"""Block trajectory, random-scaling intervals and the convergence verdict."""

from __future__ import annotations

import pytest
import torch

from megatron_scalebio.bilevel.confidence import (
    CRITICAL_VALUES,
    MIN_TAIL_STEPS,
    TrajectoryBlocks,
    judge_convergence,
    random_scaling_half_width,
    tail_average,
    weight_intervals,
)


def ar1_paths(num_paths: int, steps: int, memory: float, *, seed: int) -> torch.Tensor:
    """Stationary AR(1) noise of unit marginal variance, shape ``[steps, num_paths]``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, num_paths, generator=generator, dtype=torch.float64)
    path = torch.empty_like(noise)
    path[0] = noise[0]
    for t in range(1, steps):
        path[t] = memory * path[t - 1] + (1 - memory**2) ** 0.5 * noise[t]
    return path


def filled(trajectory_TS: torch.Tensor, capacity: int = 512) -> TrajectoryBlocks:
    blocks = TrajectoryBlocks(trajectory_TS.shape[1], capacity)
    for probs_S in trajectory_TS:
        blocks.append(probs_S)
    return blocks


@pytest.mark.parametrize("confidence", sorted(CRITICAL_VALUES))
@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_intervals_cover_the_mean_of_correlated_noise(memory: float, confidence: float) -> None:
    path = ar1_paths(2000, 1500, memory, seed=0)
    half_width = random_scaling_half_width(path, confidence)
    coverage = float((tail_average(path).abs() <= half_width).double().mean())
    # two to three standard errors of 2000 trials, and the bias of a finite path: at 600 steps and
    # memory 0.9 (60 relaxation times) the intervals cover 0.77 where 0.80 is asked
    assert coverage == pytest.approx(confidence, abs=0.025)


def test_blocks_cover_like_steps() -> None:
    path = ar1_paths(2000, 2048, 0.9, seed=1)
    blocks = path.view(256, 8, -1).mean(1)
    coverage = (tail_average(blocks).abs() <= random_scaling_half_width(blocks)).double().mean()
    assert float(coverage) == pytest.approx(0.95, abs=0.025)


def test_half_width_equals_the_formula_written_as_a_loop() -> None:
    x = torch.randn(37, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    n, mean = len(x), float(x.mean())
    v = sum(float((x[:r] - mean).sum()) ** 2 for r in range(1, n + 1)) / n**2
    assert float(random_scaling_half_width(x)) == pytest.approx(6.747 * (v / n) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 63, 64, 100, 1000])
def test_merged_blocks_are_means_of_their_steps(steps: int) -> None:
    trajectory = torch.rand(steps, 3, dtype=torch.float64).softmax(-1)
    blocks = filled(trajectory, capacity=8)
    assert blocks.steps == steps
    assert blocks.num_blocks < blocks.capacity
    length = blocks.block_length
    expected = trajectory[: blocks.num_blocks * length].view(-1, length, 3).mean(1)
    torch.testing.assert_close(blocks.tail(1.0), expected, rtol=1e-14, atol=0)


def test_tail_is_the_end_of_the_run() -> None:
    trajectory = torch.arange(100.0)[:, None]
    assert torch.equal(filled(trajectory).tail(0.5), trajectory[50:].double())
    assert torch.equal(filled(trajectory).tail(0.001), trajectory[-1:].double())
    assert len(TrajectoryBlocks(2).tail()) == 0
    with pytest.raises(ValueError, match="fraction"):
        filled(trajectory).tail(0.0)


@pytest.mark.parametrize("cut", [0, 1, 8, 13, 200])
def test_resumed_trajectory_is_identical(cut: int) -> None:
    trajectory = torch.rand(203, 4).softmax(-1)
    resumed = TrajectoryBlocks(4, capacity=8)
    resumed.load_state_dict(filled(trajectory[:cut], capacity=8).state_dict())
    for probs_S in trajectory[cut:]:
        resumed.append(probs_S)
    expected = filled(trajectory, capacity=8).state_dict()
    for key, value in resumed.state_dict().items():
        same = torch.equal(value, expected[key]) if torch.is_tensor(value) else None
        assert same if same is not None else value == expected[key], key


def test_state_is_a_copy_and_of_these_sources() -> None:
    blocks = filled(torch.rand(5, 2))
    state = blocks.state_dict()
    blocks.append(torch.rand(2))
    assert state["num_blocks"] == 5 and float(state["block_sums"][5].sum()) == 0.0
    with pytest.raises(ValueError, match="sources"):
        TrajectoryBlocks(3).load_state_dict(state)


def test_intervals_are_shares_and_reach_zero_below_the_resolution() -> None:
    probs = torch.tensor([0.897, 0.1, 0.003], dtype=torch.float64)
    noise = 0.001 * ar1_paths(3, 200, 0.5, seed=3)
    intervals = weight_intervals(probs + noise - noise.mean(0))
    torch.testing.assert_close(intervals.weight_S, probs)
    assert torch.all(intervals.low_S >= 0) and torch.all(intervals.high_S <= 1)
    assert float(intervals.low_S[1]) > 0.09 and float(intervals.low_S[2]) == 0.0
    wide = weight_intervals(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert wide.low_S.tolist() == [0.0, 0.0] and wide.high_S.tolist() == [1.0, 1.0]


def test_one_block_knows_nothing() -> None:
    intervals = weight_intervals(torch.tensor([[0.25, 0.75]]))
    assert intervals.low_S.tolist() == [0.0, 0.0] and intervals.high_S.tolist() == [1.0, 1.0]


def test_untabulated_confidence_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence"):
        weight_intervals(torch.rand(10, 2), confidence=0.93)


def mixture_path(noise_scale: float, drift: float = 0.0, steps: int = 400) -> torch.Tensor:
    """Two weights around one half, with AR(1) noise and a linear drift over the whole path."""
    first = 0.5 + noise_scale * ar1_paths(1, steps, 0.8, seed=4)[:, 0]
    first = first + drift * torch.linspace(-0.5, 0.5, steps, dtype=torch.float64)
    return torch.stack([first, 1 - first], dim=1)


def test_tight_and_still_is_converged() -> None:
    verdict = judge_convergence(mixture_path(0.02))
    assert verdict.converged and "none drifts" in verdict.reason


def test_wide_intervals_are_not_converged() -> None:
    verdict = judge_convergence(mixture_path(0.2), ["web", "code"])
    assert not verdict.converged and "tolerance" in verdict.reason
    assert "web" in verdict.reason or "code" in verdict.reason


def test_drift_is_not_converged() -> None:
    verdict = judge_convergence(mixture_path(0.001, drift=0.07), ["web", "code"])
    assert not verdict.converged and "drifting" in verdict.reason
    assert not judge_convergence(mixture_path(0.001, drift=0.3)).converged


def test_short_and_decayed_runs_are_not_converged() -> None:
    still = mixture_path(0.001)[: MIN_TAIL_STEPS - 1]
    assert "averaged" in judge_convergence(still).reason
    assert not judge_convergence(still).converged
    assert judge_convergence(still, block_length=2).converged  # blocks of two steps are enough
    frozen = judge_convergence(torch.full((400, 2), 0.5))
    assert not frozen.converged and "no weight has moved" in frozen.reason
    decayed = judge_convergence(torch.full((400, 2), 0.5), constant_rate=False)
    assert not decayed.converged and "decays" in decayed.reason
