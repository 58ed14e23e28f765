"""olmix (Chen et al. 2026, arXiv 2602.12237): a law of each loss from a swarm, its best mixture.

Bounds, caps on repetition, ratios to keep and the pull to a prior are those of ScaleBiO, and hold
in the mixture's optimization (`log_linear`). Where `kl_to_prior` is 0, the pull is the published
0.1.

Not as published: the swarm's mixtures are RegMix's; a fit begins with regressions of log(ℓ − c) in
place of random numbers, and goes by SciPy's least squares in place of L-BFGS; validation sets count
by their weights where the run trains its swarm.
"""

from dataclasses import replace

import numpy as np

from megatron_scalebio.config import Config
from megatron_scalebio.engine.start import Job
from megatron_scalebio.methods.bounds import at_bounds, constraints_of
from megatron_scalebio.methods.found import Found
from megatron_scalebio.methods.log_linear import best_mixture, fit, left_out_error
from megatron_scalebio.methods.swarm import data_of, swarm_of

PUBLISHED_PULL = 0.1


def find(config: Config, job: Job) -> Found | None:
    """Trains the proxies that are missing; the mixture they point to, or None at a signal."""
    data = data_of(config, job)
    kept = constraints_of(config, data, config.bilevel.kl_to_prior or PUBLISHED_PULL)
    assert kept is not None  # there is a pull
    swarm = swarm_of(config, job, data)
    if swarm is None:
        return None
    laws = [fit(swarm.mixture_NS, loss_N) for loss_N in swarm.loss_NV.T]
    error = left_out_error(swarm.mixture_NS, swarm.loss_NV, swarm.share_V)
    start_S = np.array(data.initial_weights())
    weight_S = best_mixture(laws, swarm.share_V, kept, start_S / start_S.sum())
    predicted = sum(
        share * law.predict(weight_S) for law, share in zip(laws, swarm.share_V, strict=True)
    )
    regression = {
        "laws": [{"floor": law.floor, "slopes": law.slope_S.tolist()} for law in laws],
        "predicted_loss": float(predicted),
        "kl_to_prior": kept.kl_to_prior,
    }
    found = swarm.found(weight_S, error, regression)
    return replace(found, at_bound_S=at_bounds(kept, found.weight_S))
