"""reweight.sbatch on two nodes: whatever stops a job, its weights are those of a quiet run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT, metrics
from tests.slurm.cluster import NODES, Cluster, Job
from tests.slurm.conftest import STEPS

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SCRIPT = ROOT / "launch" / "slurm" / "reweight.sbatch"


def weights(run: Path) -> dict[str, Any]:
    return json.loads((run / "weights.json").read_text())


def start(cluster: Cluster, config: Path, run: Path, *sbatch: str, **environment: str) -> Job:
    """Submits a run from the folder that `run` is in; logs go there, too."""
    flags = ("--config", config, "--output", run.name)
    return cluster.submit(*sbatch, SCRIPT, *flags, cwd=run.parent, **environment)


@pytest.fixture(scope="module")
def quiet(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    run = tmp_path_factory.mktemp("quiet") / "run"
    job = start(cluster, config, run)
    job.wait_for("COMPLETED")
    assert job["Restarts"] == "0" and job["ExitCode"] == "0:0"
    return run


def assert_same(run: Path, quiet: Path) -> None:
    assert metrics(run) == metrics(quiet)
    assert weights(run) == weights(quiet)


def test_two_nodes_learn_weights_and_each_rank_has_a_log(quiet: Path) -> None:
    learned = weights(quiet)
    assert learned["step"] == STEPS
    assert sum(source["weight"] for source in learned["sources"]) == pytest.approx(1)
    assert json.loads((quiet / "run.json").read_text())["world"]["pp"] == 2
    (logs,) = (quiet.parent / "logs").iterdir()
    assert [log.name for log in sorted(logs.iterdir())] == ["rank-000.log", "rank-001.log"]
    assert f"step {STEPS}/{STEPS}" in (logs / "rank-000.log").read_text()


def test_scontrol_requeue_goes_on_from_where_it_was(
    cluster: Cluster, config: Path, quiet: Path, tmp_path: Path
) -> None:
    job = start(cluster, config, tmp_path / "run")
    job.wait_for_steps(tmp_path / "run", 17)
    cluster.run("scontrol", "requeue", job.id)
    job.wait_for("COMPLETED")
    assert job["Restarts"] == "1"
    assert resumed_from(job) >= 17, "SIGTERM saved, beyond the checkpoint of step 15"
    assert_same(tmp_path / "run", quiet)


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(
    cluster: Cluster, config: Path, quiet: Path, tmp_path: Path
) -> None:
    job = start(cluster, config, tmp_path / "run")
    job.wait_for_steps(tmp_path / "run", 17)
    cluster.kill_node(NODES[1])
    job.wait_for("PENDING")
    cluster.start_node(NODES[1])
    job.wait_for("COMPLETED")
    assert resumed_from(job) == 15
    assert_same(tmp_path / "run", quiet)


def resumed_from(job: Job) -> int:
    return int(job.log().rpartition("from step ")[2].split()[0])


def test_cancelling_saves_and_is_final(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    job = start(cluster, config, tmp_path / "run")
    job.wait_for_steps(tmp_path / "run", 3)
    cluster.run("scancel", job.id)
    job.wait_for("CANCELLED")
    assert job["ExitCode"] == "3:0" and job["Restarts"] == "0"
    assert "stopped from outside" in job.log()
    assert list((tmp_path / "run" / "checkpoints").glob("iter_*")), job.log()


def test_requeues_are_limited(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    job = start(cluster, config, tmp_path / "run", MAX_REQUEUES="0")
    job.wait_for_steps(tmp_path / "run", 3)
    cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    job.wait_for("FAILED")
    assert job["ExitCode"] == "3:0" and "MAX_REQUEUES=0 is used up" in job.log()


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [("--lr", "fast", "'fast'"), ("--sources", "a=gone b=gone", "gone: is neither")],
)
def test_a_mistake_is_named_in_the_log_and_not_requeued(
    cluster: Cluster, config: Path, tmp_path: Path, flag: str, value: str, named: str
) -> None:
    words = (SCRIPT, "--config", config, flag, *value.split())
    job = cluster.submit(*words, cwd=tmp_path)
    job.wait_for("FAILED")
    assert job["ExitCode"] == "2:0" and job["Restarts"] == "0"
    (line,) = [line for line in job.log().splitlines() if "reweight.sbatch: refused" in line]
    assert named in line
    [line] = (line for line in job.log().splitlines() if line.startswith("megatron-scalebio: "))
    assert named in line, "rank 0 alone speaks"


@pytest.mark.parametrize(
    ("sbatch", "words", "environment", "complaint"),
    [
        ("", "", {}, "no configuration (add --config"),
        ("", "--config nowhere.yaml", {}, "nowhere.yaml: no such file"),
        ("", "--config=x.yaml", {"PATH": "/usr/bin:/bin"}, "megatron-scalebio is not on PATH"),
        ("", "--config=x.yaml", {"CONTAINER_IMAGE": "x.sqsh"}, "pyxis is not installed"),
        ("--array=1", "--config=x.yaml", {}, "an array needs --output"),
        ("--gpus-per-node=2", "train --config x.yaml", {}, "set --ntasks-per-node=2"),
    ],
)
def test_what_cannot_start_is_refused_in_one_line(
    cluster: Cluster, tmp_path: Path, sbatch: str, words: str, environment: dict, complaint: str
) -> None:
    (tmp_path / "x.yaml").touch()
    words = (*sbatch.split(), SCRIPT, *words.split())
    job = cluster.submit(*words, cwd=tmp_path, **environment)
    job.wait_for("FAILED")
    assert job["ExitCode"] == "2:0"
    (line,) = [line for line in job.log().splitlines() if not line.startswith("---")]
    assert "reweight.sbatch: error: " in line and complaint in line


def test_an_array_is_a_seed_per_task_and_each_is_requeued_alone(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "one-rank.yaml").write_text(
        config.read_text().replace("pipeline_model_parallel_size: 2", "bf16: false")
    )
    array = ("--array=3-4", "--nodes=1", SCRIPT, "--config", "one-rank.yaml", "--output", "sweep")
    seeds = cluster.submit(*array, cwd=tmp_path)
    tasks = {seed: Job(cluster, f"{seeds.id}_{seed}", tmp_path) for seed in (3, 4)}
    # SLURM gives the whole array's number to one of its tasks: that one is asked to save.
    asked = next(seed for seed, job in tasks.items() if job["JobId"] == seeds.id)
    tasks[asked].wait_for_steps(tmp_path / "sweep" / f"seed-{asked}", 5)
    cluster.run("scancel", "--signal=USR1", "--batch", f"{seeds.id}_{asked}")
    for seed, job in tasks.items():
        job.wait_for("COMPLETED")
        assert job["Restarts"] == str(int(seed == asked)), job.log()
        run = tmp_path / "sweep" / f"seed-{seed}"
        assert f"seed: {seed}\n" in (run / "config.yaml").read_text()
    assert weights(tmp_path / "sweep" / "seed-3") != weights(tmp_path / "sweep" / "seed-4")
