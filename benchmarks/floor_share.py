"""How many examples should each source get in a batch? The variance of the gradients decides.

A batch of B deals source i about B · ((1 − f) p_i + f / S) examples (f: `bilevel.floor_share`).
Few examples of a source make its mean loss noisy; how much that matters depends on p_i. At one
fixed point (a model after some steps of `reweight`, u away from w) this draws many batches per f
and reports the total variance of Jᵀg, the gradient in λ, and of the gradients in w and u, each
relative to f = 1 (equal counts). Lower is better.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import build, table, write_json
from markov import LENGTH, PROBLEMS

from megatron_scalebio.methods.scalebio import TrainState, train_step
from megatron_scalebio.mixture.objective import hypergradient, logits_gradient
from megatron_scalebio.mixture.sampler import BlendSampler
from tests.markov import write_problem

FLOORS = (1.0, 0.5, 0.25, 0.1)
LEAST = 1e-3  # of a source's weight in the concentrated mixture


class Spread:
    """Total variance (trace of the covariance) of vectors, by running sums in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()).double(), 0.0

    def add(self, vector: torch.Tensor) -> None:
        self.count += 1
        self.total = self.total + vector.double()
        self.squares += float(vector.double().square().sum())

    def variance(self) -> float:
        mean_square = float((self.total / self.count).square().sum())
        return (self.squares / self.count - mean_square) * self.count / (self.count - 1)


def fixed_point(folder: Path, sources: int, steps: int) -> TrainState:
    """A run with default settings after some steps, between two resets of u."""
    truth, batch, _ = PROBLEMS[sources]
    entries, validation = write_problem(folder / "data", truth, 0, LENGTH + 1)
    state = build(
        {
            "data": {"seq_length": LENGTH, "sources": entries, "validation": validation},
            "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
            "optimizer": {"lr": 5e-3},
            "train": {"global_batch_size": batch, "micro_batch_size": batch},
        },
        folder / "cache",
    )
    for _ in range(steps):
        train_step(state)
    return state


def variances(
    state: TrainState, probs_S: torch.Tensor, floor: float, batches: int
) -> dict[str, float]:
    """Total variance over batches of the gradients in λ, w and u; nothing is stepped."""
    train, alpha = state.config.train, state.config.bilevel.alpha
    sizes = [len(source) for source in state.data.sources]
    state.data.sampler = BlendSampler(sizes, train.global_batch_size, 99, floor)
    bio, period = state.training, state.training.period
    assert period is not None
    spread = {name: Spread() for name in ("lambda", "w", "u")}
    for _ in range(batches):
        rows, valid, picks, _ = state.data.next(probs_S)
        inclusion_S, shares_V = torch.from_numpy(picks.inclusion_S), bio.validation_shares_V
        passes = bio.passes(rows, valid, probs_S / inclusion_S, shares_V, alpha)
        period.zero_grad()
        losses = bio.flush(passes, len(probs_S), len(shares_V))
        g = hypergradient(losses.w_S - losses.u_S, probs_S, inclusion_S, alpha)
        spread["lambda"].add(logits_gradient(g, probs_S))
        spread["w"].add(period.ddp["w"][0].buffers[0].grad_data)
        spread["u"].add(period.ddp["u"][0].buffers[0].grad_data)
    return {name: one.variance() for name, one in spread.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", type=int, nargs="+", choices=sorted(PROBLEMS), default=[5, 20])
    parser.add_argument("--steps", type=int, default=66, help="before the fixed point")
    parser.add_argument("--batches", type=int, default=200, help="drawn at the fixed point")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    for sources in args.sources:
        with tempfile.TemporaryDirectory() as folder:
            state = fixed_point(Path(folder), sources, args.steps)
            truth = torch.tensor(PROBLEMS[sources][0]).double().clamp_min(LEAST)
            mixtures = {
                "uniform": torch.full_like(truth, 1 / sources),
                "concentrated": truth / truth.sum(),
            }
            for name, probs_S in mixtures.items():
                for floor in FLOORS:
                    values = variances(state, probs_S, floor, args.batches)
                    found.append({"sources": sources, "p": name, "floor_share": floor, **values})
                    write_json(args.json, found)
    print(report(found))


def report(found: list[dict[str, Any]]) -> str:
    rows = []
    for line in found:
        unit = next(
            other for other in found
            if (other["sources"], other["p"], other["floor_share"])
            == (line["sources"], line["p"], 1.0)
        )  # fmt: skip
        relative = [f"{line[name] / unit[name]:.2f}" for name in ("lambda", "w", "u")]
        rows.append([line["sources"], line["p"], line["floor_share"], *relative])
    return table(["sources", "p", "floor_share", "Var Jᵀg", "Var grad w", "Var grad u"], rows)


if __name__ == "__main__":
    main()
