"""Softmax regression as a model of Megatron's, and a ScaleBiO of it: a step takes milliseconds."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model

SOURCES, SETS, CLASSES, FEATURES, LAYERS = ["a", "b", "c"], ["v", "x", "none"], 4, 5, 4
BIAS_RATE, SEED = 0.01, 5
ADAM: dict[str, Any] = {
    "weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 1e-3, "clip_grad": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """A micro-batch: each row is a sequence of one label."""

    x_BF: torch.Tensor
    y_B: torch.Tensor
    group_B: torch.Tensor
    tokens: int

    @property
    def mask_BS(self) -> torch.Tensor:
        return torch.ones(len(self.y_B), 1)


def rows(seed: int, groups: Sequence[int]) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    x_BF = torch.randn(len(groups), FEATURES, generator=draw)
    y_B = torch.randint(CLASSES, (len(groups),), generator=draw)
    return Rows(x_BF, y_B, torch.tensor(groups), tokens=7 * len(groups))


class Counter(TopKRouter):
    """Of a mixture of experts the part that counts: each class is an expert, and routes nothing."""

    def __init__(self, config: Any) -> None:
        MegatronModule.__init__(self, config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.router_replay = None
        self.register_buffer("expert_bias", torch.zeros(CLASSES))
        self.register_buffer("local_tokens_per_expert", torch.zeros(CLASSES), persistent=False)

    def forward(self, y_B: torch.Tensor) -> None:  # type: ignore[override]
        if self.enable_expert_bias:
            self.local_tokens_per_expert += y_B.bincount(minlength=CLASSES)


class Regression(MegatronModule):
    """The sum of linear layers, which LISA can draw from."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__(config)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(FEATURES, CLASSES, bias=False) for _ in range(LAYERS)
        )
        for layer in self.layers:
            torch.nn.init.normal_(layer.weight, std=0.3)
        self.router = Counter(config)

    def set_input_tensor(self, tensor: Any) -> None: ...

    def forward(self, batch: Rows) -> torch.Tensor:
        self.router(batch.y_B)
        weight_CF = sum(layer.weight for layer in self.layers)
        logits_BC = (batch.x_BF.to(weight_CF.dtype) @ weight_CF.T).float()
        return torch.nn.functional.cross_entropy(logits_BC, batch.y_B, reduction="none")[:, None]


def set_trainable(chunks: Any, layers: list[int] | None, lisa: Any) -> None:
    for chunk in chunks:
        for number, layer in enumerate(unwrap_model(chunk).layers):
            layer.requires_grad_(layers is None or number in layers)


def parts(bf16: bool = False, ddp: dict | None = None) -> dict[str, Any]:
    """What a `Training` of it is made with."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    kind = {"bf16": bf16, "params_dtype": torch.bfloat16 if bf16 else torch.float32}
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=FEATURES, num_attention_heads=1, use_cpu_initialization=True,
        calculate_per_token_loss=True, pipeline_dtype=kind["params_dtype"], **kind,
    )  # fmt: skip
    config.moe_router_enable_expert_bias, config.moe_router_bias_update_rate = True, BIAS_RATE
    sharded = (ddp or {}).get("use_distributed_optimizer", False)
    return {
        "model_provider": lambda **stages: Regression(config, **stages),
        "ddp": DistributedDataParallelConfig(grad_reduce_in_fp32=True, **(ddp or {})),
        "optimizer": OptimizerConfig(
            optimizer="adam", lr=0.1, use_distributed_optimizer=sharded, **kind, **ADAM
        ),
        "losses": lambda model, batch: model(batch),
        "set_trainable": set_trainable,
    }  # fmt: skip


def bilevel(options: dict | None = None, bf16: bool = False, **given: Any) -> Any:
    from megatron_scalebio import BilevelOptions, ScaleBiO

    sets = dict.fromkeys(SETS, 1.0)
    made = {**parts(bf16, given.pop("ddp", None)), "seed": SEED, "validation": sets, **given}
    return ScaleBiO(BilevelOptions(**{"resync_interval": 3, **(options or {})}), SOURCES, **made)


def weights_of(bio: Any, name: str) -> list[torch.Tensor]:
    return [layer.weight.detach() for layer in unwrapped(bio, name).layers]


def unwrapped(bio: Any, name: str) -> Any:
    return unwrap_model(bio.models[name][0])


def batches(step: int) -> tuple[list[Rows], list[Rows]]:
    """Of a step: two training and three validation micro-batches."""
    return (
        [rows(10 * step, [0, 0, 1, 2]), rows(10 * step + 1, [2, 1, 0])],
        [rows(10 * step + place, [0, 1, 0]) for place in (2, 3, 4)],
    )


def alone() -> None:
    """This process as the only rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_scalebio.compat import adapt

    adapt()
    torch.manual_seed(SEED)  # the same start of the models in each run of the tests
    filesystem_async._results_queue = queue.Queue()  # else a process is started to hold one
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
