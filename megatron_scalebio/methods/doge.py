"""DoGE (Fan et al. 2023, arXiv 2310.15393) for a target of its own: weights by gradient alignment.

The out-of-domain variant, whose target is the validation set. α starts uniform, every source has
as many examples in a step. At step t

    W_i = ⟨g_i, g⟩ / m       g_i = ∇ℓ_i, g = ∇L1, each clipped to norm `clip_grad`
    α'  = α · exp(η W / μ),   α = α' / Σ α'
    the model descends with Σ α_i g_i                       under the new α

and the weights are the average of α over the steps. Clipping, m (the mean norm of the g_i) and a
bound of 5 on W are not in the paper's algorithm but in its published code; without m nothing
moves where gradients are small. m is taken from the step before (‖g‖ at first): so each g_i can be
added to the sum, times α'_i, as soon as it is known, and no two gradients of sources are held.

η / μ is `domain_lr` times the decay of the learning rate. The paper's 5e-4 / 0.05 for 10,000 steps
is brought to the run's number of steps: 100 / train_iters, at most 1, above which the noise of
single batches decides. With a literal η = lr the weights of a short run, or of fine-tuning at
1e-5, would stay where they are.

A source has as many whole micro-batches in a step as fit its share of `global_batch_size`, at
least one.

Every source is a flush of its own: a step of S sources fills and drains the pipeline S + 1 times.
Under LISA the gradients are those of the active layers.
"""

import math
from pathlib import Path
from typing import Any

import torch

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.core.collectives import of_first_rank
from megatron_scalebio.core.flush import Losses, Pass, flush, passes_of, reduce_losses
from megatron_scalebio.core.period import Period
from megatron_scalebio.data.batch import MicroBatch, micro_batches
from megatron_scalebio.engine.start import Job
from megatron_scalebio.engine.state import Record
from megatron_scalebio.engine.update import step_w
from megatron_scalebio.methods.found import Found
from megatron_scalebio.methods.gradients import counted_gradients, dot
from megatron_scalebio.methods.weighting import WeightingState, learn, require_whole_flush
from megatron_scalebio.mixture.objective import Role, mixed
from megatron_scalebio.mixture.sampler import BlendSampler, Picks

LARGEST_SCORE = 5.0
PUBLISHED_REACH = 100.0  # η / μ times the number of steps: 5e-4 / 0.05 · 10,000


def find(config: Config, job: Job) -> Found | None:
    """The average weights of a whole training, or None at a signal."""
    return learn(DogeState(config, job.folder / "cache"), job)


