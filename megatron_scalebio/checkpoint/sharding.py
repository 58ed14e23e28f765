"""What a checkpoint holds, as Megatron's sharded state: each rank's part of every global tensor.

w_state        w under Megatron-LM's names, with the arguments that its loaders look for
bilevel_state  λ and samplers, u where it differs from w, both optimizers, random states
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model

from megatron_scalebio.checkpoint import fp8_state
from megatron_scalebio.checkpoint.megatron_args import megatron_args
from megatron_scalebio.config import Config
from megatron_scalebio.model.twin import named_parameters
from megatron_scalebio.optim.lisa import period_of
from megatron_scalebio.train.state import RunState

# One key per layer: layers of u, and optimizer state under LISA, exist for some layers only.
PER_LAYER = {"non_homogeneous_layers": True}
_OPTIMIZER = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    **PER_LAYER,
}


def w_state(state: RunState) -> dict[str, Any]:
    """Sharded state of w, in Megatron's own form. A collective."""
    if state.period is not None:
        state.period.gather_parameters()
    return {
        **model_state(state.w, None),
        "args": megatron_args(state.config, state.data.vocab_size, state.data.tokenizer),
        "checkpoint_version": 3.0,
        "iteration": state.step,
        "content_metadata": {"singleton_local_shards": False},
    }


def bilevel_state(state: RunState) -> dict[str, Any]:
    whole = {
        "run": state.common_state(),
        "layout": layout(),
        "optimizer_kind": optimizer_kind(state.config),
        "period": None,
        "rng": random_state(),
    }
    if "u" in state.models:
        whole["u"] = _own_state_of_u(state)
    if state.period_number == period_of(state.step, state.config.lisa):
        whole["period"] = state.period_number
        whole.update(optimizer_states(state))
    return whole


def model_state(chunks: list[torch.nn.Module], metadata: dict[str, Any] | None) -> dict[str, Any]:
    """Sharded state of a model: `model`, or `model0`, `model1`, … with virtual chunks."""
    # Megatron adds process groups to the metadata it is given: hand it a copy.
    states = [
        unwrap_model(chunk).sharded_state_dict(metadata=dict(metadata or {})) for chunk in chunks
    ]
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{number}": part for number, part in enumerate(states)}


def _own_state_of_u(state: RunState) -> dict[str, Any]:
    """Sharded state of the parameters in which u has storage of its own, and its FP8 state."""
    shared = {
        p_u.data_ptr()
        for (_, p_w), (_, p_u) in zip(
            named_parameters(state.w), named_parameters(state.models["u"]), strict=True
        )
        if p_w.data_ptr() == p_u.data_ptr()
    }
    whole = model_state(state.models["u"], PER_LAYER)
    own = {
        chunk: {k: v for k, v in tensors.items() if fp8_state.is_kept(v) or _is_apart(v, shared)}
        for chunk, tensors in whole.items()
    }
    add_prefix_for_sharding(own, "u.")
    return own


def _is_apart(entry: Any, shared: set[int]) -> bool:
    if isinstance(entry, ShardedObject):
        return False
    data = getattr(entry, "data", None)
    return isinstance(data, torch.Tensor) and data.data_ptr() not in shared


def optimizer_states(state: RunState, is_loading: bool = False) -> dict[str, Any]:
    assert state.period is not None
    result = {}
    for name, optimizer in state.period.optimizers.items():
        model = model_state(state.models[name], PER_LAYER)
        key = f"optimizer_{name}"
        result[key] = optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=dict(_OPTIMIZER)
        )
        add_prefix_for_sharding(result[key], f"{key}.")
    return result


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
