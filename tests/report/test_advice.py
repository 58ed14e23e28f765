"""What the page says to do, from the sentences that the core's own verdict gives."""

from __future__ import annotations

import html
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_scalebio.methods.end_check import EndCheck
from megatron_scalebio.mixture.confidence import judge_convergence, weight_intervals
from megatron_scalebio.report.advice import advice
from megatron_scalebio.report.html import write_report
from megatron_scalebio.report.load import load_run
from megatron_scalebio.report.summary import counted_in, source_rows

MakeRun = Callable[..., Path]


def judged(run: Path, blocks_BS: torch.Tensor, steps: int = 600, **options: Any) -> Path:
    """The run with weights.json as these steps' mixtures make it."""
    path = run / "weights.json"
    content = json.loads(path.read_text())
    names = [entry["name"] for entry in content["sources"]]
    found = weight_intervals(blocks_BS, 0.95, options.get("validation_examples"))
    verdict = judge_convergence(blocks_BS, names, **options)
    for i, entry in enumerate(content["sources"]):
        entry |= {"weight": float(found.weight_S[i]), "ci_low": float(found.low_S[i]),
                  "ci_high": float(found.high_S[i])}  # fmt: skip
    content |= {"converged": verdict.converged, "reason": verdict.reason, "step": steps}
    path.write_text(json.dumps(content))
    return run


def told(run: Path) -> list[str]:
    loaded = load_run(run)
    return [each.do for each in advice(loaded, source_rows(loaded))]


def mixtures(steps: int, spread: float, drift: float = 0.0, sources: int = 5) -> torch.Tensor:
    """Weights that swing around an equal share with a long period, and travel."""
    time = torch.arange(steps, dtype=torch.float64)
    swing = spread * torch.sin(2 * math.pi * time / 50) + drift * (time / steps - 0.5)
    return 1 / sources + torch.stack([swing, -swing, *[swing * 0] * (sources - 2)], 1)


def test_weights_that_have_settled_are_to_be_used(make_run: MakeRun) -> None:
    run = judged(make_run(), mixtures(300, 0.001), validation_examples=10_000)
    assert told(run) == ["Use the weights"]
    assert f"megatron-scalebio sample --weights {run}" in write_report(run).read_text()


def test_few_examples_ask_for_more_and_not_for_steps(make_run: MakeRun) -> None:
    """n = 2 p (1 − p) (1.96 / 0.05)², p = 0.2 ± 0.001."""
    run = judged(make_run(), mixtures(300, 0.001), validation_examples=50)
    assert told(run) == ["Enlarge the validation set: 492 examples"]


@pytest.mark.parametrize(
    ("blocks", "reason", "asked"),
    [
        (mixtures(300, 0.3), "wanders from step to step", "Run longer: about "),
        (mixtures(300, 0.001, drift=0.2), "still drifting", "Run longer: about "),
        (mixtures(300, 0.001, drift=4.0), "still drifting", "Take larger batches, or fewer"),
    ],
)
def test_weights_that_move_ask_for_steps(
    make_run: MakeRun, blocks: torch.Tensor, reason: str, asked: str
) -> None:
    run = judged(make_run(), blocks)
    assert reason in json.loads((run / "weights.json").read_text())["reason"]
    [do] = told(run)
    assert do.startswith(asked)
    if asked.startswith("Run"):
        half = float(weight_intervals(blocks).half_width_S.max())
        times = half / 0.05 if "drift" in reason else (half / 0.05) ** 2
        assert do == f"Run longer: about {100 * math.ceil(6 * times):,} steps" and times > 1


def test_the_longer_run_has_a_command(make_run: MakeRun) -> None:
    run = judged(make_run(), mixtures(300, 0.3))
    [longer] = advice(load_run(run), source_rows(load_run(run)))
    steps = longer.do.split()[-2].replace(",", "")
    words = ["megatron-scalebio", "reweight", "--config", "run.yaml", "--lr", "3e-4"]
    longer_words = ["--train-iters", steps, "--output", f"{run}-{steps}"]
    assert shlex.split(longer.command) == [*words, *longer_words]
    assert longer.command in html.unescape(write_report(run).read_text())
    (run / "command.txt").unlink()
    [longer] = advice(load_run(run), source_rows(load_run(run)))
    assert longer.command == ""


def test_what_no_number_of_steps_tells_asks_for_a_larger_tolerance(make_run: MakeRun) -> None:
    run = judged(make_run(), mixtures(300, 0.001), tolerance=0.009)
    assert told(run) == ["Set a larger tolerance"]


def test_many_sources_are_to_be_known_to_a_smaller_tolerance(make_run: MakeRun) -> None:
    """0.05 of up to 20 sources, half of that of 40."""
    blocks = mixtures(300, 0.15, sources=40)
    run = judged(make_run([f"s{i}" for i in range(40)]), blocks)
    times = (float(weight_intervals(blocks).half_width_S.max()) / 0.025) ** 2
    assert told(run)[0] == f"Run longer: about {100 * math.ceil(6 * times):,} steps" and times > 1


