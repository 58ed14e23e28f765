"""RegMix from its definition: a proxy by itself, primal ridge, errors by leaving out one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

FEATURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda p: p,
    "squares": lambda p: np.hstack([p, p**2]),
    "quadratic": lambda p: np.column_stack(
        [*p.T, *(p[:, i] * p[:, j] for i in range(p.shape[1]) for j in range(i, p.shape[1]))]
    ),
}
PENALTIES = 10.0 ** (np.arange(-8, 5) / 2)


@dataclass(frozen=True)
class Ridge:
    """y ≈ b + x · c of standardised features x: Σ (y − b − x · c)² + penalty · N · c² is least."""

    features: str
    penalty: float

    def _design(self, mixture_NS: np.ndarray, like_NS: np.ndarray) -> np.ndarray:
        x, like = (FEATURES[self.features](each) for each in (mixture_NS, like_NS))
        return np.c_[np.ones(len(x)), (x - like.mean(0)) / like.std(0)]

    def _solve(self, x: np.ndarray, loss: np.ndarray, count: int) -> np.ndarray:
        shrink = np.diag(np.r_[0.0, np.full(x.shape[1] - 1, self.penalty * count)])
        return np.linalg.solve(x.T @ x + shrink, x.T @ loss)

    def predict(self, at_MS: np.ndarray, mixture_NS: np.ndarray, loss_N: np.ndarray) -> np.ndarray:
        """At other mixtures, fitted to all N trainings."""
        solved = self._solve(self._design(mixture_NS, mixture_NS), loss_N, len(loss_N))
        return self._design(at_MS, mixture_NS) @ solved

    def left_out_error(self, mixture_NS: np.ndarray, loss_N: np.ndarray) -> float:
        x, errors = self._design(mixture_NS, mixture_NS), []
        for row in range(len(loss_N)):
            rest = np.arange(len(loss_N)) != row
            solved = self._solve(x[rest], loss_N[rest], len(loss_N))
            errors.append(loss_N[row] - x[row] @ solved)
        return float(np.sqrt(np.mean(np.square(errors))))


def least_error(mixture_NS: np.ndarray, loss_N: np.ndarray) -> tuple[Ridge, float]:
    """The regression that errs least on what is left out, and by how much."""
    every = [Ridge(name, penalty) for name in FEATURES for penalty in PENALTIES]
    errors = [ridge.left_out_error(mixture_NS, loss_N) for ridge in every]
    best = int(np.argmin(errors))
    return every[best], errors[best]


def naive_proxy(folder: Path, number: int) -> list[float]:
    """A proxy of `regmix-short` trained by itself: losses of each validation set's examples."""
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods.finetune import FinetuneState

    config = load_config(
        str(folder / "regmix-short" / "config.yaml"), {"train": {"train_iters": 3}}
    )
    runtime.start(config)
    state = FinetuneState(config, folder / "cache")
    proxies = json.loads((folder / "regmix-short" / "proxies.json").read_text())["proxies"]
    state.probs_S = torch.tensor(proxies[number]["weights"], dtype=torch.float64)
    for _ in range(3):
        state.make_step()
    [model] = state.training.w
    means = []
    for source in state.data.validation:
        losses = []
        for index in range(15):
            tokens = torch.from_numpy(source.example(index)[0].astype("int64"))
            with torch.no_grad():
                logits = model(tokens[None, :-1], torch.arange(16)[None], None)[0]
            losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[1:])))
        means.append(sum(losses) / 15)
    state.training.leave_period()
    runtime.stop_model_parallel()
    return means
