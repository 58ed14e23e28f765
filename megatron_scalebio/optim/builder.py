"""Megatron DDP and optimizers for one LISA period, built for its active layers and torn down.

Megatron allocates gradient buffers, fp32 masters and Adam moments for the parameters that have
`requires_grad` when they are built; building anew each period makes memory follow the active
layers. `Period` holds what lives that long.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scalebio.config import Config, OptimizerConfig
from megatron_scalebio.model.twin import (
    TwinModel,
    finalize_twin_grads,
    named_parameters,
    unshare_storage,
)

# What DDP and the optimizers leave on parameters; each would keep a whole buffer alive.
_LEFT_ON_PARAMETERS = ("main_grad", "main_param", "main_param_sharded", "grad_added_to_main_grad")


class Period:
    """DDP wrappers, twin chunks and the optimizers of w and u while one set of layers trains.

    Args:
        w, u: this rank's model chunks with requires_grad set for the period; without u, w trains
            alone.
    """

    def __init__(
        self,
        config: Config,
        megatron: TransformerConfig,
        w: list[torch.nn.Module],
        u: list[torch.nn.Module] | None = None,
    ) -> None:
        self._models, self._megatron = {"w": w}, megatron
        if u is not None:
            unshare_storage(w, u)
            self._models["u"] = u
        self.ddp = {
            name: [_wrap(config, megatron, chunk, n) for n, chunk in enumerate(model)]
            for name, model in self._models.items()
        }
        sides = zip(self.ddp["w"], self.ddp.get("u", self.ddp["w"]), strict=True)
        self.twins = [TwinModel(ddp_w, ddp_u) for ddp_w, ddp_u in sides]
        megatron.finalize_model_grads_func = finalize_twin_grads
        if config.parallel.overlap_grad_reduce:  # only the last micro-batch starts the reduction
            megatron.no_sync_func = [chunk.no_sync for chunk in self.ddp["w"]]
            if len(self.twins) == 1:
                [megatron.no_sync_func] = megatron.no_sync_func
        self.optimizers = {name: _optimizer(config, ddp) for name, ddp in self.ddp.items()}

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
            for of_w, of_u in zip(ddp_w.buffers, ddp_u.buffers, strict=True):
                of_w.grad_data.add_(of_u.grad_data, alpha=scale)

    @torch.no_grad()
    def resync(self) -> None:
        """Makes u equal to w again: weights, fp32 masters and Adam state."""
        w, u = self._models["w"], self._models["u"]
        for (_, p_w), (_, p_u) in zip(named_parameters(w), named_parameters(u), strict=True):
            if p_u.data_ptr() != p_w.data_ptr():
                p_u.data.copy_(p_w.data)
        parts = zip(
            self.optimizers["w"].chained_optimizers,
            self.optimizers["u"].chained_optimizers,
            strict=True,
        )
        for part_w, part_u in parts:
            if not part_w.is_stub_optimizer:
                _copy_adam(part_w.optimizer, part_u.optimizer)

    def close(self) -> None:
        """Takes the parameters out of the period's buffers, which can then be freed."""
        for chunk in self._gathering():
            chunk.disable_forward_pre_hook(param_sync=True)
        for model in self._models.values():
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
        self._megatron.no_sync_func = None  # it would keep the buffers alive
        del self.twins, self.ddp, self.optimizers


def _wrap(
    config: Config, megatron: TransformerConfig, chunk: torch.nn.Module, number: int
) -> DistributedDataParallel:
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        fp8_param_gather=config.parallel.fp8_param_gather,
    )
    return DistributedDataParallel(megatron, settings, chunk, disable_bucketing=number > 0)


def _optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    rates, parallel = config.optimizer, config.parallel
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=rates.lr,
        min_lr=rates.min_lr,
        weight_decay=rates.weight_decay,
        adam_beta1=rates.adam_beta1,
        adam_beta2=rates.adam_beta2,
        adam_eps=rates.adam_eps,
        clip_grad=rates.clip_grad,
        bf16=parallel.bf16,
        params_dtype=torch.bfloat16 if parallel.bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_recipe=parallel.fp8_recipe if parallel.fp8_format else None,
    )
    return get_megatron_optimizer(settings, chunks)


def _copy_adam(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    for group_s, group_t in zip(source.param_groups, target.param_groups, strict=True):
        if "step" in group_s:  # Transformer Engine's and Apex's Adam
            group_t["step"] = group_s["step"]
        for p_s, p_t in zip(group_s["params"], group_t["params"], strict=True):
            p_t.data.copy_(p_s.data)
            for key, value in source.state.get(p_s, {}).items():
                held = target.state[p_t].get(key)
                if isinstance(held, torch.Tensor) and isinstance(value, torch.Tensor):
                    held.copy_(value)
                else:
                    target.state[p_t][key] = copy.deepcopy(value)


def set_rate(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Sets the learning rate and the weight decay of every group (norms and biases: none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]


def set_adam(optimizer: MegatronOptimizer, rates: OptimizerConfig) -> None:
    """Sets the configured Adam options of every group, where loading has set the checkpoint's."""
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = (rates.adam_beta1, rates.adam_beta2), rates.adam_eps
