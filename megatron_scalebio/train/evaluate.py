"""Held-out loss of a model on whole example sets, under any parallel layout.

    every example once ─▶ micro-batches of like length ─▶ forward flush ─▶ sums over ranks ─▶ means

Both means are given: over examples of their token means (as `loss_mean: sample` trains) and over
all target tokens (whose exponential is the perplexity).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.data.batch import BatchLayout, MicroBatch, micro_batches
from megatron_scalebio.data.blend import Picks
from megatron_scalebio.data.sources import Source
from megatron_scalebio.progress import HERE

_PASSES_PER_FLUSH = 64


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss of one set, in nats.

    Attributes:
        sample_mean: mean over examples of their mean over target tokens.
        token_mean: mean over all target tokens.
        examples, target_tokens: how many.
    """

    name: str
    sample_mean: float
    token_mean: float
    examples: int
    target_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.token_mean, 700.0))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity}


def held_out_losses(
    chunks: Sequence[torch.nn.Module],
    sets: Sequence[Source],
    config: Config,
    layout: BatchLayout,
    limit: int | None = None,
) -> list[HeldOutLoss]:
    """Losses of this rank's model chunks on every set; equal on all ranks. A collective.

    Args:
        limit: at most so many examples of each set, the first ones.
    """
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    with HERE.at("evaluate"):
        result = [_loss_of(chunks, source, config, layout, limit) for source in sets]
    for chunk, training in zip(chunks, modes, strict=True):
        chunk.train(training)
    return result


@torch.no_grad()
def _loss_of(
    chunks: Sequence[torch.nn.Module],
    source: Source,
    config: Config,
    layout: BatchLayout,
    limit: int | None,
) -> HeldOutLoss:
    count = min(len(source), limit or len(source))
    sums = torch.zeros(3, dtype=torch.float64)  # of token means, of token losses, of tokens
    for batches in _flushes(source, count, config, layout):
        records = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=max(batch.tokens_BS.shape[1] for batch in batches),
            micro_batch_size=config.train.micro_batch_size,
            forward_only=True,
        )
        if runtime.reports_losses():
            sums += sum(record["sums"].cpu() for record in records)
    sums = sums.to(runtime.device())
    dist.all_reduce(sums)
    of_means, of_losses, tokens = sums.tolist()
    return HeldOutLoss(
        source.name, of_means / count, of_losses / max(tokens, 1), count, int(tokens)
    )


def _flushes(
    source: Source, count: int, config: Config, layout: BatchLayout
) -> Iterator[list[MicroBatch]]:
    """All examples, shortest first, in flushes; filled up with examples of group 1, not counted.

    Interleaved pipelines need as many micro-batches as a multiple of their stages.
    """
    stages = config.parallel.pipeline_model_parallel_size
    row = layout.micro_batch_size * layout.dp_size
    order = np.argsort([source.length(index) for index in range(count)], kind="stable")
    for start in range(0, count, row * stages * _PASSES_PER_FLUSH):
        index_B = order[start : start + row * stages * _PASSES_PER_FLUSH]
        missing = -len(index_B) % (row * stages)
        group_B = np.repeat([0, 1], [len(index_B), missing])
        index_B = np.concatenate([index_B, np.repeat(index_B[:1], missing)])
        picks = Picks(group_B, index_B, np.ones(2))
        with runtime.refused_together():
            batches = micro_batches([source, source], picks, layout, "sample")
        yield batches


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Any, Any]:
    HERE.mark()
    batch, device = next(batches), runtime.device()
    output = model(
        input_ids=batch.tokens_BS.to(device, non_blocking=True),
        position_ids=batch.positions_BS.to(device, non_blocking=True),
        attention_mask=None,
        labels=batch.labels_BS.to(device, non_blocking=True),
    )
    return output, partial(_sums, batch)


def _sums(
    batch: MicroBatch, loss_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    counted_B1 = (batch.group_B == 0).unsqueeze(1)
    mask_BS = ((batch.mask_BS > 0) & counted_B1).to(loss_BS.device)
    loss_B = torch.where(mask_BS, loss_BS.float(), 0.0).sum(dim=1, dtype=torch.float64)
    tokens_B = mask_BS.sum(dim=1)
    means_B = loss_B / tokens_B.clamp_min(1)
    sums = torch.stack([means_B.sum(), loss_B.sum(), tokens_B.sum().double()])
    return loss_B.sum().float(), torch.tensor(0, dtype=torch.int), {"sums": sums}
