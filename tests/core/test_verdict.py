"""What a run's verdict goes by: each option of its configuration turns it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_scalebio.config_loader import load_config
from megatron_scalebio.core.options import LisaOptions
from megatron_scalebio.core.scalebio import ScaleBiO
from megatron_scalebio.engine.loop import _refuse_skips
from megatron_scalebio.errors import UserError
from megatron_scalebio.methods.end_check import EndCheck
from megatron_scalebio.methods.groups import described, levels_of
from megatron_scalebio.methods.scalebio import TrainState, verdict
from megatron_scalebio.mixture.confidence import weight_intervals
from megatron_scalebio.mixture.constraints import Constraints
from megatron_scalebio.mixture.mixture import Mixture

STEPS = 1200  # the trajectory is then kept in blocks of four steps


def run(options: dict, travelling: int = 0) -> SimpleNamespace:
    """A mixture that wanders a little around (.5 .3 .2), after so many steps on its way there."""
    mixture = Mixture([1.0, 1.0, 1.0], "eg")
    noise = np.random.default_rng(3).normal(0.0, 0.03, size=(STEPS, 3))
    noise[:travelling] += np.linspace(1, 0, travelling)[:, None] * [0.3, -0.3, 0.0]
    for row in np.array([0.5, 0.3, 0.2]) + noise - noise.mean(1, keepdims=True):
        mixture.trajectory.append(torch.tensor(row))
    config, bio = load_config(None, {"bilevel": options}), ScaleBiO.__new__(ScaleBiO)
    bio.options, bio.mixture = config.bilevel.options("sample"), mixture
    bio.sources = ["code", "math", "web"]
    bio.steps, bio.lisa = STEPS, None
    bio._resync_interval = config.bilevel.resync_interval
    bio._memory_growth = config.bilevel.memory_growth
    bio.mixture.logits_S = torch.tensor([0.5, 0.495, 0.005]).log()
    return SimpleNamespace(
        config=config, training=bio, data=data_of(), validation_examples=10**6,
        check=None, draw_SS=None, lookalikes=None, kept_S=None,
    )  # fmt: skip


def data_of(drawn: tuple[int, ...] = (0, 0, 0), drawn_valid: int = 0) -> Any:
    sources = [SimpleNamespace(name=name) for name in ("code", "math", "web")]
    return SimpleNamespace(
        sources=sources, validation=[SimpleNamespace(name="valid")],
        sampler=SimpleNamespace(drawn_S=np.array(drawn), sizes_S=np.array([100] * 3)),
        validation_sampler=SimpleNamespace(
            drawn_S=np.array([drawn_valid]), sizes_S=np.array([100])
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "converged", "words"),
    [
        ({}, True, "(95% confidence, tolerance ±0.05)"),
        ({"confidence": 0.8, "tolerance": 0.04}, True, "(80% confidence, tolerance ±0.04)"),
        ({"tolerance": 0.001}, False, "only, the tolerance is ±0.001"),
        ({"average_fraction": 0.2}, True, "drift included"),  # 240 steps in 60 blocks
        (
            {"average_fraction": 0.1},
            False,
            "at least 200 are needed (set train_iters to 2000 or more)",
        ),
        ({"lr_lambda_decay_style": "linear"}, False, "learning rate decays"),
        ({"lr_lambda_decay_style": "cosine"}, False, "learning rate decays"),
    ],
)
def test_verdict_goes_by_the_configuration(options: dict, converged: bool, words: str) -> None:
    said = verdict(run(options))
    assert said.converged == converged and words in said.reason, said


def test_a_rate_is_taken_for_constant_unless_it_is_said_to_decay() -> None:
    bio = run({}).training
    assert bio.verdict().converged and not bio.verdict(constant_rate=False).converged


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ""),  # grows from step 400 on
        ({"resync_interval": 15}, ""),  # from 600
        ({"resync_interval": 16}, "(set train_iters to 1280 or more)"),
        ({"resync_interval": 16, "memory_growth": 0.0}, ""),
        ({"resync_interval": None}, ""),
        ({"average_fraction": 0.7}, "(set train_iters to 1334 or more)"),
        ({"average_fraction": 1.0}, "before u's memory grows, at step 400"),
    ],
)
def test_steps_before_memory_grows_show_no_convergence(options: dict, words: str) -> None:
    state = run(options)
    said = verdict(state)
    assert (words in said.reason and not said.converged) if words else said.converged, said
    state.training.lisa = LisaOptions(2)  # resets u with each draw, to the end
    assert verdict(state).converged


@pytest.mark.parametrize("interval", [15, 16])  # memory grows from step 600 on, or from 640
def test_nor_do_they_of_groups(interval: int) -> None:
    state = run({"resync_interval": interval})
    found = described(state.training, levels_of(["a/code", "a/math", "b"]), True, 1e6, True)
    [level] = found["levels"]
    assert level["converged"] == (interval == 15), level


def test_intervals_take_what_is_known_of_the_validation_set() -> None:
    for confidence, normal in ((0.95, 1.959964), (0.8, 1.281552)):
        bio = run({"confidence": confidence}).training
        alone, of_100 = bio.intervals(), bio.intervals(100)
        tail_BS = bio.mixture.trajectory.tail(0.5)
        assert torch.equal(alone.weight_S, tail_BS.mean(0))
        assert torch.equal(alone.low_S, weight_intervals(tail_BS, confidence).low_S)
        assert not alone.sampling_S.any()
        p_S = alone.weight_S
        wanted = normal * (p_S * (1 - p_S) / 100).sqrt()
        torch.testing.assert_close(of_100.sampling_S, wanted, rtol=1e-6, atol=0)
        drawn = bio.intervals(draw_SS=torch.diag(torch.tensor([0.04, 0.01, 0.0]).double()))
        assert drawn.sampling_S.tolist() == pytest.approx([0.2 * normal, 0.1 * normal, 0.0])


def test_intervals_are_within_bounds_and_wide_where_sources_look_alike() -> None:
    bio = run({}).training
    bio.mixture.lookalike_groups = lambda tail_BS: [[1, 2]]
    alike = bio.intervals()
    assert alike.lookalikes == [[1, 2]] and alike.low_S.tolist()[1:] == [0.0, 0.0]
    bio.mixture.constraints = Constraints([0.5, 0.1, 0.0], [0.5, 1.0, 0.15])
    kept = bio.intervals()
    assert kept.low_S.tolist() == [0.5, 0.1, 0.0] and kept.high_S.tolist()[::2] == [0.5, 0.15]


def test_verdict_names_the_source() -> None:
    state = run({"tolerance": 1e-6})
    blocks_BS = state.training.mixture.trajectory.tail(0.5)
    widest = int(weight_intervals(blocks_BS, 0.95, 10**6).half_width_S.argmax())
    assert f"weight of {state.training.sources[widest]} is known" in verdict(state).reason


def test_near_duplicates_are_judged_by_their_sum_where_another_weight_is_fixed() -> None:
    state = run({})
    mixture = state.training.mixture
    mixture.constraints = Constraints([0.5, 0.0, 0.0], [0.5, 1.0, 1.0])
    mixture.lookalike_groups = lambda tail_BS: [[0, 1, 2]]
    assert "only the sum of math, web is known" in verdict(state).reason
    mixture.constraints = Constraints([0.5, 0.3, 0.0], [0.5, 0.3, 1.0])
    assert "sum" not in verdict(state).reason, "one alone is no sum"


def test_data_that_were_gone_through_too_often_are_named() -> None:
    state = run({})
    for drawn, drawn_valid, culprit in (
        ((1000, 900, 3000), 1000, ""),  # ten times; web has no weight to speak of
        ((1000, 1010, 0), 0, "math has been gone through 10 times"),
        ((0, 0, 0), 1300, "valid has been gone through 13 times"),
    ):
        state.data = data_of(drawn, drawn_valid)
        said = verdict(state)
        assert said.converged == (not culprit) and culprit in said.reason, said


def test_a_small_validation_set_is_named() -> None:
    state = run({})
    state.validation_examples = 100
    assert "validation set is too small" in verdict(state).reason


def test_a_check_after_the_last_step_may_object_where_u_remembers_no_more_than_it() -> None:
    state = run({"memory_growth": 0.0})
    state.draw_SS = torch.eye(3).double()
    assert "validation set is too small" in verdict(state).reason
    state.draw_SS = torch.zeros(3, 3).double()
    for change, converged in ((0.04, True), (0.06, False)):
        change_S = torch.tensor([change, 0.0, -change]).double()
        state.check = EndCheck(state.draw_SS, change_S, torch.full((3,), 0.01).double(), [])
        said = verdict(state)
        assert said.converged == converged, said
    assert "if the weight of code changes by +0.060 ± 0.010" in said.reason
    state.training._memory_growth = 0.5
    assert verdict(state).converged
    state.training._memory_growth, state.config.bilevel.tolerance = 0.0, 0.1
    assert verdict(state).converged


def test_sources_that_the_check_could_not_tell_apart_are_known_by_their_sum() -> None:
    state = run({})
    state.draw_SS = 9.0 * torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]]).double()
    assert "validation set is too small" in verdict(state).reason
    state.lookalikes = [[0, 1]]
    said = verdict(state)
    assert said.converged and "only the sum of code, math is known" in said.reason
    found = state.training.intervals(10**6, state.draw_SS, state.lookalikes)
    assert found.lookalikes == [[0, 1]] and found.low_S[0] == 0 and found.high_S[1] > 0.75
    assert found.low_S[2] > 0.1
    # What the steps themselves could not tell apart does not count beside that.
    state.training.mixture.lookalike_groups = lambda tail_BS: [[1, 2]]
    assert state.training.intervals(10**6).lookalikes == [[1, 2]]
    assert state.training.intervals(10**6, lookalikes=[]).lookalikes == []
    assert "only the sum" not in state.training.verdict(lookalikes=[]).reason


def test_groups_take_what_is_known_of_rate_and_validation_set() -> None:
    bio, levels = run({}).training, levels_of(["a/code", "a/math", "b"])
    tail_BS = bio.mixture.trajectory.tail(0.5)
    sums_BG = torch.stack([tail_BS[:, :2].sum(1), tail_BS[:, 2]], 1)
    for examples, known in ((100.0, True), (1e6, False)):
        found = described(bio, levels, False, examples, known)
        [level] = found["levels"]
        assert not level["converged"] and "learning rate decays" in level["reason"]
        wanted = weight_intervals(sums_BG, 0.95, examples)
        ends = zip(wanted.low_S.tolist(), wanted.high_S.tolist(), strict=True)
        told = [(group["ci_low"], group["ci_high"]) for group in found["groups"]]
        assert told == (list(ends) if known else [(None, None)] * 2)
    [level] = described(bio, levels, True, 100.0, True)["levels"]
    assert "validation set is too small" in level["reason"]


def test_the_draw_of_a_source_whose_weight_is_fixed_does_not_matter() -> None:
    state = run({})
    state.draw_SS = torch.diag(torch.tensor([9.0, 0.0, 0.0])).double()
    assert not verdict(state).converged
    state.training.mixture.constraints = Constraints([0.5, 0.0, 0.0], [0.5, 1.0, 1.0])
    assert verdict(state).converged


def test_groups_take_the_draw_of_their_sources() -> None:
    state = run({})
    draw_SS = torch.tensor([[4.0, -4, 0], [-4, 4, 0], [0, 0, 0]]).double()
    for names, converged in ((["a/code", "a/math", "b"], True), (["a/code", "b", "a/web"], False)):
        found = described(state.training, levels_of(names), True, 1e6, True, draw_SS)
        assert found["levels"][0]["converged"] == converged
        assert (found["groups"][0]["ci_high"] == 1.0) == (not converged)


def test_the_way_there_is_no_rest() -> None:
    """Of a run that travels for 300 of its steps, the last half is still, and all of it is not."""
    for fraction, converged in ((0.5, True), (1.0, False)):
        state = run({"average_fraction": fraction, "memory_growth": 0.0}, travelling=300)
        assert verdict(state).converged == converged


@pytest.mark.parametrize(
    ("limit", "steps", "in_a_row", "ends"),
    [(3, 100, 2, False), (3, 100, 3, True), (7, 100, 6, False), (7, 4, 4, True), (7, 4, 3, False)],
)
def test_a_run_ends_after_as_many_skipped_steps_as_asked(
    limit: int, steps: int, in_a_row: int, ends: bool
) -> None:
    """Or after all of its steps: none of a run's results are of weights that no step moved."""
    config = load_config(None, {"train": {"skip_limit": limit, "train_iters": steps}})
    training = SimpleNamespace(skipped_in_a_row=in_a_row)
    state = SimpleNamespace(config=config, step=20, training=training)
    record = {"skipped": "w: gradient norm is nan"}
    with pytest.raises(UserError, match=f"{in_a_row} steps in a row") if ends else nullcontext():
        _refuse_skips(state, record)  # type: ignore[arg-type]


@pytest.mark.parametrize(("weights", "examples"), [([0.75, 0.25], 400), ([0.5, 0.5], 300)])
def test_sets_of_uneven_weight_tell_as_much_as_fewer_examples(
    weights: list[float], examples: float
) -> None:
    """Of 300 and 100 examples: 1 / (sum of the squares of the weights, each over its examples)."""
    state: Any = SimpleNamespace(
        sets=SimpleNamespace(weights=lambda goals, config: np.array(weights)), config=None,
        training=SimpleNamespace(goals=None),
        data=SimpleNamespace(validation=[range(300), range(100)]),
    )  # fmt: skip
    told: Any = TrainState.validation_examples
    assert told.fget(state) == pytest.approx(examples)
