"""Whole tensors from the shards of all ranks."""

from __future__ import annotations

import torch


@torch.no_grad()
def global_tensors(chunks, of) -> dict[str, torch.Tensor]:
    """This rank's shards in tensors of global shape, zero elsewhere, by Megatron name.

    Layers are stacked on a leading axis. `of(parameter)` gives what to collect, None to skip.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model

    result: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        gpt = unwrap_model(chunk)
        kept = {p: p.data for p in gpt.parameters()}
        for p in kept:
            value = of(p)
            p.data = torch.full_like(p.data, float("nan")) if value is None else value
        sharded = gpt.sharded_state_dict()
        apply_factories(sharded)
        for entry in nested_values(sharded):
            if isinstance(entry, ShardedTensor) and not entry.data.isnan().all():
                whole = result.setdefault(entry.key, torch.zeros(entry.global_shape))
                where = tuple(
                    slice(o, o + n)
                    for o, n in zip(
                        entry.global_offset,
                        (1,) * entry.prepend_axis_num + tuple(entry.data.shape),
                        strict=True,
                    )
                )
                whole[where] = entry.data.view(whole[where].shape)
        for p, data in kept.items():
            p.data = data
    return result


def merged(parts: list[dict], field: str) -> dict[str, torch.Tensor]:
    """Global tensors from the ranks' shards; what several ranks hold must agree."""
    whole: dict[str, torch.Tensor] = {}
    for part in parts:
        for key, value in part[field].items():
            if key not in whole:
                whole[key] = value.clone()
                continue
            both = (whole[key] != 0) & (value != 0)
            torch.testing.assert_close(whole[key][both], value[both], rtol=1e-5, atol=1e-7)
            whole[key] = torch.where(whole[key] != 0, whole[key], value)
    return whole


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-12))
