"""LESS (Xia et al., ICML 2024, arXiv 2402.04333): the examples whose Adam update helps validation.

    Inf(z, V) = Σ_c η_c · cos( S ∇ℓ(V; θ_c),  S Γ(z; θ_c) )        score(z) = max over sets V

    1  warm-up: w is trained on a random `less_warmup_fraction` of all examples for
       `less_checkpoints` epochs; θ_c and Adam's state are kept after each, η_c is the mean learning
       rate of epoch c
    2  Γ(z; θ_c): what Adam, in the state of c, would make of z's gradient; ∇ℓ(V; θ_c): the plain
       gradient of the mean loss of validation set V; S: a random projection to `less_dimensions`
    3  the `select_fraction` of the highest score is kept; the weights are the sources' shares of it

η_c is divided by Σ η, which changes no ranking: a score is a mean cosine. An epoch is a whole
number of batches, rounded up, and what it lacks is filled from the next. Gradients are taken
without dropout and not clipped.

Departures from the paper:

- The gradient is that of the weight matrices of the transformer layers, not of LoRA's: there is no
  LoRA here. Embedding, head, norms and biases are left out.
- S is a count sketch and not a dense matrix of random signs, for speed (`methods/sketch.py`).
- The authors' code scales each validation example's gradient to length 1 before it averages them;
  the paper's formula, followed here, averages the gradients. That code also leaves the corrections
  1 − β^t out and has ε under the root; here Γ is Adam's.

    warmup/                        its training; checkpoints/ of the epochs (they can be removed)
    features/checkpoint-1/         of each: chunk-*.npy S Γ of the examples, length 1, float16;
                                   validation.npy S ∇ℓ of the validation sets, float32
    scores.npz                     score, score_by_validation [N, V], source, index
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from megatron_scalebio import runtime
from megatron_scalebio.checkpoint import saver
from megatron_scalebio.config import Config
from megatron_scalebio.data.sources import Source
from megatron_scalebio.engine.schedule import Schedule
from megatron_scalebio.engine.start import Job
from megatron_scalebio.engine.state import Data, TokenCost
from megatron_scalebio.errors import UserError
from megatron_scalebio.methods.adam_moments import adam_moments
from megatron_scalebio.methods.chunks import Array, Chunks, read_array, write_array
from megatron_scalebio.methods.found import Found
from megatron_scalebio.methods.gradient_features import GradientFeatures, matrices_of
from megatron_scalebio.methods.pool import Pool, highest, random_rows
from megatron_scalebio.methods.pool_training import PoolState, side_training_config, train_on_pool
from megatron_scalebio.methods.scores import found_from_rows, write_scores
from megatron_scalebio.mixture.sampler import Floats, Ints

VALIDATION_FILE = "validation.npy"


def find(config: Config, job: Job) -> Found | None:
    """The mixture and the choice of LESS. None: a signal stopped it."""
    if config.lisa.lisa_layers is not None:
        raise UserError("lisa.lisa_layers: less needs the Adam state of all layers (drop it)")
    if config.model.num_experts is not None:
        raise UserError(
            "model.num_experts: less needs an example's whole gradient on one rank, but experts "
            "get tokens of several examples (choose another method)"
        )
    if config.parallel.context_parallel_size > 1:
        raise UserError(
            "parallel.context_parallel_size: less needs an example's whole gradient on one rank, "
            "because Adam's update is not linear (set it to 1)"
        )
    data = Data(config, job.folder / "cache")
    pool = Pool(data.sources)
    row_W, epoch_steps = warmup_plan(config, len(pool))
    state = _warm_up(config, job, row_W, epoch_steps)
    if state is None:
        return None
    cost, steps = state.cost, state.step
    rate_C = epoch_rates(state.schedule, config.baseline.less_checkpoints, epoch_steps)
    made_for = {
        "sources": [source.fingerprint for source in data.sources],
        "validation": [source.fingerprint for source in data.validation],
        "rates": rate_C, "dimensions": config.baseline.less_dimensions, "seed": config.train.seed,
    }  # fmt: skip
    checkpoints, stores = Path(config.train.output) / "warmup" / "checkpoints", []
    for number in range(1, len(rate_C) + 1):
        folder = job.folder / "features" / f"checkpoint-{number}"
        store = Chunks(folder, len(pool), {**made_for, "checkpoint": number})
        stores.append(store)
        done = store.is_whole() and runtime.on_main((folder / VALIDATION_FILE).is_file)
        if done:
            continue
        saver.load_step(state, checkpoints, number * epoch_steps)
        if not take_features(state, data.validation, store, f"checkpoint {number}", job):
            return None
    score_NV = runtime.on_main(lambda: influence(stores, rate_C, len(data.validation)))
    score_N = score_NV.max(axis=1)
    write_scores(job.folder, pool, score_N, score_by_validation=score_NV.astype(np.float32))
    validation_tokens = sum(Pool([source]).input_tokens() for source in data.validation)
    cost += TokenCost(trained=len(rate_C) * (pool.input_tokens() + validation_tokens))
    kept = max(1, round(config.baseline.select_fraction * len(pool)))
    return found_from_rows(
        pool, highest(score_N, kept), cost, steps, rates=rate_C, warmup_examples=len(row_W)
    )


def warmup_plan(config: Config, examples: int) -> tuple[Ints, int]:
    """The rows that the warm-up trains on, and the steps of one of its epochs."""
    count = max(1, round(config.baseline.less_warmup_fraction * examples))
    rows = random_rows(examples, count, config.train.seed + 2)
    return rows, math.ceil(count / config.train.global_batch_size)


def epoch_rates(schedule: Schedule, epochs: int, epoch_steps: int) -> list[float]:
    """η_c: the mean learning rate of each epoch."""
    rates = [schedule.at(step).lr_w for step in range(epochs * epoch_steps)]
    return [float(np.mean(rates[c * epoch_steps :][:epoch_steps])) for c in range(epochs)]


def _warm_up(config: Config, job: Job, row_W: Ints, epoch_steps: int) -> PoolState | None:
    """Trains the warm-up to its end, a checkpoint after each epoch."""
    steps = config.baseline.less_checkpoints * epoch_steps
    part = side_training_config(config, steps, Path(config.train.output) / "warmup")
    # All are kept: a signal adds one of its own.
    checkpoint = replace(part.checkpoint, save_interval=epoch_steps, keep_last=steps + 1)
    part = replace(part, checkpoint=checkpoint)
    state = PoolState(part, job.folder / "cache", "less warm-up", row_W)
    return state if train_on_pool(state, job, "Warm-up") else None


def take_features(
    state: PoolState, validation: list[Source], store: Chunks, what: str, job: Job
) -> bool:
    """Fills the features of a checkpoint, which `state` has just loaded. False: stopped."""
    period = state.training.enter_period(resuming=True)
    weights = [weight for _, weight in matrices_of(state.training.w)]
    moments = adam_moments(period.optimizers["w"], weights)
    state.training.leave_period()
    config = state.config
    features = GradientFeatures(state, config.baseline.less_dimensions, config.train.seed)

    def of_rows(row_n: Ints) -> Array:
        feature_nD = features.of_examples(state.pool, row_n, moments)
        return F.normalize(feature_nD, dim=1).half().cpu().numpy()

    try:
        path = store.folder / VALIDATION_FILE
        if not runtime.on_main(path.is_file):
            mean_VD = torch.stack([features.of_mean(source) for source in validation])
            runtime.on_main(lambda: write_array(path, mean_VD.cpu().numpy()))
        return store.fill(f"gradients at {what}", of_rows, job.signals)
    finally:
        features.close()


def influence(stores: list[Chunks], rate_C: list[float], sets: int) -> Floats:
    """Inf of every row on every validation set, [N, V], from the features on disk."""
    parts = []
    for store, rate in zip(stores, rate_C, strict=True):
        mean_VD = torch.from_numpy(read_array(store.folder / VALIDATION_FILE, sets))
        mean_VD = F.normalize(mean_VD, dim=1)
        cosine_NV = [torch.from_numpy(rows).float() @ mean_VD.T for _, rows in store]
        parts.append(rate / sum(rate_C) * torch.cat(cosine_NV).double().numpy())
    return np.sum(parts, axis=0)
