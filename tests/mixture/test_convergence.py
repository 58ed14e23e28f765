"""When a trajectory is called converged, and what is said where it is not."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_scalebio.mixture.confidence import (
    MIN_TAIL_STEPS,
    RESOLUTION,
    Verdict,
    judge_convergence,
    weight_intervals,
)
from tests.mixture.paths import half_width, mixture_path, path_of, still_noise, wave


def test_tight_and_still_is_converged() -> None:
    verdict = judge_convergence(mixture_path(0.02))
    assert verdict.converged and "drift included" in verdict.reason


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
    asked = int(verdict.reason.split()[-5])
    assert asked == pytest.approx(2 * 0.25 * (1.96 / 0.05) ** 2, abs=1)
    assert judge_convergence(path, validation_examples=asked).converged


@pytest.mark.parametrize(("sources", "converged"), [(20, True), (40, False)])
def test_with_many_sources_the_tolerance_is_an_equal_weight(sources: int, converged: bool) -> None:
    wandering = 0.04 / half_width(wave(1.0) + wave(1.0))
    columns = [[1 / sources + wandering * x for x in wave(1.0) + wave(1.0)]] * sources
    assert judge_convergence(path_of(*columns)).converged == converged


def test_the_widest_interval_must_be_within_the_tolerance() -> None:
    shape = [wave(1.0) + wave(1.0), wave(2.0) + wave(2.0), wave(0.5) + wave(0.5)]
    columns = [[0.3 + 0.01 * x for x in column] for column in shape]
    for confidence in (0.80, 0.95, 0.98):
        widest = math.hypot(half_width(columns[1], confidence), RESOLUTION)
        options = {"names": ["web", "code", "math"], "confidence": confidence}
        said = judge_convergence(path_of(*columns), tolerance=1.001 * widest, **options)
        assert said.converged
        assert said.reason == (
            f"every weight is known to ±{widest:.3f} or better ({confidence:.0%} confidence, "
            f"tolerance ±{1.001 * widest:g}), drift included"
        )
        said = judge_convergence(path_of(*columns), tolerance=0.999 * widest, **options)
        assert not said.converged
        assert said.reason == (
            f"the weight of code is known to ±{widest:.3f} only, the tolerance is "
            f"±{0.999 * widest:g}: it wanders from step to step, more steps or larger batches "
            "would narrow it"
        )
    exactly = float(weight_intervals(path_of(*columns)).half_width_S[1])
    assert judge_convergence(path_of(*columns), tolerance=exactly).converged
    said = judge_convergence(path_of(*columns), tolerance=0.001)
    assert "the weight of source 1 is known" in said.reason
    assert judge_convergence(path_of(*columns), tolerance=0.05).converged
    at_most = math.sqrt(0.05**2 - RESOLUTION**2) / half_width(columns[1])
    wider = path_of(*([at_most * 1.01 * x for x in c] for c in columns))
    assert not judge_convergence(wider).converged, "0.05 at 95 % unless told otherwise"
    narrower = path_of(*([at_most * 0.99 * x for x in c] for c in columns))
    assert judge_convergence(narrower).converged


@pytest.mark.parametrize("sources", [2, 40])
def test_more_steps_are_not_asked_for_what_they_can_not_tell(sources: int) -> None:
    """Below 0.01, whatever else is in the way; with many sources both shrink alike."""
    path = path_of(*([x / sources for x in wave(0.5) * 2] for _ in range(sources)))
    for tolerance, told in ((0.0099, True), (0.01, True), (0.0101, False)):
        said = judge_convergence(path, tolerance=tolerance)
        assert not said.converged
        assert said.reason.endswith("so finely (set a larger tolerance)") == told


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


def test_the_verdict_asks_for_as_many_examples_as_the_measured_draw_wants() -> None:
    path = mixture_path(0.02)
    path = torch.cat([path[:, :1], 0.6 * path[:, 1:], 0.4 * path[:, 1:]], 1)
    assert judge_convergence(path, validation_examples=10**5).converged
    apart = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, -1.0], [0.0, -1.0, 1.0]]).double()
    said = judge_convergence(path, validation_examples=10**5, draw_SS=0.01 * apart)
    # 2 · 10⁵ · (1.96 · 0.1 / 0.05)² = 3.07 million
    assert (
        not said.converged
        and "too small to tell; 3,073,167 examples would be enough" in said.reason
    )
    alike = judge_convergence(path, validation_examples=10**5, lookalikes=[[1, 2]], draw_SS=apart)
    assert alike.converged, alike
    of_sum = torch.tensor([[1.0, -0.5, -0.5], [-0.5, 0.25, 0.25], [-0.5, 0.25, 0.25]]).double()
    said = judge_convergence(
        path, validation_examples=10**5, lookalikes=[[1, 2]], draw_SS=0.01 * of_sum
    )
    assert not said.converged and "3,073,167 examples" in said.reason


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
