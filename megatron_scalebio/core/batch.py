"""Micro-batches as the step takes them, and the means of losses over a global batch.

A step needs three things of a micro-batch: the source of each sequence, which labels count, and
whatever the model is called with. Anything that has them will do (`Batch`); `MicroBatch` is what
Megatron's GPTModel is called with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from megatron_scalebio.compat.gpt_inputs import (
    labelled_losses,
    labelled_positions,
    packed_params,
    sent,
)
from megatron_scalebio.core.collectives import device, summed


class Batch(Protocol):
    """What a step needs of a micro-batch; equal on all ranks of a model-parallel group.

    Attributes:
        group_B: source, or validation set, of each sequence, int64 on the CPU.
        mask_BS: above 0 where the label counts, on the CPU. Under context parallelism S is this
            rank's part of each sequence.
        tokens: input tokens without padding, for reports.

    A packed micro-batch also has `lengths_B` (see `MicroBatch`).
    """

    @property
    def group_B(self) -> torch.Tensor: ...
    @property
    def mask_BS(self) -> torch.Tensor: ...
    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through a GPT model together, padded on the right.

    Under context parallelism S is this rank's part of each sequence. Packed, they follow each other
    in one row (1 × S), none attends to another, and the padding is at the row's end.

    Attributes:
        tokens_BS, labels_BS: token ids, int64.
        mask_BS: 1 where the label is a target, float32.
        positions_BS: position ids, int64.
        group_B: source or validation set of each sequence, int64.
        tokens: number of input tokens, without padding; for reports.
        padding_BS: true at padding positions, for the routers of a mixture of experts; None: there
            are none.
        member_B: place of each sequence in the global batch, int64; a step does not use it.
        lengths_B: of a packed micro-batch, the number of tokens of each sequence, int64.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    mask_BS: torch.Tensor
    positions_BS: torch.Tensor
    group_B: torch.Tensor
    tokens: int = 0
    member_B: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    padding_BS: torch.Tensor | None = None
    lengths_B: torch.Tensor | None = None

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """The arguments of Megatron's GPTModel, whose output is then the loss of each label."""
        inputs: dict[str, Any] = {
            "input_ids": sent(self.tokens_BS, device),
            "position_ids": sent(self.positions_BS, device),
            "attention_mask": None,
            "labels": sent(self.labels_BS, device),
        }
        if self.lengths_B is not None:
            padded = self.tokens_BS.size(1)
            inputs["packed_seq_params"] = packed_params(self.lengths_B, padded, device)
        return inputs


def sequence_sums(values_BS: torch.Tensor, batch: Any) -> torch.Tensor:
    """The sum over each sequence of a batch, [B] float64."""
    lengths_B = getattr(batch, "lengths_B", None)
    if lengths_B is None:
        return values_BS.sum(dim=1, dtype=torch.float64)
    parts = values_BS.flatten()[: int(lengths_B.sum())].split(lengths_B.tolist())
    return torch.stack([part.sum(dtype=torch.float64) for part in parts])


def gpt_losses(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The default forward pass, of a `MicroBatch` through a GPTModel.

    Returns:
        The loss of each label that counts, [B, S], on the last pipeline stage; else what the next
        one takes.
    """
    gpt: Any = unwrap_model(model)
    there = next(model.parameters()).device
    inputs = batch.inputs(there)
    padding_BS = getattr(batch, "padding_BS", None)
    if padding_BS is not None and gpt.config.num_moe_experts:
        inputs["padding_mask"] = _for_routers(padding_BS, gpt)
    last = getattr(gpt, "post_process", False)
    if last and (place_N := labelled_positions(batch.mask_BS)) is not None:
        inputs["output_processor"] = labelled_losses
        inputs["output_processor_context"] = sent(place_N, there)
    return model(**inputs)


def _for_routers(padding_BS: torch.Tensor, gpt: Any) -> torch.Tensor:
    """A stage's padding, of its own part of the sequences where tensor ranks share them.

    The first pipeline stage takes its part by itself.
    """
    ranks = gpt.pg_collection.tp
    padding_BS = sent(padding_BS, device())
    if gpt.config.sequence_parallel and not gpt.pre_process:
        return padding_BS.chunk(ranks.size(), dim=1)[ranks.rank()]
    return padding_BS


def mean_coefficients(
    batches: Sequence[Batch], num_groups: int, loss_mean: str, groups: ProcessGroupCollection
) -> list[torch.Tensor]:
    """Coefficient of each sequence's summed token loss in its group's mean loss ℓ_i.

    The means are over the global batch: all micro-batches of all data-parallel ranks, whose counts
    are summed here. A sequence without a target counts nowhere. A collective.

    Args:
        batches: this rank's micro-batches of one global batch.
        num_groups: sources, or validation sets.
        loss_mean: "sample", the mean over a group's sequences of their token means, or "token",
            the mean over all target tokens of the group.

    Returns:
        For each micro-batch [B], float64.

    Raises:
        ValueError: if a group is none of them, or the ranks have unequal numbers of micro-batches.
    """
    targets = [sequence_sums(batch.mask_BS > 0, batch) for batch in batches]
    sizes = [len(each) for each in targets]
    flat_B = summed(torch.cat(targets), groups.cp) if targets else torch.zeros(0).double()
    group_B = torch.cat([batch.group_B for batch in batches]) if targets else flat_B.long()
    if bool(((group_B < 0) | (group_B >= num_groups)).any()):
        raise ValueError(f"group_B holds {group_B.tolist()}, the groups are 0 to {num_groups - 1}")
    counted_B = flat_B if loss_mean == "token" else (flat_B > 0).double()
    count_G = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, group_B, counted_B)
    # With them goes the number of micro-batches: a rank that has more would wait for ever.
    count_G, passes = summed(
        torch.cat([count_G, torch.tensor([float(len(batches))]).double()]), groups.dp
    ).split([num_groups, 1])
    if int(passes) != len(batches) * groups.dp.size():
        raise ValueError(
            f"{len(batches)} micro-batches here, {int(passes)} on {groups.dp.size()} data-parallel "
            "ranks: all need as many"
        )
    # 1 / count of the group, and for the mean of means 1 / count of the sequence.
    each_B = 1.0 if loss_mean == "token" else flat_B.clamp_min(1)
    coefficient_B = torch.where(flat_B > 0, 1.0 / (count_G[group_B].clamp_min(1) * each_B), 0.0)
    return list(coefficient_B.split(sizes))
