"""What a bilevel step costs, in plain Megatron-Core training steps of as many micro-batches.

    plain     3m micro-batches through one model, one Adam step                (the unit)
    bilevel   m of u on train, m of w on train, m of w on validation, two Adam steps, λ
    lisa      the same with 2 of 12 layers active (`--lisa-layers` of `--layers`)
    casts     with FP8: lisa in units of the same with frozen layers cast in every step, not once
    thirds    bilevel in units of a plain step of m micro-batches: an ordinary step on the batch
    host      sampling, reduction of losses, λ, log lines: what is not Megatron
    sources   1,000 sources against 5, same tokens, logging included
    head      half of the labels count: bilevel with all logits, and with Megatron's or Transformer
              Engine's fused cross-entropy, in units of bilevel as it is (`--vocab-size`)
    examples  bilevel with scores of single examples in units of the same without
    pipeline  one flush against three flushes on two pipeline stages (starts two ranks)

The contestants take turns within one process, so that a busy machine slows all of them alike; the
figure is the median of the ratios of neighbours. With one process, CPU time is given beside wall
time: other people's processes stretch it less.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import add_precision_arguments, build, precision, table, write_json
from megatron.core.utils import unwrap_model
from plain import PlainTraining

from megatron_scalebio.core import batch as core_batch
from megatron_scalebio.core import training
from megatron_scalebio.core.flush import flush
from megatron_scalebio.core.twin import forget_weight_copies
from megatron_scalebio.engine import outputs
from megatron_scalebio.engine.run_log import RunLog
from megatron_scalebio.methods.scalebio import TrainState, train_step
from megatron_scalebio.mixture.objective import Role
from tests.distributed.harness import run_distributed
from tests.markov import VOCAB, write_source

BARS = {
    "bilevel": 1.08,
    "lisa": 0.80,
    "casts": 1.0,
    "thirds": 3.0,
    "host": 0.02,
    "sources": 1.03,
    "examples": 1.03,
    "pipeline": 1.0,
}
Seconds = tuple[float, float]  # wall, CPU


def write_data(
    folder: Path, sources: int, seq_length: int, labelled: float = 1.0
) -> dict[str, Any]:
    """Random tokens, of which the last, by this share, count: the cost does not depend on more."""
    draw = np.random.default_rng(1).integers
    each = max(4, 400 // sources)

    def entry(name: str, examples: int) -> dict[str, str]:
        rows = list(draw(VOCAB, size=(examples, seq_length + 1)))
        mask = np.arange(seq_length + 1) >= (1 - labelled) * seq_length
        return {"name": name, "path": write_source(folder, name, rows, [mask] * examples)}

    return {
        "seq_length": seq_length,
        "sources": [entry(f"s{n}", each) for n in range(sources)],
        "validation": [entry("validation", 400)],
    }


def settings(data: dict, args: Any, **sections: dict) -> dict[str, dict]:
    batch = args.micro_batches * args.micro_batch_size
    return {
        "data": data,
        "model": {
            "num_layers": args.layers,
            "hidden_size": args.hidden,
            "num_attention_heads": args.hidden // args.head_dim,
            **({"ffn_hidden_size": args.ffn} if args.ffn else {}),
            **(_experts(args.experts, args.hidden) if args.experts else {}),
            "transformer_impl": args.transformer_impl,
            **({"make_vocab_size_divisible_by": args.vocab_size} if args.vocab_size else {}),
        },
        "parallel": precision(args),
        "logging": {"log_interval": 10**6},
        "train": {
            "train_iters": 1000,
            "global_batch_size": batch,
            "micro_batch_size": args.micro_batch_size,
        },
        **sections,
    }


def _experts(number: int, hidden: int) -> dict[str, Any]:
    """Two for each token, whose MLPs are half the width of the dense one of 8/3 · hidden."""
    return {
        "num_experts": number,
        "moe_ffn_hidden_size": 4 * hidden // 3,
        "moe_aux_loss_coeff": 0.01,
        "moe_z_loss_coeff": 0.001,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    }


def timed(work: Callable[[], Any]) -> Seconds:
    torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleave(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Seconds]]:
    """Each in turn, `rounds` times, after one turn to warm up."""
    for work in contestants.values():
        work()
    times: dict[str, list[Seconds]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            times[name].append(timed(work))
    return times


def ratio(times: dict[str, list[Seconds]], name: str, unit: str) -> dict[str, float]:
    pairs = list(zip(times[name], times[unit], strict=True))
    return {
        "wall": median(a[0] / b[0] for a, b in pairs),
        "cpu": median(a[1] / b[1] for a, b in pairs),
        "least_cpu": min(a[1] for a, _ in pairs) / min(b[1] for _, b in pairs),
        "unit_seconds": median(b[0] for _, b in pairs),
        "seconds": median(a[0] for a, _ in pairs),
    }


def bilevel(folder: Path, args: Any) -> dict[str, dict[str, float]]:
    """A bilevel step in units of plain steps of as many micro-batches, and of a third."""
    data = write_data(folder / "five", 5, args.seq_length)
    twin = build(settings(data, args), folder)
    train, valid, *_ = twin.data.next(twin.training.mixture.probs_S)
    plain = PlainTraining(twin.config, twin.data.vocab_size)
    contestants = {
        "third": lambda: plain.step(train),
        "plain": lambda: plain.step(train + train + valid),
        "bilevel": lambda: train_step(twin),
    }
    times = interleave(contestants, args.rounds)
    return {
        "bilevel": ratio(times, "bilevel", "plain"), "thirds": ratio(times, "bilevel", "third")
    }  # fmt: skip


def lisa(folder: Path, args: Any) -> dict[str, dict[str, float]]:
    """A bilevel step with few active layers in units of a plain step of all."""
    data = write_data(folder / "lisa", 5, args.seq_length)
    layers = {"lisa_layers": args.lisa_layers, "lisa_interval": 1000}
    state = build(settings(data, args, lisa=layers), folder)
    train, valid, *_ = state.data.next(state.training.mixture.probs_S)
    plain = PlainTraining(state.config, state.data.vocab_size)

    def cast_in_every_step() -> None:
        forget_weight_copies([*state.training.w, *state.training.models["u"]])
        train_step(state)

    contestants: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain.step(train + train + valid),
        "lisa": lambda: train_step(state),
    }
    if args.fp8_recipe:
        contestants["recast"] = cast_in_every_step
    times = interleave(contestants, args.rounds)
    found = {"lisa": ratio(times, "lisa", "plain")}
    if args.fp8_recipe:
        found["casts"] = ratio(times, "lisa", "recast")
    return found


class Logged:
    """A run with its metrics, TensorBoard and console, as `reweight` has them."""

    def __init__(self, state: TrainState, folder: Path) -> None:
        self.state = state
        initial_S = state.training.mixture.initial_S.tolist()
        folder.mkdir(parents=True)
        self.log = RunLog(state, folder, outputs.parameter_count(state), initial_S)
        self.log_s = 0.0

    def step(self) -> None:
        start = time.perf_counter()
        record = self.state.make_step()
        done = time.perf_counter()
        self.time_s = record["time_s"] = self.state.clock.take()
        record["step_time_s"] = done - start
        record["tokens_per_second"] = record["tokens"] / record["step_time_s"]
        self.log.log(record)
        self.log_s = time.perf_counter() - done

    def close(self) -> None:
        self.log.metrics.close()


def timed_calls(owner: Any, name: str) -> list[float]:
    """The seconds of each call of a function, from now on."""
    seconds: list[float] = []
    untimed = getattr(owner, name)

    def timed_call(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = untimed(*arguments)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, name, timed_call)
    return seconds


def host_share(folder: Path, args: Any) -> dict[str, dict[str, float]]:
    """The host's seconds in a step over all its seconds: medians of the parts and of the share."""
    data = write_data(folder / "host", 5, args.seq_length)
    run = Logged(build(settings(data, args), folder), folder / "host-run")
    reduction = timed_calls(training, "reduce_losses")
    mixture = timed_calls(run.state.training.mixture, "step")
    parts: dict[str, list[float]] = {}
    for _ in range(args.rounds + 1):
        wall, _ = timed(run.step)
        host = {"data": run.time_s["data"], "losses": reduction[-1],
                "mixture": mixture[-1], "log": run.log_s}  # fmt: skip
        host["wall"] = sum(host.values()) / wall
        for name, value in host.items():
            parts.setdefault(name, []).append(value)
    run.close()
    return {"host": {name: median(values[1:]) for name, values in parts.items()}}


