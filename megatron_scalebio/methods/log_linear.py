"""olmix' two halves that need no model (arXiv 2602.12237): a law of losses, and its best mixture.

The law of one validation set (Ye et al. 2024's mixing law), and what it is fitted by

    ℓ(p) = c + exp(t · p),  c > 0          Σ_n huber(ℓ(p_n) − ℓ_n; δ = 0.02) is least

and the mixture that is best for sets v of shares s_v

    Σ_v s_v exp(t_v · p) + κ KL(p ‖ π)     least, within the bounds of the `Constraints`

This is convex, and its minimum is found to rounding. A mirror step solves each linearisation of
the first sum exactly, pull and bounds with it: p ← argmin ⟨g, p⟩ + κ KL(p ‖ π) + KL(p ‖ p_t) / η.
η grows while the linearisation with KL(p ‖ p_t) / η is above the sum itself, else it is halved.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares

from megatron_scalebio.mixture.constraints import Constraints
from megatron_scalebio.mixture.sampler import Floats

DELTA = 0.02  # where the Huber loss turns from squares to absolutes, in units of the loss
FLOORS = 1 - 0.5 ** np.arange(1, 9)  # c that fits begin with, as shares of the least loss
PARTS = 10
EXACT = {"xtol": 1e-12, "ftol": 1e-12, "gtol": 1e-12, "x_scale": "jac"}
LARGEST = 100.0  # exponent of a law that a step has thrown out of bounds
STEPS, CLOSE = 5000, 1e-9
LEAST, NONE = 1e-30, 1e-9  # weights while they have logarithms, and those that are given as 0


@dataclass(frozen=True)
class Law:
    """Attributes:
    floor: c, in units of the loss.
    slope_S: t.
    """

    floor: float
    slope_S: Floats

    def predict(self, mixture_NS: Floats) -> Floats:
        return self.floor + np.exp(mixture_NS @ self.slope_S)


def fit(mixture_NS: Floats, loss_N: Floats) -> Law:
    """The law of least Huber loss among fits from several floors.

    Under each floor, the regression of log(ℓ − c) on p is where the fit begins.
    """

    def parts(law: Floats) -> tuple[float, Floats]:
        """c, and exp(t · p) of each mixture, for a law (log c, t)."""
        each = np.exp(np.minimum(np.r_[law[0], mixture_NS @ law[1:]], LARGEST))
        return each[0], each[1:]

    def missed(law: Floats) -> Floats:
        floor, above_N = parts(law)
        return floor + above_N - loss_N

    def slopes(law: Floats) -> Floats:
        floor, above_N = parts(law)
        return np.c_[np.full(len(loss_N), floor), above_N[:, None] * mixture_NS]

    fits = []
    for floor in FLOORS * loss_N.min():
        slope_S = np.linalg.lstsq(mixture_NS, np.log(loss_N - floor), rcond=None)[0]
        start = np.r_[np.log(floor), slope_S]
        fits.append(least_squares(missed, start, slopes, loss="huber", f_scale=DELTA, **EXACT))
    found = min(fits, key=lambda each: each.cost).x
    return Law(float(np.exp(found[0])), found[1:])


def left_out_error(mixture_NS: Floats, loss_NV: Floats, share_V: Floats) -> float:
    """Root mean square of what laws of nine tenths miss in the last tenth, all sets together."""
    part_N = np.arange(len(loss_NV)) % PARTS
    missed_N = -loss_NV @ share_V
    for part in range(min(PARTS, len(loss_NV))):
        out_N = part_N == part
        for loss_N, share in zip(loss_NV.T, share_V, strict=True):
            law = fit(mixture_NS[~out_N], loss_N[~out_N])
            missed_N[out_N] += share * law.predict(mixture_NS[out_N])
    return float(np.sqrt(np.mean(missed_N**2)))


def best_mixture(laws: list[Law], share_V: Floats, kept: Constraints, start_S: Floats) -> Floats:
    """The minimum of the laws' weighted sum and the pull, within the bounds.

    Args:
        start_S: where it begins; sources that keep their ratios have those of it.
    """
    slope_VS = torch.from_numpy(np.stack([law.slope_S for law in laws]))
    weight_V = torch.from_numpy(share_V)

    def losses(p_S: torch.Tensor) -> torch.Tensor:
        return weight_V * (slope_VS @ p_S).exp()

    p_S = kept.project(torch.from_numpy(start_S).clamp_min(LEAST))
    size = 1.0
    for _ in range(STEPS):
        each_V = losses(p_S)
        g_S = kept.tie(each_V @ slope_VS, p_S)
        while True:
            logits_S = kept.pull(p_S.log() - size * g_S, size)
            new_S = kept.project(logits_S.softmax(0).clamp_min(LEAST))
            apart = float((new_S * (new_S / p_S).log()).sum())  # KL(p ‖ p_t)
            bound = float(each_V.sum() + g_S @ (new_S - p_S)) + apart / size
            if float(losses(new_S).sum()) <= bound + 1e-14 * float(each_V.sum()) or size < CLOSE:
                break
            size /= 2
        moved = float((new_S - p_S).abs().sum())
        p_S, size = new_S, 1.5 * size
        if moved < CLOSE:
            break
    return torch.where(p_S < NONE, 0.0, p_S).numpy()
