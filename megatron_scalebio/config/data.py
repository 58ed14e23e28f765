"""Sources, validation sets and sequences."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megatron_scalebio.config.checks import option, require_name, require_positive
from megatron_scalebio.errors import UserError


@dataclass(slots=True)
class SourceConfig:
    """One data source: a prepared folder, or a Megatron `.bin/.idx` prefix."""

    name: str
    path: str
    initial_weight: float | None = None

    def __post_init__(self) -> None:
        require_positive(self, "initial_weight")


@dataclass
class ValidationConfig:
    """One validation set; L1 is the weighted mean of their losses."""

    name: str
    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "weight")


@dataclass
class DataConfig:
    sources: list[SourceConfig] = option(list, "training sources, NAME=PATH ...")
    data_args_path: str | None = option(
        None, "file of sources in place of these, as Megatron-LM takes it, such as a blend.txt"
    )
    validation: list[ValidationConfig] = option(list, "validation sets, NAME=PATH ...")
    test: list[ValidationConfig] = option(
        list, "test sets, NAME=PATH ...: `train` and `evaluate` report their loss, nothing else"
    )
    weights: str | None = option(
        None, "weights.json of a `reweight` run: the initial weights of the sources, by name"
    )
    seq_length: int = option(1024, "tokens of model input per sequence")
    loss_mean: Literal["sample", "token"] = option(
        "sample", "mean over examples of their token means, or over all target tokens"
    )
    known_weights: dict[str, float] | None = option(
        None, "true mixture where it is known, NAME=WEIGHT ...: shown beside the learned one"
    )

    def __post_init__(self) -> None:
        require_positive(self, "seq_length")
        for kind, entries in (
            ("sources", self.sources), ("validation", self.validation), ("test", self.test),
        ):  # fmt: skip
            names = Counter(entry.name for entry in entries)
            for name in names:
                require_name(kind, name, grouped=kind == "sources")
            twice = sorted(name for name, count in names.items() if count > 1)
            if twice:
                raise UserError(f"{kind}: {twice[0]!r} names two entries (rename one of them)")
        given = [source.initial_weight is not None for source in self.sources]
        if any(given) and not all(given):
            missing = self.sources[given.index(False)].name
            raise UserError(
                f"sources: {missing!r} has no initial_weight, others have (give every source one, "
                "or none for a uniform start)"
            )
        if self.weights and any(given):
            raise UserError(
                f"weights: {self.weights!r} and initial_weight both give weights (drop one of them)"
            )
        unknown = sorted(set(self.known_weights or {}) - {source.name for source in self.sources})
        if unknown:
            raise UserError(
                f"known_weights: {unknown[0]!r} is not a source (use the names in data.sources)"
            )
