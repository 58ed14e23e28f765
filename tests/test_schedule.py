"""α and the three learning rates as functions of the step."""

from __future__ import annotations

import math

import pytest

from megatron_scalebio.config_loader import load_config
from megatron_scalebio.engine.schedule import Schedule


def schedule_with(iters: int = 100, **sections: dict) -> Schedule:
    return Schedule(load_config(None, {"train": {"train_iters": iters}, **sections}))


def test_warm_up_and_cosine_end_at_the_floor() -> None:
    rates = {"lr": 1e-3, "lr_u": 2e-3, "min_lr": 1e-5, "lr_warmup_fraction": 0.1}
    schedule = schedule_with(optimizer=rates)
    steps = [schedule.at(step) for step in range(100)]
    assert steps[0].lr_w == pytest.approx(1e-4), "the first step already learns"
    assert steps[9].lr_w == pytest.approx(1e-3)
    assert steps[9].lr_u == pytest.approx(2e-3)
    falling = [step.lr_w for step in steps[9:]]
    assert falling == sorted(falling, reverse=True)
    assert steps[-1].lr_w == pytest.approx(1e-5)
    assert steps[-1].lr_u == pytest.approx(2e-5), "its floor is in proportion"


def rate(style: str, number: int, most: float, least: float, warmup: int, iters: int) -> float:
    """The rate that a step ends with (counted from 1): from 0 up to `most`, then to `least`."""
    if number <= warmup:
        return most * number / warmup
    done = (number - warmup) / (iters - warmup)
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    return least + (most - least) * left[style]


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("style_of_mixture", ["constant", "linear", "cosine"])
def test_every_rate_is_its_formula(style: str, style_of_mixture: str) -> None:
    rates = {
        "lr": 1e-3, "lr_u": 3e-3, "min_lr": 2e-4, "lr_warmup_fraction": 0.198,
        "lr_decay_style": style,
    }  # fmt: skip
    bilevel = {
        "alpha": 5.0, "alpha_growth": 1.5, "outer_rounds": 3, "lr_lambda": 0.4,
        "lr_lambda_decay_style": style_of_mixture,
    }  # fmt: skip
    schedule = schedule_with(50, optimizer=rates, bilevel=bilevel)
    for step in range(50):
        now, outer_round = schedule.at(step), step * 3 // 50
        growth = 1.5**outer_round
        assert (now.outer_round, now.alpha) == (outer_round, pytest.approx(5.0 * growth))
        # 9.9 steps of warm-up are 9.
        lr_w = rate(style, step + 1, 1e-3, 2e-4, 9, 50) / growth
        assert now.lr_w == pytest.approx(lr_w, rel=1e-9)
        assert now.lr_u == pytest.approx(3 * lr_w, rel=1e-9)
        want = 0.4
        if style_of_mixture != "constant":
            want = rate(style_of_mixture, step + 1, 0.4, 0.0, 9, 50)
        assert now.lr_lambda == pytest.approx(want / growth, rel=1e-9, abs=1e-15)


def test_u_learns_as_fast_as_w_unless_told_otherwise() -> None:
    schedule = schedule_with(optimizer={"lr": 5e-4, "min_lr": 1e-4})
    assert all(schedule.at(step).lr_u == schedule.at(step).lr_w for step in (0, 3, 50, 99))
    assert schedule.at(99).lr_w == pytest.approx(1e-4)


def test_rate_of_the_mixture_is_constant_from_the_first_step() -> None:
    schedule = schedule_with(bilevel={"lr_lambda": 0.2})
    assert {schedule.at(step).lr_lambda for step in range(100)} == {0.2}


def test_rate_of_the_mixture_decays_when_asked() -> None:
    schedule = schedule_with(bilevel={"lr_lambda": 0.2, "lr_lambda_decay_style": "linear"})
    rates = [schedule.at(step).lr_lambda for step in range(5, 100)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_alpha_grows_and_rates_shrink_by_tau_each_round() -> None:
    bilevel = {"alpha": 5.0, "alpha_growth": 2.0, "outer_rounds": 4, "lr_lambda": 0.4}
    constant = {"lr": 1e-3, "lr_decay_style": "constant", "lr_warmup_fraction": 0.0}
    schedule = schedule_with(bilevel=bilevel, optimizer=constant)
    for first, growth in ((0, 1), (25, 2), (50, 4), (75, 8)):
        for step in (first, first + 24):
            now = schedule.at(step)
            assert (now.outer_round, now.alpha) == (first // 25, 5.0 * growth)
            assert now.lr_w == pytest.approx(1e-3 / growth)
            assert now.lr_u == pytest.approx(1e-3 / growth)
            assert now.lr_lambda == pytest.approx(0.4 / growth)


def test_settings_do_not_depend_on_what_was_asked_before() -> None:
    forwards, backwards = schedule_with(), schedule_with()
    expected = [forwards.at(step) for step in range(100)]
    assert [backwards.at(step) for step in reversed(range(100))] == expected[::-1]
