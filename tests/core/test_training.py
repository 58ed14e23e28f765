"""What a training decides by itself; its steps on Megatron's models are in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_scalebio.core import training as module
from megatron_scalebio.core.lisa import active_layers
from megatron_scalebio.core.options import LisaOptions
from megatron_scalebio.core.right_losses import require_right_losses
from megatron_scalebio.core.training import Training


@pytest.mark.parametrize("virtual", [None, 2])
def test_an_interleaved_pipeline_takes_multiples_of_its_stages(
    monkeypatch: pytest.MonkeyPatch, virtual: int | None
) -> None:
    name = "get_virtual_pipeline_model_parallel_world_size"
    monkeypatch.setattr(module.parallel_state, name, lambda: virtual)
    bare: Any = SimpleNamespace(groups=SimpleNamespace(pp=SimpleNamespace(size=lambda: 4)))
    takes = [Training.flush_takes(bare, passes) for passes in (4, 8, 6, 3)]
    assert takes == ([True, True, False, False] if virtual else [True] * 4)


@pytest.mark.parametrize("virtual", [None, 2])
def test_layers_are_drawn_for_the_pipeline_at_hand(
    monkeypatch: pytest.MonkeyPatch, virtual: int | None
) -> None:
    name = "get_virtual_pipeline_model_parallel_world_size"
    monkeypatch.setattr(module.parallel_state, name, lambda: virtual)
    drawn = {}
    for period in range(4):
        bare: Any = SimpleNamespace(
            lisa=LisaOptions(3), _seed=7, models={}, model_config=SimpleNamespace(num_layers=24),
            groups=SimpleNamespace(pp=SimpleNamespace(size=lambda: 4)),
        )  # fmt: skip
        Training._freeze(bare, period)
        drawn[period] = bare.active_layers
    assert drawn == {n: active_layers(LisaOptions(3), 24, 4, virtual or 1, n, 7) for n in range(4)}


def test_weights_are_made_whole_before_they_are_saved() -> None:
    told: list[str] = []
    for goes_on, wanted in ((True, ["gather"]), (False, ["leave"])):
        bare: Any = SimpleNamespace(
            period=SimpleNamespace(gather_parameters=lambda: told.append("gather")),
            saves_period=goes_on, leave_period=lambda: told.append("leave"),
        )  # fmt: skip
        Training.make_savable(bare)
        assert told == wanted
        told.clear()


USUAL = {
    "calculate_per_token_loss": True, "fp16": False, "fp8_param": False, "mtp_num_layers": None,
    "num_moe_experts": None, "moe_router_load_balancing_type": "aux_loss",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"calculate_per_token_loss": False}, "calculate_per_token_loss is False"),
        ({"fp16": True}, "fp16 is True"),
        ({"fp8_param": True}, "fp8_param is True"),
        ({"mtp_num_layers": 1}, "mtp_num_layers"),
        (
            {"num_moe_experts": 4, "moe_router_load_balancing_type": "global_aux_loss"},
            "moe_router_load_balancing_type is 'global_aux_loss', which would count validation",
        ),
    ],
)
def test_a_model_whose_losses_megatron_would_scale_is_refused(changed: dict, words: str) -> None:
    ddp: Any = SimpleNamespace(check_for_nan_in_grad=False)
    for fine in ({}, {"num_moe_experts": 4}):
        require_right_losses(SimpleNamespace(**USUAL | fine), ddp)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        require_right_losses(SimpleNamespace(**USUAL | changed), ddp)  # type: ignore[arg-type]


def test_a_check_that_needs_megatron_lms_loop_is_refused() -> None:
    ddp: Any = SimpleNamespace(check_for_nan_in_grad=True)
    with pytest.raises(ValueError, match="check_for_nan_in_grad is True"):
        require_right_losses(SimpleNamespace(**USUAL), ddp)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("theirs", [True, False])
@pytest.mark.parametrize("ours", [True, False])
def test_rank_0_decides(
    monkeypatch: pytest.MonkeyPatch, rank: int, theirs: bool, ours: bool
) -> None:
    """Whether a step is applied, and to what: ranks may differ in a last bit."""
    learned, calls = torch.tensor([1.0, 2.0], dtype=torch.float64), []

    def learn() -> None:
        calls.append(1)
        learned.add_(0.5)

    of_rank_0 = torch.tensor([float(theirs), 1.25, 2.25], dtype=torch.float64)

    def of_first_rank(decision: torch.Tensor) -> torch.Tensor:
        assert decision[0] == ours
        return decision if rank == 0 else of_rank_0

    monkeypatch.setattr(module.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(module, "of_first_rank", of_first_rank)
    applied = Training._agreed(None, ours, [learned], learn)  # type: ignore[arg-type]
    assert applied == (ours if rank == 0 else theirs)
    assert len(calls) == applied
    want = [1.25, 2.25] if rank else [1.5, 2.5] if ours else [1.0, 2.0]
    assert learned.tolist() == want


@pytest.mark.parametrize(
    ("steps", "interval", "lisa", "memory"),
    [
        (0, 4, None, 1.0), (160, 4, None, 1.0),  # forty whole resets
        (162, 4, None, 1.15), (180, 4, None, 2.5),  # from then on for .3 of the steps
        (180, None, None, 1.0), (180, 4, LisaOptions(1), 1.0),
    ],
)  # fmt: skip
def test_memory_grows_after_forty_resets(
    steps: int, interval: int | None, lisa: LisaOptions | None, memory: float
) -> None:
    class Bare(Training):
        def __init__(self) -> None:
            self.steps, self._resync_interval, self.lisa = steps, interval, lisa
            self._memory_growth = 0.3

    assert Bare().memory == pytest.approx(memory)


@pytest.mark.parametrize(("memory", "part"), [(1.0, 1.0), (2.5, 0.4)])
def test_u_is_w_after_a_reset_that_goes_all_the_way(memory: float, part: float) -> None:
    bare: Any = SimpleNamespace(steps=60, lisa=None, period_number=0, memory=memory)
    bare.period, bare._resync_is_due = (
        SimpleNamespace(resync=lambda x: parts.append(x)),
        lambda: True,
    )
    parts: list[float] = []
    Training.enter_period(bare)
    assert parts == [part] and bare.u_is_w == (memory == 1.0)