class DogeState(WeightingState):
    """The proxy and its weights.

    Attributes:
        mean_norm: m, of the last step; None before the first.
    """

    def __init__(self, config: Config, cache: Path) -> None:
        super().__init__(config, cache)
        self.mean_norm: float | None = None
        data, parallel = self.data, config.parallel
        # Whole micro-batches of every source, on every rank and, interleaved, for every stage.
        unit = data.layout.micro_batch_size * data.layout.dp_size
        if not self.training.flush_takes(1):
            unit *= parallel.pipeline_model_parallel_size
        sizes = [len(source) for source in data.sources]
        each = max(1, config.train.global_batch_size // (unit * len(sizes))) * unit
        data.sampler = BlendSampler(sizes, each * len(sizes), config.train.seed, floor_share=1.0)
        require_whole_flush(self, "validation_batch_size")

    def make_step(self) -> Record:
        return doge_step(self)

    def common_state(self) -> dict[str, Any]:
        return {**super().common_state(), "mean_norm": self.mean_norm}

    def load_common_state(self, state: dict[str, Any]) -> None:
        super().load_common_state(state)
        self.mean_norm = state["mean_norm"]

    def next_batches(self) -> tuple[list[list[MicroBatch]], list[MicroBatch], Picks, Picks]:
        """This rank's micro-batches of each source, those of the validation sets, and the picks."""
        sources = len(self.data.sources)
        uniform_S = torch.full((sources,), 1 / sources, dtype=torch.float64)
        picks = self.data.sampler.next(uniform_S.numpy())
        layout = self.data.layout
        valid_picks = self.data.validation_sampler.next(self.data.shares_V)
        train = []
        with runtime.refused_together():
            for i in range(sources):
                mine = picks.group_B == i
                part = Picks(picks.group_B[mine], picks.index_B[mine], picks.inclusion_S)
                train.append(micro_batches(self.data.sources, part, layout))
            valid = micro_batches(self.data.validation, valid_picks, layout)
        return train, valid, picks, valid_picks


def doge_step(state: DogeState) -> Record:
    """One step of α and of the model, both or neither; its record."""
    config, settings = state.config, state.schedule.at(state.step)
    train, valid, picks, valid_picks = state.next_batches()
    period = state.training.enter_period()
    run = GradientRun(state, period)
    usual = min(1.0, PUBLISHED_REACH / config.train.train_iters)
    rate = (config.baseline.domain_lr or usual) * settings.lr_w / config.optimizer.lr

    shares_V, inclusion_V = map(torch.from_numpy, (state.data.shares_V, valid_picks.inclusion_S))
    run.backward(Role.VALID_W, valid, shares_V / inclusion_V)
    target = [part.clone() for part in run.gradient()]
    target_norm = math.sqrt(dot(target, target))
    target_clip = clip_factor(target_norm, config.optimizer.clip_grad)
    mean_norm = state.mean_norm or target_norm * target_clip

    score_S, norm_S = (torch.zeros(len(train), dtype=torch.float64) for _ in range(2))
    log_weight_S = state.log_weight_S.clone()
    summed = SummedBuffers(period)
    for i, batches in enumerate(train):
        run.backward(Role.TRAIN_W, batches, torch.ones(len(train), dtype=torch.float64))
        mine = run.gradient()
        norm = math.sqrt(dot(mine, mine))
        clip = clip_factor(norm, config.optimizer.clip_grad)
        score_S[i] = dot(mine, target) * clip * target_clip / (mean_norm or 1.0)
        score_S[i].clamp_(-LARGEST_SCORE, LARGEST_SCORE)
        norm_S[i] = norm * clip
        log_weight_S[i] += rate * score_S[i]
        summed.add(float(of_first_rank(log_weight_S.exp())[i]) * clip)
    summed.give_back(1.0 / float(of_first_rank(log_weight_S.exp()).sum()))

    losses = run.losses()
    moved_S = log_weight_S.log_softmax(0)
    record = step_w(state, losses, picks, moved_S.exp(), learned=[moved_S])
    if not record["skipped"]:
        state.mean_norm = float(norm_S.mean())
        state.move_to(moved_S)
    return {
        **record,
        "validation_loss": mixed(shares_V, losses.validation_V, inclusion_V),
        "validation_losses": losses.validation_V.tolist(),
        "weights": state.weight_S.tolist(),
        "alignment": score_S.tolist(),
    }


def clip_factor(norm: float, clip_grad: float) -> float:
    """What a gradient of this norm is multiplied by (0: no clipping, as in `clip_grad`)."""
    return min(1.0, clip_grad / norm) if clip_grad > 0 and norm > 0 else 1.0


class GradientRun:
    """The flushes of one step, each of which leaves its gradient in the buffers of w."""

    def __init__(self, state: DogeState, period: Period) -> None:
        self._training, self._period = state.training, period
        self._loss_mean = state.config.data.loss_mean
        self._groups = (len(state.data.sources), len(state.data.validation))
        self._passes: list[Pass] = []
        self._records: list[dict[str, Any]] = []

    def backward(self, role: Role, batches: list[MicroBatch], weight_G: torch.Tensor) -> None:
        groups = self._training.groups
        passes = passes_of({role: 1.0}, batches, weight_G, self._loss_mean, groups)
        self._period.zero_grad()
        self._records += flush(self._period.twins, passes, groups, self._training.observe)
        self._passes += passes

    def gradient(self) -> list[torch.Tensor]:
        """This rank's part of the last one."""
        return counted_gradients(self._period.ddp["w"])

    def losses(self) -> Losses:
        """Of all flushes."""
        return reduce_losses(self._records, self._passes, *self._groups, self._training.groups)


class SummedBuffers:
    """A weighted sum of gradients beside the buffers that each of them is computed in."""

    def __init__(self, period: Period) -> None:
        self._buffers = [
            buffer
            for chunk in period.ddp["w"]
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
        ]
        self._sums = [torch.zeros_like(buffer.grad_data) for buffer in self._buffers]

    def add(self, weight: float) -> None:
        for total, buffer in zip(self._sums, self._buffers, strict=True):
            total.add_(buffer.grad_data, alpha=weight)

    def give_back(self, scale: float) -> None:
        """Puts the sum times `scale` where the optimizer takes its gradients."""
        for total, buffer in zip(self._sums, self._buffers, strict=True):
            torch.mul(total, scale, out=buffer.grad_data)
