"""The spike guard: silent on noisy runs, sees a jump, and is the same after a resume."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from megatron_scalebio.core.spikes import LAST, LEAST, WATCHED, WINDOW, SpikeGuard

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


# ratio, floor, jump, and whether refused steps count as the largest: the table in `spikes`.
BOUNDS = {
    "w: training loss": (1.5, 0.5, 1.25, False),
    "u: training loss": (1.5, 0.5, 1.25, False),
    "w: validation loss": (1.5, 0.5, 1.25, False),
    "w: gradient norm": (10.0, 0.0, 3.0, True),
    "u: gradient norm": (10.0, 0.0, 3.0, True),
    "w and u: distance of their training losses": (10.0, 0.5, 3.0, False),
}


def middle(values: list[float]) -> float:
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def bounds_of(name: str, applied: list[float], every: list[float]) -> list[float]:
    """What a value must pass, all four, to be a spike."""
    ratio, floor, jump, refused_count = BOUNDS[name]
    m = middle(applied[-64:])
    spread = 1.4826 * middle([abs(x - m) for x in applied[-64:]])
    largest = max((every if refused_count else applied)[-8:])
    return [ratio * m, m + floor, m + 10 * spread, jump * largest]


@pytest.mark.parametrize("name", WATCHED)
def test_every_answer_follows_from_the_table(name: str) -> None:
    """On noise of changing size with jumps; each of the four bounds is the last to hold a value."""
    assert set(WATCHED) == set(BOUNDS)
    generator, binding = np.random.default_rng(8), set()
    for level, noise in itertools.product((0.02, 0.3, 3.0), (0.01, 0.3, 1.5)):
        guard = SpikeGuard()
        applied: list[float] = []
        every: list[float] = []
        for number in range(150):
            value = level * math.exp(noise * generator.standard_normal())
            if applied and number > 20 and generator.random() < 0.3:
                bounds = bounds_of(name, applied, every) if number > 40 else [value]
                value = max(bounds) * generator.choice([0.97, 1.03])
            said = guard.judge({name: value})
            spikes = False
            if len(applied) >= 32:
                bounds = bounds_of(name, applied, every)
                spikes = all(value > bound for bound in bounds)
                if spikes:
                    binding.add(int(np.argmax(bounds)))
            want = f"{name} is {value:.4g}, its median over {min(len(applied), 64)} steps "
            want += f"{middle(applied[-64:]):.4g}" if applied else ""
            assert said == (want if spikes else None), (number, value)
            every.append(value)
            if not spikes:
                applied.append(value)
    assert binding == ({0, 2, 3} if "norm" in name else {0, 1, 2, 3})


def settled(values: dict[str, float]) -> SpikeGuard:
    guard = SpikeGuard()
    for _ in range(WINDOW):
        assert guard.judge(values) is None
    return guard


@pytest.mark.parametrize(
    ("name", "usual", "most"),
    [
        (LOSS, 2.0, 3.0), (LOSS, 0.5, 1.0), ("u: training loss", 2.0, 3.0),
        ("w: validation loss", 2.0, 3.0), (NORM, 1.0, 10.0), ("u: gradient norm", 1.0, 10.0),
        (DISTANCE, 0.25, 2.5), (DISTANCE, 0.015625, 0.515625),
    ],
)  # fmt: skip
def test_a_value_at_its_bound_is_no_spike(name: str, usual: float, most: float) -> None:
    assert settled({name: usual}).judge({name: most}) is None
    said = settled({name: usual}).judge({name: most * 1.0001})
    assert said is not None and said.startswith(f"{name} is {most * 1.0001:.4g}, its median over")


def test_a_quarter_above_the_largest_of_the_last_eight_steps_is_no_spike() -> None:
    def risen(steps_since: int) -> SpikeGuard:
        guard = settled({LOSS: 2.0})
        for value in [3.0, 3.5, 4.0] + [2.0] * steps_since:
            assert guard.judge({LOSS: value}) is None
        return guard

    assert risen(7).judge({LOSS: 5.0}) is None
    assert risen(7).judge({LOSS: 5.001}) is not None
    assert risen(7).judge({LOSS: 4.5}) is None
    assert risen(8).judge({LOSS: 4.5}) is not None


def test_thirty_two_steps_are_the_least() -> None:
    for steps, spikes in ((LEAST - 1, False), (LEAST, True)):
        guard = SpikeGuard()
        for _ in range(steps):
            guard.judge({LOSS: 1.0})
        assert (guard.judge({LOSS: 50.0}) is not None) == spikes
    assert (WINDOW, LEAST, LAST) == (64, 32, 8)


def test_the_first_of_several_spikes_is_told_and_none_of_the_step_counts() -> None:
    guard = settled({LOSS: 1.0, NORM: 1.0, DISTANCE: 0.01})
    said = guard.judge({NORM: 99.0, LOSS: 9.0, DISTANCE: 0.02})
    assert said is not None and said.startswith(NORM)
    assert guard.state_dict()["applied"][DISTANCE] == [0.01] * WINDOW
    assert guard.state_dict()["last"][NORM] == [1.0] * (LAST - 1) + [99.0]
    assert guard.judge({LOSS: math.inf, NORM: math.nan, DISTANCE: 0.02}) is None
    assert guard.state_dict()["applied"][LOSS] == [1.0] * WINDOW
    assert guard.state_dict()["applied"][DISTANCE] == [0.01] * (WINDOW - 1) + [0.02]


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
    resumed.judge({name: 1e3 for name in WATCHED})
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert resumed.state_dict() == guard.state_dict()
    for values in [{LOSS: 50.0}, {NORM: 70.0}, *steps[100:], {LOSS: 50.0}]:
        assert resumed.judge(values) == guard.judge(values)
    assert resumed.state_dict() == guard.state_dict()
    norms = {NORM, "u: gradient norm"}
    for kind, most, names in (("applied", WINDOW, set(WATCHED)), ("last", LAST, norms)):
        held = guard.state_dict()[kind]
        assert set(held) == names
        assert max(map(len, held.values())) == most


def test_a_state_without_spikes_starts_anew() -> None:
    """Of a checkpoint from before there were any, or before one of the values was watched."""
    for state in ({}, {"applied": {}}, {"applied": {LOSS: []}, "last": {}}):
        guard = settled({LOSS: 1.0, NORM: 1.0})
        guard.load_state_dict(state)
        assert guard.state_dict() == SpikeGuard().state_dict()
