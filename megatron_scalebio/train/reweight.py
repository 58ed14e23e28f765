"""ScaleBiO, for `reweight`: learns the mixture and leaves weights, blend, metrics and a report."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_scalebio import runtime
from megatron_scalebio.checkpoint.background import Saves
from megatron_scalebio.config import Config
from megatron_scalebio.core.confidence import Verdict
from megatron_scalebio.core.scalebio import StepReport
from megatron_scalebio.errors import EXIT_OK, EXIT_SIGNALLED, UserError
from megatron_scalebio.guard.stragglers import Slowest, Stragglers
from megatron_scalebio.report.html import write_report
from megatron_scalebio.train import outputs
from megatron_scalebio.train.loop import train_step
from megatron_scalebio.train.run_log import RunLog
from megatron_scalebio.train.start import Begun, begin, resume_or_start
from megatron_scalebio.train.state import TrainState
from megatron_scalebio.train.update import with_names


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
        code = reweight(state, begun.save_to, reporter, begun.signals, begun.saves)
    finally:
        if reporter:
            reporter.close()
    if reporter:
        reporter.finish(complete=code == EXIT_OK)
        if code == EXIT_SIGNALLED:
            reporter.console.stopped(state.step)
    return code


def reweight(
    state: TrainState,
    save_to: Path,
    reporter: Reporter | None,
    signals: runtime.StopSignals,
    saves: Saves,
) -> int:
    """Steps until the end, convergence (if asked) or a signal; saves on the way. Exit code."""
    config, interval = state.config, state.config.checkpoint.save_interval
    saved_at = state.step
    code = EXIT_OK
    stragglers = Stragglers(config.logging.log_interval)
    while state.step < config.train.train_iters:
        start = time.perf_counter()
        result = train_step(state)
        time_s, step_time_s = state.clock.take(), time.perf_counter() - start
        slow = stragglers.after_step(state.step, time_s, step_time_s)
        problem = reporter.step(result, step_time_s, time_s, *slow) if reporter else None
        if interval and state.step % interval == 0 and not result.skipped:
            saves.save(state, save_to)
            saved_at = state.step
        else:
            saves.poll()
        _refuse_skips(state, result)
        converged = config.bilevel.early_stop and runtime.is_main() and verdict(state).converged
        signalled, failed, converged = runtime.any_rank(
            signals.received, problem is not None, converged
        )
        if failed:
            raise problem or UserError("rank 0 could not write its log")
        if signalled:
            code = EXIT_SIGNALLED
            break
        if converged:
            break
    if saved_at != state.step and state.training.skipped_in_a_row == 0:
        saves.save(state, save_to)
    saves.drain()
    return code


def _refuse_skips(state: TrainState, result: StepReport) -> None:
    """Ends a run whose steps keep not being applied, or of which none was by its end."""
    train, bio = state.config.train, state.training
    over = state.step == train.train_iters and bio.mixture.steps == 0
    if result.skipped and (over or bio.skipped_in_a_row >= train.skip_limit):
        raise UserError(
            f"{bio.skipped_in_a_row} steps in a row were not applied: "
            f"{with_names(result.skipped, state)}",
            where=f"step {state.step}",
            mend="lower optimizer.lr or look at that source; the last checkpoint is kept",
        )


def verdict(state: TrainState) -> Verdict:
    """Whether the weights have converged by now, and why."""
    constant = state.config.bilevel.lr_lambda_decay_style == "constant"
    return state.training.verdict(constant_rate=constant)


class Reporter(RunLog):
    """Everything that rank 0 shows and writes besides checkpoints."""

    def __init__(
        self, state: TrainState, folder: Path, parameters: int, warnings: list[str]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        initial_S = state.training.mixture.initial_S.tolist()
        super().__init__(state, folder, parameters, initial_S, warnings, _facts(state.config))
        self.state = state

    def step(
        self,
        result: StepReport,
        step_time_s: float,
        time_s: dict[str, float],
        slowest: Slowest | None = None,
        slow: str = "",
    ) -> UserError | None:
        """Logs a step. Gives a disk's refusal back: all ranks have to stop at it together."""
        record = outputs.step_record(self.state, result, step_time_s, time_s)
        record["straggler"] = slowest and slowest.as_dict()
        problem = self.log(record, slow)
        return problem

    def finish(self, complete: bool) -> None:
        """Writes the weights and the report, and says where everything is.

        Args:
            complete: the run came to its end; otherwise these are the weights so far.
        """
        state, folder = self.state, self.folder
        intervals = state.training.intervals()
        content = outputs.weights_content(state, intervals, verdict(state), complete)
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
