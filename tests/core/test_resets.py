"""u is made equal to w at the steps that ask for it: weights, fp32 masters, Adam's state, no more.

On one rank; the state of both models is compared whole, right before a reset and right after it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.described import Table, copied, differing, training_state, weights
from tests.distributed.harness import run_distributed
from tests.markov import VOCAB, write_source

pytestmark = pytest.mark.distributed
RESYNC, DRAW = 3, 4  # steps between resets of u, and between LISA's draws
NUMERICS = [(bf16, sharded) for bf16 in (False, True) for sharded in (False, True)]


def begin(folder: Path, numerics: tuple[bool, bool], resync: int | None, lisa: bool) -> Any:
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods.scalebio import TrainState

    entries = [{"name": name, "path": str(folder / name)} for name in ("a", "b", "validation")]
    settings = {
        "data": {"seq_length": 8, "sources": entries[:2], "validation": entries[2:]},
        "model": {"num_layers": 3, "hidden_size": 16, "num_attention_heads": 2},
        "parallel": {"bf16": numerics[0], "use_distributed_optimizer": numerics[1]},
        "lisa": {"lisa_layers": 1, "lisa_interval": DRAW} if lisa else {},
        "bilevel": {"resync_interval": resync},
        "optimizer": {"lr": 3e-3},
        "train": {"micro_batch_size": 2, "global_batch_size": 2},
    }
    config = load_config(None, settings)
    runtime.start(config)
    return TrainState(config, folder / "cache")


def side(state: Any, name: str) -> Table:
    """Copies of what a model and its optimizer hold."""
    held = training_state(state.training.period, name)
    return {**weights(state.training.models[name]), **{key: copied(held[key]) for key in held}}


def of_weights(table: Table) -> Table:
    return {key: value for key, value in table.items() if not key.startswith("group")}


def storages(state: Any, name: str) -> set[int]:
    chunks, held = state.training.models[name], training_state(state.training.period, name).values()
    tensors = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    tensors += [value for value in held if isinstance(value, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def go_to(state: Any, step: int) -> list[int]:
    """Steps until then; those that began with u = w."""
    from megatron_scalebio.methods.scalebio import train_step

    equal = []
    while state.step < step:
        this = state.step
        assert train_step(state).skipped is None
        equal += [this] if state.training.u_is_w else []
    return equal


def on_rank(folder_name: str) -> None:
    folder = Path(folder_name)
    for numerics in NUMERICS:
        a_reset_copies_all(folder, numerics)
        a_reset_goes_a_part_of_the_way(folder, numerics)
        a_draw_resets(folder, numerics)
        a_draw_leaves_u_alone(folder, numerics)
    without_resets_u_goes_its_own_way(folder)


def a_reset_copies_all(folder: Path, numerics: tuple[bool, bool]) -> None:
    state = begin(folder, numerics, RESYNC, lisa=False)
    assert go_to(state, RESYNC) == [0]
    for key, value in training_state(state.training.period, "u").items():
        if key.endswith("step"):
            value += 4  # else both have made as many
    w, u = side(state, "w"), side(state, "u")
    assert {key.split()[-1] for key in w if key.startswith("group")} == {
        "stepped", "exp_avg", "exp_avg_sq", "step",
    }  # fmt: skip
    assert len(differing(w, u)) >= 0.9 * len(w), "a reset has something to do"
    state.training.enter_period()
    assert state.training.u_is_w
    assert not differing(side(state, "w"), w), "w stays as it was"
    assert not differing(side(state, "u"), w)
    assert not storages(state, "w") & storages(state, "u")
    assert go_to(state, RESYNC + 1) == [RESYNC]
    w, u = side(state, "w"), side(state, "u")
    assert differing(of_weights(w), of_weights(u))
    state.training.enter_period()
    assert not state.training.u_is_w
    assert not differing(side(state, "u"), u), "no reset is due"
    assert go_to(state, 3 * RESYNC + 1) == [2 * RESYNC, 3 * RESYNC]
    state.training.leave_period()


def a_reset_goes_a_part_of_the_way(folder: Path, numerics: tuple[bool, bool]) -> None:
    state = begin(folder, numerics, RESYNC, lisa=False)
    go_to(state, RESYNC)
    w, u = (of_weights(side(state, name)) for name in ("w", "u"))
    scales = {name: torch.tensor([value]) for name, value in (("w", 5.0), ("u", 1.0))}
    for name, scale in scales.items():  # of delayed scaling
        meta = SimpleNamespace(scale=scale, amax_history=scale.clone())
        state.training.models[name][0].fp8_meta = {"scaling_fwd": meta}
    state.training.period.resync(0.25)
    assert (float(scales["w"]), float(scales["u"])) == (5.0, 2.0)
    assert not differing(of_weights(side(state, "w")), w), "w stays as it was"
    after = of_weights(side(state, "u"))
    whole = {key: value for key, value in u.items() if value.dtype != torch.bfloat16}
    assert len(differing({key: after[key] for key in whole}, whole)) >= 0.9 * len(whole)
    for key, value in after.items():
        wanted = u[key].double() + 0.25 * (w[key].double() - u[key].double())
        # In the format's own precision: weights under bf16 are rounded.
        close = 2**-8 if value.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(value.double(), wanted, rtol=close, atol=1e-9)
    state.training.leave_period()


def a_draw_resets(folder: Path, numerics: tuple[bool, bool]) -> None:
    """Under LISA every new draw does, and nothing between them."""
    state = begin(folder, numerics, RESYNC, lisa=True)
    assert go_to(state, DRAW) == [0]
    w, layers, left = (
        of_weights(side(state, "w")),
        state.training.active_layers,
        state.training.period,
    )
    assert differing(w, of_weights(side(state, "u")))
    state.training.enter_period()
    assert state.training.u_is_w and state.training.active_layers != layers
    assert not hasattr(left, "optimizers"), "the period before was closed"
    assert not differing(of_weights(side(state, "w")), w), "w stays as it was"
    assert not differing(side(state, "w"), side(state, "u"))
    assert not storages(state, "w") & storages(state, "u")
    frozen = [
        (p, q)
        for of_w, of_u in zip(state.training.w, state.training.u, strict=True)
        for p, q in zip(of_w.parameters(), of_u.parameters(), strict=True)
        if not p.requires_grad
    ]
    assert frozen and all(p.data_ptr() == q.data_ptr() for p, q in frozen)
    assert go_to(state, 2 * DRAW + 1) == [2 * DRAW], "the one before is the one above"
    state.training.leave_period()


def a_draw_leaves_u_alone(folder: Path, numerics: tuple[bool, bool]) -> None:
    """Without resets a draw ends the Adam state of both, and changes no weight of either."""
    state = begin(folder, numerics, None, lisa=True)
    assert go_to(state, DRAW) == []
    w, u = side(state, "w"), side(state, "u")
    assert differing(of_weights(w), of_weights(u))
    state.training.enter_period()
    assert not state.training.u_is_w
    for name, before in (("w", w), ("u", u)):
        after = side(state, name)
        assert not differing(of_weights(after), of_weights(before)), name
        moments = [value for key, value in after.items() if "exp_avg" in key]
        assert not any(value.any() for value in moments), "of other layers than before"
    assert go_to(state, DRAW + 1) == []
    state.training.leave_period()


def without_resets_u_goes_its_own_way(folder: Path) -> None:
    state = begin(folder, (False, False), None, lisa=False)
    assert go_to(state, 12) == []
    w, u = side(state, "w"), side(state, "u")
    state.training.enter_period()
    assert not differing(side(state, "w"), w) and not differing(side(state, "u"), u)
    assert differing(of_weights(w), of_weights(u))
    state.training.leave_period()


def test_u_is_made_equal_to_w_whole_and_when_it_is_due(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "validation")):
        rows = np.random.default_rng(number).integers(VOCAB, size=(20, 9))
        write_source(tmp_path, name, list(rows))
    run_distributed(on_rank, 1, str(tmp_path))


def test_the_steps_of_fused_adam_are_copied_with_its_groups() -> None:
    """Transformer Engine's and Apex's count them there, once for all parameters of a group."""
    from megatron_scalebio.core.period import _move_adam

    def fused(value: float, step: int) -> torch.optim.Optimizer:
        parameters = [torch.nn.Parameter(torch.full((2,), value)) for _ in range(2)]
        adam = torch.optim.AdamW([{"params": [p]} for p in parameters])
        for number, (group, p) in enumerate(zip(adam.param_groups, parameters, strict=True)):
            group["step"] = step + number
            adam.state[p] = {"exp_avg": 2 * p.data, "exp_avg_sq": 3 * p.data, "at": step}
        return adam

    source, target = fused(7.0, 5), fused(1.0, 1)
    held = [target.state[group["params"][0]]["exp_avg"] for group in target.param_groups]
    _move_adam(source, target)
    assert [group["step"] for group in target.param_groups] == [5, 6]
    for number, group in enumerate(target.param_groups):
        [parameter] = group["params"]
        state = target.state[parameter]
        values = (parameter, state["exp_avg"], state["exp_avg_sq"])
        assert [value.tolist() for value in values] == [[7.0] * 2, [14.0] * 2, [21.0] * 2]
        assert state["at"] == 5
        assert state["exp_avg"] is held[number], "in place: nothing is allocated"
    # What the target has not allocated yet is made its own.
    target = fused(1.0, 1)
    target.state.clear()
    _move_adam(source, target)
    [p], [q] = (adam.param_groups[1]["params"] for adam in (source, target))
    assert torch.equal(target.state[q]["exp_avg"], source.state[p]["exp_avg"])
    assert target.state[q]["exp_avg"].data_ptr() != source.state[p]["exp_avg"].data_ptr()
