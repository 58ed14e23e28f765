"""What `train` does: trains w alone on a mixture, by the same engine as `reweight`.

    sources and their weights ─▶ BlendSampler ─▶ one flush ─▶ AdamW ─▶ losses of the held-out sets
                                                                        ├▶ checkpoints/ last ones
                                                                        └▶ best/        the best

The sources are the folder that `sample` wrote, or several with `data.weights` (a run's
weights.json) or a `data.blend_schedule`, whose mixtures follow each other. A resumed run goes on
where each source was, under another mixture too, and with sources that are new. Supervised
fine-tuning or continued pre-training: it is the data that differs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.data.batch import micro_batches
from megatron_scalebio.data.blend_schedule import BlendSchedule, read_schedule
from megatron_scalebio.data.weights_file import much_shorter, searched_for
from megatron_scalebio.engine import outputs
from megatron_scalebio.engine.evaluate import HeldOutLoss, held_out_losses
from megatron_scalebio.engine.loop import is_due, logged_steps
from megatron_scalebio.engine.run_log import RunLog
from megatron_scalebio.engine.start import Job, resume_or_start, start_job
from megatron_scalebio.engine.state import Record, RunState
from megatron_scalebio.engine.update import train_on
from megatron_scalebio.errors import EXIT_OK, EXIT_SIGNALLED, UserError
from megatron_scalebio.formatting import few
from megatron_scalebio.mixture.sampler import Picks
from megatron_scalebio.whole_files import write_json

EVALUATION_FILE = "evaluation.json"


def train(config: Config) -> int:
    """A whole run of a valid configuration, resumed where there is one; its exit code.

    Raises:
        UserError: for what the configuration, the data or the machine are at fault.
    """
    with start_job(config) as job:
        return train_begun(config, job)[0]


def train_begun(config: Config, job: Job, part_of: Path | None = None) -> tuple[int, FinetuneState]:
    """The same for ranks that have met: its exit code and its state at the end.

    Args:
        part_of: run whose sample indices and imported Hugging Face model it shares [its own].
    """
    home = part_of or job.folder
    state = FinetuneState(config, home / "cache")
    warnings = resume_or_start(state, home, job.save_to)
    warnings += [state.changed] * bool(state.changed)
    iterations, found = config.train.train_iters, config.data.weights
    searched = searched_for(Path(found)) if found else None
    if searched and much_shorter(iterations, searched):
        warnings.append(
            f"{found}: was searched for a training of {searched} steps, this one has {iterations} "
            f"and may want another mixture (reweight with final_train_iters {iterations})"
        )
    parameters = outputs.parameter_count(state)
    reporter = runtime.only_on_main(lambda: Reporter(state, job.folder, parameters, warnings))
    finished = logged_steps(state, job, reporter, job.save_to)
    losses = state.held_out(test=True) if finished else []
    if reporter:
        reporter.finish(losses)
        if finished and job.trackers and (lost := job.trackers.finish()):
            reporter.console.warn(lost)
    return EXIT_OK if finished else EXIT_SIGNALLED, state


class FinetuneState(RunState):
    """The state of a `train` run, or of another that trains w alone, on this rank."""

    def __init__(self, config: Config, cache: Path, stage: str = "train") -> None:
        super().__init__(config, stage, cache)
        weights = torch.tensor(self.data.initial_weights(), dtype=torch.float64)
        self.probs_S = weights / weights.sum()
        self.blends: BlendSchedule | None = None
        if config.data.blend_schedule:
            names = [source.name for source in self.data.sources]
            self.blends = read_schedule(Path(config.data.blend_schedule), names)
            last, steps = self.blends.steps[-1], config.train.train_iters
            if last >= steps:
                raise UserError(
                    f"data.blend_schedule: {config.data.blend_schedule} has a stage from step "
                    f"{last} on, and this training ends at step {steps} (set train_iters above "
                    f"{last}, or leave out the stages that it does not reach)"
                )
            self._take_blend()
        self.best_loss = math.inf
        self.changed = ""  # since the checkpoint that it resumes from

    def _take_blend(self) -> None:
        """The mixture of the step to come, where a schedule has one for each."""
        if self.blends is not None:
            self.probs_S = torch.tensor(self.blends.at(self.step), dtype=torch.float64)

    def common_state(self) -> dict[str, Any]:
        mixture = self.probs_S.tolist()  # of the last step
        return {**super().common_state(), "best_loss": self.best_loss, "mixture": mixture}

    def load_common_state(self, state: dict[str, Any]) -> None:
        """Takes over a run's state; sources that are new since have drawn nothing yet."""
        drawn = state["sampler"]["drawn"]
        new = [0] * (len(self.data.sources) - len(drawn))
        super().load_common_state({**state, "sampler": {**state["sampler"], "drawn": drawn + new}})
        self.best_loss = state["best_loss"]
        ours = self.probs_S.tolist() if self.blends is None else self.blends.at(self.step - 1)
        if self.stage == "train" and state.get("mixture", ours) + new != ours:
            added = few([source.name for source in self.data.sources[len(drawn) :]])
            self.changed = f"goes on with another mixture from step {self.step + 1} on" + (
                f", and with more sources: {added}" if added else ""
            )
        self._take_blend()

    def draw(self) -> Picks:
        """The examples of the next step, whose sources weigh `probs_S`."""
        return self.data.sampler.next(self.probs_S.numpy())

    def make_step(self) -> Record:
        self._take_blend()
        with self.clock("data"):
            picks = self.draw()
            with runtime.refused_together():
                batches = micro_batches(self.data.sources, picks, self.data.layout)
        return train_on(self, batches, picks, self.probs_S)

    def evaluate(self, record: Record, job: Job) -> None:
        """Losses on the validation sets, at intervals and at the end; the best is kept."""
        train = self.config.train
        last = self.step == train.train_iters
        if not self.data.validation or not (last or is_due(self.step, train.eval_interval)):
            return
        losses = self.held_out()
        record["validation_loss"] = loss = self.validation_loss(losses)
        kind = f"{self.config.data.loss_mean}_mean"
        record["validation_losses"] = [getattr(each, kind) for each in losses]
        if loss < self.best_loss:
            self.best_loss = loss
            job.saves.save(self, job.folder / "best", keep_last=1)

    def held_out(self, test: bool = False) -> list[HeldOutLoss]:
        """Losses on the validation sets (some examples of each), or on all of all sets."""
        sets = [*self.data.validation, *self.data.test] if test else self.data.validation
        limit = None if test else self.config.train.eval_examples
        return held_out_losses(self.training.w, sets, self.config, self.data.layout, limit)

    def validation_loss(self, losses: list[HeldOutLoss]) -> float:
        """L1: the validation sets' losses by their weights."""
        kind = f"{self.config.data.loss_mean}_mean"
        pairs = zip(self.data.shares_V.tolist(), losses, strict=True)
        return sum(share * getattr(loss, kind) for share, loss in pairs)


