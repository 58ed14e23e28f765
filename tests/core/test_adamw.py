"""A period's optimizers are AdamW as configured, and nothing of the period outlives it."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.described import weights
from tests.distributed.harness import run_distributed
from tests.markov import VOCAB, write_source

pytestmark = pytest.mark.distributed
BETA1, BETA2, EPS, DECAY, CLIP = 0.8, 0.7, 0.02, 0.3, 0.5
STD = 0.2
RATES = {"w": 0.05, "u": 0.03}
# Norm of each gradient: the first is clipped, the second is not.
NORMS = (4.0, 0.4)
# With its layers: (bf16, distributed optimizer, LISA)
NUMERICS = [(False, False, False), (False, True, True), (True, False, True), (True, True, False)]


def begin(folder: Path, bf16: bool, sharded: bool, lisa: bool, seed: int = 77) -> Any:
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods.scalebio import TrainState

    entries = [{"name": name, "path": str(folder / name)} for name in ("a", "b", "validation")]
    settings = {
        "data": {"seq_length": 8, "sources": entries[:2], "validation": entries[2:]},
        "model": {
            "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "add_bias_linear": True,
            "init_method_std": STD,
        },
        "parallel": {"bf16": bf16, "use_distributed_optimizer": sharded},
        "lisa": {"lisa_layers": 1} if lisa else {},
        "optimizer": {
            "adam_beta1": BETA1, "adam_beta2": BETA2, "adam_eps": EPS, "weight_decay": DECAY,
            "clip_grad": CLIP,
        },
        "train": {"micro_batch_size": 2, "global_batch_size": 2, "seed": seed},
    }  # fmt: skip
    config = load_config(None, settings)
    runtime.start(config)
    return TrainState(config, folder / "cache")


def parameters(chunks: Any) -> dict[str, torch.nn.Parameter]:
    from megatron_scalebio.core.twin import named_parameters

    return {name: p for name, p in named_parameters(chunks) if p.requires_grad}


def gradients(chunks: Any, seed: int, norm: float) -> dict[str, torch.Tensor]:
    """Random ones of a given norm over all of a model's parameters."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(p.shape, generator=generator) for n, p in parameters(chunks).items()}
    whole = math.sqrt(sum(float(g.square().sum()) for g in drawn.values()))
    return {name: gradient * (norm / whole) for name, gradient in drawn.items()}


class AdamW:
    """AdamW (Loshchilov & Hutter 2019), in float64; biases and norms do not decay.

    m ← β1 m + (1 − β1) g,   v ← β2 v + (1 − β2) g²
    θ ← θ − lr · (m / (1 − β1ᵗ) / (√(v / (1 − β2ᵗ)) + ε) + λ θ),   g of norm at most `CLIP`
    """

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = {name: value.double() for name, value in values.items()}
        self.m, self.v, self.t = dict.fromkeys(values, 0.0), dict.fromkeys(values, 0.0), 0

    def step(self, gradients: dict[str, torch.Tensor], norm: float, lr: float) -> None:
        self.t += 1
        for name, gradient in gradients.items():
            g = gradient.double() * min(1.0, CLIP / norm)
            self.m[name] = BETA1 * self.m[name] + (1 - BETA1) * g
            self.v[name] = BETA2 * self.v[name] + (1 - BETA2) * g.square()
            size = (self.v[name] / (1 - BETA2**self.t)).sqrt() + EPS
            decay = DECAY * self.values[name] if gradient.ndim > 1 else 0.0
            move = self.m[name] / (1 - BETA1**self.t) / size + decay
            self.values[name] = self.values[name] - lr * move


def steps_are_adams(state: Any, bf16: bool) -> None:
    from megatron_scalebio.core.period import prepare_gradients, step_with

    period = state.training.enter_period()
    # Under bf16 from the fp32 masters, of which the weights are the nearest.
    adams = {
        side: AdamW({
            name: getattr(p, "main_param", p).detach().float().view_as(p).clone()
            for name, p in parameters(chunks).items()
        })
        for side, chunks in state.training.models.items()
    }  # fmt: skip
    for number, norm in enumerate(NORMS):
        period.zero_grad()
        for side, chunks in state.training.models.items():
            drawn = gradients(chunks, 10 * number + ord(side), norm)
            for name, parameter in parameters(chunks).items():
                assert parameter.main_grad.dtype == torch.float32
                assert not parameter.main_grad.any(), "zeroed"
                parameter.main_grad.copy_(drawn[name])
            optimizer = period.optimizers[side]
            assert prepare_gradients(optimizer) == pytest.approx(norm, rel=1e-5)
            rate = RATES[side] / (1 + number)
            step_with(optimizer, rate)
            adams[side].step(drawn, norm, rate)
    for side, adam in adams.items():
        got = weights(state.training.models[side])
        for name, want in adam.values.items():
            # fp32 sums against float64; bf16 weights are rounded from masters as good.
            bounds = {"rtol": 2**-8, "atol": 1e-6} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(
                got[name].double(), want, **bounds, msg=lambda m, at=(side, name): f"{at}: {m}"
            )


