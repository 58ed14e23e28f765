"""Ten thousand Megatron prefixes under `ulimit -n 1024`: start, resume, memory, step time, ranking.

Sources are Markov chains, corpus/TOPIC/FORMAT/PART.bin and .idx: a chain of each topic, mixed with
uniform noise that differs by format. Validation is drawn from two topics. The same steps are run
over --few of the sources and over all, each started and then resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from common import ROOT, table, write_json

from tests.markov import VOCAB, draw, transition_matrices

TOPICS, FORMATS = 20, 5
WANTED = (0, 1)  # topics of the validation set
LENGTH = 32
PARTS = ("{grandparent}", "{parent}", "{stem}")
SEPARATOR = {True: "/", False: "-"}  # names without a slash make no groups


def write_prefix(prefix: Path, rows: np.ndarray) -> None:
    """As Megatron's IndexedDatasetBuilder writes rows of one length, in a tenth of the time."""
    from megatron_scalebio.data.indexed import HEADER, MAGIC, VERSION

    prefix.parent.mkdir(parents=True, exist_ok=True)
    rows.astype(np.uint16).tofile(f"{prefix}.bin")
    count, length = rows.shape
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, count, count + 1))
        np.full(count, length, np.int32).tofile(file)
        (2 * length * np.arange(count, dtype=np.int64)).tofile(file)
        np.arange(count + 1, dtype=np.int64).tofile(file)


def write_corpus(folder: Path, sources: int, documents: int) -> None:
    """`sources` prefixes in TOPICS × FORMATS folders, and the validation set."""
    matrices = transition_matrices(TOPICS, 0)
    noise_F = np.linspace(0, 0.4, FORMATS)
    for number in range(sources):
        topic, kind = number % TOPICS, number // TOPICS % FORMATS
        mixed = (1 - noise_F[kind]) * matrices[topic] + noise_F[kind] / VOCAB
        rows = draw(mixed[None], np.zeros(documents, int), LENGTH + 1, (1, number))
        write_prefix(folder / f"topic{topic:02d}" / f"format{kind}" / f"part{number:05d}", rows)
    wanted = np.resize(WANTED, 2000)
    write_prefix(folder / "goal", draw(matrices, wanted, LENGTH + 1, (2,)))


def settings(folder: Path, pattern: str, args: Any) -> dict[str, dict[str, Any]]:
    return {
        "data": {
            "seq_length": LENGTH,
            "sources": {"glob": f"{folder}/{pattern}", "name": SEPARATOR[args.named].join(PARTS)},
            "validation": [{"name": "goal", "path": str(folder / "goal")}],
        },
        "model": {
            "num_layers": 2, "hidden_size": args.hidden, "num_attention_heads": 4,
            "vocab_size": VOCAB,
        },
        "bilevel": {"group_sources": args.group_sources},
        "optimizer": {"lr": 3e-3},
        "train": {"global_batch_size": args.batch, "micro_batch_size": args.batch},
        "checkpoint": {"save_interval": 0},
    }  # fmt: skip


def run(config: Path, output: Path, iters: int) -> dict[str, Any]:
    """One start of the real command; what it took."""

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    words = [sys.executable, "-m", "megatron_scalebio", "reweight", "--config", str(config)]
    words += ["--output", str(output), "--train-iters", str(iters)]
    begun = time.time()
    log = output / "metrics.jsonl"
    before = log.stat().st_size if log.exists() else 0
    process = subprocess.Popen(words, cwd=ROOT, preexec_fn=few_files)
    first = None
    while process.poll() is None:
        if first is None and log.exists() and log.stat().st_size > before:
            first = time.time() - begun
        time.sleep(0.05)
    assert process.returncode == 0, process.returncode
    records = [json.loads(line) for line in log.open()]
    return {
        "first_step_s": first,
        "whole_s": time.time() - begun,
        "step_s": median(record["step_time_s"] for record in records[len(records) // 4 :]),
        "peak_bytes": json.loads((output / "memory.json").read_text())["peak_bytes"],
        "line_bytes": log.stat().st_size / len(records),
        "folder_files": sum(len(files) for _, _, files in os.walk(output / "cache")),
    }


def weights_of_topics(output: Path) -> dict[str, float]:
    sums: dict[str, float] = {}
    for entry in json.loads((output / "weights.json").read_text())["sources"]:
        topic = entry["name"].replace("/", "-").split("-")[0]
        sums[topic] = sums.get(topic, 0.0) + entry["weight"]
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, default=10_000)
    parser.add_argument("--few", default="topic*/format0/part0000[0-9].idx")
    parser.add_argument("--documents", type=int, default=40, help="of a source, 33 tokens each")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--named", action=argparse.BooleanOptionalAction, default=True,
                        help="the sources' names say their topics")  # fmt: skip
    parser.add_argument("--group-sources", type=int, help="groups by gradients, with --no-named")
    parser.add_argument("--corpus", type=Path, help="keep the sources here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.corpus or Path(scratch) / "corpus"
        if not (folder / "goal.idx").exists():
            write_corpus(folder, args.sources, args.documents)
        figures = {}
        for name, pattern in (("few", args.few), ("all", "topic*/*/*.idx")):
            config, output = Path(scratch) / f"{name}.yaml", Path(scratch) / name
            config.write_text(yaml.safe_dump(settings(folder, pattern, args)))
            for start, iters in (("start", args.steps), ("resume", args.steps + 20)):
                figures[f"{name}, {start}"] = run(config, output, iters)
        topics = weights_of_topics(Path(scratch) / "all")
    write_json(args.json, {"figures": figures, "topics": topics})
    head = ["run", *next(iter(figures.values()))]
    rows = [[name, *(f"{v:.4g}" for v in each.values())] for name, each in figures.items()]
    print(table(head, rows))
    print("topics:", {name: round(weight, 3) for name, weight in list(topics.items())[:4]})


if __name__ == "__main__":
    main()
