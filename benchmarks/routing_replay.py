"""Does routing noise blur the mixture's gradient? The excess loss, u routed by itself or as w is.

u's tokens may go through other experts than w's. Here both are trained as in a run; along it, on
the same training batches, ℓ_i(w) − ℓ_i(u) is taken twice: as it is, and with u's tokens sent to
the experts that w chose, weighed by u's own scores (Megatron-Core's routing replay). Reported: the
share of choices that differ, and of λ's gradient (the sources' mean excess losses of a batch, less
their mean) its size, its deviation over batches, and how far replay moves its mean.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import build, table, write_json

import torch  # isort: skip
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from megatron_scalebio.core.batch import gpt_losses
from megatron_scalebio.core.experts import routers
from megatron_scalebio.methods.scalebio import TrainState, train_step
from tests.markov import VOCAB, draw, transition_matrices, write_source

SOURCES, ROWS, LENGTH = 4, 600, 12


def problem(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    matrices = transition_matrices(SOURCES, args.seed)
    every = np.arange(SOURCES).repeat(ROWS)
    rows = draw(matrices, every, LENGTH + 1, (args.seed, 1))
    names = [chr(ord("a") + number) for number in range(SOURCES)]
    sources = [
        {"name": name, "path": write_source(folder, name, list(rows[every == number]))}
        for number, name in enumerate(names)
    ]
    goal = draw(matrices, np.repeat([0, 1], 128), LENGTH + 1, (args.seed, 2))
    validation = [{"name": "goal", "path": write_source(folder, "goal", list(goal))}]
    return {
        "data": {"sources": sources, "validation": validation, "seq_length": LENGTH},
        "model": {
            "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCAB,
            "num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32,
            "moe_aux_loss_coeff": args.aux, "init_method_std": 0.1,
        },
        "optimizer": {"lr": 3e-3, "lr_decay_style": "constant"},
        "bilevel": {"alpha": 10.0, "resync_interval": args.resync},
        "train": {
            "train_iters": args.steps, "micro_batch_size": 64, "global_batch_size": 64,
            "seed": args.seed,
        },
    }  # fmt: skip


def losses_S(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    loss_BS = gpt_losses(model, batch).double() * batch.mask_BS
    loss_B = loss_BS.sum(-1) / batch.mask_BS.sum(-1)
    return torch.stack([loss_B[batch.group_B == source].mean() for source in range(SOURCES)])


@torch.no_grad()
def measure(state: TrainState, batches: int) -> dict[str, torch.Tensor]:
    """λ's gradient of each batch, own and replayed, and the share of choices that differ."""
    [w], [u] = state.training.w, state.training.u
    pairs = list(zip(routers([w]), routers([u]), strict=True))
    for router in (*routers([w]), *routers([u])):
        router.router_replay = router.router_replay or RouterReplay()
    found: dict[str, list[torch.Tensor]] = {"own": [], "replayed": [], "differ": []}
    for _ in range(batches):
        [batch], *_ = state.data.next(torch.full((SOURCES,), 1 / SOURCES, dtype=torch.float64))
        RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
        of_w, own = losses_S(w, batch), losses_S(u, batch)
        chosen = [[r.router_replay.recorded_topk_idx.sort(-1).values for r in p] for p in pairs]
        found["differ"].append(torch.stack([(a != b).double().mean() for a, b in chosen]).mean())
        for of_w_router, of_u_router in pairs:
            recorded = of_w_router.router_replay.recorded_topk_idx
            of_u_router.router_replay.set_target_indices(recorded)
            action = RouterReplayAction.REPLAY_FORWARD
            of_u_router.router_replay.set_router_replay_action(action)
        replayed = losses_S(u, batch)
        for name, of_u in (("own", own), ("replayed", replayed)):
            excess_S = of_w - of_u
            found[name].append(excess_S - excess_S.mean())
    RouterReplay.clear_global_router_replay_action()
    RouterReplay.clear_global_indices()
    return {name: torch.stack(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--resync", type=int, default=10)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--aux", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        state = build(problem(Path(folder), args), Path(folder) / "cache")
        rows = []
        while state.step < args.steps:
            train_step(state)
            # Before a reset, where u is farthest from w.
            if state.step % (args.steps // 4) == args.resync - 1:
                found = measure(state, args.batches)
                own, replayed = found["own"], found["replayed"]
                rows.append([
                    state.step, f"{found['differ'].mean():.1%}",
                    *(f"{1000 * value:.3f}" for value in (
                        own.mean(0).norm(), own.std(0).norm(), replayed.std(0).norm(),
                        (own - replayed).mean(0).norm(), (own - replayed).std(0).norm(),
                    )),
                ])  # fmt: skip
    head = ["step", "differ", "gradient", "deviation", "replayed", "moved by", "± of that"]
    print(table(head, rows))
    write_json(args.json, [dict(zip(head, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
