"""ScaleBiO on Megatron-Core: learns how a model's data sources should be mixed.

The library's names, for a training loop of one's own (docs/library.md). They are imported when they
are first used: the command line must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_scalebio.core.batch import Batch, MicroBatch
    from megatron_scalebio.core.constraints import Constraints
    from megatron_scalebio.core.goals import Goals
    from megatron_scalebio.core.options import BilevelOptions, LisaOptions
    from megatron_scalebio.core.sampler import BlendSampler, Picks
    from megatron_scalebio.core.scalebio import ScaleBiO, StepReport

__version__ = "0.2.0"
_PLACES = {
    "Batch": "batch", "BilevelOptions": "options", "BlendSampler": "sampler",
    "Constraints": "constraints", "Goals": "goals",
    "LisaOptions": "options", "MicroBatch": "batch", "Picks": "sampler", "ScaleBiO": "scalebio",
    "StepReport": "scalebio",
}  # fmt: skip
__all__ = [
    "Batch", "BilevelOptions", "BlendSampler", "Constraints", "Goals", "LisaOptions", "MicroBatch",
    "Picks", "ScaleBiO", "StepReport",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"megatron_scalebio.core.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
