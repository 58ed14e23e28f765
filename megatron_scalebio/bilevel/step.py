"""One bilevel step: one pipeline flush, one reduction of losses, then u, w and λ together.

batches ─▶ flush: micro-batches of u on train, w on train, w on validation (one schedule call)
        ─▶ losses ℓ_i(u), ℓ_i(w), L1 summed over ranks, divided once
        ─▶ finite? ─no─▶ nothing is applied, the culprit is named
                   └yes▶ u and w by AdamW, λ by its hypergradient, all from the old point
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_scalebio import runtime
from megatron_scalebio.bilevel.objective import Role, role_scale
from megatron_scalebio.data.batch import MicroBatch
from megatron_scalebio.data.blend import Picks
from megatron_scalebio.guard.stragglers import FORWARD
from megatron_scalebio.model.twin import TwinModel
from megatron_scalebio.progress import HERE


@dataclass(frozen=True)
class Pass:
    """One micro-batch in one role, with the weight of each group in the objective."""

    role: Role
    batch: MicroBatch
    weight_G: torch.Tensor


@dataclass(frozen=True)
class Losses:
    """Losses of one global batch, equal on every rank; NaN where a source or set had no example.

    Attributes:
        u_S, w_S: ℓ_i(u), ℓ_i(w), float64.
        validation_V: loss of w on each validation set.
        inclusion_S, inclusion_V: probability that each is in a batch at all.
        tokens: real (not padded) tokens that went through the models.
        culprit: what was not finite, "" if nothing.
    """

    u_S: torch.Tensor
    w_S: torch.Tensor
    validation_V: torch.Tensor
    inclusion_S: torch.Tensor
    inclusion_V: torch.Tensor
    tokens: int
    culprit: str


def plan_passes(
    train: list[MicroBatch],
    validation: list[MicroBatch],
    probs_S: torch.Tensor,
    shares_V: torch.Tensor,
    alpha: float,
    u_is_w: bool = False,
) -> list[Pass]:
    """The passes of a step: u and w in turn on each training micro-batch, validation after them.

    Args:
        u_is_w: leave out w on training data, as u gives the same losses and gradients.
    """
    weights = {
        Role.TRAIN_U: probs_S * role_scale(Role.TRAIN_U, alpha),
        Role.TRAIN_W: probs_S * role_scale(Role.TRAIN_W, alpha),
        Role.VALID_W: shares_V * role_scale(Role.VALID_W, alpha),
    }
    train_roles = (Role.TRAIN_U,) if u_is_w else (Role.TRAIN_U, Role.TRAIN_W)
    passes = [Pass(role, batch, weights[role]) for batch in train for role in train_roles]
    return passes + [Pass(Role.VALID_W, batch, weights[Role.VALID_W]) for batch in validation]


def flush(
    twins: list[TwinModel], passes: list[Pass], micro_batch_size: int, **schedule: Any
) -> list[dict[str, Any]]:
    """Runs all passes forward and backward; returns their loss records on the last stage.

    Args:
        schedule: more arguments for Megatron's schedule, such as `forward_only`.
    """
    iterators = [iter(passes) for _ in twins]
    longest = max(p.batch.tokens_BS.shape[1] for p in passes)
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(twins) > 1 else iterators[0],
        model=twins,
        num_microbatches=len(passes),
        seq_length=longest * runtime.cp_size(),
        micro_batch_size=micro_batch_size,
        **schedule,
    )


def forward_step(passes: Iterator[Pass], twin: TwinModel) -> tuple[torch.Tensor, Any]:
    """Megatron's forward_step_func for one pass."""
    HERE.mark()
    this = next(passes)
    with FORWARD.running():
        output = twin(this.role is Role.TRAIN_U, **this.batch.inputs(runtime.device()))
    return output, partial(loss_func, this)


def loss_func(
    this: Pass, loss_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Σ over sequences of group weight · coefficient · summed token loss: part of the objective.

    The third return is the record: each sequence's part of its group's mean loss.
    """
    batch = this.batch
    # A padded position may hold anything, NaN included: select, do not multiply.
    mask_BS = batch.mask_BS.to(loss_BS.device) > 0
    # In float64: the hypergradient is a small difference of these sums.
    sum_B = torch.where(mask_BS, loss_BS.float(), 0.0).sum(dim=1, dtype=torch.float64)
    weight_B = this.weight_G[batch.group_B] * batch.coefficient_B
    objective = (sum_B * weight_B.to(sum_B.device)).sum().float()
    part_B = sum_B.detach() * batch.coefficient_B.to(sum_B.device)
    record = {"role": this.role, "group_B": batch.group_B, "part_B": part_B}
    return objective, torch.tensor(0, dtype=torch.int), record


def reduce_losses(
    records: list[dict[str, Any]],
    passes: list[Pass],
    train: Picks,
    validation: Picks | None = None,
) -> Losses:
    """Sums the records of all ranks into the mean losses of the global batch.

    Args:
        train, validation: the global batch; its inclusion is taken back out of the losses.
    """
    inclusion_S, absent_S = _inclusion(train)
    inclusion_V, absent_V = _inclusion(validation)
    sources, sets = len(inclusion_S), len(inclusion_V)
    sizes = {Role.TRAIN_U: sources, Role.TRAIN_W: sources, Role.VALID_W: sets}
    sums = {role: torch.zeros(n, dtype=torch.float64) for role, n in sizes.items()}
    tokens = torch.zeros(1, dtype=torch.float64)
    if runtime.reports_losses():
        for record in records:
            sums[record["role"]].index_add_(0, record["group_B"], record["part_B"].cpu())
        tokens += float(sum(p.batch.tokens for p in passes))
    flat = torch.cat([*sums.values(), tokens]).to(runtime.device())
    dist.all_reduce(flat)
    u_S, w_S, validation_V, tokens = flat.cpu().split([*sizes.values(), 1])
    culprit = _culprit(u_S, w_S, validation_V)
    return Losses(
        u_S=(u_S * inclusion_S).masked_fill(absent_S, math.nan),
        w_S=(w_S * inclusion_S).masked_fill(absent_S, math.nan),
        validation_V=(validation_V * inclusion_V).masked_fill(absent_V, math.nan),
        inclusion_S=inclusion_S,
        inclusion_V=inclusion_V,
        tokens=int(tokens.item()),
        culprit=culprit,
    )


def _inclusion(picks: Picks | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The inclusion of each group, and whether it is missing from the batch."""
    if picks is None:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool)
    inclusion_G = torch.from_numpy(picks.inclusion_S)
    counts_G = torch.bincount(torch.from_numpy(picks.group_B), minlength=len(inclusion_G))
    return inclusion_G, counts_G == 0


def _culprit(u_S: torch.Tensor, w_S: torch.Tensor, validation_V: torch.Tensor) -> str:
    for role, what, losses in (
        ("u", "source", u_S), ("w", "source", w_S), ("w", "validation set", validation_V),
    ):  # fmt: skip
        bad = torch.nonzero(~losses.isfinite())
        if len(bad):
            return f"{role}: loss of {what} {int(bad[0])} is {float(losses[bad[0]])}"
    return ""


def prepare_gradients(optimizer: MegatronOptimizer, clip_grad: float) -> float:
    """Makes the gradients ready to step with, clipped; returns their norm before clipping."""
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if clip_grad > 0 and math.isfinite(norm):
        for part in optimizer.chained_optimizers:
            if not part.is_stub_optimizer and part.get_parameters():
                clip_grad_by_total_norm_fp32(part.get_parameters(), clip_grad, norm)
    return norm
