"""DoReMi, DoGE, FastMix as commands: right answers, layouts, resume, mistakes; fixed mixtures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from tests.commands import metrics, noted, the_only_line
from tests.distributed.harness import run_distributed
from tests.methods.method_runs import (
    GIVEN,
    SIZES,
    Runs,
    require_as_undisturbed,
    require_whole,
    run,
    stop_and_go_on,
    weights,
    write_configs,
)

pytestmark = pytest.mark.distributed

TP2, PP2 = ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]
VPP = ["--num-layers", 4, *PP2, "--num-layers-per-virtual-pipeline-stage", 1]
SHORT, DOREMI = ["--train-iters", 4], ["--train-iters", 6, "--reference-iters", 4]
# Whole micro-batches of each of three sources, and as many of them as a multiple of two stages.
EVEN = ["--micro-batch-size", 1, "--global-batch-size", 12, "--validation-batch-size", 8]
RUNS: Runs = {
    "doge": (1, "doge", ["--train-iters", 40, "--domain-lr", 2.5]),
    "doremi-epochs": (1, "doremi", ["--train-epochs", 0.08, "--reference-iters", 4]),
    "doremi": (1, "doremi", DOREMI),
    "doremi-few-places": (
        1, "doremi", [*SHORT, "--micro-batch-size", 1, "--global-batch-size", 2],
    ),
    "doge-one": (1, "doge", SHORT),
    "doge-one-deeper": (1, "doge", [*SHORT, *EVEN, "--num-layers", 4]),
    "doge-tp2": (2, "doge", [*SHORT, *TP2, "--sequence-parallel"]),
    "doge-pp2": (2, "doge", [*SHORT, *PP2]),
    "doge-vpp": (2, "doge", [*SHORT, *EVEN, *VPP]),
    "doge-dp2": (2, "doge", [*SHORT, "--use-distributed-optimizer", "--micro-batch-size", 1]),
    "fastmix": (1, "fastmix", ["--train-iters", 40, "--domain-lr", 0.1]),
    "fastmix-one": (1, "fastmix", SHORT),
    "fastmix-one-deeper": (1, "fastmix", [*SHORT, *EVEN, "--num-layers", 4]),
    "fastmix-few-places": (
        1, "fastmix", [*SHORT, "--micro-batch-size", 1, "--global-batch-size", 2],
    ),
    "fastmix-tp2": (2, "fastmix", [*SHORT, *TP2, "--sequence-parallel"]),
    "fastmix-pp2": (2, "fastmix", [*SHORT, *PP2]),
    "fastmix-vpp": (2, "fastmix", [*SHORT, *EVEN, *VPP]),
    "fastmix-dp2": (2, "fastmix", [*SHORT, "--use-distributed-optimizer"]),
    "fastmix-cp2": (2, "fastmix", [*SHORT, "--context-parallel-size", 2]),
    "fastmix-packed": (1, "fastmix", [*SHORT, "--packing"]),
    "doremi-pp2": (2, "doremi", [*DOREMI, *PP2]),
    "doremi-dp2": (2, "doremi", [*DOREMI, "--use-distributed-optimizer"]),
}  # fmt: skip
FIXED = {"uniform": [1, 1, 1], "natural": [5, 3, 2], "manual": [1, 3, 6]}
SAME = [
    ("doge-one", "doge-tp2"), ("doge-one", "doge-pp2"), ("doge-one", "doge-dp2"),
    ("doge-one-deeper", "doge-vpp"), ("doremi", "doremi-pp2"), ("doremi", "doremi-dp2"),
    ("fastmix-one", "fastmix-tp2"), ("fastmix-one", "fastmix-pp2"), ("fastmix-one", "fastmix-dp2"),
    ("fastmix-one", "fastmix-cp2"), ("fastmix-one", "fastmix-packed"),
    ("fastmix-one-deeper", "fastmix-vpp"),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weighting")
    write_configs(folder)
    for ranks in (1, 2):
        run_distributed(on_ranks, ranks, str(folder))
    return folder


def on_ranks(folder_name: str) -> None:
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    for name, (ranks, method, flags) in RUNS.items():
        if ranks == dist.get_world_size():
            run(folder, name, method, flags)
    if dist.get_world_size() == 2:
        odd = [*SHORT, *EVEN, *VPP, "--global-batch-size", 11]
        run(folder, "fastmix-odd", "fastmix", odd, "mistake-fastmix-odd")
    if dist.get_world_size() == 1:
        stop_and_go_on(folder, RUNS, "doge-stopped", "doge-one", [("", 2)])
        stop_and_go_on(folder, RUNS, "fastmix-stopped", "fastmix-one", [("", 2)])
        stop_and_go_on(folder, RUNS, "doremi-stopped", "doremi", [("reference", 2), ("", 3)])
        stop_and_go_on(folder, RUNS, "doremi-few-stopped", "doremi-few-places", [("", 2)])
        mistakes = {
            "doge-one": ("doremi", SHORT),
            "manual-none": ("manual", []),
        }
        for name, (method, flags) in mistakes.items():
            run(folder, name, method, flags, f"mistake-{name}")
        for method in FIXED:
            run(folder, method, method, [])


@pytest.mark.parametrize("name", RUNS)
def test_ends_in_whole_weights(runs: Path, name: str) -> None:
    require_whole(runs, name, RUNS[name][1])


@pytest.mark.parametrize("method", ["doge", "fastmix"])
def test_finds_the_useful_sources(runs: Path, method: str) -> None:
    first, second, junk = (entry["weight"] for entry in weights(runs / method)["sources"])
    assert junk < 0.2 < min(first, second)


def test_blends_keep_the_weights_of_the_validation_sets(runs: Path) -> None:
    blend = json.loads((runs / "doge" / "blend.json").read_text())
    first, one, second, other = blend["valid"]
    assert float(first) == 3 * float(second) > 0
    assert one == str(runs / "data" / "validation" / "tokens")
    assert other == str(runs / "more" / "validation" / "tokens")
    assert blend["test"] is None, "no test set was given"


@pytest.mark.parametrize(("name", "counts"), FIXED.items())
def test_mixtures_that_nothing_is_learned_for(runs: Path, name: str, counts: list) -> None:
    code, said = noted(runs / "noted", name)
    assert code == 0, said
    for key in ("weight", "initial_weight"):
        got = [entry[key] for entry in weights(runs / name)["sources"]]
        assert got == pytest.approx([count / sum(counts) for count in counts])
    assert weights(runs / name)["cost"] == {"trained_tokens": 0, "scored_tokens": 0}


@pytest.mark.parametrize(
    ("name", "prior", "places"),
    [("doremi", SIZES, None), ("doremi-few-places", GIVEN, 2)],
    ids=["natural", "given"],
)
def test_doremi_s_reference_learns_what_one_would_train_on_otherwise(
    runs: Path, name: str, prior: tuple, places: int | None
) -> None:
    """Σ p_i ℓ_i over the sources in a batch, each by the chance of being there (Hájek 1971)."""
    share = np.array(prior) / sum(prior)
    chance = np.ones(3) if places is None else places * (0.75 * share + 0.25 / 3)
    standing = share / chance.clip(max=1)
    for record in metrics(runs / name / "reference"):
        there = [(p, loss) for p, loss in zip(standing, record["loss_w"], strict=True) if loss]
        want = sum(p * loss for p, loss in there) / sum(p for p, _ in there)
        assert record["train_loss_w"] == pytest.approx(want)
    assert len(metrics(runs / name / "reference")) == 4
    # The proxy begins where the reference began, so there is something to learn from it.
    first = metrics(runs / "doremi")[0]["excess_loss"]
    assert min(first) > 0.01


@pytest.mark.parametrize(
    ("name", "rate"), [("doge", 2.5), ("doge-one", 1.0), ("doremi", None), ("doremi-dp2", None)]
)
def test_weights_follow_from_the_scores_told(runs: Path, name: str, rate: float | None) -> None:
    """α ∝ α exp(η W) from uniform; DoGE's η falls with the learning rate, DoReMi smooths."""
    weight = np.full(3, 1 / 3)
    for record in metrics(runs / name):
        if rate is None:
            weight = weight * np.exp(record["excess_loss"])
            weight = 0.999 * weight / weight.sum() + 0.001 / 3
        else:
            weight = weight * np.exp(rate * record["lr_w"] / 5e-3 * np.array(record["alignment"]))
            weight = weight / weight.sum()
        assert record["weights"] == pytest.approx(weight, rel=1e-6), "of numbers told to 9 places"
    initial = [entry["initial_weight"] for entry in weights(runs / name)["sources"]]
    assert initial == pytest.approx([1 / 3] * 3)
    assert abs(weight - 1 / 3).max() > 0.001


