"""The processes through which Megatron writes: they outlast a request to stop, and not their rank.

rank ─┬─ manager of the queue of results   from the first save on
      └─ writer                            while a checkpoint is written in the background
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from megatron_scalebio import runtime
from megatron_scalebio.compat.megatron import start_manager_of_writers
from megatron_scalebio.guard.process import die_with


@contextmanager
def helpers() -> Iterator[None]:
    """A block in which Megatron starts such processes.

    SLURM signals every process of a step to make the run save, which it does through these: they
    inherit that this one blocks the signals meanwhile. This one gets what came at the end.

    A rank that is killed can't end them. They would wait for it, and so would all that reads what
    they write: of a launcher in a pipeline, the rest of the pipeline. So the kernel ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, runtime.STOP_SIGNALS)
    resource_tracker.ensure_running()  # unblocks SIGTERM behind itself
    signal.pthread_sigmask(signal.SIG_BLOCK, runtime.STOP_SIGNALS)
    start_manager_of_writers(die_with, os.getpid())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
