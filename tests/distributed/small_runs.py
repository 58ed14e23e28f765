"""Runs of a very small model on sources and validation sets of uneven lengths and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.distributed.harness import next_layout
from tests.distributed.naive_loop import Groups
from tests.markov import write_source

VOCAB, SEQ = 29, 12
MODEL = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1,
    "ffn_hidden_size": 24, "make_vocab_size_divisible_by": 16, "init_method_std": 0.1,
}  # fmt: skip
SHAPE = {"layers": 2, "heads": 2, "groups": 1, "vocab": VOCAB}
SHARES = [3.0, 1.0, 1.0]
# An eps that rounding noise does not reach, as in test_exact_step.
PLAIN = {"lr": 0.01, "adam_eps": 1e-4}
BATCH = {"train_iters": 6, "micro_batch_size": 2, "global_batch_size": 8}


def write_problem(folder: Path) -> dict[str, list]:
    """Three sources and three validation sets of uneven lengths and masks: their examples."""
    generator = np.random.default_rng(7)
    rows_of: dict[str, list] = {}
    for name, count in (("a", 13), ("b", 5), ("c", 9), ("v", 8), ("x", 5), ("y", 6)):
        lengths = generator.integers(4, SEQ + 1, size=count)
        rows = [generator.integers(0, VOCAB, size=n + 1) for n in lengths]
        masks = [generator.random(n + 1) < 0.6 for n in lengths]
        for mask in masks:
            mask[-1] = True
        write_source(folder, name, rows, masks, vocab_size=VOCAB)
        pairs = zip(rows, masks, strict=True)
        rows_of[name] = [(torch.tensor(row), torch.tensor(mask)) for row, mask in pairs]
    return rows_of


def tree_of(scenario: dict, folder: Path) -> dict:
    """The configuration that a scenario runs with."""
    sources = [{"name": name, "path": str(folder / "data" / name)} for name in "abc"]
    for source, weight in zip(sources, scenario.get("weights", []), strict=False):
        source["initial_weight"] = weight
    validation = [
        {"name": name, "path": str(folder / "data" / name), "weight": weight}
        for name, weight in zip("vxy", SHARES, strict=True)
    ]
    sections = ("optimizer", "bilevel", "lisa", "parallel", "baseline")
    given = {name: dict(scenario.get(name, {})) for name in sections}
    return {
        **given,
        "data": {"seq_length": SEQ, "sources": sources, "validation": validation,
                 **scenario.get("data", {})},
        "model": {**MODEL, **scenario.get("model", {})},
        "train": dict(scenario["train"]),
    }  # fmt: skip


def examples(problem: dict, names: str, draw: dict) -> Groups:
    groups: Groups = {}
    for group, index in draw["picks"]:
        groups.setdefault(group, []).append(problem[names[group]][index])
    return groups


def begun(folder: Path, stage: str, **sections: dict) -> Any:
    """The state of a run before its first step."""
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods.doge import DogeState
    from megatron_scalebio.methods.fastmix import FastmixState
    from megatron_scalebio.methods.finetune import FinetuneState
    from megatron_scalebio.methods.scalebio import TrainState

    scenario = {"optimizer": PLAIN, "train": BATCH, **sections}
    config = load_config(None, tree_of(scenario, folder))
    runtime.start(config)
    make = {
        "reweight": TrainState, "train": FinetuneState, "doge": DogeState, "fastmix": FastmixState,
    }[stage]  # fmt: skip
    return make(config, folder / "cache")


def ended(state: Any) -> None:
    state.training.leave_period()
    next_layout()


def step_of(state: Any) -> tuple[str | None, float]:
    """One step; why it was skipped, and the training loss of w."""
    record = state.make_step()
    return record["skipped"], record["train_loss_w"]
