"""Block trajectory, random-scaling intervals and the convergence verdict."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_scalebio.core.confidence import (
    CRITICAL_VALUES,
    MIN_TAIL_STEPS,
    TrajectoryBlocks,
    Verdict,
    drift_left,
    judge_convergence,
    random_scaling_half_width,
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
    coverage = float((path.mean(0).abs() <= half_width).double().mean())
    # two to three standard errors of 2000 trials, and the bias of a finite path: at 600 steps and
    # memory 0.9 (60 relaxation times) the intervals cover 0.77 where 0.80 is asked
    assert coverage == pytest.approx(confidence, abs=0.025)


def test_blocks_cover_like_steps() -> None:
    path = ar1_paths(2000, 2048, 0.9, seed=1)
    blocks = path.view(256, 8, -1).mean(1)
    coverage = (blocks.mean(0).abs() <= random_scaling_half_width(blocks)).double().mean()
    assert float(coverage) == pytest.approx(0.95, abs=0.025)


# Abadir and Paruolo 1997, table II.
PUBLISHED = {0.80: 3.875, 0.90: 5.323, 0.95: 6.747, 0.98: 8.613}


def half_width(path: list[float], confidence: float = 0.95) -> float:
    """c · sqrt(V / n), V = (1/n²) Σ_r (Σ_{k≤r} (x_k − x̄))²: the formula written as a loop."""
    n, mean = len(path), sum(path) / len(path)
    v = sum(sum(x - mean for x in path[:r]) ** 2 for r in range(1, n + 1)) / n**2
    return PUBLISHED[confidence] * (v / n) ** 0.5


def left(path: list[float]) -> float:
    """Of an error b / t: its mean from T/2 to T, from how it differs between the halves of that."""
    half = len(path) // 2
    apart = sum(path[half:]) / (len(path) - half) - sum(path[:half]) / half
    return abs(apart) * (2 * math.log(2)) / (4 * math.log(1.5) - 4 * math.log(4 / 3))


def test_half_widths_equal_the_formula() -> None:
    x = torch.randn(37, 3, generator=torch.Generator().manual_seed(2)) * torch.tensor([1, 9, 0.2])
    for confidence in PUBLISHED:
        want = [half_width(column, confidence) for column in x.double().T.tolist()]
        got = random_scaling_half_width(x, confidence)
        assert got.tolist() == pytest.approx(want, rel=1e-12)
    assert torch.equal(random_scaling_half_width(x), random_scaling_half_width(x, 0.95))
    two = random_scaling_half_width(torch.tensor([[0.2], [0.6]], dtype=torch.float64))
    assert float(two) == pytest.approx(6.747 * 0.2 / 8**0.5)
    assert sorted(PUBLISHED) == sorted(CRITICAL_VALUES)


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 63, 64, 100, 1000])
def test_merged_blocks_are_means_of_their_steps(steps: int) -> None:
    generator = torch.Generator().manual_seed(6)
    trajectory = torch.rand(steps, 3, dtype=torch.float64, generator=generator).softmax(-1)
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


def test_tail_of_merged_blocks_is_the_blocks_that_lie_wholly_in_it() -> None:
    trajectory = torch.rand(
        1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    blocks = filled(trajectory, capacity=8)
    assert (blocks.num_blocks, blocks.block_length, blocks.steps) == (7, 128, 1000)
    means = [trajectory[128 * k : 128 * (k + 1)].mean(0) for k in range(7)]
    for fraction, kept in ((0.5, 3), (0.43, 3), (0.42, 2), (1.0, 7), (1 / 7, 1), (0.01, 1)):
        torch.testing.assert_close(blocks.tail(fraction), torch.stack(means[7 - kept :]))
    assert torch.equal(blocks.tail(), blocks.tail(0.5))
    # 0.29 · 100 is 28.999999999999996.
    assert len(filled(trajectory[:100]).tail(0.29)) == 29
    for fraction in (-0.1, 0.0, 1.001):
        with pytest.raises(ValueError, match="fraction"):
            blocks.tail(fraction)


def test_blocks_hold_single_steps_until_there_are_512() -> None:
    blocks = TrajectoryBlocks(2)
    for probs_S in torch.rand(511, 2):
        blocks.append(probs_S)
    assert (blocks.num_blocks, blocks.block_length) == (511, 1)
    blocks.append(torch.rand(2, requires_grad=True))
    assert (blocks.num_blocks, blocks.block_length) == (256, 2)
    assert not blocks.tail().requires_grad


@pytest.mark.parametrize(("sources", "capacity"), [(0, 8), (2, 0), (2, 1), (2, 3), (2, 9)])
def test_blocks_need_a_source_and_pairs(sources: int, capacity: int) -> None:
    TrajectoryBlocks(1, 2)
    with pytest.raises(ValueError, match="even"):
        TrajectoryBlocks(sources, capacity)


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
    trajectory = torch.rand(21, 2, dtype=torch.float64)
    blocks = filled(trajectory, capacity=4)
    assert blocks.block_length == 8
    state = blocks.state_dict()
    loaded = TrajectoryBlocks(2, capacity=4)
    loaded.load_state_dict(state)
    for _ in range(20):
        blocks.append(torch.rand(2))
        loaded.append(torch.rand(2))
    assert (state["num_blocks"], state["block_length"], state["open_steps"]) == (2, 8, 5)
    sums = trajectory[:16].view(2, 8, 2).sum(1)
    torch.testing.assert_close(state["block_sums"], torch.cat([sums, torch.zeros_like(sums)]))
    torch.testing.assert_close(state["open_sum"], trajectory[16:].sum(0))
    for other in (TrajectoryBlocks(3, capacity=4), TrajectoryBlocks(2, capacity=8)):
        with pytest.raises(ValueError, match="sources"):
            other.load_state_dict(state)


def test_intervals_are_shares_and_reach_zero_below_the_resolution() -> None:
    probs = torch.tensor([0.897, 0.1, 0.003], dtype=torch.float64)
    noise = 0.001 * ar1_paths(3, 200, 0.5, seed=3)
    intervals = weight_intervals(probs + noise - noise.mean(0))
    torch.testing.assert_close(intervals.weight_S, probs)
    assert torch.all(intervals.low_S >= 0) and torch.all(intervals.high_S <= 1)
    assert float(intervals.low_S[1]) > 0.09 and float(intervals.low_S[2]) == 0.0
    wide = weight_intervals(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert wide.low_S.tolist() == [0.0, 0.0] and wide.high_S.tolist() == [1.0, 1.0]


def test_intervals_are_the_weights_and_half_widths_cut_to_shares() -> None:
    columns = [[0.01, 0.02, 0.05, 0.08], [0.9, 0.93, 0.97, 1.0], [0.5, 0.52, 0.48, 0.49]]
    got = weight_intervals(torch.tensor(columns, dtype=torch.float64).T, 0.90)
    assert got.confidence == 0.90
    for i, column in enumerate(columns):
        weight, half = sum(column) / 4, math.hypot(half_width(column, 0.90), left(column))
        assert float(got.wandering_S[i]) == pytest.approx(half_width(column, 0.90))
        assert float(got.drift_S[i]) == pytest.approx(left(column))
        assert float(got.sampling_S[i]) == 0.0
        assert float(got.weight_S[i]) == pytest.approx(weight)
        assert float(got.half_width_S[i]) == pytest.approx(half)
        assert float(got.low_S[i]) == pytest.approx(max(weight - half, 0.0))
        assert float(got.high_S[i]) == pytest.approx(min(weight + half, 1.0))
    assert float(got.low_S[0]) == 0.0 and float(got.high_S[1]) == 1.0
    still = weight_intervals(torch.tensor([[0.01, 0.0099], [0.01, 0.0099]], dtype=torch.float64))
    assert still.low_S.tolist() == [0.01, 0.0], "below 0.01 a weight can't be told from none"
    assert still.high_S.tolist() == [0.01, 0.0099]
    whole = weight_intervals(torch.tensor([[0.0099, 0.9901], [0.0099, 0.9901]]))
    assert whole.high_S.tolist() == [pytest.approx(0.0099), 1.0], "nor above 0.99 from all there is"
    assert weight_intervals(torch.tensor([[0.02, 0.98]] * 2).double()).high_S[1] < 1


def test_one_block_knows_nothing() -> None:
    intervals = weight_intervals(torch.tensor([[0.25, 0.75]]))
    assert intervals.low_S.tolist() == [0.0, 0.0] and intervals.high_S.tolist() == [1.0, 1.0]


def test_the_validation_sets_own_draw_widens_them() -> None:
    """Of 300 examples from .5/.3/.2 the sets' own shares have these standard errors."""
    torch.manual_seed(0)  # draws of one seed in seventy cover less
    weights = [0.5, 0.3, 0.2]
    draws = torch.distributions.Multinomial(300, torch.tensor(weights)).sample((4000,)) / 300
    got = weight_intervals(torch.tensor([weights] * 2), 0.95, 300)
    assert got.half_width_S.tolist() == got.sampling_S.tolist()
    covered = ((draws - torch.tensor(weights)).abs() <= got.sampling_S).double().mean(0)
    assert covered.tolist() == pytest.approx([0.95] * 3, abs=0.015)
    narrow = weight_intervals(torch.tensor([weights] * 2), 0.80, 1200)
    assert (narrow.sampling_S / got.sampling_S).tolist() == pytest.approx(
        [1.2816 / 1.96 / 2] * 3, rel=1e-4
    )