def many_sources(folder: Path, args: Any) -> dict[str, dict[str, float]]:
    """A logged step with 1,000 sources in units of one with 5.

    `host_more` is the added host time (sampling, λ, log) over the whole step with 5: the steps'
    computation is the same, so it is the same figure with less noise.
    """
    runs, mixture, host = {}, {}, {5: [], 1000: []}
    for sources in host:
        data = write_data(folder / f"sources-{sources}", sources, args.seq_length)
        state = build(settings(data, args), folder)
        runs[sources] = Logged(state, folder / f"run-{sources}")
        mixture[sources] = timed_calls(state.training.mixture, "step")

    def step(sources: int) -> None:
        run = runs[sources]
        run.step()
        host[sources].append(run.time_s["data"] + mixture[sources][-1] + run.log_s)

    times = interleave({"5": lambda: step(5), "1000": lambda: step(1000)}, args.rounds)
    for run in runs.values():
        run.close()
    found = ratio(times, "1000", "5")
    more = median(host[1000]) - median(host[5])
    return {"sources": {**found, "host_more": more / found["unit_seconds"]}}


def single_examples(folder: Path, args: Any) -> dict[str, dict[str, float]]:
    """A step that keeps its examples' losses in units of one that does not."""
    data = write_data(folder / "examples", 5, args.seq_length)
    state = build(settings(data, args, bilevel={"level": "example"}), folder)
    visits = state.visits

    def step(kept: bool) -> None:
        state.visits = visits if kept else None
        train_step(state)

    times = interleave({"with": lambda: step(True), "without": lambda: step(False)}, args.rounds)
    return {"examples": ratio(times, "with", "without")}


