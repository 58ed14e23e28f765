"""RHO-LOSS (Mindermann et al., ICML 2022, arXiv 2206.07137): train on what is learnable, worth
learning and not yet learnt.

    reducible loss of example x:   ρ_t(x) = ℓ(w_t; x) − ℓ(reference; x)

    1  a reference model is trained on the validation sets (the paper's holdout)
    2  its loss on every training example, the irreducible loss, is taken once
    3  online (as published): every step draws a large batch from all sources together, w scores it
       forward only, and trains on the global_batch_size examples of the highest ρ_t

A noisy example is hard for the reference too, an irrelevant one is no easier for it than for w,
and a known one has little loss left: all three have a small ρ. ℓ is an example's mean loss over its
target tokens, in evaluation mode. Large batches follow one another through permutations of all
examples, so sources appear in their natural proportions. The weights are the sources' shares of
all examples trained on; the choice is every example that was trained on at least once.

OFFLINE (`rho_online: false`) is not in the paper, whose score belongs to the model of the moment:
here the moment is the end of a plain training of w for train_iters steps on all sources, and the
`select_fraction` of the highest ρ is kept.

The reference is trained as w is (same start, schedule and batch size), for `reference_iters` steps.
The paper keeps the epoch of the least loss on held-out data; validation sets here may be a few
hundred examples, none of which is spared for that. Instead the default is train_iters steps, but
at most three passes over the validation sets: memorising them would make every training example
look irreducible.

    reference/                 its training: checkpoints, metrics
    irreducible/               its losses
    scores.npz                 score = ρ (online: when last drawn), irreducible; online: chosen, the
                               times that a row was trained on
"""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_scalebio import runtime
from megatron_scalebio.config import Config, SourceConfig
from megatron_scalebio.engine.evaluate import example_losses
from megatron_scalebio.engine.start import Job
from megatron_scalebio.engine.state import Data, Record, TokenCost
from megatron_scalebio.methods.chunks import Array, Chunks
from megatron_scalebio.methods.found import Found
from megatron_scalebio.methods.pool import Pool, highest
from megatron_scalebio.methods.pool_training import (
    PoolState,
    side_training_config,
    train_on_pool,
    training_config,
)
from megatron_scalebio.methods.scores import found_from_rows, write_scores
from megatron_scalebio.mixture.sampler import Floats, Ints, Picks
from megatron_scalebio.whole_files import write_json

REFERENCE_EPOCHS = 3


def find(config: Config, job: Job) -> Found | None:
    """The mixture and the choice of RHO-LOSS. None: a signal stopped it."""
    irreducible = irreducible_losses(config, job)
    if irreducible is None:
        return None
    irreducible_N, cost = irreducible
    return (_online if config.baseline.rho_online else _offline)(config, job, irreducible_N, cost)


def reference_config(config: Config, examples: int) -> Config:
    """The training of the reference model: the validation sets are its sources."""
    train = config.train
    epochs = math.ceil(REFERENCE_EPOCHS * examples / train.global_batch_size)
    steps = config.baseline.reference_iters or min(train.train_iters, epochs)
    holdout = [SourceConfig(entry.name, entry.path) for entry in config.data.validation]
    part = side_training_config(config, steps, Path(config.train.output) / "reference")
    return replace(part, data=replace(part.data, sources=holdout, known_weights=None))


def irreducible_losses(config: Config, job: Job) -> tuple[Floats, TokenCost] | None:
    """The reference's loss on every row, and what that took. None: a signal stopped it."""
    cache = job.folder / "cache"
    data = Data(config, cache)
    pool = Pool(data.sources)
    config.train.resolve_epochs(len(pool))
    reference = reference_config(config, sum(len(source) for source in data.validation))
    cost_file = job.folder / "reference" / "cost.json"
    losses = Chunks(job.folder / "irreducible", len(pool), {
        "sources": [source.fingerprint for source in data.sources],
        "validation": [source.fingerprint for source in data.validation],
        "steps": reference.train.train_iters, "seed": config.train.seed,
    })  # fmt: skip
    if not (losses.is_whole() and runtime.on_main(cost_file.is_file)):
        state = PoolState(reference, cache, "rho_loss reference")
        if not train_on_pool(state, job, "Reference model, on the validation sets"):
            return None
        state.training.leave_period()
        if not losses.fill("irreducible losses", _scorer(state, pool), job.signals):
            return None
        spent = asdict(state.cost)
        runtime.on_main(lambda: write_json(cost_file, spent))
    trained = TokenCost(**runtime.on_main(lambda: json.loads(cost_file.read_text())))
    return losses.joined(), trained + TokenCost(scored=pool.input_tokens())


