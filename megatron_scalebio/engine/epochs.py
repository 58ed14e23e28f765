"""How often the final training goes through each source, and how often it may.

a training of N examples under p draws p_i N of source i, and passes it p_i N / n_i times; one of
T tokens has N = T / Σ_j p_j L_j examples, L_j the mean length of those of source j
a training of N examples under p draws p_i N of source i, and passes it p_i N / n_i times

A search of D examples would pass it p_i D / n_i times. It passes n_i D / N rows of it as often as
the training does n_i (matched repetition, arXiv 2606.07597).
"""

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_scalebio.config import Config
from megatron_scalebio.data.sources import Source
from megatron_scalebio.data.weights_file import drawn_from
from megatron_scalebio.errors import UserError
from megatron_scalebio.formatting import quantity


def natural_counts(sources: Sequence[Source]) -> list[int]:
    """Examples of each source; one that `sample --per-source` drew has those it was drawn from."""
    return [drawn_from(Path(source.prefix).parent) or len(source) for source in sources]


def lengths(config: Config, sources: Sequence[Source]) -> list[float]:
    """L: what an example of each source is of the final training's length, in its unit."""
    in_tokens = config.data.target_tokens is not None
    return [source.mean_length if in_tokens else 1.0 for source in sources]


def target(config: Config) -> float | None:
    """Length of the final training, in tokens or examples as it is given; None: it is not."""
    return config.data.target_examples or config.data.target_tokens


def target_examples(
    config: Config, sources: Sequence[Source], weight_S: Sequence[float]
) -> float | None:
    """Examples of the final training under a mixture (N); None where its length is not given."""
    given = target(config)
    if given is None:
        return None
    pairs = zip(weight_S, lengths(config, sources), strict=True)
    return given / sum(weight * length for weight, length in pairs)


def epochs(
    config: Config, sources: Sequence[Source], weight_S: Sequence[float]
) -> list[float] | None:
    """Passes of the final training over each source; None where its length is not given."""
    examples = target_examples(config, sources, weight_S)
    if examples is None:
        return None
    pairs = zip(weight_S, natural_counts(sources), strict=True)
    return [weight * examples / count for weight, count in pairs]


def caps(config: Config, sources: Sequence[Source]) -> list[float] | None:
    """The largest weight that keeps each source to `max_epochs`, for a mean length of 1.

    None where the length of the final training is not given.

    Raises:
        UserError: if that is not one batch, or more than all sources together hold.
    """
    given = target(config)
    if given is None:
        return None
    in_tokens = config.data.target_tokens is not None
    name, unit = ("target_tokens", "tokens") if in_tokens else ("target_examples", "examples")
    counts, batch = natural_counts(sources), config.train.global_batch_size
    pairs = zip(counts, lengths(config, sources), strict=True)
    whole = sum(count * length for count, length in pairs)
    if given * sum(counts) < batch * whole:
        raise UserError(
            f"data.{name}: {given:g} is less than a batch of {batch} sequences (give the size of "
            "the final training)"
        )
    most = config.data.most_epochs
    if most * whole < given:
        raise UserError(
            f"data.max_epochs: {most:g} passes over all sources are {quantity(most * whole)} "
            f"{unit}, but the final training needs {quantity(given)} (raise max_epochs, lower "
            "the target, or add sources)"
        )
    return [most * count / given for count in counts]


def kept_rows(config: Config, sources: Sequence[Source]) -> list[int] | None:
    """Rows of each source that make the search repeat them as the final training will.

    None where that is not asked for. All rows where the search is as long. A length in tokens is
    one of so many examples as all of the sources' have on average.
    """
    given = target(config)
    if not config.data.matched_repetition or given is None:
        return None
    counts = natural_counts(sources)
    pairs = zip(counts, lengths(config, sources), strict=True)
    mean = sum(count * length for count, length in pairs) / sum(counts)
    share = config.train.train_iters * config.train.global_batch_size * mean / given
    return [
        min(len(source), math.ceil(count * share - 1e-9))
        for source, count in zip(sources, counts, strict=True)
    ]
