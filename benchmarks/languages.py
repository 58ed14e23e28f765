"""Does the rare language get its weight? Two languages 9:1 in training, validation in the rare one.

The texts are one manual in two languages: Debian's packages debian-reference-en and -de hold
/usr/share/debian-reference/debian-reference.{en,de}.txt.gz. The frequent language gives nine
pieces for one of the rare; the mixture starts at these proportions. The last tenth of the rare
text is validation.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import tempfile
from pathlib import Path

from common import build, learn, prepare, table, write_json

RATIO = 9
PIECE_CHARS = 400


def pieces(path: Path) -> list[str]:
    """The text in pieces of about 400 characters, cut at line ends."""
    text = gzip.decompress(path.read_bytes()).decode()
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    found, held = [], ""
    for line in lines:
        held = f"{held}\n{line}".strip()
        if len(held) >= PIECE_CHARS:
            found.append(held)
            held = ""
    return found


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frequent", type=Path, required=True, help="text, gzipped")
    parser.add_argument("--rare", type=Path, required=True, help="text, gzipped")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    frequent, rare = pieces(args.frequent), pieces(args.rare)
    kept = len(rare) * 9 // 10
    rare, validation = rare[:kept], rare[kept:]
    random.Random(0).shuffle(rare)
    rare = rare[: len(frequent) // RATIO]
    frequent = frequent[: RATIO * len(rare)]
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {
            "frequent": write(folder / "frequent.jsonl", frequent),
            "rare": write(folder / "rare.jsonl", rare),
            "validation": write(folder / "validation.jsonl", validation),
        }
        prepare(files, folder / "data", pieces=4000, seq_length=128)
        for seed in args.seeds:
            state = build(settings(folder / "data", seed, args.steps), folder / str(seed))
            run = learn(state, args.steps // 10)
            runs.append({"seed": seed, **run})
            print(row(runs[-1]), flush=True)
            write_json(args.json, {"pieces": [len(frequent), len(rare)], "runs": runs})
    print(f"{len(frequent)} pieces of the frequent language, {len(rare)} of the rare, "
          f"{len(validation)} for validation")  # fmt: skip
    head = ["seed", "weight of the rare", "95 % interval", f"every {args.steps // 10} steps"]
    print(table(head, [row(run) for run in runs]))
    return 0


def settings(prepared: Path, seed: int, steps: int) -> dict:
    return {
        "data": {
            "seq_length": 128,
            "sources": [
                {"name": "frequent", "path": str(prepared / "frequent"), "initial_weight": 0.9},
                {"name": "rare", "path": str(prepared / "rare"), "initial_weight": 0.1},
            ],
            "validation": [{"name": "validation", "path": str(prepared / "validation")}],
        },
        "model": {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4},
        "optimizer": {"lr": 2e-3},
        "train": {
            "train_iters": steps, "global_batch_size": 32, "micro_batch_size": 8, "seed": seed,
        },
    }  # fmt: skip


def row(run: dict) -> list[str]:
    path = " ".join(f"{probs[1]:.2f}" for probs in run["trajectory"])
    interval = f"{run['low'][1]:.2f} to {run['high'][1]:.2f}"
    return [str(run["seed"]), f"{run['weights'][1]:.3f}", interval, path]


if __name__ == "__main__":
    sys.exit(main())
