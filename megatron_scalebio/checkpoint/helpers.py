"""The processes through which Megatron writes: they outlast a request to stop, and not their rank.

rank ─┬─ manager of the queue of results   from the first save on
      └─ writer ── one for each file       while a checkpoint is written
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_scalebio import runtime
from megatron_scalebio.guard.process import die_with

_in_block = False  # copied to the helpers, which fork helpers
_forking = 0  # the process that forks


@contextmanager
def helpers() -> Iterator[None]:
    """A block in which Megatron starts such processes.

    SLURM signals every process of a step to make the run save, which it does through these: they
    inherit that this one blocks the signals meanwhile. This one gets what came at the end.

    A rank that is killed can't end them. They would wait for it, and so would all that reads what
    they write: of a launcher in a pipeline, the rest of the pipeline.
    """
    global _in_block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, runtime.STOP_SIGNALS)
    resource_tracker.ensure_running()  # unblocks SIGTERM behind itself
    signal.pthread_sigmask(signal.SIG_BLOCK, runtime.STOP_SIGNALS)
    _start_manager()
    _in_block = True
    try:
        yield
    finally:
        _in_block = False
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_manager() -> None:
    """Megatron's own, with an initializer."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(die_with, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


def _before_fork() -> None:
    global _forking
    _forking = os.getpid()


def _after_fork() -> None:
    if _in_block:
        die_with(_forking)


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
