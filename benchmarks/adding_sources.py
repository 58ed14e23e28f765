"""Does a run that is given one more source need fewer steps than one from scratch?

Markov sources with a known mixture, of which one that the validation set wants is missing at first.
`former` learns the mixture of the others; `added` goes on from its weights and its model with the
missing source at --new-share, for a third of the steps. Beside them `scratch`, with all sources
from random weights, for all steps and for a third. The figure is the distance Σ|p_i − truth_i|.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from common import ROOT, table, write_json
from markov import LENGTH, PROBLEMS

from tests.commands import write_config
from tests.markov import write_problem

MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 128}


def learned(folder: Path, name: str, sources: list, validation: list, **train: Any) -> dict:
    words = train.pop("words", [])
    sections = {
        "data": {"seq_length": LENGTH}, "model": MODEL, "optimizer": {"lr": 5e-3}, "train": train,
        "checkpoint": {"save_interval": 0},
    }  # fmt: skip
    config = write_config(folder / f"{name}.yaml", sources, validation, **sections)
    command = [sys.executable, "-m", "megatron_scalebio", "reweight", "--config", str(config)]
    command += ["--output", str(folder / name), *map(str, words)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return json.loads((folder / name / "weights.json").read_text())


def one_seed(folder: Path, args: Any, seed: int) -> list[dict[str, Any]]:
    truth, batch, _ = PROBLEMS[args.sources]
    sources, validation = write_problem(folder / "data", truth, seed, LENGTH + 1)
    lengths = {"global_batch_size": batch, "micro_batch_size": batch, "seed": seed}
    whole = {"train_iters": args.steps, **lengths}
    third = {"train_iters": args.steps // 3, **lengths}
    runs: list[dict[str, Any]] = []

    def note(run: str, missing: int, result: dict) -> None:
        weights = {line["name"]: line["weight"] for line in result["sources"]}
        weight_S = [weights[f"s{number}"] for number in range(len(truth))]
        l1 = sum(abs(p - t) for p, t in zip(weight_S, truth, strict=True))
        off = abs(weight_S[missing] - truth[missing])
        about = {"run": run, "missing": missing, "seed": seed, "converged": result["converged"]}
        runs.append({**about, "weights": weight_S, "l1": l1, "off": off})
        print(f"{run}, s{missing}, seed {seed}: distance {l1:.3f}", flush=True)

    scratch = learned(folder, "scratch", sources, validation, **whole)
    short = learned(folder, "short", sources, validation, **third)
    for missing in args.missing:
        old = [entry for number, entry in enumerate(sources) if number != missing]
        former = folder / f"without-{missing}"
        learned(folder, former.name, old, validation, **whole)
        start = ["--weights", former, "--new-share", args.new_share]
        start += ["--pretrained-checkpoint", former / "checkpoints"]
        name = f"with-{missing}"
        added = learned(folder, name, sources, validation, **third, words=start)
        for run, result in (("scratch", scratch), ("scratch, a third", short),
                            ("added, a third", added)):  # fmt: skip
            note(run, missing, result)
    return runs


def summary(runs: list[dict[str, Any]]) -> str:
    rows = []
    for missing, name in dict.fromkeys((run["missing"], run["run"]) for run in runs):
        those = [run for run in runs if (run["missing"], run["run"]) == (missing, name)]
        rows.append([
            f"s{missing}", name, len(those), f"{mean(r['l1'] for r in those):.3f}",
            f"{max(r['l1'] for r in those):.3f}", f"{mean(r['off'] for r in those):.3f}",
            f"{sum(r['converged'] for r in those)} of {len(those)}",
        ])  # fmt: skip
    head = ["missing", "run", "seeds", "distance mean", "distance max", "new weight off by",
            "converged"]  # fmt: skip
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, choices=sorted(PROBLEMS), default=5)
    parser.add_argument("--missing", type=int, nargs="+", default=[0, 2], help="whose turn it is")
    parser.add_argument("--new-share", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write every run here")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs += one_seed(Path(folder), args, seed)
        write_json(args.json, runs)
    print(summary(runs))


if __name__ == "__main__":
    main()
