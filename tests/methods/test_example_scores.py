"""Scores of single examples: their arithmetic, and the file of visits that they come from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_scalebio.core.batch import MicroBatch
from megatron_scalebio.core.flush import Pass
from megatron_scalebio.data.example_weights import EXAMPLE_WEIGHTS_FILE, read_example_weights
from megatron_scalebio.errors import UserError
from megatron_scalebio.methods import example_scores
from megatron_scalebio.methods.example_scores import (
    VISIT,
    ExampleVisits,
    _told,
    gains,
    scores,
    without_steps,
)
from megatron_scalebio.mixture.objective import Role
from megatron_scalebio.mixture.sampler import Picks

SOURCES: Any = [
    type("Three", (), {"name": name, "fingerprint": f"{name}-1", "__len__": lambda self: 3})()
    for name in "ab"
]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_scores.runtime, "on_main", lambda work: work())
    monkeypatch.setattr(example_scores, "summed", lambda values: values)


def visited(pairs: list[tuple[int, float]]) -> np.ndarray:
    """Each in a step of its own."""
    return np.array([(row, step, gain) for step, (row, gain) in enumerate(pairs)], VISIT)


def pairs_in(path: Path) -> list[tuple[int, float]]:
    visits = np.fromfile(path, VISIT)
    return list(zip(visits["row"].tolist(), visits["gain"].tolist(), strict=True))


def losses(u: list[float], w: list[float] | None, targets: list[int]) -> Any:
    """Of one micro-batch, whose rows come in the reverse order of the global batch."""
    count = len(u)
    mask_BS = torch.tensor([[1.0] * n + [0.0] * (4 - n) for n in targets])
    ids = torch.zeros(count, 4, dtype=torch.int64)
    member_B = torch.arange(count - 1, -1, -1)
    batch = MicroBatch(ids, ids, mask_BS, ids, torch.zeros(count).long(), 0, member_B)
    coefficient_B = torch.tensor([0.5 / n if n else 0.0 for n in targets]).double()
    parts = [
        (Pass(role, batch, coefficient_B, coefficient_B), torch.tensor(sums) * coefficient_B)
        for role, sums in ((Role.TRAIN_U, u), (Role.TRAIN_W, w), (Role.VALID_W, [9.0] * count))
        if sums is not None
    ]
    return SimpleNamespace(parts=parts)


def test_a_gain_is_the_mean_over_an_examples_targets() -> None:
    gain_B = gains(losses([8.0, 6.0, 5.0], [4.0, 7.0, 5.0], [4, 2, 0]), 3)
    np.testing.assert_allclose(gain_B, [np.nan, -0.5, 1.0])


def test_visits_are_less_the_mean_under_the_mixture(tmp_path: Path) -> None:
    visits = ExampleVisits(tmp_path / "visits.bin", SOURCES)
    picks = Picks(np.array([0, 0, 1]), np.array([2, 0, 1]), np.ones(2))
    # Gains 1, 3 and 7 in the order of the picks: 0.75 · 2 + 0.25 · 7 is their mean.
    visits.append(5, losses([7.0, 3.0, 1.0], [0.0] * 3, [1, 1, 1]), picks, np.array([0.75, 0.25]))
    visits.flush()
    found = np.fromfile(tmp_path / "visits.bin", VISIT)
    assert found["row"].tolist() == [2, 0, 4] and visits.count == 3
    assert found["step"].tolist() == [5, 5, 5]
    np.testing.assert_allclose(found["gain"], [-2.25, -0.25, 3.75])


def test_scores_are_shrunk_to_their_source_by_what_is_noise() -> None:
    rng = np.random.default_rng(0)
    truth_N = np.concatenate([0.5 + 0.3 * rng.standard_normal(4000), np.full(2000, -0.2)])
    row_V = rng.integers(6000, size=30_000)
    gain_V = truth_N[row_V] + 0.6 * rng.standard_normal(30_000)
    visits = np.rec.fromarrays([row_V, np.arange(30_000), gain_V], dtype=VISIT)
    score_N, visits_N, error_N, [real, none] = scores(visits, np.array([0, 4000, 6000]))
    np.testing.assert_array_equal(visits_N, np.bincount(row_V, minlength=6000))
    n = visits_N[:4000]
    kept = n * 0.09 / (n * 0.09 + 0.36)
    mean = np.bincount(row_V, gain_V, 6000)[:4000] / np.maximum(n, 1)
    by_hand = 0.5 + kept * np.where(n > 0, mean - 0.5, 0)
    np.testing.assert_allclose(score_N[:4000], by_hand, atol=0.06)
    assert real is not None and abs(real - kept[n > 0].mean()) < 0.02
    assert none is not None and none < 0.1, "examples that are alike have one score"
    np.testing.assert_allclose(score_N[4000:], -0.2, atol=0.1)
    within = np.abs(score_N - truth_N)[:4000] < 1.96 * error_N[:4000]
    assert 0.93 < within.mean() < 0.97, "the standard error says how far off a score is"


def test_of_few_examples_the_spread_is_that_of_the_analysis_of_variance() -> None:
    """By hand, three visits of one and one of the other: v = 18 / 2, their mean is 4,
    b = (3 · 1² + 1 · 3² − v) / (4 − (3² + 1²) / 4) = 3 / 1.5."""
    visits = visited([(0, 0.0), (0, 3.0), (0, 6.0), (1, 7.0)])
    score_N, _, error_N, [share] = scores(visits, np.array([0, 2]))
    kept = np.array([3 * 2 / (3 * 2 + 9), 2 / (2 + 9)])
    np.testing.assert_allclose(score_N, 4 + kept * [-1, 3], rtol=1e-6)
    np.testing.assert_allclose(error_N, np.sqrt(2 * (1 - kept)), rtol=1e-6)
    assert share == pytest.approx(kept.mean())


def test_what_a_source_has_in_common_in_a_step_is_taken_out() -> None:
    """From steps with many of a source, as far as it is not chance; not from one alone."""
    rng = np.random.default_rng(1)
    step_V = np.repeat(np.arange(400), 20)
    source_V, common_T = np.arange(8000) % 2, 0.8 * rng.standard_normal(400)
    gain_V = source_V + 0.5 * rng.standard_normal(8000) + np.where(source_V, common_T[step_V], 0)
    found = without_steps(gain_V, source_V, step_V.astype(np.uint32))
    wanted = gain_V - np.where(source_V, common_T[step_V], 0)
    assert np.sqrt(np.mean((found - wanted)[source_V == 1] ** 2)) < 0.2
    np.testing.assert_allclose(found[source_V == 0], gain_V[source_V == 0], atol=0.1)
    assert found[source_V == 1].mean() == pytest.approx(gain_V[source_V == 1].mean())
    alone = without_steps(gain_V, source_V, np.arange(8000, dtype=np.uint32))
    np.testing.assert_array_equal(alone, gain_V)


def test_one_visit_tells_no_noise_and_none_tells_nothing() -> None:
    score_N, visits_N, error_N, shares = scores(visited([(0, 1.0), (1, 4.0)]), np.array([0, 3, 6]))
    np.testing.assert_allclose(score_N, [1.0, 4.0, 2.5, np.nan, np.nan, np.nan])
    assert visits_N.tolist() == [1, 1, 0, 0, 0, 0]
    assert np.isnan(error_N).all() and shares == [None, None]


def test_an_example_without_a_visit_has_its_sources_score() -> None:
    rows = [(0, 1.0), (0, 1.1), (1, 3.0), (1, 2.9)]
    score_N, _, error_N, [share, _] = scores(visited(rows), np.array([0, 3, 6]))
    assert score_N[2] == pytest.approx(2.0) and error_N[2] > 10 * error_N[0] > 0
    assert share is not None and share > 0.99
    np.testing.assert_allclose(score_N[:2], [1.05, 2.95], atol=0.01)


def test_a_resumed_run_counts_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "visits.bin"
    visits = ExampleVisits(path, SOURCES)
    visits._waiting = [visited([(0, 1.0), (1, 2.0)])]
    saved = visits.state_dict()
    assert saved["count"] == 2 and path.stat().st_size == 2 * VISIT.itemsize
    visits._waiting = [visited([(2, 9.0)] * 5)]
    visits.flush()  # and then it was killed
    again = ExampleVisits(path, SOURCES)
    again.load_state_dict(saved)
    again._waiting = [visited([(3, 3.0)])]
    again.flush()
    assert pairs_in(path) == [(0, 1.0), (1, 2.0), (3, 3.0)]
    afresh = ExampleVisits(path, SOURCES)
    afresh._waiting = [visited([(5, 5.0)])]
    afresh.flush()
    assert pairs_in(path) == [(5, 5.0)], "a new run in an old folder"


def test_visits_come_along_to_another_folder_or_are_missed(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.bin", tmp_path / "theirs.bin"
    visited([(0, 1.0), (1, 2.0), (2, 3.0)]).tofile(theirs)
    saved = {"count": 2, "path": str(theirs)}
    visits = ExampleVisits(ours, SOURCES)
    visits.load_state_dict(saved)
    visits._waiting = [visited([(3, 4.0)])]
    visits.flush()
    assert pairs_in(ours) == [(0, 1.0), (1, 2.0), (3, 4.0)]
    assert len(np.fromfile(theirs, VISIT)) == 3
    theirs.unlink()  # the folder was moved here
    ExampleVisits(ours, SOURCES).load_state_dict(saved)
    ours.write_bytes(ours.read_bytes()[: 2 * VISIT.itemsize - 1])
    with pytest.raises(UserError, match=r"ours\.bin: lacks visits .*--level source"):
        ExampleVisits(ours, SOURCES).load_state_dict(saved)


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    visits = ExampleVisits(tmp_path / "visits.bin", SOURCES)
    told = visits.write_scores(tmp_path)
    assert (told["visits"], told["never_visited"]) == (0, 6)
    assert "6 never visited" in told["told"]
    visits._waiting = [visited([(0, 1.0), (0, 1.1), (1, 3.0), (1, 2.9), (4, 7.0)])]
    told = visits.write_scores(tmp_path)
    assert told["told"] == (
        "6 examples scored in 5 visits; 3 never visited: each has its source's score; share of "
        "the spread of scores that is not noise: 100% in a"
    )
    assert _told(5, 9, 0, {"a": 0.25, "b": None, "c": 0.75}) == (
        "5 examples scored in 9 visits; share of the spread of scores that is not noise: 75% in c, "
        "25% in a"
    )
    found = read_example_weights(tmp_path)
    assert found.sources.tolist() == ["a", "b"] and found.offsets.tolist() == [0, 3, 6]
    assert found.fingerprints.tolist() == ["a-1", "b-1"]
    assert found.visits.tolist() == [2, 2, 0, 0, 1, 0]
    np.testing.assert_allclose(found.score[3:], 7.0)


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no scores of single examples \(.*--level example\)"):
        read_example_weights(tmp_path)
    path = tmp_path / EXAMPLE_WEIGHTS_FILE
    path.write_text("not a file of arrays")
    with pytest.raises(UserError, match="holds no scores"):
        read_example_weights(tmp_path)
    ExampleVisits(tmp_path / "visits.bin", SOURCES).write_scores(tmp_path)
    whole = dict(np.load(path))
    for name, cut in (("score", whole["score"][1:]), ("offsets", whole["offsets"][:-1])):
        np.savez(path, **{**whole, name: cut})
        with pytest.raises(UserError, match="holds no scores of its examples"):
            read_example_weights(tmp_path)
