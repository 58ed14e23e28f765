"""Checkpoints that the package wrote on Megatron-Core 0.16.1 resume: the same steps follow.

The archive holds, for each of three runs of 6 steps, its checkpoint of step 4 and the lines of
metrics.jsonl of the steps after it, as they were then (Python 3.12, torch 2.13).
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from megatron_scalebio.convert.megatron_reader import padding_multiple
from tests.commands import command, metrics, note, noted
from tests.distributed.harness import run_distributed
from tests.markov import write_two_sources

pytestmark = pytest.mark.distributed
ARCHIVE = Path(__file__).with_name("written_by_0_16.tar.xz")
SHARDED = ["--bf16", "--use-distributed-optimizer", "--lisa-layers", 1, "--lisa-interval", 3]
RUNS = {"plain": ("reweight", []), "sharded": ("reweight", SHARDED), "train": ("train", [])}
LOSSES = (
    "loss_w", "loss_u", "excess_loss", "validation_losses", "weights", "grad_norm_w", "grad_norm_u",
    "lr_w", "lr_lambda", "tokens",
)  # fmt: skip


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("from 0.16")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder / "then", filter="data")
    write_two_sources(
        folder, 20, 20, model={"hidden_size": 16, "ffn_hidden_size": 24},
        bilevel={"resync_interval": 3}, optimizer={"lr": 3e-3},
        checkpoint={"save_interval": 4}, train={"train_iters": 6},
    )  # fmt: skip
    run_distributed(resume, 1, str(folder))
    return folder


def resume(folder_name: str) -> None:
    folder = Path(folder_name)
    for name, (stage, flags) in RUNS.items():
        words = ["--output", folder / name, "--load", folder / "then" / name, *flags]
        note(folder / "noted", name, command(stage, "--config", folder / "x.yaml", *words))


@pytest.mark.parametrize("name", RUNS)
def test_the_steps_after_it_are_those_of_then(resumed: Path, name: str) -> None:
    code, said = noted(resumed / "noted", name)
    assert code == 0 and "from step 4" in said, said
    then = (resumed / "then" / name / "metrics.jsonl").read_text().splitlines()
    wanted = [json.loads(line) for line in then]
    got = metrics(resumed / name)
    assert [record["step"] for record in got] == [5, 6]
    if name == "plain":
        # λ goes by excess losses of 2e-5, where those of another processor differ by 1e-8: what it
        # moved by is compared in their units, and far closer than weights could be.
        assert moved_by(got) == pytest.approx(moved_by(wanted), rel=1e-4)
        got[1]["weights"] = wanted[1]["weights"]
    for ours, theirs in zip(got, wanted, strict=True):
        for field in theirs.keys() & set(LOSSES):
            # Another processor or torch rounds otherwise; in bf16 to 3 digits.
            tolerance = 1e-5 if name != "sharded" else 2e-3
            assert ours[field] == pytest.approx(theirs[field], rel=tolerance, abs=tolerance), field


def moved_by(records: list[dict]) -> float:
    """The first source's gain of weight in a step, per difference of the sources' excess losses."""
    first, second = (record["weights"][0] for record in records)
    one, other = records[0]["excess_loss"]
    return (second - first) / (one - other)


def test_its_arguments_are_read(resumed: Path) -> None:
    assert padding_multiple(resumed / "then" / "plain" / "iter_0000004") == 16
    assert padding_multiple(resumed / "plain" / "checkpoints" / "iter_0000006") == 16
