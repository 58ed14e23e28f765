"""What the ranks of a training tell each other beside Megatron's own communication.

All ranks of torch's default process group train together. Numbers that a step goes by are small
and lie on the CPU; they go through the device's memory because NCCL knows no other.
"""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection


def device() -> torch.device:
    """This rank's.

    Raises:
        RuntimeError: without a GPU, if Megatron has not been adapted to that.
    """
    try:
        return torch.device(torch.cuda.current_device())
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(
            f"{error} (without a GPU, call megatron_scalebio.compat.adapt() before anything else)"
        ) from None


def summed(values: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum over a process group [all ranks] of a tensor on the CPU. A collective."""
    if (dist.get_world_size() if group is None else group.size()) == 1:
        return values
    on_device = values.to(device())
    dist.all_reduce(on_device, group=group)
    return on_device.cpu()


def of_first_rank(values: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor, on the CPU, on all ranks. A collective."""
    if dist.get_world_size() == 1:
        return values
    on_device = values.to(device())
    dist.broadcast(on_device, src=0)
    return on_device.cpu()


def require_megatrons(groups: ProcessGroupCollection) -> None:
    """Megatron's schedules look groups up in parallel_state: others would be two worlds in one.

    Raises:
        ValueError: a group has other ranks than Megatron's.
    """
    megatrons = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "cp", "dp"])
    for name in ("tp", "pp", "cp", "dp"):
        ours, theirs = (
            dist.get_process_group_ranks(getattr(each, name)) for each in (groups, megatrons)
        )
        if ours != theirs:
            raise ValueError(
                f"pg_collection.{name} has ranks {ours}, parallel_state's has {theirs}: "
                "initialize parallel_state with the same layout"
            )


def reports_losses(groups: ProcessGroupCollection) -> bool:
    """True on one rank for each part of each sequence: it adds its losses to the sums."""
    return groups.pp.rank() == groups.pp.size() - 1 and groups.tp.rank() == 0
