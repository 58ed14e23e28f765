"""How long a step takes: arithmetic at a stated share of the peak, traffic, bubble, optimizer.

    flush  = (n · v + p − 1) / v · slowest stage's (arithmetic + traffic within) of a micro-batch
    step   = flush + DP traffic + optimizer
    run    = train_iters steps; loading, evaluation and saving come on top

Arithmetic is what the rehearsal counted: frozen layers have no weight gradients, recomputation is
included. Traffic within a micro-batch is that of TP, CP and EP. It is not overlapped with
arithmetic, as the run does not overlap it either; pipeline messages are taken to hide behind it. An
estimate: what the links deliver is not measured.
"""

from dataclasses import dataclass

from megatron_scalebio.config import Config
from megatron_scalebio.plan.holdings import ADAM, GRADIENTS, MASTERS
from megatron_scalebio.plan.layout import Layout
from megatron_scalebio.plan.rehearsal import StageMemory


@dataclass(frozen=True)
class StepCost:
    """A step's time in seconds, by what it goes to, and its arithmetic on all devices."""

    flops: float
    compute_s: float
    tensor_parallel_s: float
    context_parallel_s: float
    expert_parallel_s: float
    bubble_s: float
    data_parallel_s: float
    optimizer_s: float
    bubble: float
    tokens: int
    steps: int
    mfu: float

    @property
    def step_s(self) -> float:
        return (
            self.compute_s + self.tensor_parallel_s + self.context_parallel_s
            + self.expert_parallel_s + self.bubble_s + self.data_parallel_s + self.optimizer_s
        )  # fmt: skip

    @property
    def run_s(self) -> float:
        return self.step_s * self.steps

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


def step_cost(config: Config, layout: Layout, stages: list[StageMemory], mfu: float) -> StepCost:
    """Cost of one step, from one rank of each stage.

    Args:
        mfu: share of the peak that the arithmetic of a micro-batch reaches, in (0, 1].
    """
    gpu, n = layout.gpu, layout.passes
    peak_flops = gpu.peak_flops if config.parallel.bf16 else gpu.fp32_flops
    compute_s = [stage.flops_per_pass / (peak_flops * mfu) for stage in stages]

    def rate(ranks: int) -> float:
        """Of the link between neighbours that far apart."""
        return gpu.node_bandwidth if ranks <= gpu.node_gpus else gpu.network_bandwidth

    # Sequential ranks: TP is innermost, then CP, then EP as a part of DP, then the pipeline.
    tp_s = [stage.sent_per_pass_bytes["TP"] / rate(layout.tp) for stage in stages]
    cp_s = [stage.sent_per_pass_bytes["CP"] / rate(layout.tp * layout.cp) for stage in stages]
    expert_ranks = layout.ep * config.parallel.expert_tp
    ep_s = [stage.sent_per_pass_bytes["EP"] / rate(expert_ranks) for stage in stages]
    dp_rate = rate(layout.tp * layout.cp * layout.dp)
    pass_s = [
        compute + tp + cp + ep
        for compute, tp, cp, ep in zip(compute_s, tp_s, cp_s, ep_s, strict=True)
    ]
    slowest = max(range(len(stages)), key=pass_s.__getitem__)
    busy_s = n * pass_s[slowest]
    return StepCost(
        flops=sum(stage.flops_per_pass for stage in stages) * n * layout.world // layout.pp,
        compute_s=n * compute_s[slowest],
        tensor_parallel_s=n * tp_s[slowest],
        context_parallel_s=n * cp_s[slowest],
        expert_parallel_s=n * ep_s[slowest],
        bubble_s=busy_s * layout.bubble / (1 - layout.bubble),
        data_parallel_s=max(sum(s.sent_per_step_bytes.values()) for s in stages) / dp_rate,
        optimizer_s=max(map(_optimizer_traffic, stages)) / gpu.memory_bandwidth,
        bubble=layout.bubble,
        tokens=n * layout.dp * config.train.micro_batch_size * config.data.seq_length,
        steps=config.train.train_iters,
        mfu=mfu,
    )


def _optimizer_traffic(stage: StageMemory) -> int:
    """Bytes that zeroing, norm and step move: gradients four times, the rest read and written."""
    held = stage.held_bytes
    return 4 * held[GRADIENTS] + 2 * (held[MASTERS] + held[ADAM])
