"""α and the three learning rates of a step, as functions of the step alone.

α grows by `alpha_growth` (τ) from one outer round to the next and the rates shrink by it; within
the run all three rates share Megatron-Core's warm-up and decay.
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
        self._groups = [
            {"max_lr": rates.lr, "min_lr": rates.min_lr},
            {"max_lr": rates.lr_u or rates.lr, "min_lr": rates.min_lr},
            {"max_lr": self.bilevel.lr_lambda, "min_lr": 0.0},
        ]

    def at(self, step: int) -> StepSettings:
        # The scheduler's rate at 0 is zero (or init_lr): a step uses the rate it ends with.
        self._scheduler.num_steps = step + 1
        outer_round = step * self.bilevel.outer_rounds // self.iters
        growth = self.bilevel.alpha_growth**outer_round
        lr_w, lr_u, lr_lambda = (self._scheduler.get_lr(g) / growth for g in self._groups)
        return StepSettings(self.bilevel.alpha * growth, outer_round, lr_w, lr_u, lr_lambda)
