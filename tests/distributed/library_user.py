"""A training loop of somebody else's around the library: a Megatron-Core GPT on random tokens."""

from __future__ import annotations

from typing import Any

import torch

SOURCES, VOCAB, LENGTH, BATCH = ["a", "b", "c"], 32, 12, 8
MODEL: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24,
    "add_bias_linear": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "use_cpu_initialization": True, "calculate_per_token_loss": True,
}  # fmt: skip


def user(
    options: dict | None = None, lisa: int | None = None, model: dict | None = None,
    ddp: dict | None = None, **given: Any,
) -> Any:  # fmt: skip
    """A ScaleBiO as a team makes it, on the process groups that are there."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_scalebio import BilevelOptions, LisaOptions, ScaleBiO

    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(3)
    config = TransformerConfig(**{**MODEL, **(model or {})})
    sharded = (ddp or {}).get("use_distributed_optimizer", False)

    def provider(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> GPTModel:
        return GPTModel(
            config, get_gpt_layer_local_spec(), VOCAB, LENGTH, pre_process, post_process,
            position_embedding_type="rope", vp_stage=vp_stage,
        )  # fmt: skip

    return ScaleBiO(
        BilevelOptions(**{"resync_interval": 4, **(options or {})}), SOURCES, provider,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, **(ddp or {})),
        OptimizerConfig(
            optimizer="adam", lr=1e-2, adam_eps=1e-4, bf16=config.bf16,
            params_dtype=config.params_dtype, use_distributed_optimizer=sharded,
        ),
        lisa=None if lisa is None else LisaOptions(lisa, interval=3), **given,
    )  # fmt: skip


def micro_batches(seed: int, groups: int, micro: int = 2) -> list:
    """This data-parallel rank's part of a global batch."""
    from megatron.core import parallel_state

    from megatron_scalebio import MicroBatch

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
    mask = (torch.rand(BATCH, LENGTH, generator=generator) < 0.7).float()
    mask[:, -1] = 1.0
    group = torch.arange(BATCH) % groups
    tokens[group == 0] %= 7  # what tells the sources apart
    share = BATCH // parallel_state.get_data_parallel_world_size()
    first = share * parallel_state.get_data_parallel_rank()
    return [
        MicroBatch(
            tokens[rows, :-1], tokens[rows, 1:], mask[rows],
            torch.arange(LENGTH).expand(micro, -1), group[rows], tokens=micro * LENGTH,
        )
        for rows in (slice(at, at + micro) for at in range(first, first + share, micro))
    ]  # fmt: skip


def steps(bio: Any, first: int, last: int) -> list[Any]:
    """The reports of some steps, counted from 0."""
    return [
        bio.step(micro_batches(step, 3), micro_batches(1000 + step, 1), lr=1e-2)
        for step in range(first, last)
    ]


def trace(reports: list[Any]) -> torch.Tensor:
    assert all(report.skipped is None for report in reports), [r.skipped for r in reports]
    return torch.stack(
        [
            torch.cat([r.losses.u_S, r.losses.w_S, r.losses.validation_V, r.weights_S])
            for r in reports
        ]
    )