def test_a_measured_draw_counts_where_it_is_larger() -> None:
    """Its covariance goes into sums, of near-duplicates and of what is judged, as a whole."""
    blocks_BS = torch.tensor([[0.5, 0.3, 0.2]] * 2).double()
    spread = torch.tensor([[4.0, -3.0, -1.0], [-3.0, 4.0, -1.0], [-1.0, -1.0, 2.0]]).double()
    draw_SS = 2.5e-3 * spread
    got = weight_intervals(blocks_BS, 0.95, 300, draw_SS=draw_SS)
    assert got.sampling_S.tolist() == pytest.approx([0.196] * 2 + [0.098 * 2**0.5], 1e-4)
    counted = weight_intervals(blocks_BS, 0.95, 300)
    smaller = weight_intervals(blocks_BS, 0.95, 300, draw_SS=1e-4 * draw_SS)
    assert torch.equal(smaller.sampling_S, counted.sampling_S)
    # Errors of the first two cancel in their sum.
    summed = weight_intervals(blocks_BS, 0.95, 300, [[0, 1]], draw_SS)
    assert summed.high_S[:2].tolist() == pytest.approx([0.8 + 0.098 * 2**0.5] * 2, 1e-4)
    rounded = weight_intervals(blocks_BS, draw_SS=torch.full((3, 3), -1e-20).double())
    assert rounded.half_width_S.tolist() == [0.0] * 3