def gradients_of_u_are_added(state: Any) -> None:
    period = state.training.enter_period()
    drawn = {
        side: gradients(chunks, ord(side), 2.0) for side, chunks in state.training.models.items()
    }
    for side, chunks in state.training.models.items():
        for name, parameter in parameters(chunks).items():
            parameter.main_grad.copy_(drawn[side][name])
    period.add_gradients_of_u(0.3)
    for name, parameter in parameters(state.training.u).items():
        assert torch.equal(parameter.main_grad, drawn["u"][name])
    for name, parameter in parameters(state.training.w).items():
        want = drawn["w"][name] + 0.3 * drawn["u"][name]
        torch.testing.assert_close(parameter.main_grad, want)


def nothing_is_left(state: Any) -> None:
    """Weights stay, each in storage of its own; buffers, gradients and optimizers are gone."""
    period, seen = state.training.period, []
    before = {side: weights(chunks) for side, chunks in state.training.models.items()}
    for ddp in (*period.ddp["w"], *period.ddp["u"]):
        seen += [weakref.ref(buffer.grad_data) for buffer in ddp.buffers]
    seen += [weakref.ref(optimizer) for optimizer in period.optimizers.values()]
    for optimizer in period.optimizers.values():
        for group in optimizer.param_groups:
            # In fp32 some optimizers step the parameters themselves.
            seen += [weakref.ref(p) for p in group["params"] if type(p) is torch.Tensor]
    del period, ddp, optimizer, group
    state.training.leave_period()
    assert state.training.period is None
    assert not any(ref() is not None for ref in seen)
    for side, chunks in state.training.models.items():
        assert all(torch.equal(v, before[side][name]) for name, v in weights(chunks).items())
        for parameter in parameters(chunks).values():
            assert parameter.grad is None and not hasattr(parameter, "main_grad")
            assert parameter.untyped_storage().nbytes() == parameter.nbytes


def no_hook_is_left(state: Any) -> None:
    """At once, not when the garbage is collected: the next period has hooks of its own."""
    period = state.training.enter_period()
    gc.disable()
    period.close()
    for chunks in state.training.models.values():
        for name, parameter in parameters(chunks).items():
            parameter.sum().backward()
            assert parameter.grad is not None, f"{name}: a closed period took its gradient"
            parameter.grad = None
    gc.enable()
    state.training.period = None


def starts_from_chance(state: Any, again: Any, other: Any) -> None:
    """N(0, std²), √(2 · layers) smaller where it adds to the residual stream; norms 1, biases 0."""
    drawn, same, others = (weights(each.training.w) for each in (state, again, other))
    for name, value in drawn.items():
        assert torch.equal(same[name], value), "a seed means the same weights"
        if value.ndim == 1:
            assert value.eq(1.0 if "norm" in name and name.endswith("weight") else 0.0).all(), name
            continue
        assert not torch.equal(others[name], value), "another seed means others"
        std = STD / 2 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else STD
        assert float(value.std()) == pytest.approx(std, rel=0.15), name
        assert abs(float(value.mean())) < 0.1 * std, name
    of_layers = [
        [v for n, v in drawn.items() if f"layers.{i}." in n and v.ndim > 1] for i in (0, 1)
    ]
    assert len(of_layers[0]) == 4
    assert not any(torch.equal(a, b) for a, b in zip(*of_layers, strict=True))


def overlaps_as_asked(state: Any) -> None:
    """w alone, as `train` overlaps its communication."""
    from megatron_scalebio.core.period import Period
    from megatron_scalebio.model.settings import ddp_config, optimizer_config

    config = replace(
        state.config,
        parallel=replace(
            state.config.parallel, overlap_grad_reduce=True, overlap_param_gather=True
        ),
    )
    period = Period(ddp_config(config), optimizer_config(config), state.training.w)
    [ddp], [part] = period.ddp["w"], period.optimizers["w"].chained_optimizers
    told = ddp.ddp_config
    assert told.grad_reduce_in_fp32 and told.overlap_grad_reduce and told.overlap_param_gather
    assert told.use_distributed_optimizer and part.config.use_distributed_optimizer
    assert part.config.overlap_param_gather and part.config.params_dtype == torch.bfloat16
    assert set(period.optimizers) == {"w"} and period.twins[0].u is period.twins[0].w
    buffer = weakref.ref(ddp.buffers[0].grad_data)
    del ddp, part
    period.close()
    gc.collect()
    assert buffer() is None


def on_rank(folder_name: str) -> None:
    runs = [begin(Path(folder_name), False, False, False, seed) for seed in (77, 77, 5)]
    starts_from_chance(*runs)
    for bf16, sharded, lisa in NUMERICS:
        state = begin(Path(folder_name), bf16, sharded, lisa)
        steps_are_adams(state, bf16)
        gradients_of_u_are_added(state)
        nothing_is_left(state)
        no_hook_is_left(state)
    overlaps_as_asked(state)


def test_optimizers_are_adamw_and_end_with_their_period(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "validation")):
        rows = np.random.default_rng(number).integers(VOCAB, size=(20, 9))
        write_source(tmp_path, name, list(rows))
    run_distributed(on_rank, 1, str(tmp_path))
