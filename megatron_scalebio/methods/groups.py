"""Groups of sources by their names: topic/format/part is in topic, and in topic/format.

Their weights are sums over their sources, and so are known where those of single sources are not:
of near-duplicates the sum is, how it is shared is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_scalebio.config.bounds import Range
from megatron_scalebio.core.scalebio import ScaleBiO
from megatron_scalebio.methods.bounds import at_bound
from megatron_scalebio.mixture.confidence import (
    Verdict,
    covariance_of_sums,
    judge_convergence,
    weight_intervals,
)
from megatron_scalebio.mixture.levels import Levels

_NO_INTERVAL = {"ci_low": None, "ci_high": None}
MOST_RECORDED = 100  # groups in each step's record


@dataclass(frozen=True)
class Level:
    """Attributes:
    depth: parts of a name that make a group.
    names: of its groups, in the order in which they come.
    group_S: number of each source's group.
    """

    depth: int
    names: list[str]
    group_S: list[int]


def levels_of(sources: Sequence[str]) -> list[Level]:
    """The levels that tell sources apart, coarse to fine; those of all in one, or one each, not."""
    levels: list[Level] = []
    for depth in range(1, max(name.count("/") for name in sources) + 1):
        groups = ["/".join(name.split("/")[:depth]) for name in sources]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
        before = len(levels[-1].names) if levels else 1
        if before < len(numbers) < len(sources):
            levels.append(Level(depth, list(numbers), [numbers[name] for name in groups]))
    return levels


def core_levels(levels: Sequence[Level]) -> Levels | None:
    return Levels([level.group_S for level in levels]) if levels else None


def described(
    bio: ScaleBiO,
    levels: Sequence[Level],
    constant_rate: bool,
    validation_examples: float | None,
    known: bool,
    draw_SS: torch.Tensor | None = None,
    ranges: Mapping[str, Range] | None = None,
) -> dict[str, Any]:
    """Weights of groups with their intervals, and a verdict on each level, for weights.json.

    Args:
        known: enough steps were averaged for an interval.
        draw_SS: as of `weight_intervals`, of the sources.
        ranges: the least and the largest weight of each group, by name, where groups have bounds.
    """
    core, options, path = core_levels(levels), bio.options, bio.mixture.trajectory
    if core is None:
        return {}
    groups, verdicts = [], []
    for number, level in enumerate(levels):
        tail_BG = core.sums(path.tail(options.average_fraction), number)
        members = [np.flatnonzero(np.equal(level.group_S, g)) for g in range(len(level.names))]
        draw_GG = covariance_of_sums(draw_SS, [each.tolist() for each in members])
        found = weight_intervals(tail_BG, options.confidence, validation_examples, (), draw_GG)
        ends = (x.tolist() for x in (found.weight_S, found.low_S, found.high_S))
        for name, weight, low, high in zip(level.names, *ends, strict=True):
            told: dict[str, Any] = {"level": level.depth, "name": name, "weight": weight}
            if ranges:
                least, most = ranges[name]
                low, high = min(max(low, least), most), min(max(high, least), most)
                told["bound"] = at_bound(weight, least, most)
            groups.append({**told, **({"ci_low": low, "ci_high": high} if known else _NO_INTERVAL)})
        free = [g for g, name in enumerate(level.names) if not ranges or len(set(ranges[name])) > 1]
        judged = judge_convergence(
            tail_BG[:, free], [level.names[g] for g in free], block_length=path.block_length,
            tolerance=options.tolerance, confidence=options.confidence,
            constant_rate=constant_rate, validation_examples=validation_examples,
            unless=bio.short_memory(),
            draw_SS=None if draw_GG is None else draw_GG[free][:, free],
        ) if free else Verdict(True, "all are fixed")  # fmt: skip
        verdicts.append({
            "level": level.depth, "groups": len(level.names), "converged": judged.converged,
            "reason": judged.reason,
        })  # fmt: skip
    return {"levels": verdicts, "groups": groups}


def coarse_weights(levels: Sequence[Level], weight_S: torch.Tensor) -> dict[str, float] | None:
    """Weight of each group of the coarsest level, for a step's record; None if that is too long."""
    if not levels or len(levels[0].names) > MOST_RECORDED:
        return None
    weight_G = np.bincount(levels[0].group_S, weight_S.numpy())
    return dict(zip(levels[0].names, weight_G.tolist(), strict=True))