def head(folder: Path, args: Any) -> dict[str, dict[str, float]]:
    """Other ways from the last layer to the losses, where half of the labels count."""
    data = write_data(folder / "head", 5, args.seq_length, labelled=0.5)
    state = build(settings(data, args), folder)
    models = [chunk for chunks in state.training.models.values() for chunk in chunks]
    configs = [unwrap_model(chunk).config for chunk in models]
    labelled = core_batch.labelled_positions

    def step(kind: str) -> None:
        core_batch.labelled_positions = (lambda mask: None) if kind == "all" else labelled
        for config in configs:
            config.cross_entropy_loss_fusion = kind in ("native", "te")
            config.cross_entropy_fusion_impl = kind
        train_step(state)

    kinds = ["as it is", "all", "native", *(["te"] if torch.cuda.is_available() else [])]
    times = interleave({kind: partial(step, kind) for kind in kinds}, args.rounds)
    return {f"head, {kind}": ratio(times, kind, "as it is") for kind in kinds[1:]}


def pipeline_rank(folder: str, data: dict, args: Any) -> None:
    """One of two pipeline stages: one flush and three flushes of the same passes in turns."""
    parallel = {"pipeline_model_parallel_size": 2, "bf16": args.bf16}
    state = build(settings(data, args, parallel=parallel), Path(folder))
    probs_S = state.training.mixture.probs_S
    train, valid, *_ = state.data.next(probs_S)
    bio = state.training
    passes = bio.passes(train, valid, probs_S, bio.validation_shares_V, 10.0)
    by_role = [[p for p in passes if p.role is role] for role in Role]
    period = state.training.enter_period()

    def one() -> None:
        period.zero_grad()
        flush(period.twins, passes, bio.groups)

    def three() -> None:
        period.zero_grad()
        for those in by_role:
            flush(period.twins, those, bio.groups)

    times = interleave({"one": one, "three": three}, args.rounds)
    if torch.distributed.get_rank() == 1:
        write_json(Path(folder) / "pipeline.json", ratio(times, "one", "three"))


def pipeline(folder: Path, args: Any) -> dict[str, dict[str, float]]:
    import json

    data = write_data(folder / "pipeline", 5, args.seq_length)
    few = argparse.Namespace(**{**vars(args), "micro_batches": 2})
    run_distributed(pipeline_rank, 2, str(folder), data, few)
    return {"pipeline": json.loads((folder / "pipeline.json").read_text())}


PARTS = {
    "bilevel": bilevel,
    "lisa": lisa,
    "host": host_share,
    "sources": many_sources,
    "head": head,
    "examples": single_examples,
    "pipeline": pipeline,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, help="width of the MLP [4 times hidden]")
    parser.add_argument("--vocab-size", type=int, help="padded to a multiple of this")
    parser.add_argument("--experts", type=int, help="so many in the place of each dense MLP")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--lisa-layers", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=4, help="m, a third of a step's")
    add_precision_arguments(parser)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
            found.update(PARTS[part](Path(folder), args))
        write_json(args.json, found)
    rows = [
        [name, f"{figures['wall']:.3f}", f"{figures['cpu']:.3f}" if "cpu" in figures else "",
         BARS.get(name, ""), ", ".join(f"{k} {v:.4g}" for k, v in figures.items()
                               if k not in ("wall", "cpu"))]
        for name, figures in found.items()
    ]  # fmt: skip
    print(table(["what", "wall", "CPU", "bar", "seconds"], rows))


if __name__ == "__main__":
    main()
