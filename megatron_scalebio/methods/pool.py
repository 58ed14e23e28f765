"""All examples of all sources as one pool, for methods that choose examples and not sources.

A row is an example's place in the pool: source after source, in the order of the configuration.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_scalebio.data.sources import Example, Source
from megatron_scalebio.mixture.sampler import Floats, Ints, shuffled_index


class Pool:
    """Several sources as one (`data.sources.Source`), of N rows."""

    name, prefix = "all sources", ""
    tokenizer: dict[str, Any] | None = None

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.end_S: Ints = np.cumsum([len(source) for source in sources])
        self.tokens = sum(source.tokens for source in sources)
        self.mean_length = self.tokens / len(self)
        self.largest_id = max(source.largest_id for source in sources)
        self.vocab_size = sources[0].vocab_size
        self.fingerprint = " ".join(source.fingerprint for source in sources)

    def __len__(self) -> int:
        return int(self.end_S[-1])

    def locate(self, row_N: Ints) -> tuple[Ints, Ints]:
        """The source of each row, and the row's index within it."""
        source_N = np.searchsorted(self.end_S, row_N, side="right")
        start_S = self.end_S - np.array([len(source) for source in self.sources])
        return source_N, row_N - start_S[source_N]

    def length(self, index: int) -> int:
        [source], [within] = self.locate(np.array([index]))
        return self.sources[source].length(int(within))

    def example(self, index: int) -> Example:
        [source], [within] = self.locate(np.array([index]))
        return self.sources[source].example(int(within))

    def input_tokens(self) -> int:
        """Input tokens of all rows, padding left out."""
        return sum(source.length(i) for source in self.sources for i in range(len(source)))

    def split(self, row_N: Ints) -> list[list[int]]:
        """Distinct rows as the indices of each source, ascending."""
        source_N, within_N = self.locate(np.unique(row_N))
        return [within_N[source_N == s].tolist() for s in range(len(self.sources))]

    def counts(self, row_N: Ints) -> Ints:
        """How many of the rows are each source's."""
        return np.bincount(self.locate(row_N)[0], minlength=len(self.sources))

    def sums(self, weight_N: npt.NDArray[Any]) -> Floats:
        """Each source's sum of the weights of all rows."""
        source_N, _ = self.locate(np.arange(len(self)))
        sum_S = np.bincount(source_N, weights=weight_N, minlength=len(self.sources))
        return sum_S.astype(np.float64)

    def shares(self, weight_N: Floats) -> list[float]:
        """Each source's share of the weights of all rows."""
        whole_S = self.sums(weight_N)
        return (whole_S / whole_S.sum()).tolist()


class EpochOrder:
    """An endless order of rows in which every epoch is a permutation of its own.

    Batches cut from it hold the sources in their natural proportions.
    """

    def __init__(self, row_N: Ints, seed: int) -> None:
        self.row_N, self.seed, self.position = row_N, seed, 0

    def next(self, count: int) -> Ints:
        position_B = self.position + np.arange(count)
        size_B = np.full(count, len(self.row_N))
        self.position += count
        return self.row_N[shuffled_index(position_B, size_B, np.zeros_like(size_B), self.seed)]


def random_rows(total: int, count: int, seed: int) -> Ints:
    """`count` of `total` rows, distinct, in random order."""
    zeros = np.zeros(count, dtype=np.int64)
    return shuffled_index(np.arange(count), np.full(count, total), zeros, seed)


def highest(score_N: Floats, count: int) -> Ints:
    """The `count` rows of the highest scores, best first; what is not a number comes last."""
    usable_N = np.nan_to_num(score_N, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    return np.argsort(-usable_N, kind="stable")[:count]
