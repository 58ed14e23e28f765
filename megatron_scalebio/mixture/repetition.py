"""Caps on repetition in a final training of so many tokens: p_i ≤ k_i Σ_j p_j L_j.

p are shares of examples and L_j the tokens of an example, so T tokens are T / Σ_j p_j L_j examples,
and more of them the shorter the drawn examples are: each source is then passed more often. With at
most c passes over n_i examples, k_i = c n_i / T.

The caps depend on the mixture that they bound. `nearest` takes the caps of its own mean length m:

    p(m) = the projection within p_i ≤ k_i m,      m = Σ_j p_j(m) L_j

Among the mixtures that keep to the caps this is not quite the nearest, as no source grows to make
another's cap larger. Mixtures that keep to them are a convex set: averages of them do so as well.
"""

from collections.abc import Callable, Sequence

import torch

_CLOSE = 1e-13  # relative


class Repetition:
    """The caps of S sources.

    Args:
        caps: k, each source's largest weight for a mean length of 1.
        lengths: L.
    """

    def __init__(self, caps: Sequence[float], lengths: Sequence[float]) -> None:
        self.cap_S = torch.tensor(caps, dtype=torch.float64)
        self.length_S = torch.tensor(lengths, dtype=torch.float64)

    def mean_length(self, weight_S: torch.Tensor) -> float:
        return float(weight_S @ self.length_S)

    def least_length(self, low_S: torch.Tensor, high_S: torch.Tensor) -> float:
        """The least mean length of a mixture within bounds: of the shortest examples first."""
        order = self.length_S.argsort()
        room_S = (high_S - low_S)[order]
        left_S = (1 - low_S.sum() - (room_S.cumsum(0) - room_S)).clamp_min(0.0)
        return self.mean_length(low_S) + float(room_S.minimum(left_S) @ self.length_S[order])

    def whole_at(self, high_S: torch.Tensor) -> float:
        """The mean length whose caps leave just one mixture, in which all are at their largest."""
        longest = float((high_S / self.cap_S).max())  # nothing is capped from there on
        return _zero(
            lambda length: float(high_S.minimum(self.cap_S * length).sum()) - 1, 0.0, longest
        )

    def reached(self, low_S: torch.Tensor, high_S: torch.Tensor) -> float:
        """What the largest weights add up to; where that is below 1, no mixture keeps to the caps.

        The lower bounds have to be below the caps of the least mean length.
        """
        whole = self.whole_at(high_S)
        mean = self.mean_length(high_S.minimum(self.cap_S * whole))
        if max(mean, self.least_length(low_S, high_S)) >= whole * (1 - _CLOSE):
            return 1.0
        return float(high_S.minimum(self.cap_S * mean).sum())

    def nearest(
        self,
        within: Callable[[torch.Tensor], torch.Tensor],
        low_S: torch.Tensor,
        high_S: torch.Tensor,
    ) -> torch.Tensor:
        """The mixture that keeps to the caps of its own mean length.

        Args:
            within: the projection onto mixtures of these largest weights.
            low_S, high_S: bounds besides.
        """
        free_S = within(high_S)
        if bool((free_S <= self.cap_S * self.mean_length(free_S) * (1 + _CLOSE)).all()):
            return free_S

        def of(length: float) -> torch.Tensor:
            return within(high_S.minimum(self.cap_S * length).maximum(low_S))

        least = max(self.whole_at(high_S), self.least_length(low_S, high_S))
        longest = float(self.length_S.max())
        return of(_zero(lambda m: m - self.mean_length(of(m)), least, longest))


def _zero(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that begins below 0, and ends above it, is 0 (regula falsi, Illinois)."""
    at_low, at_high = rising(low), rising(high)
    if at_low >= 0:
        return low
    if at_high <= 0:
        return high
    side = 0
    for _ in range(100):
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        at_middle = rising(middle)
        if abs(at_middle) <= _CLOSE * max(1.0, middle) or high - low <= _CLOSE * high:
            return middle
        if at_middle < 0:
            low, at_low = middle, at_middle
            at_high = at_high / 2 if side < 0 else at_high
            side = -1
        else:
            high, at_high = middle, at_middle
            at_low = at_low / 2 if side > 0 else at_low
            side = 1
    return low
