"""SIGTERM and SIGUSR1: the step is finished and saved, the exit code is 3, and the run resumes."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.commands import (
    command,
    metrics,
    note,
    noted,
    start_command,
    wait_for_steps,
)
from tests.distributed.harness import run_distributed
from tests.markov import write_two_sources
from tests.processes import finish

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    # More steps than any run here gets to: the rates do not decay meanwhile.
    write_two_sources(folder, train={"train_iters": 100_000}, checkpoint={"save_interval": 0})
    return folder


def saved_step(run: Path) -> int:
    return int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())


def test_the_command_saves_after_its_step_and_exits_3(problem: Path) -> None:
    run = problem / "bare"
    process = start_command("reweight", "--config", problem / "x.yaml", "--output", run)
    wait_for_steps(run, 3)
    process.send_signal(signal.SIGTERM)
    said, complained = finish(process)
    assert process.returncode == 3, complained
    assert "Traceback" not in complained and said == ""
    steps = [record["step"] for record in metrics(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert saved_step(run) == steps[-1]
    for name in ("weights.json", "blend.txt", "report.html"):
        assert (run / name).is_file(), "what was learned so far is there"
    assert json.loads((run / "weights.json").read_text())["complete"] is False
    again = f"python -m megatron_scalebio reweight --config {problem}/x.yaml --output {run}\n"
    assert (run / "command.txt").read_text() == again


def signalled(folder_name: str) -> None:
    """One of two ranks gets SIGUSR1; both stop, and both go on. SIGTERM then ends that."""
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    flags = ["--config", folder / "x.yaml", "--pipeline-model-parallel-size", 2]
    for name, number, rank, steps in (
        ("first", signal.SIGUSR1, 1, 3),
        ("second", signal.SIGTERM, 0, 6),
    ):
        if dist.get_rank() == rank:
            send = threading.Thread(target=send_at, args=(folder / "two", steps, number))
            send.start()
        note(folder / "noted", name, command("reweight", *flags, "--output", folder / "two"))
    whole = ["--output", folder / "whole"]
    if dist.get_rank() == 0:
        steps = len(metrics(folder / "two"))
        threading.Thread(target=send_at, args=(folder / "whole", steps, signal.SIGTERM)).start()
    note(folder / "noted", "whole", command("reweight", *flags, *whole))


def send_at(run: Path, steps: int, number: int) -> None:
    wait_for_steps(run, steps)
    os.kill(os.getpid(), number)


def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_as_if_it_had_not(problem: Path) -> None:
    run_distributed(signalled, 2, str(problem))
    for name in ("first", "second", "whole"):
        for rank in (0, 1):
            code, said = noted(problem / "noted", name, rank)
            assert code == 3 and "Traceback" not in said, said
    interrupted, whole = metrics(problem / "two"), metrics(problem / "whole")
    resumed_from = int(noted(problem / "noted", "second")[1].partition("from step ")[2].split()[0])
    assert 3 <= resumed_from < len(interrupted) == saved_step(problem / "two")
    assert interrupted == whole[: len(interrupted)]


def test_ctrl_c_saves_too_and_says_so(problem: Path) -> None:
    run = problem / "interrupted"
    process = start_command("reweight", "--config", problem / "x.yaml", "--output", run)
    wait_for_steps(run, 3)
    process.send_signal(signal.SIGINT)
    _, complained = finish(process)
    assert process.returncode == 3, complained
    assert saved_step(run) == len(metrics(run))
    assert f"saved at step {saved_step(run)}; the same command continues" in complained
