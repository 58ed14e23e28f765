"""What Megatron is asked for when a period is built, and the copy of Adam's state."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.core.period_case import MODEL, OVERLAP, RATES


def loaded(parallel: dict) -> Any:
    from megatron_scalebio.config_loader import load_config

    return load_config(None, {"model": MODEL, "parallel": parallel, "optimizer": RATES})


def test_all_of_adam_is_copied_and_nothing_is_shared() -> None:
    """`step` is in the group in Transformer Engine's Adam, in the state in torch's."""
    from megatron_scalebio.core.period import _move_adam

    def adam(value: float, step: int, held: bool) -> Any:
        first, second, third = (torch.full((2,), value + n) for n in range(3))
        state = {first: {"exp_avg": torch.full((2,), value), "step": step, "scale": [value]}}
        if held:
            state[second] = {"exp_avg": torch.full((2,), 2 * value)}
        groups: list[dict] = [{"params": [first, second]}, {"params": [third]}]
        if held:  # one that has not stepped has none yet
            groups[0]["step"] = step
        return SimpleNamespace(param_groups=groups, state=defaultdict(dict, state))

    source, target = adam(1.0, 5, held=True), adam(7.0, 9, held=False)
    kept = target.state[target.param_groups[0]["params"][0]]["exp_avg"]
    _move_adam(source, target)
    assert [group.get("step") for group in target.param_groups] == [5, None]
    for of_source, of_target in zip(source.param_groups, target.param_groups, strict=True):
        for p_s, p_t in zip(of_source["params"], of_target["params"], strict=True):
            assert p_s.equal(p_t) and p_s.data_ptr() != p_t.data_ptr()
            held_s, held_t = source.state.get(p_s, {}), target.state.get(p_t, {})
            assert set(held_s) == set(held_t)
            for key, value in held_s.items():
                if isinstance(value, torch.Tensor):
                    assert value.equal(held_t[key])
                    assert value.data_ptr() != held_t[key].data_ptr()
                else:
                    assert value == held_t[key]
                    assert not isinstance(value, list) or value is not held_t[key]
    assert [group.get("step") for group in source.param_groups] == [5, None]
    assert target.state[target.param_groups[0]["params"][0]]["exp_avg"] is kept, "in its place"
    assert float(source.param_groups[0]["params"][0][0]) == 1.0


FP8 = {"fp8_format": "hybrid", "fp8_recipe": "delayed"}


@pytest.mark.parametrize("parallel", [{}, {"bf16": True}, {**OVERLAP, "bf16": True, **FP8}])
def test_megatron_is_told_the_configured_optimizer(parallel: dict) -> None:
    from megatron_scalebio.model.settings import optimizer_config

    settings = optimizer_config(loaded(parallel))
    assert settings.optimizer == "adam"
    for name, value in RATES.items():
        assert getattr(settings, name) == value, name
    bf16 = parallel.get("bf16", False)
    assert settings.bf16 == bf16
    assert settings.params_dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert settings.use_distributed_optimizer == ("overlap_param_gather" in parallel)
    assert settings.overlap_param_gather == ("overlap_param_gather" in parallel)
    assert settings.fp8_recipe == ("delayed" if "fp8_format" in parallel else None)


@pytest.mark.parametrize("asked", [None, "use_distributed_optimizer", "overlap_grad_reduce"])
def test_megatron_is_told_the_configured_reduction(asked: str | None) -> None:
    from megatron_scalebio.model.settings import ddp_config

    switches = {
        "use_distributed_optimizer": False, "overlap_grad_reduce": False,
        "overlap_param_gather": False,
    }  # fmt: skip
    if asked == "use_distributed_optimizer":  # which the others need
        switches.update(OVERLAP, overlap_grad_reduce=True)
        parallel = {**switches, **FP8, "bf16": True}
    elif asked:
        parallel = {asked: True}
        switches[asked] = True
    else:
        parallel = {}
    settings = ddp_config(loaded(parallel))
    assert settings.grad_reduce_in_fp32 is True
    for name, value in switches.items():
        assert getattr(settings, name) is value, name


def test_megatron_is_given_what_the_period_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_scalebio.core import period

    wrapped: list[tuple] = []
    optimized: list[tuple] = []

    def wrap(*args: Any, **options: Any) -> Any:
        wrapped.append((args, options))
        return SimpleNamespace(chunk=args[2])

    def optimize(*args: Any, **options: Any) -> str:
        optimized.append((args, options))
        return f"optimizer {len(optimized)}"

    monkeypatch.setattr(period, "DistributedDataParallel", wrap)
    monkeypatch.setattr(period, "get_megatron_optimizer", optimize)
    monkeypatch.setattr(period, "TwinModel", lambda *args: args)
    monkeypatch.setattr(period, "unshare_storage", lambda w, u: None)
    monkeypatch.setattr(period, "unwrap_model", lambda chunk: chunk)
    monkeypatch.setattr(period, "take_configured_adam", lambda optimizer: None)
    monkeypatch.setattr(period, "masters", lambda model, optimizer: ())
    monkeypatch.setattr(
        period.low_bits, "sharing_group", lambda ddp, groups: lambda parameter: None
    )
    of_megatron = SimpleNamespace(use_mpu_process_groups=lambda: "those of parallel_state")
    monkeypatch.setattr(period, "ProcessGroupCollection", of_megatron)
    w, u = (
        [SimpleNamespace(config=f"{name}{n}", modules=list) for n in range(2)]
        for name in ("w", "u")
    )
    for groups in (None, "groups"):
        made: Any = period.Period("ddp", "adam", w, u, "losses", groups)  # type: ignore[arg-type]
        assert wrapped == [
            ((chunk.config, "ddp", chunk), {"disable_bucketing": n > 0, "pg_collection": groups})
            for chunks in (w, u) for n, chunk in enumerate(chunks)
        ]  # fmt: skip
        options = {"pg_collection": groups, "use_gloo_process_groups": groups is None}
        assert optimized == [(("adam", made.ddp[name]), options) for name in ("w", "u")]
        assert made.optimizers == {"w": "optimizer 1", "u": "optimizer 2"}
        pairs = zip(made.ddp["w"], made.ddp["u"], strict=True)
        assert made.twins == [(of_w, of_u, "losses") for of_w, of_u in pairs]
        wrapped.clear()
        optimized.clear()