FEW = "only 3 steps are averaged, at least 200 are needed (set train_iters to 800 or more)"


@pytest.mark.parametrize(
    ("reason", "asked"),
    [
        (FEW, "Run longer: about 800 steps"),
        ("goal has been gone through 12 times: models may know it", "Add data, or make fewer"),
        ("doge gives no intervals", "Use the weights, with another seed beside them"),
    ],
)
def test_other_verdicts(make_run: MakeRun, reason: str, asked: str) -> None:
    run = judged(make_run(), mixtures(300, 0.001))
    content = json.loads((run / "weights.json").read_text())
    (run / "weights.json").write_text(json.dumps(content | {"converged": False, "reason": reason}))
    assert told(run)[0].startswith(asked)


def test_a_check_that_objects_asks_for_twice_the_steps(make_run: MakeRun) -> None:
    """However narrow the intervals are."""
    run = judged(make_run(steps=60), mixtures(300, 0.001))
    both = torch.tensor([0.1, -0.1, 0.0, 0.0, 0.0]).double()
    reason = EndCheck(torch.zeros(5, 5), both, both.abs() / 10, []).objection(list("abcde"), 0.05)
    content = json.loads((run / "weights.json").read_text())
    (run / "weights.json").write_text(json.dumps(content | {"converged": False, "reason": reason}))
    assert told(run) == ["Run longer: about 200 steps"]


def test_what_the_core_says_of_decay_and_stillness_is_known(make_run: MakeRun) -> None:
    still = torch.full((300, 5), 0.2, dtype=torch.float64)
    assert told(judged(make_run(), still)) == ["Check that the sources differ"]
    run = judged(make_run(), mixtures(300, 0.1), constant_rate=False)
    assert told(run) == ["Keep the rate of the mixture constant"]


def test_many_unsure_sources_are_to_be_merged_and_spikes_looked_at(make_run: MakeRun) -> None:
    names = [f"s{i}" for i in range(30)]
    run = make_run(names, steps=300, train_iters=300)
    judged(run, mixtures(300, 0.2, sources=30), steps=300)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records[:20]:
        record["skipped"] = "w: spike"
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    assert told(run)[1:] == [
        "Merge sources that are alike, among 2 that can't be told apart",
        "Lower the learning rate, or check the source that is named below",
    ]


def test_near_duplicates_are_to_be_merged_whatever_the_verdict(make_run: MakeRun) -> None:
    run = judged(make_run(), mixtures(300, 0.001), validation_examples=10_000)
    path = run / "weights.json"
    content = json.loads(path.read_text())
    names = [entry["name"] for entry in content["sources"]]
    path.write_text(json.dumps(content | {"indistinguishable": [names[:2], names[2:5]]}))
    assert told(run) == [
        "Use the weights",
        f"Merge {names[0]} and {names[1]}",
        f"Merge {names[2]}, {names[3]} and {names[4]}",
    ]
    assert "only the sum of their weights, 40.0%, is known" in write_report(run).read_text()
    short = content | {"indistinguishable": [names[:2]], "converged": False}
    short["reason"] = "only 150 steps are averaged (set train_iters to 800 or more)"
    path.write_text(json.dumps(short))
    assert told(run) == [
        "Run longer: about 800 steps",
        f"Do not compare the weights of {names[0]} and {names[1]} yet",
    ]


@pytest.mark.parametrize("alike", [[], [[0, 1]]])
def test_no_steps_are_asked_for_to_tell_near_duplicates_apart(
    make_run: MakeRun, alike: list[list[int]]
) -> None:
    blocks = mixtures(300, 0.3)
    run = judged(make_run(), blocks)
    content = json.loads((run / "weights.json").read_text())
    names = [entry["name"] for entry in content["sources"]]
    content["indistinguishable"] = [[names[i] for i in group] for group in alike]
    (run / "weights.json").write_text(json.dumps(content))
    times = 1.0 if alike else (float(weight_intervals(blocks).half_width_S.max()) / 0.05) ** 2
    assert told(run)[0] == f"Run longer: about {100 * math.ceil(6 * times):,} steps"


def test_a_run_without_a_result_is_to_go_on(make_run: MakeRun) -> None:
    run = make_run(converged=None, steps=30)
    assert told(run) == ["Wait, or start it again"]
    assert f"megatron-scalebio status {run}" in write_report(run).read_text()
    stopped = make_run(steps=30)
    content = json.loads((stopped / "weights.json").read_text())
    (stopped / "weights.json").write_text(json.dumps(content | {"complete": False}))
    assert told(stopped)[0] == "Wait, or start it again"


@pytest.mark.parametrize(
    ("counted", "said"),
    [
        (None, "by examples"),
        ("examples", "by examples"),
        ("sequences", "by tokens: in sequences of 256 tokens"),
        ("both", "by examples; Megatron prefixes by sequences of 256 tokens"),
    ],
)
def test_shares_say_what_they_count(make_run: MakeRun, counted: str | None, said: str) -> None:
    run = make_run(steps=3)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"counted_in": counted}))
    assert counted_in(load_run(run)) == said
    assert f"in all data ({said})" in write_report(run).read_text()
