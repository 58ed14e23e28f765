"""How fast the mixture converges where the bilevel problem is smooth and strongly convex.

Multinomial logistic regression with a ridge, through the library as another team would use it: four
sources whose labels follow teachers of their own, and validation whose labels follow one that no
mixture of them is. There

    w*(p) = argmin Σ_i p_i ℓ_i(w) + μ/2 |w|²,    F(p) = ℓ_v(w*(p)),    ∂F/∂p_i = −∇ℓ_iᵀ H⁻¹ ∇ℓ_v

are exact (Newton's method in float64). Every run of T steps begins anew, since its schedule depends
on T; printed are, for the weights that it reports, their distance Σ|p_i − best_i| to the best ones
and |Jᵀ ∇F| at them, J the softmax's Jacobian, against the number of single examples' gradients.

    default      the library's; lr by cosine to a tenth
    paper        AdamW on λ, lr .01 by cosine, u never reset
    implicit     no noise: L-BFGS on λ with the exact ∇F, each by Newton's method; Hessians are
                 not counted

`--condition` is that of the features' covariance, and so of H.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import table, write_json
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from scipy.optimize import minimize
from torch.nn.functional import cross_entropy

from megatron_scalebio import BilevelOptions, BlendSampler, ScaleBiO, runtime
from megatron_scalebio.config import Config

CLASSES, FEATURES, SOURCES, EXAMPLES, BATCH = 4, 8, 4, 2000, 64
RIDGE = 0.01
Array = np.ndarray


@dataclass(frozen=True)
class Rows:
    """A batch, as the library asks for one (`Batch`): each example has one label."""

    x_BF: torch.Tensor
    y_B: torch.Tensor
    group_B: torch.Tensor

    @property
    def mask_BS(self) -> torch.Tensor:
        return torch.ones(len(self.y_B), 1)

    @property
    def tokens(self) -> int:
        return len(self.y_B)


class Regression(MegatronModule):
    """Logits as a linear map of the features."""

    def __init__(self, config: TransformerConfig, *stages: Any, **more: Any) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(CLASSES, FEATURES))

    def set_input_tensor(self, tensor: Any) -> None:
        """Megatron's schedule gives the first stage none."""

    def forward(self, batch: Rows) -> torch.Tensor:
        loss_B = cross_entropy(batch.x_BF @ self.weight.T, batch.y_B, reduction="none")
        return (loss_B + RIDGE / 2 * self.weight.square().sum())[:, None]


