"""The environment: what torchrun and srun tell the processes they start, and these tell torch."""

import functools
import json
import multiprocessing
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_scalebio.errors import EXIT_LOST, UserError

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_LOCALID",
    "SLURM_STEP_ID", "SLURM_STEPID",
)  # fmt: skip
# slurm.h: SLURM_MAX_NORMAL_STEP_ID. Higher ones are sbatch's script and salloc's shell.
_LAST_STEP_OF_SRUN = 0xFFFFFFF0
_TO_SPEAK_S = 5.0  # ranks start within a second or two of each other
_TO_AGREE_S = 10.0
_REFUSED = b"refused"


def set_defaults() -> None:
    """What CUDA and torch read of the environment once; call before torch is imported."""
    # Threads that wait for each other give their cores away: on cores that others use too, steps
    # on a CPU took ten times as long while they spun (docs/experiments.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Kernels start in the order they are queued, which TP and CP communication beside GEMMs needs.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # A LISA period's buffers have other sizes than the last one's: without, what is freed between
    # them stays in pieces.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def world_size_from_environment() -> int:
    """Ranks that were started, 1 without a launcher.

    sbatch and salloc set SLURM_NTASKS too: it then says how many srun may start.
    """
    tasks = os.environ.get("SLURM_NTASKS") if _in_step_of_srun() else None
    return int(os.environ.get("WORLD_SIZE") or tasks or 1)


def command_line() -> str:
    """What starts the ranks of this process again, for a shell.

    Of torchrun on several nodes: what starts those of each node.
    """
    ranks = world_size_from_environment()
    start = ["python", "-m", "megatron_scalebio"]
    if ranks == 1:
        if not sys.argv[0].endswith("__main__.py"):
            start = ["megatron-scalebio"]
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        on_node = int(os.environ["LOCAL_WORLD_SIZE"])
        start = ["torchrun", "--nproc_per_node", str(on_node), *start[1:]]
        if ranks > on_node:
            meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", os.environ["MASTER_ADDR"]]
            start[1:1] = ["--nnodes", str(ranks // on_node), *meet]
    else:
        start = ["srun", "-n", str(ranks), *start]
    return shlex.join([*start, *sys.argv[1:]])


def cores() -> int:
    """The cores that this process may use, its share of those that torchrun's ranks share."""
    open_to_it = hasattr(os, "sched_getaffinity")
    found = len(os.sched_getaffinity(0)) if open_to_it else os.cpu_count() or 1
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def adopt_slurm_variables() -> None:
    """Gives torch the rendezvous that SLURM's own variables describe."""
    for ours, slurms in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS")):
        if slurms not in os.environ:
            raise UserError(f"{slurms}: is not set (start with srun or torchrun)")
        os.environ[ours] = os.environ[slurms]
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "")
        try:
            listed = subprocess.run(
                ["scontrol", "show", "hostnames", nodes],
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:  # in a container
            raise UserError(
                "MASTER_ADDR: is not set, and scontrol is not here to tell it (export the first "
                "node's name before srun, as launch/slurm does)"
            ) from None
        os.environ["MASTER_ADDR"] = (listed.stdout.split() or [socket.gethostname()])[0]
    if "MASTER_PORT" not in os.environ:
        job = int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", "0"))
        # Below 32768, from where the kernel takes the ports of outgoing connections.
        os.environ["MASTER_PORT"] = str(10000 + job % 20000)


def is_first_rank() -> bool:
    """Before the ranks have joined; `runtime.is_main` afterwards."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def refuses_early[**P](look: Callable[P, None]) -> Callable[P, None]:
    """Has `look`, which raises a UserError, look at files before the ranks have met.

    It is called where this process is alone, or the first of torchrun's ranks, which then ends the
    others. Of srun's ranks each calls it, and all refuse if all would: one that sees other files
    than the rest goes on, to the same checks once the ranks have met.
    """

    @functools.wraps(look)
    def look_early(*args: P.args, **kwargs: P.kwargs) -> None:
        alone = world_size_from_environment() == 1
        first_of_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and is_first_rank()
        of_srun = not alone and "RANK" not in os.environ
        if not (alone or first_of_torchrun or of_srun):
            return
        try:
            look(*args, **kwargs)
        except UserError:
            if not of_srun or _all_refuse():
                raise

    return look_early


def _all_refuse() -> bool:
    """Whether all of srun's ranks call this within seconds, told by the first at torch's port."""
    adopt_slurm_variables()
    port, deadline = int(os.environ["MASTER_PORT"]), time.monotonic() + _TO_AGREE_S
    try:
        if not is_first_rank():
            return _first_refuses((os.environ["MASTER_ADDR"], port), deadline)
        _await_others(port, deadline)
    except OSError:
        return False
    return True


def _await_others(port: int, deadline: float) -> None:
    others = world_size_from_environment() - 1
    with socket.create_server(("", port), backlog=others) as server:
        ranks: list[socket.socket] = []
        while len(ranks) < others:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            ranks.append(server.accept()[0])
        for rank in ranks:
            rank.sendall(_REFUSED)
            rank.close()


def _first_refuses(place: tuple[str, int], deadline: float) -> bool:
    while True:
        try:
            with socket.create_connection(place, timeout=_TO_AGREE_S) as first:
                return first.recv(len(_REFUSED)) == _REFUSED
        except ConnectionRefusedError:  # it is not there yet
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


def give_way() -> None:
    """Before a rank ends with an error that the first rank tells.

    torchrun ends all ranks as soon as one has ended, the first one perhaps before it has spoken. It
    ends this one here when the first has.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and not is_first_rank():
        time.sleep(_TO_SPEAK_S)


def tell_torchrun(message: str) -> None:
    """Leaves the error where torchrun looks for it: its report, the last on the screen, has it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))


def _in_step_of_srun() -> bool:
    step = os.environ.get("SLURM_STEP_ID")
    return int(step) <= _LAST_STEP_OF_SRUN if step else False


def end_lost() -> NoReturn:
    """Ends this process with EXIT_LOST and without Python's clearing up.

    The threads of a broken collective live on; one that wants Python's lock while the interpreter
    ends aborts the process (SIGABRT, "terminate called without an active exception").
    """
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(EXIT_LOST)
