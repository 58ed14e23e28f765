"""Faults of a cluster, on real runs: nothing is lost beyond the steps since the last checkpoint."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from megatron_scalebio.checkpoint.folder import newest_whole
from megatron_scalebio.guard.lock import LOCK_FILE
from megatron_scalebio.guard.watchdog import BEAT_S
from tests.commands import (
    command,
    metrics,
    note,
    noted,
    start_command,
    the_only_line,
    wait_for_steps,
)
from tests.distributed.harness import run_distributed
from tests.markov import write_two_sources
from tests.processes import finish, kill_all

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SAVED = 3
FOREVER = ["--train-iters", 100_000, "--lr-decay-style", "constant", "--lr-warmup-fraction", 0]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_two_sources(folder, checkpoint={"save_interval": SAVED})
    return folder


# ---- two runs in one folder ------------------------------------------------------------------


def second_runs(folder_name: str, pid: int) -> None:
    """Two ranks that may not run while another one does; then it is killed, and they go on."""
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    flags = ["--config", folder / "x.yaml", "--output", folder / "shared"]
    for stage in ("reweight", "train"):
        note(folder / "noted", f"second {stage}", command(stage, *flags))
    if dist.get_rank() == 0:
        kill_all(pid)
    dist.barrier()
    reached = len((folder / "shared" / "metrics.jsonl").read_bytes().splitlines())
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
        finish(process)
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


# ---- a rank that is killed -------------------------------------------------------------------


def test_a_killed_rank_is_named_and_costs_the_steps_since_the_last_checkpoint(
    problem: Path,
) -> None:
    run = problem / "killed"
    process = start_command(
        "reweight", "--config", problem / "x.yaml", "--output", run, *FOREVER, ranks=2
    )
    try:
        wait_for_steps(run, 2 * SAVED)
        time.sleep(3 * BEAT_S)  # a rank tells where it is no more often
        [victim] = [
            child for child in psutil.Process(process.pid).children()
            if child.environ().get("RANK") == "1"
        ]  # fmt: skip
        victim.kill()
        _, complained = finish(process)  # its helpers, which write there too, are dead as well
    finally:
        kill_all(process.pid)
    ours = [line for line in complained.splitlines() if line.startswith("megatron-scalebio: error")]
    assert len(ours) == 1, complained
    assert f"pid {victim.pid}) died, last heard of in step " in ours[0]
    assert ours[0] in complained.rpartition("ChildFailedError")[2]  # torchrun's last words
    assert process.returncode != 0
    step, problems = newest_whole(run / "checkpoints")
    assert step is not None and not problems and step >= len(metrics(run)) - SAVED
    again = f"torchrun --nproc_per_node 2 -m megatron_scalebio reweight --config {problem}/x.yaml "
    assert (run / "command.txt").read_text().startswith(again)


# ---- files that were damaged behind the index, and a loss that jumps ---------------------------


def write_into(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(content)


def faulty_data(folder_name: str) -> None:
    """Runs on two ranks of which one alone meets the fault, and a run whose loss jumps."""
    from megatron_scalebio.data import scan

    scan.IDS_LOOKED_AT = 64  # the head of a file is looked at when it is opened
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    good = folder / "data" / "s0"
    for name, file, content in (
        ("id", "tokens.bin", b"\xff\xff"),
        ("mask", "loss_mask.bin", b"\x07"),
    ):
        source = folder / f"bad {name}" / "s1"
        if dist.get_rank() == 0:
            shutil.copytree(folder / "data" / "s1", source)
            # In the middle of its last example.
            write_into(source / file, (source / file).stat().st_size - 6, content)
        dist.barrier()
        for stage in ("reweight", "train"):
            words = ["--sources", f"s0={good}", f"s1={source}", "--output", folder / name / stage]
            words += ["--train-iters", 60]
            outcome = command(stage, "--config", folder / "x.yaml", *words)
            note(folder / "noted", f"{name} {stage}", outcome)
    spikes(folder)


def spikes(folder: Path) -> None:
    """From step 40 on u's loss comes out tenfold; once in a step of another run, and its resume."""
    from megatron_scalebio.core import training

    reduce, steps = training.reduce_losses, [0]
    spoils: set[int] = set()

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        losses = reduce(*args, **kwargs)
        steps[0] += 1
        return replace(losses, u_S=10 * losses.u_S) if steps[0] in spoils else losses

    training.reduce_losses = spoilt
    base = ["--config", folder / "x.yaml", "--log-interval", 5, "--save-interval", 10]
    for name, when, iters in (
        ("broken", range(40, 99), 60), ("once", [40], 44), ("once", [], 48),
    ):  # fmt: skip
        steps[0] = 0
        spoils.clear()
        spoils.update(when)
        words = ["reweight", *base, "--output", folder / name, "--train-iters", iters]
        note(folder / "noted", f"{name} {iters}", command(*words))
    training.reduce_losses = reduce


@pytest.fixture(scope="module")
def faulty(problem: Path) -> Path:
    run_distributed(faulty_data, 2, str(problem))
    return problem


@pytest.mark.parametrize("stage", ["reweight", "train"])
def test_damage_behind_the_index_is_named_with_its_example(faulty: Path, stage: str) -> None:
    for name, words in (
        (
            "id",
            "tokens.bin: example 39 of source 's1' holds token 65535, the vocabulary ends at 31",
        ),
        ("mask", "loss_mask.bin: example 39 of source 's1' holds 7, not 0 or 1"),
    ):
        code, said = noted(faulty / "noted", f"{name} {stage}")
        assert code == 2 and words in the_only_line(said.strip().splitlines()[-1]), said
        assert "Traceback" not in said
        assert noted(faulty / "noted", f"{name} {stage}", rank=1) == (2, "")


def test_a_spike_is_not_applied_and_those_that_stay_end_the_run(faulty: Path) -> None:
    code, said = noted(faulty / "noted", "broken 60")
    last = said.strip().splitlines()[-1]
    assert code == 2 and "step 44: 5 steps in a row were not applied: u: training loss is" in last
    records = metrics(faulty / "broken")
    assert [record["step"] for record in records if record["skipped"]] == [40, 41, 42, 43, 44]
    assert [r["weights"] for r in records[39:]] == [records[39]["weights"]] * 5
    assert newest_whole(faulty / "broken" / "checkpoints") == (30, []), "that of before is kept"


def test_one_spike_costs_its_step(faulty: Path) -> None:
    assert noted(faulty / "noted", "once 44")[0] == 0
    code, said = noted(faulty / "noted", "once 48")
    assert code == 0 and "from step 44" in said, said
    skipped = [record["step"] for record in metrics(faulty / "once") if record["skipped"]]
    assert skipped == [40]


def test_the_slowest_rank_is_in_the_metrics(faulty: Path) -> None:
    lines = (faulty / "once" / "metrics.jsonl").read_text().splitlines()
    found = {r["step"]: r["straggler"] for r in map(json.loads, lines)}
    assert [step for step, slow in found.items() if slow] == list(range(5, 48, 5))
    assert all(s["rank"] in (0, 1) and s["ratio"] >= 1 for s in found.values() if s)
