"""What a checkpoint holds, as Megatron's sharded state: each rank's part of every global tensor.

w_state        w under Megatron-LM's names, with the arguments that its loaders look for
bilevel_state  λ and samplers, u where it differs from w, low bits of bf16 weights, both optimizers,
               random states
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_scalebio.checkpoint.megatron_args import megatron_args
from megatron_scalebio.checkpoint.run import Run
from megatron_scalebio.config import Config
from megatron_scalebio.core.state import (
    low_bits_state,
    model_state,
    optimizer_states,
    state_of_u,
)


def w_state(state: Run) -> dict[str, Any]:
    """Sharded state of w, in Megatron's own form. A collective."""
    state.training.make_savable()
    return {
        **model_state(state.training.w),
        "args": megatron_args(state.config, state.data.vocab_size, state.data.tokenizer),
        "checkpoint_version": 3.0,
        "iteration": state.step,
        "content_metadata": {"singleton_local_shards": False},
    }


def bilevel_state(state: Run) -> dict[str, Any]:
    whole = {
        "run": state.common_state(),
        "vocab_size": state.data.vocab_size,
        "layout": layout(),
        "optimizer_kind": optimizer_kind(state.config),
        "period": None,
        "rng": random_state(),
    }
    training = state.training
    if training.u is not None:
        whole["u"] = state_of_u(training.w, training.u)
    whole |= low_bits_state(training.models, training.sharing_group)
    if training.saves_period:
        assert training.period is not None
        whole["period"] = training.period_number
        whole.update(optimizer_states(training.models, training.period))
    return whole


def optimizer_kind(config: Config) -> list[bool]:
    return [config.parallel.use_distributed_optimizer, config.parallel.bf16]


def layout() -> list[int]:
    return [
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    ]


def random_state() -> ShardedObject:
    """Generator states of this rank; they matter to dropout only."""
    tp, pp, replicas = layout()
    states = {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedObject("rng_state", states, (pp, tp, replicas), place)
