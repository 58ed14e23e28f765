"""Losses without training: of single tokens, of examples, of whole held-out sets; any layout.

    every example once ─▶ micro-batches of like length ─▶ forward flush ─▶ sums over ranks ─▶ means

Of a set both means are given: over examples of their token means (as `loss_mean: sample` trains)
and over all target tokens (whose exponential is the perplexity).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.core.batch import gpt_losses, sequence_sums
from megatron_scalebio.core.collectives import of_first_rank, reports_losses
from megatron_scalebio.core.twin import forget_weight_copies
from megatron_scalebio.data.batch import BatchLayout, MicroBatch, micro_batches
from megatron_scalebio.data.sources import Source
from megatron_scalebio.mixture.sampler import Ints, Picks
from megatron_scalebio.progress import PROGRESS

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

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": math.exp(min(self.token_mean, 700.0))}


@dataclass(frozen=True)
class ExampleLosses:
    """Losses of N examples, float64, in their order; equal on all ranks.

    Attributes:
        sum_N: summed over an example's target tokens, in nats.
        targets_N: its target tokens.
        tokens: input tokens of all, padding left out.
    """

    sum_N: torch.Tensor
    targets_N: torch.Tensor
    tokens: int

    @property
    def mean_N(self) -> torch.Tensor:
        return self.sum_N / self.targets_N.clamp_min(1)


def held_out_losses(
    chunks: Sequence[torch.nn.Module],
    sets: Sequence[Source],
    config: Config,
    layout: BatchLayout,
    limit: int | None = None,
) -> list[HeldOutLoss]:
    """Losses of this rank's model chunks on every set; rank 0's on all ranks. A collective.

    Args:
        limit: at most so many examples of each set, the first ones.
    """
    means = torch.zeros(len(sets), 2, dtype=torch.float64)  # over examples, over tokens
    counts = []
    for mean_2, source in zip(means, sets, strict=True):
        index_N = np.arange(min(len(source), limit or len(source)))
        losses = example_losses(chunks, source, index_N, config, layout)
        targets = int(losses.targets_N.sum())
        mean_2[0], mean_2[1] = losses.mean_N.mean(), losses.sum_N.sum() / max(targets, 1)
        counts.append((len(index_N), targets))
    return [
        HeldOutLoss(source.name, sample_mean, token_mean, *count)
        for source, (sample_mean, token_mean), count in zip(
            sets, of_first_rank(means).tolist(), counts, strict=True
        )
    ]


def example_losses(
    chunks: Sequence[torch.nn.Module],
    source: Source,
    index_N: Ints,
    config: Config,
    layout: BatchLayout,
) -> ExampleLosses:
    """The loss of each of a source's examples. A collective."""
    return example_losses_of([chunks], source, index_N, config, layout)[0]


def example_losses_of(
    models: Sequence[Sequence[torch.nn.Module]],
    source: Source,
    index_N: Ints,
    config: Config,
    layout: BatchLayout,
) -> list[ExampleLosses]:
    """The same of several models, for which the examples are read once."""
    sums_M2N = torch.zeros(len(models), 2, len(index_N), dtype=torch.float64)
    tokens_M = torch.zeros(len(models), dtype=torch.float64)
    for place_N, batches in flushes(source, index_N, config, layout):
        for model, chunks in enumerate(models):
            for batch, loss_BS in token_losses(chunks, batches):
                counted_B = batch.group_B == 0
                place_B = torch.from_numpy(place_N)[batch.member_B[counted_B]]
                sums_M2N[model, 0, place_B] = sequence_sums(loss_BS, batch)[counted_B]
                sums_M2N[model, 1, place_B] = sequence_sums(batch.mask_BS > 0, batch)[counted_B]
                tokens_M[model] += batch.tokens
    flat = torch.cat([sums_M2N.flatten(), tokens_M]).to(runtime.device())
    dist.all_reduce(flat)
    sums, tokens_M = flat.cpu().split([sums_M2N.numel(), len(models)])
    each = zip(*sums.view_as(sums_M2N).unbind(1), tokens_M.tolist(), strict=True)
    return [ExampleLosses(sum_N, targets_N, int(tokens)) for sum_N, targets_N, tokens in each]


@torch.no_grad()
def token_losses(
    chunks: Sequence[torch.nn.Module], batches: list[MicroBatch]
) -> list[tuple[MicroBatch, torch.Tensor]]:
    """The loss of every target token [B, S], float64 on the CPU, zero elsewhere. A collective.

    One flush, forward only and in evaluation mode. Every micro-batch with its losses on the rank
    that reports those of its replica (`reports_losses`); an empty list on other ranks.
    """
    with evaluating(chunks), PROGRESS.at("evaluate"):
        records = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=max(batch.tokens_BS.shape[1] for batch in batches) * runtime.cp_size(),
            micro_batch_size=len(batches[0].tokens_BS),
            forward_only=True,
        )
    if not reports_losses(ProcessGroupCollection.use_mpu_process_groups()):
        return []
    return [(record["batch"], _kept(record["batch"], record["loss_BS"])) for record in records]


@contextmanager
def evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """A block of passes without dropout."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, modes, strict=True):
            chunk.train(training)
        forget_weight_copies(chunks)


def flushes(
    source: Source, index_N: Ints, config: Config, layout: BatchLayout
) -> Iterator[tuple[Ints, list[MicroBatch]]]:
    """All examples, shortest first, in flushes; filled up with examples of group 1, not counted.

    Interleaved pipelines need as many micro-batches as a multiple of their stages. Each flush
    comes with the places of its examples in `index_N`.
    """
    stages = config.parallel.pipeline_model_parallel_size
    row = layout.micro_batch_size * layout.dp_size
    order = np.argsort([source.length(int(index)) for index in index_N], kind="stable")
    for start in range(0, len(order), row * stages * _PASSES_PER_FLUSH):
        place_B = order[start : start + row * stages * _PASSES_PER_FLUSH]
        missing = -len(place_B) % (row * stages)
        group_B = np.repeat([0, 1], [len(place_B), missing])
        place_B = np.concatenate([place_B, np.repeat(place_B[:1], missing)])
        picks = Picks(group_B, index_N[place_B], np.ones(2))
        with runtime.refused_together():
            batches = micro_batches([source, source], picks, layout)
        yield place_B, batches


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Any, Any]:
    PROGRESS.mark()
    batch = next(batches)
    return gpt_losses(model, batch), partial(_keep, batch)


def _keep(
    batch: MicroBatch, loss_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """They stay on the device until the flush ends: each copy would wait for what is queued."""
    nothing = torch.tensor(0, dtype=torch.int)
    return loss_BS.sum().float(), nothing, {"batch": batch, "loss_BS": loss_BS}


def _kept(batch: MicroBatch, loss_BS: torch.Tensor) -> torch.Tensor:
    # A padded position may hold anything, NaN included: select, do not multiply.
    return torch.where(batch.mask_BS > 0, loss_BS.cpu().double(), 0.0)