class Problem:
    """Examples, and the exact answer for them."""

    def __init__(self, seed: int, condition: float) -> None:
        draw = np.random.default_rng((seed, 71))
        scale_F = np.sqrt(np.geomspace(1.0, 1.0 / condition, FEATURES)) * 1.5
        teachers = draw.normal(size=(SOURCES, CLASSES, FEATURES)) * 1.5
        wanted = np.tensordot([0.5, 0.3, 0.2, 0.0], teachers, 1)
        wanted = wanted + 0.5 * draw.normal(size=wanted.shape)
        self.weight = np.zeros(CLASSES * FEATURES)
        self.taken = 0  # losses or gradients of single examples
        self.sets = [self._draw(draw, teacher, scale_F) for teacher in (*teachers, wanted)]

    @staticmethod
    def _draw(draw: Any, teacher: Array, scale_F: Array) -> tuple[torch.Tensor, torch.Tensor]:
        x = draw.normal(size=(EXAMPLES, FEATURES)) * scale_F
        y = (x @ teacher.T + draw.gumbel(size=(EXAMPLES, CLASSES))).argmax(1)
        return torch.tensor(x), torch.tensor(y)

    def of_set(
        self, number: int, weight: Array, deep: bool = True
    ) -> tuple[float, Array, Array | None]:
        """A set's mean loss, its gradient (flat) and, if asked, its Hessian, without the ridge."""
        x, y = (each.numpy() for each in self.sets[number])
        self.taken += len(x)
        q_BC = _softmax(x @ weight.reshape(CLASSES, FEATURES).T)
        loss = -np.log(q_BC[np.arange(len(y)), y]).mean()
        gradient = (q_BC - np.eye(CLASSES)[y]).T @ x / len(x)
        if not deep:
            return float(loss), gradient.ravel(), None
        curvature_BCC = np.einsum("bc,cd->bcd", q_BC, np.eye(CLASSES)) - np.einsum(
            "bc,bd->bcd", q_BC, q_BC
        )
        hessian = np.einsum("bcd,be,bf->cedf", curvature_BCC, x, x, optimize=True) / len(x)
        size = CLASSES * FEATURES
        return float(loss), gradient.ravel(), hessian.reshape(size, size)

    def hypergradient(self, probs_S: Array) -> tuple[float, Array]:
        """F(p) and Jᵀ ∇F, by Newton's method and implicit differentiation."""
        weight = self.weight
        for _ in range(100):
            parts = [self.of_set(i, weight) for i in range(SOURCES)]
            value = self._inner(probs_S, weight)
            gradient = RIDGE * weight
            gradient = gradient + sum(p * part[1] for p, part in zip(probs_S, parts, strict=True))
            hessian = RIDGE * np.eye(len(weight))
            hessian = hessian + sum(p * part[2] for p, part in zip(probs_S, parts, strict=True))
            step = np.linalg.solve(hessian, gradient)
            if np.linalg.norm(gradient) < 1e-10:
                break
            while self._inner(probs_S, weight - step) > value and np.linalg.norm(step) > 1e-12:
                step = step / 2
            weight = weight - step
        self.weight = weight  # where the next one begins
        value, wanted, _ = self.of_set(SOURCES, weight)
        towards = np.linalg.solve(hessian, wanted)
        g_S = np.array([-part[1] @ towards for part in parts])
        return value, probs_S * (g_S - probs_S @ g_S)

    def _inner(self, probs_S: Array, weight: Array) -> float:
        """Σ_i p_i ℓ_i(w) + μ/2 |w|²."""
        losses = [self.of_set(i, weight, deep=False)[0] for i in range(SOURCES)]
        return float(probs_S @ np.array(losses) + RIDGE / 2 * weight @ weight)

    def best(self) -> tuple[Array, list[tuple[int, Array]]]:
        """The best mixture, and those on the way to it, with what was taken until then."""
        way: list[tuple[int, Array]] = []
        found = minimize(
            lambda logits: self.hypergradient(_softmax(logits)), np.zeros(SOURCES), jac=True,
            method="L-BFGS-B", options={"maxiter": 200, "ftol": 1e-16, "gtol": 1e-9},
            callback=lambda logits: way.append((self.taken, _softmax(logits))),
        )  # fmt: skip
        return _softmax(found.x), way


def _softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def search(problem: Problem, rule: str, alpha: float, steps: int, lr: float, seed: int) -> Array:
    """The weights that the library reports after some steps."""
    paper = rule == "paper"
    options = BilevelOptions(
        alpha=alpha,
        **({"mixture_optimizer": "adamw", "resync_interval": None} if paper else {}),
    )  # fmt: skip
    config = TransformerConfig(
        num_layers=1, hidden_size=FEATURES, num_attention_heads=1, calculate_per_token_loss=True
    )
    bio = ScaleBiO(
        options, [f"s{i}" for i in range(SOURCES)], partial(Regression, config),
        DistributedDataParallelConfig(),
        OptimizerConfig(optimizer="adam", lr=lr, adam_beta2=0.95, weight_decay=0.0, clip_grad=1.0),
        losses=lambda model, batch: model(batch), set_trainable=lambda *rest: None,
    )  # fmt: skip
    sampler = BlendSampler([EXAMPLES] * SOURCES, BATCH, seed)
    asked = BlendSampler([EXAMPLES], BATCH, seed + 1)

    def rows(picks: Any, first: int) -> Rows:
        pairs = list(zip(picks.group_B, picks.index_B, strict=True))
        x = torch.stack([problem.sets[first + group][0][row] for group, row in pairs]).float()
        y = torch.stack([problem.sets[first + group][1][row] for group, row in pairs])
        return Rows(x, y, torch.from_numpy(picks.group_B))

    for step in range(steps):
        picks = sampler.next(np.full(SOURCES, 1 / SOURCES) if paper else bio.weights)
        fall = 0.5 * (1 + math.cos(math.pi * step / steps))
        bio.step(
            [rows(picks, 0)], [rows(asked.next(np.ones(1)), SOURCES)],
            lr=lr * (0.1 + 0.9 * fall), inclusion=picks.inclusion_S,
            lr_lambda=options.rate * (fall if paper else 1.0),
        )  # fmt: skip
    return bio.intervals().weight_S.numpy()


