"""CLIMB's rounds without models: each is drawn from what the rounds before it make look good."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_scalebio.methods import climb
from megatron_scalebio.methods.climb import BEST, in_rounds, pool
from megatron_scalebio.methods.mixture_regression import draw_mixture, fit

PRIOR = np.array([0.4, 0.3, 0.2, 0.1])
BEST_ONE = np.array([0.1, 0.5, 0.3, 0.1])


def trained(count: int, best: np.ndarray = BEST_ONE) -> list[dict]:
    """Trainings of a whole search whose losses are a bowl; the second set says the opposite."""
    propose = in_rounds(PRIOR, np.array([1.0, 0.0]), count, seed=3)
    done: list[dict] = []
    for number in range(count):
        mixture = propose(number, done)
        bowl = float(((mixture - best) ** 2).sum())
        done.append({"weights": mixture.tolist(), "losses": [3 + bowl, 3 - bowl]})
    return done


def test_rounds_are_four_two_and_one_parts_and_each_better_than_the_last() -> None:
    done = trained(35)
    mixtures = np.array([proxy["weights"] for proxy in done])
    first = np.stack([draw_mixture(PRIOR, 3, number) for number in range(20)])
    np.testing.assert_array_equal(mixtures[:20], first)
    off = np.array([proxy["losses"][0] - 3 for proxy in done])
    assert off[20:30].mean() < off[:20].mean() / 3 and off[30:].mean() < off[:20].mean() / 3
    candidates = pool(PRIOR, 35, 3)
    for begin, end in ((20, 30), (30, 35)):
        regression = fit(mixtures[:begin], 3 + off[:begin])
        ranked = candidates[regression.predict(candidates).argsort(kind="stable")].tolist()
        places = [ranked.index(row) for row in mixtures[begin:end].tolist()]
        # at random among the best, of which those of the round before are none
        assert max(places) < BEST + 15 and max(places) > BEST / 4 and places != sorted(places)


def test_no_candidate_is_trained_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a round takes from as few as there are trainings, and corners are drawn repeatedly."""
    monkeypatch.setattr(climb, "BEST", 1)
    for count, first in ((7, 4), (70, 40)):
        done = trained(count, np.array([1.0, 0, 0, 0]))
        mixtures = [tuple(proxy["weights"]) for proxy in done]
        assert len(set(mixtures[first:])) == count - first
        assert not set(mixtures[first:]) & set(mixtures[:first])


def test_a_search_that_goes_on_proposes_what_it_would_have() -> None:
    done = trained(14)
    again = in_rounds(PRIOR, np.array([1.0, 0.0]), 14, seed=3)
    assert again(13, done[:13]).tolist() == done[13]["weights"]
    assert again(9, done[:9]).tolist() == done[9]["weights"]
    other = in_rounds(PRIOR, np.array([1.0, 0.0]), 14, seed=4)
    assert other(13, done[:13]).tolist() != done[13]["weights"]
