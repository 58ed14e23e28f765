"""Does the weight of a source fall with its noise? The second denoising setting of the paper.

One set of instructions is cut into ten partitions; in partition i each answer is replaced by a
blank ("____") with probability min(1, 0.2 i), so that partitions 5 to 9 teach nothing. Validation
are instructions of the same set that no partition holds. The weights should fall with the noise,
and the five blank partitions together should end near zero.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

from common import ROOT, build, learn, prepare, table, write_json

PARTITIONS, BLANK = 10, "____"
SATURATED = 5  # from this partition on, every answer is blank


def cut(data: Path, folder: Path, seed: int) -> dict[str, Path]:
    """Writes the partitions and the validation set; where each lies, by name."""
    records = json.loads(data.read_text())
    chance = random.Random(seed)
    chance.shuffle(records)
    validation, records = records[:1000], records[1000:]
    files = {"validation": folder / "validation.json"}
    files["validation"].write_text(json.dumps(validation))
    for number in range(PARTITIONS):
        rows = [
            {**row, "output": BLANK} if chance.random() < 0.2 * number else row
            for row in records[number::PARTITIONS]
        ]
        files[f"p{number}"] = folder / f"p{number}.json"
        files[f"p{number}"].write_text(json.dumps(rows))
    return files


def spearman(values: list[float]) -> float:
    """Rank correlation of the values with their places."""
    count = len(values)
    order = sorted(range(count), key=values.__getitem__)
    rank = {place: number for number, place in enumerate(order)}
    squares = sum((rank[place] - place) ** 2 for place in range(count))
    return 1 - 6 * squares / (count * (count * count - 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT.parent / "shared" / "data" / "denoise" / "train_alpaca.json"
    parser.add_argument("--data", type=Path, default=default, help="JSON in Alpaca format")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--alpha", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            folder = Path(scratch) / str(seed)
            folder.mkdir()
            files = cut(args.data, folder, seed)
            prepare(files, folder / "data", pieces=4000, seq_length=128)
            state = build(settings(folder / "data", files, seed, args), folder)
            run = learn(state, args.steps // 10)
            clean, blank = run["weights"][:SATURATED], sum(run["weights"][SATURATED:])
            runs.append({"seed": seed, "spearman": spearman(clean), "blank": blank, **run})
            print(row(runs[-1]), flush=True)
            write_json(args.json, runs)
    head = ["seed", *(f"p{n}" for n in range(SATURATED)), "p5 to p9", "Spearman of p0 to p4"]
    print(table(head, [row(run) for run in runs]))
    return 0


def settings(prepared: Path, files: dict[str, Path], seed: int, args: argparse.Namespace) -> dict:
    entries = {name: {"name": name, "path": str(prepared / name)} for name in files}
    validation = [entries.pop("validation")]
    return {
        "data": {"seq_length": 128, "sources": list(entries.values()), "validation": validation},
        "model": {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4},
        "optimizer": {"lr": 2e-3},
        "bilevel": {"alpha": args.alpha},
        "train": {
            "train_iters": args.steps, "global_batch_size": 40, "micro_batch_size": 8, "seed": seed,
        },
    }  # fmt: skip


def row(run: dict) -> list[str]:
    weights = [f"{weight:.3f}" for weight in run["weights"][:SATURATED]]
    return [str(run["seed"]), *weights, f"{run['blank']:.3f}", f"{run['spearman']:.2f}"]


if __name__ == "__main__":
    sys.exit(main())