def study(condition: float, args: Any, points: list[dict[str, Any]]) -> None:
    """Adds the points of one condition, medians over the seeds."""
    problems = [Problem(seed, condition) for seed in args.seeds]
    best, ways = zip(*(problem.best() for problem in problems), strict=True)

    def add(rule: str, steps: int, gradients: float, found: list[Array]) -> None:
        off = [float(np.abs(p - q).sum()) for p, q in zip(found, best, strict=True)]
        norms = [
            float(np.linalg.norm(problem.hypergradient(p)[1]))
            for problem, p in zip(problems, found, strict=True)
        ]
        points.append({"condition": condition, "rule": rule, "steps": steps, "gradients": gradients,
                       "l1": median(off), "norm": median(norms)})  # fmt: skip
        print(*points[-1].values(), flush=True)
        write_json(args.json, points)

    add("equal weights", 0, 0, [np.full(SOURCES, 1 / SOURCES)] * len(problems))
    for rule in ("default", "paper"):
        for alpha in args.alphas:
            for steps in args.steps:
                found = [
                    search(problem, rule, alpha, steps, args.lr, seed)
                    for problem, seed in zip(problems, args.seeds, strict=True)
                ]
                add(f"{rule}, alpha {alpha:g}", steps, 3 * BATCH * steps, found)
    for steps in (1, 2, 4, 8, 16, 32):
        reached = [way[min(steps, len(way)) - 1] for way in ways]
        add("implicit", steps, median(taken for taken, _ in reached), [p for _, p in reached])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--condition", nargs="+", type=float, default=[1.0, 100.0])
    parser.add_argument("--alphas", nargs="+", type=float, default=[10.0, 100.0])
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 300, 1000, 3000, 10000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--json", type=Path, help="write the points here")
    parser.add_argument("--plot", type=Path, help="draw them into this file (PNG, SVG)")
    args = parser.parse_args()
    runtime.start(Config())
    points: list[dict[str, Any]] = []
    for condition in args.condition:
        study(condition, args, points)
    rows = [
        [p["condition"], p["rule"], p["steps"], f"{p['gradients']:.1e}", f"{p['l1']:.4f}",
         f"{p['norm']:.2e}"]
        for p in points
    ]  # fmt: skip
    print(table(["condition", "rule", "steps", "gradients", "distance", "|Jᵀ ∇F|"], rows))
    if args.plot:
        plot(points, args.plot)


def plot(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    conditions = sorted({p["condition"] for p in points})
    figure, axes = pyplot.subplots(2, len(conditions), figsize=(5 * len(conditions), 7),
                                   sharex=True, sharey="row", squeeze=False)  # fmt: skip
    for column, condition in enumerate(conditions):
        here = [p for p in points if p["condition"] == condition and p["gradients"]]
        for row, (field, label) in enumerate(
            [("l1", "distance to the best mixture"), ("norm", "norm of the hypergradient")]
        ):
            for rule in dict.fromkeys(p["rule"] for p in here):
                line = [(p["gradients"], p[field]) for p in here if p["rule"] == rule]
                axes[row, column].loglog(*zip(*line, strict=True), marker="o", label=rule)
            axes[row, column].set_ylabel(label if column == 0 else "")
            axes[row, column].grid(alpha=0.3)
        # ε^(-7/2) gradients for a hypergradient of ε: a line of slope −2/7.
        x = np.unique([p["gradients"] for p in here if p["rule"] != "implicit"]).astype(float)
        start = max(p["norm"] for p in here)
        axes[1, column].loglog(x, start * (x / x.min()) ** (-2 / 7), "k:", label="slope −2/7")
        axes[0, column].set_title(f"condition {condition:g}")
        axes[1, column].set_xlabel("gradients of single examples")
    axes[1, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