@pytest.mark.parametrize(("one", "other"), SAME)
def test_does_not_depend_on_the_layout(runs: Path, one: str, other: str) -> None:
    for a, b in zip(metrics(runs / one), metrics(runs / other), strict=True):
        for field in {"weights", "alignment", "excess_loss", "loss_w", "grad_norm_w"} & a.keys():
            assert b[field] == pytest.approx(a[field], rel=1e-3, abs=1e-5), (a["step"], field)


@pytest.mark.parametrize("name", ["doge", "doremi"])
def test_weights_are_the_average_of_all_steps(runs: Path, name: str) -> None:
    trajectory = [record["weights"] for record in metrics(runs / name)]
    mean = [sum(column) / len(trajectory) for column in zip(*trajectory, strict=True)]
    content = weights(runs / name)
    assert [entry["weight"] for entry in content["sources"]] == pytest.approx(mean)
    assert content["last_weights"] == pytest.approx(trajectory[-1])


@pytest.mark.parametrize(
    ("stopped", "times", "whole"),
    [("doge-stopped", 1, "doge-one"), ("fastmix-stopped", 1, "fastmix-one"),
     ("doremi-stopped", 2, "doremi"), ("doremi-few-stopped", 1, "doremi-few-places")],
)  # fmt: skip
def test_stopped_and_started_again_equals_undisturbed(
    runs: Path, stopped: str, times: int, whole: str
) -> None:
    require_as_undisturbed(runs, stopped, times, whole)


