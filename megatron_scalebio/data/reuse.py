"""Weights of a former run for the sources of this one: some are new, some gone, some split.

A former source `english` that is no source any more is split where there are `english/…`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_scalebio.data.weights_file import WEIGHTS_FILE, read_weights
from megatron_scalebio.errors import UserError
from megatron_scalebio.formatting import FEW, few


@dataclass(frozen=True)
class Reused:
    """Attributes:
    weights: of this run's sources, adding up to 1.
    known: which of them the former run had, or had in one with others.
    gone: names that it had besides.
    split: names of the sources that share the weight of a former one.
    """

    weights: list[float]
    known: list[bool]
    gone: list[str]
    split: dict[str, list[str]] = field(default_factory=dict)

    def described(self) -> str:
        """What was done, as the banner says it."""
        new = len(self.known) - sum(self.known)
        parts = [f"{sum(self.known):,} sources"]
        parts += [f"{new:,} new"] * (new > 0)
        parts += [f"left out, as they are no sources any more: {few(self.gone)}"] * bool(self.gone)
        parts += [
            f"{former} is split into {few(names)}, by their examples"
            for former, names in list(self.split.items())[:FEW]
        ]
        more = len(self.split) - FEW
        return "; ".join([*parts, *([f"{more:,} more are split"] * (more > 0))])


def reused(
    path: Path,
    names: Sequence[str],
    new_share: float | None,
    natural_S: Sequence[float] | None = None,
    examples_S: Sequence[float] | None = None,
) -> Reused:
    """A run's weights (or its folder's), by name: known sources keep their ratios.

    Args:
        new_share: of all that it does not know, dealt out equally.
        natural_S: shares that those have instead.
        examples_S: by which sources share the weight of a former one [natural_S, or equally].

    Raises:
        UserError: if it knows none of the sources, or some are new and no share is given for them.
    """
    had = read_weights(path / WEIGHTS_FILE if path.is_dir() else path)
    split = _split(had, names)
    former = {name: had[name][0] for name in names if name in had}
    examples = dict(zip(names, examples_S or natural_S or [1.0] * len(names), strict=True))
    for one, parts in split.items():
        examples_of_all = sum(examples[part] for part in parts)
        former |= {part: had[one][0] * examples[part] / examples_of_all for part in parts}
    known = [name in former for name in names]
    whole = sum(former.values())
    new = [name for name, is_known in zip(names, known, strict=True) if not is_known]
    if not whole > 0:
        raise UserError(
            f"{path}: has a weight of none of the sources {few(list(names))}; its own are "
            f"{few(sorted(had))} (give the weights that were learned for these sources)"
        )
    if natural_S is not None:
        shares = zip(natural_S, known, strict=True)
        new_share = sum(share for share, is_known in shares if not is_known) or None
    if new and new_share is None:
        raise UserError(
            f"{path}: has no weight of {few(new)} (give new_share, what new sources begin with, or "
            "the weights of a run that had them)"
        )
    if new_share is not None and not new:
        raise UserError(
            f"new_share: {new_share!r} is for sources that {path} lacks: it lacks none (drop it)"
        )
    share = new_share or 0.0
    shares_S = natural_S or [share / max(1, len(new))] * len(names)
    weights = [
        (1 - share) * former[name] / whole if is_known else of_new
        for name, is_known, of_new in zip(names, known, shares_S, strict=True)
    ]
    return Reused(weights, known, sorted(set(had) - set(names) - set(split)), split)


def _split(had: Collection[str], names: Sequence[str]) -> dict[str, list[str]]:
    """The new sources in each former one that is no source any more: in the nearest, of several."""
    gone, found = set(had) - set(names), dict[str, list[str]]()
    for name in names:
        if name not in had:
            above = [name[:end] for end, letter in enumerate(name) if letter == "/"]
            nearest = next((one for one in reversed(above) if one in gone), None)
            if nearest is not None:
                found.setdefault(nearest, []).append(name)
    return found
