"""Memory that runs out: one line, with what the plan predicted beside what was there.

OUTPUT/memory_snapshot-rank-0003.pickle   what was allocated (and by which lines of code, with
                                          record_memory_history), for
                                          https://pytorch.org/memory_viz
OUTPUT/memory_plan.json                   what `plan` says of this configuration
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megatron_scalebio import launcher, runtime
from megatron_scalebio.config import Config
from megatron_scalebio.config_loader import config_text
from megatron_scalebio.data.sources import vocab_size_told
from megatron_scalebio.errors import UserError
from megatron_scalebio.progress import PROGRESS

_PLAN_TIMEOUT_S = 300
_ON_CPU = "DefaultCPUAllocator"  # torch raises a bare RuntimeError there


@contextmanager
def out_of_memory_named(config: Config, folder: Path) -> Iterator[None]:
    """Turns an allocation that fails into a line; if asked, remembers what allocated GPU memory.

    Of memory in use alone: a microsecond for each allocation, a kilobyte of host memory for each
    that is not freed. A history of all that was freed as well would take twice the time.
    """
    if config.logging.record_memory_history and runtime.on_cuda():
        torch.cuda.memory._record_memory_history("state", context="state", stacks="python")
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _ON_CPU not in str(error):
            raise
        raise out_of_memory(config, folder, error) from None


def out_of_memory(config: Config, folder: Path, error: Exception) -> UserError:
    """What is told when an allocation of this rank has failed."""
    found, extra = str(error).splitlines()[0].rpartition(f"{_ON_CPU}: ")[2], ""
    if runtime.on_cuda():
        snapshot = folder / f"memory_snapshot-rank-{runtime.rank():04d}.pickle"
        torch.cuda.memory._dump_snapshot(str(snapshot))
        taken = torch.cuda.max_memory_allocated() / 1e9
        extra = f"; {taken:.1f} GB were allocated at most, see {snapshot}"
        if not config.logging.record_memory_history:
            extra += " (with record_memory_history it has the lines of code, too)"
    return UserError(
        f"train.micro_batch_size: rank {runtime.rank()} ran out of memory in {PROGRESS.phase} of "
        f"step {PROGRESS.step}: {found}{extra}; {prediction(config, folder)} (lower it, set "
        "recompute_granularity or lisa_layers, or ask `plan --search`)"
    )


def prediction(config: Config, folder: Path) -> str:
    """What `plan` says of the configuration, asked in a process of its own."""
    asked, told = folder / "memory_plan.yaml", folder / "memory_plan.json"
    size = config.model.vocab_size or vocab_size_told(config)
    asked.write_text(config_text(replace(config, model=replace(config.model, vocab_size=size))))
    words = [sys.executable, "-m", "megatron_scalebio", "plan", "--config", str(asked)]
    words += ["--gpus", str(runtime.world_size()), "--json", str(told)]
    environment = {k: value for k, value in os.environ.items() if k not in launcher.VARIABLES}
    try:
        subprocess.run(
            words, check=True, capture_output=True, timeout=_PLAN_TIMEOUT_S, env=environment
        )
        stages = json.loads(told.read_text())["stages"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return "there is no plan of it"
    most = max(stage["total_bytes"] for stage in stages)
    return f"the plan of it is {most / 1e9:.1f} GB on the fullest rank"
