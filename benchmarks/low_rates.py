"""What bf16 under LISA loses at learning rates of fine-tunes: movement of w, and the excess loss.

A small GPT, trained on two Markov sources and rounded to bf16, goes on at a low rate, in fp32 and
in bf16, on the same batches, towards a validation set that is all of the first source. In the
middle and at the end of every period the excess losses are measured on many examples. Three kinds
of bf16: masters rebuilt from bf16 weights in every period; with the low bits kept; and dithered,
as it is done.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import build, table, train_step, write_json

from megatron_scalebio import runtime
from megatron_scalebio.core import low_bits
from megatron_scalebio.core.twin import build_chunks, named_parameters
from megatron_scalebio.engine.evaluate import held_out_losses
from megatron_scalebio.model.provider import model_provider
from megatron_scalebio.model.settings import transformer_config
from tests.markov import write_problem

Weights = dict[str, torch.Tensor]
KINDS = {"rebuilt": ("keep", "dither"), "low bits": ("dither",), "low bits, dithered": ()}


@dataclass
class Outcome:
    """Movement of w, flat; excess losses [probe, source]: as passes see them, in fp32 passes of the
    bf16 weights, in fp32 passes of the masters."""

    moved: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    seen: list[torch.Tensor] = field(default_factory=list)
    of_weights: list[torch.Tensor] = field(default_factory=list)
    of_masters: list[torch.Tensor] = field(default_factory=list)


def settings(problem: tuple[list, list], **sections: dict) -> dict[str, dict]:
    sources, validation = problem
    tree: dict[str, dict] = {
        "data": {"seq_length": 32, "sources": sources, "validation": validation},
        "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4},
        "optimizer": {"lr": 5e-3, "lr_decay_style": "constant", "lr_warmup_fraction": 0.0},
        "bilevel": {"lr_lambda": 1e-12},  # the same batches for all
        "train": {"train_iters": 60, "global_batch_size": 16, "micro_batch_size": 16, "seed": 1},
    }
    return {name: {**tree.get(name, {}), **sections.get(name, {})} for name in tree | sections}


def pretrained(problem: tuple[list, list], cache: Path) -> Weights:
    state = build(settings(problem), cache)
    for _ in range(60):
        train_step(state)
    weights = {n: p.detach().bfloat16().float() for n, p in named_parameters(state.training.w)}
    ended(state)
    return weights


def ended(state: Any) -> None:
    state.training.leave_period()
    runtime.stop_model_parallel()


def masters(training: Any, side: str) -> Weights:
    found = {}
    for name, p in named_parameters(training.models[side]):
        held, master = low_bits.kept(p), getattr(p, "main_param", None)
        value = p.detach().float() if master is None else master.detach().view(p.shape)
        if master is None and held:
            value = low_bits.join(p.detach(), held.bits.view(p.shape))
        found[name] = value.clone()
    return found


def fill(chunks: list[torch.nn.Module], weights: Weights) -> None:
    for name, parameter in named_parameters(chunks):
        parameter.data.copy_(weights[name])


def excess(state: Any, w: Any, u: Any, examples: int) -> torch.Tensor:
    """Of each source, by the passes of these models."""
    of_w, of_u = (
        held_out_losses(chunks, state.data.sources, state.config, state.data.layout, examples)
        for chunks in (w, u)
    )
    return torch.tensor([a.sample_mean - b.sample_mean for a, b in zip(of_w, of_u, strict=True)])


def fp32_models(state: Any) -> list[list[torch.nn.Module]]:
    config = copy.deepcopy(state.config)
    config.parallel.bf16 = False
    provider = model_provider(config, transformer_config(config), state.data.vocab_size)
    return [build_chunks(provider, state.training.groups) for _ in range(2)]


def probe(state: Any, in_fp32: list, outcome: Outcome, examples: int) -> None:
    training = state.training
    w, u = masters(training, "w"), masters(training, "u")
    pairs = zip(named_parameters(training.w), named_parameters(training.u), strict=True)
    for (name, p_w), (_, p_u) in pairs:
        if p_w.data_ptr() == p_u.data_ptr():
            u[name] = w[name]
    outcome.seen.append(excess(state, training.w, training.u, examples))
    for values, into in (
        ((w, u), outcome.of_masters),
        (({n: v.bfloat16() for n, v in each.items()} for each in (w, u)), outcome.of_weights),
    ):
        for chunks, weights in zip(in_fp32, values, strict=True):
            fill(chunks, weights)
        into.append(excess(state, *in_fp32, examples))


def run(problem: Any, cache: Path, start: Weights, bf16: bool, args: Any) -> Outcome:
    steps = args.periods * args.interval
    resync = {"resync_interval": None} if args.never_reset else {}
    state = build(
        settings(
            problem, parallel={"bf16": bf16}, optimizer={"lr": args.lr},
            lisa={"lisa_layers": 2, "lisa_interval": args.interval},
            bilevel={"alpha": args.alpha, "lr_lambda": 1e-12, **resync},
            train={"train_iters": steps},
        ), cache,
    )  # fmt: skip
    outcome, training = Outcome(), state.training
    fill(training.w, start)
    in_fp32, first = fp32_models(state), {}
    for step in range(1, steps + 1):
        training.enter_period()
        for name, value in masters(training, "w").items():
            if dict(named_parameters(training.w))[name].requires_grad:
                first.setdefault(name, value)
        assert train_step(state).skipped is None
        if step % args.interval in (0, args.interval // 2):
            probe(state, in_fp32, outcome, args.examples)
    last = masters(training, "w")
    outcome.moved = torch.cat([(last[n] - first[n]).flatten().double() for n in sorted(first)])
    ended(state)
    return outcome


@contextmanager
def without(names: tuple[str, ...]) -> Iterator[None]:
    with mock.patch.multiple(
        low_bits, **{n: lambda *given: None for n in names} or {"split": low_bits.split}
    ):
        yield


def row(name: str, of: Outcome, fp32: Outcome) -> list[str]:
    error = (of.moved - fp32.moved).norm() / fp32.moved.norm()
    kept = of.moved @ fp32.moved / (fp32.moved @ fp32.moved)
    seen, weights, true = (torch.stack(e).double() for e in (of.seen, of.of_weights, of.of_masters))
    wanted = torch.stack(fp32.seen)
    signs = [((a[:, 0] - a[:, 1]).sign() == (wanted[:, 0] - wanted[:, 1]).sign()).double().mean()
             for a in (seen, weights)]  # fmt: skip
    slopes = [(a * true).sum() / (true * true).sum() for a in (seen, weights)]
    noise = (seen - weights).square().mean().sqrt()
    return [
        name, f"{kept:.3f}", f"{error:.3f}", f"{true.square().mean().sqrt():.2e}",
        f"{slopes[1]:.2f}", f"{signs[1]:.2f}", f"{noise:.1e}", f"{slopes[0]:.2f}",
        f"{signs[0]:.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alpha", type=float, default=10.0)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--periods", type=int, default=20)
    parser.add_argument("--interval", type=int, default=20)
    parser.add_argument("--examples", type=int, default=400, help="of each source, at a probe")
    parser.add_argument("--never-reset", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        problem = write_problem(Path(folder) / "data", [1.0, 0.0], 0, examples=500, validation=500)
        cache = Path(folder) / "cache"
        start = pretrained(problem, cache)
        fp32 = run(problem, cache, start, False, args)
        for name, left_out in KINDS.items():
            with without(left_out):
                rows.append(row(name, run(problem, cache, start, True, args), fp32))
            print(rows[-1], flush=True)
    head = ["bf16", "movement kept", "its error", "excess loss", "weights see", "sign",
            "noise of passes", "passes see", "sign"]  # fmt: skip
    print(table(head, rows))
    write_json(args.json, {**vars(args), "json": None, "rows": rows})


if __name__ == "__main__":
    main()