def _scorer(state: PoolState, pool: Pool) -> Any:
    """Rows → the state's w's mean loss on each, float64."""

    def losses_of(row_n: Ints) -> Array:
        layout = state.data.layout
        return example_losses(state.training.w, pool, row_n, state.config, layout).mean_N.numpy()

    return losses_of


class RhoState(PoolState):
    """w trains on the rows of the highest reducible loss of each large batch.

    Attributes:
        chosen_N: times each row was trained on.
        chosen_S: the same of each source's rows together.
        reducible_N: its reducible loss when last drawn, NaN before.
    """

    def __init__(self, config: Config, cache: Path, irreducible_N: Floats) -> None:
        super().__init__(config, cache, "rho_loss")
        self.irreducible_N = irreducible_N
        self.chosen_N = np.zeros(len(self.pool), dtype=np.int32)
        self.chosen_S = np.zeros(len(self.pool.sources))
        self.reducible_N = np.full(len(self.pool), np.nan)
        batch = config.train.global_batch_size
        wanted = round(batch / config.baseline.rho_batch_share)
        self.large_batch = max(batch, min(wanted, len(self.pool)))

    def draw(self) -> Picks:
        row_B = self.order.next(self.large_batch)
        losses = example_losses(self.training.w, self.pool, row_B, self.config, self.data.layout)
        self.cost.scored += losses.tokens
        reducible_B = losses.mean_N.numpy() - self.irreducible_N[row_B]
        self.reducible_N[row_B] = reducible_B
        chosen_B = row_B[highest(reducible_B, self.config.train.global_batch_size)]
        np.add.at(self.chosen_N, chosen_B, 1)
        self.chosen_S += self.pool.counts(chosen_B)
        return self.deal(chosen_B)

    def make_step(self) -> Record:
        """A step's record has the weights so far."""
        record = super().make_step()
        return {**record, "weights": (self.chosen_S / self.chosen_S.sum()).tolist()}

    def common_state(self) -> dict[str, Any]:
        chosen, reducible = torch.from_numpy(self.chosen_N), torch.from_numpy(self.reducible_N)
        return {**super().common_state(), "chosen": chosen, "reducible": reducible}

    def load_common_state(self, state: dict[str, Any]) -> None:
        super().load_common_state(state)
        self.chosen_N = state["chosen"].numpy()
        self.chosen_S = self.pool.sums(self.chosen_N)
        self.reducible_N = state["reducible"].numpy()


def _online(config: Config, job: Job, irreducible_N: Floats, cost: TokenCost) -> Found | None:
    part = training_config(config, config.train.train_iters)
    state = RhoState(part, job.folder / "cache", irreducible_N)
    if not train_on_pool(state, job, "Training on selected examples", job.save_to):
        return None
    irreducible = irreducible_N.astype(np.float32)
    write_scores(
        job.folder, state.pool, state.reducible_N, irreducible=irreducible, chosen=state.chosen_N
    )
    row_K = np.repeat(np.arange(len(state.pool)), state.chosen_N)
    return found_from_rows(state.pool, row_K, cost + state.cost, state.step, online=True)


def _offline(config: Config, job: Job, irreducible_N: Floats, cost: TokenCost) -> Found | None:
    part = training_config(config, config.train.train_iters)
    state = PoolState(part, job.folder / "cache", "rho_loss offline")
    if not train_on_pool(state, job, "Training on all sources", job.save_to):
        return None
    state.training.leave_period()
    made_for = {
        "sources": [source.fingerprint for source in state.data.sources],
        "steps": state.step, "seed": config.train.seed,
    }  # fmt: skip
    losses = Chunks(job.folder / "trained", len(state.pool), made_for)
    if not losses.fill("losses of the trained model", _scorer(state, state.pool), job.signals):
        return None
    reducible_N = losses.joined() - irreducible_N
    irreducible = irreducible_N.astype(np.float32)
    write_scores(job.folder, state.pool, reducible_N, irreducible=irreducible)
    kept = max(1, round(config.baseline.select_fraction * len(state.pool)))
    cost = cost + state.cost + TokenCost(scored=state.pool.input_tokens())
    row_K = highest(reducible_N, kept)
    return found_from_rows(state.pool, row_K, cost, state.step, online=False)
