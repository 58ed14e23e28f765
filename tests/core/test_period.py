"""A period's optimizers against AdamW written out, u's return to w, and what closing leaves.

On one rank, with gradients given by hand: the flush that makes them has tests of its own.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.core.period_case import (
    OVERLAP,
    AdamW,
    Case,
    close_to,
    masters_and_moments,
    same,
)
from tests.distributed.exact_layouts import EXPERTS
from tests.distributed.harness import run_distributed
from tests.distributed.test_low_bits import parts

CASES: dict[str, dict] = {
    "fp32": {}, "bf16": {"bf16": True},
    "distributed": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    "overlap-bf16": {**OVERLAP, "bf16": True},
}  # fmt: skip


def steps_and_resync(case: Case) -> None:
    period, start = case.period, case.values("w")
    frozen = set(start) - set(case.named("w"))
    assert frozen and set(case.named("u")) == set(case.named("w"))
    assert all(p.main_grad.dtype == torch.float32 for p in case.named("w").values())
    oracles = {which: AdamW({k: start[k] for k in case.named(which)}) for which in ("w", "u")}
    for number, lr in enumerate((0.05, 0.02, 0.04)):
        for which in ("w", "u"):
            case.give(which, 99)  # what the step before has left
        period.zero_grad()
        for which in ("w", "u"):
            assert all(p.main_grad.eq(0).all() for p in case.named(which).values())
            parts = period.optimizers[which].chained_optimizers
            assert all(p.grad is None for part in parts for p in part.get_parameters())
        # The second step's gradients are too small to be clipped.
        scale = 1e-3 if number == 1 else 1.0
        of_w = case.give("w", 10 + number, scale)
        of_u = case.give("u", 20 + number, scale)
        if number == 2:
            period.add_gradients_of_u(0.75)
            of_w = {name: g + 0.75 * of_u[name] for name, g in of_w.items()}
        before_u = case.values("u")
        norm = case.step("w", lr)
        assert norm == pytest.approx(oracles["w"].step(of_w, lr), rel=1e-5)
        assert same(before_u, case.values("u")), "w's step is not u's"
        norm = case.step("u", lr / 2)
        assert norm == pytest.approx(oracles["u"].step(of_u, lr / 2), rel=1e-5)
    for which in ("w", "u"):
        close_to(case, which, oracles[which].p)
        assert all(torch.equal(case.values(which)[name], start[name]) for name in frozen)

    of_w = [t.clone() for t in masters_and_moments(case, "w")]
    held = [t.data_ptr() for t in masters_and_moments(case, "u")]
    for chunks, value in ((case.w, 3.0), (case.u, 7.0)):  # such as an expert's bias
        chunks[0].register_buffer("counted", torch.full((2,), value), persistent=False)
    next(iter(case.named("u").values())).data.fill_(math.inf)
    for each in masters_and_moments(case, "u"):
        each.fill_(math.inf)  # what has diverged comes back, too
    told: list[bool] = []
    period.twins[0].weights_have_moved = lambda: told.append(True)
    period.resync()
    assert told, "copies in other formats are made anew"
    assert case.u[0].counted.eq(3.0).all() and case.w[0].counted.eq(3.0).all()
    assert case.u[0].counted.data_ptr() != case.w[0].counted.data_ptr()
    assert same(case.values("w"), case.values("u"))
    for was, now_w, now_u in zip(
        of_w, masters_and_moments(case, "w"), masters_and_moments(case, "u"), strict=True
    ):
        assert torch.equal(was, now_w) and torch.equal(was, now_u)
        assert now_w.data_ptr() != now_u.data_ptr(), "u's own"
    assert [t.data_ptr() for t in masters_and_moments(case, "u")] == held
    close_to(case, "u", oracles["w"].p)
    for which in ("w", "u"):  # and they go on alike
        period.zero_grad()
        case.give(which, 31)
        before = case.values("w") if which == "u" else None
        case.step(which, 0.03)
        assert before is None or same(before, case.values("w"))
    assert same(case.values("w"), case.values("u"))


def watched_hooks(period: Any) -> list[bool]:
    """Whether weights were gathered, for every time that a chunk's hooks are taken off from now."""
    synced: list[bool] = []
    for chunk in (chunk for chunks in period.ddp.values() for chunk in chunks):

        def disable(
            param_sync: bool = True, original: Any = chunk.disable_forward_pre_hook
        ) -> None:
            synced.append(param_sync)
            original(param_sync=param_sync)

        chunk.disable_forward_pre_hook = disable
    return synced


