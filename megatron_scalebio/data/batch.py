"""Turns a global batch of picks into this data-parallel rank's micro-batches.

    picks of a global batch  →  sorted by length  →  dealt in rows of micro_batch · dp  →  padded
                             →  or packed: each micro-batch is one row of several sequences

Sequences of like length share a micro-batch, so little is padded, and every rank's n-th
micro-batch is about as long. The objective is a sum over the global batch: neither the order nor
the padding changes it, nor which sequences share a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_scalebio.core.batch import MicroBatch
from megatron_scalebio.data.packing import packed_rows
from megatron_scalebio.data.sources import Source
from megatron_scalebio.mixture.sampler import Ints, Picks


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is cut.

    Attributes:
        pad_multiple: padded lengths are a multiple of it.
        cp_rank, cp_size: this rank's part of each sequence.
        fixed_length: pad every micro-batch to `seq_length` (interleaved pipelines).
        packed: rows of several sequences, of as many tokens as a micro-batch has at most.
        rows_multiple: the number of packed rows is a multiple of it.
    """

    micro_batch_size: int
    dp_rank: int
    dp_size: int
    pad_multiple: int
    seq_length: int
    fixed_length: bool = False
    cp_rank: int = 0
    cp_size: int = 1
    packed: bool = False
    rows_multiple: int = 1


def context_positions(length: int, rank: int, size: int) -> Ints:
    """The positions of a sequence that a context-parallel rank holds, in Megatron's order.

    Of 2 · size chunks the rank-th from either end: causal attention then costs all ranks alike.
    """
    if size == 1:
        return np.arange(length)
    return np.arange(length).reshape(2 * size, -1)[[rank, -1 - rank]].ravel()


def micro_batches(sources: Sequence[Source], picks: Picks, layout: BatchLayout) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch."""
    length_B = np.array(
        [sources[g].length(i) for g, i in zip(picks.group_B, picks.index_B, strict=True)]
    )
    if layout.packed:
        most = layout.micro_batch_size * layout.seq_length
        rows = packed_rows(length_B, most, layout.rows_multiple)
        padded_to = most if layout.fixed_length else layout.pad_multiple
        return [
            _packed(sources, picks, np.array(members), length_B[members], padded_to, most)
            for members in rows[layout.dp_rank :: layout.dp_size]
        ]
    order = np.argsort(length_B, kind="stable")
    row = layout.micro_batch_size * layout.dp_size
    start = layout.dp_rank * layout.micro_batch_size
    mine = order.reshape(-1, row)[:, start : start + layout.micro_batch_size]
    result = []
    for members in mine:
        longest = int(length_B[members].max())
        if layout.fixed_length:
            longest = layout.seq_length
        padded = min(-(-longest // layout.pad_multiple) * layout.pad_multiple, layout.seq_length)
        tokens_BS = np.zeros((len(members), padded + 1), dtype=np.int64)
        mask_BS = np.zeros((len(members), padded + 1), dtype=np.float32)
        for line, b in enumerate(members):
            tokens, targets = sources[picks.group_B[b]].example(picks.index_B[b])
            tokens_BS[line, : len(tokens)] = tokens
            mask_BS[line, : len(targets)] = targets
        held_S = context_positions(padded, layout.cp_rank, layout.cp_size)
        result.append(
            MicroBatch(
                tokens_BS=torch.from_numpy(tokens_BS.take(held_S, axis=1)),
                labels_BS=torch.from_numpy(tokens_BS.take(held_S + 1, axis=1)),
                mask_BS=torch.from_numpy(mask_BS.take(held_S + 1, axis=1)),
                positions_BS=torch.from_numpy(held_S).expand(len(members), -1),
                group_B=torch.from_numpy(picks.group_B[members]),
                member_B=torch.from_numpy(members),
                padding_BS=torch.from_numpy(held_S >= length_B[members, None]),
                tokens=int((held_S < length_B[members, None]).sum()),
            )
        )
    return result


def _packed(
    sources: Sequence[Source],
    picks: Picks,
    members: Ints,
    length_B: Ints,
    pad_multiple: int,
    most: int,
) -> MicroBatch:
    """One row of sequences, each with its own positions."""
    filled = int(length_B.sum())
    padded = min(-(-filled // pad_multiple) * pad_multiple, most)
    row = MicroBatch(
        tokens_BS=torch.zeros(1, padded, dtype=torch.int64),
        labels_BS=torch.zeros(1, padded, dtype=torch.int64),
        mask_BS=torch.zeros(1, padded),
        positions_BS=torch.zeros(1, padded, dtype=torch.int64),
        group_B=torch.from_numpy(picks.group_B[members]),
        member_B=torch.from_numpy(members),
        padding_BS=torch.arange(padded)[None] >= filled,
        tokens=filled,
        lengths_B=torch.from_numpy(length_B),
    )
    start = 0
    for b, length in zip(members, length_B.tolist(), strict=True):
        tokens, targets = sources[picks.group_B[b]].example(picks.index_B[b])
        here = (0, slice(start, start + length))
        row.tokens_BS[here] = torch.from_numpy(tokens[:-1].astype(np.int64))
        row.labels_BS[here] = torch.from_numpy(tokens[1:].astype(np.int64))
        row.mask_BS[here] = torch.from_numpy(targets[1:].astype(np.float32))
        row.positions_BS[here] = torch.arange(length)
        start += length
    return row
