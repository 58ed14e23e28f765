"""A period of a tiny model, with gradients given by hand, and AdamW written out."""

from __future__ import annotations

import math
from typing import Any

import torch

# All away from their defaults.
RATES = {
    "lr": 2e-3, "min_lr": 5e-4, "weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9,
    "adam_eps": 1e-3, "clip_grad": 0.7,
}  # fmt: skip
MODEL = {
    "num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24,
    "make_vocab_size_divisible_by": 16,
}  # fmt: skip
OVERLAP = {
    "use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
}  # fmt: skip
Weights = dict[str, torch.Tensor]


class Case:
    """A tiny model with layers 1 and 2 of three training, and its period."""

    def __init__(self, parallel: dict, with_u: bool = True, **model: Any) -> None:
        from megatron.core.process_groups_config import ProcessGroupCollection

        from megatron_scalebio import runtime
        from megatron_scalebio.config_loader import load_config
        from megatron_scalebio.core.lisa import set_trainable
        from megatron_scalebio.core.twin import build_twins, named_parameters
        from megatron_scalebio.model.provider import model_provider
        from megatron_scalebio.model.settings import transformer_config

        lisa = {"lisa_layers": 2, "lisa_interval": 4}
        self.config = load_config(
            None,
            {"model": MODEL | model, "parallel": parallel, "optimizer": RATES, "lisa": lisa},
        )
        runtime.start(self.config)
        self.megatron = transformer_config(self.config)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        provider = model_provider(self.config, self.megatron, 16)
        self.w, self.u = build_twins(provider, groups)
        generator = torch.Generator().manual_seed(1)
        for _, p in named_parameters(self.w):
            p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
        for chunks in (self.w, self.u):
            set_trainable(chunks, [1, 2], self.config.lisa.options())
        for chunks in (self.w, self.u):  # as Transformer Engine's modules have it
            chunks[0].fuse_wgrad_accumulation = False
        self.places = [p.data_ptr() for p in self.named("w").values()]
        self.begin(with_u)

    def begin(self, with_u: bool = True) -> None:
        from megatron_scalebio.core.period import Period
        from megatron_scalebio.model.settings import ddp_config, optimizer_config

        options = (ddp_config(self.config), optimizer_config(self.config))
        self.period = Period(*options, self.w, self.u if with_u else None)

    def named(self, which: str, trained: bool = True) -> dict[str, torch.nn.Parameter]:
        from megatron_scalebio.core.twin import named_parameters

        chunks = {"w": self.w, "u": self.u}[which]
        return {name: p for name, p in named_parameters(chunks) if p.requires_grad or not trained}

    def values(self, which: str) -> Weights:
        return {name: p.detach().clone() for name, p in self.named(which, trained=False).items()}

    def give(self, which: str, seed: int, scale: float = 1.0) -> Weights:
        """Adds gradients to a model's buffers, as a flush does."""
        generator = torch.Generator().manual_seed(seed)
        given = {}
        for name, p in self.named(which).items():
            given[name] = scale * torch.randn(p.shape, generator=generator)
            p.main_grad += given[name]
        return given

    def step(self, which: str, lr: float) -> float:
        from megatron_scalebio.core.period import prepare_gradients, step_with

        optimizer = self.period.optimizers[which]
        norm = prepare_gradients(optimizer)
        step_with(optimizer, lr)
        self.period.gather_parameters()
        return norm


class AdamW:
    """Loshchilov & Hutter 2019, algorithm 2, in double precision, with its gradients clipped.

    No decay of norms and biases (of one dimension).
    """

    def __init__(self, start: Weights) -> None:
        self.p = {name: value.double() for name, value in start.items()}
        self.m = {name: torch.zeros_like(value) for name, value in self.p.items()}
        self.v = {name: torch.zeros_like(value) for name, value in self.p.items()}
        self.t = 0

    def step(self, gradients: Weights, lr: float) -> float:
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        self.t += 1
        for name, g in gradients.items():
            g = g.double() * min(1.0, RATES["clip_grad"] / (norm + 1e-6))
            self.m[name] = 0.8 * self.m[name] + 0.2 * g
            self.v[name] = 0.9 * self.v[name] + 0.1 * g.square()
            if self.p[name].ndim > 1:
                self.p[name] -= lr * 0.3 * self.p[name]
            size = (self.v[name] / (1 - 0.9**self.t)).sqrt() + 1e-3
            self.p[name] -= lr * self.m[name] / (1 - 0.8**self.t) / size
        return norm


def close_to(case: Case, which: str, want: Weights) -> None:
    for name, p in case.named(which).items():
        rounded = want[name].to(p.dtype)
        # A bfloat16 on the other side of a rounding edge is one unit in the last place away.
        rtol, atol = (1e-2, 1e-5) if p.dtype == torch.bfloat16 else (1e-5, 1e-6)
        torch.testing.assert_close(p.data, rounded, rtol=rtol, atol=atol, msg=f"{which} {name}")
        if p.dtype == torch.bfloat16:
            assert float((p.data != rounded).float().mean()) < 0.02, name


def same(a: Weights, b: Weights) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


def masters_and_moments(case: Case, which: str) -> list[torch.Tensor]:
    tensors = []
    for part in case.period.optimizers[which].chained_optimizers:
        for group in part.optimizer.param_groups:
            for p in group["params"]:
                state = part.optimizer.state[p]
                assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
                tensors += [p.data, *(torch.as_tensor(value) for value in state.values())]
    return tensors
