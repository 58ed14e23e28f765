"""Weights of a former run for the sources of this one, of which some are new and some are gone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_scalebio.data.weights_file import WEIGHTS_FILE, read_weights
from megatron_scalebio.errors import UserError
from megatron_scalebio.formatting import few


@dataclass(frozen=True)
class Reused:
    """Attributes:
    weights: of this run's sources, adding up to 1.
    known: which of them the former run had.
    gone: names that it had besides.
    """

    weights: list[float]
    known: list[bool]
    gone: list[str]

    def described(self) -> str:
        """What was done, as the banner says it."""
        new = len(self.known) - sum(self.known)
        parts = [f"{sum(self.known):,} sources"]
        parts += [f"{new:,} new"] * (new > 0)
        parts += [f"left out, as they are no sources any more: {few(self.gone)}"] * bool(self.gone)
        return "; ".join(parts)


def reused(
    path: Path,
    names: Sequence[str],
    new_share: float | None,
    natural_S: Sequence[float] | None = None,
) -> Reused:
    """A run's weights (or its folder's), by name: known sources keep their ratios.

    Args:
        new_share: of all that it does not know, dealt out equally.
        natural_S: shares that those have instead.

    Raises:
        UserError: if it knows none of the sources, or some are new and no share is given for them.
    """
    former = read_weights(path / WEIGHTS_FILE if path.is_dir() else path)
    known = [name in former for name in names]
    whole = sum(former[name][0] for name in names if name in former)
    new = [name for name, is_known in zip(names, known, strict=True) if not is_known]
    if not whole > 0:
        raise UserError(
            f"{path}: has a weight of none of the sources {few(list(names))}; its own are "
            f"{few(sorted(former))} (give the weights that were learned for these sources)"
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
        (1 - share) * former[name][0] / whole if is_known else of_new
        for name, is_known, of_new in zip(names, known, shares_S, strict=True)
    ]
    return Reused(weights, known, sorted(set(former) - set(names)))
