"""What a mixture has to keep to: bounds of weights, a pull to a prior, ratios that stay.

A mirror step under all of them has an exact form. Where q_i = e^{λ_i} is the step alone, π the
prior and η the step's size,

    log q_i ← (log q_i + η κ log π_i) / (1 + η κ)            the pull, κ KL(p ‖ π) in the objective
    p_i = min(high_i, max(low_i, c q_i)),  Σ_i p_i = 1        the bounds: KL projection of q

is the p that minimises ⟨g, p⟩ + κ KL(p ‖ π) + KL(p ‖ p_t) / η within the bounds. Sources that keep
their ratios move by the mean of their g under p, and are pulled by that of log p_i / π_i, as one
source of their sum would be. Caps on repetition that depend on the mixture: `Repetition`.

A group G with bounds of its sum has a factor c_G of its own in place of c: c, but no less than the
one at which its sources add up to its lower bound, nor more than that of its upper one. So these
two mixtures of its sources are their bounds in what is around it; groups in groups, inner first.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_scalebio.mixture.confidence import WeightIntervals
from megatron_scalebio.mixture.repetition import Repetition

_CLOSE = 1e-9  # relative


class Constraints:
    """Bounds, a prior and fixed ratios for the weights of S sources.

    Args:
        low, high: bounds of each weight; if they are equal, the weight is fixed [0 and 1].
        prior: mixture that the weights are pulled to, normalised here.
        kl_to_prior: κ, the strength of that pull, in units of the hypergradient.
        tied: sources whose weights keep their initial ratios.
        repetition: caps besides `high`, which depend on the mixture's mean length.
        groups: sources whose sum has bounds, and these; any two are apart or one in the other,
            the inner one first.

    Raises:
        ValueError: if no mixture is within the bounds, or the prior is not a mixture.
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        *,
        prior: Sequence[float] | None = None,
        kl_to_prior: float = 0.0,
        tied: Sequence[bool] | None = None,
        repetition: Repetition | None = None,
        groups: Sequence[tuple[Sequence[int], float, float]] = (),
    ) -> None:
        self.low_S = torch.tensor(low, dtype=torch.float64)
        self.high_S = torch.tensor(high, dtype=torch.float64)
        self._groups = [(torch.tensor(of), least, most) for of, least, most in groups]
        self.repetition: Repetition | None = None  # the bounds alone are looked at first
        ordered = ((self.low_S >= 0) & (self.low_S <= self.high_S) & (self.high_S > 0)).all()
        if not ordered or not self._are_kept():
            raise ValueError("no mixture is within the bounds")
        self.repetition = repetition
        if repetition is not None:
            length = repetition.least_length(self.low_S, self.high_S)
            if (self.low_S > repetition.cap_S * length).any() or repetition.reached(
                self.low_S, self.high_S
            ) < 1:
                raise ValueError("no mixture is within the bounds")
        self.kl_to_prior = kl_to_prior
        self._log_prior_S = torch.zeros_like(self.low_S)
        if kl_to_prior:
            prior_S = torch.tensor(prior, dtype=torch.float64)
            if not (prior_S > 0).all() or not kl_to_prior > 0:
                raise ValueError("a prior needs a weight above 0 of every source")
            self._log_prior_S = (prior_S / prior_S.sum()).log()
        self._tied_S = torch.tensor(tied or [False] * len(low))

    def _are_kept(self) -> bool:
        """Whether the projection, wherever it is from, meets all bounds of sums."""
        p_S = self.project(torch.ones_like(self.low_S))
        sums = [(p_S, 1.0, 1.0), *((p_S[of], low, high) for of, low, high in self._groups)]
        return all(low - 1e-9 <= float(x.sum()) <= high + 1e-9 for x, low, high in sums)

    @property
    def free_S(self) -> torch.Tensor:
        """The sources whose weights are not fixed."""
        return self.low_S < self.high_S

    def tie(self, values_S: torch.Tensor, probs_S: torch.Tensor) -> torch.Tensor:
        """Values, with the mean of the sources that keep their ratios in place of each of them."""
        if not self._tied_S.any():
            return values_S
        mass_S = probs_S * self._tied_S
        return torch.where(self._tied_S, (mass_S * values_S).sum() / mass_S.sum(), values_S)

    def pull(self, logits_S: torch.Tensor, size: float) -> torch.Tensor:
        """λ after a step of size η, pulled to the prior."""
        pull, log_probs_S = size * self.kl_to_prior, logits_S.log_softmax(0)
        above_S = self.tie(log_probs_S - self._log_prior_S, log_probs_S.exp())
        return log_probs_S - pull / (1 + pull) * above_S

    def pull_gradient(self, probs_S: torch.Tensor) -> torch.Tensor:
        """The gradient of κ KL(p ‖ π) in p, for optimizers that take gradients."""
        return self.kl_to_prior * (probs_S.log() - self._log_prior_S)

    def highest(self, weight_S: torch.Tensor) -> torch.Tensor:
        """The largest weights in a mixture of the mean length of this one."""
        if self.repetition is None:
            return self.high_S
        caps_S = self.repetition.cap_S * self.repetition.mean_length(weight_S)
        return self.high_S.minimum(caps_S).maximum(self.low_S)

    def holds(self, weight_S: torch.Tensor) -> bool:
        """Whether a mixture is within the bounds, to rounding."""
        above_S = weight_S >= self.low_S * (1 - _CLOSE)
        below_S = weight_S <= self.highest(weight_S) * (1 + _CLOSE)
        sums = [(float(weight_S[of].sum()), low, high) for of, low, high in self._groups]
        return bool((above_S & below_S).all()) and all(
            low * (1 - _CLOSE) <= whole <= high * (1 + _CLOSE) for whole, low, high in sums
        )

    def project(self, weights_S: torch.Tensor) -> torch.Tensor:
        """The mixture within the bounds that is nearest to q, positive weights, in KL(p ‖ q)."""
        if self.repetition is None:
            return self._within(weights_S, self.high_S)
        return self.repetition.nearest(
            lambda high_S: self._within(weights_S, high_S), self.low_S, self.high_S
        )

    def _within(self, weights_S: torch.Tensor, high_S: torch.Tensor) -> torch.Tensor:
        """The projection of q, with these largest weights."""
        low_S, high_S = self.low_S.clone(), high_S.clone()
        for group, least, most in self._groups:
            of_group = weights_S[group], low_S[group], high_S[group]
            low_S[group] = scaled(*of_group, max(least, float(of_group[1].sum())))
            high_S[group] = scaled(*of_group, min(most, float(of_group[2].sum())))
        return scaled(weights_S, low_S, high_S, 1.0)

    def narrow(self, found: WeightIntervals) -> WeightIntervals:
        """Intervals without what is out of bounds."""
        highest_S = self.highest(found.weight_S)
        return replace(
            found,
            low_S=found.low_S.clamp(self.low_S, highest_S),
            high_S=found.high_S.clamp(self.low_S, highest_S),
            half_width_S=found.half_width_S.minimum(highest_S - self.low_S),
        )


def scaled(
    weights_S: torch.Tensor, low_S: torch.Tensor, high_S: torch.Tensor, whole: float
) -> torch.Tensor:
    """min(high_i, max(low_i, c q_i)) with the c at which they add up to the whole, or nearest.

    Their sum grows with c, in straight pieces between the c at which a source leaves its lower
    bound or meets its upper one: the piece is searched, then solved.
    """
    edges = torch.cat([low_S / weights_S, high_S / weights_S]).sort().values.tolist()

    def clipped(scale: float) -> torch.Tensor:
        return (scale * weights_S).clamp(low_S, high_S)

    def mass(scale: float) -> float:
        return float(clipped(scale).sum())

    place = bisect_left(edges, whole, key=mass)
    if not 0 < place < len(edges):  # all at a bound
        return clipped(edges[min(place, len(edges) - 1)])
    begin, end = edges[place - 1], edges[place]
    share = (whole - mass(begin)) / (mass(end) - mass(begin))
    return clipped(begin + share * (end - begin))
