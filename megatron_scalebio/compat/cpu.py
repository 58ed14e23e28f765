"""Lets Megatron-Core run on CPU + gloo. The only file that knows it assumes CUDA.

Megatron-Core asks for `torch.cuda.current_device()` and streams, writes `device="cuda"` literally
in factory calls, pins memory, keeps CUDA random states and checks `tensor.type()` for
"torch.cuda.". Where Transformer Engine or Apex is installed it takes their optimizers.
`adapt()` answers each of these for a machine without CUDA, and refuses to act where CUDA is
present.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

from megatron_scalebio.compat import require

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint")
_adapted = False


def adapt() -> None:
    """Adapts torch once. Call before Megatron-Core builds anything."""
    global _adapted
    assert not torch.cuda.is_available(), "cpu.adapt() is for machines without CUDA"
    if _adapted:
        return
    _adapt_random_states()
    _adapt_optimizers()
    _adapt_devices()
    _adapted = True


def _adapt_devices() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.current_stream = torch.cpu.current_stream
    cuda.synchronize = lambda *args, **kwargs: None
    # `with torch.device(...)` knows factories by identity: it must learn them before they change.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.type = _cuda_type_names(tensor.type)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # for copies to a GPU; refused without one
        return factory(*args, **kwargs)

    return create


def _cuda_type_names(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """The optimizers accept parameters by the type name 'torch.cuda.FloatTensor'."""

    @functools.wraps(type_of)
    def name_or_cast(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_of(self, *args, **kwargs)
        if isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return name_or_cast


def _adapt_random_states() -> None:
    """Megatron's CUDA generators become torch's one CPU generator."""
    import megatron.core.tensor_parallel.random as random

    require(random, "_get_cuda_rng_state", "_set_cuda_rng_state")
    cuda: Any = torch.cuda
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = random._set_cuda_rng_state = lambda state, *args, **kwargs: (
        torch.set_rng_state(state)
    )


def _adapt_optimizers() -> None:
    """Megatron's optimizers by torch, as where neither Transformer Engine nor Apex is installed."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as parts

    for module, by_torch in (
        (optimizer, {"Adam": torch.optim.AdamW, "USING_PYTORCH_OPTIMIZER": True}),
        (distrib_optimizer, {"Adam": torch.optim.Adam, "HAVE_APEX_OR_TE": False,
                             "USING_TE_OPTIMIZER": False, "USING_APEX_OPTIMIZER": False}),
        (clip_grads, {"multi_tensor_applier": utils.local_multi_tensor_applier,
                      "l2_norm_impl": utils.local_multi_tensor_l2_norm,
                      "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
                      "multi_tensor_scale_tensor_impl": None}),
        (parts, {"multi_tensor_applier": utils.local_multi_tensor_applier,
                 "multi_tensor_scale_impl": utils.local_multi_tensor_scale}),
    ):  # fmt: skip
        require(module, *by_torch)
        for name, value in by_torch.items():
            setattr(module, name, value)
