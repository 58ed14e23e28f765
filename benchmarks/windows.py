"""Attention over a sliding window: in blocks against a mask of the whole sequence, CPU time.

    python benchmarks/windows.py

One layer's attention of 8 query heads in 2 groups, forward and backward, on one thread; medians of
five in turns. "explicit": scores that are soft-capped, which no fused kernel takes.
"""

from __future__ import annotations

import statistics
import time
from unittest import mock

import torch
from common import table

from megatron_scalebio.model import attention

HEAD, HEADS, GROUPS, TURNS = 64, 8, 2, 5


def layer(window: int, softcap: float | None) -> attention.SdpaAttention:
    made = attention.SdpaAttention.__new__(attention.SdpaAttention)
    torch.nn.Module.__init__(made)
    made.window, made.softcap, made.dropout = window, softcap, 0.0
    made.softmax_offset = made.softmax_scale = None
    return made


def seconds(sequence: int, window: int, softcap: float | None) -> float:
    query, *others = (
        torch.randn(sequence, 1, heads, HEAD, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    began = time.thread_time()
    layer(window, softcap)._attend(query, *others).sum().backward()
    return time.thread_time() - began


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for sequence, window in ((2048, 512), (4096, 128), (4096, 512), (4096, 1024), (8192, 1024)):
        ratios = []
        for softcap in (None, 50.0):
            whole, blocks = [], []
            for _ in range(TURNS):
                with mock.patch.object(attention, "_LEAST_BLOCK", sequence):
                    whole.append(seconds(sequence, window, softcap))
                blocks.append(seconds(sequence, window, softcap))
            ratios.append(f"{statistics.median(blocks) / statistics.median(whole):.2f}")
        rows.append([str(sequence), str(window), *ratios])
    print(table(["sequence", "window", "blocks / whole, fused", "explicit"], rows))


if __name__ == "__main__":
    main()
