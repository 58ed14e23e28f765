"""LISA's draws: the right number, level over stages, each layer equally often, repeatable."""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalebio.core.lisa import active_layers, period_of, set_trainable
from megatron_scalebio.core.options import LisaOptions

# (active, layers, stages, virtual chunks per stage)
CASES = [(2, 12, 1, 1), (2, 12, 2, 1), (3, 12, 2, 1), (1, 8, 4, 1), (5, 16, 2, 2), (3, 24, 4, 3)]


@functools.cache
def draw(active: int, layers: int, stages: int, virtual: int, period: int, seed: int = 1) -> list:
    drawn = active_layers(LisaOptions(active), layers, stages, virtual, period, seed)
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


def replay(
    active: int, layers: int, stages: int, virtual: int, periods: int, seed: int
) -> list[list[int]]:
    """The draws of all periods, dealt one after the other.

    Each chunk has its hand of layers, shuffled by (seed, 2, shuffle, chunk), and deals on from it,
    round after round. A turn ends when the chunks have had the remainder equally often; the order
    in which they have it is shuffled by (seed, 1, turn). Where a turn ends with a round, there is
    a new hand.
    """
    chunks = stages * virtual
    held = layers // chunks
    even, rest = active // chunks, active % chunks
    dealt, owed, turn, shuffle, place = [0] * chunks, 0, -1, -1, 0
    order: list[int] = []
    hands: list[list[int]] = []
    drawn = []
    for _ in range(periods):
        if owed == 0:
            turn += 1
            generator = np.random.default_rng((seed, 1, turn))
            by_stage, by_chunk = generator.permutation(stages), generator.permutation(virtual)
            order = [stage + stages * block for block in by_chunk for stage in by_stage]
            place = 0
            if all(count % held == 0 for count in dealt):
                shuffle += 1
                hands = [
                    list(np.random.default_rng((seed, 2, shuffle, chunk)).permutation(held))
                    for chunk in range(chunks)
                ]
                dealt = [0] * chunks
        counts = [even] * chunks
        for _ in range(rest):
            counts[order[place % chunks]] += 1
            place += 1
        owed = (owed + rest) % chunks
        period = []
        for chunk, count in enumerate(counts):
            for _ in range(count):
                period.append(chunk * held + int(hands[chunk][dealt[chunk] % held]))
                dealt[chunk] += 1
        drawn.append(sorted(period))
    return drawn


@pytest.mark.parametrize("case", [*LEVEL_CASES, (6, 6, 1, 1), (5, 9, 3, 1), (6, 20, 2, 2)])
def test_draws_are_the_documented_ones(case: tuple[int, int, int, int]) -> None:
    """A run is repeated by its seed, by later versions as well."""
    for seed in (1, 6):
        want = replay(*case, 60, seed)
        assert [draw(*case, period, seed) for period in range(60)] == want


class ToyChunk(torch.nn.Module):
    """What `set_trainable` looks at in a chunk of Megatron's GPT."""

    def __init__(self, first: int, last: int, pre_process: bool, post_process: bool) -> None:
        super().__init__()
        self.pre_process, self.post_process = pre_process, post_process
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(first, last))
        for number, layer in enumerate(self.decoder.layers, start=first + 1):
            layer.layer_number = number  # Megatron counts from 1
        self.rotary = torch.nn.Linear(2, 2)
        if pre_process:
            self.embedding = torch.nn.Linear(2, 2)
        if post_process:
            self.output_layer = torch.nn.Linear(2, 2)
            self.decoder.final_layernorm = torch.nn.LayerNorm(2)


def trained(layers: list[int] | None, **options: bool) -> list[str]:
    """Names of what trains in a model of two stages of three layers, after another period."""
    chunks = [ToyChunk(0, 3, True, False), ToyChunk(3, 6, False, True)]
    set_trainable(chunks, [0, 4], LisaOptions(2))
    set_trainable(chunks, layers, LisaOptions(2, **options))
    names = [
        f"{number}.{name.rsplit('.', 1)[0]}"
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad
    ]
    return sorted(set(names))


def test_the_layers_of_the_draw_and_what_is_asked_for_train() -> None:
    layers = ["0.decoder.layers.1", "0.decoder.layers.2", "1.decoder.layers.2"]
    ends = ["0.embedding", "1.output_layer"]
    norm = ["1.decoder.final_layernorm"]
    frozen = {"train_embedding": False, "train_norm": False}
    assert trained([1, 2, 5]) == sorted(layers + ends + norm)
    assert trained([1, 2, 5], **frozen) == layers
    assert trained([1, 2, 5], train_norm=False) == sorted(layers + ends)
    assert trained([1, 2, 5], train_embedding=False) == sorted(layers + norm)
    every = [f"{stage}.decoder.layers.{layer}" for stage in (0, 1) for layer in (0, 1, 2)]
    assert trained(None) == trained(None, **frozen) == sorted(every + ends + norm)


def test_all_layers_without_lisa() -> None:
    assert active_layers(None, 12, 2, 1, 5, 1) is None
    assert [period_of(step, None) for step in (0, 7, 10**6)] == [0, 0, 0]


def test_periods_are_as_long_as_the_interval() -> None:
    options = LisaOptions(1, interval=20)
    assert [period_of(step, options) for step in (0, 19, 20, 39, 40)] == [0, 0, 1, 1, 2]
