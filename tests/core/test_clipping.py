"""Gradients made ready to step with, by a toy of Megatron's optimizers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_scalebio.core import period
from megatron_scalebio.core.period import prepare_gradients


class ToyOptimizer:
    """A chain of Megatron's optimizers."""

    def __init__(self, norm: float, most: float, parameters: int = 3) -> None:
        self.norm, self.prepared = norm, False
        self.config = SimpleNamespace(clip_grad=most)
        self.held = [torch.nn.Parameter(torch.zeros(2)) for _ in range(parameters)]

    def get_parameters(self) -> list[torch.nn.Parameter]:
        return self.held

    def prepare_grads(self) -> None:
        self.prepared = True

    def get_grad_norm(self) -> torch.Tensor:
        assert self.prepared
        return torch.tensor(self.norm)


@pytest.mark.parametrize(
    ("norm", "most", "clips"),
    [(8.0, 2.0, True), (8.0, 0.25, True), (8.0, 0.0, False), (math.inf, 2.0, False)],
)
def test_gradients_are_clipped_by_the_norm_of_all(
    monkeypatch: pytest.MonkeyPatch, norm: float, most: float, clips: bool
) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(period, "clip_grad_by_total_norm_fp32", lambda *given: calls.append(given))
    optimizer: Any = ToyOptimizer(norm, most)
    got = prepare_gradients(optimizer)
    assert got == norm and isinstance(got, float)
    assert optimizer.prepared
    assert calls == ([(optimizer.held, most, norm)] if clips else [])
    calls.clear()
    nothing_trains: Any = ToyOptimizer(norm, most, parameters=0)  # on this stage
    assert prepare_gradients(nothing_trains) == norm and not calls
