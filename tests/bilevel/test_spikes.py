"""The spike guard: silent on noisy runs, sees a jump, and is the same after a resume."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megatron_scalebio.bilevel.spikes import LAST, LEAST, WATCHED, WINDOW, SpikeGuard

LOSS, NORM = "w: training loss", "w: gradient norm"
DISTANCE = "w and u: distance of their training losses"


def noisy(steps: int, seed: int = 0, spread: float = 0.15) -> list[dict[str, float]]:
    """A loss that falls from 8 to 2 and a norm with heavy tails, both noisier than real ones."""
    generator = np.random.default_rng(seed)
    falling = 2 + 6 * np.exp(-np.arange(steps) / 50)
    losses = falling * np.exp(spread * generator.standard_normal(steps))
    norms = np.exp(0.5 * generator.standard_t(5, steps).clip(-4, 4))
    gaps = 0.02 * np.abs(generator.standard_cauchy(steps)).clip(0, 20)
    rows = zip(losses.tolist(), norms.tolist(), gaps.tolist(), strict=True)
    return [{LOSS: loss, NORM: norm, DISTANCE: gap} for loss, norm, gap in rows]


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_noise_never_triggers(seed: int) -> None:
    guard = SpikeGuard()
    assert [guard.judge(values) for values in noisy(2000, seed)] == [None] * 2000


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (LOSS, 9.0, "w: training loss is 9, its median over 64 steps "),
        (DISTANCE, 3.5, "w and u: distance of their training losses is 3.5, its median over 64"),
    ],
)
def test_a_jump_is_named_and_does_not_count(name: str, value: float, words: str) -> None:
    guard = SpikeGuard()
    for values in noisy(300, spread=0.05):
        guard.judge(values)
    before = guard.state_dict()["applied"]
    for _ in range(3):
        said = guard.judge({**noisy(1)[0], LOSS: 2.0, name: value})
        assert said is not None and words in said
    assert guard.state_dict()["applied"] == before, "what was refused is no measure for the next"
    assert guard.judge({LOSS: 2.1, NORM: 1.0}) is None


def test_a_norm_is_refused_once_and_a_new_level_is_not() -> None:
    guard = SpikeGuard()
    for values in noisy(300, spread=0.05):
        guard.judge(values)
    said = guard.judge({LOSS: 2.0, NORM: 80.0})
    assert said is not None and "w: gradient norm is 80, its median over 64 steps " in said
    assert guard.judge({LOSS: 2.0, NORM: 1.0}) is None
    for _ in range(LAST):
        guard.judge({LOSS: 2.0, NORM: 1.0})
    answers = [guard.judge({LOSS: 2.0, NORM: 80.0 + step}) for step in range(40)]
    assert answers[0] is not None and not any(answers[1:])


@pytest.mark.parametrize(("name", "end"), [(LOSS, 9.0), (NORM, 90.0), (DISTANCE, 4.0)])
def test_what_rises_step_by_step_is_no_spike(name: str, end: float) -> None:
    """As gradients do where a model leaves a plateau, and losses where a mixture turns round."""
    guard = SpikeGuard()
    quiet = {LOSS: 2.0, NORM: 1.0, DISTANCE: 0.02}
    for _ in range(WINDOW):
        guard.judge(quiet)
    rise = np.geomspace(quiet[name], end, 16)
    assert not any(guard.judge({**quiet, name: float(value)}) for value in rise)


def test_nothing_is_judged_before_there_is_a_measure() -> None:
    guard = SpikeGuard()
    assert guard.judge({LOSS: 1.0, NORM: 1.0}) is None
    for step in range(LEAST - 1):
        assert guard.judge({LOSS: 10.0 ** (step % 5), NORM: math.nan}) is None
    assert guard.judge({NORM: 1e9}) is None, "one finite norm is no measure"


def test_small_losses_may_jump_in_proportion() -> None:
    guard = SpikeGuard()
    for _ in range(WINDOW):
        guard.judge({LOSS: 0.01, DISTANCE: 1e-5})
    assert guard.judge({LOSS: 0.4, DISTANCE: 0.4}) is None
    assert guard.judge({LOSS: 0.6}) is not None


def test_resume_is_exact() -> None:
    guard, resumed = SpikeGuard(), SpikeGuard()
    steps = noisy(200)
    for values in steps[:100]:
        guard.judge(values)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for values in [*steps[100:], {LOSS: 50.0}]:
        assert resumed.judge(values) == guard.judge(values)
    assert resumed.state_dict() == guard.state_dict()
    norms = {NORM, "u: gradient norm"}
    for kind, most, names in (("applied", WINDOW, set(WATCHED)), ("last", LAST, norms)):
        held = guard.state_dict()[kind]
        assert set(held) == names
        assert max(map(len, held.values())) == most