def test_the_verdict_asks_for_as_many_examples_as_the_measured_draw_wants() -> None:
    path = mixture_path(0.02)
    path = torch.cat([path[:, :1], 0.6 * path[:, 1:], 0.4 * path[:, 1:]], 1)
    assert judge_convergence(path, validation_examples=10**5).converged
    apart = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, -1.0], [0.0, -1.0, 1.0]]).double()
    said = judge_convergence(path, validation_examples=10**5, draw_SS=0.01 * apart)
    # 2 · 10⁵ · (1.96 · 0.1 / 0.05)² = 3.07 million
    assert not said.converged and "too small to tell, 3073167 examples would do" in said.reason
    alike = judge_convergence(path, validation_examples=10**5, lookalikes=[[1, 2]], draw_SS=apart)
    assert alike.converged, alike
    of_sum = torch.tensor([[1.0, -0.5, -0.5], [-0.5, 0.25, 0.25], [-0.5, 0.25, 0.25]]).double()
    said = judge_convergence(
        path, validation_examples=10**5, lookalikes=[[1, 2]], draw_SS=0.01 * of_sum
    )
    assert not said.converged and "3073167 examples" in said.reason


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_what_is_left_of_a_drift_is_seen_from_its_course(power: float) -> None:
    """A weight that nears its end like 1 / t is off by what is said; one that hurries, by less."""
    steps = torch.arange(1000, 2000, dtype=torch.float64)
    path = 0.3 + 100 * 1000 ** (power - 1) / steps**power
    intervals = weight_intervals(torch.stack([path, 1 - path], 1))
    off = float(path.mean()) - 0.3
    said = float(intervals.drift_S[0])
    assert off == pytest.approx(said, rel=1e-3) if power == 1.0 else 0.6 * said < off < said


