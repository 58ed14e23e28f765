"""Which method finds a known mixture, and what is it worth? Markov chains, through `compare`.

20 sources, of which 12 are junk; validation and test sets are drawn from the true mixture. Every
method runs, and `manual` with the truth itself: the best that any fixed mixture can be expected to
do. Beside the test losses stands the distance Σ|p_i − truth_i| of each method's weights. A
stopped benchmark goes on in the same --output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import yaml
from common import ROOT, table
from markov import LENGTH, PROBLEMS
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_scalebio.compare.config import VARIANTS
from tests.markov import VOCAB, draw, transition_matrices

SOURCES, DATA_SEED, ROWS, HELD_OUT = 20, 0, 2000, 4000
END = "</s>"
# LESS can be named: it takes the gradient of each of 40,000 sequences four times, 20 minutes.
METHODS = ["manual", "uniform", "scalebio", "paper", "doge", "fastmix", "doremi", "regmix", "olmix",
           "climb", "rho_loss", "rho_loss_offline"]  # fmt: skip


def write_rows(path: Path, chains: np.ndarray, source_B: np.ndarray, seed: tuple) -> str:
    rows = draw(chains, source_B, LENGTH, seed)
    lines = (json.dumps({"text": " ".join(f"t{token}" for token in row)}) for row in rows)
    path.write_text("\n".join(lines))
    return str(path)


def write_inputs(folder: Path, steps: int) -> Path:
    """Sources, sets drawn from the truth, a tokenizer of one word a token, and the YAML file."""
    config = folder / "compare.yaml"
    if config.exists():
        return config
    folder.mkdir(parents=True, exist_ok=True)
    truth, batch, _ = PROBLEMS[SOURCES]
    words = {**{f"t{token}": token for token in range(VOCAB)}, END: VOCAB}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    chains = transition_matrices(SOURCES, DATA_SEED)
    names = [f"s{number}" for number in range(SOURCES)]
    paths = {
        name: write_rows(folder / f"{name}.jsonl", chains, np.full(ROWS, i), (DATA_SEED, 8, i))
        for i, name in enumerate(names)
    }
    held_out = {}
    for kind, number in (("validation", 9), ("test", 12)):
        source_B = np.random.default_rng((DATA_SEED, number)).choice(SOURCES, HELD_OUT, p=truth)
        file = folder / f"{kind}.jsonl"
        held_out[kind] = {kind: write_rows(file, chains, source_B, (DATA_SEED, number, 1))}
    tree = {
        "tokenizer": str(folder / "tokenizer.json"),
        "sources": paths,
        **held_out,
        "methods": METHODS,
        "seeds": [0, 1, 2],
        "weights": {name: max(share, 1e-6) for name, share in zip(names, truth, strict=True)},
        "variants": {"paper": {**VARIANTS["paper"], "lisa": {"lisa_layers": 2}}},
        "run": {
            "data": {"seq_length": LENGTH},
            "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
            "optimizer": {"lr": 5e-3},
            "train": {
                "train_iters": steps, "global_batch_size": batch, "micro_batch_size": batch,
            },
        },
        "train": {"optimizer": {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.05}},
        "output": str(folder / "comparison"),
    }  # fmt: skip
    config.write_text(yaml.safe_dump(tree, sort_keys=False))
    return config


def spread(values: list[float], digits: int) -> str:
    around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{around}"


def summary(methods: list[dict[str, Any]], truth: list[float]) -> str:
    """One row per method, the best test loss first; `behind` is to the true mixture, same seed."""
    of_truth = {
        run["seed"]: run["test_loss"] for m in methods if m["name"] == "manual" for run in m["runs"]
    }
    rows = []
    for method in sorted(methods, key=lambda m: mean(run["test_loss"] for run in m["runs"])):
        runs = method["runs"]
        off = [
            sum(abs(p - t) for p, t in zip(run["weights"].values(), truth, strict=True))
            for run in runs
        ]
        behind = [r["test_loss"] - of_truth[r["seed"]] for r in runs if r["seed"] in of_truth]
        rows.append([
            "the truth" if method["name"] == "manual" else method["name"], len(runs),
            spread([run["test_loss"] for run in runs], 4), spread(behind, 4) if behind else "",
            spread(off, 2), f"{mean(run['cost'] for run in runs):.1f}",
        ])  # fmt: skip
    return table(["method", "seeds", "test loss", "behind the truth", "distance", "cost"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    config = write_inputs(args.output.absolute(), args.steps)
    subprocess.run(
        [sys.executable, "-m", "megatron_scalebio", "compare", "--config", str(config),
         "--methods", *args.methods, "--seeds", *map(str, args.seeds)],
        check=True, cwd=ROOT,
    )  # fmt: skip
    content = json.loads((config.parent / "comparison" / "compare.json").read_text())
    print(summary(content["methods"], PROBLEMS[SOURCES][0]))


if __name__ == "__main__":
    main()
