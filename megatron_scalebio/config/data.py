"""Sources, validation sets and sequences."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megatron_scalebio.config.bounds import Bounded, GroupBounds, ranges
from megatron_scalebio.config.checks import (
    Quantity,
    option,
    require_name,
    require_positive,
    require_within,
)
from megatron_scalebio.errors import UserError

MOST_EPOCHS = 4.0  # of the final training over a source


@dataclass(slots=True)
class SourceConfig(Bounded):
    """One data source: a prepared folder, or a Megatron `.bin/.idx` prefix."""

    name: str
    path: str
    initial_weight: float | None = None
    min_weight: float | None = None
    max_weight: float | None = None
    fixed_weight: float | None = None

    def __post_init__(self) -> None:
        require_positive(self, "initial_weight")
        self.check_bounds()


@dataclass
class ValidationConfig:
    """One validation set; L1 is the weighted mean of their losses (see `bilevel.objective`).

    Attributes:
        reference_loss: what the worst case compares its loss with [its loss at the start].
        max_loss, max_loss_rise: the most that its loss may be, or rise from the start; such a set
            is no goal, and has no weight but what keeps it there.
    """

    name: str
    path: str
    weight: float = 1.0
    reference_loss: float | None = None
    max_loss: float | None = None
    max_loss_rise: float | None = None

    def __post_init__(self) -> None:
        require_positive(self, "weight", "max_loss")
        require_positive(self, "reference_loss", "max_loss_rise", or_zero=True)
        given = [
            name for name in ("max_loss", "max_loss_rise", "reference_loss")
            if getattr(self, name) is not None
        ]  # fmt: skip
        if len(given) > 1:
            raise UserError(
                f"{given[1]}: {getattr(self, given[1])!r} and {given[0]} exclude each other (drop "
                "one)"
            )

    @property
    def is_bounded(self) -> bool:
        return self.max_loss is not None or self.max_loss_rise is not None


@dataclass
class DataConfig:
    sources: list[SourceConfig] = option(list, "training sources, NAME=PATH ...")
    groups: dict[str, GroupBounds] = option(
        dict, "bounds of groups of sources by name, each as of a source: min_weight, max_weight, …"
    )
    data_args_path: str | None = option(
        None, "file that lists the sources instead, in Megatron-LM's format, such as a blend.txt"
    )
    validation: list[ValidationConfig] = option(list, "validation sets, NAME=PATH ...")
    test: list[ValidationConfig] = option(
        list, "test sets, NAME=PATH ...: only for the losses that `train` and `evaluate` report"
    )
    weights: str | None = option(
        None,
        "a `reweight` run's weights.json: initial weights by source name (it may contain other "
        "sources, too)",
    )
    blend_schedule: str | None = option(
        None,
        "`train`: blend_schedule.json, or the folder of the run that wrote it: a mixture per stage",
    )
    new_share: float | None = option(
        None, "initial share, in total, of the sources that are not in `weights`"
    )
    keep_ratios: bool = option(
        False, "keep the ratios in `weights`; only the share of each new source is learned"
    )
    target_tokens: Quantity | None = option(
        None, "tokens of the final training, such as 20B: limits how often each source is repeated"
    )
    target_examples: Quantity | None = option(None, "as target_tokens, in examples")
    max_epochs: float | None = option(
        None,
        "most passes of the final training over a source, with target_tokens or target_examples "
        "[4]",
    )
    matched_repetition: bool = option(
        False,
        "show the search so few rows of each source that it repeats them as the final training "
        "will; needs target_tokens or target_examples",
    )
    seq_length: int = option(1024, "tokens of model input per sequence")
    loss_mean: Literal["sample", "token"] = option(
        "sample",
        "a source's loss: mean over examples of their token means, or mean over all target tokens",
    )
    known_weights: dict[str, float] | None = option(
        None, "true mixture, if it is known, NAME=WEIGHT ...: shown beside the learned one"
    )

    def __post_init__(self) -> None:
        require_positive(self, "seq_length", "target_tokens", "target_examples", "max_epochs")
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
        if self.blend_schedule and (self.weights or any(given)):
            other = "weights" if self.weights else "initial_weight"
            raise UserError(
                f"blend_schedule: {self.blend_schedule!r} and {other} both give weights (drop one)"
            )
        self._check_mixture()
        unknown = sorted(set(self.known_weights or {}) - {source.name for source in self.sources})
        if unknown:
            raise UserError(
                f"known_weights: {unknown[0]!r} is not a source (use the names in data.sources)"
            )

    @property
    def most_epochs(self) -> float:
        """`max_epochs`, or its default."""
        return MOST_EPOCHS if self.max_epochs is None else self.max_epochs

    def _check_mixture(self) -> None:
        """That a mixture within the bounds exists, and what goes with `weights` comes with it."""
        least, most = (sum(getattr(s, of) for s in self.sources) for of in ("low", "high"))
        if least > 1 + 1e-9:
            raise UserError(
                f"sources: their min_weight and fixed_weight add up to {least:g} (lower them "
                "below 1)"
            )
        if self.sources and most < 1 - 1e-9:
            raise UserError(
                f"sources: their max_weight and fixed_weight add up to {most:g} (raise them "
                "above 1)"
            )
        free = sum(source.low < source.high for source in self.sources)
        if len(self.sources) > 1 and free < 2:
            raise UserError(
                f"sources: {free} of them have no fixed_weight: nothing is left to learn (free two "
                "or more)"
            )
        ends = {"min_weight": (least, "lower"), "max_weight": (most, "raise")}
        for name, (whole, mend) in ends.items():
            if len(self.sources) > 1 and abs(whole - 1) <= 1e-9:
                raise UserError(
                    f"sources: their {name} and fixed_weight add up to 1: nothing is left to learn "
                    f"({mend} them)"
                )
        if self.groups:
            self._check_groups()
        if self.target_tokens is not None and self.target_examples is not None:
            raise UserError(
                f"target_examples: {self.target_examples:g} and target_tokens exclude each other "
                "(drop one)"
            )
        if self.max_epochs is not None and not (self.target_tokens or self.target_examples):
            raise UserError(
                f"max_epochs: {self.max_epochs:g} needs the length of the final training (give "
                "target_tokens or target_examples)"
            )
        if self.matched_repetition and self.target_tokens is self.target_examples is None:
            raise UserError(
                "matched_repetition: True needs the size of the final training (give target_tokens "
                "or target_examples)"
            )
        if self.new_share is not None:
            require_within(self, "(0, 1)", "new_share")
        for name in ("new_share", "keep_ratios"):
            if getattr(self, name) and not self.weights:
                raise UserError(f"{name}: needs the weights of a former run (give --weights)")

    def _check_groups(self) -> None:
        low_S, high_S = ([getattr(s, of) for s in self.sources] for of in ("low", "high"))
        ranges([source.name for source in self.sources], low_S, high_S, self.groups)
        if self.keep_ratios:
            raise UserError("keep_ratios: True and bounds of groups exclude each other (drop one)")
