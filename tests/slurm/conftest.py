"""One SLURM for all tests of this folder, and a small problem that its jobs reweight."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import write_config
from tests.markov import write_problem
from tests.slurm import cluster as slurm

STEPS = 40


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm.Cluster]:
    reason = slurm.why_not()
    if reason:
        pytest.skip(reason)
    # Not pytest's folder: the path of munge's socket has to be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = slurm.Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, one pipeline stage on each of two nodes, a checkpoint every 15 steps."""
    folder = tmp_path_factory.mktemp("problem")
    sources, validation = write_problem(
        folder / "data", [0.6, 0.4], 0, length=17, examples=40, validation=40
    )
    return write_config(
        folder / "run.yaml", sources, validation,
        train={"train_iters": STEPS}, checkpoint={"save_interval": 15},
        parallel={"pipeline_model_parallel_size": 2},
    )  # fmt: skip
