"""Bounds, priors, repetition and reused weights: from the command line to what a run writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.commands import command, found_weights, note, refused, write_config
from tests.distributed.harness import run_distributed
from tests.markov import write_problem, write_source

pytestmark = pytest.mark.distributed
SIZES = [400, 40, 200]  # examples


def run(folder: Path, name: str, changes: dict[str, Any], *words: object) -> None:
    """A run of three sources, whose entries and sections `changes` add to."""
    sources, validation = yaml.safe_load((folder / "problem.yaml").read_text())
    changes = dict(changes)
    for entry in sources:
        entry.update(changes.pop(entry["name"], {}))
    without = changes.pop("without", ())
    sources = [entry for entry in sources if entry["name"] not in without]
    steps = {"train_iters": changes.pop("steps", 4)}
    changes |= {"train": steps, "checkpoint": {"save_interval": 0}}
    config = write_config(folder / f"{name}.yaml", sources, validation, **changes)
    outcome = command("reweight", "--config", config, "--output", folder / name, *words)
    note(folder / "noted", name, outcome)


def on_one_rank(folder_name: str) -> None:
    import torch.distributed as dist

    folder = Path(folder_name)
    dist.init_process_group("gloo")
    bounds = {"s0": {"fixed_weight": 0.5}, "s1": {"max_weight": 0.2}, "s2": {"min_weight": 0.31}}
    run(folder, "bounds", {**bounds, "steps": 42})  # enough for intervals
    still = ("--lr-lambda", 1e-9)  # stays where it begins: at the cap
    run(folder, "target", {}, "--target-examples", 1000, "--max-epochs", 2, *still)
    run(folder, "tokens", {}, "--target-tokens", "50k", "--method", "natural")
    short = {"s1": {"path": str(folder / "data" / "short")}}
    run(folder, "short", short, "--target-tokens", "10k", "--max-epochs", 2, *still)
    pulled = {"bilevel": {"kl_to_prior": 1e4}}
    run(folder, "pulled", pulled)
    prior = {"s0": 0.2, "s1": 0.7, "s2": 0.1}
    run(folder, "given", {"bilevel": {"kl_to_prior": 1e4, "prior": prior}})
    lacking = {"bilevel": {"kl_to_prior": 1.0, "prior": {"s0": 1.0, "s1": 1.0}}}
    run(folder, "bad prior", lacking)
    run(folder, "former", {"without": ["s1"]})
    words = ("--weights", folder / "former", "--new-share", 0.2)
    run(folder, "reused", {}, *words, "--keep-ratios")
    parts = {"s0": {"name": "s0/a"}, "s1": {"name": "s0/b"}}
    run(folder, "split", parts, "--weights", folder / "former")
    named = {"s0": {"name": "math/s0"}, "s1": {"name": "math/s1"}, "s2": {"name": "code/s2"}}
    run(folder, "groups", {**named, "steps": 42})
    run(folder, "later", {"steps": 42})
    bounds = {"s0": {"max_weight": 0.1}, "s2": {"fixed_weight": 0.4}}
    run(folder, "later", {**bounds, "steps": 44})
    of_groups = {"groups": {"math": {"max_weight": 0.4}, "code": {"max_weight": 0.9}}}
    of_groups["groups"]["math"]["min_weight"] = 0.2
    run(folder, "group bounds", {**named, "steps": 42, "data": of_groups}, *still)
    fixed = {"groups": {"math": {"fixed_weight": 0.3}}}
    run(folder, "fixed groups", {**named, "s2": {"name": "s2"}, "data": fixed})
    run(folder, "bad target", {}, "--target-examples", 7)
    run(folder, "bad epochs", {}, "--target-examples", 10000)
    run(folder, "bad tokens", short, "--target-tokens", "50k")
    run(folder, "bad cap", {"s1": {"min_weight": 0.3}}, "--target-examples", 1000)
    tight = {"s0": {"max_weight": 0.3}, "s2": {"max_weight": 0.3}}
    run(folder, "bad sum", tight, "--target-examples", 1000)
    run(folder, "bad method", {"s1": {"min_weight": 0.3}}, "--method", "doge")
    repeated = ("--target-examples", 1000, "--max-epochs", 2)
    run(folder, "bad epochs of method", {}, *repeated, "--method", "regmix")
    unknown = {"groups": {"maths": {"max_weight": 0.4}}}
    run(folder, "bad group", {**named, "data": unknown})
    least = {"groups": {"math": {"min_weight": 0.9}}}
    run(folder, "bad group cap", {**named, "data": least}, "--target-examples", 2000)
    lengths = {**named, "s1": {**named["s1"], **short["s1"]}, "data": fixed}
    run(folder, "bad group tokens", lengths, "--target-tokens", "5k")
    run(folder, "bad group method", {**named, "data": fixed}, "--method", "doge")
    run(folder, "bad reuse", {}, "--weights", folder / "former")
    run(folder, "bad ratios", {}, "--weights", folder / "target", "--keep-ratios")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounds")
    problem = write_problem(folder / "data", [0.3, 0.6, 0.1], 0, 17, SIZES, 200)
    write_source(folder / "data", "short", [np.arange(5) for _ in range(SIZES[1])])
    (folder / "problem.yaml").write_text(yaml.safe_dump(problem))
    run_distributed(on_one_rank, 1, str(folder))
    return folder


def weights(content: dict[str, Any]) -> list[float]:
    return [source["weight"] for source in content["sources"]]


def test_weights_are_within_the_bounds_of_their_sources(folder: Path) -> None:
    content, said = found_weights(folder, "bounds")
    s0, s1, s2 = content["sources"]
    assert (s0["weight"], s0["ci_low"], s0["ci_high"]) == pytest.approx((0.5, 0.5, 0.5))
    assert s1["ci_high"] <= 0.2 + 1e-9 and s2["ci_low"] >= 0.31 - 1e-9
    assert 0 < s1["weight"] <= 0.19 and sum(weights(content)) == pytest.approx(1)
    assert s0["bound"] == "fixed" and "50.0% (fixed)" in said


def test_no_source_is_repeated_more_than_is_allowed(folder: Path) -> None:
    """1,000 examples, 40 of them in s1, which validation wants: two passes are 8 %."""
    content, said = found_weights(folder, "target")
    assert (content["target_examples"], content["max_epochs"]) == (1000, 2.0)
    for source, size in zip(content["sources"], SIZES, strict=True):
        assert source["epochs"] == pytest.approx(source["weight"] * 1000 / size)
        assert source["epochs"] <= 2 + 1e-9
    assert content["sources"][1]["weight"] == pytest.approx(0.08)
    assert content["sources"][1]["bound"] == "max" and "8.0% (max)" in said
    assert "target   1 k examples, at most 2 passes of a source" in said
    page = (folder / "target" / "report.html").read_text()
    assert ">Epochs</th>" in page and "8.0% (max)" in page
    assert ">Epochs</th>" not in (folder / "bounds" / "report.html").read_text()


def test_epochs_are_told_of_any_method(folder: Path) -> None:
    """50,000 tokens, 17 of each example; the natural mixture passes all sources alike, which
    nothing limits."""
    content, said = found_weights(folder, "tokens")
    passes = [source["epochs"] for source in content["sources"]]
    assert passes == pytest.approx([50000 / 17 / sum(SIZES)] * 3) and "epochs" in said
    assert "max_epochs" not in content


def test_bounds_given_at_a_resume_hold_for_the_weights_it_ends_with(folder: Path) -> None:
    """And for the steps after it; what was learned before is not averaged."""
    content, said = found_weights(folder, "later")
    s0, _, s2 = content["sources"]
    assert s0["weight"] <= 0.1 + 1e-9 and s2["weight"] == pytest.approx(0.4)
    assert s2["bound"] == "fixed" and s0["ci_low"] is None, "of so few steps"
    assert "only 1 step is averaged" in said
    records = [json.loads(x) for x in (folder / "later" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 44 and all(r["weights"][0] <= 0.1 + 1e-9 for r in records[42:])
    assert records[41]["weights"][0] > 0.1
    assert "from step 42" in said


def test_passes_over_short_examples_are_those_of_the_blends_tokens(folder: Path) -> None:
    """10,000 tokens: two passes over the 200 of the short source, in examples of 5, are 4 %."""
    content, said = found_weights(folder, "short")
    shares = (folder / "short" / "blend.txt").read_text().split()[::2]
    drawn = [float(share) * 10_000 for share in shares]
    held = [count * length for count, length in zip(SIZES, (17, 5, 17), strict=True)]
    passes = [tokens / own for tokens, own in zip(drawn, held, strict=True)]
    assert [s["epochs"] for s in content["sources"]] == pytest.approx(passes, abs=1e-3)
    assert content["sources"][1]["epochs"] == pytest.approx(2, rel=1e-6)
    assert content["sources"][1]["epochs"] <= 2 + 1e-9
    assert content["sources"][1]["bound"] == "max"
    assert "target   10 k tokens, at most 2 passes of a source" in said
    examples = drawn[1] / 5 + (drawn[0] + drawn[2]) / 17
    assert content["target_examples"] == pytest.approx(examples, abs=1)


def test_a_strong_prior_holds_the_mixture(folder: Path) -> None:
    natural = np.array(SIZES) / sum(SIZES)
    last = json.loads((folder / "pulled" / "metrics.jsonl").read_text().splitlines()[-1])
    np.testing.assert_allclose(last["weights"], natural, atol=1e-3)


def test_a_prior_may_be_given_by_name(folder: Path) -> None:
    found_weights(folder, "given")
    last = json.loads((folder / "given" / "metrics.jsonl").read_text().splitlines()[-1])
    np.testing.assert_allclose(last["weights"], [0.2, 0.7, 0.1], atol=1e-3)
    again = yaml.safe_load((folder / "given" / "config.yaml").read_text())["bilevel"]
    assert again["prior"] == {"s0": 0.2, "s1": 0.7, "s2": 0.1}


def test_a_former_runs_sources_keep_their_ratios(folder: Path) -> None:
    former = dict(zip(("s0", "s2"), weights(found_weights(folder, "former")[0]), strict=True))
    content, said = found_weights(folder, "reused")
    s0, s1, s2 = content["sources"]
    assert s1["initial_weight"] == pytest.approx(0.2) and s1["weight"] != pytest.approx(0.2)
    assert s0["weight"] / s2["weight"] == pytest.approx(former["s0"] / former["s2"])
    assert "weights  2 sources; 1 new" in said


def test_a_former_source_is_split_by_examples(folder: Path) -> None:
    """s0 of the former run; 400 and 40 examples."""
    former = weights(found_weights(folder, "former")[0])
    content, said = found_weights(folder, "split")
    initial = [source["initial_weight"] for source in content["sources"]]
    shares = [former[0] * 10 / 11, former[0] / 11, former[1]]
    assert initial == pytest.approx(shares)
    assert "weights  3 sources; s0 is split into s0/a, s0/b, by their examples" in said


def test_groups_are_sums_of_their_sources(folder: Path) -> None:
    content, said = found_weights(folder, "groups")
    math, code = content["groups"]
    assert (math["name"], code["name"]) == ("math", "code")
    assert math["weight"] == pytest.approx(sum(weights(content)[:2]))
    assert code["weight"] == pytest.approx(weights(content)[2])
    assert math["ci_low"] <= math["weight"] <= math["ci_high"]
    [level] = content["levels"]
    assert (level["groups"], level["converged"]) == (2, False) and "steps are averaged" in said
    assert "2 groups, not converged: " in said and "3 sources, not converged: " in said
    assert "Groups of sources" in (folder / "groups" / "report.html").read_text()
    last = json.loads((folder / "groups" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["group_weights"]["math"] == pytest.approx(sum(last["weights"][:2]))


def test_sums_are_within_the_bounds_of_their_groups(folder: Path) -> None:
    """Two of three sources are in math."""
    content, said = found_weights(folder, "group bounds")
    math, code = content["groups"]
    assert math["weight"] == pytest.approx(0.4) and math["ci_high"] <= 0.4 + 1e-9
    assert math["bound"] == "max" and "40.0% (max)" in said
    assert code["bound"] == "min" and code["ci_low"] >= 0.6 - 1e-9
    assert content["sources"][2]["bound"] == "min"


def test_groups_that_are_all_fixed_are_known(folder: Path) -> None:
    content, said = found_weights(folder, "fixed groups")
    metrics = folder / "fixed groups" / "metrics.jsonl"
    assert [group["bound"] for group in content["groups"]] == ["fixed", "fixed"]
    assert content["groups"][0]["weight"] == pytest.approx(0.3)
    moved = [json.loads(line)["weights"][0] for line in metrics.read_text().splitlines()]
    assert len(set(moved)) > 1, "what is fixed is the sum"
    for line in metrics.read_text().splitlines():
        assert sum(json.loads(line)["weights"][:2]) == pytest.approx(0.3, abs=1e-9)
    assert "2 groups, converged: all are fixed" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad target", "data.target_examples: 7 is less than a batch of 8 sequences"),
        ("bad epochs", "data.max_epochs: 4 passes over all sources are 2.56 k examples, but the"),
        ("bad tokens", "4 passes over all sources are 41.6 k tokens, but the final training"),
        (
            "bad cap",
            "data.max_epochs: 4 passes over 's1' limit its weight to 0.16, below its least weight",
        ),
        ("bad sum", "the sources' max_weight leave weights that add up to 0.76"),
        ("bad method", "data.sources: the bounds of 's1': the method 'doge' does not support"),
        ("bad epochs of method", "data.max_epochs: the method 'regmix' does not support it"),
        ("bad prior", "bilevel.prior: has not the names of the sources: ['s0', 's1'], not"),
        ("bad group", "data.groups: no source is in a group 'maths' (did you mean math?)"),
        ("bad group cap", "data.groups.math.min_weight: 0.9 is above 0.88, the most that its"),
        ("bad group tokens", "data.groups: bounds of groups and target_tokens exclude each other"),
        ("bad group method", "data.groups: the bounds of 'math': the method 'doge' does not"),
        ("bad reuse", "has no weight of s1 (give new_share"),
        ("bad ratios", "data.keep_ratios: "),
    ],
)
def test_what_no_mixture_can_keep_to_is_one_line(folder: Path, name: str, words: str) -> None:
    refused(folder, name, words)
