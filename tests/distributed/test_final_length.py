"""A mixture is for a training of some length: who asks it of a search much longer is told so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.commands import command, note, noted
from tests.distributed.harness import run_distributed
from tests.distributed.small_runs import BATCH, PLAIN, tree_of, write_problem

pytestmark = pytest.mark.distributed
STEPS = 12
SEARCHES = {"as-long": [], "third": ["--final-train-iters", 4], "more": ["--final-train-iters", 5]}
TRAININGS = {4: True, 5: False}  # steps: whether it is warned of


def on_a_rank(folder_name: str) -> None:
    import torch.distributed as dist

    folder = Path(folder_name)
    dist.init_process_group("gloo")
    config = ["--config", folder / "x.yaml", "--output"]
    for name, flags in SEARCHES.items():
        outcome = command("reweight", *config, folder / name, *flags, "--train-iters", STEPS)
        note(folder / "noted", name, outcome)
    for steps in TRAININGS:
        words = ["--weights", folder / "as-long", "--train-iters", steps]
        note(folder / "noted", f"train-{steps}",
             command("train", *config, folder / f"train-{steps}", *words))  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("length")
    (folder / "data").mkdir()
    write_problem(folder / "data")
    (folder / "x.yaml").write_text(
        yaml.safe_dump(tree_of({"optimizer": PLAIN, "train": BATCH}, folder))
    )
    run_distributed(on_a_rank, 1, str(folder))
    return folder


@pytest.mark.parametrize(("name", "steps"), [("as-long", STEPS), ("third", 4), ("more", 5)])
def test_a_search_says_for_which_length_its_weights_are(runs: Path, name: str, steps: int) -> None:
    code, said = noted(runs / "noted", name)
    assert code == 0, said
    assert json.loads((runs / name / "weights.json").read_text())["final_train_iters"] == steps
    assert ("search with train_iters 4)" in said) == (name == "third")


@pytest.mark.parametrize("steps", TRAININGS)
def test_a_much_shorter_training_is_told(runs: Path, steps: int) -> None:
    code, said = noted(runs / "noted", f"train-{steps}")
    assert code == 0, said
    assert (f"a training of {STEPS} steps, this one has {steps}" in said) == TRAININGS[steps]
