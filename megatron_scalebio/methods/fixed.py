"""Mixtures that nothing is learned for: uniform, natural and given weights."""

from megatron_scalebio.config import Config
from megatron_scalebio.engine.outputs import natural_shares
from megatron_scalebio.engine.start import Job
from megatron_scalebio.engine.state import Data
from megatron_scalebio.errors import UserError
from megatron_scalebio.methods.found import Found, normalised


def find(config: Config, job: Job) -> Found:
    """The weights that `baseline.method` stands for.

    uniform: every source alike. natural: `outputs.natural_shares`. manual: the weights in
    `data.weights` or `data.sources`.
    """
    data = Data(config, job.folder / "cache")
    method = config.baseline.method
    if method == "uniform":
        weights = [1.0] * len(data.sources)
    elif method == "natural":
        weights = natural_shares(data.sources)
    else:
        weights = data.initial_weights()
    return Found(data.sources, normalised(weights), normalised(weights))


def require_weights(config: Config) -> None:
    """Refuses `manual` without weights, before anything is written."""
    if not config.data.weights and config.data.sources[0].initial_weight is None:
        raise UserError(
            "baseline.method: manual needs weights (give data.weights, or every source an "
            "initial_weight)"
        )