def test_of_an_odd_number_of_blocks_the_middle_one_counts_as_late() -> None:
    column = [0.1, 0.2, 0.6, 0.3, 0.2]
    assert float(weight_intervals(path_of(column)).drift_S[0]) == pytest.approx(left(column))


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
    assert verdict.converged and "with what it still drifts" in verdict.reason


def test_wide_intervals_are_not_converged() -> None:
    verdict = judge_convergence(mixture_path(0.2), ["web", "code"])
    assert not verdict.converged and "tolerance" in verdict.reason
    assert "web" in verdict.reason or "code" in verdict.reason


def test_drift_is_not_converged() -> None:
    path = mixture_path(0.001, drift=0.04)
    verdict = judge_convergence(path, ["web", "code"])
    apart = float(path[200:, 0].mean() - path[:200, 0].mean())
    assert not verdict.converged and f"still drifting, by {apart:.3f} between" in verdict.reason
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


def test_a_small_validation_set_is_not_converged() -> None:
    path = mixture_path(0.002)
    verdict = judge_convergence(path, ["web", "code"], validation_examples=300)
    assert not verdict.converged and "validation set is too small" in verdict.reason
    asked = int(verdict.reason.split()[-4])
    assert asked == pytest.approx(2 * 0.25 * (1.96 / 0.05) ** 2, abs=1)
    assert judge_convergence(path, validation_examples=asked).converged


@pytest.mark.parametrize(("sources", "converged"), [(20, True), (40, False)])
def test_with_many_sources_the_tolerance_is_an_equal_weight(sources: int, converged: bool) -> None:
    wandering = 0.04 / half_width(wave(1.0) + wave(1.0))
    columns = [[1 / sources + wandering * x for x in wave(1.0) + wave(1.0)]] * sources
    assert judge_convergence(path_of(*columns)).converged == converged


def path_of(*columns: list[float]) -> torch.Tensor:
    return torch.tensor(columns, dtype=torch.float64).T


def wave(size: float, steps: int = 100) -> list[float]:
    return [size * math.sin(2 * math.pi * (k + 0.5) / steps) for k in range(steps)]


def test_the_widest_interval_must_be_within_the_tolerance() -> None:
    shape = [wave(1.0) + wave(1.0), wave(2.0) + wave(2.0), wave(0.5) + wave(0.5)]
    columns = [[0.3 + 0.01 * x for x in column] for column in shape]
    for confidence in (0.80, 0.95, 0.98):
        widest = half_width(columns[1], confidence)
        options = {"names": ["web", "code", "math"], "confidence": confidence}
        said = judge_convergence(path_of(*columns), tolerance=1.001 * widest, **options)
        assert said.converged
        assert said.reason == (
            f"every weight is known to ±{widest:.3f} or better ({confidence:.0%} confidence, "
            f"tolerance ±{1.001 * widest:g}), with what it still drifts"
        )
        said = judge_convergence(path_of(*columns), tolerance=0.999 * widest, **options)
        assert not said.converged
        assert said.reason == (
            f"the weight of code is known to ±{widest:.3f} only, the tolerance is "
            f"±{0.999 * widest:g}: it wanders from step to step, more steps or larger batches "
            "would narrow it"
        )
    exactly = float(random_scaling_half_width(path_of(*columns))[1])
    assert judge_convergence(path_of(*columns), tolerance=exactly).converged
    said = judge_convergence(path_of(*columns), tolerance=0.001)
    assert "the weight of source 1 is known" in said.reason
    assert judge_convergence(path_of(*columns), tolerance=0.05).converged
    wider = path_of(*([0.05 / half_width(columns[1]) * 1.01 * x for x in c] for c in columns))
    assert not judge_convergence(wider).converged, "0.05 at 95 % unless told otherwise"
    narrower = path_of(*([0.05 / half_width(columns[1]) * 0.99 * x for x in c] for c in columns))
    assert judge_convergence(narrower).converged


