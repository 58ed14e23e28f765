"""Runs a function on gloo ranks, each a process of its own.

Everything that adapts torch to Megatron on CPU happens in the ranks, never in pytest's process.
They are forked from a server that has imported Megatron once, and what a command draws its report
with: that takes 7 s of a core each time.
Ranks that hang are ended, and what they were at is told.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.ports import free_port
from tests.processes import end_all, kill_all

LIMIT_S = 900.0  # several times what the longest takes on a busy machine

multiprocessing.set_forkserver_preload(["tests.preload"])


def run_distributed(
    function: Callable[..., None], world_size: int, *args: Any, start_method: str = "forkserver"
) -> None:
    """Calls `function(*args)` on each of `world_size` ranks; raises what a rank raises.

    Args:
        start_method: spawn: the ranks import everything themselves.

    Raises:
        TimeoutError: with the stacks of all ranks, if they take longer than LIMIT_S.
    """
    deadline = time.monotonic() + LIMIT_S
    with started(function, world_size, *args, start_method=start_method) as (context, folder):
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                for pid in context.pids():
                    end_all(pid)
                stacks = [path.read_text() for path in sorted(folder.iterdir())]
                raise TimeoutError(f"ranks hang after {LIMIT_S:.0f} s\n" + "\n".join(stacks))


@contextlib.contextmanager
def started(
    function: Callable[..., None], world_size: int, *args: Any, start_method: str = "forkserver"
) -> Iterator[tuple[mp.ProcessContext, Path]]:
    """A block beside which ranks run, and the folder of their stacks; kill -9 ends them with it."""
    # A forked process can't use a GPU that its server has looked at.
    method = "spawn" if torch.cuda.is_available() else start_method
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, free_port(), dict(os.environ), folder, function, args)
        context = mp.start_processes(
            _rank_main, arguments, nprocs=world_size, join=False, start_method=method
        )
        try:
            yield context, Path(folder)
        finally:
            for process in context.processes:
                if process.is_alive():
                    kill_all(process.pid)


def found_on_a_rank(function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` gives on a rank of its own, by way of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        run_distributed(_note, 1, path, function, args)
        return json.loads(path.read_text())


def _note(path: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    path.write_text(json.dumps(function(*args)))


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    folder: str,
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    faulthandler.enable(open(Path(folder) / f"rank-{rank}.txt", "w"))  # noqa: SIM115
    os.environ.update(
        environment, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    gc.freeze()  # what this process alone has imported, too
    function(*args)


def next_layout() -> None:
    """Between two layouts of one process: drops the groups of the last, all ranks together.

    Each group of gloo holds threads, which torch keeps after Megatron has forgotten the group: with
    hundreds of groups a rank comes to nothing else.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_scalebio import runtime

    dist.barrier()
    groups = parallel_state._global_process_group_list or []
    runtime.stop_model_parallel()
    for group in groups:
        with contextlib.suppress(ValueError):  # it stands there twice, and is gone
            if group is not None:
                dist.destroy_process_group(group)
