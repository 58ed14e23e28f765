"""A swarm: many short trainings, each on a mixture of its own, for a regression to their losses.

    mixture k ─▶ training of `proxy_iters` steps ─▶ loss of each validation set ─▶ proxies.json
                                                     all of them ─▶ ratios.csv, metrics.csv ─▶ Swarm

Every proxy starts from the same weights and sees the same order of examples, so that the mixtures
alone make the difference. By default they cost together what `train_iters` steps of ScaleBiO do,
which pass three batches each where a plain step passes one. A finished proxy is kept, as its
mixture and its losses; one that a stop interrupts begins anew. The two tables are in the form of
olmix (`swarm_tables`), and `baseline.swarm` takes such tables in place of trainings.
"""

import gc
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.engine.loop import run_steps
from megatron_scalebio.engine.start import Job, load_start
from megatron_scalebio.engine.state import Data, Record, TokenCost
from megatron_scalebio.errors import UserError
from megatron_scalebio.methods.finetune import FinetuneState
from megatron_scalebio.methods.found import Found
from megatron_scalebio.methods.mixture_regression import draw_mixture
from megatron_scalebio.methods.swarm_tables import read_tables, write_tables
from megatron_scalebio.methods.weighting import prior_weights, start_log
from megatron_scalebio.mixture.sampler import Floats
from megatron_scalebio.whole_files import write_json

PROXIES_FILE = "proxies.json"
PASSES_OF_A_BILEVEL_STEP = 3  # u and w on the training batch, w on a validation batch as large

Proxy = dict[str, Any]
Propose = Callable[[int, list[Proxy]], Floats]  # mixture number k, given the k proxies before it


@dataclass(frozen=True)
class Swarm:
    """Trainings that are done.

    Attributes:
        mixture_NS, loss_NV: of each its mixture, and its loss on every validation set.
        share_V: the sets' weights, adding up to 1.
        step: steps of each; 0 where others have trained them.
    """

    data: Data
    prior_S: Floats
    mixture_NS: Floats
    loss_NV: Floats
    share_V: Floats
    cost: TokenCost = field(default_factory=TokenCost)
    step: int = 0

    @property
    def loss_N(self) -> Floats:
        return self.loss_NV @ self.share_V

    def found(self, weight_S: Floats, error: float, regression: dict[str, Any]) -> Found:
        """The outcome of a regression that misses left-out losses by `error`, in nats."""
        spread, remarks = self.loss_N.std(), []
        if error > spread / 2:
            advice = "raise proxy_iters or proxies" if self.step else "it needs more runs"
            remarks.append(
                f"its regression misses a proxy left out by {error:.2g}, and they differ by "
                f"{spread:.2g}: {advice}"
            )
        pairs = zip(self.mixture_NS.tolist(), self.loss_N.tolist(), strict=True)
        proxies = [{"weights": weights, "loss": loss} for weights, loss in pairs]
        return Found(
            sources=self.data.sources,
            weight_S=weight_S.tolist(),
            initial_S=self.prior_S.tolist(),
            cost=self.cost,
            step=self.step,
            remarks=remarks,
            details={"regression": {**regression, "left_out_error": error}, "proxies": proxies},
        )


def data_of(config: Config, job: Job) -> Data:
    """The sources and validation sets of a swarm, from a configuration that can train one."""
    config.validate_training(runtime.world_size_from_environment())
    data = Data(config, job.folder / "cache")
    config.train.resolve_epochs(sum(len(source) for source in data.sources))
    return data


