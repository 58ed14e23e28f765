"""bf16 under LISA: layers go on from their fp32 masters, under any layout and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.gather import global_tensors, merged
from tests.distributed.harness import run_distributed
from tests.distributed.small_runs import BATCH, begun, ended, write_problem

pytestmark = pytest.mark.distributed

DIST = {"use_distributed_optimizer": True}
OVERLAP = {**DIST, "overlap_grad_reduce": True, "overlap_param_gather": True}
# name: (ranks, parallel, resync_interval)
CASES: dict[str, tuple[int, dict, int | None]] = {
    "one": (1, {}, 10),
    "one-never-reset": (1, {}, None),
    "dp2": (2, {}, 10),
    "dp2-distributed-optimizer": (2, DIST, 10),
    "dp2-distributed-optimizer-never-reset": (2, OVERLAP, None),
    "cp2-distributed-optimizer": (2, {**DIST, "context_parallel_size": 2}, 10),
    "tp2": (2, {"tensor_model_parallel_size": 2}, None),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, 10),
    "pp2-interleaved": (
        2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}, None,
    ),
}  # fmt: skip
# A checkpoint of the first, at a step, goes on under the second. Step 5 is in the middle of a
# period, step 6 at a draw; layers are drawn otherwise with other stages.
CROSSINGS = [
    ("one", "one", 5), ("one", "one", 6), ("tp2", "dp2", 5),
    ("tp2", "pp2-interleaved", 6), ("pp2-interleaved", "dp2", 6),
    ("dp2-distributed-optimizer", "dp2-distributed-optimizer", 5),
    ("dp2-distributed-optimizer", "cp2-distributed-optimizer", 6),
    ("dp2-distributed-optimizer-never-reset", "dp2-distributed-optimizer-never-reset", 6),
]  # fmt: skip
INTERVAL, PERIODS = 2, 4
Values = dict[str, torch.Tensor]


def begin(folder: Path, name: str) -> Any:
    _, parallel, resync = CASES[name]
    return begun(
        folder, "reweight", model={"num_layers": 4}, parallel={"bf16": True, **parallel},
        lisa={"lisa_layers": 2, "lisa_interval": INTERVAL}, bilevel={"resync_interval": resync},
        optimizer={"lr": 1e-4, "lr_decay_style": "constant", "lr_warmup_fraction": 0.0},
        train={**BATCH, "train_iters": 20},
    )  # fmt: skip


def parts(period: Any, side: str) -> dict[torch.nn.Parameter, tuple[int, torch.Tensor]]:
    """This rank's part of the masters, and where it starts."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_scalebio.compat.megatron import start_of_shard

    result = {}
    for part in period.optimizers[side].chained_optimizers:
        sharded = isinstance(part, DistributedOptimizer)
        groups = part.model_float16_groups if sharded else part.float16_groups
        for parameter in (p for group in groups for p in group):
            start = start_of_shard(part, parameter) if sharded else 0
            result[parameter] = (start, parameter.main_param.detach().view(-1))
    return result


def masters(training: Any, side: str) -> Values:
    """All that trains in the present period, whole, by name."""
    from megatron_scalebio.core.twin import named_parameters

    held = parts(training.period, side)
    result = {}
    for name, parameter in named_parameters(training.models[side]):
        if parameter.requires_grad:
            flat = torch.zeros(parameter.numel())
            if parameter in held:
                start, values = held[parameter]
                flat[start : start + len(values)] = values
            if training._ddp.use_distributed_optimizer:
                dist.all_reduce(flat, group=training.groups.dp_cp)
            result[name] = flat.view(parameter.shape)
    return result


def make_ties(training: Any) -> None:
    """Puts a third of all masters half way between two bf16 numbers."""
    for side in training.models:
        for _, values in parts(training.period, side).values():
            of_bits = values.view(torch.int32)[::3]
            of_bits.copy_(of_bits & -(1 << 16) | 0x8000)


def layers_go_on(folder: Path, name: str) -> None:
    """What a layer starts a period from is what it ended its last one with."""
    from megatron_scalebio.core import low_bits
    from megatron_scalebio.core.twin import named_parameters

    state = begin(folder, name)
    training = state.training
    left: dict[str, Values] = {"w": {}, "u": {}}
    went_on = rested = 0
    for period in range(PERIODS):
        training.enter_period()
        starts = masters(training, "w")
        for side in ("w", "u"):
            of_side = "w" if CASES[name][2] is not None else side
            for each, value in masters(training, side).items():
                parameter = dict(named_parameters(training.models[side]))[each]
                if each in left[of_side]:
                    assert torch.equal(value, left[of_side][each]), (name, period, side, each)
                else:  # a new one starts from any master that rounds to its weight
                    low_bits.keep(copy := torch.nn.Parameter(parameter.detach().clone()), value, 0)
                    assert torch.equal(copy, parameter) and torch.equal(value, starts[each])
                    assert not torch.equal(value, parameter.detach().float()), "it is dithered"
                went_on += each in left[of_side]
        rested += len(set(left["w"]) - set(masters(training, "w")))
        for _ in range(INTERVAL):
            state.make_step()
        if period % 2:
            make_ties(training)
        ended_with = {side: masters(training, side) for side in ("w", "u")}
        for side in left:
            left[side] |= ended_with[side]
        training.leave_period()
        ranks_hold_the_same_weights(training)
    assert went_on and (rested or "interleaved" in name)
    ended(state)


