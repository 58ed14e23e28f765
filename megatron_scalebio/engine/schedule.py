"""α and the three learning rates of a step, as functions of the step alone.

α grows by `alpha_growth` (τ) from one outer round to the next and the rates shrink by it; within
the run they follow Megatron-Core's warm-up and decay. The mixture's rate is constant by default:
its weights are averaged, and intervals are read off a trajectory that keeps moving.
"""

from dataclasses import dataclass
from types import SimpleNamespace
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


class Schedule:
    """The settings of every step of a run, whose `train_iters` is known."""

    def __init__(self, config: Config) -> None:
        self._iters, self._bilevel = config.train.train_iters, config.bilevel
        rates, lr, min_lr = config.optimizer, config.optimizer.lr, config.optimizer.min_lr
        assert min_lr is not None
        self._style = rates.lr_decay_style
        self._scheduler = OptimizerParamScheduler(
            SimpleNamespace(param_groups=[]),  # all that it asks of an optimizer
            init_lr=0.0,
            max_lr=lr,
            min_lr=min_lr,
            lr_warmup_steps=int(rates.lr_warmup_fraction * self._iters),
            lr_decay_steps=self._iters,
            lr_decay_style=self._style,
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        # u's floor is in proportion.
        peaks = (lr, rates.lr_u or lr)
        self._models = [{"max_lr": peak, "min_lr": min_lr / lr * peak} for peak in peaks]
        self._mixture = {"max_lr": self._bilevel.lr_lambda, "min_lr": 0.0}

    def at(self, step: int) -> StepSettings:
        # The scheduler's rate at 0 is zero (or init_lr): a step uses the rate it ends with.
        self._scheduler.num_steps = step + 1
        bilevel = self._bilevel
        outer_round = step * bilevel.outer_rounds // self._iters
        growth = bilevel.alpha_growth**outer_round
        lr_w, lr_u = (self._rate(group, self._style) / growth for group in self._models)
        lr_lambda = self._rate(self._mixture, bilevel.lr_lambda_decay_style) / growth
        return StepSettings(bilevel.alpha * growth, outer_round, lr_w, lr_u, lr_lambda)

    def _rate(self, group: dict[str, Any], style: str) -> float:
        if group is self._mixture and style == "constant":
            return group["max_lr"]  # no warm-up: the first steps of λ are as good as any
        self._scheduler.lr_decay_style = style
        return self._scheduler.get_lr(group)
