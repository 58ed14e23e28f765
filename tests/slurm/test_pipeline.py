"""pipeline.sh: stages run in order, wait through requeues, and stop behind a failure."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.slurm.cluster import Cluster, Job
from tests.slurm.conftest import STEPS

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
PIPELINE = ROOT / "launch" / "slurm" / "pipeline.sh"
# What it notes is the state of things when the stage starts.
NOTE = "wc -l run/metrics.jsonl 2>&1 | cut -d' ' -f1 >> {stage}.txt"


def submit(cluster: Cluster, folder: Path, stages: str, *flags: str) -> dict[str, Job]:
    (folder / "stages.sh").write_text(stages)
    said = cluster.run(PIPELINE, *flags, "stages.sh", cwd=folder)
    lines = [line.partition(": ") for line in said.splitlines() if "left out" not in line]
    return {name: Job(cluster, job, folder) for name, _, job in lines if " " not in name}


def note(stage: str, then: str = "true") -> str:
    return f"{stage}=(sh -c {shlex.quote(NOTE.format(stage=stage) + '; ' + then)})\n"


def test_stages_run_in_order_and_wait_for_a_requeued_one(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    """The signal is the one SLURM sends before a time limit."""
    jobs = submit(
        cluster,
        tmp_path,
        note("prepare")
        + f'reweight=("$LAUNCH/reweight.sbatch" --config {config} --output run)\n'
        + "reweight_sbatch=(--nodes=2 --ntasks-per-node=1)\n"
        + "evaluate=(megatron-scalebio report run)\n"
        + note("sample"),
    )
    assert list(jobs) == ["prepare", "reweight", "sample", "evaluate"], "the order of the stages"
    jobs["reweight"].wait_for_steps(tmp_path / "run", 5)
    cluster.run("scancel", "--signal=USR1", "--batch", jobs["reweight"].id)
    jobs["evaluate"].wait_for("COMPLETED")
    assert jobs["reweight"]["Restarts"] == "1", jobs["reweight"].log()
    assert jobs["prepare"]["JobState"] == jobs["sample"]["JobState"] == "COMPLETED"
    assert (tmp_path / "prepare.txt").read_text().startswith("wc"), "no run yet"
    assert (tmp_path / "sample.txt").read_text() == f"{STEPS}\n", "once, after the last step"


def test_nothing_runs_behind_a_failed_stage(cluster: Cluster, tmp_path: Path) -> None:
    stages = note("prepare") + note("reweight", "exit 2") + note("sample") + note("train")
    jobs = submit(cluster, tmp_path, stages)
    jobs["reweight"].wait_for("FAILED")
    for stage in ("sample", "train"):
        jobs[stage].wait_for("CANCELLED")
        assert not (tmp_path / f"{stage}.txt").exists()


def test_a_stage_that_sbatch_refuses_takes_the_others_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "stages.sh").write_text(
        "all_sbatch=(--begin=now+1hour)\n" + note("prepare") + note("train")
        + "train_sbatch=(--no-such-option)\n"
    )  # fmt: skip
    said = cluster.run(PIPELINE, "stages.sh", cwd=tmp_path, check=False)
    job = said.partition("prepare: ")[2].split()[0]
    assert f"cancelled {job}" in said
    assert Job(cluster, job, tmp_path)["JobState"] == "CANCELLED"


def test_stages_are_selectable_and_words_keep_their_quotes(
    cluster: Cluster, tmp_path: Path
) -> None:
    words = ["a  b", "it's", "$HOME", "", "*"]
    stages = note("prepare") + f"sample=(printf '<%s>' {shlex.join(words)})\n"
    jobs = submit(cluster, tmp_path, stages, "--stages", "sample")
    assert list(jobs) == ["sample"]
    jobs["sample"].wait_for("COMPLETED")
    assert (
        "".join(f"<{word}>" for word in words)
        in (tmp_path / f"slurm-{jobs['sample'].id}.out").read_text()
    )


@pytest.mark.parametrize(
    ("stages", "flags", "complaint"),
    [
        ("prepare='one string'", (), "prepare is not an array"),
        ("prepare=()", (), "prepare is empty"),
        ("x=1", (), "defines none of prepare convert_import"),
        ("prepare=(true)", ("--stages=prepare,trane",), "no stage 'trane'"),
        ("prepare=(true)", ("--stages", "train"), "does not define train"),
    ],
)
def test_mistakes_submit_nothing(
    cluster: Cluster, tmp_path: Path, stages: str, flags: tuple[str, ...], complaint: str
) -> None:
    (tmp_path / "stages.sh").write_text(stages)
    said = cluster.run(PIPELINE, *flags, "stages.sh", cwd=tmp_path, check=False)
    assert "pipeline.sh: error: " in said and complaint in said
    assert "stop them all" not in said


def test_the_example_is_whole(cluster: Cluster) -> None:
    example = PIPELINE.with_name("pipeline.example.sh")
    said = cluster.run(PIPELINE, "--dry-run", example)
    assert said.count("sbatch --parsable") == 7 and "left out" not in said
