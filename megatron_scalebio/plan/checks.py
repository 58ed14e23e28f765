"""`--dry-run`: every rank's chunks are built on shapes, and what they must agree on is checked.

- every layer and both ends of the model lie on exactly one stage
- the shards of every weight, by its checkpoint name, tile its global shape
- the ranks of a stage hold equal bytes
- LISA's draws are level over stages and chunks
- what one stage sends in a flush, the next receives: as often, in the same shape
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model

from megatron_scalebio.config import Config
from megatron_scalebio.model.provider import build_model
from megatron_scalebio.plan.fake_rank import META, as_rank
from megatron_scalebio.plan.kernels import on_shapes, settings_for
from megatron_scalebio.plan.layout import Layout, draws, stage_layers
from megatron_scalebio.plan.planner import Plan

# Of a shard: its name, its place in the whole; and of the whole: its shape.
Shard = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Built:
    """What one rank of a stage built: layers, from 0; parameters; shards, sizes in elements."""

    place: int
    stage: int
    layers: tuple[int, ...]
    parameters: int
    shards: dict[Shard, int]
    global_shapes: dict[str, tuple[int, ...]]


def build_ranks(config: Config, layout: Layout) -> list[Built]:
    """Builds the chunks of every rank of a stage that holds something else than the ones before it.

    CP and DP ranks are copies, but for experts, of which EP times expert TP ranks hold parts.
    """
    ranks = []
    config = on_shapes(config)
    of_experts = layout.ep * config.parallel.expert_tp
    for stage in range(layout.pp):
        for place in range(max(layout.tp, of_experts)):
            rank = stage * layout.tp * layout.cp * layout.dp + place
            with as_rank(config, rank, layout.world, lambda name, tensor: None):
                ranks.append(_build(config, layout, stage, place))
    return ranks


def _build(config: Config, layout: Layout, stage: int, place: int) -> Built:
    assert config.model.vocab_size is not None
    with META:
        chunks = build_model(config, settings_for(config, layout.gpu.cuda), config.model.vocab_size)
    shards: dict[Shard, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    layers: list[int] = []
    for gpt in map(unwrap_model, chunks):
        layers += [layer.layer_number - 1 for layer in gpt.decoder.layers]
        state = gpt.sharded_state_dict()
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor):
                shards[tensor.key, tuple(tensor.global_offset)] = math.prod(tensor.local_shape)
                shapes[tensor.key] = tuple(tensor.global_shape)
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    return Built(place, stage, tuple(layers), parameters, shards, shapes)


def problems(config: Config, plan: Plan, ranks: list[Built]) -> list[str]:
    """What does not hold; empty for a layout that can run."""
    return [
        *_placement(config, plan.layout, ranks),
        *_tiling(ranks),
        *_lisa(config, plan.layout),
        *_messages(plan),
    ]


def _placement(config: Config, layout: Layout, ranks: list[Built]) -> list[str]:
    found = []
    for built in ranks:
        expected = tuple(sorted(stage_layers(config, layout, built.stage)))
        if tuple(sorted(built.layers)) != expected:
            found.append(f"stage {built.stage} holds layers {built.layers}, not {expected}")
    sizes: dict[int, set[int]] = defaultdict(set)
    for built in ranks:
        sizes[built.stage].add(built.parameters)
    for stage, of_stage in sizes.items():
        if len(of_stage) > 1:
            found.append(f"stage {stage}: its ranks hold {sorted(of_stage)} parameters")
    held = Counter(layer for built in ranks if built.place == 0 for layer in built.layers)
    if held != Counter(range(config.model.num_layers)):
        found.append(f"layers are not on one stage each: {dict(held)}")
    return found


def _tiling(ranks: list[Built]) -> list[str]:
    shards: dict[Shard, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for built in ranks:
        shards.update(built.shards)
        for key, shape in built.global_shapes.items():
            if shapes.setdefault(key, shape) != shape:
                return [f"{key} is {shape} on one rank, {shapes[key]} on another"]
    covered: Counter[str] = Counter()
    for (key, _), size in shards.items():
        covered[key] += size
    return [
        f"the shards of {key} have {covered[key]} elements, {shape} has {math.prod(shape)}"
        for key, shape in shapes.items()
        if covered[key] != math.prod(shape)
    ]


def _lisa(config: Config, layout: Layout) -> list[str]:
    if config.lisa.lisa_layers is None:
        return []
    stages = [stage_layers(config, layout, stage) for stage in range(layout.pp)]
    for period, active in enumerate(draws(config, layout)):
        counts = [len(here.intersection(active or ())) for here in stages]
        if max(counts) - min(counts) > 1 or sum(counts) != config.lisa.lisa_layers:
            return [f"LISA period {period} has {counts} active layers on the stages"]
    return []


def _messages(plan: Plan) -> list[str]:
    found = []
    last = plan.layout.pp - 1
    for stage in plan.stages:
        after = plan.stages[(stage.stage + 1) % plan.layout.pp]
        if stage.stage == last and plan.layout.virtual == 1:
            continue
        for here, there in (("send_next", "recv_prev"), ("recv_next", "send_prev")):
            ours = Counter(shape for name, shape in stage.messages if name == here)
            theirs = Counter(shape for name, shape in after.messages if name == there)
            if ours != theirs:
                found.append(f"stages {stage.stage} and {after.stage}: {here} {dict(ours)}, "
                             f"{there} {dict(theirs)}")  # fmt: skip
    return found
