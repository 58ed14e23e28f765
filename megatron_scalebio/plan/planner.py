"""A plan: every stage rehearsed in its worst period, its cost, and whether it fits."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megatron_scalebio.config import Config
from megatron_scalebio.plan.cost import StepCost, step_cost
from megatron_scalebio.plan.holdings import WEIGHTS_U, WEIGHTS_W
from megatron_scalebio.plan.layout import (
    Layout,
    draws,
    ever_active,
    stage_layers,
    worst_draw,
)
from megatron_scalebio.plan.rehearsal import StageMemory, rehearse

MIN_HEADROOM = 0.08  # for fragmentation and what a plan does not know


@dataclass(frozen=True)
class Plan:
    """What a run takes on each device of a stage.

    Attributes:
        stages: each stage in the LISA period that costs it most.
        u_worst_bytes: u's own weights at worst, by stage. More than a period's only where u is
            never reset to w (`resync_interval: null`), since it then keeps every layer it trained.
        low_bits_bytes: in host memory, at most, by stage (`core/low_bits.py`).
    """

    layout: Layout
    stages: tuple[StageMemory, ...]
    u_worst_bytes: tuple[int, ...]
    low_bits_bytes: tuple[int, ...]
    cost: StepCost

    def total_bytes(self, stage: int) -> int:
        """At worst, with what is reserved for CUDA."""
        memory = self.stages[stage]
        more_u = self.u_worst_bytes[stage] - memory.held_bytes[WEIGHTS_U]
        return memory.total_bytes + more_u + self.layout.gpu.reserved_bytes

    @property
    def worst_bytes(self) -> int:
        return max(self.total_bytes(stage.stage) for stage in self.stages)

    @property
    def headroom(self) -> float:
        """Share of the device's memory that stays free on the fullest stage; negative: too full."""
        return 1 - self.worst_bytes / self.layout.gpu.memory_bytes

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def fits_narrowly(self) -> bool:
        return 0 <= self.headroom < MIN_HEADROOM

    def as_json(self) -> dict[str, Any]:
        layout, cost = self.layout, self.cost
        stages = []
        for memory in self.stages:
            entry = asdict(memory)
            del entry["messages"]
            entry["weights_u_first_bytes"] = 0  # until the first period
            entry["weights_u_worst_bytes"] = self.u_worst_bytes[memory.stage]
            entry["low_bits_host_bytes"] = self.low_bits_bytes[memory.stage]
            entry["reserved_bytes"] = layout.gpu.reserved_bytes
            entry["total_bytes"] = self.total_bytes(memory.stage)
            stages.append(entry)
        return {
            "gpu": asdict(layout.gpu),
            "gpus": layout.world,
            "layout": {
                "tensor_model_parallel_size": layout.tp,
                "pipeline_model_parallel_size": layout.pp,
                "virtual_pipeline_model_parallel_size": layout.virtual,
                "context_parallel_size": layout.cp,
                "data_parallel_size": layout.dp,
                "expert_model_parallel_size": layout.ep,
                "micro_batches_train": layout.train,
                "micro_batches_validation": layout.validation,
            },
            "stages": stages,
            "cost": {
                **asdict(cost),
                "step_s": cost.step_s,
                "run_s": cost.run_s,
                "tokens_per_s": cost.tokens_per_s,
            },
            "fits": self.fits,
            "fits_narrowly": self.fits_narrowly,
            "headroom": self.headroom,
        }


def make_plan(
    config: Config, layout: Layout, mfu: float, on_stage: Callable[[int], None] = lambda stage: None
) -> Plan:
    """Rehearses one rank of each stage; `on_stage` hears which one comes.

    Raises:
        UserError: where a layout or a shape is refused.
    """
    drawn = draws(config, layout)
    stages, u_worst, low_bits = [], [], []
    for stage in range(layout.pp):
        on_stage(stage)
        memory = rehearse(config, layout, stage, worst_draw(config, layout, stage, drawn))
        stages.append(memory)
        u_worst.append(_u_at_worst(config, memory, drawn, stage_layers(config, layout, stage)))
        low_bits.append(low_bits_bytes(config, layout, memory, drawn))
    cost = step_cost(config, layout, stages, mfu)
    return Plan(layout, tuple(stages), tuple(u_worst), tuple(low_bits), cost)


def low_bits_bytes(
    config: Config, layout: Layout, memory: StageMemory, drawn: list[list[int] | None]
) -> int:
    """16 bits of each bf16 weight that LISA trains, of w, and of u where it is never reset."""
    if not config.parallel.bf16 or config.lisa.lisa_layers is None:
        return 0
    more = len(ever_active(set(memory.layers), drawn)) - len(memory.active_layers)
    weights = memory.trainable + more * memory.layer_parameters
    # An expert's are dealt among the ranks that hold it; most weights are experts'.
    ranks = layout.dp * layout.cp // layout.ep if config.parallel.use_distributed_optimizer else 1
    return 2 * weights * (2 if config.bilevel.resync_interval is None else 1) // ranks


def _u_at_worst(
    config: Config, memory: StageMemory, drawn: list[list[int] | None], here: set[int]
) -> int:
    """u's own bytes at worst. A layer's weights are alike in size on all of a stage's layers."""
    in_period = memory.held_bytes[WEIGHTS_U]
    if config.bilevel.resync_interval is not None or config.lisa.lisa_layers is None:
        return in_period
    more = len(ever_active(here, drawn)) - len(memory.active_layers)
    assert memory.layer_parameters > 0
    itemsize = memory.held_bytes[WEIGHTS_W] // memory.parameters
    return in_period + more * memory.layer_parameters * itemsize
