"""Steps that are finite and yet wrong: a loss or gradient norm that jumps, or w and u that part.

With m the median and s the robust spread (1.4826 × the median distance from m) of the last 64
applied steps, a value x is a spike where all of these hold:

    x > ratio · m          losses 1.5, gradient norms 10, distance |L2(w) − L2(u)| 10
    x > m + floor          losses and their distance 0.5 nats: nothing where they are near zero
    x > m + 10 s           nothing where a run is as noisy as that anyway
    x > jump · largest     of the last 8 steps: losses 1.25, norms and distance 3: nothing that
                           has risen step by step

Such a step is not applied, as one with NaN. The first 32 steps are never judged. On the demo the
largest ratios are 1.04 for losses, 3.4 for norms; its largest distance is 0.005 nats.

A model that leaves a plateau has gradients ten times as large as before within 15 steps, and goes
on having them: refusing them for good would stop a sound run. So the largest norm is that of all
steps, refused ones too: a single bad batch is refused, a new level is refused once. A loss or
distance that jumps in one step and stays there is a damaged stretch of data: the largest is that of
the applied steps, and the run stops after `skip_limit` of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW, LEAST, LAST = 64, 32, 8
_SPREADS = 10.0


@dataclass(frozen=True)
class Bound:
    ratio: float
    floor: float
    jump: float
    refused_count: bool = False


LOSS = Bound(1.5, 0.5, 1.25)
NORM = Bound(10.0, 0.0, 3.0, refused_count=True)
DISTANCE = Bound(10.0, 0.5, 3.0)
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
        self.applied: dict[str, list[float]] = {name: [] for name in WATCHED}
        self.last: dict[str, list[float]] = {  # refused ones too
            name: [] for name, bound in WATCHED.items() if bound.refused_count
        }

    def judge(self, values: Mapping[str, float]) -> str | None:
        """What spikes in a step; None if nothing, and then the step counts as applied.

        Args:
            values: by the names of `WATCHED`; those that are missing or NaN are passed over.
        """
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        spikes = [spike for spike in map(self._spike, finite, finite.values()) if spike]
        for name, value in finite.items():
            if not spikes:
                self.applied[name] = [*self.applied[name], value][-WINDOW:]
            if name in self.last:
                self.last[name] = [*self.last[name], value][-LAST:]
        return spikes[0] if spikes else None

    def _spike(self, name: str, value: float) -> str | None:
        applied, bound = self.applied[name], WATCHED[name]
        if len(applied) < LEAST:
            return None
        middle = median(applied)
        if value <= max(bound.ratio * middle, middle + bound.floor):
            return None
        spread = 1.4826 * median(abs(each - middle) for each in applied)
        largest = max(self.last.get(name, applied[-LAST:]))
        if value <= max(middle + _SPREADS * spread, bound.jump * largest):
            return None
        return f"{name} is {value:.4g}, its median over {len(applied)} steps {middle:.4g}"

    def state_dict(self) -> dict[str, Any]:
        return {
            kind: {name: list(values) for name, values in held.items()}
            for kind, held in (("applied", self.applied), ("last", self.last))
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for kind, held in (("applied", self.applied), ("last", self.last)):
            held.update({name: list(state.get(kind, {}).get(name, [])) for name in held})