def swarm_of(
    config: Config,
    job: Job,
    data: Data,
    propose: Callable[[Floats, Floats, int], Propose] | None = None,
) -> Swarm | None:
    """The swarm of a run's configuration: ready-made or trained here; None at a signal.

    Args:
        data: of `data_of`.
        propose: says the mixtures, given the prior, the weights of the validation sets and how many
            there will be [around the prior].
    """
    prior_S, ready = np.array(prior_weights(config, data)), config.baseline.swarm
    names = [source.name for source in data.sources]
    if ready is not None:
        mixture_NS, loss_NV = runtime.on_main(lambda: read_tables(Path(ready), names))
        sets = loss_NV.shape[1]
        return Swarm(data, prior_S, mixture_NS, loss_NV, np.full(sets, 1 / sets))
    count, iters = budget(config, len(names))
    drawn: Propose = lambda number, _: draw_mixture(prior_S, config.train.seed, number)  # noqa: E731
    share_V = np.asarray(data.shares_V)
    mixtures = propose(prior_S, share_V, count) if propose else drawn
    ledger = Ledger(job.folder / PROXIES_FILE, data, iters, prior_S, count, mixtures)
    if ledger.missing and not train_proxies(config, job, iters, ledger):
        return None
    mixture_NS = np.array([proxy["weights"] for proxy in ledger.proxies])
    loss_NV = np.array([proxy["losses"] for proxy in ledger.proxies])
    sets = [each.name for each in data.validation]
    runtime.on_main(lambda: write_tables(job.folder, names, mixture_NS, sets, loss_NV))
    return Swarm(data, prior_S, mixture_NS, loss_NV, share_V, ledger.cost, iters)


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
        proxies: of each its "weights", "losses" and "cost".
        prior_S, count: what the mixtures were drawn around, and how many there will be.
    """

    def __init__(
        self, path: Path, data: Data, iters: int, prior_S: Floats, count: int, propose: Propose
    ) -> None:
        self._path, self._propose = path, propose
        self.prior_S, self.count = prior_S, count
        self._run = {
            "sources": [[source.name, source.fingerprint] for source in data.sources],
            "proxy_iters": iters,
        }
        self.proxies: list[Proxy] = runtime.on_main(self._read)

    @property
    def missing(self) -> int:
        return self.count - len(self.proxies)

    @property
    def cost(self) -> TokenCost:
        return sum((TokenCost(**p["cost"]) for p in self.proxies), TokenCost())

    def next_mixture(self) -> Floats:
        return runtime.on_main(lambda: self._propose(len(self.proxies), self.proxies))

    def add(self, losses: list[float], cost: TokenCost) -> None:
        weights = self.next_mixture().tolist()
        self.proxies.append({"weights": weights, "losses": losses, "cost": asdict(cost)})
        content = {**self._run, "proxies": self.proxies}
        runtime.on_main(lambda: write_json(self._path, content))

    def _read(self) -> list[Proxy]:
        if not self._path.exists():
            return []
        try:
            content = json.loads(self._path.read_text())
            proxies = content.pop("proxies")[: self.count]
            same = content == self._run and all(
                np.allclose(proxy["weights"], self._propose(number, proxies[:number]))
                and len(proxy["losses"]) > 0
                for number, proxy in enumerate(proxies)
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
        return proxies


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
            ledger.add(state.losses, state.cost)
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
        losses: of the validation sets, once it is trained.
    """

    def __init__(self, config: Config, cache: Path, mixture_S: Floats, before: int) -> None:
        super().__init__(config, cache)
        self.probs_S, self._before = torch.from_numpy(mixture_S), before
        self.losses: list[float] = []

    def make_step(self) -> Record:
        record = super().make_step()
        return {**record, "step": self._before + self.step, "weights": self.probs_S.tolist()}

    def evaluate(self, record: Record, job: Job) -> None:
        if self.step < self.config.train.train_iters:
            return
        held_out, kind = self.held_out(), f"{self.config.data.loss_mean}_mean"
        self.losses = [getattr(each, kind) for each in held_out]
        loss = record["validation_loss"] = self.validation_loss(held_out)
        self.cost.scored += _scored_tokens(self)
        if not math.isfinite(loss):
            raise UserError(
                f"data.validation: the loss of the proxy trained on {self.probs_S.tolist()} is "
                f"{loss} (lower optimizer.lr, or check that set)"
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
