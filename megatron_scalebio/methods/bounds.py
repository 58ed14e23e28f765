"""What a run's configuration asks the mixture to keep to, as the core takes it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_scalebio.config import Config
from megatron_scalebio.config.bounds import Range, members_of_groups, ranges
from megatron_scalebio.data.reuse import reused
from megatron_scalebio.data.sources import Source
from megatron_scalebio.data.weights_file import check_weights
from megatron_scalebio.engine.epochs import caps, lengths
from megatron_scalebio.engine.outputs import natural_shares
from megatron_scalebio.engine.state import Data
from megatron_scalebio.errors import UserError
from megatron_scalebio.formatting import told_apart
from megatron_scalebio.mixture.constraints import Constraints
from megatron_scalebio.mixture.repetition import Repetition

BOUNDED = ("scalebio", "olmix")  # methods whose weights keep to bounds
LEAST_PRIOR = 1e-4  # of an equal weight: a prior of nothing would have no logarithm


def constraints_of(config: Config, data: Data, kappa: float) -> Constraints | None:
    """Bounds of sources and of their repetition, the prior, and the ratios that stay.

    Args:
        kappa: of the pull to the prior; 0: there is none.

    Raises:
        UserError: if no mixture keeps to them.
    """
    tied_S = None
    if config.data.keep_ratios and data.former is not None:
        tied_S = data.former.known
        if all(tied_S):
            raise UserError(
                f"data.keep_ratios: {config.data.weights} has all sources, so nothing is left to "
                "learn (add sources, or drop keep_ratios)"
            )
        if any(source.low > 0 or source.high < 1 for source in config.data.sources):
            raise UserError(
                "data.keep_ratios: True and bounds of single sources exclude each other (drop one)"
            )
    low_S, high_S, repetition = bounds_of(config, data, tied_S)
    groups, bounds = [], config.data.groups
    if bounds and repetition is not None:
        raise UserError(
            "data.groups: bounds of groups and target_tokens exclude each other where sources "
            "differ in length (give target_examples)"
        )
    if bounds:
        low_S, high_S = map(list, zip(*_ranges(config, data.sources)[0], strict=True))
        members = members_of_groups([source.name for source in data.sources])
        groups = [(members[g], bounds[g].low, bounds[g].high) for g in members if g in bounds]
    is_bounded = bool(groups) or repetition is not None or any(low_S) or min(high_S) < 1.0
    if not kappa and tied_S is None and not is_bounded:
        return None
    prior_S = prior_of(config, data) if kappa else None
    return Constraints(
        low_S, high_S, prior=prior_S, kl_to_prior=kappa, tied=tied_S, groups=groups,
        repetition=repetition,
    )  # fmt: skip


def group_ranges(config: Config, sources: Sequence[Source]) -> dict[str, Range]:
    """The least and the largest weight that each group can have; {} without bounds of groups.

    By name; a source outside of any group is one of its own.
    """
    if not config.data.groups:
        return {}
    of_sources, of_groups = _ranges(config, sources)
    names = [source.name for source in config.data.sources]
    return {**dict(zip(names, of_sources, strict=True)), **of_groups}


def _ranges(config: Config, sources: Sequence[Source]) -> tuple[list[Range], dict[str, Range]]:
    """`ranges` with the caps of repetition."""
    entries, cap_S = config.data.sources, caps(config, sources)
    low_S, high_S = [entry.low for entry in entries], [entry.high for entry in entries]
    if cap_S is not None:
        triples = zip(high_S, cap_S, lengths(config, sources), strict=True)
        high_S = [min(high, cap * length) for high, cap, length in triples]
    try:
        return ranges([entry.name for entry in entries], low_S, high_S, config.data.groups)
    except UserError as error:
        raise UserError(f"data.{error}") from None


def bounds_of(
    config: Config, data: Data, tied_S: list[bool] | None
) -> tuple[list[float], list[float], Repetition | None]:
    """The least and the largest weight of each source, and caps that depend on the mixture.

    Args:
        tied_S: sources that keep the ratios they begin with, and so meet their bounds together.
    """
    low_S = [source.low for source in config.data.sources]
    high_S = [source.high for source in config.data.sources]
    cap_S = caps(config, data.sources)
    if cap_S is None:
        return low_S, high_S, None
    if tied_S is not None:
        ratio_S = [w * tied for w, tied in zip(data.initial_weights(), tied_S, strict=True)]
        most = min(cap / ratio for cap, ratio in zip(cap_S, ratio_S, strict=True) if ratio)
        cap_S = [most * ratio or cap for cap, ratio in zip(cap_S, ratio_S, strict=True)]
    length_S = lengths(config, data.sources)
    repetition = Repetition(cap_S, length_S)
    bounds_2S = torch.tensor([low_S, high_S], dtype=torch.float64)
    least = repetition.least_length(*bounds_2S)
    for source, cap in zip(config.data.sources, cap_S, strict=True):
        if source.low > cap * least:
            raise UserError(
                f"data.max_epochs: {config.data.most_epochs:g} passes over {source.name!r} limit "
                f"its weight to {cap * least:.3g}, below its least weight {source.low:g} (raise "
                "max_epochs, or lower min_weight or fixed_weight)"
            )
    reached = repetition.reached(*bounds_2S)
    if reached < 1:
        raise UserError(
            f"data.max_epochs: {config.data.most_epochs:g} and the sources' max_weight leave "
            f"weights that add up to {reached:.3g} (raise one of them, or lower the target)"
        )
    if min(length_S) < max(length_S):
        return low_S, high_S, repetition
    pairs = zip(high_S, cap_S, strict=True)
    return low_S, [min(high, cap * length_S[0]) for high, cap in pairs], None


def prior_of(config: Config, data: Data) -> list[float]:
    """The mixture that `bilevel.prior` names, or gives."""
    given = config.bilevel.prior or "natural"
    names = [source.name for source in config.data.sources]
    if isinstance(given, dict):
        check_weights(given, "bilevel.prior")
        if set(given) != set(names):
            raise UserError(
                "bilevel.prior: has not the names of the sources: "
                f"{told_apart(sorted(given), sorted(names))} (give each source its share)"
            )
        prior = [given[name] for name in names]
    elif given == "natural":
        prior = natural_shares(data.sources)
    elif given == "initial":
        prior = data.initial_weights()
    else:
        prior = reused(Path(given), names, None, natural_shares(data.sources)).weights
    least = LEAST_PRIOR * sum(prior) / len(prior)
    return [max(weight, least) for weight in prior]


def refuse_bounds(config: Config) -> None:
    """For the methods that know no bounds, or only those of sources."""
    method, sources = config.baseline.method, config.data.sources
    bound = next((s for s in sources if s.low > 0 or s.high < 1), None)
    held = next((v for v in config.data.validation if v.is_bounded), None)
    asked = {"data.matched_repetition": config.data.matched_repetition}
    asked |= (
        {}
        if method in BOUNDED
        else {
            f"data.sources: the bounds of {bound.name if bound else None!r}": bound is not None,
            f"data.groups: the bounds of {next(iter(config.data.groups), None)!r}": bool(
                config.data.groups
            ),
            "data.keep_ratios": config.data.keep_ratios,
            "data.max_epochs": config.data.max_epochs is not None,
            "bilevel.kl_to_prior": config.bilevel.kl_to_prior > 0,
        }
    )
    asked |= {
        "bilevel.objective": config.bilevel.objective != "mean",
        "bilevel.interactions": config.bilevel.interactions,
        f"data.validation: the bound of {held.name if held else None!r}": held is not None,
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise UserError(
                f"{what}: the method {method!r} does not support it (drop it, or baseline.method)"
            )


def at_bounds(kept: Constraints | None, weight_S: Sequence[float]) -> list[str | None] | None:
    """Which bound holds each weight, if there are any: "fixed", "min" or "max"."""
    if kept is None:
        return None
    high_S = kept.highest(torch.tensor(weight_S, dtype=torch.float64))
    ends = zip(weight_S, kept.low_S, high_S, strict=True)
    return [at_bound(float(weight), float(low), float(high)) for weight, low, high in ends]


def at_bound(weight: float, low: float, high: float) -> str | None:
    """Which bound holds a weight, if one does."""
    close = 1e-6
    if low == high:
        return "fixed"
    if high - weight <= close * high and high < 1:
        return "max"
    return "min" if weight - low <= close * weight and low > 0 else None
