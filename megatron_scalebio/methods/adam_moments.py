"""Adam's moments of single parameters, whichever optimizer holds them, and its update.

m' = β1 m + (1 − β1) g       v' = β2 v + (1 − β2) g²
Γ(g) = (m' / (1 − β1^t)) / (√(v' / (1 − β2^t)) + ε)       t: the step it would be
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_scalebio.compat.megatron import start_of_shard
from megatron_scalebio.config import OptimizerConfig


@dataclass(frozen=True)
class AdamMoments:
    """The state of one parameter after `step` steps: flat, float32, whole on every rank."""

    m: torch.Tensor
    v: torch.Tensor
    step: int


def adam_update(
    gradient: torch.Tensor, moments: AdamMoments, part: slice, config: OptimizerConfig
) -> torch.Tensor:
    """Γ of a part of a parameter's gradient: the move, up to −lr, that Adam would make of it."""
    beta1, beta2, t = config.adam_beta1, config.adam_beta2, moments.step + 1
    scale1, scale2 = 1 / (1 - beta1**t), 1 / (1 - beta2**t)
    m = torch.mul(moments.m[part], beta1 * scale1)
    m.add_(gradient, alpha=(1 - beta1) * scale1)
    v = torch.mul(moments.v[part], beta2 * scale2)
    v.addcmul_(gradient, gradient, value=(1 - beta2) * scale2)
    return m.div_(v.sqrt_().add_(config.adam_eps))


def adam_moments(
    optimizer: MegatronOptimizer, parameters: Sequence[torch.nn.Parameter]
) -> list[AdamMoments]:
    """The moments of some of this rank's parameters. A collective of data-parallel ranks."""
    parts: list[Any] = [p for p in optimizer.chained_optimizers if not p.is_stub_optimizer]
    sharded = any(isinstance(part, DistributedOptimizer) for part in parts)
    result = []
    for parameter in parameters:
        size, device = parameter.numel(), parameter.device
        flat = torch.zeros(2 * size + 1, dtype=torch.float32, device=device)
        for part in parts:
            _read(part, parameter, flat)
        if sharded:
            group = parallel_state.get_data_parallel_group()
            # Every rank holds its own stretch; the steps are equal wherever there is one.
            step = flat[-1:].clone()
            flat[-1] = 0.0
            dist.all_reduce(flat, group=group)
            dist.all_reduce(step, op=dist.ReduceOp.MAX, group=group)
            flat[-1:] = step
        m, v, steps = flat.split([size, size, 1])
        assert steps > 0, "a parameter without Adam state"
        result.append(AdamMoments(m, v, int(steps)))
    return result


def _read(part: Any, parameter: torch.nn.Parameter, flat: torch.Tensor) -> None:
    """Copies what one optimizer holds of a parameter into m | v | step."""
    start = 0
    if isinstance(part, DistributedOptimizer):
        if parameter not in part.model_param_group_index_map:
            return
        number, order = part.model_param_group_index_map[parameter]
        group = part.optimizer.param_groups[number]
        key = group["params"][order]
        start = start_of_shard(part, parameter)
    else:
        key = getattr(parameter, "main_param", parameter)
        groups = [
            g for g in part.optimizer.param_groups if any(key is held for held in g["params"])
        ]
        if not groups:
            return
        [group] = groups
    state = part.optimizer.state[key]
    for place, name in ((0, "exp_avg"), (parameter.numel(), "exp_avg_sq")):
        values = state[name].flatten()
        flat[place + start : place + start + len(values)] = values
    # Transformer Engine's and Apex's Adam count steps with the group.
    flat[-1] = float(state["step"] if "step" in state else group["step"])
