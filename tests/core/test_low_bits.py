"""fp32 masters in two parts, bf16 weights and low bits, and back: exact for every finite number."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_scalebio.core import low_bits
from megatron_scalebio.core.low_bits import join, split

EDGES = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
TIE = 0x8000


def of_bits(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """Finite fp32 numbers of all given upper and lower halves, flat."""
    whole = (upper[:, None] << 16 | lower).flatten()
    numbers = whole.to(torch.int32).view(torch.float32)
    return numbers[numbers.isfinite()]


def masters() -> torch.Tensor:
    every = torch.arange(2**16)
    generator = torch.Generator().manual_seed(1)
    some = torch.randint(2**16, (100,), generator=generator)
    ends = torch.tensor([0x0000, 0x8000, 0x007F, 0x0080, 0x7F7F, 0xFF7F])  # zeros, tiny, huge
    normal = 0.02 * torch.randn(10**6, generator=generator)
    parts = of_bits(every, torch.tensor(EDGES)), of_bits(torch.cat([some, ends]), every)
    return torch.cat([*parts, normal])


def test_the_parts_of_a_master_give_it_back_bit_for_bit() -> None:
    master = masters()
    assert len(master) > 5e6
    weight, bits = split(master)
    assert weight.dtype is torch.bfloat16 and bits.dtype is torch.int16
    assert torch.equal(join(weight, bits).view(torch.int32), master.view(torch.int32))


def test_the_weight_is_megatrons_but_at_ties_where_it_is_as_near() -> None:
    master = masters()
    weight, _ = split(master)
    rounded = master.to(torch.bfloat16)
    differs = weight.view(torch.int16) != rounded.view(torch.int16)
    lower = master.view(torch.int32) & 0xFFFF
    assert differs.any() and lower[differs].eq(TIE).all()
    ties = lower.eq(TIE) & weight.isfinite()
    away = (weight.double() - master.double()).abs(), (rounded.double() - master.double()).abs()
    assert torch.equal(away[0][ties], away[1][ties])
    assert weight[ties].double().abs().gt(master[ties].double().abs()).all()


def test_a_dithered_master_rounds_to_its_weight_and_lies_anywhere_about_it() -> None:
    weight = torch.cat([0.02 * torch.randn(30_000), torch.zeros(100), -torch.zeros(100)])
    parameter, other = (torch.nn.Parameter(weight.to(torch.bfloat16)) for _ in range(2))
    for each, seed in ((parameter, 5), (other, 5)):
        low_bits.dither(each, seed, None)
    held, same = low_bits.kept(parameter), low_bits.kept(other)
    assert held and same and torch.equal(held.bits, same.bits), "w and u start alike"
    master = join(parameter.detach(), held.bits)
    assert torch.equal(split(master)[0], parameter)
    assert torch.equal(master[-200:], parameter.detach()[-200:].float()), "zero stays zero"
    bits = held.bits[:-200].double() / 2**15
    assert bits.mean().abs() < 0.02 and (bits.std() - 3**-0.5).abs() < 0.02
    low_bits.dither(parameter, 6, None)
    assert low_bits.kept(parameter) is held, "what has trained has a master"


def test_drawn_bits_repeat_aslant_to_the_rows_of_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bits, "_DRAWN", 807)
    parameter = torch.nn.Parameter(torch.ones(60, 100, dtype=torch.bfloat16))
    low_bits.dither(parameter, 5, None)
    held = low_bits.kept(parameter)
    assert held
    assert torch.equal(held.bits[807:1614], held.bits[:807]) and len(held.bits) == 6000
    assert len(held.bits.view(60, 100).unique(dim=0)) == 60
    assert held.bits[:807].unique().numel() > 790


class Group:
    """Ranks that hold a parameter's masters in stretches, one process for all of them."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.rank_here = 0

    def size(self) -> int:
        return len(self.parameters)

    def rank(self) -> int:
        return self.rank_here

    def all_reduce(self, flat: torch.Tensor, group: Any) -> None:
        assert group is self and flat.dtype is torch.uint8
        flat.zero_()
        for parameter in self.parameters:
            held = low_bits.kept(parameter)
            assert held is not None
            stretch = flat.view(torch.int16)[held.start : held.start + len(held.bits)]
            assert stretch.eq(0).all(), "stretches overlap"
            stretch.copy_(held.bits)


@pytest.mark.parametrize("loaded", [False, True], ids=["kept", "loaded"])
def test_ranks_divide_masters_otherwise_in_the_next_period(
    monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    master = 0.02 * torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    weight, bits = split(master)
    parameters = [torch.nn.Parameter(weight.clone()) for _ in range(3)]
    group: Any = Group(parameters)
    monkeypatch.setattr(low_bits, "dist", SimpleNamespace(all_reduce=group.all_reduce))
    monkeypatch.setattr(low_bits, "device", lambda: torch.device("cpu"))
    stretches = [(0, 10), (10, 35), (0, 0)]  # the third rank holds none of it
    for rank, (parameter, (start, stop)) in enumerate(zip(parameters, stretches, strict=True)):
        if loaded:
            group.rank_here = rank
            low_bits.keep_part(parameter, bits, group)
        else:
            part = master.flatten()[start:stop] if stop else None
            low_bits.keep(parameter, part, start)
    held = [low_bits.kept(parameter) for parameter in parameters]
    sizes = [len(each.bits) for each in held if each]
    assert sizes == ([11, 12, 12] if loaded else [10, 25, 0])
    assert all(torch.equal(low_bits.whole(p, group), bits) for p in parameters)
    for start, stop in ((3, 35), (0, 3), (7, 7)):
        for parameter, each in zip(parameters, held, strict=True):
            parameter._low_bits = each  # type: ignore[attr-defined]
        new = torch.zeros(stop - start)
        low_bits.restore(parameters[0], new, start, group)
        assert torch.equal(new, master.flatten()[start:stop])
        assert low_bits.kept(parameters[0]) is None, "the master moves from now on"


def test_u_goes_on_from_ws_masters_and_keeps_its_own() -> None:
    w, u = (torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)) for _ in range(2))
    low_bits.keep(u, torch.tensor([1.0, 2.0]), 0)
    low_bits.share(w, u)
    assert low_bits.kept(u) is None, "w starts from its weights"
    low_bits.keep(w, torch.tensor([0.1, 0.2]), 0)
    low_bits.share(w, u)
    assert low_bits.kept(u) is low_bits.kept(w)
    low_bits.keep(u, torch.tensor([0.3, 0.4]), 0)
    of_w = low_bits.kept(w)
    assert of_w and torch.equal(join(w.detach(), of_w.bits), torch.tensor([0.1, 0.2]))


def test_masters_are_shared_within_an_instance_of_the_distributed_optimizer() -> None:
    groups: Any = SimpleNamespace(
        dp="dp", dp_cp="dp_cp", intra_dp_cp="intra_dp_cp", expt_dp="expt", intra_expt_dp="intra"
    )
    weight, of_expert = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    of_expert.allreduce = False  # type: ignore[attr-defined]
    for sharded, instances, expected in (
        (False, 1, (None, None)), (True, 1, ("dp_cp", "expt")), (True, 2, ("intra_dp_cp", "intra")),
    ):  # fmt: skip
        ddp: Any = SimpleNamespace(
            use_distributed_optimizer=sharded, num_distributed_optimizer_instances=instances
        )
        group = low_bits.sharing_group(ddp, groups)
        assert (group(weight), group(of_expert)) == expected
