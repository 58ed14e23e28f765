"""A model that is no GPT, with batches of its own kind, on two data-parallel ranks: softmax
regression, whose first step is known by hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed
CLASSES, FEATURES, EACH, STEPS = 3, 5, 24, 150


@dataclass(frozen=True)
class Rows:
    x_BF: torch.Tensor
    y_B: torch.Tensor
    group_B: torch.Tensor
    tokens: int = 0

    @property
    def mask_BS(self) -> torch.Tensor:
        return torch.ones(len(self.y_B), 1)


def rows(step: int, teachers: list[torch.Tensor], rank: int) -> Rows:
    draw = torch.Generator().manual_seed(2 * step + rank)
    x_BF = torch.randn(EACH * len(teachers), FEATURES, generator=draw)
    group_B = torch.arange(len(x_BF)) // EACH
    logits_BC = torch.einsum("bf,bcf->bc", x_BF, torch.stack(teachers)[group_B])
    return Rows(x_BF, logits_BC.argmax(1), group_B)


def on_ranks(folder: str) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    from megatron_scalebio import BilevelOptions, ScaleBiO
    from megatron_scalebio.compat import adapt

    class Regression(MegatronModule):
        def __init__(self, config: TransformerConfig, *stages: Any, **more: Any) -> None:
            super().__init__(config)
            self.weight = torch.nn.Parameter(torch.full((CLASSES, FEATURES), 0.1))

        def set_input_tensor(self, tensor: Any) -> None: ...

        def forward(self, batch: Rows) -> torch.Tensor:
            logits_BC = batch.x_BF @ self.weight.T
            return torch.nn.functional.cross_entropy(logits_BC, batch.y_B, reduction="none")[
                :, None
            ]

    adapt()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1, hidden_size=FEATURES, num_attention_heads=1, calculate_per_token_loss=True
    )
    bio = ScaleBiO(
        BilevelOptions(), ["wanted", "wrong"], partial(Regression, config),
        DistributedDataParallelConfig(), OptimizerConfig(optimizer="adam", lr=0.01, clip_grad=0.0),
        losses=lambda model, batch: model(batch), set_trainable=lambda *rest: None,
    )  # fmt: skip
    right, wrong = torch.randn(2, CLASSES, FEATURES, generator=torch.Generator().manual_seed(1))
    rank = dist.get_rank()
    reports = [
        bio.step([rows(n, [right, wrong], rank)], [rows(1000 + n, [right], rank)], lr=0.01)
        for n in range(STEPS)
    ]
    if rank == 0:
        first = reports[0]
        found = {"w": first.losses.w_S, "valid": first.losses.validation_V,
                 "weights": bio.weights.copy()}  # fmt: skip
        torch.save({k: torch.as_tensor(v) for k, v in found.items()}, Path(folder) / "found.pt")


def test_another_kind_of_model_is_reweighted(tmp_path: Path) -> None:
    run_distributed(on_ranks, 2, str(tmp_path))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    right, wrong = torch.randn(2, CLASSES, FEATURES, generator=torch.Generator().manual_seed(1))

    def mean(step: int, teachers: list[torch.Tensor]) -> list[float]:
        parts = [rows(step, teachers, rank) for rank in range(2)]
        x, y, group = (
            torch.cat([getattr(p, name) for p in parts]) for name in ("x_BF", "y_B", "group_B")
        )
        loss_B = torch.nn.functional.cross_entropy(
            x @ torch.full((FEATURES, CLASSES), 0.1), y, reduction="none"
        )
        return [float(loss_B[group == i].mean()) for i in range(len(teachers))]

    assert found["w"].tolist() == pytest.approx(mean(0, [right, wrong]), abs=1e-6)
    assert found["valid"].tolist() == pytest.approx(mean(1000, [right]), abs=1e-6)
    assert found["weights"][0] > 0.95
