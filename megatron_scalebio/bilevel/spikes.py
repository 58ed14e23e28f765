"""Steps that are finite and yet wrong: a loss or gradient norm that jumps, or w and u that part.

With m the median and s the robust spread (1.4826 × the median distance from m) of the last 64
applied steps, a value x is a spike where all of these hold:

    x > ratio · m          losses 1.5, gradient norms 10, distance |L2(w) − L2(u)| 10
    x > m + floor          losses and their distance 0.5 nats: nothing where they are near zero
    x > m + 10 s           nothing where a run is as noisy as that anyway

Such a step is not applied, as one with NaN. The first 32 steps are never judged. On the demo the
largest ratios are 1.04 for losses, 3.4 for norms; its largest distance is 0.005 nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW, LEAST = 64, 32
_SPREADS = 10.0


@dataclass(frozen=True)
class Bound:
    ratio: float
    floor: float


LOSS, NORM, DISTANCE = Bound(1.5, 0.5), Bound(10.0, 0.0), Bound(10.0, 0.5)
# What is watched, by the name that a refused step is given.
WATCHED = {
    "w: training loss": LOSS,
    "u: training loss": LOSS,
    "w: validation loss": LOSS,
    "w: gradient norm": NORM,
    "u: gradient norm": NORM,
    "w and u: distance of their training losses": DISTANCE,
}


class SpikeGuard:
    """The recent values of what is watched; equal on all ranks, as the values are."""

    def __init__(self) -> None:
        self.recent: dict[str, list[float]] = {name: [] for name in WATCHED}

    def judge(self, values: Mapping[str, float]) -> str | None:
        """What spikes in a step; None if nothing, and then the step counts among the recent ones.

        Args:
            values: by the names of `WATCHED`; those that are missing or NaN are passed over.
        """
        for name, value in values.items():
            spike = self._spike(name, value)
            if spike:
                return spike
        for name, value in values.items():
            if math.isfinite(value):
                self.recent[name] = [*self.recent[name], value][-WINDOW:]
        return None

    def _spike(self, name: str, value: float) -> str | None:
        recent, bound = self.recent[name], WATCHED[name]
        if len(recent) < LEAST or not math.isfinite(value):
            return None
        middle = median(recent)
        if value <= max(bound.ratio * middle, middle + bound.floor):
            return None
        spread = 1.4826 * median(abs(each - middle) for each in recent)
        if value <= middle + _SPREADS * spread:
            return None
        return f"{name} is {value:.4g}, its median over {len(recent)} steps {middle:.4g}"

    def state_dict(self) -> dict[str, Any]:
        return {name: list(values) for name, values in self.recent.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.recent = {name: list(state.get(name, [])) for name in WATCHED}
