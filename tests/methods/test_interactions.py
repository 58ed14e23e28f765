"""Which source serves which set, fitted from made-up hypergradients whose answer is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from megatron_scalebio.logs.interactions import INTERACTION_FILE, Interaction, read_interaction
from megatron_scalebio.methods.interactions import SWING, Interactions

TRUTH = np.array([[1.0, -0.5, 0.0], [-0.4, 0.6, 0.0]])
NAMES: Any = SimpleNamespace(
    sources=[SimpleNamespace(name=name) for name in "ab"],
    validation=[SimpleNamespace(name=name) for name in "xyz"],
)


def fitted(steps: int, seed: int, noise: float = 3.0, grown: int = 10**9) -> Interaction | None:
    """Of a run in which d = w − u is what w was shown; u keeps 3/4 of it from step `grown` on."""
    rng, interactions = np.random.default_rng(seed), Interactions(2, 3, 10, seed)
    given_V, shown_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), np.zeros(3)
    for step in range(steps):
        memory = 1.0 if step < grown else 4.0
        interactions.begin_step(step, memory)
        if step % 10 == 0:
            shown_V *= 1 - 1 / memory
        shares_V = given_V + interactions.swing(step, given_V)
        hypergradient_S = -TRUTH @ shown_V + noise * rng.standard_normal(2)
        shown_V = shown_V + shares_V.numpy()
        report: Any = SimpleNamespace(shares_V=shares_V)
        interactions.append(report, torch.from_numpy(hypergradient_S))
    return interactions.found(NAMES, 0.95)


def test_every_set_has_its_turn_and_the_goal_is_what_it_was() -> None:
    interactions = Interactions(2, 3, 10, seed=1)
    equal_V = torch.full((3,), 1 / 3, dtype=torch.float64)
    swings = torch.stack([interactions.swing(step, equal_V) for step in range(30)])
    torch.testing.assert_close(swings.sum(0), torch.zeros(3).double())
    torch.testing.assert_close(swings.sum(1), torch.zeros(30).double())
    assert sorted(swings.argmax(1)[::10].tolist()) == [0, 1, 2]
    assert float(swings.max()) == pytest.approx(SWING * 2 / 3)


@pytest.mark.parametrize(
    "shares", [[0.96, 0.04, 0.0], [0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [0.998, 0.001, 0.001]]
)
def test_no_weight_of_a_set_leaves_its_range(shares: list[float]) -> None:
    interactions, share_V = (
        Interactions(2, 3, 10, seed=1),
        torch.tensor(shares, dtype=torch.float64),
    )
    swings = torch.stack([interactions.swing(step, share_V) for step in range(30)])
    assert (share_V + swings >= -1e-12).all() and (share_V + swings <= 1 + 1e-12).all()
    torch.testing.assert_close(swings.sum(0), torch.zeros(3).double())
    torch.testing.assert_close(swings.sum(1), torch.zeros(30).double())
    assert float(swings.max()) >= 0.9 * sorted(shares)[1] * max(shares), "as far as that allows"


@pytest.mark.parametrize("grown", [10**9, 200])
def test_what_serves_what_is_found(grown: int) -> None:
    found = fitted(2000, seed=0, grown=grown)
    assert found is not None
    np.testing.assert_allclose(found.serves, TRUTH, atol=0.15)
    assert found.sure[:, :2].all() and not found.sure[:, 2].any()


def test_intervals_hold_the_answer_as_often_as_they_say() -> None:
    runs = [fitted(600, seed) for seed in range(60)]
    inside = [(run.low <= TRUTH) & (run.high >= TRUTH) for run in runs if run]
    assert len(inside) == 60 and 0.90 <= np.mean(inside) <= 0.99


def test_intervals_are_those_of_a_jackknife_over_windows() -> None:
    """Student's, of as many blocks; each of two windows at least."""
    draw, interactions = np.random.default_rng(4), Interactions(1, 1, 20, seed=0)
    for _ in range(640):  # in 20 blocks of 32 steps
        f, g = draw.normal(1.0, 0.2), draw.normal(-0.7, 1.0)
        interactions.sums.append(torch.tensor([f * f, f * g]).double())
    one: Any = SimpleNamespace(sources=NAMES.sources[:1], validation=NAMES.validation[:1])
    found = interactions.found(one, 0.9)
    assert found is not None
    blocks = interactions.sums.tail(0.9).numpy()
    assert interactions.sums.block_length == 32 and len(blocks) == 18
    blocks = blocks.reshape(9, 2, 2).sum(1)
    whole = blocks.sum(0)
    without = [-(whole - each)[1] / (whole - each)[0] for each in blocks]
    half = student.ppf(0.95, 8) * np.sqrt(8 * np.var(without))
    assert float(found.serves[0, 0]) == pytest.approx(-whole[1] / whole[0])
    assert (found.high - found.low).item() / 2 == pytest.approx(half, rel=0.03)


def test_a_short_run_says_nothing() -> None:
    assert fitted(100, seed=0) is None and fitted(300, seed=0) is not None


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = fitted(600, seed=0)
    assert found is not None
    found.write(tmp_path)
    again = read_interaction(tmp_path)
    assert again is not None and again.sources.tolist() == ["a", "b"] and again.confidence == 0.95
    np.testing.assert_array_equal(again.serves, found.serves)
    np.testing.assert_array_equal(again.high, found.high)


def test_what_is_no_such_file_is_none(tmp_path: Path) -> None:
    assert read_interaction(tmp_path) is None
    (tmp_path / INTERACTION_FILE).write_text("not a file of arrays")
    assert read_interaction(tmp_path) is None
    np.savez(tmp_path / INTERACTION_FILE, serves=np.ones((2, 2)))
    assert read_interaction(tmp_path) is None
    found = fitted(600, seed=0)
    assert found is not None
    Interaction(found.sources[:1], *list(vars(found).values())[1:]).write(tmp_path)
    assert read_interaction(tmp_path) is None
