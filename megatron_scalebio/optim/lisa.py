"""LISA's draw of active layers (Pan et al. 2024, arXiv 2403.17919), level over pipeline chunks.

The layers of a period are a function of (seed, period) alone: every rank knows the whole draw
without communication, and w and u train the same layers. Each pipeline chunk gets its equal share,
so memory and time stay level over the stages; which chunks get the remainder rotates.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from megatron.core.utils import unwrap_model

from megatron_scalebio.config import LisaConfig


def active_layers(
    config: LisaConfig, num_layers: int, stages: int, virtual: int, period: int, seed: int
) -> list[int] | None:
    """Global indices (from 0) of the layers that train in a period, ascending; None: all.

    Args:
        stages: pipeline stages.
        virtual: virtual chunks per stage; block v · stages + s of the layers is on stage s.
    """
    if config.lisa_layers is None:
        return None
    chunks = stages * virtual
    even, rest = divmod(config.lisa_layers, chunks)
    # Chunks take turns with the remainder over successive periods, so that all layers are drawn
    # equally often. The order cycles through the stages: any stretch of it is level over them.
    turn_length = chunks // rest if rest and chunks % rest == 0 else 1
    turn, place = divmod(period, turn_length)
    draw_turn = np.random.default_rng((seed, 1, turn))
    stage_order, virtual_order = draw_turn.permutation(stages), draw_turn.permutation(virtual)
    order = [int(v) * stages + int(s) for v in virtual_order for s in stage_order]
    lucky = set(order[place * rest : (place + 1) * rest])
    per_chunk = num_layers // chunks
    layers: list[int] = []
    for chunk in range(chunks):
        draw = np.random.default_rng((seed, 2, period, chunk)).permutation(per_chunk)
        chosen = np.sort(draw[: even + (chunk in lucky)])
        layers += (chunk * per_chunk + chosen).tolist()
    return layers


def set_trainable(
    chunks: Iterable[torch.nn.Module], layers: list[int] | None, config: LisaConfig
) -> None:
    """Sets requires_grad of every parameter of this rank's chunks for one period."""
    active = None if layers is None else set(layers)
    for chunk in chunks:
        gpt = unwrap_model(chunk)
        gpt.requires_grad_(False)
        for layer in gpt.decoder.layers:
            layer.requires_grad_(active is None or layer.layer_number - 1 in active)
        if gpt.pre_process:
            gpt.embedding.requires_grad_(active is None or config.lisa_train_embedding)
        if gpt.post_process:
            gpt.output_layer.requires_grad_(active is None or config.lisa_train_embedding)
            gpt.decoder.final_layernorm.requires_grad_(active is None or config.lisa_train_norm)


def period_of(step: int, config: LisaConfig) -> int:
    """The LISA period of a step, both from 0; without LISA all steps are one period."""
    return 0 if config.lisa_layers is None else step // config.lisa_interval
