"""A plain training of w on rows of the pool, by the engine of `train`.

Every example of a batch weighs alike (`loss_mean: token`: every target token), whichever source it
is from: this is training on all sources put together, not on a mixture of means.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.engine import outputs
from megatron_scalebio.engine.loop import logged_steps
from megatron_scalebio.engine.start import Job, resume_or_start
from megatron_scalebio.logs.console import RunConsole
from megatron_scalebio.methods.finetune import FinetuneState, Reporter
from megatron_scalebio.methods.pool import EpochOrder, Pool
from megatron_scalebio.mixture.sampler import Ints, Picks


def training_config(config: Config, train_iters: int) -> Config:
    """A training of w for a method's own ends: without held-out sets."""
    return replace(
        config,
        data=replace(config.data, validation=[], test=[], weights=None),
        train=replace(config.train, train_iters=train_iters, train_epochs=None),
    )


def side_training_config(config: Config, train_iters: int, folder: Path) -> Config:
    """The same for a training before the run's own, which lies in a folder of its own."""
    part = training_config(config, train_iters)
    return replace(
        part,
        train=replace(part.train, output=str(folder)),
        checkpoint=replace(part.checkpoint, save=None, load=None),
        logging=replace(part.logging, tensorboard_dir=None),
    )


class PoolState(FinetuneState):
    """The state of such a training.

    Args:
        stage: a checkpoint resumes under the same alone.
        row_N: the rows trained on [all of the pool].
    """

    def __init__(self, config: Config, cache: Path, stage: str, row_N: Ints | None = None) -> None:
        super().__init__(config, cache, stage)
        self.pool = Pool(self.data.sources)
        rows = np.arange(len(self.pool)) if row_N is None else row_N
        self.order = EpochOrder(rows, config.train.seed)
        self.probs_S = torch.tensor(self.pool.shares(np.ones(len(self.pool))), dtype=torch.float64)

    def draw(self) -> Picks:
        return self.deal(self.order.next(self.config.train.global_batch_size))

    def deal(self, row_B: Ints) -> Picks:
        """Rows as a batch; `probs_S` becomes its sources' shares, so that all rows weigh alike."""
        source_B, index_B = self.pool.locate(np.sort(row_B))
        weight_B = None
        if self.config.data.loss_mean == "token":
            pairs = zip(source_B, index_B, strict=True)
            weight_B = [self.data.sources[s].example(int(i))[1][1:].sum() for s, i in pairs]
        weight_S = np.bincount(source_B, weight_B, minlength=len(self.data.sources)).astype(float)
        self.probs_S = torch.from_numpy(weight_S / weight_S.sum())
        return Picks(source_B, index_B, np.ones(len(weight_S)))

    def common_state(self) -> dict[str, Any]:
        return {**super().common_state(), "position": self.order.position}

    def load_common_state(self, state: dict[str, Any]) -> None:
        super().load_common_state(state)
        self.order.position = state["position"]


def train_on_pool(state: PoolState, job: Job, what: str, save_to: Path | None = None) -> bool:
    """Trains to the end, from the newest checkpoint where there is one.

    Args:
        what: for the terminal.
        save_to: its checkpoints [its output's `checkpoints`].

    Returns:
        False if a signal stopped it; it is saved then.
    """
    folder = Path(state.config.train.output)
    save_to = save_to or folder / "checkpoints"
    names = [source.name for source in state.data.sources]
    runtime.on_main(lambda: outputs.prepare_folders(folder, save_to, names))
    warnings = resume_or_start(state, job.folder, save_to)
    parameters = outputs.parameter_count(state)
    if runtime.is_main():
        RunConsole([], 1).note(what)
    reporter = runtime.only_on_main(lambda: Reporter(state, folder, parameters, warnings))
    trackers = job.trackers if folder == job.folder else None  # which show the run, not its parts
    here = replace(job, folder=folder, save_to=save_to, trackers=trackers)
    return logged_steps(state, here, reporter, save_to)
