"""All that patches Megatron-Core or torch, or needs a private name of Megatron.

    cpu        Megatron without CUDA
    megatron   a fault mended, and private names that have no public equal

Nothing here acts on import. Whatever is patched or borrowed is looked up first, so that another
Megatron is refused in one line instead of failing in the middle of a run.
"""

from __future__ import annotations

from typing import Any

from megatron_scalebio.errors import UserError

WRITTEN_FOR = "0.19.2"  # of megatron-core


def require(owner: Any, *names: str) -> None:
    """Checks that a module or class of Megatron has what the package builds on.

    Raises:
        UserError: if it lacks one of the names.
    """
    for name in names:
        if not hasattr(owner, name):
            import megatron.core

            raise UserError(
                f"has no {owner.__name__}.{name}, which megatron_scalebio builds on",
                where=f"megatron-core {megatron.core.__version__}",
                mend=f"install megatron-core {WRITTEN_FOR}",
            )
