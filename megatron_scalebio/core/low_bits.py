"""The low 16 bits of fp32 masters, kept in host memory while their weights rest in bf16.

    a period ends       master (fp32) ─▶ weight (bf16, nearest) and low bits (int16)
    it trains again     weight and low bits ─▶ the same master, bit for bit

Without them a LISA period would start from the rounded weights: at a learning rate of 1e-6 most
weights never come as far as the next bf16 number within a period, and would stay where they are.

A bf16 number is the upper half of an fp32 number's bits. To the nearest it is within half a step of
the master, so that their difference, in units of the master's last bit, takes 2^16 + 1 values: both
ends are ties. Rounding to even keeps both ends. Ties are rounded away from zero here, which is as
near; it leaves one end, and 16 bits tell all.

A weight that trains for the first time has no master yet, and starts from a random one among those
that round to it (`dither`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_scalebio.core.collectives import device

_KEPT = "_low_bits"
# Random numbers are drawn one after another on the host, and repeated from here on: of billions of
# weights that would take minutes. Prime, so that columns of a matrix do not repeat from row to row.
_DRAWN = 2**20 + 7
# Of a parameter: the ranks that share its masters.
SharingGroup = Callable[[torch.nn.Parameter], dist.ProcessGroup | None]


@dataclass(frozen=True)
class LowBits:
    """Those of a stretch of a parameter's elements, in host memory.

    Attributes:
        start: the first element of the stretch, of the flat parameter.
        bits: [n] int16; with the distributed optimizer the ranks' stretches make up the parameter.
    """

    start: int
    bits: torch.Tensor


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A finite fp32 tensor as the nearest bf16 tensor, ties away from zero, and its low bits."""
    whole = master.view(torch.int32)
    bits = whole.to(torch.int16)
    upper = (whole - bits.to(torch.int32)) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), bits


def join(weight: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """The fp32 tensor of which these are the parts."""
    upper = weight.view(torch.int16).to(torch.int32) << 16
    return (upper + bits.to(torch.int32)).view(torch.float32)


def kept(parameter: torch.nn.Parameter) -> LowBits | None:
    return getattr(parameter, _KEPT, None)


def forget(parameter: torch.nn.Parameter) -> None:
    if kept(parameter) is not None:
        delattr(parameter, _KEPT)


def share(source: torch.nn.Parameter, target: torch.nn.Parameter) -> None:
    """For parameters of equal weights: the target goes on from the same masters."""
    forget(target)
    if kept(source) is not None:
        setattr(target, _KEPT, kept(source))


@torch.no_grad()
def keep(parameter: torch.nn.Parameter, master: torch.Tensor | None, start: int) -> None:
    """Keeps the low bits of this rank's stretch of the masters; the weights fit them then.

    Args:
        master: None where the distributed optimizer holds it on other ranks: no bits, but known to
            have trained.
    """
    bits = torch.empty(0, dtype=torch.int16)
    if master is not None:
        weight, bits = split(master.detach().flatten())
        parameter.data.view(-1)[start : start + len(weight)].copy_(weight)
    setattr(parameter, _KEPT, LowBits(start, bits.cpu()))


def keep_part(
    parameter: torch.nn.Parameter, bits: torch.Tensor, group: dist.ProcessGroup | None
) -> None:
    """Keeps this rank's share of a whole parameter's bits."""
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    size = bits.numel()
    start, stop = size * rank // ranks, size * (rank + 1) // ranks
    setattr(parameter, _KEPT, LowBits(start, bits.flatten()[start:stop].clone().cpu()))


def dither(parameter: torch.nn.Parameter, seed: int, group: dist.ProcessGroup | None) -> None:
    """Gives a weight that has no master yet random low bits: passes are the same with any.

    From bits of zero, w and u would move for hundreds of steps at a learning rate of 1e-6 before
    bf16 passes see a difference. From random ones some weights change with every step, and passes
    see on average what the masters do. A function of seed and place alone, on any device, so that w
    and u, and tied weights on two pipeline stages, start alike.
    """
    if kept(parameter) is None:
        size = parameter.numel()
        drawn = torch.empty(min(size, _DRAWN), dtype=torch.int16)
        drawn.random_(-(2**15), 2**15, generator=torch.Generator().manual_seed(seed))
        bits = drawn.to(parameter.device).repeat(-(-size // _DRAWN))[:size].view_as(parameter)
        bits[parameter == 0] = 0  # and stays zero: its lower half step is beyond it
        keep_part(parameter, bits, group)


def whole(parameter: torch.nn.Parameter, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The bits of a parameter, in its shape, on this rank's device. A collective of the group.

    Args:
        group: of the ranks that share the parameter's masters; None: each has them all.
    """
    held = kept(parameter)
    assert held is not None
    bits = torch.zeros(parameter.numel(), dtype=torch.int16, device=device())
    bits[held.start : held.start + len(held.bits)] = held.bits.to(device())
    if group is not None and group.size() > 1:
        dist.all_reduce(bits.view(torch.uint8), group=group)  # zero elsewhere; NCCL has no int16
    return bits.view_as(parameter)


@torch.no_grad()
def restore(
    parameter: torch.nn.Parameter,
    master: torch.Tensor | None,
    start: int,
    group: dist.ProcessGroup | None,
) -> None:
    """Makes a master what it was; the bits are then forgotten, as it moves. A collective."""
    if kept(parameter) is None:
        return
    bits = whole(parameter, group).view(-1)
    if master is not None:
        part = slice(start, start + master.numel())
        value = join(parameter.detach().view(-1)[part], bits[part])
        master.copy_(value.view_as(master))
    forget(parameter)


def sharing_group(
    ddp: DistributedDataParallelConfig, groups: ProcessGroupCollection
) -> SharingGroup:
    """Tells the ranks that share a parameter's masters; None: each has them all."""
    several = ddp.num_distributed_optimizer_instances > 1

    def group(parameter: torch.nn.Parameter) -> dist.ProcessGroup | None:
        if not ddp.use_distributed_optimizer:
            return None
        if getattr(parameter, "allreduce", True):
            return groups.intra_dp_cp if several else groups.dp_cp
        return groups.intra_expt_dp if several else groups.expt_dp  # of a mixture's experts

    return group
