"""The bilevel objective of ScaleBiO as pure functions (Pan et al., ACL 2025, arXiv 2406.19976).

    L2(λ, θ) = Σ_i p_i · ℓ_i(θ),  p = softmax(λ),  ℓ_i = mean loss of source i     lower level
    L1(w)    = mean loss on the validation sets                                     upper level
    min_{λ,w} max_u  L1(w) + α · (L2(λ, w) − L2(λ, u))

Symbols and names: λ → `logits_S`, p → `probs_S`, ℓ_i(w) → `loss_w_S`, ℓ_i(u) → `loss_u_S`,
ℓ_i(w) − ℓ_i(u) → `excess_loss_S`, g_i = α (ℓ_i(w) − ℓ_i(u)) → `hypergradient_S`.
Suffixes: S sources, B sequences of a batch.

The gradients of u and w are divided by the sum of their loss coefficients (α and 1 + α). AdamW's
direction does not see the constant, and learning rate and clipping then mean at every α what they
mean in plain training; where the mixture is right (∇L1 = ∇L2) u and w move alike, so the
hypergradient is zero there already while both still train, not only at their optimum.
"""

import enum
import math

import torch


class Role(enum.IntEnum):
    """What a micro-batch of a bilevel step is for."""

    TRAIN_U = 0  # u on training data
    TRAIN_W = 1  # w on training data
    VALID_W = 2  # w on validation data


def role_scale(role: Role, alpha: float) -> float:
    """Coefficient of a role's loss: u descends L2(u); w descends (L1(w) + α L2(w)) / (1 + α)."""
    if role is Role.TRAIN_U:
        return 1.0
    return (alpha if role is Role.TRAIN_W else 1.0) / (1.0 + alpha)


def mixture_probs(logits_S: torch.Tensor) -> torch.Tensor:
    """p = softmax(λ), in float64."""
    return torch.softmax(logits_S.double(), dim=0)


def hypergradient(
    excess_loss_S: torch.Tensor, probs_S: torch.Tensor, inclusion_S: torch.Tensor, alpha: float
) -> torch.Tensor:
    """g_i = α (ℓ_i(w) − ℓ_i(u)), less its mean under p, from one batch.

    A constant added to g does not change the mixture, but would add variance where sources are
    missing from a batch (NaN in `excess_loss_S`), so the mean over those present is taken off
    before the missing ones count as zero and the others are corrected by their inclusion.
    """
    present_S = excess_loss_S.isfinite()
    excess_S = torch.where(present_S, excess_loss_S, torch.zeros_like(excess_loss_S))
    mass_S = probs_S * present_S
    centred_S = (excess_S - (mass_S * excess_S).sum() / mass_S.sum()) * present_S
    return alpha * centred_S / inclusion_S


def logits_gradient(hypergradient_S: torch.Tensor, probs_S: torch.Tensor) -> torch.Tensor:
    """Jᵀ g with J = diag(p) − p pᵀ: the gradient of the objective in λ."""
    return probs_S * (hypergradient_S - (probs_S * hypergradient_S).sum())


def mixed(weights_S: torch.Tensor, loss_S: torch.Tensor, inclusion_S: torch.Tensor) -> float:
    """Σ p_i ℓ_i, of sources or of validation sets, estimated from those in the batch.

    Where some are absent, each stands for 1 / inclusion of its like and the weights are made whole
    again (Hájek 1971): right where all losses are equal, whichever are there.
    """
    present_S = ~loss_S.isnan()
    standing_S = (weights_S / inclusion_S)[present_S]
    mass = float(standing_S.sum())
    return float((standing_S * loss_S[present_S]).sum()) / mass if mass else math.nan