class Reporter(RunLog):
    """Everything that rank 0 shows and writes besides checkpoints."""

    def __init__(
        self, state: FinetuneState, folder: Path, parameters: int, warnings: list[str]
    ) -> None:
        super().__init__(state, folder, parameters, state.probs_S.tolist(), warnings)
        self.state = state

    def log(self, record: Record, slow: str = "") -> UserError | None:
        problem = super().log(record, slow)
        if "validation_loss" in record and problem is None:
            self.console.note(f"step {record['step']}  validation {record['validation_loss']:.4f}")
        return problem

    def finish(self, losses: list[HeldOutLoss]) -> None:
        """Writes the final losses, and says where everything is."""
        paths = {"checkpoints": self.folder / "checkpoints"}
        if losses:
            sets = [loss.as_dict() for loss in losses]
            content = {
                "step": self.state.step,
                "best_validation_loss": self.state.best_loss,
                "cost": outputs.cost_entry(self.state.cost),
            }
            outputs.write_memory(self.folder)
            write_json(self.folder / EVALUATION_FILE, {**content, "sets": sets})
            self.console.losses(sets)
            paths["losses"] = self.folder / EVALUATION_FILE
        if (self.folder / "best").exists():
            paths["best"] = self.folder / "best"
        self.console.places({**paths, "tensorboard": self.metrics.tensorboard_dir})
