"""Micro-batches: one global batch however it is cut, coefficients that divide once, padding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_scalebio.core.batch import MicroBatch
from megatron_scalebio.data.batch import BatchLayout, context_positions, micro_batches
from megatron_scalebio.data.packing import packed_rows
from megatron_scalebio.mixture.sampler import BlendSampler, Picks

SEQ = 20


class ToySource:
    """Sequences of uneven lengths; the first token of each tells source and example."""

    def __init__(self, number: int, examples: int) -> None:
        generator = np.random.default_rng(number)
        self.tokens_of, self.targets_of = [], []
        for index in range(examples):
            length = int(generator.integers(2, SEQ + 2))
            tokens = generator.integers(1, 50, size=length)
            tokens[0] = 100 * (number + 1) + index
            targets = (generator.random(length) < 0.6).astype(np.uint8)
            targets[-1] = 1
            self.tokens_of.append(tokens)
            self.targets_of.append(targets)

    def __len__(self) -> int:
        return len(self.tokens_of)

    def length(self, index: int) -> int:
        return len(self.tokens_of[index]) - 1

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens_of[index], self.targets_of[index]


SOURCES = [ToySource(0, 9), ToySource(1, 17), ToySource(2, 5)]
LAYOUT = BatchLayout(micro_batch_size=2, dp_rank=0, dp_size=1, pad_multiple=8, seq_length=SEQ)
# (micro-batch size, data-parallel size) that cut a global batch of 24
CUTS = [(24, 1), (1, 1), (2, 1), (3, 2), (2, 4), (4, 3)]


def picks(step: int = 0) -> Picks:
    sampler = BlendSampler([len(source) for source in SOURCES], 24, 7, 0.25)
    for _ in range(step):
        sampler.next(np.array([0.2, 0.5, 0.3]))
    return sampler.next(np.array([0.2, 0.5, 0.3]))


def cut(micro: int, dp: int, **options: object) -> list[MicroBatch]:
    """All ranks' micro-batches."""
    layouts = [
        replace(LAYOUT, micro_batch_size=micro, dp_size=dp, dp_rank=rank, **options)  # type: ignore[arg-type]
        for rank in range(dp)
    ]
    return [batch for layout in layouts for batch in micro_batches(SOURCES, picks(), layout)]


@pytest.mark.parametrize(("micro", "dp"), CUTS)
def test_every_cut_holds_the_same_examples(micro: int, dp: int) -> None:
    def content(batches: list[MicroBatch]) -> list[tuple]:
        return sorted(
            (int(b.tokens_BS[i, 0]), int(b.group_B[i]), int(b.mask_BS[i].sum()))
            for b in batches
            for i in range(len(b.group_B))
        )

    batches = cut(micro, dp)
    assert len(batches) == 24 // micro
    assert all(batch.tokens_BS.shape[0] == micro for batch in batches)
    assert content(batches) == content(cut(24, 1))
    assert sum(batch.tokens for batch in batches) == sum(b.tokens for b in cut(24, 1))


