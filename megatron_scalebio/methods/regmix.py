"""RegMix (Liu et al. 2024, arXiv 2407.01492): many small trainings, a regression, its best mixture.

    mixture k ─▶ training of `proxy_iters` steps ─▶ L1 on the validation sets ─▶ proxies.json
                                                              all of them ─▶ regression ─▶ weights

Every proxy starts from the same weights and sees the same order of examples, so that the mixtures
alone make the difference. By default they cost together what `train_iters` steps of ScaleBiO do,
which pass three batches each where a plain step passes one. A finished proxy is kept, as its
mixture and its loss; one that a stop interrupts begins anew.
"""

from __future__ import annotations

import gc
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.core.sampler import Floats
from megatron_scalebio.engine.loop import run_steps
from megatron_scalebio.engine.start import Job, load_start
from megatron_scalebio.engine.state import Data, Record, TokenCost
from megatron_scalebio.errors import UserError
from megatron_scalebio.methods.finetune import FinetuneState
from megatron_scalebio.methods.found import Found
from megatron_scalebio.methods.mixture_regression import best_mixture, draw_mixture, fit
from megatron_scalebio.methods.weighting import prior_weights, start_log
from megatron_scalebio.whole_files import write_json

PROXIES_FILE = "proxies.json"
PASSES_OF_A_BILEVEL_STEP = 3  # u and w on the training batch, w on a validation batch as large


def find(config: Config, job: Job) -> Found | None:
    """Trains the proxies that are missing; the mixture they point to, or None at a signal."""
    config.validate_training(runtime.world_size_from_environment())
    data = Data(config, job.folder / "cache")
    config.train.resolve_epochs(sum(len(source) for source in data.sources))
    prior_S = np.array(prior_weights(config, data))
    count, iters = budget(config, len(data.sources))
    mixtures = [draw_mixture(prior_S, config.train.seed, number) for number in range(count)]
    ledger = Ledger(job.folder / PROXIES_FILE, data, iters, prior_S, mixtures)
    if ledger.missing and not train_proxies(config, job, iters, ledger):
        return None
    losses = np.array([p["loss"] for p in ledger.proxies])
    regression = fit(np.stack(mixtures), losses)
    remarks = []
    if regression.error > losses.std() / 2:
        remarks.append(
            f"its regression misses a proxy left out by {regression.error:.2g}, and they differ by "
            f"{losses.std():.2g}: raise proxy_iters or proxies"
        )
    return Found(
        sources=data.sources,
        weight_S=best_mixture(regression, prior_S, config.train.seed).tolist(),
        initial_S=prior_S.tolist(),
        cost=ledger.cost,
        step=iters,
        remarks=remarks,
        details={
            "regression": {"features": regression.features, "left_out_error": regression.error},
            "proxies": [{"weights": p["weights"], "loss": p["loss"]} for p in ledger.proxies],
        },
    )


