"""Which method finds the best mixture where validation is not made of the sources?

The problems of known_answers.py, whose best mixture and whose loss under any other are exact, by
`reweight` under every method with the same options: a search with `--steps` of ScaleBiO's, or the
trainings that cost as much. Reported: distance Σ|p_i − best_i| to the best mixture; regret
(the validation loss of a full training on what was found, less that on the best) in thousandths of
a nat, and in % of what the best gains over equal weights; and tokens that went through models, in
units of ScaleBiO's.
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
from known_answers import PROBLEMS, V, entries

VARIANTS = {"olmix_light": ["--method", "olmix", "--kl-to-prior", "0.001"]}
METHODS = ["scalebio", "doge", "fastmix", "regmix", "olmix", *VARIANTS, "climb", "uniform"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["shift"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for name in args.problems:
        make, batch = PROBLEMS[name]
        problem, folder = make(np.random.default_rng((0, 31))), (args.output / name).absolute()
        config = folder / "run.yaml"
        if not config.exists():
            draw = np.random.default_rng((args.seed, 32))
            sources, validation = entries(folder / "data", problem, draw, 100_000, 20_000)
            tree = {
                "data": {"seq_length": 2, "sources": sources, "validation": validation},
                "model": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 1,
                          "make_vocab_size_divisible_by": V},
                "optimizer": {"lr": 5e-3},
                "train": {"train_iters": args.steps, "global_batch_size": batch,
                          "micro_batch_size": batch, "seed": args.seed, "eval_examples": 4000},
                "checkpoint": {"save_interval": 0},
            }  # fmt: skip
            config.write_text(yaml.safe_dump(tree))
        best = problem.best()
        uniform = np.full(len(best), 1 / len(best))
        gain = problem.loss(uniform) - problem.loss(best)
        for method in args.methods:
            words = VARIANTS.get(method, ["--method", method])
            run = folder / method
            if not (run / "weights.json").exists():
                subprocess.run(
                    [sys.executable, "-m", "megatron_scalebio", "reweight", "--config", str(config),
                     "--output", str(run), *words],
                    check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
                )  # fmt: skip
            found = json.loads((run / "weights.json").read_text())
            weights = np.array([source["weight"] for source in found["sources"]])
            regret = problem.loss(weights) - problem.loss(best)
            tokens = sum(found["cost"].values()) / (args.steps * batch * 3)
            rows.append([
                name, method, f"{np.abs(weights - best).sum():.3f}", f"{1e3 * regret:.2f}",
                f"{regret / gain:.1%}", f"{tokens:.2f}",
            ])  # fmt: skip
            print(*rows[-1], flush=True)
    print(table(["problem", "method", "distance", "regret, 1e-3 nats", "regret, %", "cost"], rows))


if __name__ == "__main__":
    main()
