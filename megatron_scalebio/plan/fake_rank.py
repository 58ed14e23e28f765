"""Any rank of any world, played by this process: shapes without data, messages without a wire.

Tensors live on torch's meta device, which knows shapes and dtypes and computes nothing. The process
group is torch's fake one, so parallel_state answers as on that rank. What would leave the rank is
caught: collectives by the `Ledger`, pipeline messages here.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_scalebio.compat import cpu, megatron
from megatron_scalebio.config import Config

# (what: "send_next", "recv_prev", "send_prev" or "recv_next", shape)
Message = tuple[str, tuple[int, ...]]
META = torch.device("meta")


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` within."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def as_rank(
    config: Config, rank: int, world_size: int, on_message: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """This process is `rank` of `world_size` within; `on_message` sees each pipeline message.

    The process must have no process group and use no CUDA.
    """
    cpu.adapt()
    megatron.adapt()
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(replaced(torch.cuda, "current_device", lambda: META))
        enter(replaced(torch.Tensor, "type", _without_meta(torch.Tensor.type)))
        enter(replaced(dist, "all_gather_object", _all_alike))
        create_group = parallel_state.create_group
        enter(replaced(parallel_state, "create_group", _fake_groups(create_group)))
        for module, name, gives in megatron.exchanges():
            enter(replaced(module, name, _wire(on_message, gives)))
        # Fused functions are compiled on a GPU; here their parts run one by one.
        if "torch._dynamo" in sys.modules:
            enter(torch.compiler.set_stance("force_eager"))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel(
            **config.parallel.group_sizes(config.model.num_layers)
        )
        stack.callback(parallel_state.destroy_model_parallel)
        yield


def group_kinds() -> dict[str, str]:
    """Which parallelism a process group, by its name, serves: TP, CP, EP, PP or DP."""
    kinds = {
        parallel_state.get_expert_tensor_and_model_parallel_group().group_name: "EP",
        parallel_state.get_expert_model_parallel_group().group_name: "EP",
        parallel_state.get_expert_tensor_parallel_group().group_name: "EP",
        parallel_state.get_expert_data_parallel_group().group_name: "DP",
        parallel_state.get_context_parallel_group().group_name: "CP",
        parallel_state.get_tensor_model_parallel_group().group_name: "TP",
        parallel_state.get_pipeline_model_parallel_group().group_name: "PP",
    }
    for with_context_parallel in (False, True):
        group = parallel_state.get_data_parallel_group(with_context_parallel=with_context_parallel)
        kinds[group.group_name] = "DP"
    return kinds


def _without_meta(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """The optimizers accept parameters by the type name 'torch.cuda.FloatTensor'."""

    def name_or_cast(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_of(self, *args, **kwargs)
        return answer.replace(".meta.", ".") if isinstance(answer, str) else answer

    return name_or_cast


def _all_alike(objects: list[Any], mine: Any, group: Any = None) -> None:
    """all_gather_object among ranks that all say the same."""
    objects[:] = [mine] * len(objects)


def _fake_groups(create_group: Callable[..., Any]) -> Callable[..., Any]:
    def create(*args: Any, **kwargs: Any) -> Any:
        return create_group(*args, **{**kwargs, "backend": None})

    return create


def _wire(on_message: Callable[[str, torch.Tensor], None], gives: type) -> Callable[..., Any]:
    """Stands for Megatron's sends and receives: reports them, in their order, and is done."""

    def exchange(**tensors: Any) -> Any:
        for name in ("send_next", "recv_prev", "send_prev", "recv_next"):
            side, _, where = name.partition("_")
            tensor = tensors[f"tensor_{side}_{where}"]
            if tensor is not None:
                on_message(name, tensor)
        return gives()

    return exchange