def budget(config: Config, sources: int) -> tuple[int, int]:
    """How many proxies, and steps of each; epochs are resolved.

    Raises:
        UserError: if there are too few for a regression in that many sources.
    """
    baseline, train = config.baseline, config.train
    iters = baseline.proxy_iters or max(1, train.train_iters // 5)
    steps = PASSES_OF_A_BILEVEL_STEP * train.train_iters
    count = baseline.proxies or max(sources + 1, steps // iters)
    if count <= sources:
        raise UserError(
            f"baseline.proxies: {count} can't tell {sources} sources apart (train {sources + 1} or "
            "more)"
        )
    return count, iters


class Ledger:
    """The finished proxies of a run, in a file of its output. Equal on all ranks.

    Attributes:
        proxies: of each its "weights", "loss" and "cost".
        prior_S, count: what the mixtures were drawn around, and how many there are.
    """

    def __init__(
        self, path: Path, data: Data, iters: int, prior_S: Floats, mixtures: list[Floats]
    ) -> None:
        self._path, self._mixtures = path, mixtures
        self.prior_S, self.count = prior_S, len(mixtures)
        self._run = {
            "sources": [[source.name, source.fingerprint] for source in data.sources],
            "proxy_iters": iters,
        }
        self.proxies: list[dict[str, Any]] = runtime.on_main(self._read)

    @property
    def missing(self) -> int:
        return self.count - len(self.proxies)

    @property
    def cost(self) -> TokenCost:
        return sum((TokenCost(**p["cost"]) for p in self.proxies), TokenCost())

    def next_mixture(self) -> Floats:
        return self._mixtures[len(self.proxies)]

    def add(self, loss: float, cost: TokenCost) -> None:
        weights = self.next_mixture().tolist()
        self.proxies.append({"weights": weights, "loss": loss, "cost": asdict(cost)})
        content = {**self._run, "proxies": self.proxies}
        runtime.on_main(lambda: write_json(self._path, content))

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        try:
            content = json.loads(self._path.read_text())
            proxies = content.pop("proxies")
            pairs = list(zip(proxies, self._mixtures, strict=False))
            same = content == self._run and all(
                np.allclose(proxy["weights"], mixture) for proxy, mixture in pairs
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self._path}: is damaged (remove it to train the proxies anew)"
            ) from None
        if not same:
            raise UserError(
                f"{self._path}: holds proxies of other sources, steps, seed or initial weights "
                "(choose a new train.output, or the options of that run)"
            )
        return [proxy for proxy, _ in pairs]


def train_proxies(config: Config, job: Job, iters: int, ledger: Ledger) -> bool:
    """Trains the missing proxies one after the other; whether the last one is finished."""
    train = replace(config.train, train_iters=iters, train_epochs=None)
    short = replace(config, train=train)
    state = start_proxy(short, job, ledger)
    log = start_log(
        state,
        job,
        ledger.prior_S.tolist(),
        resume_step=len(ledger.proxies) * iters,
        config=config,
        steps=ledger.count * iters,
        facts={"steps": f"{ledger.count} x {iters} of {config.train.global_batch_size} sequences"},
    )
    try:
        while run_steps(state, job, log, save_to=None):
            ledger.add(state.loss, state.cost)
            if not ledger.missing:
                break
            state.training.leave_period()
            del state
            gc.collect()  # two models at once are more than a run plans for
            state = start_proxy(short, job, ledger)
    finally:
        if log:
            log.close()
    if log:
        log.end()
    if log and ledger.missing:
        log.console.stopped(len(ledger.proxies) * iters)
    return not ledger.missing


class ProxyState(FinetuneState):
    """A proxy in training.

    Args:
        before: steps of the proxies before it, which the log continues from.

    Attributes:
        loss: its L1, once it is trained.
    """

    def __init__(self, config: Config, cache: Path, mixture_S: Floats, before: int) -> None:
        super().__init__(config, cache)
        self.probs_S, self._before = torch.from_numpy(mixture_S), before
        self.loss = math.nan

    def make_step(self) -> Record:
        record = super().make_step()
        return {**record, "step": self._before + self.step, "weights": self.probs_S.tolist()}

    def evaluate(self, record: Record, job: Job) -> None:
        if self.step < self.config.train.train_iters:
            return
        self.loss = record["validation_loss"] = self.validation_loss(self.held_out())
        self.cost.scored += _scored_tokens(self)
        if not math.isfinite(self.loss):
            raise UserError(
                f"data.validation: the loss of the proxy trained on {self.probs_S.tolist()} is "
                f"{self.loss} (lower optimizer.lr, or look at that set)"
            )


def start_proxy(config: Config, job: Job, ledger: Ledger) -> ProxyState:
    """The next proxy, at the run's start."""
    before = len(ledger.proxies) * config.train.train_iters
    state = ProxyState(config, job.folder / "cache", ledger.next_mixture(), before)
    load_start(state, job.folder)
    return state


def _scored_tokens(state: FinetuneState) -> int:
    limit = state.config.train.eval_examples
    return sum(
        source.length(index)
        for source in state.data.validation
        for index in range(min(len(source), limit or len(source)))
    )
