"""What ScaleBiO refuses before it builds or steps anything."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_scalebio.core.options import BilevelOptions, LisaOptions
from megatron_scalebio.core.scalebio import ScaleBiO
from megatron_scalebio.mixture.goals import Goals
from megatron_scalebio.mixture.mixture import Mixture


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sources": ["a", "a"]}, "2 initial weights for sources"),
        ({"initial_weights": [1.0]}, "1 initial weights for sources"),
        ({"initial_weights": [2.0, -1.0]}, "initial_weights is .2.0, -1.0."),
        ({"initial_weights": [0.0, 0.0]}, "initial_weights is .0.0, 0.0."),
        ({"validation": {}}, "validation is .."),
        ({"validation": {"v": float("nan")}}, "validation is .nan."),
        ({"validation": {"v": float("inf")}}, "validation is .inf."),
    ],
)
def test_weights_and_names_that_are_none_are_refused(given: dict, words: str) -> None:
    whole: Any = {
        "options": BilevelOptions(), "sources": ["a", "b"], "model_provider": None, "ddp": None,
        "optimizer": None, **given,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        ScaleBiO(**whole)


def bare() -> Any:
    bio = ScaleBiO.__new__(ScaleBiO)
    bio.options, bio.mixture = BilevelOptions(), Mixture([1.0, 1.0], "eg")
    bio.goals, bio.lisa = Goals([1.0]), None
    bio.steps, bio._resync_interval, bio._memory_growth = 0, 10, 0.25
    return bio


def test_alpha_grows_as_the_root_of_memory() -> None:
    bio, batch = bare(), SimpleNamespace()
    for steps, times in ((0, 1.0), (400, 1.0), (520, 2.0), (760, 10**0.5)):
        bio.steps = steps
        assert bio.grown_alpha(3.0) == pytest.approx(3.0 * times)
    bio.lisa = LisaOptions(1)  # whose resets stay whole
    assert bio.grown_alpha(3.0) == 3.0
    bio.grown_alpha = lambda alpha: -alpha
    with pytest.raises(ValueError, match=r"alpha is -10\.0"):
        bio.step([batch], [batch], 0.1)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 800),  # u's memory grows from step 400 on
        ({"average_fraction": 0.8}, 2000), ({"average_fraction": 0.4}, 400 / 0.6),
        ({"average_fraction": 1.0}, math.inf), ({"average_fraction": 0.1}, 2000),
        ({"memory_growth": 0.0}, 400), ({"memory_growth": 0.0, "average_fraction": 1.0}, 200),
    ],
)  # fmt: skip
def test_fewest_steps_are_enough_to_average_and_with_memory(options: dict, steps: float) -> None:
    bio = bare()
    bio.options = BilevelOptions(**options)
    bio._memory_growth = bio.options.memory_growth
    assert bio.fewest_steps == pytest.approx(steps)
    if steps < math.inf:
        bio.steps = math.ceil(bio.fewest_steps)
        assert not bio.short_memory()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train": []}, "training and validation micro-batches"),
        ({"validation": []}, "training and validation micro-batches"),
        ({"lr": -1.0}, "w is -1.0"), ({"lr": float("nan")}, "w is nan"),
        ({"lr_u": float("inf")}, "u is inf"), ({"lr_lambda": -0.1}, "lr_lambda is -0.1"),
        ({"alpha": 0.0}, "alpha is 0.0"), ({"inclusion": [1.0]}, "inclusion .1.0., not 2"),
        ({"inclusion": [1.0, 0.0]}, "inclusion .1.0, 0.0., not 2"),
        ({"validation_inclusion": [2.0]}, "inclusion .2.0., not 1"),
    ],
)  # fmt: skip
def test_a_step_with_numbers_that_are_none_is_refused(given: dict, words: str) -> None:
    batch = SimpleNamespace()
    with pytest.raises(ValueError, match=words):
        bare().step(**{"train": [batch], "validation": [batch], "lr": 0.1, **given})


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: BilevelOptions(alpha=float("inf")), "alpha is inf"),
        (lambda: BilevelOptions(resync_interval=1), "resync_interval is 1"),
        (lambda: BilevelOptions(resync_interval=2.5), "resync_interval is 2.5"),  # type: ignore[arg-type]
        (lambda: BilevelOptions(lr_lambda=0.0), "lr_lambda is 0.0"),
        (lambda: BilevelOptions(loss_mean="batch"), "loss_mean is batch"),  # type: ignore[arg-type]
        (lambda: BilevelOptions(mixture_optimizer="sgd"), "mixture_optimizer is sgd"),  # type: ignore[arg-type]
        (lambda: BilevelOptions(confidence=0.7), "confidence is 0.7"),
        (lambda: BilevelOptions(average_fraction=1.5), "average_fraction is 1.5"),
        (lambda: BilevelOptions(tolerance=0.0), "tolerance is 0.0"),
        (lambda: LisaOptions(0), "layers is 0"),
        (lambda: LisaOptions(2.5), "layers is 2.5"),  # type: ignore[arg-type]
        (lambda: LisaOptions(2, interval=0), "interval is 0"),
    ],
)
def test_options_out_of_their_range_are_refused(made: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made()
