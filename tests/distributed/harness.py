"""Runs a function on spawned gloo ranks.

Everything that adapts torch to Megatron on CPU happens in the ranks, never in pytest's process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

from tests.ports import free_port


def run_distributed(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Calls `function(*args)` on each of `world_size` ranks; raises what a rank raises."""
    arguments = (world_size, free_port(), function, args)
    mp.spawn(_rank_main, arguments, nprocs=world_size, join=True)


def _rank_main(
    rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    import torch

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    function(*args)
