"""The process's place in the run: device, ranks, process groups, signals. A leaf of the imports.

Starts alike under torchrun, under srun (one task per rank) and bare (one rank).
"""

import datetime
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_scalebio.compat import adapt, cpu
from megatron_scalebio.config import Config, ParallelConfig
from megatron_scalebio.errors import UserError
from megatron_scalebio.launcher import adopt_slurm_variables, world_size_from_environment

# Minutes by which a collective outlasts the watchdog, who knows which rank it waits for.
_BEHIND_WATCHDOG = 1


def device() -> torch.device:
    return torch.device(torch.cuda.current_device())


def on_cuda() -> bool:
    return device().type == "cuda"


def start(config: Config) -> None:
    """Joins the process group and builds Megatron's groups for TP, CP, PP and DP.

    Raises:
        UserError: if the launcher's variables are incomplete.
    """
    parallel = config.parallel
    adapt()
    if parallel.bf16 and not on_cuda():
        cpu.multiply_bf16_in_fp32()
    if not dist.is_initialized():
        _join(parallel)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            **parallel.group_sizes(config.model.num_layers),
            distributed_timeout_minutes=parallel.distributed_timeout_minutes + _BEHIND_WATCHDOG,
        )


def _join(parallel: ParallelConfig) -> None:
    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes + _BEHIND_WATCHDOG)
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        torch.cuda.set_device(int(local_rank) % torch.cuda.device_count())
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group(backend, timeout=timeout)
        return
    world_size = world_size_from_environment()
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    adopt_slurm_variables()
    dist.init_process_group(backend, timeout=timeout)


def stop_model_parallel() -> None:
    """Drops Megatron's groups, so that `start` can build those of another layout."""
    parallel_state.destroy_model_parallel()


def stop() -> None:
    if dist.is_initialized():
        stop_model_parallel()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size()


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def on_main(work: Callable[[], Any]) -> Any:
    """Does something on rank 0 and gives its result, or the UserError it raised, to all ranks."""
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def only_on_main[T](make: Callable[[], T]) -> T | None:
    """Makes something on rank 0 and gives it there; None elsewhere. A UserError reaches all."""
    made: list[T] = []
    on_main(lambda: made.append(make()))
    return made[0] if made else None


def any_rank(*flags: int) -> list[bool]:
    """Which flags are set on any rank. All ranks then stop after the same step."""
    seen = torch.tensor([float(flag != 0) for flag in flags], device=device())
    dist.all_reduce(seen)
    return [bool(flag) for flag in seen]


@contextmanager
def refused_together() -> Iterator[None]:
    """Raises on all ranks the UserError that some ranks raise in the block. A collective."""
    refusal: UserError | None = None
    try:
        yield
    except UserError as error:
        refusal = error
    if any_rank(refusal is not None)[0]:
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, refusal and str(refusal))
        raise UserError(next(line for line in said if line))


def dp_rank() -> int:
    """Which micro-batches are this rank's. Context-parallel ranks share theirs."""
    return parallel_state.get_data_parallel_rank()


def dp_size() -> int:
    return parallel_state.get_data_parallel_world_size()


def cp_rank() -> int:
    return parallel_state.get_context_parallel_rank()


def cp_size() -> int:
    return parallel_state.get_context_parallel_world_size()


def allocated_bytes() -> int:
    """Most memory allocated on this rank's GPU, or the most resident memory of its process."""
    if on_cuda():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Remembers SIGTERM, SIGUSR1 and Ctrl-C, so that the loop can save after its step and exit 3.

    A second Ctrl-C ends at once.
    """

    def __init__(self) -> None:
        self.received = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
