"""The environment: what torchrun and srun tell the processes they start, and these tell torch."""

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import NoReturn

from megatron_scalebio.errors import EXIT_LOST

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_LOCALID",
    "SLURM_STEP_ID", "SLURM_STEPID",
)  # fmt: skip
# slurm.h: SLURM_MAX_NORMAL_STEP_ID. Higher ones are sbatch's script and salloc's shell.
_LAST_STEP_OF_SRUN = 0xFFFFFFF0
_TO_SPEAK_S = 5.0  # ranks start within a second or two of each other


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


def is_first_rank() -> bool:
    """Before the ranks have joined; `runtime.is_main` afterwards."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def speaks_for_all() -> bool:
    """Whether this process may refuse before the ranks have met: it is alone, or the first of
    torchrun's, which then ends the others. srun's would wait for it.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and is_first_rank()
    return by_torchrun or world_size_from_environment() == 1


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
