"""Attention over sequences that context-parallel ranks share.

A rank holds the queries of two chunks of each sequence, chunks r and 2 · cp − 1 − r of 2 · cp
(`data.batch.context_positions`). It gathers the keys and values of all ranks, and each of its
chunks attends to those up to its own end. The gather's gradient sums each rank's part over the
ranks that used it.

Legend: S sequence, B batch, G key/value heads, D head size.
"""

from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch.distributed import ProcessGroup


def whole_sequences(
    key_SBGD: torch.Tensor, value_SBGD: torch.Tensor, group: ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all positions in their order, from each rank's part of them."""
    size = group.size()
    both = torch.cat((key_SBGD, value_SBGD), dim=-1)
    chunks = gather_from_sequence_parallel_region(both, group=group).chunk(2 * size)
    # Gathered in the order of ranks, two chunks of each.
    first = [chunks[2 * rank] for rank in range(size)]
    second = [chunks[2 * rank + 1] for rank in reversed(range(size))]
    key, value = torch.cat(first + second).split((key_SBGD.size(-1), value_SBGD.size(-1)), dim=-1)
    return key, value


def chunk_spans(length: int, group: ProcessGroup) -> Iterator[tuple[slice, slice]]:
    """For each chunk of this rank, of two: its place in the `length` here; all up to its end."""
    size, rank, chunk = group.size(), group.rank(), length // 2
    for here, place in enumerate((rank, 2 * size - 1 - rank)):
        yield slice(here * chunk, (here + 1) * chunk), slice((place + 1) * chunk)