@pytest.mark.parametrize(("micro", "dp"), CUTS)
def test_padding_is_short_and_never_a_target(micro: int, dp: int) -> None:
    by_token = {int(s.tokens_of[i][0]): s.tokens_of[i] for s in SOURCES for i in range(len(s))}
    for batch in cut(micro, dp):
        longest = 0
        for line in range(micro):
            tokens = by_token[int(batch.tokens_BS[line, 0])]
            length = len(tokens) - 1
            longest = max(longest, length)
            assert batch.tokens_BS[line, :length].tolist() == tokens[:-1].tolist()
            assert batch.labels_BS[line, :length].tolist() == tokens[1:].tolist()
            assert not batch.mask_BS[line, length:].any()
            assert batch.padding_BS is not None
            assert (~batch.padding_BS[line]).nonzero().flatten().tolist() == list(range(length))
        width = batch.tokens_BS.shape[1]
        assert width == min(-(-longest // 8) * 8, SEQ)
        assert batch.positions_BS.shape == batch.labels_BS.shape == batch.mask_BS.shape


def test_like_lengths_share_a_micro_batch() -> None:
    lengths = [sorted((b.mask_BS * 0 + 1).sum(1).tolist()) for b in cut(4, 1)]
    assert lengths == sorted(lengths)
    # The n-th micro-batches of the ranks run side by side: as long as each other, about.
    widths = np.array([batch.tokens_BS.shape[1] for batch in cut(2, 4)]).reshape(4, -1)
    assert (widths.max(0) - widths.min(0) <= 8).all()


def test_interleaved_pipelines_get_one_length() -> None:
    assert {b.tokens_BS.shape[1] for b in cut(2, 2, fixed_length=True)} == {SEQ}


def test_context_parallel_ranks_hold_the_chunks_that_megatron_gives_them() -> None:
    assert [context_positions(16, rank, 2).tolist() for rank in range(2)] == [
        [0, 1, 2, 3, 12, 13, 14, 15],
        [4, 5, 6, 7, 8, 9, 10, 11],
    ]
    # Equal work: as many visible pairs of positions on every rank.
    pairs = {(context_positions(24, rank, 3) + 1).sum() for rank in range(3)}
    assert len(pairs) == 1


def test_context_parallel_ranks_hold_each_sequence_once() -> None:
    wholes = cut(4, 1, pad_multiple=4)
    parts = [cut(4, 1, pad_multiple=4, cp_rank=rank, cp_size=2) for rank in range(2)]
    for whole, *of_ranks in zip(wholes, *parts, strict=True):
        for name in ("tokens_BS", "labels_BS", "mask_BS", "positions_BS", "padding_BS"):
            together = torch.full_like(getattr(whole, name), -1)
            for part in of_ranks:
                together[:, part.positions_BS[0]] = getattr(part, name)
            assert together.equal(getattr(whole, name)), name
        assert sum(part.tokens for part in of_ranks) == whole.tokens


@pytest.mark.parametrize(("micro", "dp"), CUTS)
def test_packed_rows_hold_every_example_whole(micro: int, dp: int) -> None:
    held = []
    for batch in cut(micro, dp, packed=True, rows_multiple=dp):
        assert batch.tokens_BS.shape[0] == 1 and batch.tokens_BS.shape[1] <= micro * SEQ
        assert batch.lengths_B is not None and batch.padding_BS is not None
        assert batch.tokens == batch.lengths_B.sum() == (~batch.padding_BS).sum()
        assert batch.tokens_BS.shape[1] - batch.tokens < 8
        chosen, start = picks(), 0
        for member, group, length in zip(
            batch.member_B.tolist(), batch.group_B.tolist(), batch.lengths_B.tolist(), strict=True
        ):
            here = slice(start, start := start + length)
            tokens, targets = SOURCES[group].example(chosen.index_B[member])
            assert group == chosen.group_B[member]
            assert batch.tokens_BS[0, here].tolist() == tokens[:-1].tolist()
            assert batch.labels_BS[0, here].tolist() == tokens[1:].tolist()
            assert batch.mask_BS[0, here].tolist() == targets[1:].tolist()
            assert batch.positions_BS[0, here].tolist() == list(range(length))
            held.append(member)
        assert not batch.mask_BS[0, start:].any() and batch.padding_BS[0, start:].all()
    assert sorted(held) == list(range(24))


def test_packed_rows_are_few_and_level() -> None:
    lengths = np.random.default_rng(1).integers(1, 300, 64)
    rows = packed_rows(lengths, 600, 1)
    tokens = [int(lengths[row].sum()) for row in rows]
    assert len(rows) <= -(-lengths.sum() // 600) + 1  # as few as hold them, or one more
    assert max(tokens) <= 600 and max(tokens) - min(tokens) < 60 and tokens == sorted(tokens)
    for ranks in (2, 4):
        assert len(packed_rows(lengths, 600, ranks)) == -(-len(rows) // ranks) * ranks
    # A large one leaves no room for more, and there are as many rows as examples at most.
    assert packed_rows(np.array([9, 9, 9, 9]), 10, 2) == [[0], [1], [2], [3]]


def test_packed_rows_of_an_interleaved_pipeline_have_one_length() -> None:
    batches = cut(2, 1, packed=True, rows_multiple=2, fixed_length=True)
    assert {b.tokens_BS.shape for b in batches} == {(1, 2 * SEQ)} and len(batches) % 2 == 0
