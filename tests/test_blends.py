"""`train` follows a schedule of mixtures, and goes on under another one, with new sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.commands import command, ended_well, metrics, note, refused, write_config
from tests.distributed.harness import run_distributed
from tests.markov import write_problem

pytestmark = pytest.mark.distributed
STEPS, JOINED = 8, 4  # a third source comes when half of the steps are made
LONGER = 5  # times as many steps has the training that a search is for
STAGES = [
    {"step": 0, "weights": {"s0": 0.8, "s1": 0.2}},
    {"step": 2, "weights": {"s1": 1.0}},
    {"step": 3, "weights": {"s0": 0.5, "s1": 0.5}},
    {"step": JOINED, "weights": {"s0": 0.2, "s1": 0.3, "s2": 0.5}},
]


def on_one_rank(folder_name: str) -> None:
    import torch.distributed as dist

    folder = Path(folder_name)
    dist.init_process_group("gloo")
    sources, validation = json.loads((folder / "problem.json").read_text())
    for name, stages in (("all", STAGES), ("first", STAGES[:3]), ("disorder", STAGES[::-1])):
        (folder / f"{name}.json").write_text(json.dumps({"stages": stages}))

    def run(stage: str, name: str, count: int, steps: int, *words: object, **more: Any) -> None:
        steady = {"lr_decay_style": "constant", "lr_warmup_fraction": 0.0}
        config = write_config(
            folder / "x.yaml", more.get("sources", sources[:count]), validation,
            optimizer=steady, train={"train_iters": steps},
        )  # fmt: skip
        argv = (stage, "--config", config, "--output", folder / (more.get("at") or name), *words)
        note(folder / "noted", name, command(*argv))

    followed = "--blend-schedule"
    run("train", "whole", 3, STEPS, followed, folder / "all.json")
    run("train", "begun", 2, JOINED, followed, folder / "first.json")
    shutil.copytree(folder / "begun", folder / "grown")
    run("train", "grown", 3, STEPS, followed, folder / "all.json")
    run("train", "again", 3, STEPS, followed, folder / "all.json", at="grown")
    shutil.copytree(folder / "begun", folder / "other")
    level = [{**source, "initial_weight": 1.0} for source in sources]
    run("train", "other", 3, STEPS, sources=level)
    turned = [sources[i] for i in (2, 0, 1)]
    run("train", "bad order", 3, STEPS, followed, folder / "all.json", at="begun", sources=turned)
    run("train", "bad stages", 3, STEPS, followed, folder / "disorder.json")
    run("train", "bad both", 3, STEPS, followed, folder / "all.json", "--weights", folder)
    longer = ("--final-train-iters", LONGER * STEPS, "--tolerance", 1e-9)
    run("reweight", "searched", 2, STEPS, *longer)
    run("reweight", "bad stage", 2, STEPS, followed, folder / "first.json")
    run("train", "from a run", 2, LONGER * STEPS, followed, folder / "searched")
    run("train", "too short", 3, JOINED, followed, folder / "all.json")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blends")
    problem = write_problem(
        folder / "data", [0.5, 0.3, 0.2], 0, length=17, examples=12, validation=16
    )
    (folder / "problem.json").write_text(json.dumps(problem))
    run_distributed(on_one_rank, 1, str(folder))
    return folder


def test_each_stage_draws_its_sources(folder: Path) -> None:
    ended_well(folder, "whole")
    for record in metrics(folder / "whole"):
        stage = [each for each in STAGES if each["step"] < record["step"]][-1]
        drawn = {f"s{i}" for i, loss in enumerate(record["loss_w"]) if loss is not None}
        weights: dict[str, float] = stage["weights"]  # type: ignore[assignment]
        assert drawn == set(weights)
        losses = dict(zip(("s0", "s1", "s2"), record["loss_w"], strict=True))
        mean = sum(weight * losses[name] for name, weight in weights.items())
        assert record["train_loss_w"] == pytest.approx(mean, rel=1e-6)


def test_a_source_that_joins_leaves_the_others_where_they_were(folder: Path) -> None:
    ended_well(folder, "begun")
    said = ended_well(folder, "grown")
    words = f"goes on with another mixture from step {JOINED + 1} on, and with more sources: s2"
    assert words not in said, "the schedule is the one that it began with, up to there"
    assert words in ended_well(folder, "other")
    grown, whole = metrics(folder / "grown"), metrics(folder / "whole")
    assert len(grown) == STEPS and grown[JOINED:] == whole[JOINED:]
    for early, late in zip(metrics(folder / "begun"), whole, strict=False):
        assert early["train_loss_w"] == late["train_loss_w"]
    assert "from step 8" in ended_well(folder, "again")


def test_a_search_writes_what_train_follows(folder: Path) -> None:
    ended_well(folder, "searched")
    schedule = json.loads((folder / "searched" / "blend_schedule.json").read_text())
    blend = (folder / "searched" / "blend.txt").read_text().split()
    # The mixture moves with every step, so each is a stage; a record has the one before its step.
    assert [stage["step"] for stage in schedule["stages"]] == list(range(0, LONGER * STEPS, LONGER))
    for stage, after in zip(schedule["stages"], metrics(folder / "searched")[1:], strict=False):
        assert list(stage["weights"].values()) == pytest.approx(after["weights"], rel=1e-6)
    for stage in schedule["stages"]:
        assert set(stage["weights"]) == {"s0", "s1"}
        assert stage["blend"].split()[1::2] == blend[1::2]
    ended_well(folder, "from a run")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "bad order",
            "of other sources: s2 not there before (choose a new train.output, or name new",
        ),
        ("bad stages", "disorder.json: stages[0].step: 4 leaves the steps before it no mixture"),
        ("too short", "all.json has a stage from step 4 on, and this training ends at step 4 ("),
        ("bad both", "and weights both give weights (drop one)"),
        ("bad stage", "first.json' is for `train`, which follows it (drop it)"),
    ],
)
def test_what_no_training_can_follow_is_one_line(folder: Path, name: str, words: str) -> None:
    refused(folder, name, words)
