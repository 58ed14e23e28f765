"""One pipeline flush for a whole bilevel step, and the losses it leaves.

micro-batches of u on train, w on train, w on validation ─▶ one call of Megatron's schedule
    ─▶ gradients of u and w, reduced      (each starts its reduction in its own last pass)
    ─▶ losses ℓ_i(u), ℓ_i(w), L1 summed over ranks, divided once
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scalebio.core.batch import Batch, mean_coefficients, sequence_sums
from megatron_scalebio.core.collectives import device, reports_losses, summed
from megatron_scalebio.core.twin import TwinModel, finalize_twin_grads
from megatron_scalebio.mixture.objective import Role

# Is given the name of a part of a step, and entered for as long as it lasts.
Observer = Callable[[str], AbstractContextManager[Any]]


def unobserved(part: str) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Pass:
    """One micro-batch in one role.

    Attributes:
        coefficient_B: of each sequence's summed token loss in its group's mean loss, float64.
        weight_B: of that in the objective, float64.
        router_scale: of the losses of a mixture's routers, in this rank's part of the objective.
        last: no later pass of the step goes through the same model.
        target_BS: where labels count, on the device [of the batch's mask].
    """

    role: Role
    batch: Any  # a Batch, and whatever the forward pass takes of it
    coefficient_B: torch.Tensor
    weight_B: torch.Tensor
    router_scale: float = 0.0
    last: bool = False
    target_BS: torch.Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """Mean losses of one global batch, equal on every rank; NaN where a group had no example.

    Attributes:
        u_S, w_S: ℓ_i(u), ℓ_i(w), float64.
        validation_V: loss of w on each validation set.
        tokens: real (not padded) tokens that went through the models.
        culprit: what was not finite, "" if nothing.
        parts: on a rank that reports losses, its passes, each with its sequences' parts, [B].
    """

    u_S: torch.Tensor
    w_S: torch.Tensor
    validation_V: torch.Tensor
    tokens: int
    culprit: str
    parts: Sequence[tuple[Pass, torch.Tensor]] = ()


def passes_of(
    scales: Mapping[Role, float],
    batches: Sequence[Batch],
    weight_G: torch.Tensor,
    loss_mean: str,
    groups: ProcessGroupCollection,
) -> list[Pass]:
    """The passes of a global batch, each micro-batch in all roles in turn. A collective.

    Args:
        scales: the roles, and what the loss of each counts in the objective.
        weight_G: of each source, or validation set, in the loss.
    """
    coefficients = mean_coefficients(batches, len(weight_G), loss_mean, groups)
    micro_batches = len(batches) * groups.dp.size()
    return [
        Pass(
            role, batch, each_B, (weight_G * scale)[batch.group_B] * each_B,
            0.0 if role is Role.VALID_W else scale / micro_batches,
        )
        for batch, each_B in zip(batches, coefficients, strict=True)
        for role, scale in scales.items()
    ]  # fmt: skip


def flush(
    twins: list[TwinModel],
    passes: Sequence[Pass],
    groups: ProcessGroupCollection,
    observe: Observer = unobserved,
    **schedule: Any,
) -> list[dict[str, Any]]:
    """Runs all passes forward and backward; returns their loss records on the last stage.

    Args:
        observe: entered with "forward" around each forward pass.
        schedule: more arguments for Megatron's schedule, such as `forward_only`.

    Raises:
        ValueError: if the micro-batches' shapes differ where a pipeline can't tell.
    """
    passes = _sent_ahead(_last_ones_marked(passes))
    shapes = [each.batch.mask_BS.shape for each in passes]
    _require_sendable(shapes, twins[0].config, groups)
    iterators = [iter(passes) for _ in twins]
    for twin in twins:
        twin.hold_reduction()
    with _hooks_of_a_flush(twins[0].config):
        return get_forward_backward_func()(
            forward_step_func=partial(forward_step, observe=observe),
            data_iterator=iterators if len(twins) > 1 else iterators[0],
            model=twins,
            num_microbatches=len(passes),
            seq_length=max(columns for _, columns in shapes) * groups.cp.size(),
            micro_batch_size=shapes[0][0],
            **schedule,
        )


def _require_sendable(
    shapes: Sequence[torch.Size], config: TransformerConfig, groups: ProcessGroupCollection
) -> None:
    """Refuses what pipeline stages would send each other in the wrong shape."""
    if groups.pp.size() > 1 and len(set(shapes)) > 1 and not config.variable_seq_lengths:
        raise ValueError(
            f"micro-batches of shapes {sorted(map(tuple, set(shapes)))} in one step of a pipeline: "
            "pad them to one, or set variable_seq_lengths in the model's configuration"
        )


def _last_ones_marked(passes: Sequence[Pass]) -> list[Pass]:
    last = {each.role is Role.TRAIN_U: number for number, each in enumerate(passes)}
    return [replace(each, last=n in last.values()) for n, each in enumerate(passes)]


def _sent_ahead(passes: Sequence[Pass]) -> list[Pass]:
    """With what the losses take on the device.

    A copy between a forward and its backward pass would wait for all that is queued before it.
    """
    there = device()
    numbers = [torch.stack([each.coefficient_B, each.weight_B]) for each in passes]
    targets = [each.batch.mask_BS > 0 for each in passes]
    numbers_2B = torch.cat(numbers, 1).to(there).split([each.size(1) for each in numbers], 1)
    flat = torch.cat([each.flatten() for each in targets]).to(there)
    targets_BS = flat.split([each.numel() for each in targets])
    return [
        replace(
            each, coefficient_B=sent_2B[0], weight_B=sent_2B[1], target_BS=flat_BS.view_as(shape)
        )
        for each, sent_2B, flat_BS, shape in zip(
            passes, numbers_2B, targets_BS, targets, strict=True
        )
    ]


@contextmanager
def _hooks_of_a_flush(config: TransformerConfig) -> Iterator[None]:
    """What the schedules look up in a model's configuration, for as long as the twins run."""
    ours = {
        "finalize_model_grads_func": finalize_twin_grads,
        # A twin starts the reduction of each of its models by itself.
        "no_sync_func": None, "grad_sync_func": None, "param_sync_func": None,
    }  # fmt: skip
    theirs = {name: getattr(config, name) for name in ours}
    try:
        for name, hook in ours.items():
            setattr(config, name, hook)
        yield
    finally:
        for name, hook in theirs.items():
            setattr(config, name, hook)


def forward_step(
    passes: Iterator[Pass], twin: TwinModel, observe: Observer = unobserved
) -> tuple[torch.Tensor, Any]:
    """Megatron's forward_step_func for one pass."""
    this = next(passes)
    with observe("forward"):
        output = twin(this.role is Role.TRAIN_U, this.batch, this.last, this.router_scale)
    return output, partial(loss_func, this)


def loss_func(
    this: Pass, loss_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Σ over sequences of weight · summed token loss: part of the objective.

    The third return is the record: each sequence's part of its group's mean loss.
    """
    target_BS = this.batch.mask_BS > 0 if this.target_BS is None else this.target_BS
    coefficient_B, weight_B = (x.to(loss_BS.device) for x in (this.coefficient_B, this.weight_B))
    # A padded position may hold anything, NaN included: select, do not multiply.
    kept_BS = torch.where(target_BS.to(loss_BS.device), loss_BS.float(), 0.0)
    # In float64: the hypergradient is a small difference of these sums.
    sum_B = sequence_sums(kept_BS, this.batch)
    objective = (sum_B * weight_B).sum().float()
    record = {
        "role": this.role, "group_B": this.batch.group_B,
        "part_B": sum_B.detach() * coefficient_B,
        "counts_B": coefficient_B > 0,  # not without a target
    }  # fmt: skip
    return objective, torch.tensor(0, dtype=torch.int), record


def reduce_losses(
    records: Sequence[dict[str, Any]],
    passes: Sequence[Pass],
    num_sources: int,
    num_validation: int,
    groups: ProcessGroupCollection,
) -> Losses:
    """Sums the records of all ranks into the mean losses of the global batch. A collective."""
    sizes = {
        Role.TRAIN_U: num_sources, Role.TRAIN_W: num_sources, Role.VALID_W: num_validation
    }  # fmt: skip
    sums = {role: torch.zeros(2, n, dtype=torch.float64) for role, n in sizes.items()}
    tokens, parts = torch.zeros(1, dtype=torch.float64), []
    if reports_losses(groups):
        pairs = [torch.stack([each["part_B"], each["counts_B"].double()]) for each in records]
        on_cpu = torch.cat(pairs, 1).cpu().split([each.size(1) for each in pairs], 1)
        for record, both_2B in zip(records, on_cpu, strict=True):
            sums[record["role"]].index_add_(1, record["group_B"], both_2B)
        parts = [(each, part_B) for each, (part_B, _) in zip(passes, on_cpu, strict=True)]
        tokens += float(sum(each.batch.tokens for each in passes))
    flat = summed(torch.cat([*(each.flatten() for each in sums.values()), tokens]))
    *each, tokens = flat.split([*(2 * n for n in sizes.values()), 1])
    means = [one.view(2, n) for one, n in zip(each, sizes.values(), strict=True)]
    u_S, w_S, validation_V = (loss_G for loss_G, _ in means)
    culprit = _culprit(u_S, w_S, validation_V)
    for loss_G, count_G in means:
        loss_G.masked_fill_(count_G == 0, math.nan)
    return Losses(u_S, w_S, validation_V, int(tokens.item()), culprit, parts)


def _culprit(u_S: torch.Tensor, w_S: torch.Tensor, validation_V: torch.Tensor) -> str:
    for role, what, losses in (
        ("u", "source", u_S), ("w", "source", w_S), ("w", "validation set", validation_V),
    ):  # fmt: skip
        bad = torch.nonzero(~losses.isfinite())
        if len(bad):
            return f"{role}: loss of {what} {int(bad[0])} is {float(losses[bad[0]])}"
    return ""
