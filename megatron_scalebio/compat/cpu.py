"""Lets Megatron-Core run on CPU + gloo. The only file that knows it assumes CUDA.

Megatron-Core asks for `torch.cuda.current_device()` and streams, writes `device="cuda"` literally
in factory calls, pins memory, keeps CUDA random states and checks `tensor.type()` for
"torch.cuda.". Where Transformer Engine or Apex is installed it takes their optimizers.
`adapt()` answers each of these for a machine without CUDA, and refuses to act where CUDA is
present.
"""

import datetime
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device

from megatron_scalebio.compat import require

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint")


@functools.cache
def adapt() -> None:
    """Adapts torch once. Call before Megatron-Core builds anything."""
    assert not torch.cuda.is_available(), "cpu.adapt() is for machines without CUDA"
    _adapt_random_states()
    _adapt_optimizers()
    _adapt_devices()
    _adapt_experts()
    _adapt_gloo()
    leave_uncompiled()


def leave_uncompiled() -> None:
    """Has `torch.compile` give a function back as it is.

    Megatron-Core compiles some, which takes a C++ compiler and longer than they do. To decorate
    them alone imports torch's compiler, for seconds.
    """
    torch.compile = _as_is
    if "torch._dynamo" in sys.modules:  # those that are decorated already
        torch.compiler.set_stance("force_eager")


def _as_is(model: Callable[..., Any] | None = None, **_: Any) -> Any:
    return model or (lambda function: function)


@functools.cache
def multiply_bf16_in_fp32() -> Any:
    """Matrix products of bf16 by fp32's kernels, where torch has but a loop for bf16.

    So it is on x86 processors without AVX-512, where fp32's are ten times as fast. Both add up in
    fp32 and round once. A product then takes 13 µs more, of any dtype: for models in bf16.

    Returns:
        What holds the kernels in place; None where nothing had to be done.
    """
    has_a_loop = torch.backends.cpu.get_cpu_capability() == "AVX2"
    if not has_a_loop or not hasattr(torch.library, "get_kernel"):  # as in older ones
        return None
    library = torch.library.Library("aten", "IMPL")
    for name in ("mm", "bmm", "addmm", "baddbmm"):
        kernel = _in_fp32(torch.library.get_kernel(f"aten::{name}", "CPU"))
        library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)
    return library


def _in_fp32(kernel: Any) -> Callable[..., torch.Tensor]:
    def multiply(keys: Any, *tensors: torch.Tensor, **factors: Any) -> torch.Tensor:
        if tensors[0].dtype is not torch.bfloat16:
            return kernel.call_boxed(keys, *tensors, **factors)
        return kernel.call_boxed(keys, *(each.float() for each in tensors), **factors).bfloat16()

    return multiply


def _adapt_devices() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.current_stream = torch.cpu.current_stream
    cuda.Stream, cuda.stream = _Stream, torch.cpu.stream
    cuda.synchronize = lambda *args, **kwargs: None
    # `with torch.device(...)` knows factories by identity: it must learn them before they change.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.type = _cuda_type_names(tensor.type)


class _Stream(torch.cpu.Stream):
    def record_event(self) -> Any:
        return torch.cpu.Event()  # has happened


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


def _adapt_experts() -> None:
    """What sends tokens to experts: sizes as numbers, and gloo's collectives of unequal parts.

    Megatron makes numbers of the sizes on a GPU alone. Gloo gathers and scatters equal parts only.
    Routers multiply by Transformer Engine's kernel wherever that is installed.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    require(moe_utils, "te_general_gemm")
    moe_utils.te_general_gemm = None
    require(token_dispatcher, "maybe_move_tensor_to_cpu")
    require(mappings, "_gather_along_first_dim", "_reduce_scatter_along_first_dim")

    def as_asked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_parts(
        part: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if sizes is None or group.size() == 1:
            return gather(part, group, sizes, use_global_buffer)
        whole = part.new_empty(int(sum(sizes)), *part.shape[1:])
        copies = part.repeat(group.size(), *[1] * (part.ndim - 1))
        dist.all_to_all_single(whole, copies, list(sizes), [len(part)] * group.size(), group=group)
        return whole

    def scatter_parts(
        whole: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if sizes is None or group.size() == 1:
            return scatter(whole, group, sizes, use_global_buffer)
        mine = int(sizes[group.rank()])
        parts = whole.new_empty(group.size() * mine, *whole.shape[1:])
        dist.all_to_all_single(
            parts, whole.contiguous(), [mine] * group.size(), list(sizes), group=group
        )
        return parts.view(group.size(), mine, *whole.shape[1:]).sum(0)

    token_dispatcher.maybe_move_tensor_to_cpu = as_asked
    mappings._gather_along_first_dim = gather_parts
    mappings._reduce_scatter_along_first_dim = scatter_parts


def _adapt_gloo() -> None:
    """All groups of a process share one network device.

    A device of gloo's is a thread that wakes a hundred times a second. Megatron makes 20 groups and
    more, and torch gives each a device of its own: together 4 % of a core, doing nothing.
    """
    devices: list[Any] = []
    kind: Any = dist.ProcessGroupGloo
    make = kind.__init__

    @functools.wraps(make)
    def make_on_one_device(self: Any, *given: Any, **named: Any) -> None:
        timeout = named.get("timeout", given[-1])
        if devices and isinstance(timeout, datetime.timedelta):
            options = kind._Options()
            options._devices, options._timeout = devices, timeout
            make(self, *given[:3], options)
        else:
            make(self, *given, **named)
            devices[:] = self.options._devices

    kind.__init__ = make_on_one_device


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
