"""local.sh: torchrun on this machine, which needs no SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, metrics

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def local(*words: object, path: str | None = None) -> subprocess.CompletedProcess[str]:
    activated = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path or activated}
    return subprocess.run(
        [str(ROOT / "launch" / "local.sh"), *map(str, words)], env=environment,
        capture_output=True, text=True, check=False, timeout=150,
    )  # fmt: skip


def test_ranks_are_as_many_as_asked_for(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = local("-n", 2, "--config", config, "--output", run, "--train-iters", 3)
    assert done.returncode == 0, done.stderr
    assert len(metrics(run)) == 3
    assert json.loads((run / "run.json").read_text())["world"]["pp"] == 2


@pytest.mark.parametrize(
    ("words", "path", "complaint"),
    [
        (("-n", "two"), None, "-n two: not a number of ranks"),
        (("--config", "x.yaml"), None, "--config x.yaml: no such file"),
        (("--train-iters", "3"), "/usr/bin:/bin", "torchrun is not on PATH"),
    ],
)
def test_what_cannot_start_is_refused(words: tuple, path: str | None, complaint: str) -> None:
    done = local(*words, path=path)
    assert done.returncode == 2 and complaint in done.stderr


@pytest.mark.parametrize("stage", ["prepare", "convert_import", "reweight", "sample", "train",
                                   "convert_export", "evaluate"])  # fmt: skip
def test_the_example_of_a_pipeline_lacks_nothing_but_files(tmp_path: Path, stage: str) -> None:
    """Where there are none, every stage's first complaint is of a file, not of an option."""
    example = ROOT / "launch" / "slurm" / "pipeline.example.sh"
    script = f'LAUNCH=launch; source "$1"; printf "%s\\n" "${{{stage}[@]}}"'
    shown = subprocess.run(
        ["bash", "-c", script, "bash", str(example)], capture_output=True, text=True, check=True
    )
    words = shown.stdout.splitlines()
    if words[0] == "launch/reweight.sbatch":  # adds the command where none is named
        words[0:1] = [] if not words[1].startswith("-") else ["reweight"]
    else:
        assert words.pop(0) == "megatron-scalebio"
    code, said = command(*words, folder=tmp_path)
    assert code == 2, said
    assert "no such" in said.lower() or "not exist" in said, said


def command(*words: str, folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_scalebio", *words], cwd=folder, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, check=False, timeout=150,
    )  # fmt: skip
    return done.returncode, done.stderr
