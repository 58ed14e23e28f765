"""A plan as tables for the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from megatron_scalebio.formatting import duration
from megatron_scalebio.plan.cost import StepCost
from megatron_scalebio.plan.holdings import GRADIENTS, KINDS, WEIGHTS_U, WEIGHTS_W
from megatron_scalebio.plan.ledger import LOGITS, PIPELINE
from megatron_scalebio.plan.planner import MIN_HEADROOM, Plan
from megatron_scalebio.plan.rehearsal import ROLE_NAMES

STAGES_A_TABLE = 5  # in 80 columns


def show(console: Console, plan: Plan) -> None:
    """Memory by stage, a step's time and the verdict."""
    console.print("Memory of each rank by pipeline stage, GB (1e9 bytes), at worst")
    for start in range(0, len(plan.stages), STAGES_A_TABLE):
        console.print(_memory(plan, range(start, min(start + STAGES_A_TABLE, plan.layout.pp))))
    console.print(f"A step, at {plan.cost.mfu:.0%} MFU (stated)")
    console.print(_cost(plan.cost, plan))
    console.print(verdict(plan))


def verdict(plan: Plan) -> str:
    gpu = plan.layout.gpu
    fullest = max(plan.stages, key=lambda s: plan.total_bytes(s.stage)).stage
    answer = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    if plan.fits_narrowly:
        answer = f"[yellow]fits narrowly[/] (fragmentation may take {MIN_HEADROOM:.0%})"
    return (
        f"{plan.layout} on {plan.layout.world} x {gpu.name}: {answer}, headroom "
        f"{plan.headroom:.1%}\nfullest: stage {fullest}, {gb(plan.worst_bytes)} of "
        f"{gb(gpu.memory_bytes)} GB\ncomputed, not measured: no whole run has been compared "
        "with a GPU (docs/gpu.md)"
    )


def gb(n: float) -> str:
    """Decimal gigabytes; three digits below one."""
    value = n / 1e9
    return f"{value:.2f}" if value >= 0.995 or n == 0 else f"{value:.3f}"


def _memory(plan: Plan, stages: range) -> Table:
    memories = [plan.stages[stage] for stage in stages]
    table = Table("stage")
    for memory in memories:
        table.add_column(str(memory.stage), justify="right")

    def row(name: str, values: Sequence[float]) -> None:
        if any(values):
            table.add_row(name, *map(gb, values))

    table.add_row("layers", *(str(len(m.layers)) for m in memories))
    table.add_row("  active (LISA)", *(str(len(m.active_layers)) for m in memories))
    table.add_row(
        "parameters, millions", *(f"{m.parameters / 1e6:,.0f}" for m in memories), end_section=True
    )
    names = {WEIGHTS_W: "w", GRADIENTS: "gradients of w and u"}
    for kind in KINDS:
        if kind == WEIGHTS_U:
            table.add_row("u, at the start", *("0" for _ in memories))
            row("u, at worst", [plan.u_worst_bytes[stage] for stage in stages])
        else:
            row(names.get(kind, kind), [m.held_bytes[kind] for m in memories])
    table.add_section()
    for kind in (*ROLE_NAMES.values(), LOGITS, PIPELINE):
        name = kind if kind == LOGITS else f"activations: {kind}"
        row(name, [m.activation_bytes.get(kind, 0) for m in memories])
    row("workspace of a pass", [m.workspace_bytes for m in memories])
    row("communication buffers", [m.communication_bytes for m in memories])
    row("reserved (CUDA, NCCL)", [plan.layout.gpu.reserved_bytes] * len(memories))
    table.add_section()
    row("total", [plan.total_bytes(stage) for stage in stages])
    table.add_section()
    row("host: low bits of bf16", [plan.low_bits_bytes[stage] for stage in stages])
    return table


def _cost(cost: StepCost, plan: Plan) -> Table:
    table = Table("", Column("seconds", justify="right"), "")
    layout = plan.layout
    per_step = max(sum(s.sent_per_step_bytes.values()) for s in plan.stages)

    def in_a_flush(link: str) -> str:
        per_pass = max(s.sent_per_pass_bytes[link] for s in plan.stages)
        return f"{gb(per_pass * layout.passes)} GB a rank"

    flush = f"{layout.passes} micro-batches a rank: {layout.train} u, {layout.train} w, "
    table.add_row(
        "arithmetic", seconds(cost.compute_s),
        f"{_pflop(cost.flops)} PFLOP; {flush}{layout.validation} validation",
    )  # fmt: skip
    table.add_row("TP traffic", seconds(cost.tensor_parallel_s), in_a_flush("TP"))
    if layout.cp > 1:
        table.add_row("CP traffic", seconds(cost.context_parallel_s), in_a_flush("CP"))
    if layout.ep > 1:
        table.add_row("EP traffic", seconds(cost.expert_parallel_s), in_a_flush("EP"))
    bubble = f"{cost.bubble:.1%} of the flush; {in_a_flush('PP')} sent"
    table.add_row("pipeline bubble", seconds(cost.bubble_s), bubble)
    table.add_row("DP traffic", seconds(cost.data_parallel_s), f"{gb(per_step)} GB a rank")
    table.add_row("optimizers", seconds(cost.optimizer_s), "w and u, by memory bandwidth",
                  end_section=True)  # fmt: skip
    passed = f"{cost.tokens_per_s:,.0f} tokens/s through u and w"
    table.add_row("step", seconds(cost.step_s), passed)
    table.add_row(f"{cost.steps:,} steps", duration(cost.run_s), "without loading, saving, tests")
    return table


def seconds(value: float) -> str:
    """Two digits behind the point, or two that tell something."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def _pflop(flops: float) -> str:
    value = flops / 1e15
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"
