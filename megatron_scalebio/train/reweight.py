"""The `reweight` command: learns the mixture and leaves weights, blend, metrics and a report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_scalebio import runtime
from megatron_scalebio.bilevel.confidence import Verdict, judge_convergence, weight_intervals
from megatron_scalebio.checkpoint import saver
from megatron_scalebio.config import Config
from megatron_scalebio.config_loader import add_arguments, config_from_args
from megatron_scalebio.errors import EXIT_OK, EXIT_SIGNALLED, UserError
from megatron_scalebio.report.console import RunConsole, SourceLine
from megatron_scalebio.report.html import write_report
from megatron_scalebio.report.metrics import MetricsLog
from megatron_scalebio.train import outputs
from megatron_scalebio.train.loop import StepResult, train_step
from megatron_scalebio.train.state import TrainState

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    config = config_from_args(args)
    config.validate(runtime.world_size_from_environment())
    runtime.start(config)
    folder = Path(config.train.output)
    state = TrainState(config, folder / "cache")
    save_to = Path(config.checkpoint.save or folder / "checkpoints")
    if config.model.pretrained_checkpoint:
        saver.load_pretrained(state.w, Path(config.model.pretrained_checkpoint))
    warnings = saver.load_latest(state, Path(config.checkpoint.load or save_to))
    parameters = outputs.parameter_count(state)
    reporter = Reporter(state, folder, parameters, warnings) if runtime.is_main() else None
    code = reweight(state, save_to, reporter)
    if reporter:
        reporter.finish()
    return code


def reweight(state: TrainState, save_to: Path, reporter: Reporter | None) -> int:
    """Steps until the end, convergence (if asked) or a signal; saves on the way. Exit code."""
    config, signals = state.config, runtime.StopSignals()
    interval = config.checkpoint.save_interval
    saved_at = state.step
    code = EXIT_OK
    while state.step < config.train.train_iters:
        start = time.perf_counter()
        result = train_step(state)
        if reporter:
            reporter.step(result, time.perf_counter() - start)
        if interval and state.step % interval == 0 and not result.skipped:
            saver.save(state, save_to)
            saved_at = state.step
        if state.skipped_in_a_row >= config.train.skip_limit:
            raise UserError(
                f"{state.skipped_in_a_row} steps in a row were not finite: "
                f"{outputs.name_groups(result.skipped, state)}",
                where=f"step {state.step}",
                mend="lower optimizer.lr or look at that source; the last checkpoint is kept",
            )
        if _any_rank(signals.received):
            code = EXIT_SIGNALLED
            break
        if config.bilevel.early_stop and verdict(state).converged:
            break
    if saved_at != state.step and state.skipped_in_a_row == 0:
        saver.save(state, save_to)
    return code


def _any_rank(flag: int) -> bool:
    """True on all ranks once any has received a signal. Ranks stop after the same step."""
    seen = torch.tensor([float(flag != 0)], device=runtime.device())
    dist.all_reduce(seen)
    return bool(seen)


def verdict(state: TrainState) -> Verdict:
    """Whether the weights have converged by now, and why."""
    bilevel = state.config.bilevel
    return judge_convergence(
        state.mixture.trajectory.tail(bilevel.average_fraction),
        [source.name for source in state.data.sources],
        block_length=state.mixture.trajectory.block_length,
        tolerance=bilevel.tolerance,
        confidence=bilevel.confidence,
        constant_rate=bilevel.lr_lambda_decay_style == "constant",
    )


class Reporter:
    """Everything that rank 0 shows and writes besides checkpoints."""

    def __init__(
        self, state: TrainState, folder: Path, parameters: int, warnings: list[str]
    ) -> None:
        self.state, self.folder = state, folder
        config, data = state.config, state.data
        folder.mkdir(parents=True, exist_ok=True)
        self.run = outputs.write_start(state, folder, parameters)
        self.metrics = MetricsLog(
            folder,
            self.run["sources"],
            self.run["validation"],
            global_batch_size=config.train.global_batch_size,
            resume_step=state.step,
            tensorboard_dir=config.logging.tensorboard_dir,
            tensorboard_log_interval=config.logging.tensorboard_log_interval,
        )
        shares = zip(data.sources, self.run["natural"], state.mixture.initial_S, strict=True)
        lines = [
            SourceLine(source.name, len(source), source.tokens, natural, float(initial))
            for source, natural, initial in shares
        ]
        self.console = RunConsole(lines, config.train.train_iters, config.logging.log_interval)
        self.console.banner(_facts(config, self.run, state.step))
        for warning in warnings:
            self.console.warn(f"passed over a damaged checkpoint: {warning}")
        self.console.start(state.step)

    def step(self, result: StepResult, step_time_s: float) -> None:
        start = time.perf_counter()
        record = outputs.step_record(self.state, result, step_time_s)
        self.metrics.log(record)
        self.console.step(record)
        # Shown with the next step: a line can't hold the time of its own writing.
        result.time_s["log"] = time.perf_counter() - start

    def finish(self) -> None:
        """Writes the weights and the report, and says where everything is."""
        state, folder = self.state, self.folder
        self.metrics.close()
        bilevel = state.config.bilevel
        blocks_BS = state.mixture.trajectory.tail(bilevel.average_fraction)
        intervals = weight_intervals(blocks_BS, bilevel.confidence)
        content = outputs.weights_content(state, intervals, verdict(state))
        left_out = outputs.write_weights(folder, content, state.config)
        self.run["ended"] = outputs.now()
        outputs.write_json(folder / "run.json", self.run)
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
            floor = state.config.bilevel.blend_floor
            self.console.warn(f"below {floor:g}, left out of the blend: {', '.join(left_out)}")


def _facts(config: Config, run: dict, step: int) -> dict[str, object]:
    model, world, bilevel = config.model, run["world"], config.bilevel
    lisa = config.lisa
    facts: dict[str, object] = {
        "model": f"{model.num_layers} layers x {model.hidden_size}, "
        f"{run['parameters']:,} parameters",
        "layout": f"TP {world['tp']} x PP {world['pp']} x VPP {world['vpp']} x DP {world['dp']} "
        f"on {run['device']}, {'bf16' if config.parallel.bf16 else 'fp32'}",
        "steps": f"{config.train.train_iters} of {config.train.global_batch_size} training and "
        f"{config.train.validation_batch_size} validation sequences",
        "mixture": f"{bilevel.mixture_optimizer} lr {bilevel.lr_lambda:g}, alpha {bilevel.alpha:g}",
        "output": config.train.output,
    }
    if lisa.lisa_layers is not None:
        facts["lisa"] = f"{lisa.lisa_layers} layers, redrawn every {lisa.lisa_interval} steps"
    if step:
        facts["resumed"] = f"from step {step}"
    return facts
