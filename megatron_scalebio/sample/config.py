"""What to sample, and how: the options of the stage ``sample``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_scalebio.config.checks import require_at_least
from megatron_scalebio.data.encode_config import EncodeConfig
from megatron_scalebio.errors import UserError


class WeightedSource(NamedTuple):
    """A source, where its rows are, and its weight (0 or more; they need not add up to 1).

    selected: the examples that may be taken, by number; None for all.
    """

    name: str
    path: str
    weight: float
    selected: Sequence[int] | npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class SampleConfig(EncodeConfig):
    """What to draw from and how much; see ``EncodeConfig`` for how records become examples.

    Attributes:
        out: receives the sample; with ``per_source``, one folder a source.
        sources: the sources and their weights.
        num_samples: rows in all, dealt by weight; or
        per_source: rows of each source, none taken twice.
        exclude: (name, path) of validation and test sets, whose examples must not be drawn.
        max_epochs: the most times that a row is taken.
        ngram: words (tokens, where sources are token ids) in a row that make a row a repetition.
        from_tokens: draws prepared examples where raw records could be drawn too.
        tokenizer, seq_length: None for those with which the sources were prepared.
    """

    out: Path
    sources: tuple[WeightedSource, ...]
    num_samples: int | None = None
    per_source: int | None = None
    exclude: tuple[tuple[str, str], ...] = ()
    seed: int = 1234
    max_epochs: int = 4
    ngram: int = 13
    from_tokens: bool = False
    tokenizer: str | None = None
    workers: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("--num-samples", self.num_samples, 1)
        require_at_least("--per-source", self.per_source, 1)
        require_at_least("--max-epochs", self.max_epochs, 1)
        require_at_least("--ngram", self.ngram, 2)
        require_at_least("--workers", self.workers, 1)
        require_at_least("--seed", self.seed, 0)
        if self.seed >= 2**32:
            raise UserError(f"--seed: {self.seed} does not fit 32 bits")
        if (self.num_samples is None) == (self.per_source is None):
            raise UserError("--num-samples: give exactly one of --num-samples and --per-source")

    @property
    def folders(self) -> tuple[Path, list[str]]:
        """The parent of the folders that are written, and their names."""
        if self.per_source is not None:
            return self.out, [source.name for source in self.sources]
        out = Path(self.out)
        return out.parent, [out.resolve().name if out.name in ("", "..") else out.name]
