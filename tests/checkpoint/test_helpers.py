"""The processes that Megatron starts to write a checkpoint end with their rank, not before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.commands import ROOT
from tests.processes import finish, kill_all

# A rank that writes a checkpoint in the background, for ever.
RANK = """
import time
from pathlib import Path
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron_scalebio import runtime
from megatron_scalebio.checkpoint.background import _in_turn
from megatron_scalebio.checkpoint.helpers import helpers
from megatron_scalebio.config_loader import load_config

def write(*nothing):
    print("writing", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    runtime.start(load_config(None, {}))
    request = AsyncRequest(write, (None, None), [], preload_fn=lambda: None)
    with helpers():
        AsyncCallsQueue().schedule_async_request(_in_turn([(request, Path())]))
    time.sleep(600)
"""


# A run that saves in the background; then, which of the processes it started have imported torch.
RUN = """
import sys
from pathlib import Path

def run(folder):
    import psutil
    from megatron_scalebio.cli import main
    from tests.markov import write_two_sources
    every = {"train": {"train_iters": 2, "global_batch_size": 4, "micro_batch_size": 2}}
    config = write_two_sources(folder, **every, checkpoint={"save_interval": 1})
    assert main(["reweight", "--config", str(config), "--output", str(folder / "run")]) == 0
    for each in psutil.Process().children():
        heavy = any("libtorch" in mapped.path for mapped in each.memory_maps())
        print("started", "torch" if heavy else "light")

if __name__ == "__main__":
    run(Path(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel offers it")
def test_they_ignore_a_stop_signal_and_die_with_the_rank() -> None:
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    family: list[psutil.Process] = []
    try:
        assert rank.stdout and rank.stdout.readline() == "writing\n"
        family = psutil.Process(rank.pid).children(recursive=True)
        assert len([each for each in family if "resource_tracker" not in each.cmdline()[-1]]) == 2
        for each in family:
            each.send_signal(signal.SIGTERM)
            each.send_signal(signal.SIGUSR1)
        assert set(psutil.wait_procs(family, timeout=1)[1]) == set(family)
        rank.kill()
        assert psutil.wait_procs(family, timeout=10)[1] == []
    finally:
        for each in (rank, *family):
            kill_all(each.pid)
        finish(rank, 10)


def test_the_manager_does_not_import_torch(tmp_path: Path) -> None:
    """It would cost each rank 3 s of a core and 300 MB."""
    said = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    started = [line for line in said.stdout.splitlines() if line.startswith("started")]
    assert started and set(started) == {"started light"}, said.stdout + said.stderr
    assert len(list((tmp_path / "run" / "checkpoints").glob("iter_*"))) == 2
