"""Turns a global batch of picks into this data-parallel rank's micro-batches.

    picks of a global batch  →  sorted by length  →  dealt in rows of micro_batch · dp  →  padded

Sequences of like length share a micro-batch, so little is padded, and every rank's n-th
micro-batch is about as long. The objective is a sum over the global batch: neither the order nor
the padding changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_scalebio.data.blend import Floats, Ints, Picks
from megatron_scalebio.data.sources import Source


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together, padded on the right.

    Under context parallelism S is this rank's part of each sequence (`context_positions`).

    Attributes:
        tokens_BS, labels_BS: ids, int64.
        mask_BS: 1 where the label is a target, float32.
        positions_BS: position ids, int64.
        group_B: source or validation set of each sequence, int64.
        member_B: its place in the global batch, int64.
        coefficient_B: of each sequence's summed token loss in its group's mean loss, float64.
        tokens: input tokens here, padding left out.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    mask_BS: torch.Tensor
    positions_BS: torch.Tensor
    group_B: torch.Tensor
    member_B: torch.Tensor
    coefficient_B: torch.Tensor
    tokens: int

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor | None]:
        """The arguments of Megatron's GPTModel, whose output is then the loss of each label."""
        return {
            "input_ids": self.tokens_BS.to(device, non_blocking=True),
            "position_ids": self.positions_BS.to(device, non_blocking=True),
            "attention_mask": None,
            "labels": self.labels_BS.to(device, non_blocking=True),
        }


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is cut.

    Attributes:
        pad_multiple: padded lengths are a multiple of it.
        cp_rank, cp_size: this rank's part of each sequence.
        fixed_length: pad every micro-batch to `seq_length` (interleaved pipelines).
    """

    micro_batch_size: int
    dp_rank: int
    dp_size: int
    pad_multiple: int
    seq_length: int
    fixed_length: bool = False
    cp_rank: int = 0
    cp_size: int = 1


def mean_coefficients(
    group_B: Ints,
    targets_B: Ints,
    inclusion_S: Floats,
    loss_mean: str,
) -> Floats:
    """Coefficient of each sequence's summed token loss in its group's mean loss ℓ_i.

    Args:
        group_B: source (or validation set) of each sequence of the global batch.
        targets_B: target tokens of each sequence.
        inclusion_S: probability that a group is in a batch at all; its inverse corrects the
            estimate where a batch is smaller than the number of groups (Horvitz-Thompson).
        loss_mean: "sample", the mean over a group's sequences of their token means, or "token",
            the mean over all target tokens of the group.
    """
    groups = len(inclusion_S)
    if loss_mean == "token":
        per_group = np.bincount(group_B, weights=targets_B, minlength=groups)
        return 1.0 / (per_group[group_B] * inclusion_S[group_B])
    per_group = np.bincount(group_B, minlength=groups)
    return 1.0 / (per_group[group_B] * targets_B * inclusion_S[group_B])


def context_positions(length: int, rank: int, size: int) -> Ints:
    """The positions of a sequence that a context-parallel rank holds, in Megatron's order.

    Of 2 · size chunks the rank-th from either end: causal attention then costs all ranks alike.
    """
    if size == 1:
        return np.arange(length)
    return np.arange(length).reshape(2 * size, -1)[[rank, -1 - rank]].ravel()


def micro_batches(
    sources: Sequence[Source], picks: Picks, layout: BatchLayout, loss_mean: str
) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch, coefficients normalised over all of it."""
    length_B = np.array(
        [sources[g].length(i) for g, i in zip(picks.group_B, picks.index_B, strict=True)]
    )
    order = np.argsort(length_B, kind="stable")
    row = layout.micro_batch_size * layout.dp_size
    start = layout.dp_rank * layout.micro_batch_size
    mine = order.reshape(-1, row)[:, start : start + layout.micro_batch_size]
    needed = np.arange(len(order)) if loss_mean == "token" else mine.ravel()
    examples = {b: sources[picks.group_B[b]].example(picks.index_B[b]) for b in needed}
    targets_B: Ints = np.ones(len(order), dtype=np.int64)
    for b, (_, targets) in examples.items():
        targets_B[b] = targets[1:].sum()
    coefficient_B = mean_coefficients(picks.group_B, targets_B, picks.inclusion_S, loss_mean)
    result = []
    for members in mine:
        longest = int(length_B[members].max())
        if layout.fixed_length:
            longest = layout.seq_length
        padded = min(-(-longest // layout.pad_multiple) * layout.pad_multiple, layout.seq_length)
        tokens_BS = np.zeros((len(members), padded + 1), dtype=np.int64)
        mask_BS = np.zeros((len(members), padded + 1), dtype=np.float32)
        for line, b in enumerate(members):
            tokens, targets = examples[b]
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
                coefficient_B=torch.from_numpy(coefficient_B[members]),
                tokens=int((held_S < length_B[members, None]).sum()),
            )
        )
    return result
