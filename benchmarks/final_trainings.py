"""The best mixture for a final training of N steps: brute force over trainings of a small model.

The model is softmax(E Oᵀ) of rank 32 over the tokens of `known_answers.py`, as expressive as its
GPT and without the noise of batches: every step sees the whole distribution. So hundreds of
mixtures are trained side by side in seconds.

Legend: R trainings, S sources, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

RANK, INIT_STD, CLIP, BETAS = 32, 0.02, 1.0, (0.9, 0.95)


def losses_after(
    rates: Sequence[float], probs_RS: np.ndarray, joint_SVV: np.ndarray, validation_VV: np.ndarray
) -> np.ndarray:
    """Validation losses [R], in nats, of R models after a step at each of `rates` of Adam."""
    joint = torch.tensor(np.tensordot(probs_RS, joint_SVV, 1))  # R × V × V
    contexts = joint.sum(-1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    size = len(joint_SVV[0]), RANK
    weights = [
        (INIT_STD * torch.randn(size, generator=generator, dtype=joint.dtype)).repeat(
            len(joint), 1, 1
        )
        for _ in range(2)
    ]
    moments = [(torch.zeros_like(each), torch.zeros_like(each)) for each in weights]
    for step, rate in enumerate(rates, start=1):
        inputs, outputs = weights
        error = contexts * torch.softmax(inputs @ outputs.mT, dim=-1) - joint
        gradients = error @ outputs, error.mT @ inputs
        norm_R = sum(g.square().sum((1, 2), keepdim=True) for g in gradients).sqrt()  # type: ignore[union-attr]
        scale_R = (CLIP / (norm_R + 1e-6)).clamp(max=1.0)
        for weight, gradient, (first, second) in zip(weights, gradients, moments, strict=True):
            first.lerp_(gradient * scale_R, 1 - BETAS[0])
            second.lerp_((gradient * scale_R).square(), 1 - BETAS[1])
            root = (second / (1 - BETAS[1] ** step)).sqrt() + 1e-8
            weight -= rate * first / (1 - BETAS[0] ** step) / root
    logits = weights[0] @ weights[1].mT
    return -(torch.tensor(validation_VV) * logits.log_softmax(-1)).sum((1, 2)).numpy()


def best_after(
    rates: Sequence[float],
    joint_SVV: np.ndarray,
    validation_VV: np.ndarray,
    starts_KS: np.ndarray,
    rounds: int = 8,
    size: int = 64,
) -> tuple[np.ndarray, float]:
    """The mixture of least loss after those steps, and the loss: a random search that narrows."""
    draw, S = np.random.default_rng(0), len(joint_SVV)
    tried_RS = np.concatenate([draw.dirichlet(np.full(S, 0.5), size=2 * size), starts_KS])
    best, least = starts_KS[0], np.inf
    for round_ in range(rounds):
        losses = losses_after(rates, tried_RS, joint_SVV, validation_VV)
        if losses.min() < least:
            best, least = tried_RS[losses.argmin()], float(losses.min())
        logits = np.log(best.clip(1e-5)) + 0.6**round_ * draw.normal(size=(size, S))
        tried_RS = np.exp(logits - logits.max(-1, keepdims=True))
        tried_RS /= tried_RS.sum(-1, keepdims=True)
    return best, least


def share_after(
    rates: Sequence[float],
    joint_SVV: np.ndarray,
    validation_VV: np.ndarray,
    found_S: np.ndarray,
    best_S: np.ndarray,
) -> float:
    """What the found mixture loses of what the best for those steps gains over equal weights.

    Args:
        best_S: the best mixture for training to the end, from which the search starts.
    """
    even_S = np.full(len(best_S), 1 / len(best_S))
    _, least = best_after(rates, joint_SVV, validation_VV, np.stack([best_S, found_S, even_S]))
    of_found, of_even = losses_after(rates, np.stack([found_S, even_S]), joint_SVV, validation_VV)
    return (of_found - least) / (of_even - least)
