"""LESS and RHO-LOSS by plain autograd, one example after the other, on the runs of a folder."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOTAL = 150  # training examples
# Mean learning rates of two epochs of 12 steps, from 5e-3 by half a cosine to a tenth of it.
LESS_RATES = [
    float(np.mean(5e-3 * (0.1 + 0.45 * (1 + np.cos(np.pi * np.arange(first, first + 12) / 24)))))
    for first in (1, 13)
]


def model_losses(model: Any, source: Any, index: int) -> torch.Tensor:
    """Cross-entropy of an example's target tokens, written out."""
    tokens, targets = (torch.from_numpy(x.astype("int64")) for x in source.example(index))
    logits = model(tokens[None, :-1], torch.arange(len(tokens) - 1)[None], None)[0]
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    return losses[targets[1:] > 0]


def opened(folder: Path, part: str) -> Any:
    """A run's configuration, under dropout, which no score may depend on."""
    from megatron_scalebio.config_loader import load_config

    change = {"model": {"hidden_dropout": 0.3, "attention_dropout": 0.3}}
    return load_config(str(folder / part / "config.yaml"), change)


def naive_less(folder: Path) -> dict[str, Any]:
    """LESS of some examples: autograd one by one, Adam written out, no projection."""
    from megatron_scalebio import runtime
    from megatron_scalebio.checkpoint import saver
    from megatron_scalebio.engine.state import Data
    from megatron_scalebio.methods.gradient_features import GradientFeatures
    from megatron_scalebio.methods.pool_training import PoolState

    config = opened(folder, "less-exact")
    runtime.start(config)
    state = PoolState(opened(folder, "less-exact/warmup"), folder / "cache", "less warm-up")
    validation = Data(config, folder / "cache").validation
    beta1, beta2, eps = 0.8, 0.97, 1e-5
    rows = np.arange(0, TOTAL, 7)
    scores = np.zeros((len(rows), len(validation)))
    for rate, steps in zip(LESS_RATES, (12, 24), strict=True):
        saver.load_step(state, folder / "less-exact" / "warmup" / "checkpoints", steps)
        [model] = state.training.w
        model.eval()
        named = [(n, p) for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
        weights = [p for _, p in named]

        def flat(loss: torch.Tensor, of: list = weights) -> torch.Tensor:
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, of)])

        adam = state.training.period.optimizers["w"].chained_optimizers[0].optimizer.state
        assert {int(adam[weight]["step"]) for weight in weights} == {steps}
        m, v = (
            torch.cat([adam[weight][key].flatten() for weight in weights])
            for key in ("exp_avg", "exp_avg_sq")
        )
        of_sets = [[model_losses(model, s, i) for i in range(len(s))] for s in validation]
        goals = [flat(torch.stack([x.mean() for x in each]).mean()) for each in of_sets]
        t = steps + 1
        for place, row in enumerate(rows):
            g = flat(model_losses(model, state.pool, int(row)).mean())
            first = (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)
            second = (beta2 * v + (1 - beta2) * g * g) / (1 - beta2**t)
            update = first / (second.sqrt() + eps)
            for place_v, goal in enumerate(goals):
                cosine = torch.nn.functional.cosine_similarity(update, goal, dim=0)
                scores[place, place_v] += rate * float(cosine) / sum(LESS_RATES)
        state.training.leave_period()
    of_sets = [[model_losses(model, s, i) for i in range(len(s))] for s in validation]
    wanted = [flat(torch.cat(each).mean()) for each in of_sets]
    wanted += [flat(model_losses(model, state.pool, int(row)).mean()) for row in rows[:3]]
    state.config.data.loss_mean = "token"
    state.config.train.micro_batch_size = 5  # the last one of each set is filled up
    features = GradientFeatures(state, 10**6, 0)
    got = [*map(features.of_mean, validation), *features.of_examples(state.pool, rows[:3], None)]
    cosines = []
    for vectors in (wanted, got):
        unit = torch.nn.functional.normalize(torch.stack(list(vectors)), dim=1)
        cosines.append((unit @ unit.T).tolist())
    runtime.stop_model_parallel()
    return {"rows": rows.tolist(), "scores": scores.tolist(), "names": [n for n, _ in named],
            "cosines": cosines}  # fmt: skip


