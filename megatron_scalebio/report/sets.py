"""Several validation sets of a run on its page: their losses, and which source serves which."""

from dataclasses import dataclass
from typing import Any

from megatron_scalebio.logs.interactions import Interaction
from megatron_scalebio.report.history import number_or_none


@dataclass
class SetRow:
    """Attributes:
    weight: in what the mixture is chosen to lower, over the averaged steps.
    start, end: its loss before the first step and after the last.
    bound, reference: the most that its loss may be, or what the worst case compares it with.
    """

    name: str
    examples: int | None
    weight: float | None
    start: float | None
    end: float | None
    bound: float | None
    reference: float | None


def set_rows(entries: list[Any]) -> list[SetRow]:
    """Those of `validation` in weights.json; what is no entry is left out."""
    rows = []
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            examples = number_or_none(entry.get("examples"))
            numbers = [
                number_or_none(entry.get(name))
                for name in ("weight", "start_loss", "loss", "max_loss", "reference_loss")
            ]
            rows.append(
                SetRow(entry["name"], None if examples is None else int(examples), *numbers)
            )
    return rows


@dataclass
class Tile:
    """One source for one set.

    Attributes:
        value: how far it serves the set, over the largest of all, -1 to 1.
        sure: the interval leaves out 0.
        ends: the interval, on the same scale.
    """

    value: float
    sure: bool
    ends: str


def heat_map(found: Interaction | None, names: list[str]) -> list[tuple[str, list[Tile]]]:
    """Rows of tiles of the sources named, in that order; [] where nothing was fitted."""
    if found is None:
        return []
    place = {str(name): number for number, name in enumerate(found.sources)}
    unit = max(abs(found.serves).max(), 1e-300)
    rows = []
    for name in names:
        if (i := place.get(name)) is not None:
            values = zip(
                found.scaled[i].tolist(), found.sure[i].tolist(), found.low[i] / unit,
                found.high[i] / unit, strict=True,
            )  # fmt: skip
            tiles = [Tile(v, sure, f"{low:+.2f} to {high:+.2f}") for v, sure, low, high in values]
            rows.append((name, tiles))
    return rows