def ranks_hold_the_same_weights(training: Any) -> None:
    from megatron_scalebio.core.twin import named_parameters

    group = training.groups.dp_cp
    for side in training.models:
        for name, parameter in named_parameters(training.models[side]):
            of_ranks = [torch.empty(parameter.shape) for _ in range(group.size())]
            dist.all_gather(of_ranks, parameter.detach().float(), group=group)
            assert all(torch.equal(each, of_ranks[0]) for each in of_ranks), (side, name)


def values(training: Any, side: str) -> Values:
    """The fp32 value of every weight, in global tensors: its master's, now or when it trains."""
    from megatron_scalebio.core import low_bits
    from megatron_scalebio.core.twin import named_parameters

    pairs = zip(named_parameters(training.w), named_parameters(training.u), strict=True)
    like = {p_u: p_w for (_, p_w), (_, p_u) in pairs if p_w.data_ptr() == p_u.data_ptr()}
    active = masters(training, side) if training.period else {}
    found = {}
    for name, parameter in named_parameters(training.models[side]):
        resting = like.get(parameter, parameter)
        found[parameter] = active.get(name, parameter.detach().float())
        if name not in active and low_bits.kept(resting):
            bits = low_bits.whole(resting, training.sharing_group(resting))
            found[parameter] = low_bits.join(parameter.detach(), bits)
    return global_tensors(training.models[side], found.get)


def saved_and_loaded(folder: Path, name: str, other: str, step: int) -> None:
    from megatron_scalebio.checkpoint import saver

    checkpoint, rank = folder / f"{name} to {other} at {step}", dist.get_rank()
    state = begin(folder, name)
    for _ in range(step):
        state.make_step()
    saver.save(state, checkpoint)
    saved = {side: values(state.training, side) for side in ("w", "u")}
    torch.save(saved, checkpoint / f"saved-{rank}.pt")
    records = [state.make_step() for _ in range(3)]
    ended(state)
    fresh = begin(folder, other)
    assert saver.load_latest(fresh, checkpoint)[0]
    loaded = {side: values(fresh.training, side) for side in ("w", "u")}
    torch.save(loaded, checkpoint / f"loaded-{rank}.pt")
    for record in records:
        again = fresh.make_step()
        if name == other:
            assert {**again, "memory_bytes": 0} == {**record, "memory_bytes": 0}
    ended(fresh)


def without_the_bits(folder: Path) -> None:
    """A checkpoint that has none, as earlier versions wrote it: layers go on from their weights."""
    from megatron_scalebio.checkpoint import saver, sharding

    state = begin(folder, "one")
    for _ in range(5):
        state.make_step()
    saving, sharding.low_bits_state = sharding.low_bits_state, lambda models, group: {}
    saver.save(state, folder / "older")
    sharding.low_bits_state = saving
    ended(state)
    fresh = begin(folder, "one")
    fresh.make_step()
    fresh.make_step()
    fresh.make_step()  # in a later period: it has bits of its own, which are not the checkpoint's
    assert saver.load_latest(fresh, folder / "older") == (True, [])
    from tests.described import low_bits

    assert not low_bits(fresh.training.w, set())
    for _ in range(6):
        assert fresh.make_step()["skipped"] is None
    ended(fresh)


def nothing_is_kept(folder: Path) -> None:
    """In fp32, and without LISA."""
    from tests.described import low_bits

    for sections in (
        {"lisa": {"lisa_layers": 1, "lisa_interval": 1}},
        {"parallel": {"bf16": True}},
    ):
        state = begun(folder, "reweight", **sections)
        for _ in range(3):
            state.make_step()
        state.training.leave_period()
        assert not low_bits(state.training.w, set()) and not low_bits(state.training.u, set())
        ended(state)


def on_ranks(folder_name: str) -> None:
    dist.init_process_group("gloo")
    folder = Path(folder_name)
    for name, (ranks, *_) in CASES.items():
        if ranks == dist.get_world_size():
            layers_go_on(folder, name)
    for name, other, step in CROSSINGS:
        if CASES[name][0] == dist.get_world_size():
            saved_and_loaded(folder, name, other, step)
    if dist.get_world_size() == 1:
        without_the_bits(folder)
        nothing_is_kept(folder)


@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_go_on_from_their_masters(tmp_path: Path, ranks: int) -> None:
    write_problem(tmp_path / "data")
    run_distributed(on_ranks, ranks, str(tmp_path))
    for name, other, step in CROSSINGS:
        if CASES[name][0] != ranks:
            continue
        checkpoint = tmp_path / f"{name} to {other} at {step}"
        saved, loaded = (
            [torch.load(checkpoint / f"{kind}-{rank}.pt") for rank in range(ranks)]
            for kind in ("saved", "loaded")
        )
        for side in ("w", "u"):
            want, got = merged(saved, side), merged(loaded, side)
            assert want.keys() == got.keys()
            for key, value in want.items():
                assert torch.equal(got[key], value), (name, other, step, side, key)
                if side == "w" or CASES[name][2] is None:  # u is about to be reset at a draw
                    assert not torch.equal(value.to(torch.bfloat16).float(), value), key
