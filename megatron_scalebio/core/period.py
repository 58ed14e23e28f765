"""Megatron DDP and optimizers for one LISA period, built for its active layers and torn down.

Megatron allocates gradient buffers, fp32 masters and Adam moments for the parameters that have
`requires_grad` when they are built; building anew each period makes memory follow the active
layers. `Period` holds what lives that long. What bf16 weights don't tell of their masters is kept
until their layer trains again (`low_bits`).
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from megatron_scalebio.compat.megatron import start_of_shard
from megatron_scalebio.compat.transformer_engine import fuse_weight_gradients
from megatron_scalebio.core import experts, low_bits
from megatron_scalebio.core.batch import gpt_losses
from megatron_scalebio.core.twin import TwinModel, copy_buffers, named_parameters, unshare_storage

# What DDP and the optimizers leave on parameters; each would keep a whole buffer alive.
_LEFT_ON_PARAMETERS = ("main_grad", "main_param", "main_param_sharded", "grad_added_to_main_grad")


class Period:
    """DDP wrappers, twin chunks and the optimizers of w and u while one set of layers trains.

    Args:
        ddp, optimizer: Megatron's own, of w and u alike; the rates are set with every step.
        w, u: this rank's model chunks with requires_grad set for the period; without u, w trains
            alone.
        losses: the forward pass, as of `TwinModel`.
        pg_collection: as Megatron's DDP and optimizer take it.
    """

    def __init__(
        self,
        ddp: DistributedDataParallelConfig,
        optimizer: OptimizerConfig,
        w: list[torch.nn.Module],
        u: list[torch.nn.Module] | None = None,
        losses: Callable[[torch.nn.Module, Any], torch.Tensor] = gpt_losses,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        self._models = {"w": w}
        if u is not None:
            unshare_storage(w, u)
            self._models["u"] = u
        self.ddp = {
            name: [
                DistributedDataParallel(
                    unwrap_model(chunk).config, ddp, chunk, disable_bucketing=number > 0,
                    pg_collection=pg_collection,
                )
                for number, chunk in enumerate(model)
            ]
            for name, model in self._models.items()
        }  # fmt: skip
        sides = zip(self.ddp["w"], self.ddp.get("u", self.ddp["w"]), strict=True)
        self.twins = [TwinModel(ddp_w, ddp_u, losses) for ddp_w, ddp_u in sides]
        self.optimizers = {
            name: get_megatron_optimizer(
                optimizer, chunks, use_gloo_process_groups=pg_collection is None,
                pg_collection=pg_collection,
            )
            for name, chunks in self.ddp.items()
        }  # fmt: skip
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        sharing = low_bits.sharing_group(ddp, groups)
        for name, model in self._models.items():
            take_configured_adam(self.optimizers[name])
            for held in masters(model, self.optimizers[name]):
                low_bits.restore(*held, sharing(held[0]))
            fuse_weight_gradients(model, True)

    def gather_parameters(self) -> None:
        """Makes this rank's weights whole, where gathering them was left to the next forward pass.

        For whatever reads weights between two steps. A collective.
        """
        for chunk in self._gathering():
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()

    def _gathering(self) -> list[DistributedDataParallel]:
        """The chunks whose forward passes gather weights."""
        chunks = [chunk for chunks in self.ddp.values() for chunk in chunks]
        return [chunk for chunk in chunks if chunk.use_forward_hook]

    def zero_grad(self) -> None:
        for name, optimizer in self.optimizers.items():
            for ddp in self.ddp[name]:
                ddp.zero_grad_buffer()
            optimizer.zero_grad()

    @torch.no_grad()
    def add_gradients_of_u(self, scale: float) -> None:
        """Adds u's reduced gradients times `scale` to w's: both are of the same weights."""
        for ddp_w, ddp_u in zip(self.ddp["w"], self.ddp["u"], strict=True):
            pairs = (ddp.buffers + ddp.expert_parallel_buffers for ddp in (ddp_w, ddp_u))
            for of_w, of_u in zip(*pairs, strict=True):
                of_w.grad_data.add_(of_u.grad_data, alpha=scale)
        experts.copy_load(self.ddp["u"], self.ddp["w"])

    @torch.no_grad()
    def resync(self, share: float = 1.0) -> None:
        """Moves u towards w, by a share of what parts them; 1 makes them equal.

        Weights, fp32 masters, Adam state and FP8 scales; buffers become w's.
        """
        w, u = self._models["w"], self._models["u"]
        copy_buffers(w, u, share)
        moved = set()
        for (_, p_w), (_, p_u) in zip(named_parameters(w), named_parameters(u), strict=True):
            if p_u.data_ptr() != p_w.data_ptr():
                _move(p_u.data, p_w.data, share)
                moved.add(_storage(p_u))
        parts = zip(
            self.optimizers["w"].chained_optimizers,
            self.optimizers["u"].chained_optimizers,
            strict=True,
        )
        for part_w, part_u in parts:
            if not part_w.is_stub_optimizer:
                _move_adam(part_w.optimizer, part_u.optimizer, share, moved)
        for twin in self.twins:
            twin.weights_have_moved()

    def close(self, going_on: Collection[str] = ()) -> None:
        """Takes the parameters out of the period's buffers, which can then be freed.

        Args:
            going_on: the models whose layers will go on from their fp32 masters, of "w" and "u".
        """
        for chunk in self._gathering():
            chunk.disable_forward_pre_hook(param_sync=True)
        for name in going_on:
            for held in masters(self._models[name], self.optimizers[name]):
                low_bits.keep(*held)
            for chunk in self.ddp[name]:
                if chunk.ddp_config.use_distributed_optimizer:
                    chunk.start_param_sync(force_sync=True)  # a tie is rounded where its master is
        for model in self._models.values():
            fuse_weight_gradients(model, False)
            for _, parameter in named_parameters(model):
                for name in _LEFT_ON_PARAMETERS:
                    if hasattr(parameter, name):
                        delattr(parameter, name)
                parameter.grad = None
                if parameter.requires_grad:
                    # With the distributed optimizer the weight is a view into a flat buffer.
                    parameter.data = parameter.data.clone()
        for chunk in (chunk for chunks in self.ddp.values() for chunk in chunks):
            # They hold DDP's hooks on the parameters. One that outlived its period would take the
            # gradient from the next period's, until the garbage collector came by.
            chunk.grad_accs.clear()
        del self.twins, self.ddp, self.optimizers


def masters(
    model: list[torch.nn.Module], optimizer: MegatronOptimizer
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor | None, int]]:
    """The bf16 parameters that train; this rank's part of each one's master, and where it starts.

    With the distributed optimizer a rank has no part of some: None.
    """
    for _, parameter in named_parameters(model):
        if parameter.requires_grad and parameter.dtype is torch.bfloat16:
            starts = (
                start_of_shard(part, parameter)
                for part in optimizer.chained_optimizers
                if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer
                and parameter in part.model_param_group_index_map
            )  # fmt: skip
            yield parameter, getattr(parameter, "main_param", None), next(starts, 0)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _move(target: torch.Tensor, source: torch.Tensor, share: float) -> None:
    if share == 1.0:
        target.copy_(source)
    else:
        target.lerp_(source, share)


def _move_adam(
    source: torch.optim.Optimizer,
    target: torch.optim.Optimizer,
    share: float = 1.0,
    moved: Collection[int] = (),
) -> None:
    for group_s, group_t in zip(source.param_groups, target.param_groups, strict=True):
        if "step" in group_s:  # Transformer Engine's and Apex's Adam
            group_t["step"] = group_s["step"]
        for p_s, p_t in zip(group_s["params"], group_t["params"], strict=True):
            if _storage(p_t) not in moved:  # an fp32 master, not the weight itself or a part of it
                _move(p_t.data, p_s.data, share)
            for key, value in source.state.get(p_s, {}).items():
                held = target.state[p_t].get(key)
                if isinstance(held, torch.Tensor) and isinstance(value, torch.Tensor):
                    _move(held, value, share)
                else:
                    target.state[p_t][key] = copy.deepcopy(value)


def prepare_gradients(optimizer: MegatronOptimizer) -> float:
    """Makes the gradients ready to step with, clipped; returns their norm before clipping."""
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    clip_grad, parameters = optimizer.config.clip_grad, optimizer.get_parameters()
    if clip_grad > 0 and math.isfinite(norm) and parameters:
        clip_grad_by_total_norm_fp32(parameters, clip_grad, norm)
    return norm


def step_with(optimizer: MegatronOptimizer, lr: float) -> None:
    """A step at a learning rate, with the configured weight decay (norms and biases: none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = optimizer.config.weight_decay * group["wd_mult"]
    optimizer.step_with_ready_grads()


def take_configured_adam(optimizer: MegatronOptimizer) -> None:
    """Sets Adam's options, which loading has set to the checkpoint's; torch's takes one pass."""
    config = optimizer.config
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = (config.adam_beta1, config.adam_beta2), config.adam_eps
        if "fused" in group:
            group["fused"] = True
