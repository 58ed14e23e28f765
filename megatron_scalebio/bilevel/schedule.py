"""α and the three learning rates of a step, as functions of the step alone.

α grows by `alpha_growth` (τ) from one outer round to the next and the rates shrink by it; within
the run they follow Megatron-Core's warm-up and decay. The mixture's rate is constant by default:
its weights are averaged, and intervals are read off a trajectory that keeps moving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_scalebio.config import Config


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
    def __init__(self, config: Config) -> None:
        self.bilevel, self.iters = config.bilevel, config.train.train_iters
        rates = config.optimizer
        self.style = rates.lr_decay_style
        self._scheduler = OptimizerParamScheduler(
            _Rates([]),
            init_lr=0.0,
            max_lr=rates.lr,
            min_lr=rates.min_lr,
            lr_warmup_steps=int(rates.lr_warmup_fraction * self.iters),
            lr_decay_steps=self.iters,
            lr_decay_style=rates.lr_decay_style,
            start_wd=rates.weight_decay,
            end_wd=rates.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        assert rates.min_lr is not None
        floor_share = rates.min_lr / rates.lr
        self._models = [
            {"max_lr": rate, "min_lr": floor_share * rate}
            for rate in (rates.lr, rates.lr_u or rates.lr)
        ]
        self._mixture = {"max_lr": self.bilevel.lr_lambda, "min_lr": 0.0}

    def at(self, step: int) -> StepSettings:
        # The scheduler's rate at 0 is zero (or init_lr): a step uses the rate it ends with.
        self._scheduler.num_steps = step + 1
        outer_round = step * self.bilevel.outer_rounds // self.iters
        growth = self.bilevel.alpha_growth**outer_round
        lr_w, lr_u = (self._rate(group, self.style) / growth for group in self._models)
        lr_lambda = self._rate(self._mixture, self.bilevel.lr_lambda_decay_style) / growth
        return StepSettings(self.bilevel.alpha * growth, outer_round, lr_w, lr_u, lr_lambda)

    def _rate(self, group: dict[str, Any], style: str) -> float:
        if group is self._mixture and style == "constant":
            return group["max_lr"]  # no warm-up: the first steps of λ are as good as any
        self._scheduler.lr_decay_style = style
        return self._scheduler.get_lr(group)
