"""What several validation sets come to: the weights q of their losses, L1 = Σ_v q_v ℓ_v(w).

    mean        q as given
    worst case  min over λ, max over q of Σ_v q_v (ℓ_v − r_v), r_v a reference: mirror ascent
    bounds      ℓ_v ≤ r_v by multipliers: q ∝ (the weights of the other sets, μ)

A set's loss answers late: q moves λ, and λ moves w. Ascent alone would swing, and so has a part in
proportion, as multipliers have in Stooke, Achiam, Abbeel (ICML 2020):

    x_v = ℓ_v − r_v, of sets without a bound less its mean under q   (at most LARGEST either way)
    z_v = RATE (Σ_t x_v + LEAD · mean of the last x_v)
    q_v ∝ q⁰_v e^{z_v},  μ_v = max(0, z_v)                           (Σ_t x_v of a bound stays ≥ 0)
"""

import math
from collections.abc import Sequence

import torch

RATE = 0.1  # per nat and step
LEAD = 50  # steps
LATELY = 20  # steps, over which losses are averaged: a batch's is noisy
LARGEST = 0.1  # nats: a training from scratch begins far from any bound
LEAST = 1e-3  # of q before it is made whole: a set comes back


class Goals:
    """The weights of V validation sets; the same on every rank, float64 on the CPU.

    Args:
        weights: q⁰, initial weights of the sets in L1, normalised here; ignored for bounded sets.
        worst_case: optimize the set whose loss is highest above its reference.
        bounded: the sets whose losses have to stay below their reference [none].
        reference: loss that each set's loss is compared with, in nats; the bound of a bounded set
            [0].
    """

    def __init__(
        self,
        weights: Sequence[float],
        worst_case: bool = False,
        bounded: Sequence[bool] | None = None,
        reference: Sequence[float] | None = None,
    ) -> None:
        self.worst_case, nothing = worst_case, [0.0] * len(weights)
        self.free_V = ~torch.tensor(bounded or nothing).bool()
        self.reference_V = torch.tensor(reference or nothing, dtype=torch.float64)
        self._weight_V = torch.tensor(weights, dtype=torch.float64) * self.free_V
        if not self._weight_V.sum() > 0:
            raise ValueError("every validation set has a bound: one has to be the goal")
        self._weight_V /= self._weight_V.sum()
        self.sums_2V = torch.zeros(2, len(weights), dtype=torch.float64)  # Σ_t x, mean of the last
        self.swing_V = torch.zeros_like(self.reference_V)  # added to q for now, and not learned

    @property
    def shares_V(self) -> torch.Tensor:
        """q, adding up to 1."""
        z_V, share_V = RATE * (self.sums_2V[0] + LEAD * self.sums_2V[1]), self._weight_V
        if self.worst_case:
            share_V = share_V * (z_V - z_V[self.free_V].max()).exp()
            share_V = (share_V / share_V.sum()).clamp_min(LEAST) * (self._weight_V > 0)
        share_V = torch.where(self.free_V, share_V, z_V.clamp_min(0.0))
        return share_V / share_V.sum() + self.swing_V

    def step(self, losses_V: torch.Tensor) -> None:
        """Takes the losses of a batch, NaN of sets that are not in it."""
        (sum_V, lately_V), seen_V = self.sums_2V, losses_V.isfinite()
        x_V = torch.where(seen_V, losses_V - self.reference_V, 0.0)
        mass_V = (self.shares_V - self.swing_V) * self.free_V * seen_V
        x_V = x_V - self.free_V * (mass_V * x_V).sum() / mass_V.sum().clamp_min(1e-12)
        x_V = torch.where(seen_V, x_V.clamp(-LARGEST, LARGEST), lately_V)
        lately_V += (x_V - lately_V) / LATELY
        sum_V += x_V
        behind = sum_V[self.free_V].max() + math.log(LEAST) / RATE
        sum_V.clamp_(min=torch.where(self.free_V, behind, 0.0))
