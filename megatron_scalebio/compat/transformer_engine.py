"""What of Transformer Engine has no public name: FP8 copies of weights, leave to load FP8 state,
where a built layer leaves its weights' gradients."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from megatron_scalebio.compat import switched_on

_COPIES = "_fp8_workspaces"
_FUSED = "fuse_wgrad_accumulation"


def share_copies(source: torch.nn.Module, target: torch.nn.Module, equal: bool) -> bool:
    """Has two modules keep their copies together where their weights are equal, else each its own.

    Returns:
        Whether they share them now.
    """
    theirs: Any = getattr(source, _COPIES, None)
    if theirs is None:
        return False
    if equal:
        setattr(target, _COPIES, theirs)
    elif getattr(target, _COPIES) is theirs:
        setattr(target, _COPIES, {})
    return equal


def fuse_weight_gradients(chunks: list[torch.nn.Module], on: bool) -> None:
    """Has matrix products add weights' gradients to DDP's fp32 buffers, or leave them in `.grad`.

    Megatron's `gradient_accumulation_fusion` for Transformer Engine's layers alone: Megatron's own
    output layer refuses it without a kernel of Apex.
    """
    for module in (module for chunk in chunks for module in chunk.modules()):
        if hasattr(module, _FUSED):
            setattr(module, _FUSED, on)


def fp8_state_allowed() -> AbstractContextManager[None]:
    """A block in which modules take pickled FP8 state, which has been looked through by then.

    Transformer Engine 2.20 can't tell what such state holds, and else refuses it.
    """
    return switched_on("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE")
