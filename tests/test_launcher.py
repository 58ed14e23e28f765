"""How many ranks there are, and which is the first, from what SLURM 22.05 was seen to set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scalebio import launcher
from megatron_scalebio.cli import main
from megatron_scalebio.convert.ranks import joined
from tests.commands import ROOT, the_only_line
from tests.ports import free_port

SBATCH = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
STEP = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}
SALLOC = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"}
NEW_SBATCH = {**SBATCH, "SLURM_STEP_ID": "4294967291"}


@pytest.mark.parametrize(
    ("environment", "ranks", "first"),
    [
        ({}, 1, True),
        ({"SLURM_NTASKS": "2"}, 1, True),  # salloc without an interactive step
        (SBATCH, 1, True),
        (NEW_SBATCH, 1, True),
        (SALLOC, 1, True),
        (STEP, 2, False),
        ({**STEP, "SLURM_PROCID": "0"}, 2, True),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 4, False),
        ({**STEP, "RANK": "0", "WORLD_SIZE": "4"}, 4, True),  # torchrun under srun
    ],
)
def test_ranks_are_those_that_a_launcher_started(
    environment: dict[str, str], ranks: int, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in launcher.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher.world_size_from_environment() == ranks
    assert launcher.is_first_rank() is first
    if ranks == 1:  # a conversion waits for nobody
        with joined() as here:
            assert here.size == 1


def test_ranks_of_a_node_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    for ranks, share in (("", 6), ("2", 3), ("4", 1), ("8", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert launcher.cores() == share


@pytest.mark.parametrize(
    ("environment", "waits"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, False),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),  # nobody ends the first rank
    ],
)
def test_under_torchrun_other_ranks_end_after_the_first_has_spoken(
    environment: dict[str, str], waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*launcher.VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    waited: list[float] = []
    monkeypatch.setattr(launcher.time, "sleep", waited.append)
    assert main(["reweight", "--lr", "-1"]) == 2
    assert bool(waited) is waits


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "n1"}
MEET = "--nnodes 2 --rdzv_backend c10d --rdzv_endpoint n1"


@pytest.mark.parametrize(
    ("environment", "program", "start"),
    [
        ({}, "/x/bin/megatron-scalebio", "megatron-scalebio"),
        ({}, "/x/megatron_scalebio/__main__.py", "python -m megatron_scalebio"),
        (SBATCH, "/x/bin/megatron-scalebio", "megatron-scalebio"),
        (STEP, "/x/bin/megatron-scalebio", "srun -n 2 python -m megatron_scalebio"),
        (
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, "/x/megatron_scalebio/__main__.py",
            "torchrun --nproc_per_node 4 -m megatron_scalebio",
        ),
        (
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, "/x/megatron_scalebio/__main__.py",
            f"torchrun {MEET} --nproc_per_node 2 -m megatron_scalebio",
        ),
    ],
)  # fmt: skip
def test_the_command_that_starts_the_ranks_again(
    environment: dict[str, str], program: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*launcher.VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = ["train", "--config", "my run.yaml", "--sources", "a=$x"]
    monkeypatch.setattr(sys, "argv", [program, *words])
    said = launcher.command_line()
    assert said == f"{start} train --config 'my run.yaml' --sources 'a=$x'"
    shell = ["bash", "-c", f"printf '%s\\n' {said}"]
    told = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [*start.split(), *words]


def of_srun(*folders: Path, command: str) -> list[tuple[int, str]]:
    """What the ranks of a srun end with, and say, each in its folder; 9 if one comes to torch."""
    (folders[0] / "torch.py").write_text("raise SystemExit(9)")
    clean = {k: v for k, v in os.environ.items() if k not in launcher.VARIABLES}
    clean |= {"PYTHONPATH": f"{folders[0]}:{ROOT}", "MASTER_ADDR": "localhost"}
    clean |= {"SLURM_NTASKS": str(len(folders)), "SLURM_STEP_ID": "0"}
    clean |= {"MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_scalebio", *command.split()], cwd=folder, text=True,
            env={**clean, "SLURM_PROCID": str(rank)}, stderr=subprocess.PIPE,
        )
        for rank, folder in enumerate(folders)
    ]  # fmt: skip
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


@pytest.mark.parametrize(
    "command",
    [
        "reweight --sources a=data/a b=data/b --validation v=data/v --output run",
        "convert export --load data/a --hf-reference hf --save model",
        "evaluate --hf hf --test t=data/a --output run",
    ],
)
def test_all_ranks_of_srun_refuse_a_path_before_they_import_torch(
    command: str, tmp_path: Path
) -> None:
    [(code, said), *others] = of_srun(*[tmp_path] * 3, command=command)
    assert code == 2 and "data/a" in the_only_line(said)
    assert others == [(2, "")] * 2


@pytest.mark.parametrize("lacking", [0, 1])
def test_what_one_rank_of_srun_alone_lacks_is_left_to_all_of_them(
    lacking: int, tmp_path: Path
) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        if rank != lacking:
            for name in ("a.bin", "a.idx"):
                (folder / name).touch()
    command = "reweight --sources a=a b=a --validation v=a --output run"
    assert of_srun(*folders, command=command) == [(9, "")] * 2