def naive_rho(folder: Path) -> dict[str, Any]:
    """Losses one by one, and three online selections with the batches they are from."""
    from megatron_scalebio import runtime
    from megatron_scalebio.checkpoint import saver
    from megatron_scalebio.methods.pool_training import PoolState, training_config
    from megatron_scalebio.methods.rho_loss import RhoState

    config = opened(folder, "online")
    runtime.start(config)
    cache = folder / "cache"
    part = training_config(config, 24)
    large_batches = {}
    for share in (0.3, 0.01, 1.0):
        part.baseline.rho_batch_share = share
        large_batches[str(share)] = RhoState(part, cache, np.zeros(TOTAL)).large_batch
    part.baseline.rho_batch_share = 0.2
    state = RhoState(part, cache, np.zeros(TOTAL))

    def losses_of(model: Any, rows: Any) -> list[float]:
        was = model.training
        model.eval()
        with torch.no_grad():
            losses = [float(model_losses(model, state.pool, int(row)).mean()) for row in rows]
        model.train(was)
        return losses

    found: dict[str, Any] = {"large batches": large_batches}
    for name, part, stage in (
        ("irreducible", "online/reference", "rho_loss reference"),
        ("offline irreducible", "offline/reference", "rho_loss reference"),
        ("offline trained", "offline", "rho_loss offline"),
    ):
        of = opened(folder, part)
        of = training_config(of, of.train.train_iters)
        saved = PoolState(of, cache, stage)
        found[f"{name} sources"] = [source.name for source in saved.data.sources]
        saver.load_latest(saved, folder / part / "checkpoints", required=True)
        found[f"{name} steps"] = saved.step
        found[name] = losses_of(saved.training.w[0], range(TOTAL))
        saved.training.leave_period()
    check_dealing(state)
    state.irreducible_N = np.array(found["irreducible"])
    steps = []
    for _ in range(3):
        large = replace_order(state).next(40)
        now = losses_of(state.training.w[0], large)
        before = state.chosen_N.copy()
        with locating_at_most(len(large)):  # nothing in a step may cost as much as the pool is long
            record = state.make_step()
        assert state.training.w[0].training
        assert record["weights"] == state.pool.shares(state.chosen_N.astype(float))
        chosen = np.flatnonzero(state.chosen_N - before).tolist()
        steps.append({"large": large.tolist(), "losses": now, "chosen": chosen,
                      "reducible": state.reducible_N[large].tolist()})  # fmt: skip
    state.training.leave_period()
    runtime.stop_model_parallel()
    return {**found, "steps": steps}


def check_dealing(state: Any) -> None:
    """A batch's sources weigh as much as their examples in it, or as the targets of these."""
    rows = np.array([149, 3, 61, 62, 63, 110, 4, 5])
    for kind, loss_mean in (("examples", "sample"), ("targets", "token")):
        state.config.data.loss_mean = loss_mean
        picks = state.deal(rows)
        weight_S = np.zeros(3)
        for source, index in zip(picks.group_B, picks.index_B, strict=True):
            targets = state.data.sources[source].example(int(index))[1][1:].sum()
            weight_S[source] += 1 if kind == "examples" else targets
        np.testing.assert_allclose(state.probs_S.numpy(), weight_S / weight_S.sum())
        assert np.bincount(picks.group_B).tolist() == [3, 3, 2]
    state.config.data.loss_mean = "sample"


@contextlib.contextmanager
def locating_at_most(rows: int) -> Iterator[None]:
    from megatron_scalebio.methods.pool import Pool

    locate = Pool.locate

    def limited(pool: Pool, row_N: np.ndarray) -> Any:
        assert len(row_N) <= rows
        return locate(pool, row_N)

    with unittest.mock.patch.object(Pool, "locate", limited):
        yield


def replace_order(state: Any) -> Any:
    """A copy of the order that the state draws from."""
    from megatron_scalebio.methods.pool import EpochOrder

    order = EpochOrder(state.order.row_N, state.order.seed)
    order.position = state.order.position
    return order
