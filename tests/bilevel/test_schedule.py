"""α and the three learning rates as functions of the step."""

from __future__ import annotations

import pytest

from megatron_scalebio.bilevel.schedule import Schedule
from megatron_scalebio.config import Config
from megatron_scalebio.config_loader import load_config


def config(iters: int = 100, **sections: dict) -> Config:
    return load_config(None, {"train": {"train_iters": iters}, **sections})


def test_warm_up_and_cosine_end_at_the_floor() -> None:
    rates = {"lr": 1e-3, "lr_u": 2e-3, "min_lr": 1e-5, "lr_warmup_fraction": 0.1}
    schedule = Schedule(config(optimizer=rates))
    steps = [schedule.at(step) for step in range(100)]
    assert steps[0].lr_w == pytest.approx(1e-4), "the first step already learns"
    assert steps[9].lr_w == pytest.approx(1e-3)
    assert steps[9].lr_u == pytest.approx(2e-3)
    falling = [step.lr_w for step in steps[9:]]
    assert falling == sorted(falling, reverse=True)
    assert steps[-1].lr_w == pytest.approx(1e-5)
    assert steps[-1].lr_u == pytest.approx(2e-5), "its floor is in proportion"


def test_rate_of_the_mixture_is_constant_from_the_first_step() -> None:
    schedule = Schedule(config(bilevel={"lr_lambda": 0.2}))
    assert {schedule.at(step).lr_lambda for step in range(100)} == {0.2}


def test_rate_of_the_mixture_decays_when_asked() -> None:
    schedule = Schedule(config(bilevel={"lr_lambda": 0.2, "lr_lambda_decay_style": "linear"}))
    rates = [schedule.at(step).lr_lambda for step in range(5, 100)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_alpha_grows_and_rates_shrink_by_tau_each_round() -> None:
    bilevel = {"alpha": 5.0, "alpha_growth": 2.0, "outer_rounds": 4, "lr_lambda": 0.4}
    constant = {"lr": 1e-3, "lr_decay_style": "constant", "lr_warmup_fraction": 0.0}
    schedule = Schedule(config(bilevel=bilevel, optimizer=constant))
    for first, growth in ((0, 1), (25, 2), (50, 4), (75, 8)):
        for step in (first, first + 24):
            now = schedule.at(step)
            assert (now.outer_round, now.alpha) == (first // 25, 5.0 * growth)
            assert now.lr_w == pytest.approx(1e-3 / growth)
            assert now.lr_u == pytest.approx(1e-3 / growth)
            assert now.lr_lambda == pytest.approx(0.4 / growth)


def test_settings_do_not_depend_on_what_was_asked_before() -> None:
    forwards, backwards = Schedule(config()), Schedule(config())
    expected = [forwards.at(step) for step in range(100)]
    assert [backwards.at(step) for step in reversed(range(100))] == expected[::-1]
