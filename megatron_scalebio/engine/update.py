"""A step of w alone, in every training but ScaleBiO's: flush, update, the step's record."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_scalebio import runtime
from megatron_scalebio.core.batch import Batch
from megatron_scalebio.core.flush import Losses, passes_of
from megatron_scalebio.engine.state import RunState
from megatron_scalebio.mixture.objective import Role, mixed
from megatron_scalebio.mixture.sampler import Picks


def train_on(
    state: RunState,
    batches: Sequence[Batch],
    picks: Picks,
    probs_S: torch.Tensor,
    learned: Sequence[torch.Tensor] = (),
) -> dict[str, Any]:
    """One step of w on a global batch whose sources weigh `probs_S`; its record.

    Args:
        batches: this rank's part of the batch.
        learned: as of `Training.update`.
    """
    training = state.training
    with state.clock("period"):
        training.enter_period().zero_grad()
        weight_S = probs_S / torch.from_numpy(picks.inclusion_S)
        mean = state.config.data.loss_mean
        passes = passes_of({Role.TRAIN_W: 1.0}, batches, weight_S, mean, training.groups)
    with state.clock("flush"):
        losses = training.flush(passes, len(probs_S))
    return step_w(state, losses, picks, probs_S, learned)


def step_w(
    state: RunState,
    losses: Losses,
    picks: Picks,
    probs_S: torch.Tensor,
    learned: Sequence[torch.Tensor] = (),
) -> dict[str, Any]:
    """Steps w with the gradients at hand, unless something was not finite or spiked; the record.

    Args:
        learned: as of `Training.update`.
    """
    settings = state.schedule.at(state.step)
    loss = mixed(probs_S, losses.w_S, torch.from_numpy(picks.inclusion_S))
    with state.clock("update"):
        update = state.training.update(
            losses, {"w: training loss": loss}, {"w": settings.lr_w}, learned
        )
    state.cost.trained += losses.tokens
    return {
        "step": state.step,
        "lr_w": settings.lr_w,
        "train_loss_w": loss,
        "loss_w": losses.w_S.tolist(),
        "grad_norm_w": update.norms["w"],
        "tokens": losses.tokens,
        "memory_bytes": runtime.allocated_bytes(),
        "skipped": update.skipped and with_names(update.skipped, state),
        "active_layers": state.training.active_layers,
    }


def with_names(skipped: str, state: RunState) -> str:
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
