"""Transformer Engine on a machine without a GPU: its real Python over a double of its kernels.

`transformer_engine_torch`, the compiled part, is played by `kernels` in plain torch. So control
flow, caches, checkpoints, layouts and shapes are the real ones. What kernels would decide this
can't show: numerics, streams, speed, flash and fused attention, context parallelism.

The wheel lies where `make test` puts it (Makefile); tests that need it skip where it does not.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import importlib.util
import json
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_scalebio import compat
from megatron_scalebio.compat import cpu, light_imports
from tests.te.kernels import KERNELS
from tests.te.read_extension import EXTENSION

WHEEL = Path(sys.prefix) / "te"  # apart: on the usual path Megatron would find it in every test
needs_transformer_engine = pytest.mark.skipif(
    not (WHEEL / "transformer_engine").is_dir() or torch.cuda.is_available(),
    reason="for machines without CUDA, with the wheel of transformer-engine that make test gets",
)

# Imported with Transformer Engine, of no use to what is tested.
_UNUSED = (
    "triton", "triton.language", "triton.language.core", "triton.language.standard", "onnx",
    "onnxscript", "einops",
)  # fmt: skip


def run_with_te(function: Any, *calls: tuple[Any, ...]) -> None:
    """`run_distributed(function, *call)` for each call, with Transformer Engine in the ranks.

    It is imported once, by a process that they are forked from.
    """
    from tests.distributed.harness import run_distributed

    where = function.__module__, function.__name__
    run_distributed(_load_and_run, 1, *where, calls, start_method="spawn")


def _load_and_run(module: str, name: str, calls: tuple[tuple[Any, ...], ...]) -> None:
    from tests.distributed.harness import run_distributed

    with light_imports():
        load()
        function = getattr(importlib.import_module(module), name)
        importlib.import_module("megatron_scalebio.methods.run")
    for world_size, *args in calls:
        run_distributed(function, world_size, *args, start_method="fork")


def load() -> None:
    """Call before anything imports Megatron."""
    assert "megatron" not in sys.modules
    sys.path.insert(0, str(WHEEL))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it then looks for no library
    os.environ.update(NVTE_UNFUSED_FP8_UPDATE="1", NVTE_MASKED_SOFTMAX_FUSION="0")
    pretend_card("Hopper")
    _import(_extension())
    _adapt_package()


def pretend_card(name: str) -> None:
    """Hopper or Blackwell."""
    cuda: Any = torch.cuda
    major = {"Hopper": 9, "Blackwell": 10}[name]
    properties = types.SimpleNamespace(
        name=f"a double of {name}", major=major, minor=0, multi_processor_count=132,
        total_memory=80 * 2**30,
    )  # fmt: skip
    cuda.get_device_properties = lambda *args: properties
    cuda.get_device_capability = lambda *args: (major, 0)
    if "transformer_engine.pytorch" in sys.modules:  # has asked before
        from transformer_engine.pytorch import quantization, utils

        utils._get_device_compute_capability.cache_clear()
        for asked in [each for each in vars(quantization) if each.endswith("_SUPPORT")]:
            setattr(quantization, asked, None)
    cuda.is_current_stream_capturing = lambda: False
    cuda.device = lambda *args: contextlib.nullcontext()
    torch.version.cuda = torch.version.cuda or "13.0"
    cpu.leave_uncompiled()


class _Anything:
    """What decorators and signatures of unused packages are written with."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __call__(self, *args: Any, **options: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not options else self

    def __getattr__(self, name: str) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        return self


def _unused(name: str) -> types.ModuleType:
    made: Any = types.ModuleType(name)
    made.__path__, made.__version__ = [], "99"

    def anything(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _Anything()

    made.__getattr__ = anything
    return made


def _extension() -> types.ModuleType:
    """All that the real one has (`read_extension`); what has no kernel here says so when called."""
    offered = json.loads(EXTENSION.read_text())
    of_wheel = WHEEL / f"transformer_engine-{offered['version']}.dist-info"
    assert of_wheel.is_dir(), f"{EXTENSION.name} is of another version: tests/te/read_extension.py"
    extension: Any = types.ModuleType("transformer_engine_torch")
    for name, members in offered["enums"].items():
        setattr(extension, name, enum.IntEnum(name, members))
    for name in offered["classes"]:
        setattr(extension, name, type(name, (), {}))
    for name in offered["functions"]:
        setattr(extension, name, functools.partial(_no_kernel, name))
    for kernel in KERNELS:
        _set_function(extension, kernel.__name__, kernel)
    for name, answer in (
        ("get_cudnn_version", 91900), ("get_cublasLt_version", 130100),
        ("get_num_cublas_streams", 4), ("get_stream_priority_range", (0, 0)),
        ("device_supports_multicast", False), ("ubuf_built_with_mpi", False),
    ):  # fmt: skip
        _set_function(extension, name, lambda *args, answer=answer: answer)
    return extension


def _set_function(extension: types.ModuleType, name: str, function: Any) -> None:
    assert hasattr(extension, name), f"the extension has no {name}"
    setattr(extension, name, function)


def _no_kernel(name: str, *args: Any, **options: Any) -> None:
    raise NotImplementedError(f"the double has no kernel {name}")


def _import(extension: types.ModuleType) -> None:
    sys.modules["transformer_engine_torch"] = extension
    importlib.import_module("torch._inductor.utils")  # looks for triton itself
    unused = [name for name in _UNUSED if importlib.util.find_spec(name.partition(".")[0]) is None]
    sys.modules.update((name, _unused(name)) for name in unused)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        common: Any = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None
        top: Any = importlib.import_module("transformer_engine")
        top.pytorch = importlib.import_module("transformer_engine.pytorch")
    for name in unused:
        del sys.modules[name]


class _Pretending(types.ModuleType):
    """A module but for some of its names."""

    def __init__(self, real: Any, **names: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(names, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _adapt_package() -> None:
    """Transformer Engine and the package's choice of layers believe in a GPU; nothing else does."""
    cpu._adapt_optimizers = lambda: None  # Transformer Engine's, as on a GPU
    compat.adapt()
    import transformer_engine.pytorch.distributed as distributed
    import transformer_engine.pytorch.module.base as base
    from megatron.core import optimizer
    from megatron.core.transformer.enums import AttnBackend
    from transformer_engine.pytorch.optimizers import FusedAdam

    from megatron_scalebio.model import settings

    assert optimizer.Adam is FusedAdam
    fake: Any = torch.Tensor
    fake.is_cuda = property(lambda tensor: True)
    base.torch = _Pretending(torch, cuda=_Pretending(torch.cuda, is_available=lambda: True))
    distributed._get_cuda_rng_state = lambda *args, **options: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **options: torch.set_rng_state(state)
    real = settings.transformer_config
    settings.runtime = _Pretending(settings.runtime, on_cuda=lambda: True)

    def transformer_config(config: Any) -> Any:
        made = real(config)
        made.deallocate_pipeline_outputs = False  # gloo would still be reading them
        made.attention_backend = AttnBackend.unfused
        return made

    settings.transformer_config = transformer_config