def closing(case: Case) -> None:
    from megatron_scalebio.core.low_bits import kept

    period = case.period
    assert all(p.main_grad is not None for p in case.named("w").values())
    before = {which: case.values(which) for which in ("w", "u")}
    buffers = {
        t.untyped_storage().data_ptr()
        for chunks in period.ddp.values() for chunk in chunks for buffer in chunk.buffers
        for t in (buffer.grad_data, buffer.param_data) if t is not None
    }  # fmt: skip
    case.megatron.no_sync_func = object()
    assert case.w[0].fuse_wgrad_accumulation and case.u[0].fuse_wgrad_accumulation
    synced = watched_hooks(period)
    period.gather_parameters()
    assert synced == [True] * len(synced)
    chunks = [chunk for chunks in period.ddp.values() for chunk in chunks]
    overlap = case.config.parallel.overlap_param_gather
    assert [bool(chunk.remove_forward_pre_hook_handles) for chunk in chunks] == [overlap] * 2
    period.close(("w", "u"))
    bf16 = {p.dtype is torch.bfloat16 for p in case.named("w", trained=False).values() if kept(p)}
    assert bf16 == ({True} if case.config.parallel.bf16 else set()), "fp32 has no low bits"
    assert synced == [True] * (4 if overlap else 0), "weights are made whole first"
    assert not any(chunk.remove_forward_pre_hook_handles for chunk in chunks)
    for which in ("w", "u"):
        assert same(before[which], case.values(which))
        for p in case.named(which, trained=False).values():
            assert p.grad is None
            for left in ("main_grad", "main_param", "main_param_sharded"):
                assert not hasattr(p, left), left
            assert not hasattr(p, "grad_added_to_main_grad")
            assert p.untyped_storage().data_ptr() not in buffers
    assert not case.w[0].fuse_wgrad_accumulation and not case.u[0].fuse_wgrad_accumulation
    assert not any(hasattr(period, name) for name in ("twins", "ddp", "optimizers"))


def on_rank() -> None:
    from megatron_scalebio import runtime
    from tests.described import shared_names

    for name, parallel in CASES.items():
        case = Case(parallel)
        period, ddp = case.period, case.period.ddp
        frozen = set(case.named("w", trained=False)) - set(case.named("w"))
        assert shared_names(case.w, case.u) == frozen, name
        if not parallel.get("use_distributed_optimizer"):  # whose buffer takes weights in
            assert [p.data_ptr() for p in case.named("w").values()] == case.places
        assert [(t.w, t.u) for t in period.twins] == [(ddp["w"][0], ddp["u"][0])]
        assert period.optimizers["w"] is not period.optimizers["u"]
        for hook in ("finalize_model_grads_func", "no_sync_func"):
            assert getattr(case.megatron, hook) is None, "set for the time of a flush alone"
        steps_and_resync(case)
        closing(case)
        without_u(parallel)
        runtime.stop_model_parallel()


def without_u(parallel: dict) -> None:
    """w alone is both of the twin. Its optimizer, if it is a distributed one, can load a state."""
    from megatron_scalebio.compat.megatron import allocate_state
    from tests.described import shared_names

    case, distributed = Case(parallel, with_u=False), "use_distributed_optimizer" in parallel
    period = case.period
    assert set(period.ddp) == set(period.optimizers) == {"w"}
    assert [(t.w, t.u) for t in period.twins] == [(period.ddp["w"][0],) * 2]
    every = set(case.named("w", trained=False))
    # A distributed optimizer takes w's trainable weights into its buffer.
    moved = set(case.named("w")) if distributed else set()
    assert shared_names(case.w, case.u) == every - moved
    [part] = period.optimizers["w"].chained_optimizers
    assert not part.optimizer.state
    allocate_state(period.optimizers["w"])
    parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
    assert len(part.optimizer.state) == (len(parameters) if distributed else 0)
    if distributed:
        # What `load_state_dict` leaves: one step for all, which each would count up.
        step = torch.tensor(5.0)
        for state in part.optimizer.state.values():
            state["step"] = step
        for p, (group, order) in part.model_param_group_index_map.items():
            master = part.optimizer.param_groups[group]["params"][order]
            tensors = {
                "param": torch.full_like(master, 1.5), "exp_avg": torch.full_like(master, 2.5),
                "exp_avg_sq": torch.full_like(master, 3.5),
            }  # fmt: skip
            with torch.no_grad():
                part._set_main_param_and_optimizer_states(p, tensors)
            state = part.optimizer.state[master]
            assert master.eq(1.5).all() and state["exp_avg"].eq(2.5).all()
            assert state["exp_avg_sq"].eq(3.5).all()
        case.give("w", 1)
        case.step("w", 0.01)
        steps = [float(state["step"]) for state in part.optimizer.state.values()]
        assert steps == [6.0] * len(parameters)
    period.close()


