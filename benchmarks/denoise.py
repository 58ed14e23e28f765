"""Does `reweight` prefer the clean source on real text? The ScaleBiO authors' denoising set.

Sources: 9,000 Alpaca and 1,000 GPT-4-Alpaca examples; validation: 1,000 with GPT-4 answers. The
figure is the weight of the GPT-4 source from a uniform start. The public implementation (AdamW on
λ, lr 0.01, α = 10, cosine, 100 steps of batch 32, length 256) ends at 0.59 to 0.61. Here a
Llama-shaped model of 6 layers × 256 starts from scratch too; all bilevel settings are defaults.

The folder needs train_alpaca.json, train_gpt4_alpaca.json and val.json in Alpaca format.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import PUBLISHED, ROOT, build, learn, prepare, table, write_json

FILES = {"alpaca": "train_alpaca.json", "gpt4": "train_gpt4_alpaca.json", "validation": "val.json"}
PUBLIC_CODE = (0.59, 0.61)


def settings(prepared: Path, seed: int, args: Any) -> dict[str, dict]:
    def entry(name: str) -> dict[str, str]:
        return {"name": name, "path": str(prepared / name)}

    return {
        "data": {
            "seq_length": 256,
            "sources": [entry("alpaca"), entry("gpt4")],
            "validation": [entry("validation")],
        },
        "model": {"num_layers": 6, "hidden_size": 256, "num_attention_heads": 4},
        "parallel": {"bf16": args.bf16},
        "optimizer": {"lr": args.lr},
        "bilevel": PUBLISHED if args.published else {},
        "train": {
            "train_iters": args.steps,
            "global_batch_size": 32,
            "micro_batch_size": args.micro_batch_size,
            "seed": seed,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "denoise")
    parser.add_argument("--prepared", type=Path, help="keep the tokenized sets here and reuse them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3, help="of w and u")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--published", action="store_true", help="AdamW on λ, as published")
    parser.add_argument("--json", type=Path, help="write every run here")
    args = parser.parse_args()
    missing = [file for file in FILES.values() if not (args.data / file).is_file()]
    if missing:
        print(f"denoise: {args.data} lacks {', '.join(missing)}; name the folder with --data",
              file=sys.stderr)  # fmt: skip
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        prepared = args.prepared or Path(scratch)
        if not (prepared / "validation").is_dir():
            files = {name: args.data / file for name, file in FILES.items()}
            prepare(files, prepared, pieces=8000, seq_length=256)
        runs = []
        for seed in args.seeds:
            start = time.perf_counter()
            run = learn(build(settings(prepared, seed, args), Path(scratch)), args.steps // 10)
            runs.append({"seed": seed, "seconds": time.perf_counter() - start, **run})
            print(row(runs[-1]), flush=True)
            write_json(args.json, {"settings": settings(prepared, seed, args), "runs": runs})
    tenth = args.steps // 10
    head = ["seed", "GPT-4 weight", "95 % interval", f"every {tenth} steps", "last"]
    print(table(head, [row(run) for run in runs]))
    print(
        f"Public code, same data, batch and number of steps: {PUBLIC_CODE[0]} to {PUBLIC_CODE[1]}"
    )
    return 0


def row(run: dict[str, Any]) -> list[str]:
    path = " ".join(f"{probs[1]:.2f}" for probs in run["trajectory"])
    interval = f"{run['low'][1]:.2f} to {run['high'][1]:.2f}"
    return [str(run["seed"]), f"{run['weights'][1]:.3f}", interval, path, f"{run['last'][1]:.3f}"]


if __name__ == "__main__":
    sys.exit(main())
