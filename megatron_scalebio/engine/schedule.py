"""α and the three learning rates of a step, as functions of the step alone.

α grows by `alpha_growth` (τ) from one outer round to the next and the rates shrink by it; within
the run they follow Megatron-Core's warm-up and decay. The mixture's rate is constant by default:
its weights are averaged, and intervals are read off a trajectory that keeps moving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(frozen=True)
class StepSettings:
    """What a step (counted from 0) runs with."""

    alpha: float
    outer_round: int
    lr_w: float
    lr_u: float
    lr_lambda: float


class _Rates:
    """Stands for an optimizer: OptimizerParamScheduler only reads and writes its param_groups."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups


class Schedule:
    """The settings of every step of a run.

    Args:
        iters: steps of the run.
        lr, lr_u, lr_lambda: peak rates of w, u [that of w] and the mixture.
        min_lr: floor of w's rate; u has one in proportion.
        warmup_fraction: share of the steps in which the rates of w and u rise.
        decay_style: "constant", "linear" or "cosine", of w and u.
        lambda_decay_style: the same of the mixture.
        alpha, alpha_growth, outer_rounds: α, and what it is multiplied by from round to round.
    """

    def __init__(
        self,
        iters: int,
        *,
        lr: float,
        min_lr: float,
        lr_u: float | None,
        warmup_fraction: float,
        decay_style: str,
        lr_lambda: float,
        lambda_decay_style: str,
        alpha: float,
        alpha_growth: float,
        outer_rounds: int,
    ) -> None:
        self.iters = iters
        self._alpha, self._growth, self._rounds = alpha, alpha_growth, outer_rounds
        self._style, self._lambda_style = decay_style, lambda_decay_style
        self._scheduler = OptimizerParamScheduler(
            _Rates([]),
            init_lr=0.0,
            max_lr=lr,
            min_lr=min_lr,
            lr_warmup_steps=int(warmup_fraction * iters),
            lr_decay_steps=iters,
            lr_decay_style=decay_style,
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self._models = [{"max_lr": rate, "min_lr": min_lr / lr * rate} for rate in (lr, lr_u or lr)]
        self._mixture = {"max_lr": lr_lambda, "min_lr": 0.0}

    def at(self, step: int) -> StepSettings:
        # The scheduler's rate at 0 is zero (or init_lr): a step uses the rate it ends with.
        self._scheduler.num_steps = step + 1
        outer_round = step * self._rounds // self.iters
        growth = self._growth**outer_round
        lr_w, lr_u = (self._rate(group, self._style) / growth for group in self._models)
        lr_lambda = self._rate(self._mixture, self._lambda_style) / growth
        return StepSettings(self._alpha * growth, outer_round, lr_w, lr_u, lr_lambda)

    def _rate(self, group: dict[str, Any], style: str) -> float:
        if group is self._mixture and style == "constant":
            return group["max_lr"]  # no warm-up: the first steps of λ are as good as any
        self._scheduler.lr_decay_style = style
        return self._scheduler.get_lr(group)
