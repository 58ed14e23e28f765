"""ScaleBiO, for `reweight`: learns the mixture and leaves weights, blend, metrics and a report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.core.confidence import Verdict
from megatron_scalebio.core.scalebio import ScaleBiO, StepReport
from megatron_scalebio.errors import EXIT_OK, EXIT_SIGNALLED
from megatron_scalebio.report.html import write_report
from megatron_scalebio.train import outputs
from megatron_scalebio.train.loop import run_steps
from megatron_scalebio.train.run_log import RunLog
from megatron_scalebio.train.start import Begun, begin, resume_or_start
from megatron_scalebio.train.state import Record, RunState
from megatron_scalebio.train.update import with_names

# Options of the bilevel section that judge or write what was learned.
_JUDGING = {
    "preset", "average_fraction", "confidence", "tolerance", "early_stop", "blend_floor",
}  # fmt: skip


def run(config: Config) -> int:
    """A whole run of a valid configuration, resumed where there is one; its exit code."""
    with begin(config) as begun:
        return _run(config, begun)


def _run(config: Config, begun: Begun) -> int:
    state = TrainState(config, begun.folder / "cache")
    warnings = resume_or_start(state, begun.folder, begun.save_to)
    parameters = outputs.parameter_count(state)
    reporter = runtime.only_on_main(lambda: Reporter(state, begun.folder, parameters, warnings))
    try:
        finished = run_steps(state, begun, reporter, begun.save_to)
    finally:
        if reporter:
            reporter.close()
    if reporter:
        reporter.finish(complete=finished)
        if not finished:
            reporter.console.stopped(state.step)
    return EXIT_OK if finished else EXIT_SIGNALLED


class TrainState(RunState):
    """The state of a `reweight` run on this rank."""

    training: ScaleBiO

    def __init__(self, config: Config, cache: Path) -> None:
        super().__init__(config, "reweight", cache)

    def _training(self) -> ScaleBiO:
        config, data = self.config, self.data
        return ScaleBiO(
            config.bilevel.options(config.data.loss_mean),
            [source.name for source in data.sources],
            validation={
                source.name: float(share)
                for source, share in zip(data.validation, data.shares_V, strict=True)
            },
            initial_weights=data.initial_weights(),
            **self.training_options(),
        )

    def settings(self) -> dict[str, Any]:
        bilevel = asdict(self.config.bilevel)
        return {
            **super().settings(),
            **{f"bilevel.{k}": v for k, v in bilevel.items() if k not in _JUDGING},
        }

    def make_step(self) -> Record:
        return step_record(self, train_step(self))

    def converged(self) -> bool:
        return self.config.bilevel.early_stop and verdict(self).converged


def train_step(state: TrainState) -> StepReport:
    """One bilevel step of all ranks; advances `state` unless something was not finite or spiked."""
    bio, settings = state.training, state.schedule.at(state.step)
    with state.clock("data"):
        train, valid, picks, valid_picks = state.data.next(bio.mixture.probs_S)
    report = bio.step(
        train,
        valid,
        settings.lr_w,
        lr_u=settings.lr_u,
        lr_lambda=settings.lr_lambda,
        alpha=settings.alpha,
        inclusion=picks.inclusion_S,
        validation_inclusion=valid_picks.inclusion_S,
    )
    state.cost.trained += report.losses.tokens
    return report


def step_record(state: TrainState, report: StepReport) -> Record:
    """A step's record; lists follow the order of sources and validation sets."""
    losses = report.losses
    return {
        "step": report.step,
        "alpha": report.alpha,
        "outer_round": state.schedule.at(report.step - 1).outer_round,
        "lr_w": report.lr_w,
        "lr_u": report.lr_u,
        "lr_lambda": report.lr_lambda,
        "validation_loss": report.validation_loss,
        "validation_losses": losses.validation_V.tolist(),
        "train_loss_w": report.train_loss_w,
        "train_loss_u": report.train_loss_u,
        "weights": report.weights_S.tolist(),
        "loss_w": losses.w_S.tolist(),
        "loss_u": losses.u_S.tolist(),
        "excess_loss": (losses.w_S - losses.u_S).tolist(),
        "grad_norm_w": report.grad_norms["w"],
        "grad_norm_u": report.grad_norms["u"],
        "grad_norm_lambda": report.grad_norm_lambda,
        "tokens": losses.tokens,
        "memory_bytes": runtime.allocated_bytes(),
        "skipped": report.skipped and with_names(report.skipped, state),
        "active_layers": state.training.active_layers,
    }


def verdict(state: TrainState) -> Verdict:
    """Whether the weights have converged by now, and why."""
    constant = state.config.bilevel.lr_lambda_decay_style == "constant"
    return state.training.verdict(constant_rate=constant)


def weights_content(state: TrainState, complete: bool) -> dict[str, Any]:
    """The content of a `reweight` run's weights.json.

    Args:
        complete: the run came to its end; otherwise these are its weights so far.
    """
    intervals, judged = state.training.intervals(), verdict(state)
    return {
        "method": "scalebio",
        "step": state.step,
        "complete": complete,
        "converged": judged.converged,
        "reason": judged.reason,
        "confidence": state.config.bilevel.confidence,
        "cost": outputs.cost_entry(state.cost),
        "sources": outputs.weight_entries(
            state.data.sources,
            intervals.weight_S.tolist(),
            state.training.mixture.initial_S.tolist(),
            intervals.low_S.tolist(),
            intervals.high_S.tolist(),
        ),
    }


class Reporter(RunLog):
    """Everything that rank 0 shows and writes besides checkpoints."""

    def __init__(
        self, state: TrainState, folder: Path, parameters: int, warnings: list[str]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        initial_S = state.training.mixture.initial_S.tolist()
        super().__init__(state, folder, parameters, initial_S, warnings, _facts(state.config))
        self.state = state

    def finish(self, complete: bool) -> None:
        """Writes the weights and the report, and says where everything is.

        Args:
            complete: the run came to its end; otherwise these are the weights so far.
        """
        state, folder = self.state, self.folder
        content = weights_content(state, complete)
        left_out = outputs.write_weights(folder, content, state.config)
        self.end()
        report = write_report(folder)
        self.console.result(
            content,
            {
                "weights": folder / "weights.json",
                "blend": folder / "blend.txt",
                "report": report,
                "tensorboard": self.metrics.tensorboard_dir,
            },
            state.config.data.known_weights,
        )
        if left_out:
            floor = outputs.blend_floor(state.config)
            self.console.warn(f"below {floor:g}, left out of the blend: {', '.join(left_out)}")


def _facts(config: Config) -> dict[str, object]:
    train, bilevel = config.train, config.bilevel
    return {
        "steps": f"{train.train_iters} of {train.global_batch_size} training and "
        f"{train.validation_batch_size} validation sequences",
        "mixture": f"{bilevel.mixture_optimizer} lr {bilevel.lr_lambda:g}, alpha {bilevel.alpha:g}",
    }
