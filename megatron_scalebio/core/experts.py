"""What a mixture of experts adds to the bilevel problem: losses of its routers, a bias that counts.

    L2(λ, θ) + mean over training micro-batches of R(θ)        R: balance of the experts, z-loss

The routers' losses R keep a model trainable and say nothing of what is asked for, so they belong to
the inner problem, of w and u alike (scaled as `role_scale` says), and not to L1. They do not depend
on λ but through the examples that are drawn, which the hypergradient leaves out.

Megatron-Core adds them in the backward pass, times one number for all of the process: it is set
anew before each micro-batch's backward pass. It also multiplies them by the micro-batch's tokens
where `calculate_per_token_loss` is on, for a division that a step does not make.

The bias of experts (Wang et al. 2024, arXiv 2408.15664) moves against their load, once a step, in
layers that train: w's by w's load and u's by u's, both of the training micro-batches alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter

from megatron_scalebio.compat.routing_replay import Chosen, follow


def routers(chunks: Iterable[torch.nn.Module]) -> Iterator[Any]:
    """Those of a model's experts, in an order that w and u share."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                yield module


def prepare(chunks: list[torch.nn.Module]) -> None:
    """Leaves to a step what Megatron's schedules would do to routers, and marks the experts.

    Megatron has an optimizer of their own for experts where data-parallel ranks share them. Here
    they have one always, so that a run can go on under another expert parallelism.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, BaseMoELayer):
                for parameter in module.experts.parameters():
                    parameter.allreduce = False
    for router in routers(chunks):
        router.calculate_per_token_loss = False  # the factor of tokens
        router.frozen_expert_bias = True  # moved in steps that are applied, not in every flush
        for name in ("expert_bias", "local_tokens_per_expert"):
            if getattr(router, name) is not None:  # bf16 models have made bf16 of it
                setattr(router, name, getattr(router, name).float())


def set_pass(model_routers: Sequence[Any], scale: float, chosen: Chosen | None = None) -> None:
    """Before a forward or a backward pass: the scale of the routers' losses; 0: it does not count.

    To be called in both, as a forward pass of another micro-batch may come in between. `chosen`:
    the experts that tokens go to [those that the routers choose].
    """
    follow(model_routers, chosen)
    for router in model_routers:
        router.enable_expert_bias = router.expert_bias is not None and scale > 0
        device = router.weight.device
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.full((1,), scale, device=device)


def take_load(chunks: Iterable[torch.nn.Module]) -> None:
    """After a flush, before Megatron zeroes the counts: adds them to the step's, of this rank."""
    for router in routers(chunks):
        if router.expert_bias is not None:
            router.load = router.local_tokens_per_expert + getattr(router, "load", 0.0)


def forget_load(chunks: Iterable[torch.nn.Module]) -> None:
    """After a step."""
    for router in routers(chunks):
        router.load = 0.0


def copy_load(source: Iterable[torch.nn.Module], target: Iterable[torch.nn.Module]) -> None:
    """For two models whose passes were the same ones."""
    for of_source, of_target in zip(routers(source), routers(target), strict=True):
        if of_source.expert_bias is not None:
            of_target.load = of_source.load.clone()


@torch.no_grad()
def move_biases(chunks: Iterable[torch.nn.Module], groups: ProcessGroupCollection) -> None:
    """Moves the biases of layers that train against the load of the step. A collective."""
    for router in routers(chunks):
        if router.expert_bias is not None and router.weight.requires_grad:
            rate = router.config.moe_router_bias_update_rate
            moved = get_updated_expert_bias(router.load, router.expert_bias, rate, groups.tp_dp_cp)
            router.expert_bias.copy_(moved)
