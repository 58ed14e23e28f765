"""One bilevel step of `reweight`: data from the sources, then the core's step."""

from __future__ import annotations

from megatron_scalebio.core.scalebio import StepReport
from megatron_scalebio.progress import HERE
from megatron_scalebio.train.state import TrainState


def train_step(state: TrainState) -> StepReport:
    """One bilevel step of all ranks; advances `state` unless something was not finite or spiked."""
    HERE.step = state.step + 1
    bio, settings = state.training, state.schedule.at(state.step)
    with state.clock("data"):
        train, valid, picks, valid_picks = state.data.next(bio.mixture.probs_S)
    report = bio.step(
        train,
        valid,
        settings.lr_w,
        lr_u=settings.lr_u,
        lr_lambda=settings.lr_lambda,
        alpha=settings.alpha,
        inclusion=picks.inclusion_S,
        validation_inclusion=valid_picks.inclusion_S,
    )
    state.cost.trained += report.losses.tokens
    return report