def test_fastmix_ends_in_its_last_weights(runs: Path) -> None:
    *_, last = metrics(runs / "fastmix")
    content = weights(runs / "fastmix")
    assert [entry["weight"] for entry in content["sources"]] == pytest.approx(last["weights"])
    assert max(map(abs, np.subtract(content["mean_weights"], last["weights"]))) > 0.01


def test_fastmix_takes_an_absent_source_for_one_that_does_not_matter(runs: Path) -> None:
    for record in metrics(runs / "fastmix-few-places"):
        absent = [loss is None for loss in record["loss_w"]]
        assert [value == 0.0 for value in record["alignment"]] == absent
        assert sum(absent) >= 1


def test_cost_counts_what_went_through_models(runs: Path) -> None:
    """Sequences of 16 tokens; 8 a step of training, 6 a step of DoGE's sources and 8 for L1."""
    assert weights(runs / "doge-one")["cost"] == {"trained_tokens": 4 * 14 * 16, "scored_tokens": 0}
    assert weights(runs / "fastmix-one")["cost"]["trained_tokens"] == 4 * (8 + 8) * 16
    assert weights(runs / "doremi")["cost"] == {
        "trained_tokens": (4 + 6) * 8 * 16,
        "scored_tokens": 6 * 2 * 8 * 16,
    }


def test_epochs_are_of_the_run_and_not_of_its_parts(runs: Path) -> None:
    """0.08 epochs of 600 examples are 6 steps of 8."""
    assert weights(runs / "doremi-epochs") == weights(runs / "doremi")
    assert metrics(runs / "doremi-epochs") == metrics(runs / "doremi")


def test_a_source_out_of_the_batch_keeps_its_score(runs: Path) -> None:
    records = metrics(runs / "doremi-few-places")
    kept = 0
    for before, after in itertools.pairwise(records):
        for i, loss in enumerate(after["loss_w"]):
            if loss is None:
                assert after["excess_loss"][i] == before["excess_loss"][i]
                kept += 1
    assert kept >= len(records) - 1


def test_mistakes_cost_one_line(runs: Path) -> None:
    for name, words in {
        "doge-one": "holds a run of `doge`, which doremi can't continue",
        "manual-none": "baseline.method: manual needs weights",
        "fastmix-odd": "train.global_batch_size: 11 gives a number of micro-batches that the "
        "interleaved pipeline needs divisible by its stages (use a multiple of 2)",
    }.items():
        code, said = noted(runs / "noted", f"mistake-{name}")
        assert code == 2 and words in the_only_line(said), said
