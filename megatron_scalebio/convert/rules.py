"""How one tensor of Megatron is made of Hugging Face tensors, and taken apart again.

Each rule is a pair of inverse functions that only move elements, so a round trip changes no bit.
They work on meta tensors too: shapes can be asked for before anything is read.

Megatron's order of QKV rows: for each query group its heads' q rows, then its k, then its v rows.

    H hidden size, A attention heads, G query groups, C channels of a head, F width of the MLP
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """The sizes of a model's attention.

    Args:
        attention: query heads, A.
        groups: key/value heads, G, a divisor of A.
        channels: size of one head, C.
    """

    attention: int
    groups: int
    channels: int

    @property
    def rows(self) -> list[int]:
        """Rows of q, k and v."""
        kv = self.groups * self.channels
        return [self.attention * self.channels, kv, kv]


@dataclass(frozen=True)
class Rule:
    """A pair of inverse functions.

    Args:
        to_megatron: Hugging Face's tensors, in the table's order, to Megatron's one.
        to_hf: Megatron's tensor to Hugging Face's.
    """

    to_megatron: Callable[[Sequence[Tensor], Heads], Tensor]
    to_hf: Callable[[Tensor, Heads], list[Tensor]]


def _interleave(parts: Sequence[Tensor], heads: Heads) -> Tensor:
    """q (A·C, …), k and v (G·C, …) to Megatron's (A·C + 2·G·C, …)."""
    grouped = [part.reshape(heads.groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _deinterleave(whole: Tensor, heads: Heads) -> list[Tensor]:
    grouped = whole.reshape(heads.groups, -1, *whole.shape[1:])
    per_group = [rows // heads.groups for rows in heads.rows]
    return [part.flatten(0, 1) for part in grouped.split(per_group, dim=1)]


def _interleave_blocks(whole: Tensor, heads: Heads) -> Tensor:
    """Blocks q | k | v of rows to Megatron's order."""
    return _interleave(whole.split(heads.rows), heads)


def _to_blocks(whole: Tensor, heads: Heads) -> Tensor:
    return torch.cat(_deinterleave(whole, heads))


def _transpose(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous()


def _gates_above(pairs: Tensor) -> Tensor:
    """Rows that alternate, a gate and what it gates, to all gates above all others."""
    return torch.cat((pairs[::2], pairs[1::2]))


def _alternating(whole: Tensor) -> Tensor:
    return torch.stack(whole.chunk(2), dim=1).flatten(0, 1)


RULES = {
    "copy": Rule(lambda parts, heads: parts[0], lambda whole, heads: [whole]),
    # gate and up (F, H) of a gated MLP to (2·F, H).
    "stack_rows": Rule(
        lambda parts, heads: torch.cat(list(parts)), lambda whole, heads: list(whole.chunk(2))
    ),
    "qkv": Rule(_interleave, _deinterleave),
    # GPT-2's Conv1D holds (inputs, outputs).
    "transposed": Rule(
        lambda parts, heads: _transpose(parts[0]), lambda whole, heads: [_transpose(whole)]
    ),
    # gpt-oss's gates and ups (H, 2·F), and their biases (2·F), a gate before each up.
    "transposed_alternate": Rule(
        lambda parts, heads: _gates_above(parts[0].t()),
        lambda whole, heads: [_transpose(_alternating(whole))],
    ),
    "alternate": Rule(
        lambda parts, heads: _gates_above(parts[0]), lambda whole, heads: [_alternating(whole)]
    ),
    # GPT-2's (H, 3·H), its columns q | k | v.
    "transposed_qkv": Rule(
        lambda parts, heads: _interleave_blocks(parts[0].t(), heads),
        lambda whole, heads: [_transpose(_to_blocks(whole, heads))],
    ),
    # GPT-2's bias (3·H), its entries q | k | v.
    "fused_qkv": Rule(
        lambda parts, heads: _interleave_blocks(parts[0], heads),
        lambda whole, heads: [_to_blocks(whole, heads)],
    ),
}
