"""Mixtures that nothing is learned for: uniform, natural and given weights."""

from __future__ import annotations

from pathlib import Path

from megatron_scalebio.baselines.found import Found, normalised
from megatron_scalebio.config import Config
from megatron_scalebio.errors import UserError
from megatron_scalebio.sample.manifest import drawn_from
from megatron_scalebio.train.start import Begun
from megatron_scalebio.train.state import Data


def find(config: Config, begun: Begun) -> Found:
    """The weights that `baseline.method` stands for.

    uniform: every source alike. natural: `natural_weights`. manual: the weights in `data.weights`
    or `data.sources`.
    """
    data = Data(config, begun.folder / "cache")
    method = config.baseline.method
    if method == "uniform":
        weights = [1.0] * len(data.sources)
    elif method == "natural":
        weights = natural_weights(data)
    else:
        given = config.data.weights or config.data.sources[0].initial_weight is not None
        if not given:
            raise UserError(
                "manual needs weights",
                where="baseline.method",
                mend="give data.weights, or every source an initial_weight",
            )
        weights = data.initial_weights()
    return Found(normalised(weights), normalised(weights))


def natural_weights(data: Data) -> list[float]:
    """What training on all sources put together amounts to: each one's number of examples.

    Of sequences, for packed prefixes. A source that `sample --per-source` drew counts by what it
    was drawn from.
    """
    return [float(drawn_from(Path(source.prefix).parent) or len(source)) for source in data.sources]
