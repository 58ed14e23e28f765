"""Numbers and names as people read them."""

from collections.abc import Sequence
from itertools import zip_longest


def percent(share: float | None) -> str:
    """A share for reading: 0.0314 as "3.1%"."""
    if share is None:
        return "–"
    if share < 0.00005:
        return "<0.01%" if share > 0 else "0%"
    return f"{100 * share:.1f}%" if share >= 0.00995 else f"{100 * share:.2f}%"


def duration(seconds: float | None) -> str:
    """Seconds for reading: 3725 as "1 h 02 min"."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def pace(seconds: float) -> str:
    """The time of a step for reading."""
    return f"{1000 * seconds:.3g} ms/step" if seconds < 0.9995 else f"{seconds:.3g} s/step"


def quantity(value: float | None) -> str:
    """A count for reading: 14_745_600 as "14.7 M"."""
    if value is None:
        return "–"
    for factor, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def shorten(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def printable(text: str) -> str:
    """The text without control characters and broken letters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


FEW = 8  # names that a line may hold


def few(names: Sequence[str]) -> str:
    """Names in a line, the first ones where they are many."""
    shown = ", ".join(names[:FEW])
    return f"{shown} and {len(names) - FEW:,} more" if len(names) > FEW else shown


def told_apart(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Two lists of names, as a line tells them apart: by the first difference, if they are long."""
    if max(len(theirs), len(ours)) <= FEW:
        return f"{list(theirs)}, not {list(ours)}"
    pairs = enumerate(zip_longest(theirs, ours, fillvalue="nothing"))
    place, (one, other) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
    counts = f"{len(theirs):,} and not {len(ours):,}, " if len(theirs) != len(ours) else ""
    return f"{counts}number {place + 1} of them {one!r}, not {other!r}"
