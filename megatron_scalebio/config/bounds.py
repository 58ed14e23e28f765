"""Bounds of weights, of sources and of groups of them, and which mixtures they leave.

A group is what a name has before a `/`: topic/format/source is in topic, and in topic/format.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_scalebio.config.checks import require_positive
from megatron_scalebio.errors import UserError
from megatron_scalebio.formatting import few

Range = tuple[float, float]
ROOT = ""  # the group of all
CLOSE = 1e-12  # bounds that differ by less are equal but for rounding
NOTHING = 1e-4  # of an equal weight, which is the least that a mixture gives a source


class Bounded:
    """What has `min_weight`, `max_weight` and `fixed_weight`."""

    __slots__ = ()
    min_weight: float | None
    max_weight: float | None
    fixed_weight: float | None

    def check_bounds(self) -> None:
        require_positive(self, "max_weight", "fixed_weight")
        require_positive(self, "min_weight", or_zero=True)
        for name in ("min_weight", "max_weight", "fixed_weight"):
            value = getattr(self, name)
            if value is None:
                continue
            if value > 1:
                raise UserError(f"{name}: {value!r} is above 1 (give a share of 1)")
            if name != "fixed_weight" and self.fixed_weight is not None:
                raise UserError(f"{name}: {value!r} and fixed_weight exclude each other (drop one)")
        if self.low > self.high:
            raise UserError(f"min_weight: {self.low!r} is above max_weight {self.high} (swap them)")

    @property
    def low(self) -> float:
        """The least weight it may have."""
        return self.min_weight or self.fixed_weight or 0.0

    @property
    def high(self) -> float:
        """The largest weight it may have."""
        given = self.max_weight if self.fixed_weight is None else self.fixed_weight
        return 1.0 if given is None else given


@dataclass(slots=True)
class GroupBounds(Bounded):
    """Bounds of the sum of a group's weights."""

    min_weight: float | None = None
    max_weight: float | None = None
    fixed_weight: float | None = None

    def __post_init__(self) -> None:
        self.check_bounds()


def members_of_groups(names: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the sources in each group, the finest groups first."""
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        parts = name.split("/")
        for depth in range(1, len(parts)):
            found.setdefault("/".join(parts[:depth]), []).append(number)
    for number, name in enumerate(names):
        if name in found:  # a source that is called what a group is
            found[name].append(number)
    return dict(sorted(found.items(), key=lambda item: -item[0].count("/")))


def ranges(
    names: Sequence[str],
    low_S: Sequence[float],
    high_S: Sequence[float],
    bounds: Mapping[str, GroupBounds],
) -> tuple[list[Range], dict[str, Range]]:
    """The least and the largest weight that each source, and each group, can have.

    From the sources up, what they come to; from the whole down, what the others leave.

    Raises:
        UserError: naming a group that no source is in, or one that can't keep to its bounds; or if
            nothing is left for a source, or to learn.
    """
    groups = members_of_groups(names)
    _refuse_unknown(names, groups, bounds)
    children: dict[str, list[str | int]] = {name: [] for name in [*groups, ROOT]}
    for group in groups:
        children[group.rpartition("/")[0]].append(group)
    for number, name in enumerate(names):
        children[name if name in groups else name.rpartition("/")[0]].append(number)
    found: dict[str | int, Range] = dict(enumerate(zip(low_S, high_S, strict=True)))
    for group, parts in children.items():
        least, most = (sum(found[part][end] for part in parts) for end in (0, 1))
        given = GroupBounds(fixed_weight=1.0) if group == ROOT else bounds.get(group, GroupBounds())
        _refuse_contradiction(group, given, least, most)
        found[group] = max(given.low, least), min(given.high, most)
    for group in reversed(children):
        parts, (low, high) = children[group], found[group]
        least, most = (sum(found[part][end] for part in parts) for end in (0, 1))
        for part in parts:
            own_low, own_high = found[part]
            found[part] = _closed(
                max(own_low, low - (most - own_high)), min(own_high, high - (least - own_low))
            )
    of_sources = [found[number] for number in range(len(names))]
    _refuse_nothing(names, high_S, of_sources)
    return of_sources, {name: found[name] for name in groups}


def _closed(low: float, high: float) -> Range:
    return (high, high) if high - low < CLOSE else (low, high)


def _refuse_unknown(
    names: Sequence[str], groups: Mapping[str, object], bounds: Mapping[str, GroupBounds]
) -> None:
    for name in bounds:
        if name in groups:
            continue
        near = difflib.get_close_matches(name, list(groups), n=1, cutoff=0.5)
        known = f"the groups are {few(sorted(groups))}" if groups else "name sources group/source"
        fix = f"did you mean {near[0]}?" if near else known
        if name in names:
            fix = "it is a source: give it the bound in data.sources"
        raise UserError(f"groups: no source is in a group {name!r} ({fix})")


def _refuse_contradiction(group: str, given: GroupBounds, least: float, most: float) -> None:
    if group == ROOT:
        if least > 1 + 1e-9 or most < 1 - 1e-9:
            what = f"at least {least:g}" if least > 1 else f"at most {most:g}"
            raise UserError(
                f"groups: with the bounds of groups and sources, all weights add up to {what}, "
                "not 1 (change them)"
            )
        return
    fixed = given.fixed_weight is not None
    if least > given.high + 1e-9:
        name = "fixed_weight" if fixed else "max_weight"
        raise UserError(
            f"groups.{group}.{name}: {given.high:g} is below {least:g}, the least that its sources "
            "may have together (raise it, or lower theirs)"
        )
    if most < given.low - 1e-9:
        name = "fixed_weight" if fixed else "min_weight"
        raise UserError(
            f"groups.{group}.{name}: {given.low:g} is above {most:g}, the most that its sources "
            "may have together (lower it, or raise theirs)"
        )


def _refuse_nothing(
    names: Sequence[str], high_S: Sequence[float], found_S: Sequence[Range]
) -> None:
    """Refuses bounds that take all from a source, or leave one mixture alone."""
    for name, own, (_, high) in zip(names, high_S, found_S, strict=True):
        if high < own and high < NOTHING / len(names):
            raise UserError(
                f"groups: the bounds of groups and sources leave nothing for {name!r} (lower the "
                "least weights of others, or drop the source)"
            )
    if all(low == high for low, high in found_S):
        raise UserError(
            "groups: the bounds of groups and sources leave one mixture alone, and nothing to "
            "learn (free two groups or sources)"
        )