def test_periods_step_return_and_close() -> None:
    run_distributed(on_rank, 1)


def masters_outlast_a_period(parallel: dict, model: dict) -> None:
    """Those of bf16 weights, in a period that goes on with both models, or with none."""
    from megatron_scalebio import runtime
    from megatron_scalebio.core.low_bits import kept

    case = Case(parallel, **model)
    frozen = [p for p in case.named("w", trained=False).values() if not p.requires_grad]
    for going_on in (("w", "u"), ()):
        for number, which in enumerate(("w", "u")):
            case.period.zero_grad()
            case.give(which, 40 + number)
            case.step(which, 0.01)
            for _, values in parts(case.period, which).values():
                of_bits = values.view(torch.int32)[::3]  # half way between two bf16 numbers
                of_bits.copy_(of_bits & -(1 << 16) | 0x8000)
        left = {which: copies(case, which) for which in ("w", "u")}
        case.period.close(going_on)
        assert not any(map(kept, frozen))
        for which in ("w", "u"):
            ranks_agree(case, which)
        rounded = {which: case.values(which) for which in ("w", "u")}
        case.begin()
        for which, before in left.items():
            now = copies(case, which)
            assert now.keys() == before.keys()
            for name, (start, values) in now.items():
                weights = rounded[which][name].flatten()[start : start + len(values)].float()
                wanted = before[name][1] if which in going_on else weights
                assert torch.equal(values, wanted), (parallel, model, which, name)
                assert not torch.equal(before[name][1], weights), "rounding loses something"
    case.period.close()
    runtime.stop_model_parallel()


def copies(case: Case, which: str) -> dict[str, tuple[int, torch.Tensor]]:
    """This rank's part of each master, and where it starts."""
    held = parts(case.period, which)
    return {
        name: (held[p][0], held[p][1].clone()) for name, p in case.named(which).items() if p in held
    }


def ranks_agree(case: Case, which: str) -> None:
    for name, value in case.values(which).items():
        if ".experts.experts." not in name:  # each rank has its own
            of_ranks = [torch.empty_like(value).float() for _ in range(2)]
            torch.distributed.all_gather(of_ranks, value.float())
            assert torch.equal(*of_ranks), (which, name)


def loads_are_copied() -> None:
    """Of a shared pass the routers of u have counted; both move their biases by it."""
    from megatron_scalebio import runtime
    from megatron_scalebio.core.experts import routers

    case = Case({}, **EXPERTS)
    pairs = list(zip(routers(case.w), routers(case.u), strict=True))
    for n, (of_w, of_u) in enumerate(pairs):
        of_w.load, of_u.load = torch.zeros(4), torch.arange(4.0) + n
    case.period.add_gradients_of_u(0.5)
    for n, (of_w, of_u) in enumerate(pairs):
        assert of_w.load.tolist() == of_u.load.tolist() == [n, n + 1, n + 2, n + 3]
    case.period.close()
    runtime.stop_model_parallel()


def on_two_ranks() -> None:
    loads_are_copied()
    for parallel in ({"bf16": True}, {**OVERLAP, "bf16": True}):
        masters_outlast_a_period(parallel, {})
    experts = {**OVERLAP, "bf16": True, "expert_model_parallel_size": 2}
    masters_outlast_a_period(experts, EXPERTS)


def test_masters_of_bf16_weights_outlast_their_period() -> None:
    run_distributed(on_two_ranks, 2)
