"""Faults of a cluster, on real runs: nothing is lost beyond the steps since the last checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_scalebio.guard.lock import LOCK_FILE
from tests.commands import (
    command,
    kill_all,
    metrics,
    note,
    noted,
    start_command,
    the_only_line,
    wait_for_steps,
    write_config,
)
from tests.distributed.harness import run_distributed
from tests.markov import write_problem

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SAVED = 3
FOREVER = ["--train-iters", 100_000, "--lr-decay-style", "constant", "--lr-warmup-fraction", 0]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    sources, validation = write_problem(
        folder / "data", [0.6, 0.4], 0, length=17, examples=40, validation=40
    )
    write_config(folder / "x.yaml", sources, validation, checkpoint={"save_interval": SAVED})
    return folder


# ---- two runs in one folder ------------------------------------------------------------------


def second_runs(folder_name: str, pid: int) -> None:
    """Two ranks that may not run while another one does; then it is killed, and they go on."""
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    flags = ["--config", folder / "x.yaml", "--output", folder / "shared"]
    for stage in ("reweight", "train"):
        note(folder / "noted", f"second {stage}", command(stage, *flags))
    reached = len(metrics(folder / "shared"))
    if dist.get_rank() == 0:
        kill_all(pid)
    dist.barrier()
    few_more = [*FOREVER[2:], "--train-iters", reached + 9]
    note(folder / "noted", "after", command("reweight", *flags, *few_more))


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(problem: Path) -> None:
    run = problem / "shared"
    flags = ["--config", problem / "x.yaml", "--output", run, *FOREVER]
    process = start_command("reweight", *flags)
    try:
        wait_for_steps(run, 2 * SAVED)
        run_distributed(second_runs, 2, str(problem), process.pid)
    finally:
        kill_all(process.pid)
        process.communicate()
    for stage in ("reweight", "train"):
        code, said = noted(problem / "noted", f"second {stage}")
        assert code == 2
        line = the_only_line(said)
        assert "shared: another run writes here (" in line and f"pid {process.pid})" in line
        assert noted(problem / "noted", f"second {stage}", rank=1) == (2, "")
    code, said = noted(problem / "noted", "after")
    assert code == 0 and "from step " in said, said
    steps = [record["step"] for record in metrics(run)]
    assert steps == list(range(1, len(steps) + 1)), "nothing is lost, nothing is there twice"
    assert not (run / LOCK_FILE).exists()
