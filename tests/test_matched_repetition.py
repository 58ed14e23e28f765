"""The search repeats each source as the final training will: from few rows, always the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_scalebio.data.sources import ExampleSource
from megatron_scalebio.methods import end_check
from tests.commands import command, found_weights, metrics, note, refused, write_config
from tests.distributed.harness import run_distributed
from tests.markov import write_problem

pytestmark = pytest.mark.distributed
SIZES = [400, 40, 200]
STEPS, TARGET = 40, 3200  # of 8 examples: a tenth of the target
KEPT = [40, 4, 20]


def seen_rows(folder: Path, name: str, **train: Any) -> dict[str, list[int]]:
    """A run's rows of each source, with a check of the weights at its end."""
    sources, validation = json.loads((folder / "problem.json").read_text())
    config = write_config(
        folder / f"{name}.yaml", sources, validation,
        data={"matched_repetition": True, "target_examples": TARGET, "max_epochs": 90},
        train={"train_iters": STEPS, **train}, checkpoint={"save_interval": 20},
    )  # fmt: skip
    seen: dict[str, set[int]] = {}
    example = ExampleSource.example

    def noted(self: ExampleSource, index: int) -> Any:
        seen.setdefault(self.name, set()).add(int(index))
        return example(self, index)

    with (
        mock.patch.object(ExampleSource, "example", noted),
        mock.patch.object(end_check, "COST", 2),
    ):
        outcome = command("reweight", "--config", config, "--output", folder / name)
    note(folder / "noted", name, outcome)
    return {source["name"]: sorted(seen.get(source["name"], ())) for source in sources}


def on_one_rank(folder_name: str) -> None:
    import torch.distributed as dist

    folder = Path(folder_name)
    dist.init_process_group("gloo")
    found = {"first": seen_rows(folder, "first"), "other seed": seen_rows(folder, "s", seed=5)}
    shutil.copytree(folder / "first", folder / "again")
    shutil.rmtree(folder / "again" / "checkpoints" / f"iter_{STEPS:07d}")
    found["again"] = seen_rows(folder, "again")
    found["longer"] = seen_rows(folder, "longer", train_iters=2 * STEPS)
    (folder / "rows.json").write_text(json.dumps(found))
    config, long = folder / "first.yaml", ("--target-examples", 8 * STEPS)
    outcome = command("reweight", "--config", config, "--output", folder / "long", *long)
    note(folder / "noted", "long", outcome)
    outcome = command("reweight", "--config", config, "--output", folder / "x", "--method", "doge")
    note(folder / "noted", "doge", outcome)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matched")
    problem = write_problem(folder / "data", [0.3, 0.6, 0.1], 0, 17, SIZES, 200)
    (folder / "problem.json").write_text(json.dumps(problem))
    run_distributed(on_one_rank, 1, str(folder))
    return folder


def rows(folder: Path) -> dict[str, dict[str, list[int]]]:
    return json.loads((folder / "rows.json").read_text())


def test_a_source_offers_its_share_of_rows_spread_over_all(folder: Path) -> None:
    content, said = found_weights(folder, "first")
    assert [source["rows_kept"] for source in content["sources"]] == KEPT
    assert "final_check" in content, "which sees no other rows either"
    kept = rows(folder)["first"]
    assert [len(kept[name]) for name in ("s0", "s1", "s2")] == KEPT
    assert all(max(kept[f"s{i}"]) < size for i, size in enumerate(SIZES))
    assert abs(np.mean(kept["s0"]) - 199.5) < 60, "not the first ones"
    assert "final training will: s1 4 of 40, s2 20 of 200, s0 40 of 400" in said


def test_which_rows_is_the_seeds_to_say(folder: Path) -> None:
    found = rows(folder)
    assert found["other seed"]["s0"] != found["first"]["s0"]
    assert set(found["first"]["s0"]) < set(found["longer"]["s0"]), "a longer run adds some"
    assert len(found["longer"]["s1"]) == 8


def test_a_resumed_run_keeps_the_same_rows(folder: Path) -> None:
    found = rows(folder)
    assert all(set(found["again"][name]) <= set(found["first"][name]) for name in found["again"])
    assert metrics(folder / "again") == metrics(folder / "first")


def test_a_search_as_long_as_the_training_keeps_all_rows(folder: Path) -> None:
    content, _ = found_weights(folder, "long")
    assert [source["rows_kept"] for source in content["sources"]] == SIZES


def test_other_methods_refuse_it(folder: Path) -> None:
    refused(folder, "doge", "data.matched_repetition: the method 'doge' does not support it")
