"""LISA's draw of active layers (Pan et al. 2024, arXiv 2403.17919), level over pipeline chunks.

The layers of a period are a function of (seed, period) alone: every rank knows the whole draw
without communication, and w and u train the same layers. Each pipeline chunk gets its equal share,
so memory and time stay level over the stages; the chunks take turns with the remainder.

Layers are dealt like cards, without replacement: a chunk's shuffled layers go round, and each
period takes the next ones. So after any number of periods any two layers of the model have been
drawn equally often, or one of them once more. A chunk is shuffled anew whenever a period starts
with a round, which is known without replaying the periods before.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from megatron.core.utils import unwrap_model

from megatron_scalebio.core.experts import routers
from megatron_scalebio.core.options import LisaOptions


def active_layers(
    options: LisaOptions | None, num_layers: int, stages: int, virtual: int, period: int, seed: int
) -> list[int] | None:
    """Global indices (from 0) of the layers that train in a period, ascending; None: all.

    Args:
        stages: pipeline stages.
        virtual: virtual chunks per stage; block v · stages + s of the layers is on stage s.
    """
    if options is None:
        return None
    chunks = stages * virtual
    per_chunk = num_layers // chunks
    even, rest = divmod(options.layers, chunks)
    # A turn is as many periods as give every chunk the remainder equally often.
    turn_periods = chunks // math.gcd(chunks, rest)
    turn_layers = options.layers * turn_periods // chunks  # of each chunk
    turn, place = divmod(period, turn_periods)
    order = _remainder_order(stages, virtual, np.random.default_rng((seed, 1, turn)))
    # Whole rounds over a chunk's layers end together with every so many turns.
    shuffle_turns = per_chunk // math.gcd(per_chunk, turn_layers)
    shuffle, turn_in_shuffle = divmod(turn, shuffle_turns)
    layers: list[int] = []
    for chunk in range(chunks):
        # Period q of a turn gives the remainder to places rest · q … rest · (q + 1) − 1 of `order`,
        # which goes round.
        position = order.index(chunk)
        before = _visits(position, rest * place, chunks)
        count = even + _visits(position, rest * (place + 1), chunks) - before
        first = turn_in_shuffle * turn_layers + place * even + before
        cards = np.random.default_rng((seed, 2, shuffle, chunk)).permutation(per_chunk)
        chosen = cards[(first + np.arange(count)) % per_chunk]
        layers += (chunk * per_chunk + np.sort(chosen)).tolist()
    return layers


def _remainder_order(stages: int, virtual: int, draw: np.random.Generator) -> list[int]:
    """All chunks, in an order of which any stretch, going round, is level over the stages."""
    stage_order, virtual_order = draw.permutation(stages), draw.permutation(virtual)
    return [int(v) * stages + int(s) for v in virtual_order for s in stage_order]


def _visits(position: int, steps: int, size: int) -> int:
    """How often so many steps round a circle of `size` places, from place 0, come to a place."""
    return (steps - position + size - 1) // size


def set_trainable(
    chunks: Iterable[torch.nn.Module], layers: list[int] | None, options: LisaOptions | None
) -> None:
    """Sets requires_grad of every parameter of this rank's chunks of a GPTModel for one period.

    Args:
        layers: those that train, from `active_layers`; None: everything trains.
    """
    active = None if layers is None else set(layers)
    embedding = options is None or options.train_embedding
    norm = options is None or options.train_norm
    for chunk in chunks:
        gpt = unwrap_model(chunk)
        gpt.requires_grad_(False)
        for layer in gpt.decoder.layers:
            layer.requires_grad_(active is None or layer.layer_number - 1 in active)
        if options is not None and options.train_routers:
            for router in routers([gpt]):
                router.requires_grad_(True)
        if gpt.pre_process:
            gpt.embedding.requires_grad_(active is None or embedding)
        if gpt.post_process:
            gpt.output_layer.requires_grad_(active is None or embedding)
            gpt.decoder.final_layernorm.requires_grad_(active is None or norm)


def period_of(step: int, options: LisaOptions | None) -> int:
    """The LISA period of a step, both from 0; without LISA all steps are one period."""
    return 0 if options is None else step // options.interval
