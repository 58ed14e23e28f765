"""CLIMB's search (Diao et al. 2025, arXiv 2504.13161): a swarm in three rounds.

The first round's mixtures are drawn around the prior; after a round all trainings so far fit a
regression, which ranks a pool of candidates, and the next round takes its mixtures at random from
the best of them. Rounds have 4 : 2 : 1 trainings. The candidate of least predicted loss is the
answer.

Not as published: sources are taken as they are, not made by clustering; the regression is RegMix's
ridge, since LightGBM does not split as few rows; the pool is drawn as the first round is.
"""

from functools import partial

import numpy as np

from megatron_scalebio.config import Config
from megatron_scalebio.engine.start import Job
from megatron_scalebio.methods.found import Found
from megatron_scalebio.methods.mixture_regression import draw_mixture, fit
from megatron_scalebio.methods.swarm import Propose, Proxy, data_of, swarm_of
from megatron_scalebio.mixture.sampler import Floats

ROUNDS = np.array([4, 2, 1])
POOL, BEST = 5000, 500  # candidates of a search, and those that a round is taken from


def find(config: Config, job: Job) -> Found | None:
    """Trains the proxies that are missing; the mixture they point to, or None at a signal."""
    seed = config.train.seed
    swarm = swarm_of(config, job, data_of(config, job), partial(in_rounds, seed=seed))
    if swarm is None:
        return None
    regression = fit(swarm.mixture_NS, swarm.loss_N)
    pool_NS = pool(swarm.prior_S, len(swarm.loss_N), seed)
    weight_S = pool_NS[regression.predict(pool_NS).argmin()]
    return swarm.found(weight_S, regression.error, {"features": regression.features})


def in_rounds(prior_S: Floats, share_V: Floats, count: int, seed: int) -> Propose:
    """The mixtures of so many trainings, each from those of the rounds before it."""
    begins = [0, *np.rint(count * ROUNDS[:-1].cumsum() / ROUNDS.sum()).astype(int).tolist()]
    pool_NS = pool(prior_S, count, seed)
    rounds: dict[int, Floats] = {}

    def propose(number: int, before: list[Proxy]) -> Floats:
        begin = max(each for each in begins if each <= number)
        if begin == 0:
            return draw_mixture(prior_S, seed, number)
        if begin not in rounds:
            done_NS = np.array([proxy["weights"] for proxy in before[:begin]])
            loss_N = np.array([proxy["losses"] for proxy in before[:begin]]) @ share_V
            ranked_NS = pool_NS[fit(done_NS, loss_N).predict(pool_NS).argsort(kind="stable")]
            known = set(map(tuple, done_NS.tolist()))
            ranked = dict.fromkeys(map(tuple, ranked_NS.tolist()))  # corners are drawn repeatedly
            new_NS = np.array([each for each in ranked if each not in known])
            shuffle = np.random.default_rng((seed, 5, begin)).permutation
            rounds[begin] = shuffle(new_NS[: max(BEST, count)])
        return rounds[begin][number - begin]

    return propose


def pool(prior_S: Floats, count: int, seed: int) -> Floats:
    """Candidates, none of which is a mixture of the first round."""
    return np.stack([draw_mixture(prior_S, seed, count + k) for k in range(POOL)])
