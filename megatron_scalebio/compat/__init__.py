"""All that patches Megatron-Core or torch for a run, and all that needs a private name of Megatron.

    cpu                 Megatron without CUDA
    megatron            a fault fixed, and private names that have no public equal
    gpt_inputs          packed rows and labelled positions, as GPTModel takes them
    transformer_engine  the same of Transformer Engine
    fp8_state           what its modules pickle, read as data
    megatron_lm         `megatron.training` from a wheel, and without CUDA; for who uses it

Nothing here acts on import. What is patched or borrowed is looked up when a run begins, so that
another Megatron is refused in one line instead of failing in the middle. (`plan` puts stand-ins in
Megatron's place while it rehearses, and takes them out again: plan/fake_rank.py.)
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_scalebio.errors import UserError

WRITTEN_FOR = "0.19.2"  # of megatron-core


@contextmanager
def switched_on(variable: str) -> Iterator[None]:
    """A block in which an environment variable is 1."""
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextmanager
def light_imports() -> Iterator[None]:
    """A block in which Megatron-Core is imported first, in half of the time.

    Without Weights & Biases, which its timers import wherever it is installed; where there is no
    GPU, without torch's compiler; and without looks of the garbage collector at what stays for
    good, then and later. Where Megatron is there already, nothing is done.
    """
    modules: dict[str, Any] = sys.modules
    if "megatron.core" in modules:
        yield
        return
    gc.disable()
    try:
        import torch

        from megatron_scalebio.compat import cpu

        if not torch.cuda.is_available():
            cpu.leave_uncompiled()
        modules.setdefault("wandb", None)  # as if it were not installed
        yield
    finally:
        if modules.get("wandb", ...) is None:
            del modules["wandb"]
        gc.enable()
    gc.freeze()


def adapt() -> None:
    """Prepares Megatron-Core for this process; call it before Megatron builds anything.

    Fixes what has to be fixed, and where there is no GPU lets it run on the CPU.

    Raises:
        UserError: if it is another Megatron than the package is written for.
    """
    import torch

    from megatron_scalebio.compat import cpu, megatron

    if not torch.cuda.is_available():
        cpu.adapt()
    megatron.adapt()


def require(owner: Any, *names: str) -> None:
    """Checks that a module or class of Megatron has what the package builds on.

    Raises:
        UserError: if it lacks one of the names.
    """
    for name in names:
        if not hasattr(owner, name):
            import megatron.core

            raise UserError(
                f"megatron-core {megatron.core.__version__}: has no {owner.__name__}.{name}, which "
                f"megatron_scalebio builds on (install megatron-core {WRITTEN_FOR})"
            )
