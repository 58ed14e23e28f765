"""A layout's plan without rehearsing it: from rehearsals of models of one or two layers a stage.

    stage of f frozen and a active layers  =  ends + f · frozen + a · active

This holds for all that a step's memory and time are made of, in bytes and FLOPs; messages between
stages take none. The rehearsals give `frozen`, `active`, and the `ends`: embedding on the first
stage, head and logits on the last, both on the only one. They depend on TP, CP and recompute alone,
so a search over many layouts needs few. With experts they also depend on EP, and on DP: the shards
of experts' fp32 masters are dealt among fewer ranks than the others'. Where only some layers have
experts, each kind of layer has rehearsals of its own.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from megatron_scalebio.config import Config
from megatron_scalebio.plan.cost import step_cost
from megatron_scalebio.plan.holdings import ADAM, GRADIENTS, KINDS, MASTERS, WEIGHTS_U
from megatron_scalebio.plan.layout import Layout, draws, stage_layers, worst_draw
from megatron_scalebio.plan.ledger import LOGITS
from megatron_scalebio.plan.planner import Plan, low_bits_bytes
from megatron_scalebio.plan.rehearsal import StageMemory, rehearse

_PERIODS = 32  # enough to see the largest share of active layers that a stage gets
_TRAIN = 1
_WITHIN_A_PASS = ("TP", "CP", "EP")
# Quantities by name, in bytes, FLOPs or parameters. A Counter would drop negative differences.
Sizes = dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """A configuration and its estimated plan."""

    config: Config
    plan: Plan

    def fits(self, headroom: float) -> bool:
        return self.plan.headroom >= headroom


@dataclass(frozen=True)
class _Parts:
    frozen: Sizes
    active: Sizes
    first: Sizes
    last: Sizes
    only: Sizes
    workspace: dict[str, float]  # of a first, last and only stage: not a sum over layers


class Estimator:
    """Rehearses each (TP, CP, recompute) once; with experts, each (EP, DP) of them.

    Args:
        mfu: as in `step_cost`.
        on_layout: hears for which layout it rehearses.
    """

    def __init__(self, mfu: float, on_layout: Callable[[str], None] = lambda layout: None) -> None:
        self.mfu, self._on_layout = mfu, on_layout
        self._parts: dict[tuple[object, ...], dict[int, _Parts]] = {}

    def estimate(self, config: Config, layout: Layout) -> Estimate:
        key = (
            layout.tp, layout.cp, config.parallel.recompute_granularity, layout.gpu.name,
            (layout.ep, layout.dp) if config.model.num_experts else None,
        )  # fmt: skip
        if key not in self._parts:
            self._on_layout(str(layout))
            self._parts[key] = {
                kind: _rehearse_parts(config, layout, kind) for kind in set(_kinds(config))
            }
        parts = self._parts[key]
        drawn = draws(config, layout, _PERIODS)
        stages = []
        for stage in range(layout.pp):
            here = stage_layers(config, layout, stage)
            draw = worst_draw(config, layout, stage, drawn)
            active = here if draw is None else here.intersection(draw)
            stages.append(_stage(config, layout, stage, sorted(here), sorted(active), parts))
        cost = step_cost(config, layout, stages, self.mfu)
        u_worst = tuple(stage.held_bytes[WEIGHTS_U] for stage in stages)
        low_bits = tuple(low_bits_bytes(config, layout, stage, drawn) for stage in stages)
        return Estimate(config, Plan(layout, tuple(stages), u_worst, low_bits, cost))


def _kinds(config: Config) -> list[int]:
    """Of each layer, whether it has experts, where the model has some: 1 or 0."""
    return config.model.moe_layer_freq or [1] * config.model.num_layers


def _rehearse_parts(config: Config, layout: Layout, kind: int) -> _Parts:
    """Solves for the parts from five small rehearsals, of models whose layers are of one kind."""
    _, one_frozen = _small(config, layout, kind, 2, 1, 1, [])
    _, two_frozen = _small(config, layout, kind, 2, 2, 1, [])
    last_memory, one_active = _small(config, layout, kind, 2, 2, 1, [0, 3])
    first_memory, first = _small(config, layout, kind, 2, 2, 0, [0, 3])
    only_memory, only = _small(config, layout, kind, 1, 1, 0, [0])
    frozen = _sum(two_frozen, one_frozen, -1)
    active = _sum(frozen, _sum(one_active, two_frozen, -1))
    return _Parts(
        frozen=frozen,
        active=active,
        first=_sum(_sum(first, frozen, -1), active, -1),
        last=_sum(one_frozen, frozen, -1),
        only=_sum(only, active, -1),
        workspace={
            "first": first_memory.workspace_bytes,
            "last": last_memory.workspace_bytes,
            "only": only_memory.workspace_bytes,
        },
    )


def _small(
    config: Config, layout: Layout, kind: int, pp: int, per_stage: int, stage: int,
    active: list[int],
) -> tuple[StageMemory, Sizes]:  # fmt: skip
    """Rehearses a stage of a model of `per_stage` layers a stage, one replica without experts."""
    small = copy.deepcopy(config)
    small.model.num_layers = pp * per_stage
    small.model.no_rope_freq = None
    small.model.moe_layer_freq = None if kind else [0] * small.model.num_layers
    parallel = small.parallel
    parallel.pipeline_model_parallel_size = pp
    parallel.num_layers_per_virtual_pipeline_stage = None
    dp = 1
    if config.model.num_experts:
        dp = layout.dp
    else:
        parallel.use_distributed_optimizer = False
    of_small = Layout(layout.tp, pp, 1, dp, _TRAIN, 1, layout.gpu, layout.cp, layout.ep)
    memory = rehearse(small, of_small, stage, active)
    return memory, _sizes(memory, in_flight=pp - stage)


def _sizes(memory: StageMemory, in_flight: int) -> Sizes:
    kept = Counter(memory.activation_bytes)
    logits = kept.pop(LOGITS, 0)
    return {
        **{kind: memory.held_bytes[kind] for kind in KINDS},
        "activations": kept.total() / in_flight,
        LOGITS: logits,
        "communication": memory.communication_bytes,
        "flops": memory.flops_per_pass,
        **{link: memory.sent_per_pass_bytes[link] for link in _WITHIN_A_PASS},
        "DP": memory.sent_per_step_bytes["DP"],
        "parameters": memory.parameters,
        "trainable": memory.trainable,
    }


def _sum(a: Sizes, b: Sizes, times: float = 1) -> Sizes:
    return {name: a[name] + times * b[name] for name in a}


def _stage(
    config: Config, layout: Layout, stage: int, here: list[int], active: list[int],
    parts: dict[int, _Parts],
) -> StageMemory:  # fmt: skip
    end = {(True, True): "only", (True, False): "first", (False, True): "last"}.get(
        (stage == 0, stage == layout.pp - 1)
    )
    kinds = _kinds(config)
    of_here = [parts[kinds[layer]] for layer in here]
    sizes = {name: 0.0 for name in of_here[0].frozen}
    for layer, part in zip(here, of_here, strict=True):
        sizes = _sum(sizes, part.active if layer in active else part.frozen)
    if end:  # the same of either kind
        sizes = _sum(sizes, getattr(of_here[0], end))
    experts = config.model.num_experts is not None
    shards = config.parallel.use_distributed_optimizer and not experts  # else in shards already
    shard = layout.dp * layout.cp if shards else 1
    held = {kind: int(sizes[kind] / (shard if kind in (MASTERS, ADAM) else 1)) for kind in KINDS}
    return StageMemory(
        stage=stage,
        active_layers=tuple(active),
        layers=tuple(here),
        parameters=int(sizes["parameters"]),
        trainable=int(sizes["trainable"]),
        layer_parameters=int(max(part.frozen["parameters"] for part in of_here)),
        held_bytes=held,
        activation_bytes={
            "in flight": int(sizes["activations"] * _in_flight(layout, stage)),
            LOGITS: int(sizes[LOGITS]),
        },
        # A middle stage works as the last does, less what logits take: the last bounds it.
        workspace_bytes=int(max(part.workspace[end or "first"] for part in of_here)),
        communication_bytes=int(
            max(part.only["communication"] + part.active["communication"] for part in of_here)
        ),
        flops_per_pass=sizes["flops"],
        sent_per_pass_bytes={link: int(sizes[link]) for link in _WITHIN_A_PASS},
        sent_per_step_bytes={
            "DP": int(sizes["DP"])
            if experts
            else _data_parallel_bytes(config, layout, held, sizes["trainable"])
        },
        messages=(),
    )


def _in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches that a stage keeps activations of, in whole stages (Narayanan et al. 2021)."""
    ahead = layout.pp - stage - 1
    if layout.virtual == 1:
        return min(layout.passes, ahead + 1)
    chunks = 2 * ahead + (layout.virtual - 1) * layout.pp + 1
    return min(layout.passes * layout.virtual, chunks) / layout.virtual


def _data_parallel_bytes(
    config: Config, layout: Layout, held: dict[str, int], trainable: float
) -> int:
    """Gradients reduced; with the distributed optimizer, to shards, and new weights gathered."""
    share = 1 - 1 / (layout.dp * layout.cp)
    if config.parallel.use_distributed_optimizer:
        weights = 2 * trainable * (2 if config.parallel.bf16 else 4)  # of w and u
        return int(share * (held[GRADIENTS] + weights))
    return int(2 * share * held[GRADIENTS])
