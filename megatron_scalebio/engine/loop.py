"""The one loop of every training: step → log → save → stop?

    state.make_step ─▶ times, slowest rank ─▶ state.evaluate ─▶ log ─▶ checkpoint ─▶ signal? ─▶ …

What a method does in a step, and what it looks at after one, its state knows (`RunState`).
"""

import time
from dataclasses import asdict
from pathlib import Path

from megatron_scalebio import runtime
from megatron_scalebio.engine.run_log import RunLog
from megatron_scalebio.engine.start import Job
from megatron_scalebio.engine.state import Record, RunState
from megatron_scalebio.errors import UserError
from megatron_scalebio.guard.stragglers import Stragglers
from megatron_scalebio.progress import PROGRESS


def logged_steps(state: RunState, job: Job, log: RunLog | None, save_to: Path | None) -> bool:
    """`run_steps`, after which the log is closed."""
    try:
        finished = run_steps(state, job, log, save_to)
    finally:
        if log:
            log.close()
    if log:
        log.end()
        if not finished:
            log.console.stopped(state.step)
    return finished


def run_steps(state: RunState, job: Job, log: RunLog | None, save_to: Path | None) -> bool:
    """Steps until the end, convergence (if asked) or a signal; saves on the way. A collective.

    Args:
        log: on rank 0.
        save_to: its checkpoints; None: it has none.

    Returns:
        False if a signal stopped it; it is saved then.

    Raises:
        UserError: on all ranks, if steps keep not being applied, or rank 0 can't write its log.
    """
    iters, interval = state.config.train.train_iters, state.config.checkpoint.save_interval
    saved_at, stragglers = state.step, Stragglers(state.config.logging.log_interval)
    signalled = converged = False
    while state.step < iters and not (signalled or converged):
        record = _timed_step(state)
        slowest, slow = stragglers.after_step(state.step, record["time_s"], record["step_time_s"])
        record["straggler"] = slowest and asdict(slowest)
        state.evaluate(record, job)
        problem = log.log(record, slow) if log else None
        if log and job.trackers:
            log.track(record, job.trackers)
        if save_to and is_due(state.step, interval) and not record["skipped"]:
            job.saves.save(state, save_to)
            saved_at = state.step
        else:
            job.saves.poll()
        _refuse_skips(state, record)
        converged = runtime.is_main() and state.converged()  # one rank's word: see core.training
        signalled, failed, converged = runtime.any_rank(
            job.signals.received, problem is not None, converged
        )
        if failed:
            raise problem or UserError("rank 0 could not write its log")
    if save_to and saved_at != state.step and state.training.skipped_in_a_row == 0:
        job.saves.save(state, save_to)
    job.saves.drain()
    return converged or state.step == iters


def is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _timed_step(state: RunState) -> Record:
    start = time.perf_counter()
    PROGRESS.step = state.step + 1
    record = state.make_step()
    record["step_time_s"] = time.perf_counter() - start
    record["tokens_per_second"] = record["tokens"] / record["step_time_s"]
    record["time_s"] = state.clock.take()
    return record


def _refuse_skips(state: RunState, record: Record) -> None:
    """Ends a run whose steps keep not being applied, or of which none was."""
    train, in_a_row = state.config.train, state.training.skipped_in_a_row
    if in_a_row >= min(train.skip_limit, train.train_iters):
        raise UserError(
            f"step {state.step}: {in_a_row} steps in a row were not applied: {record['skipped']} "
            "(lower optimizer.lr or look at that source; the last checkpoint is kept)"
        )
