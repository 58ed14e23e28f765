"""Transformer Engine on a machine without a GPU: its real Python over a double of its kernels.

`transformer_engine_torch`, the compiled part, is played by `kernels` in plain torch. So control
flow, caches, checkpoints, layouts and shapes are the real ones. What kernels would decide this
can't show: numerics, streams, speed, flash and fused attention, context parallelism.

The wheel lies where `make test` puts it (Makefile); tests that need it skip where it does not.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.util
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

WHEEL = Path(sys.prefix) / "te"  # apart: on the usual path Megatron would find it in every test
needs_transformer_engine = pytest.mark.skipif(
    not (WHEEL / "transformer_engine").is_dir() or torch.cuda.is_available(),
    reason="for machines without CUDA, with the wheel of transformer-engine that make test gets",
)

# Members in the order of the extension's: tensors of a module are indexed by them.
_DTYPES = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1"
_FORWARD = " ".join(f"GEMM{n}_INPUT GEMM{n}_WEIGHT GEMM{n}_OUTPUT" for n in (1, 2, 3))
_BACKWARD = " ".join(f"GRAD_OUTPUT{n} GRAD_INPUT{n}" for n in (1, 2, 3))
# Imported with Transformer Engine, of no use to what is tested.
_UNUSED = (
    "triton", "triton.language", "triton.language.core", "triton.language.standard", "onnx",
    "onnxscript", "einops",
)  # fmt: skip


def run_with_te(function: Any, world_size: int, *args: Any) -> None:
    """`run_distributed` with Transformer Engine in the ranks, which begin with nothing imported."""
    from tests.distributed.harness import run_distributed

    where = function.__module__, function.__name__, args
    run_distributed(_on_a_rank, world_size, *where, start_method="spawn")


def _on_a_rank(module: str, name: str, args: tuple[Any, ...]) -> None:
    with light_imports():
        load()
        function = getattr(importlib.import_module(module), name)
        importlib.import_module("megatron_scalebio.methods.run")
    function(*args)


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


class _Extension(types.ModuleType):
    """The compiled module, before it has its kernels: enumerations, and functions of any name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():  # an enumeration of which no number matters, or a class
            made: Any = type(name, (_Names,), {})
        else:

            def made(*args: Any, **options: Any) -> Any:
                raise NotImplementedError(f"the double has no kernel {name}")

        setattr(self, name, made)
        return made


class _NamesType(type):
    """Members get numbers as they are asked for."""

    @property
    def __members__(cls) -> list[str]:
        return [name for name in vars(cls) if not name.startswith("__")]

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(vars(cls)))
        return getattr(cls, name)


class _Names(metaclass=_NamesType): ...


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
    extension: Any = _Extension("transformer_engine_torch")
    for name, members in (
        ("DType", _DTYPES), ("FP8FwdTensors", _FORWARD), ("FP8BwdTensors", _BACKWARD),
    ):  # fmt: skip
        setattr(extension, name, enum.IntEnum(name, members, start=0))
    extension.get_cudnn_version = lambda: 91900
    extension.get_cublasLt_version = lambda: 130100
    extension.get_num_cublas_streams = lambda: 4
    extension.get_stream_priority_range = lambda *args: (0, 0)
    extension.device_supports_multicast = lambda *args: False
    extension.ubuf_built_with_mpi = lambda: False
    for kernel in KERNELS:
        setattr(extension, kernel.__name__, kernel)
    return extension


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
