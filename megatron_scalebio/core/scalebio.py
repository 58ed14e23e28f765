"""ScaleBiO: learns the mixture of data sources while it trains the model (arXiv 2406.19976).

    bio = ScaleBiO(BilevelOptions(), sources=names, model_provider=..., ddp=..., optimizer=...)
    sampler = BlendSampler(sizes, batch_size, seed)
    for step in range(steps):
        picks = sampler.next(bio.weights)
        report = bio.step(train, validation, lr=schedule(step), inclusion=picks.inclusion_S)
    bio.intervals()

One step is one pipeline flush: u on each training micro-batch, w on the same, w on validation; then
u, w and λ move together, each by its gradient at the old point.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_scalebio.core.batch import Batch
from megatron_scalebio.core.flush import Losses, Pass, passes_of
from megatron_scalebio.core.options import BilevelOptions
from megatron_scalebio.core.training import Training
from megatron_scalebio.core.twin import ModelProvider
from megatron_scalebio.mixture.confidence import (
    MIN_TAIL_STEPS,
    Verdict,
    WeightIntervals,
    judge_convergence,
    weight_intervals,
)
from megatron_scalebio.mixture.constraints import Constraints
from megatron_scalebio.mixture.goals import Goals
from megatron_scalebio.mixture.levels import Levels
from megatron_scalebio.mixture.mixture import Mixture
from megatron_scalebio.mixture.objective import Role, hypergradient, mixed, role_scale
from megatron_scalebio.mixture.sampler import Floats


@dataclass(frozen=True)
class StepReport:
    """What one step measured, equal on all ranks.

    Attributes:
        step: number of this step, from 1.
        weights_S: p before the step, float64.
        shares_V: weights of the validation sets in L1, float64.
        losses: ℓ_i(u), ℓ_i(w) and the losses of the validation sets, before the step.
        train_loss_w, train_loss_u: L2(w), L2(u).
        validation_loss: L1(w).
        grad_norms: of "w" and "u", before clipping.
        grad_norm_lambda: norm of Jᵀ g; NaN where the step was not applied.
        alpha, lr_w, lr_u, lr_lambda: the values that the step used.
        skipped: why the step was not applied; None if it was.
    """

    step: int
    weights_S: torch.Tensor
    shares_V: torch.Tensor
    losses: Losses
    train_loss_w: float
    train_loss_u: float
    validation_loss: float
    grad_norms: Mapping[str, float]
    grad_norm_lambda: float
    alpha: float
    lr_w: float
    lr_u: float
    lr_lambda: float
    skipped: str | None


class ScaleBiO(Training):
    """w, u and the mixture λ: the bilevel optimizer.

    Args:
        sources: names of the S data sources, in the order of their numbers in the batches.
        model_provider, ddp, optimizer, **training: as in `Training`.
        validation: weight of each validation set in L1, by name, in the order of their numbers.
        goals: how the sets' losses are combined [their mean by the weights in `validation`].
        initial_weights: of the sources, normalised here [equal ones].
        constraints: bounds, prior and ratios of the weights [none].
        levels: groups of sources that also learn weights as groups [none].

    Attributes:
        mixture: λ and its trajectory.
        goals: the weights of the validation sets.

    Raises:
        ValueError: if the weights are no weights, a name is there twice, or as of `Training`.
    """

    def __init__(
        self,
        options: BilevelOptions,
        sources: Sequence[str],
        model_provider: ModelProvider,
        ddp: DistributedDataParallelConfig,
        optimizer: OptimizerConfig,
        *,
        validation: Mapping[str, float] | None = None,
        initial_weights: Sequence[float] | None = None,
        constraints: Constraints | None = None,
        levels: Levels | None = None,
        goals: Goals | None = None,
        **training: Any,
    ) -> None:
        validation = {"validation": 1.0} if validation is None else validation
        initial = [1.0] * len(sources) if initial_weights is None else list(initial_weights)
        if len(set(sources)) != len(sources) or len(initial) != len(sources):
            raise ValueError(f"{len(initial)} initial weights for sources {list(sources)}")
        _require_shares("initial_weights", initial)
        _require_shares("validation", list(validation.values()))
        super().__init__(
            model_provider, ddp, optimizer,
            with_u=True, resync_interval=options.resync_interval,
            memory_growth=options.memory_growth, **training,
        )  # fmt: skip
        self.options, self.sources = options, list(sources)
        self.goals = goals or Goals(list(validation.values()))
        self.mixture = Mixture(initial, options.mixture_optimizer, constraints, levels)

    @property
    def weights(self) -> Floats:
        """p, the mixture as it is now, [S]. `intervals` has the weights to report."""
        return self.mixture.probs_S.numpy()

    def step(
        self,
        train: Sequence[Batch],
        validation: Sequence[Batch],
        lr: float,
        *,
        lr_u: float | None = None,
        lr_lambda: float | None = None,
        alpha: float | None = None,
        inclusion: Floats | None = None,
        validation_inclusion: Floats | None = None,
    ) -> StepReport:
        """One bilevel step of all ranks. A collective.

        Args:
            train, validation: this data-parallel rank's micro-batches, as many on every rank.
            lr, lr_u: learning rates of w and u [of u: lr].
            lr_lambda, alpha: learning rate of the mixture [of the options], and α [`grown_alpha`].
            inclusion, validation_inclusion: probability that each source, or validation set, is in
                a batch at all, from `Picks` [1: all are].

        Raises:
            ValueError: if there is no micro-batch, or one that does not fit (see `Batch`).
        """
        if not train or not validation:
            raise ValueError("a step needs training and validation micro-batches")
        rates = {"w": lr, "u": lr if lr_u is None else lr_u}
        lr_lambda = self.options.rate if lr_lambda is None else lr_lambda
        alpha = self.grown_alpha(self.options.alpha) if alpha is None else alpha
        for name, value in {**rates, "lr_lambda": lr_lambda, "alpha": alpha}.items():
            if not 0 <= value < math.inf or (name == "alpha" and value == 0):
                raise ValueError(f"{name} is {value}")
        probs_S, shares_V = self.mixture.probs_S, self.goals.shares_V
        inclusion_S, inclusion_V = (
            torch.ones_like(each) if given is None else torch.as_tensor(np.asarray(given))
            for each, given in ((probs_S, inclusion), (shares_V, validation_inclusion))
        )
        for of_X, given_X in ((probs_S, inclusion_S), (shares_V, inclusion_V)):
            if given_X.shape != of_X.shape or not ((given_X > 0) & (given_X <= 1)).all():
                raise ValueError(f"inclusion {given_X.tolist()}, not {len(of_X)} probabilities")
        with self.observe("period"):
            period = self.enter_period()
            period.zero_grad()
            # After a reset u gives w's losses and gradients too.
            shared = self.u_is_w and self.flush_takes(len(train) + len(validation))
            passes = self.passes(
                train, validation, probs_S / inclusion_S, shares_V / inclusion_V, alpha, shared
            )
        with self.observe("flush"):
            losses = self.flush(passes, len(probs_S), len(shares_V))
            if shared:
                period.add_gradients_of_u(role_scale(Role.TRAIN_W, alpha))
                losses = replace(losses, w_S=losses.u_S)
        loss_w, loss_u = (mixed(probs_S, of_S, inclusion_S) for of_S in (losses.w_S, losses.u_S))
        loss_V = mixed(shares_V, losses.validation_V, inclusion_V)
        watched = {
            "w: training loss": loss_w,
            "u: training loss": loss_u,
            "w: validation loss": loss_V,
            "w and u: distance of their training losses": abs(loss_w - loss_u),
        }
        norm_lambda = math.nan

        def learn() -> None:
            nonlocal norm_lambda
            excess_S = losses.w_S - losses.u_S
            gradient_S = hypergradient(excess_S, probs_S, inclusion_S, alpha)
            norm_lambda = self.mixture.step(gradient_S, lr_lambda, self.memory)
            self.goals.step(losses.validation_V)

        learned = [self.mixture.logits_S, self.goals.sums_2V.view(-1)]
        with self.observe("update"):
            update = self.update(losses, watched, rates, learned, learn)
        return StepReport(
            self.steps, probs_S, shares_V, losses, loss_w, loss_u, loss_V, update.norms,
            norm_lambda, alpha, rates["w"], rates["u"], lr_lambda, update.skipped,
        )  # fmt: skip

    def grown_alpha(self, alpha: float) -> float:
        """α of the next step: it grows with u's memory, as a finite one moves the best mixture."""
        return alpha * math.sqrt(self.memory)

    def passes(
        self,
        train: Sequence[Batch],
        validation: Sequence[Batch],
        weight_S: torch.Tensor,
        weight_V: torch.Tensor,
        alpha: float,
        shared: bool = False,
    ) -> list[Pass]:
        """The passes of a step: u and w in turn on each training micro-batch, then validation.

        w goes first where u's tokens go where w's do.

        Args:
            weight_S, weight_V: of each source and validation set, over its inclusion.
            shared: u's passes alone, which give w's losses and gradients too where u is w.
        """
        mean, groups = self.options.loss_mean, self.groups
        roles = sorted(Role, reverse=self.model_config.moe_enable_routing_replay)
        scales = {role: role_scale(role, alpha) for role in roles}
        on_validation = {Role.VALID_W: scales.pop(Role.VALID_W)}
        if shared:
            del scales[Role.TRAIN_W]
        on_train = passes_of(scales, train, weight_S, mean, groups)
        return on_train + passes_of(on_validation, validation, weight_V, mean, groups)

    def intervals(
        self,
        validation_examples: float | None = None,
        draw_SS: torch.Tensor | None = None,
        lookalikes: list[list[int]] | None = None,
    ) -> WeightIntervals:
        """The learned weights, averaged over the last steps, and how sure they are.

        Args:
            validation_examples: size of the validation set, whose sampling error is then included.
            draw_SS: covariance of the weights from that sampling, if it was measured, as in
                `weight_intervals`.
            lookalikes: groups of sources of which only the sum of weights is known [those that the
                steps could not tell apart; near the answer they may include sources that differ].
        """
        tail, level = self._tail(), self.options.confidence
        alike = self.mixture.lookalike_groups(tail) if lookalikes is None else lookalikes
        found = weight_intervals(tail, level, validation_examples, alike, draw_SS)
        kept = self.mixture.constraints
        return found if kept is None else kept.narrow(found)

    def verdict(
        self,
        constant_rate: bool = True,
        validation_examples: float | None = None,
        draw_SS: torch.Tensor | None = None,
        lookalikes: list[list[int]] | None = None,
    ) -> Verdict:
        """Whether the weights have converged by now, and why or why not.

        Args:
            constant_rate: lr_lambda was the same over the averaged steps.
            validation_examples, draw_SS, lookalikes: as of `intervals`.
        """
        tail = self._tail()
        groups = self.mixture.lookalike_groups(tail) if lookalikes is None else lookalikes
        kept = self.mixture.constraints
        free = [i for i in range(len(self.sources)) if kept is None or kept.free_S[i]]
        return judge_convergence(
            tail[:, free],
            [self.sources[i] for i in free],
            block_length=self.mixture.trajectory.block_length,
            tolerance=self.options.tolerance,
            confidence=self.options.confidence,
            constant_rate=constant_rate,
            validation_examples=validation_examples,
            lookalikes=[[free.index(i) for i in group if i in free] for group in groups],
            unless=self.short_memory(),
            draw_SS=draw_SS if draw_SS is None else draw_SS[free][:, free],
        )

    def short_memory(self) -> str:
        """Why weights that stand still may not be the answer yet: "" once u's memory has grown.

        Whole resets leave a bias where the validation set is not made of the sources. The weights
        stand still there, until memory grows.
        """
        end = self.whole_resets_end
        if self.steps * (1 - self.options.average_fraction) >= end:
            return ""
        return (
            f"the averaged steps begin before u's memory grows, at step {end}; until then weights "
            "can stand still beside the answer, where the validation set is not made of the sources"
        )

    @property
    def fewest_steps(self) -> float:
        """Of a run whose weights may be called converged; infinite if all steps are averaged."""
        share = self.options.average_fraction
        before = self.whole_resets_end / (1 - share) if share < 1 else math.inf
        return max(MIN_TAIL_STEPS / share, before if self.whole_resets_end else 0)

    def _tail(self) -> torch.Tensor:
        return self.mixture.trajectory.tail(self.options.average_fraction)

    def made_for(self) -> dict[str, Any]:
        return {"sources": self.sources}

    def common_state(self) -> dict[str, Any]:
        learned = {"mixture": self.mixture.state_dict(), "goals": self.goals.sums_2V.clone()}
        return {**super().common_state(), **learned}

    def load_common_state(self, state: Mapping[str, Any]) -> None:
        super().load_common_state(state)
        self.mixture.load_state_dict(state["mixture"])
        if "goals" in state:  # checkpoints of earlier versions have none
            self.goals.sums_2V.copy_(state["goals"])


def _require_shares(name: str, values: Sequence[float]) -> None:
    if not all(0 <= value < math.inf for value in values) or not sum(values) > 0:
        raise ValueError(f"{name} is {values}: weights are numbers from 0 on, and one is above 0")
