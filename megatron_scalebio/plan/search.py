"""`--search`: the fastest layout that fits, and the fewest devices that hold the model.

Candidates are all TP × CP × PP × VPP × EP × recompute that the model's sizes and the batch allow;
DP is what remains, and each expert is whole on its rank. Each is estimated from rehearsals of a
model of few layers (`estimate`), which are linear in its layers; the best are then rehearsed in
full, and only those are proposed.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from rich.table import Table

from megatron_scalebio.config import Config, LisaConfig, ParallelConfig
from megatron_scalebio.errors import UserError
from megatron_scalebio.plan.estimate import Estimate, Estimator
from megatron_scalebio.plan.hardware import Gpu
from megatron_scalebio.plan.layout import Layout
from megatron_scalebio.plan.planner import MIN_HEADROOM, Plan, make_plan
from megatron_scalebio.plan.table import seconds

ROWS_SHOWN = 8
_REHEARSED = 4  # estimates are good to a few per cent: the first or second is the one
_LISA_LAYERS = (8, 4, 2, 1)
_SAME_TIME = 1.05  # nearer than a stated MFU tells apart
_TOKENS_WORTH_SPLITTING = 4096  # of a sequence on a rank: under CP each has as many


@dataclass(frozen=True)
class Found:
    """What a search gives.

    Attributes:
        estimates: all candidates: those that fit, the simplest of the fastest and then by time;
            those that do not, the smallest first.
        best: the fastest that fits with `MIN_HEADROOM`, rehearsed; None where none does.
        fewest: devices, a power of two or a whole number of nodes, that hold the model; None where
            not even 64 nodes do.
    """

    estimates: list[Estimate]
    best: Plan | None
    best_config: Config
    fewest: int | None


def search(
    config: Config, gpus: int, gpu: Gpu, mfu: float, on_layout: Callable[[str], None]
) -> Found:
    """Looks for a layout; `on_layout` hears which one is being estimated or rehearsed.

    Raises:
        UserError: where none divides the model and the batch.
    """
    estimator = Estimator(mfu, on_layout)
    estimates = _estimates(config, gpus, gpu, estimator)
    if not estimates:
        raise UserError(
            f"--gpus: no layout of {gpus} devices divides the model and the batch (change gpus, "
            "global_batch_size or validation_batch_size)"
        )
    if config.lisa.lisa_layers is None and not estimates[0].fits(MIN_HEADROOM):
        for layers in _LISA_LAYERS:  # as many as fit
            with_lisa = copy.deepcopy(config)
            with_lisa.lisa.lisa_layers = layers
            # None where the model has fewer layers.
            estimates = _estimates(with_lisa, gpus, gpu, estimator) or estimates
            if estimates[0].fits(MIN_HEADROOM):
                break
    for estimate in estimates[:_REHEARSED]:
        if not estimate.fits(MIN_HEADROOM / 2):
            break
        on_layout(f"{estimate.plan.layout}, whole")
        plan = make_plan(estimate.config, estimate.plan.layout, mfu)
        if plan.headroom >= MIN_HEADROOM:
            fewest = _fewest(estimate.config, gpus, gpu, estimator)
            return Found(estimates, plan, estimate.config, fewest)
    fewest = _fewest(estimates[0].config, gpus, gpu, estimator)
    return Found(estimates, None, config, fewest)


def _estimates(config: Config, gpus: int, gpu: Gpu, estimator: Estimator) -> list[Estimate]:
    found = []
    for candidate in candidates(config, gpus, gpu):
        try:
            layout = Layout.of(candidate, gpus, gpu)
        except UserError:
            continue  # does not divide the model or the batch
        found.append(estimator.estimate(candidate, layout))
    return in_order(found)


def in_order(estimates: list[Estimate]) -> list[Estimate]:
    """Those that fit, by time, of equally fast ones the simplest first; then the rest, by size."""

    def time(estimate: Estimate) -> float:
        return estimate.plan.cost.step_s

    fitting = sorted((e for e in estimates if e.fits(MIN_HEADROOM)), key=time)
    fastest = [e for e in fitting if time(e) <= _SAME_TIME * time(fitting[0])]
    rest = [e for e in estimates if not e.fits(MIN_HEADROOM)]
    return [
        *sorted(fastest, key=_complexity),
        *fitting[len(fastest) :],
        *sorted(rest, key=lambda e: e.plan.worst_bytes),
    ]


def _complexity(estimate: Estimate) -> tuple[float, ...]:
    """Pipelines with virtual chunks, then pipelines, context and tensor parallelism; then time."""
    layout = estimate.plan.layout
    return layout.virtual, layout.pp, layout.cp, layout.tp, layout.ep, estimate.plan.cost.step_s


def candidates(config: Config, gpus: int, gpu: Gpu) -> Iterator[Config]:
    """The configuration under every TP × CP × PP × VPP × EP × recompute of that many devices."""
    layers = config.model.num_layers
    most_cp = max(1, config.data.seq_length // _TOKENS_WORTH_SPLITTING)
    for tp, cp in itertools.product(
        _powers_of_two(min(gpus, gpu.node_gpus)), _powers_of_two(min(gpus, most_cp))
    ):
        rest = gpus // (tp * cp)
        for pp in (n for n in range(1, rest + 1) if rest % n == 0 and layers % n == 0):
            per_stage = layers // pp
            halves = [per_stage // n for n in (2, 4) if pp > 1 and per_stage % n == 0]
            for per_chunk in [None, *dict.fromkeys(halves)]:
                for recompute, ep in itertools.product((None, "full"), _experts(config, gpus, pp)):
                    zero = gpus // (tp * pp) > 1
                    yield _with(config, tp, cp, pp, per_chunk, ep, recompute, zero)


def _experts(config: Config, gpus: int, pp: int) -> list[int]:
    """How many ranks of a stage may share the experts: powers of two."""
    experts = config.model.num_experts
    if experts is None:
        return [1]
    return [ep for ep in _powers_of_two(gpus // pp) if experts % ep == gpus // pp % ep == 0]


def _with(
    config: Config, tp: int, cp: int, pp: int, per_chunk: int | None, ep: int, recompute: Any,
    zero: bool,
) -> Config:  # fmt: skip
    candidate = copy.deepcopy(config)
    parallel = candidate.parallel
    parallel.tensor_model_parallel_size = tp
    parallel.context_parallel_size = cp
    parallel.pipeline_model_parallel_size = pp
    parallel.num_layers_per_virtual_pipeline_stage = per_chunk
    parallel.expert_model_parallel_size = ep
    if config.model.num_experts is not None:
        parallel.expert_tensor_parallel_size = 1 if tp > 1 else None
    parallel.sequence_parallel = tp > 1
    parallel.use_distributed_optimizer = zero
    parallel.recompute_granularity = recompute
    parallel.recompute_method = "uniform" if recompute == "full" else None
    parallel.recompute_num_layers = 1 if recompute == "full" else None
    return candidate


def _fewest(config: Config, gpus: int, gpu: Gpu, estimator: Estimator) -> int | None:
    """Devices that hold the model by estimate: powers of two up to a node, then whole nodes."""
    counts = [n for n in _powers_of_two(gpu.node_gpus)]
    counts += [gpu.node_gpus * nodes for nodes in _powers_of_two(64)[1:]]
    for count in counts:
        estimates = _estimates(config, count, gpu, estimator)
        if estimates and estimates[0].fits(MIN_HEADROOM):
            return count
    return None


def _powers_of_two(largest: int) -> list[int]:
    return [2**n for n in range(largest.bit_length())]


def ranking(found: Found) -> Table:
    """The best estimates: those that fit first, then by time."""
    table = Table()
    names = ("TP", "CP", "PP", "VPP", "DP", "EP", "recompute", "LISA", "GB", "headroom", "s / step")
    for name in names:
        table.add_column(name, justify="left" if name == "recompute" else "right")
    for estimate in found.estimates[:ROWS_SHOWN]:
        layout, parallel = estimate.plan.layout, estimate.config.parallel
        table.add_row(
            str(layout.tp), str(layout.cp), str(layout.pp), str(layout.virtual), str(layout.dp),
            str(layout.ep), parallel.recompute_granularity or "none",
            str(estimate.config.lisa.lisa_layers or "all"),
            f"{estimate.plan.worst_bytes / 1e9:.1f}",
            f"{estimate.plan.headroom:.1%}", seconds(estimate.plan.cost.step_s),
        )  # fmt: skip
    return table


def sections(config: Config) -> dict[str, dict[str, Any]]:
    """The sections parallel and lisa as they were searched, for the run's file."""
    chosen = {
        "parallel": _chosen(config.parallel, ParallelConfig()),
        "lisa": _chosen(config.lisa, LisaConfig()),
    }
    return {name: values for name, values in chosen.items() if values}


def _chosen(section: Any, default: Any) -> dict[str, Any]:
    """What a section says that is not the default."""
    values = {spec.name: getattr(section, spec.name) for spec in fields(section)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}
