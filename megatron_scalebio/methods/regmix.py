"""RegMix (Liu et al. 2024, arXiv 2407.01492): a regression on a swarm, and its best mixture."""

from megatron_scalebio.config import Config
from megatron_scalebio.engine.start import Job
from megatron_scalebio.methods.found import Found
from megatron_scalebio.methods.mixture_regression import best_mixture, fit
from megatron_scalebio.methods.swarm import data_of, swarm_of


def find(config: Config, job: Job) -> Found | None:
    """Trains the proxies that are missing; the mixture they point to, or None at a signal."""
    swarm = swarm_of(config, job, data_of(config, job))
    if swarm is None:
        return None
    regression = fit(swarm.mixture_NS, swarm.loss_N)
    weight_S = best_mixture(regression, swarm.prior_S, config.train.seed)
    return swarm.found(weight_S, regression.error, {"features": regression.features})
