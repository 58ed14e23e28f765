"""Does `reweight` find a known mixture? Markov-chain sources, a small GPT, several α and seeds.

The validation set is drawn from `truth`; sources with truth 0 are junk. The reported figure is
the distance Σ|p_i − truth_i| of the reported weights, mean over seeds; "holds" is the share of 95 %
intervals that hold the truth, of the sources in use and of the junk sources. Bars: 0.10 with 5
sources, 0.25 with 20. Each seed draws other chains, other data and another initialisation.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from common import PUBLISHED, build, learn, table, write_json

from tests.markov import write_problem

# Per number of sources: the true mixture, sequences per step, the bar.
PROBLEMS: dict[int, tuple[list[float], int, float]] = {
    5: ([0.5, 0.3, 0.2, 0.0, 0.0], 20, 0.10),
    20: ([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05] + [0.0] * 12, 40, 0.25),
}
LENGTH = 32
# Four experts of half the dense MLP's width, two for each token: as many parameters at work.
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 64, "moe_aux_loss_coeff": 0.01}


def settings(problem: tuple[list, list], alpha: float, seed: int, args: Any) -> dict[str, dict]:
    sources, validation = problem
    batch = PROBLEMS[len(sources)][1]
    return {
        "data": {"seq_length": LENGTH, "sources": sources, "validation": validation},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            **(EXPERTS if args.experts else {}),
        },
        "optimizer": {"lr": 5e-3},
        "bilevel": {"alpha": alpha, **(PUBLISHED if args.published else {})},
        "train": {
            "train_iters": args.steps,
            "global_batch_size": batch,
            "micro_batch_size": batch,
            "seed": seed,
        },
    }


def one_run(problem: tuple[list, list], alpha: float, seed: int, args: Any) -> dict[str, Any]:
    truth = PROBLEMS[len(problem[0])][0]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        result = learn(build(settings(problem, alpha, seed, args), Path(cache)), 50)
    lines = list(zip(result["weights"], result["low"], result["high"], truth, strict=True))
    result["l1"] = sum(abs(p - t) for p, _, _, t in lines)
    result["covered_used"] = mean(low <= t <= high for _, low, high, t in lines if t > 0)
    result["covered_junk"] = mean(low <= t <= high for _, low, high, t in lines if t == 0)
    result["largest_junk"] = max(p for p, _, _, t in lines if t == 0)
    return {"alpha": alpha, "seed": seed, **result, "seconds": time.perf_counter() - start}


def summary(runs: list[dict[str, Any]], bar: float) -> str:
    head = ["alpha", "seeds", "distance mean", "distance max", "bar", "junk max", "holds: used",
            "holds: junk", "converged"]  # fmt: skip
    rows = []
    for alpha in sorted({run["alpha"] for run in runs}):
        those = [run for run in runs if run["alpha"] == alpha]
        rows.append([
            f"{alpha:g}", len(those), f"{mean(r['l1'] for r in those):.3f}",
            f"{max(r['l1'] for r in those):.3f}", bar,
            f"{max(r['largest_junk'] for r in those):.3f}",
            f"{mean(r['covered_used'] for r in those):.2f}",
            f"{mean(r['covered_junk'] for r in those):.2f}",
            f"{sum(r['converged'] for r in those)} of {len(those)}",
        ])  # fmt: skip
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, choices=sorted(PROBLEMS), default=5)
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0, 10.0, 100.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--published", action="store_true", help="AdamW on λ, as published")
    parser.add_argument("--experts", action="store_true", help="a mixture of four experts")
    parser.add_argument("--json", type=Path, help="write every run here")
    args = parser.parse_args()
    truth, _, bar = PROBLEMS[args.sources]
    runs = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            problem = write_problem(Path(folder), truth, seed, LENGTH + 1)
            for alpha in args.alphas:
                runs.append(one_run(problem, alpha, seed, args))
                run = runs[-1]
                print(f"alpha {alpha:g} seed {seed}: distance {run['l1']:.3f}, "
                      f"{run['seconds']:.0f} s; {run['reason']}", flush=True)  # fmt: skip
                write_json(args.json, {"truth": truth, "steps": args.steps, "runs": runs})
    print(summary(runs, bar))


if __name__ == "__main__":
    main()
