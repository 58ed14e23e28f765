"""bf16 under LISA at a learning rate of 1e-6 moves as fp32 does, and its hypergradient agrees.

w and u part by less than a bf16 step in all but a few weights. u is never reset, as published, so
that their losses part by more than the rounding of passes over so few tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import next_layout, run_distributed
from tests.markov import write_problem

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PERIODS, INTERVAL = 20, 5


def begin(problem: tuple[list, list], cache: Path, bf16: bool) -> Any:
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods.scalebio import TrainState

    sources, validation = problem
    config = load_config(None, {
        "data": {"seq_length": 32, "sources": sources, "validation": validation},
        "model": {
            "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
        },
        "parallel": {"bf16": bf16},
        "optimizer": {"lr": 1e-6, "lr_decay_style": "constant", "lr_warmup_fraction": 0.0},
        "lisa": {"lisa_layers": 2, "lisa_interval": INTERVAL},
        "bilevel": {"lr_lambda": 1e-12, "resync_interval": None},  # the same batches for both
        "train": {
            "train_iters": PERIODS * INTERVAL, "global_batch_size": 64, "micro_batch_size": 64,
        },
    })  # fmt: skip
    runtime.start(config)
    return TrainState(config, cache)


def fp32_values(training: Any) -> dict[str, torch.Tensor]:
    """Of what trains in the present period."""
    from megatron_scalebio.core.twin import named_parameters

    return {
        name: getattr(p, "main_param", p).detach().view(p.shape).clone()
        for name, p in named_parameters(training.w)
        if p.requires_grad
    }


def run(state: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """How far w's masters have moved, flat; the two sources' difference in excess loss, by step."""
    from megatron_scalebio.methods.scalebio import train_step

    first: dict[str, torch.Tensor] = {}
    last: dict[str, torch.Tensor] = {}
    differences = []
    for _ in range(PERIODS * INTERVAL):
        state.training.enter_period()
        first = fp32_values(state.training) | first
        report = train_step(state)
        assert report.skipped is None
        last |= fp32_values(state.training)
        excess_S = report.losses.w_S - report.losses.u_S
        differences.append(excess_S[0] - excess_S[1])
    moved = [(last[name] - first[name]).flatten().double() for name in sorted(first)]
    return torch.cat(moved), torch.stack(differences)


def on_rank(problem: tuple[list, list], folder: str) -> None:
    from megatron_scalebio.core.twin import named_parameters

    found, weights = {}, {}
    for bf16 in (True, False):
        state = begin(problem, Path(folder) / "cache", bf16)
        for name, parameter in named_parameters(state.training.w):
            parameter.data.copy_(weights.setdefault(name, parameter.detach().clone()))
        found["bf16" if bf16 else "fp32"] = run(state)
        state.training.leave_period()
        next_layout()
    torch.save(found, Path(folder) / "found.pt")


def test_bf16_follows_fp32(tmp_path: Path) -> None:
    problem = write_problem(tmp_path / "data", [1.0, 0.0], 0, examples=200, validation=200)
    run_distributed(on_rank, 1, problem, str(tmp_path))
    found = torch.load(tmp_path / "found.pt")
    (moved, differences), (moved_32, differences_32) = found["bf16"], found["fp32"]
    assert (moved - moved_32).norm() < 0.02 * moved_32.norm()
    assert (differences.sign() == differences_32.sign()).double().mean() >= 0.95
    share = (differences @ differences_32) / (differences_32 @ differences_32)
    assert 0.9 < share < 1.1, "passes see on average what the masters do"
