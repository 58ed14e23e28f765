"""Lets Megatron-LM's own `megatron.training` start where pip installed it, and without a GPU."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.datasets import utils

from megatron_scalebio import compat


@functools.cache
def adapt() -> None:
    """Prepares Megatron-Core and Megatron-LM once; call it before arguments are read.

    Raises:
        UserError: if it is another Megatron than the package is written for.
    """
    compat.adapt()
    compat.require(utils, "compile_helpers")
    if not Path(utils.__file__).with_name("Makefile").exists():
        utils.compile_helpers = lambda: None  # a wheel holds them compiled, without their Makefile
    if not torch.cuda.is_available():
        cuda: Any = torch.cuda
        cuda.device_count = lambda: 1  # without one it makes no groups of ranks
        cuda.set_device = lambda device: None
        # From this generation on it asks nothing of CUDA_DEVICE_MAX_CONNECTIONS.
        cuda.get_device_properties = lambda device: SimpleNamespace(major=10)
