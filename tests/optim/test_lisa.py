"""LISA's draws: the right number, level over stages, each layer equally often, repeatable."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalebio.config import LisaConfig
from megatron_scalebio.optim.lisa import active_layers, period_of, set_trainable

# (active, layers, stages, virtual chunks per stage)
CASES = [(2, 12, 1, 1), (2, 12, 2, 1), (3, 12, 2, 1), (1, 8, 4, 1), (5, 16, 2, 2), (3, 24, 4, 3)]


def draw(active: int, layers: int, stages: int, virtual: int, period: int, seed: int = 1) -> list:
    drawn = active_layers(LisaConfig(lisa_layers=active), layers, stages, virtual, period, seed)
    assert drawn is not None
    return drawn


def stage_of(layer: int, layers: int, stages: int, virtual: int) -> int:
    """Interleaved pipelines deal blocks of layers to the stages in turn."""
    return layer // (layers // (stages * virtual)) % stages


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.data())
@settings(deadline=None)
def test_a_draw_is_a_level_sample_of_the_layers(
    stages: int, virtual: int, per_chunk: int, data: st.DataObject
) -> None:
    layers = stages * virtual * per_chunk
    active = data.draw(st.integers(1, layers))
    drawn = draw(active, layers, stages, virtual, data.draw(st.integers(0, 10**6)))
    assert drawn == sorted(set(drawn)) and len(drawn) == active
    assert drawn[0] >= 0 and drawn[-1] < layers
    per_stage = Counter(stage_of(layer, layers, stages, virtual) for layer in drawn)
    counts = [per_stage[stage] for stage in range(stages)]
    assert max(counts) - min(counts) <= 1


# Those of the shipped configurations, and pipelines whose chunks do not share evenly.
LEVEL_CASES = [*CASES, (4, 80, 4, 1), (4, 64, 4, 2), (4, 60, 3, 1), (6, 80, 4, 5), (7, 48, 4, 3)]


@pytest.mark.parametrize("case", LEVEL_CASES)
def test_stages_and_virtual_chunks_stay_level_over_a_thousand_periods(
    case: tuple[int, int, int, int],
) -> None:
    _, layers, stages, virtual = case
    per_chunk = layers // (stages * virtual)
    for period in range(1000):
        drawn = draw(*case, period)
        per_stage = Counter(stage_of(layer, layers, stages, virtual) for layer in drawn)
        counts = [per_stage[stage] for stage in range(stages)]
        assert max(counts) - min(counts) <= 1, (period, counts)
        of_chunk = Counter(layer // per_chunk for layer in drawn)
        counts = [of_chunk[chunk] for chunk in range(stages * virtual)]
        assert max(counts) - min(counts) <= 1, (period, counts)


@pytest.mark.parametrize("case", LEVEL_CASES)
def test_no_layer_is_drawn_twice_more_than_another(case: tuple[int, int, int, int]) -> None:
    """After any number of periods: closer than the 3 sigma of independent draws by far."""
    counts = Counter({layer: 0 for layer in range(case[1])})
    for period in range(1000):
        counts.update(draw(*case, period))
        assert max(counts.values()) - min(counts.values()) <= 1, (period, counts)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.data())
@settings(deadline=None, max_examples=50)
def test_layers_are_dealt_evenly_whatever_the_sizes(
    stages: int, virtual: int, per_chunk: int, data: st.DataObject
) -> None:
    layers = stages * virtual * per_chunk
    active = data.draw(st.integers(1, layers))
    counts = Counter({layer: 0 for layer in range(layers)})
    for period in range(60):
        counts.update(draw(active, layers, stages, virtual, period))
        assert max(counts.values()) - min(counts.values()) <= 1, (period, counts)


@pytest.mark.parametrize("case", CASES)
def test_which_layers_come_together_changes(case: tuple[int, int, int, int]) -> None:
    """Rounds are shuffled: a layer's draws are no fixed pattern over periods, and seeds differ."""
    periods = [[p for p in range(200) if 0 in draw(*case, p, seed)] for seed in (1, 2)]
    assert periods[0] != periods[1]
    gaps = {after - before for before, after in itertools.pairwise(periods[0])}
    assert len(gaps) > 1


def test_draws_repeat_by_seed_and_differ_between_periods_and_seeds() -> None:
    case = (3, 12, 2, 1)
    assert [draw(*case, p) for p in range(50)] == [draw(*case, p) for p in range(50)]
    assert len({tuple(draw(*case, p)) for p in range(50)}) > 10
    assert [draw(*case, p, seed=2) for p in range(50)] != [draw(*case, p) for p in range(50)]


@pytest.mark.parametrize(
    ("case", "drawn"),
    [
        ((2, 12, 1, 1), {0: [2, 10], 1: [1, 3], 2: [4, 5], 9: [0, 11]}),
        ((3, 12, 2, 1), {0: [3, 4, 6], 1: [0, 10, 11], 2: [2, 5, 7], 9: [2, 6, 9]}),
        ((5, 16, 2, 2), {0: [0, 4, 8, 9, 13], 1: [2, 5, 10, 12, 15], 9: [0, 4, 7, 11, 14]}),
    ],
)
def test_a_seed_means_the_same_layers_for_ever(
    case: tuple[int, int, int, int], drawn: dict[int, list[int]]
) -> None:
    """A checkpoint holds the period's number alone: another draw would resume on other layers."""
    assert {period: draw(*case, period, seed=1234) for period in drawn} == drawn


def chunk_of(numbers: list[int], first: bool, last: bool) -> torch.nn.Module:
    """What LISA looks at of a pipeline chunk; Megatron counts layers from 1."""
    gpt = torch.nn.Module()
    gpt.pre_process, gpt.post_process = first, last
    gpt.decoder = torch.nn.Module()
    gpt.decoder.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in numbers)
    for layer, number in zip(gpt.decoder.layers, numbers, strict=True):
        layer.layer_number = number
    if first:
        gpt.embedding = torch.nn.Linear(2, 2)
    if last:
        gpt.output_layer, gpt.decoder.final_layernorm = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    return gpt


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_what_trains_is_what_was_drawn_and_what_is_switched_on(embedding: bool, norm: bool) -> None:
    config = LisaConfig(lisa_layers=2, lisa_train_embedding=embedding, lisa_train_norm=norm)
    chunks = [chunk_of([1, 2], True, False), chunk_of([3, 4], False, True)]
    parts = [
        chunks[0].embedding, *chunks[0].decoder.layers, *chunks[1].decoder.layers,
        chunks[1].decoder.final_layernorm, chunks[1].output_layer,
    ]  # fmt: skip

    def trains(layers: list[int] | None) -> list[bool]:
        set_trainable(chunks, layers, config)
        each = [{p.requires_grad for p in part.parameters()} for part in parts]
        assert all(len(kinds) == 1 for kinds in each)
        return [True in kinds for kinds in each]

    assert trains(None) == [True] * 7
    assert trains([0, 3]) == [embedding, True, False, False, True, norm, embedding]
    assert trains([1]) == [embedding, False, True, False, False, norm, embedding]


def test_all_layers_without_lisa() -> None:
    assert active_layers(LisaConfig(), 12, 2, 1, 5, 1) is None
    assert [period_of(step, LisaConfig()) for step in (0, 7, 10**6)] == [0, 0, 0]


def test_periods_are_as_long_as_the_interval() -> None:
    config = LisaConfig(lisa_layers=1, lisa_interval=20)
    assert [period_of(step, config) for step in (0, 19, 20, 39, 40)] == [0, 0, 1, 1, 2]
