"""Groups of sources by their gradients, from the command line on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.commands import command, found_weights, metrics, note, noted, refused, write_config
from tests.distributed.harness import run_distributed
from tests.markov import draw, transition_matrices, write_source

pytestmark = pytest.mark.distributed
KIND = {"a": 0, "b": 1, "c": 0, "d": 2, "e": 1, "f": 2, "g": 0}
ALIKE = [["a", "c", "g"], ["b", "e"], ["d", "f"]]
CALLED = ["a + 2", "b + 1", "d + 1"]
LAYOUTS = {
    "two": ["--tensor-model-parallel-size", 2],
    "stages": ["--pipeline-model-parallel-size", 2],
}  # fmt: skip


def run(folder: Path, name: str, *words: object, names: str = "{}", groups: int | None = 3) -> None:
    sources = [{"name": names.format(n), "path": str(folder / "data" / n)} for n in KIND]
    config = write_config(
        folder / f"{name}.yaml", sources, [{"name": "goal", "path": str(folder / "data" / "goal")}],
        bilevel={"group_sources": groups, "final_check": False},
    )  # fmt: skip
    argv = ("--config", config, "--output", folder / name.split(" again")[0], *words)
    note(folder / "noted", name, command("reweight", *argv))


def on_one_rank(folder_name: str) -> None:
    import torch.distributed as dist

    folder = Path(folder_name)
    dist.init_process_group("gloo")
    run(folder, "one")
    run(folder, "one again", "--train-iters", 10)
    run(folder, "one again without", "--train-iters", 12, groups=None)
    run(folder, "one again as another", "--seed", 5)
    written = folder / "one" / "groups.json"
    content = json.loads(written.read_text())
    content["groups"] = [["a"], ["b", "c", "d", "e", "f", "g"]]
    written.write_text(json.dumps(content))
    run(folder, "one again changed", "--train-iters", 12)
    written.write_text("{")
    run(folder, "one again damaged")
    run(folder, "plain", groups=None)
    run(folder, "plain again in groups", "--train-iters", 10)
    run(folder, "as many", groups=len(KIND))
    run(folder, "named", names="x/{}")
    run(folder, "experts", "--num-experts", 2)
    run(folder, "rival", "--method", "doge")
    dist.destroy_process_group()


def on_two_ranks(folder_name: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for name, flags in LAYOUTS.items():
        run(Path(folder_name), name, *flags)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven sources of three kinds, whose names do not tell; validation is of the second."""
    folder = tmp_path_factory.mktemp("similar")
    matrices = transition_matrices(3, 0)
    for number, (name, kind) in enumerate([*KIND.items(), ("goal", 1)]):
        rows = draw(matrices, np.full(60, kind), 17, (0, number))
        write_source(folder / "data", name, list(rows))
    run_distributed(on_one_rank, 1, str(folder))
    run_distributed(on_two_ranks, 2, str(folder))
    return folder


def test_sources_of_a_kind_are_a_group_in_every_layout(folder: Path) -> None:
    for name in LAYOUTS:
        assert json.loads((folder / name / "groups.json").read_text())["groups"] == ALIKE
        content, _ = found_weights(folder, name)
        assert [group["name"] for group in content["groups"]] == CALLED
        weight = {each["name"]: each["weight"] for each in content["sources"]}
        for group, members in zip(content["groups"], ALIKE, strict=True):
            assert group["weight"] == pytest.approx(sum(weight[name] for name in members))
    assert list(metrics(folder / "two")[0]["group_weights"]) == CALLED


def test_a_run_that_goes_on_keeps_its_groups(folder: Path) -> None:
    found_weights(folder, "one")
    code, said = noted(folder / "noted", "one again")
    assert code == 0 and "gradients of" not in said, said
    records = metrics(folder / "one")
    assert [list(record["group_weights"]) for record in records] == [CALLED] * 10


def test_what_makes_no_groups_is_refused(folder: Path) -> None:
    refused(folder, "one again as another", "groups.json: has groups of other sources")
    refused(folder, "one again damaged", "groups.json: is damaged (remove it)")
    other = "bilevel.group_sources: the checkpoint is of a run with other groups"
    refused(folder, "one again without", other)
    refused(folder, "one again changed", other)
    code, said = noted(folder / "noted", "plain again in groups")  # it looked for them first
    assert code == 2 and other in said.splitlines()[-1], said
    refused(folder, "as many", "bilevel.group_sources: 7 groups for only 7 sources (ask for fewer)")
    refused(folder, "named", "the sources have groups already, by names such as x/a")
    refused(folder, "experts", "bilevel.group_sources: does not work with experts")
    refused(folder, "rival", "bilevel.group_sources: doge does not use groups")


def test_the_size_of_a_gradient_makes_no_group() -> None:
    from megatron_scalebio.methods.similar_sources import grouped

    own_SD = torch.eye(4)[[0, 1, 0, 1, 2]] + 0.01 * torch.randn(5, 4)
    names, longer_S1 = list("pqrst"), torch.tensor([[1.0], [1], [50], [1], [1]])
    found = grouped(names, (own_SD + 1.0) * longer_S1, 3)
    assert found == [["p", "r"], ["q", "s"], ["t"]]


@pytest.mark.parametrize(("sources", "examples"), [(1, 64), (2, 40), (9, 16)])
def test_a_tenth_of_the_runs_examples_is_looked_at_within_bounds(
    monkeypatch: pytest.MonkeyPatch, sources: int, examples: int
) -> None:
    """Of 800, dealt among the sources: at most 64 of each and at least 16."""
    from megatron_scalebio.methods import similar_sources as module

    looked_at: list[list[int]] = []

    def of_mean(source: range, row_N: np.ndarray) -> torch.Tensor:
        looked_at.append(sorted(row_N.tolist()))
        return torch.ones(3)

    train = SimpleNamespace(train_iters=100, global_batch_size=8, seed=1)
    state = SimpleNamespace(data=SimpleNamespace(sources=[range(300)] * sources))
    features = SimpleNamespace(of_mean=of_mean, close=lambda: None)
    monkeypatch.setattr(module, "RunState", lambda *given: state)
    monkeypatch.setattr(module, "load_start", lambda *given: None)
    monkeypatch.setattr(module, "GradientFeatures", lambda *given: features)
    monkeypatch.setattr(module.runtime, "is_main", lambda: False)
    config: Any = SimpleNamespace(train=train)
    module._features(config, SimpleNamespace(folder=Path("x")))  # type: ignore[arg-type]
    assert [len(set(rows)) for rows in looked_at] == [examples] * sources
