"""RegMix's two halves that need no model: mixtures to try, and the best one that they point to.

Mixtures are drawn around a prior q (Liu et al. 2024, arXiv 2407.01492, and its published code):

    p ~ Dirichlet(s · q̃),  q̃ ∝ q^0.5,  s one of 15 strengths from 0.1 to 5, evenly in logarithm;
    shares below 2e-4 become 0

A regression from p to the loss then predicts that of 100,000 mixtures from Dirichlet(q), and the
average of the 128 best is the answer. LightGBM, which RegMix fits to 512 trainings, does not split
fewer than 40 rows. So the regression here is ridge, on

    p;  p and its squares;  p, squares and products

whichever of these and of the penalties has the least leave-one-out error. With S + 1 trainings
that is often the linear one, whose best mixture is a corner, and with many the quadratic one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_scalebio.mixture.sampler import Floats

TEMPERATURE = 0.5
STRENGTHS = np.logspace(-1, np.log10(5.0), 15)
LEAST_SHARE = 2e-4
SIMULATED, AVERAGED = 100_000, 128
PENALTIES = np.logspace(-4, 2, 13)
_CHUNK = 10_000


def draw_mixture(prior_S: Floats, seed: int, number: int) -> Floats:
    """The mixture of one training, a function of (prior, seed, number) alone."""
    generator = np.random.default_rng((seed, 3, number))
    warmed_S = prior_S**TEMPERATURE
    strength = generator.choice(STRENGTHS)
    weight_S = generator.dirichlet(strength * warmed_S / warmed_S.sum())
    weight_S[weight_S < LEAST_SHARE] = 0.0
    return weight_S / weight_S.sum()


@dataclass(frozen=True)
class Fit:
    """A regression from mixtures to losses.

    Attributes:
        features: their name.
        penalty: of the ridge, in units of the number of trainings.
        error: root mean square of the leave-one-out errors, in nats.
    """

    features: str
    penalty: float
    error: float
    coefficient_F: Floats
    centre_F: Floats
    scale_F: Floats
    intercept: float

    def predict(self, mixture_NS: Floats) -> Floats:
        x_NF = (FEATURES[self.features](mixture_NS) - self.centre_F) / self.scale_F
        return self.intercept + x_NF @ self.coefficient_F


def fit(mixture_NS: Floats, loss_N: Floats) -> Fit:
    """The ridge regression with the least leave-one-out error."""
    fits = [_ridge(name, mixture_NS, loss_N, penalty) for name in FEATURES for penalty in PENALTIES]
    return min(fits, key=lambda each: each.error)


def _ridge(features: str, mixture_NS: Floats, loss_N: Floats, penalty: float) -> Fit:
    x_NF = FEATURES[features](mixture_NS)
    centre_F, scale_F = x_NF.mean(axis=0), x_NF.std(axis=0)
    scale_F[scale_F < 1e-12] = 1.0
    x_NF = (x_NF - centre_F) / scale_F
    intercept = float(loss_N.mean())
    # Dual form: N trainings are fewer than the products of many sources.
    count = len(loss_N)
    kernel_NN = x_NF @ x_NF.T
    inverse_NN = np.linalg.inv(kernel_NN + penalty * count * np.eye(count))
    dual_N = inverse_NN @ (loss_N - intercept)
    # hat matrix of the ridge with its free intercept; e_i / (1 − h_ii) is the error without row i
    hat_NN = kernel_NN @ inverse_NN
    hat_N = np.diag(hat_NN) - hat_NN.mean(axis=1) + 1.0 / count
    residual_N = loss_N - intercept - kernel_NN @ dual_N
    error = float(np.sqrt(np.mean((residual_N / np.maximum(1.0 - hat_N, 1e-6)) ** 2)))
    return Fit(features, penalty, error, x_NF.T @ dual_N, centre_F, scale_F, intercept)


def best_mixture(regression: Fit, prior_S: Floats, seed: int) -> Floats:
    """The average of the mixtures with the least predicted losses among many simulated ones."""
    generator = np.random.default_rng((seed, 4))
    best_NS, best_N = np.zeros((0, len(prior_S))), np.zeros(0)
    for _ in range(SIMULATED // _CHUNK):  # products of many sources would not fit at once
        drawn_NS = generator.dirichlet(prior_S, _CHUNK)
        best_NS = np.concatenate([best_NS, drawn_NS])
        best_N = np.concatenate([best_N, regression.predict(drawn_NS)])
        first = np.argsort(best_N, kind="stable")[:AVERAGED]
        best_NS, best_N = best_NS[first], best_N[first]
    weight_S: Floats = best_NS.mean(axis=0)
    return weight_S / weight_S.sum()


def _products(mixture_NS: Floats) -> Floats:
    rows, columns = np.triu_indices(mixture_NS.shape[1])
    return np.concatenate([mixture_NS, mixture_NS[:, rows] * mixture_NS[:, columns]], axis=1)


FEATURES: dict[str, Callable[[Floats], Floats]] = {
    "linear": lambda mixture_NS: mixture_NS,
    "squares": lambda mixture_NS: np.concatenate([mixture_NS, mixture_NS**2], axis=1),
    "quadratic": _products,
}
