"""How many ranks there are, and which is the first, from what SLURM 22.05 was seen to set."""

from __future__ import annotations

import pytest

from megatron_scalebio import launcher
from megatron_scalebio.cli import main
from megatron_scalebio.convert.ranks import joined

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
