"""olmix' two halves that need no model (arXiv 2602.12237): a law of losses, and its best mixture.

The law of one validation set (Ye et al. 2024's mixing law), and what it is fitted by

    ℓ(p) = c + exp(t · p),  c > 0          Σ_n huber(ℓ(p_n) − ℓ_n; δ = 0.02) is least

and the mixture that is best for sets v of shares s_v

    Σ_v s_v exp(t_v · p) + κ KL(p ‖ π)     least, within the bounds of the `Constraints`

This is convex, and its minimum is found to rounding. A mirror step solves each linearisation of
the first sum exactly, pull and bounds with it: p ← argmin ⟨g, p⟩ + κ KL(p ‖ π) + KL(p ‖ p_t) / η.
η grows while the linearisation with KL(p ‖ p_t) / η is above the sum itself, else it is halved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_scalebio.core.constraints import Constraints
from megatron_scalebio.core.sampler import Floats

DELTA = 0.02  # where the Huber loss turns from squares to absolutes, in units of the loss
FLOORS = 1 - 0.5 ** np.arange(1, 9)  # c that fits begin with, as shares of the least loss
PARTS = 10
FIT_STEPS = 200
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
    fits = []
    for floor in FLOORS * loss_N.min():
        slope_S = np.linalg.lstsq(mixture_NS, np.log(loss_N - floor), rcond=None)[0]
        fits.append(_descend(np.r_[np.log(floor), slope_S], mixture_NS, loss_N))
    found = min(fits, key=lambda each: each[0])[1]
    return Law(float(np.exp(found[0])), found[1:])


def _descend(law: Floats, mixture_NS: Floats, loss_N: Floats) -> tuple[float, Floats]:
    """Least Huber loss from (log c, t) on, by damped Gauss-Newton steps under its weights."""

    def missed(law: Floats) -> tuple[float, Floats, Floats]:
        above_N = np.exp(np.minimum(mixture_NS @ law[1:], LARGEST))
        off_N = loss_N - np.exp(min(law[0], LARGEST)) - above_N
        size_N = np.abs(off_N)
        huber_N = np.where(size_N < DELTA, off_N**2 / 2, DELTA * (size_N - DELTA / 2))
        return float(huber_N.sum()), off_N, above_N

    (error, off_N, above_N), damping = missed(law), 1e-3
    for _ in range(FIT_STEPS):
        weight_N = DELTA / np.maximum(np.abs(off_N), DELTA)
        slope_NF = np.c_[np.full(len(loss_N), np.exp(law[0])), above_N[:, None] * mixture_NS]
        square_FF = (slope_NF * weight_N[:, None]).T @ slope_NF
        shrink_F = damping * square_FF.diagonal() + 1e-12 * square_FF.trace()
        step_F = np.linalg.solve(square_FF + np.diag(shrink_F), slope_NF.T @ (weight_N * off_N))
        tried = missed(law + step_F)
        if tried[0] < error:
            is_near = tried[0] > (1 - 1e-9) * error
            law, (error, off_N, above_N), damping = law + step_F, tried, damping / 10
            if is_near:
                break
        else:
            damping *= 10
            if damping > 1e8:
                break
    return error, law


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
