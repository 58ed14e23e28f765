"""Do scores of single examples find label noise inside one source? Beside LESS and RHO-LOSS.

Three Markov sources, validation from the first (0.6) and the second (0.4); in 20 % of the first
source's rows tokens are not its chain's: drawn at random, all of them (`random`) or every other one
on average (`half`), or drawn from a chain that validation does not have (`chain`). Reported of that
source: AUC of the scores against the noise, and what the best 80 % by score keep of its clean rows
and of its noise; tokens that went through models, ScaleBiO's without scores being 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from common import ROOT, table

from tests.markov import VOCAB, draw, transition_matrices, write_source

NOISE, LENGTH, BATCH = 0.2, 33, 32
METHODS = {
    "scalebio": ["--level", "example"],
    "less": ["--method", "less"],
    "rho_loss": ["--method", "rho_loss"],
    "rho_loss_offline": ["--method", "rho_loss", "--no-rho-online"],
}


def write_problem(folder: Path, kind: str, examples: int, seed: int) -> dict:
    """Writes the data; its part of a configuration."""
    matrices = transition_matrices(4, seed)
    noisy_N = noisy_rows(examples, seed)
    generator, count = np.random.default_rng((seed, 22)), int(noisy_N.sum())
    entries = []
    for number in range(3):
        rows = draw(matrices, np.full(examples, number), LENGTH, (seed, 8, number))
        if number == 0 and kind == "chain":
            rows[noisy_N] = draw(matrices, np.full(count, 3), LENGTH, (seed, 21))
        elif number == 0:
            wrong = generator.random((count, LENGTH)) < (0.5 if kind == "half" else 1.0)
            anything = generator.integers(VOCAB, size=(count, LENGTH))
            rows[noisy_N] = np.where(wrong, anything, rows[noisy_N])
        name = f"s{number}"
        entries.append({"name": name, "path": write_source(folder, name, list(rows))})
    rows = draw(matrices, np.repeat([0, 1], [2400, 1600]), LENGTH, (seed, 9))
    path = write_source(folder, "validation", list(rows))
    validation = [{"name": "validation", "path": path}]
    return {"seq_length": LENGTH - 1, "sources": entries, "validation": validation}


def noisy_rows(examples: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, 20)).random(examples) < NOISE


def scores_of(run: Path, examples: int) -> np.ndarray:
    """Of the first source's rows, NaN where there is none.

    Online RHO-LOSS chooses in every batch: how often a row was chosen is its verdict.
    """
    if (run / "example_weights.npz").exists():
        return np.load(run / "example_weights.npz")["score"][:examples]
    held = np.load(run / "scores.npz")
    return held["chosen" if "chosen" in held else "score"][:examples].astype(float)


def auc(score_N: np.ndarray, noisy_N: np.ndarray) -> float:
    """How often a clean row scores above a noisy one."""
    rank_N = np.empty(len(score_N))
    rank_N[np.argsort(score_N, kind="stable")] = np.arange(len(score_N))
    clean, noisy = int((~noisy_N).sum()), int(noisy_N.sum())
    return float((rank_N[~noisy_N].sum() - clean * (clean - 1) / 2) / (clean * noisy))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--noise", choices=["random", "half", "chain"], default="half")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--examples", type=int, default=2000, help="of each source")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args, more = parser.parse_known_args()  # more: options of `reweight`, for all methods
    rows = []
    for seed in args.seeds:
        folder = (args.output / f"{args.noise}-{args.examples}-{seed}").absolute()
        noisy_N, config = noisy_rows(args.examples, seed), folder / "run.yaml"
        if not config.exists():
            tree = {
                "data": write_problem(folder / "data", args.noise, args.examples, seed),
                "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
                "optimizer": {"lr": 5e-3},
                "train": {"train_iters": args.steps, "global_batch_size": BATCH,
                          "micro_batch_size": BATCH, "seed": seed},
                "checkpoint": {"save_interval": 0},
            }  # fmt: skip
            config.write_text(yaml.safe_dump(tree))
        for method in args.methods:
            run = folder / "_".join([method, *more]).replace("--", "")
            if not (run / "weights.json").exists():
                subprocess.run(
                    [sys.executable, "-m", "megatron_scalebio", "reweight", "--config", str(config),
                     "--output", str(run), *METHODS[method], *more],
                    check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
                )  # fmt: skip
            score_N = scores_of(run, args.examples)
            known = np.isfinite(score_N)
            best = np.argsort(-np.nan_to_num(score_N, nan=-np.inf), kind="stable")
            best = best[: round((1 - NOISE) * len(best))]
            kept = np.isin(np.arange(len(score_N)), best)
            tokens = sum(json.loads((run / "weights.json").read_text())["cost"].values())
            rows.append([
                args.noise, seed, run.name, f"{known.mean():.0%}",
                f"{auc(score_N[known], noisy_N[known]):.3f}",
                f"{kept[~noisy_N].mean():.1%}", f"{kept[noisy_N].mean():.1%}",
                f"{tokens / (args.steps * BATCH * (LENGTH - 1) * 3):.2f}",
            ])  # fmt: skip
            print(*rows[-1], flush=True)
    head = ["noise", "seed", "method", "scored", "AUC", "clean kept", "noise kept", "cost"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
