"""Runs a function on gloo ranks, each a process of its own.

Everything that adapts torch to Megatron on CPU happens in the ranks, never in pytest's process.
They are forked from a server that has imported Megatron once: that takes 6 s of a core each time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.ports import free_port

multiprocessing.set_forkserver_preload(["megatron_scalebio.train.reweight"])


def run_distributed(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Calls `function(*args)` on each of `world_size` ranks; raises what a rank raises."""
    arguments = (world_size, free_port(), dict(os.environ), function, args)
    # A forked process can't use a GPU that its server has looked at.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    mp.start_processes(_rank_main, arguments, nprocs=world_size, start_method=method)


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        environment, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    function(*args)
