"""DoReMi (Xie et al. 2023, arXiv 2305.10429): weights by group DRO on excess loss.

It asks for no validation set: sources that a small model has yet to learn, compared with a
reference, get weight.

1. A reference model trains `reference_iters` steps on the mixture that users would train on
   otherwise: the given weights, else the natural ones (the paper: "default domain weights").
2. A proxy of the same size and start trains; α starts uniform, batches are dealt equally. At step t

       λ_i = mean over target tokens j of source i of  max(ℓ_j(proxy) − ℓ_j(reference), 0)
       α'  = α · exp(η λ),   α = (1 − c) α' / Σ α' + c / S,   c = 1e-3
       proxy descends Σ α_i ℓ_i(proxy)                        under the new α

3. The weights are the average of α over the steps.

Symbols: λ → `score_S`, η → `baseline.domain_lr` (published: 1), ℓ_i → `data.loss_mean`. A source
missing from a batch (there are more sources than places) keeps its last score. The proxy's
losses are scored before its gradient is taken: with micro-batches on a pipeline the new α is
known only after a forward pass over all of them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_scalebio import runtime
from megatron_scalebio.checkpoint import saver
from megatron_scalebio.config import Config
from megatron_scalebio.core.batch import sequence_sums
from megatron_scalebio.data.batch import MicroBatch, micro_batches
from megatron_scalebio.engine import outputs
from megatron_scalebio.engine.evaluate import token_losses
from megatron_scalebio.engine.start import Job
from megatron_scalebio.engine.state import Data, Record, TokenCost
from megatron_scalebio.engine.update import train_on
from megatron_scalebio.errors import EXIT_OK
from megatron_scalebio.methods.finetune import train_begun
from megatron_scalebio.methods.found import Found
from megatron_scalebio.methods.pool_training import side_training_config
from megatron_scalebio.methods.weighting import (
    WeightingState,
    learn,
    prior_weights,
    refuse_run_of_another,
)
from megatron_scalebio.model.provider import build_model
from megatron_scalebio.model.settings import scoring_config

DOMAIN_LR = 1.0  # η
SMOOTHING = 1e-3  # c
REFERENCE = "reference"  # the folder of the reference's training, in the run's output

Chunks = list[torch.nn.Module]


def find(config: Config, job: Job) -> Found | None:
    """Trains the reference, then the proxy; its average weights, or None at a signal."""
    config.validate_training(runtime.world_size_from_environment())
    refuse_run_of_another(job.folder, config.baseline.method)
    reference_cost = train_reference(config, job)
    if reference_cost is None:
        return None
    state = DoremiState(config, job.folder / "cache")
    saver.load_pretrained(
        state.reference, job.folder / REFERENCE / "checkpoints", state.data.vocab_size
    )
    return learn(state, job, reference_cost)


def train_reference(config: Config, job: Job) -> TokenCost | None:
    """Trains the reference, or what is left of it; what it cost, or None at a signal."""
    folder = job.folder / REFERENCE
    data = Data(config, job.folder / "cache")
    config.train.resolve_epochs(sum(len(source) for source in data.sources))
    prior_S = prior_weights(config, data)
    reference = reference_config(config, prior_S, folder)
    job = replace(job, folder=folder, save_to=folder / "checkpoints", trackers=None)
    names = [source.name for source in config.data.sources]
    runtime.on_main(lambda: outputs.prepare_folders(folder, job.save_to, names))
    code, state = train_begun(reference, job, part_of=folder.parent)
    state.training.leave_period()
    return state.cost if code == EXIT_OK else None


def reference_config(config: Config, prior_S: list[float], folder: Path) -> Config:
    """The training of the reference as a `train` run of its own, which evaluates nothing."""
    sources = [
        replace(source, initial_weight=weight)
        for source, weight in zip(config.data.sources, prior_S, strict=True)
    ]
    iters = config.baseline.reference_iters or config.train.train_iters
    part = side_training_config(config, iters, folder)
    return replace(part, data=replace(part.data, sources=sources))


class DoremiState(WeightingState):
    """The proxy, its weights, and the last excess loss of each source.

    Attributes:
        reference: a model of the same shape, which its owner loads.
    """

    def __init__(self, config: Config, cache: Path) -> None:
        super().__init__(config, cache)
        scoring = scoring_config(self.megatron)
        self.reference = build_model(config, scoring, self.data.vocab_size)
        self.score_S = torch.zeros(len(self.data.sources), dtype=torch.float64)

    def make_step(self) -> Record:
        return doremi_step(self)

    def common_state(self) -> dict[str, Any]:
        return {**super().common_state(), "score": self.score_S}

    def load_common_state(self, state: dict[str, Any]) -> None:
        super().load_common_state(state)
        self.score_S = state["score"]


def reweighted(log_weight_S: torch.Tensor, score_S: torch.Tensor, eta: float) -> torch.Tensor:
    """log of α after one multiplicative update and smoothing."""
    weight_S = torch.softmax(log_weight_S + eta * score_S, dim=0)
    return ((1 - SMOOTHING) * weight_S + SMOOTHING / len(weight_S)).log()


def doremi_step(state: DoremiState) -> Record:
    """One step of α and of the proxy, both or neither; its record."""
    config, data = state.config, state.data
    sources = len(data.sources)
    picks = data.sampler.next(torch.full((sources,), 1 / sources, dtype=torch.float64).numpy())
    with runtime.refused_together():
        batches = micro_batches(data.sources, picks, data.layout)
    score_S = excess_losses(state.training.w, state.reference, batches, state.score_S)
    eta = config.baseline.domain_lr or DOMAIN_LR
    log_weight_S = reweighted(state.log_weight_S, score_S, eta)

    record = train_on(state, batches, picks, log_weight_S.exp(), learned=[log_weight_S])
    state.cost.scored += 2 * record["tokens"]
    if not record["skipped"]:
        state.score_S = score_S
        state.move_to(log_weight_S)
    return {**record, "weights": state.weight_S.tolist(), "excess_loss": score_S.tolist()}


def excess_losses(
    proxy: Chunks,
    reference: Chunks,
    batches: list[MicroBatch],
    last_S: torch.Tensor,
) -> torch.Tensor:
    """λ of a global batch, equal on all ranks; `last_S` where a source is not in it. A collective.

    Args:
        batches: this rank's part of it.
    """
    pairs = zip(token_losses(proxy, batches), token_losses(reference, batches), strict=True)
    sums_2S = torch.zeros(2, len(last_S), dtype=torch.float64)
    for (batch, proxy_BS), (_, reference_BS) in pairs:
        excess_B = sequence_sums((proxy_BS - reference_BS).clamp_min(0), batch)
        sums_2S[0].index_add_(0, batch.group_B, excess_B)
        sums_2S[1].index_add_(0, batch.group_B, sequence_sums(batch.mask_BS > 0, batch))
    sums_2S = sums_2S.to(runtime.device())
    dist.all_reduce(sums_2S)
    excess_S, targets_S = sums_2S.cpu()
    return torch.where(targets_S > 0, excess_S / targets_S.clamp_min(1), last_S)
