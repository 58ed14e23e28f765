"""Packed rows against padded ones: padding over a run's batches, and the time of a bilevel step.

    padding   input positions that go through the model, in units of the tokens that have to
    seconds   a bilevel step on packed rows in units of the same step on padded ones, the two in
              turns within one process; median of the ratios of neighbours

The folders are prepared ones, sources first and the validation set last.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import build, table, write_json

from megatron_scalebio.data.batch import micro_batches
from megatron_scalebio.methods.scalebio import TrainState, train_step


def settings(args: Any) -> dict[str, dict]:
    *sources, validation = [{"name": Path(path).name, "path": path} for path in args.prepared]
    hidden = args.hidden
    return {
        "data": {
            "seq_length": args.seq_length, "sources": sources, "validation": [validation]
        },
        "model": {
            "num_layers": args.layers, "hidden_size": hidden, "num_attention_heads": hidden // 64
        },
        "train": {
            "train_iters": 10**6, "global_batch_size": args.global_batch_size,
            "micro_batch_size": args.micro_batch_size,
        },
        "parallel": {"bf16": torch.cuda.is_available()},
    }  # fmt: skip


def padding(state: TrainState, batches: int) -> dict[str, float]:
    """Positions over tokens in training batches under the uniform mixture, padded and packed."""
    padded = state.data.layout
    positions = dict.fromkeys(("padded", "packed"), 0)
    tokens = 0
    for _ in range(batches):
        picks = state.data.sampler.next(state.training.mixture.probs_S.numpy())
        for name in positions:
            layout = replace(padded, packed=name == "packed")
            made = micro_batches(state.data.sources, picks, layout)
            positions[name] += sum(batch.tokens_BS.numel() for batch in made)
        tokens += sum(batch.tokens for batch in made)
    return {name: count / tokens for name, count in positions.items()}


def seconds(state: TrainState, rounds: int) -> dict[str, float]:
    """Of a step, medians; and of the ratios of neighbouring ones."""
    ratios: list[float] = []
    steps: dict[str, list[float]] = {"padded": [], "packed": []}
    for turn in range(rounds + 1):
        taken = {}
        for name in steps:
            sampler = state.data.sampler.state_dict(), state.data.validation_sampler.state_dict()
            state.data.layout = replace(state.data.layout, packed=name == "packed")
            start = time.perf_counter()
            train_step(state)
            taken[name] = time.perf_counter() - start
            if name == "padded":  # both take the same examples
                state.data.sampler.load_state_dict(sampler[0])
                state.data.validation_sampler.load_state_dict(sampler[1])
        if turn:  # the first is to warm up
            ratios.append(taken["packed"] / taken["padded"])
            for name, each in taken.items():
                steps[name].append(each)
    return {"seconds": median(ratios)} | {f"{name}_s": median(all) for name, all in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "prepared", nargs="+", help="of `prepare`: sources, then the validation set"
    )
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batches", type=int, default=200, help="to count padding in")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        state = build(settings(args), Path(cache))
        found = padding(state, args.batches) | seconds(state, args.rounds)
    write_json(args.json, found)
    print(table(["padded", "packed", "padded, s", "packed, s", "packed / padded"], [
        [f"{found[n]:.3f}" for n in ("padded", "packed", "padded_s", "packed_s", "seconds")]
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
