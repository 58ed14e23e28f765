"""The `reweight` loop: data → flush → check → updates → log → save.

Read top to bottom; the mathematics is in `bilevel.objective`, the flush in `bilevel.step`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from megatron_scalebio.bilevel import step as bilevel
from megatron_scalebio.bilevel.objective import Role, hypergradient, mixed, role_scale
from megatron_scalebio.bilevel.schedule import StepSettings
from megatron_scalebio.progress import HERE
from megatron_scalebio.train.state import TrainState
from megatron_scalebio.train.update import update_models


@dataclass
class StepResult:
    """What one step measured; `skipped` says why it was not applied."""

    settings: StepSettings
    losses: bilevel.Losses
    probs_S: torch.Tensor
    grad_norms: Mapping[str, float]  # of "w" and "u"
    grad_norm_lambda: float = math.nan
    skipped: str | None = None
    time_s: dict[str, float] = field(default_factory=dict)


class Stopwatch:
    """Wall time of the phases of a step, in seconds."""

    def __init__(self) -> None:
        self.time_s: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with HERE.at(name):
            yield
        self.time_s[name] = self.time_s.get(name, 0.0) + time.perf_counter() - start


def train_step(state: TrainState) -> StepResult:
    """One bilevel step of all ranks; advances `state` unless something was not finite or spiked."""
    watch = Stopwatch()
    HERE.step = state.step + 1
    settings = state.schedule.at(state.step)
    probs_S = state.mixture.probs_S
    with watch.phase("data"):
        train, valid, picks, valid_picks = state.data.next(probs_S)
        shares_V = torch.from_numpy(state.data.shares_V)
    with watch.phase("period"):
        period = state.enter_period()
        period.zero_grad()
        once = state.u_is_w and state.flush_takes(len(train) + len(valid))
        passes = bilevel.plan_passes(train, valid, probs_S, shares_V, settings.alpha, once)
    with watch.phase("flush"):
        records = bilevel.flush(period.twins, passes, state.config.train.micro_batch_size)
        losses = bilevel.reduce_losses(records, passes, picks, valid_picks)
        if once:
            period.add_gradients_of_u(role_scale(Role.TRAIN_W, settings.alpha))
            losses = replace(losses, w_S=losses.u_S)
    with watch.phase("update"):
        watched = _watched_losses(state, probs_S, losses)
        update = update_models(state, period, settings, losses, watched)
    result = StepResult(
        settings, losses, probs_S, update.norms, skipped=update.skipped, time_s=watch.time_s
    )
    with watch.phase("mixture"):
        if result.skipped is None:
            excess_S = losses.w_S - losses.u_S
            gradient_S = hypergradient(excess_S, probs_S, losses.inclusion_S, settings.alpha)
            result.grad_norm_lambda = state.mixture.step(gradient_S, settings.lr_lambda)
    return result


def _watched_losses(
    state: TrainState, probs_S: torch.Tensor, losses: bilevel.Losses
) -> dict[str, float]:
    """The losses in which a spike shows, by the names of `spikes.WATCHED`."""
    of_w, of_u = (mixed(probs_S, each_S, losses.inclusion_S) for each_S in (losses.w_S, losses.u_S))
    shares_V = torch.from_numpy(state.data.shares_V)
    return {
        "w: training loss": of_w,
        "u: training loss": of_u,
        "w: validation loss": mixed(shares_V, losses.validation_V, losses.inclusion_V),
        "w and u: distance of their training losses": abs(of_w - of_u),
    }
