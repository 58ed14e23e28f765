"""Everything that a run holds, as one flat table: path of the attribute → value.

Found by looking through the objects themselves, not through what they save: a field that is added
to a state is compared without being named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

Table = dict[str, Any]
# Made from the configuration and never changed; or, below, described in another way.
FIXED = {
    "config", "megatron", "schedule", "sources", "validation", "test", "layout", "tokenizer",
    "pool", "irreducible_N", "lisa", "options", "_ddp", "_optimizer", "_pg_collection", "groups",
    "reference", "_losses", "_set_trainable", "observe", "clock", "_resync_interval", "_seed",
}  # fmt: skip
APART = {"w", "u", "models", "period", "period_number", "active_layers", "u_is_w"}


def described(state: Any) -> Table:
    """All of it but the models and their optimizers."""
    return dict(_leaves(state, "", FIXED | APART))


def _leaves(value: Any, path: str, left_out: set[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.optim.Optimizer):
        value = value.state_dict()["state"]  # its rates are set anew in every step
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(each, f"{path}.{key}", left_out)
    elif isinstance(value, torch.Tensor):
        yield path, value.detach().clone()
    elif isinstance(value, np.ndarray | list | tuple):
        yield path, torch.tensor(np.array(value))
    elif isinstance(value, int | float | str | None):
        yield path, value
    else:
        assert type(value).__module__.startswith("megatron_scalebio."), (path, value)
        for name, each in vars(value).items():
            if name not in left_out:
                yield from _leaves(each, f"{path}.{name}", left_out)


def weights(chunks: Any) -> Table:
    from megatron_scalebio.core.twin import named_parameters

    return {name: parameter.detach().clone() for name, parameter in named_parameters(chunks)}


def shared_names(w: Any, u: Any) -> set[str]:
    """Names of the parameters in which u shares w's storage."""
    from megatron_scalebio.core.twin import named_parameters

    pairs = zip(named_parameters(w), named_parameters(u), strict=True)
    return {name for (name, p_w), (_, p_u) in pairs if p_w.data_ptr() == p_u.data_ptr()}


def low_bits(chunks: Any, but: set[str]) -> Table:
    """What bf16 weights at rest keep of their masters, but of some parameters."""
    from megatron_scalebio.core.low_bits import kept
    from megatron_scalebio.core.twin import named_parameters

    held = {name: kept(p) for name, p in named_parameters(chunks) if name not in but}
    return {name: each.bits for name, each in held.items() if each is not None}


def training_state(period: Any, side: str) -> Table:
    """What one model's optimizer keeps: the weights it steps (fp32 masters), moments, steps.

    (Megatron's distributed optimizer leaves a step with groups, too, which torch's Adam ignores.)
    """
    table: Table = {}
    for part in period.optimizers[side].chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for g, group in enumerate(part.optimizer.param_groups):
            for n, parameter in enumerate(group["params"]):
                table[f"group {g} {n} stepped"] = parameter.detach()
                for key, value in part.optimizer.state.get(parameter, {}).items():
                    table[f"group {g} {n} {key}"] = value
    return table


def models(state: Any) -> Table:
    """Weights of all models, which of u's are w's own storage, and the period's training state."""
    from megatron_scalebio.core.twin import named_parameters

    table = {
        f"{side}.{k}": v for side, c in state.training.models.items() for k, v in weights(c).items()
    }
    if "u" in state.training.models:
        pairs = zip(
            named_parameters(state.training.w), named_parameters(state.training.u), strict=True
        )
        table |= {f"own.{n}": p.data_ptr() != q.data_ptr() for (n, p), (_, q) in pairs}
        shared = shared_names(state.training.w, state.training.u)  # it goes on from w's
        bits = low_bits(state.training.u, shared)
        table |= {f"u low bits.{name}": value for name, value in bits.items()}
    bits = low_bits(state.training.w, set())
    table |= {f"w low bits.{name}": value for name, value in bits.items()}
    if going_on(state):
        table |= {
            "period_number": state.training.period_number,
            "active": str(state.training.active_layers),
        }
        for side, chunks in state.training.models.items():
            trains = {n: p.requires_grad for n, p in named_parameters(chunks)}
            table |= {f"{side} trains.{name}": value for name, value in trains.items()}
            held = training_state(state.training.period, side)
            table |= {f"{side} optimizer.{k}": copied(v) for k, v in held.items()}
    return table


def going_on(state: Any) -> bool:
    """Whether the period that a state is in is that of its next step, too."""
    training = state.training
    return training.period is not None and training.saves_period


def generators() -> Table:
    """States of torch's and Megatron's random generators, as dropout draws from them."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracked = {f"tracked {k}": copied(v) for k, v in get_cuda_rng_tracker().get_states().items()}
    return {"torch": torch.get_rng_state(), **tracked}


def copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
    return type(a) is type(b) and a == b


def differing(a: Table, b: Table) -> list[str]:
    """The paths at which two tables are not the same."""
    return sorted(
        path for path in a.keys() | b.keys()
        if path not in a or path not in b or not same(a[path], b[path])
    )  # fmt: skip
