"""Where Transformer Engine keeps the FP8 copies of weights, which has no public name."""

from __future__ import annotations

from typing import Any

import torch

_COPIES = "_fp8_workspaces"


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
