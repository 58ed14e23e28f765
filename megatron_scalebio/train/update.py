"""What follows a flush in every training: are the losses and gradients sound, step, count.

losses, reduced gradients ─▶ finite? no spike? ─no─▶ nothing moves, and why is said
                                               └yes▶ AdamW of w (and of u)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_scalebio import runtime
from megatron_scalebio.bilevel.objective import mixed
from megatron_scalebio.bilevel.schedule import StepSettings
from megatron_scalebio.bilevel.step import Losses, prepare_gradients
from megatron_scalebio.optim.builder import Period, set_rate
from megatron_scalebio.train.state import RunState


@dataclass(frozen=True)
class Update:
    """What an update did.

    Attributes:
        norms: norm of the gradient of "w" (and "u"), before clipping.
        skipped: why nothing was applied; None where it was.
    """

    norms: Mapping[str, float]
    skipped: str | None


def update_models(
    state: RunState,
    period: Period,
    settings: StepSettings,
    losses: Losses,
    watched: Mapping[str, float],
) -> Update:
    """Steps the models of a period, all or none, and counts the step. A collective.

    Args:
        watched: losses in which a spike shows, by the names of `spikes.WATCHED`.
    """
    options = state.config.optimizer
    norms = {
        name: prepare_gradients(optimizer, options.clip_grad)
        for name, optimizer in period.optimizers.items()
    }
    skipped = losses.culprit or None
    for name, norm in norms.items():
        if skipped is None and not math.isfinite(norm):
            skipped = f"{name}: gradient norm is {norm}"
    if skipped is None:
        of_norms = {f"{name}: gradient norm": norm for name, norm in norms.items()}
        skipped = state.spikes.judge({**watched, **of_norms})
    if skipped is None:
        for name, optimizer in period.optimizers.items():
            set_rate(optimizer, getattr(settings, f"lr_{name}"), options.weight_decay)
            optimizer.step_with_ready_grads()
    state.cost.trained += losses.tokens
    state.step += 1
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    return Update(norms, skipped and _with_names(skipped, state))


def step_w(
    state: RunState, period: Period, settings: StepSettings, losses: Losses, probs_S: torch.Tensor
) -> dict[str, Any]:
    """The same for w alone, trained on sources that weigh `probs_S`: the step's record."""
    loss = mixed(probs_S, losses.w_S, losses.inclusion_S)
    update = update_models(state, period, settings, losses, {"w: training loss": loss})
    return {
        "step": state.step,
        "lr_w": settings.lr_w,
        "train_loss_w": loss,
        "loss_w": losses.w_S.tolist(),
        "grad_norm_w": update.norms["w"],
        "tokens": losses.tokens,
        "memory_bytes": runtime.allocated_bytes(),
        "skipped": update.skipped,
        "active_layers": state.active_layers,
    }


def _with_names(skipped: str, state: RunState) -> str:
    """Puts the name of a source or validation set in place of its number."""
    for kind, sets in (
        ("source", state.data.sources),
        ("validation set", state.data.validation),
    ):
        head, found, tail = skipped.partition(f"{kind} ")
        if found:
            number, _, rest = tail.partition(" ")
            return f"{head}{kind} {sets[int(number)].name!r} {rest}"
    return skipped