def test_two_hundred_steps_are_the_least() -> None:
    columns = [[0.3 + x for x in wave(0.001) + wave(0.001)], [0.7 - x for x in wave(0.001) * 2]]
    assert judge_convergence(path_of(*columns)).converged
    said = judge_convergence(path_of(*columns)[1:])
    assert said == Verdict(False, "only 199 steps are averaged, at least 200 are needed")
    said = judge_convergence(path_of(*columns)[:66], block_length=3)
    assert said.reason == "only 198 steps are averaged, at least 200 are needed"
    assert judge_convergence(path_of(*columns)[:1]).reason.startswith("only 1 step is averaged,")


def test_one_source_need_not_move() -> None:
    assert judge_convergence(torch.ones(200, 1)).converged
    assert not judge_convergence(torch.full((200, 2), 0.5)).converged
    one_of_two = path_of([0.3 + x for x in wave(0.001) * 2], [0.5] * 200)
    assert judge_convergence(one_of_two).converged
    decayed = judge_convergence(one_of_two, constant_rate=False)
    assert not decayed.converged and "decays" in decayed.reason


def still_noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_intervals_are_in_double_whatever_the_blocks_are() -> None:
    blocks_BS = mixture_path(0.01)[:8].float()
    found = weight_intervals(blocks_BS)
    parts = (found.weight_S, found.low_S, found.high_S, found.wandering_S, found.drift_S)
    assert {part.dtype for part in parts} == {torch.float64}
    assert random_scaling_half_width(blocks_BS[:1]).dtype == torch.float64
    exact = random_scaling_half_width(blocks_BS.double())
    assert torch.equal(random_scaling_half_width(blocks_BS), exact)


def test_one_block_does_not_drift() -> None:
    drift_S = drift_left(torch.tensor([[0.4, 0.6]]))
    assert drift_S.tolist() == [0.0, 0.0] and drift_S.dtype == torch.float64


def test_a_weight_a_bit_above_one_by_rounding_has_a_draw_of_nothing() -> None:
    above = torch.tensor([[1.0 + 2**-52]], dtype=torch.float64)
    assert weight_intervals(above.repeat(4, 1), validation_examples=10).sampling_S.tolist() == [0.0]


@pytest.mark.parametrize(("weight", "high"), [(0.99, 0.99), (0.995, 1.0)])
def test_what_is_nearer_to_one_than_can_be_resolved_reaches_it(weight: float, high: float) -> None:
    blocks_BS = torch.tensor([[weight]] * 4, dtype=torch.float64)
    assert weight_intervals(blocks_BS).high_S.tolist() == [high]


def test_a_source_that_stands_still_beside_others_is_no_mixture_that_does() -> None:
    blocks_BS = torch.tensor([0.5, 0.3, 0.2]).double().repeat(256, 1)
    blocks_BS[:, 1:] += 1e-3 * still_noise(256, 1) * torch.tensor([1, -1])
    assert judge_convergence(blocks_BS).converged


@pytest.mark.parametrize(("sources", "tolerance"), [(20, 0.05), (21, 0.05 * 20 / 21)])
def test_the_tolerance_of_many_sources_is_in_proportion(sources: int, tolerance: float) -> None:
    blocks_BS = 1 / sources + 0.1 * still_noise(256, sources)
    assert f"the tolerance is ±{tolerance:g}:" in judge_convergence(blocks_BS).reason


def test_the_largest_part_of_an_interval_is_what_is_named() -> None:
    """The draw of the validation set is larger than the drift, and wandering larger than both."""
    draw = still_noise(256, 2)
    blocks_BS = 0.5 + 0.5 * (draw - draw.mean(1, keepdim=True))
    found = weight_intervals(blocks_BS, validation_examples=400)
    drift, sampling, wandering = (
        float(part[0]) for part in (found.drift_S, found.sampling_S, found.wandering_S)
    )
    assert drift < sampling < wandering, "as this test needs it"
    said = judge_convergence(blocks_BS, validation_examples=400)
    assert "wanders from step to step" in said.reason


def test_a_trajectory_begins_without_steps() -> None:
    path = TrajectoryBlocks(2)
    assert path.steps == 0 and path.state_dict()["open_steps"] == 0
