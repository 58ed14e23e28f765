"""ScaleBiO on Megatron-Core: learns how a model's data sources should be mixed.

The library's names, for a training loop of one's own (docs/library.md). They are imported when they
are first used: the command line must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_scalebio.core.batch import Batch, MicroBatch
    from megatron_scalebio.core.options import BilevelOptions, LisaOptions
    from megatron_scalebio.core.scalebio import ScaleBiO, StepReport
    from megatron_scalebio.mixture.constraints import Constraints
    from megatron_scalebio.mixture.goals import Goals
    from megatron_scalebio.mixture.sampler import BlendSampler, Picks

__version__ = "0.2.0"
_PLACES = {
    "core.batch": ["Batch", "MicroBatch"],
    "core.options": ["BilevelOptions", "LisaOptions"],
    "core.scalebio": ["ScaleBiO", "StepReport"],
    "mixture.constraints": ["Constraints"],
    "mixture.goals": ["Goals"],
    "mixture.sampler": ["BlendSampler", "Picks"],
}
__all__ = [
    "Batch", "BilevelOptions", "BlendSampler", "Constraints", "Goals", "LisaOptions", "MicroBatch",
    "Picks", "ScaleBiO", "StepReport",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"megatron_scalebio.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
