"""How often the final training goes through each source, and how often it may.

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


def target_examples(config: Config, sources: Sequence[Source]) -> float | None:
    """Examples of the final training (N); None where its length is not given.

    Tokens are turned into examples of the mean length of all.

    Raises:
        UserError: if that is not one batch.
    """
    data = config.data
    given: float | None = data.target_examples
    if data.target_tokens is not None:
        tokens = sum(source.tokens for source in sources)
        given = data.target_tokens * sum(map(len, sources)) / tokens
    batch = config.train.global_batch_size
    if given is not None and given < batch:
        name = "target_tokens" if data.target_examples is None else "target_examples"
        raise UserError(
            f"data.{name}: {getattr(data, name):g} is less than a batch of {batch} sequences (give "
            "the size of the final training)"
        )
    return given


def epochs(
    config: Config, sources: Sequence[Source], weight_S: Sequence[float]
) -> list[float] | None:
    """Passes of the final training over each source; None where its length is not given."""
    target = target_examples(config, sources)
    if target is None:
        return None
    pairs = zip(weight_S, natural_counts(sources), strict=True)
    return [weight * target / count for weight, count in pairs]


def caps(config: Config, sources: Sequence[Source]) -> list[float] | None:
    """The largest weight that keeps each source to `max_epochs`; None where N is not given.

    Raises:
        UserError: if all sources together do not hold that many examples.
    """
    target = target_examples(config, sources)
    if target is None:
        return None
    most, counts = config.data.max_epochs, natural_counts(sources)
    if most * sum(counts) < target:
        raise UserError(
            f"data.max_epochs: {most:g} passes over all sources are {quantity(most * sum(counts))} "
            f"examples, but the final training needs {quantity(target)} (raise max_epochs, lower "
            "the target, or add sources)"
        )
    return [min(1.0, most * count / target) for count in counts]


def kept_rows(config: Config, sources: Sequence[Source]) -> list[int] | None:
    """Rows of each source that make the search repeat them as the final training will.

    None where that is not asked for. All rows where the search is as long.
    """
    target = target_examples(config, sources)
    if not config.data.matched_repetition or target is None:
        return None
    share = config.train.train_iters * config.train.global_batch_size / target
    counts = zip(sources, natural_counts(sources), strict=True)
    return [min(len(source), math.ceil(count * share - 1e-9)) for source, count in counts]
