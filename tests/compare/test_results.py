"""The numbers of a comparison, worked out again from the files that the stages left."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from megatron_scalebio.commands.compare import _joined_with_earlier
from megatron_scalebio.compare import page, plot
from megatron_scalebio.compare.config import CompareConfig, load, resolved_text
from megatron_scalebio.compare.page import advice, headline, write_page
from megatron_scalebio.compare.results import collect, spread, write
from megatron_scalebio.compare.stages import Plan, seconds_left
from megatron_scalebio.compare.tables import latex, progress, rest
from megatron_scalebio.errors import UserError
from megatron_scalebio.formatting import duration, percent
from megatron_scalebio.report.advice import Advice

BEST = [2.0, 2.0, 2.0]
SOURCES, TESTS, SEEDS = ("code", "web", "math"), ("far", "near"), (3, 8, 11)
# Test losses (sample mean, token mean) of "near" under each seed; those of "far" are 0.7 more.
LOSSES = {
    "natural": {3: (2.20, 2.91), 8: (2.29, 2.75), 11: (2.42, 2.80)},
    "doge": {3: (2.07, 2.62), 8: (2.31, 2.77), 11: (2.15, 2.99)},
    "regmix": {3: (2.05, 2.40), 8: (2.16, 2.61)},
}


def weights_of(method: str, seed: int) -> list[float]:
    first = {"natural": 0.2, "doge": 0.45, "regmix": 0.31}[method] + seed / 100
    return [first, 0.9 - first, 0.1]


def leave(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def leave_run(folder: Path, method: str, seed: int, losses: tuple[float, float]) -> None:
    """The files of a finished run, no two of whose numbers are alike."""
    number = 10 * list(LOSSES).index(method) + seed
    sample, token = losses
    sources = [
        {"name": name, "weight": weight}
        for name, weight in zip(SOURCES, weights_of(method, seed), strict=True)
    ]
    given = [{"name": name, "given": 400 + 7 * number * k} for k, name in enumerate(SOURCES)]
    sets = [
        {"name": name, "sample_mean": sample + more, "token_mean": token + more}
        for name, more in (("goal", -1.0), ("near", 0.0), ("far", 0.7))
    ]
    leave(folder / "find" / "weights.json", {
        "complete": True, "sources": sources,
        "cost": {"trained_tokens": 90_000 + 1000 * number, "scored_tokens": 30_000 + number},
    })  # fmt: skip
    leave(folder / "find" / "memory.json", {"peak_bytes": (number + 1) * 2**28})
    leave(folder / "sample" / "manifest.json", {"sources": given})
    leave(folder / "train" / "evaluation.json", {
        "sets": sets, "cost": {"trained_tokens": 50_000 + 100 * number, "scored_tokens": 7},
    })  # fmt: skip
    leave(folder / "train" / "memory.json", {"peak_bytes": 5 + number})
    for stage, seconds in (("find", 100.0 + number), ("sample", 1.0), ("train", 70.0 + 2 * number)):
        leave(folder / f"{stage}.timing.json", {"seconds": seconds})
    scores = {"strict": {"value": number / 64, "stderr": 0.5}, "flexible": {"value": 0.9}}
    leave(folder / "hf" / "config.json", {})
    leave(folder / "benchmarks" / "evaluation.json", {"benchmarks": {"gsm8k": {"scores": scores}}})


@pytest.fixture(params=["sample", "token"])
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> Plan:
    """A comparison of three methods, one of which has not yet ended under its last seed."""
    leave(tmp_path / "llama" / "config.json", {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
        "vocab_size": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    })  # fmt: skip
    for name in (*SOURCES, "goal", *TESTS, "gsm8k"):
        (tmp_path / f"{name}.jsonl").touch()
    content = {
        "model": str(tmp_path / "llama"),
        "sources": {name: str(tmp_path / f"{name}.jsonl") for name in SOURCES},
        "validation": {"goal": str(tmp_path / "goal.jsonl")},
        "test": {name: str(tmp_path / f"{name}.jsonl") for name in TESTS},
        "tasks": {"gsm8k": str(tmp_path / "gsm8k.jsonl")},
        "methods": list(LOSSES), "seeds": list(SEEDS), "max_epochs": 3,
        "train": {"train": {"train_iters": 25, "global_batch_size": 12}},
        "output": str(tmp_path / "out"),
    }  # fmt: skip
    if request.param == "token":  # the other one is the default
        content["train"]["data"] = {"loss_mean": "token"}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    plan = Plan(load(tmp_path / "compare.yaml", {}))
    for run in plan.runs:
        if run.seed in LOSSES[run.method]:
            losses = LOSSES[run.method][run.seed]
            leave_run(run.folder, run.method, run.seed, losses)
            continue
        leave_run(run.folder, run.method, run.seed, (0.1, 0.1))
        (run.folder / "benchmarks" / "evaluation.json").unlink()
    return plan


def test_a_benchmark_file_that_is_not_there_is_named(plan: Plan, tmp_path: Path) -> None:
    """It needs a model; the other sections' files are among the mistakes in test_compare."""
    content = yaml.safe_load((tmp_path / "compare.yaml").read_text())
    name = next(iter(content["tasks"]))
    content["tasks"][name] = "nowhere"
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match=f"tasks.{name}: nowhere: no such file or folder"):
        load(tmp_path / "compare.yaml", {})


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_every_option_reaches_its_stage(plan: Plan, tmp_path: Path) -> None:
    trained = plan.runs[0].stages[2].config
    assert trained and trained[1]["train"]["eval_interval"] == 0, "unless asked for"
    content = yaml.safe_load((tmp_path / "compare.yaml").read_text())
    content |= {"per_source": 70, "num_samples": 900, "methods": ["doge", "mine"], "seeds": [9, 4]}
    rates = {name: {"optimizer": {"lr": lr}} for name, lr in (("run", 0.1), ("reweight", 0.2))}
    content |= {**rates, "train": {"optimizer": {"lr": 0.3, "clip_grad": 0.5}}}
    content["train"]["train"] = {"eval_interval": 2}
    content["run"]["train"] = {"train_iters": 5}
    content["variants"] = {"mine": {"baseline": {"method": "less"}, "optimizer": {"lr": 0.4}}}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    plan = Plan(load(tmp_path / "more.yaml", {}))
    offline = plan.config.sections_of("rho_loss_offline")
    assert offline["baseline"] == {"method": "rho_loss", "rho_online": False}
    assert offline["optimizer"] == {"lr": 0.2}
    usual = CompareConfig.__dataclass_fields__
    assert usual["max_epochs"].default == 4 and usual["ranks"].default == 1
    assert usual["seeds"].default_factory() == [0, 1, 2]  # type: ignore[misc]
    prepare, pool, _ = plan.preparation
    assert option(pool.words, "--per-source") == "70"
    excluded = [w.partition("=")[0] for w, flag in zip(pool.words[1:], pool.words, strict=False)
                if flag == "--exclude"]  # fmt: skip
    assert excluded == ["goal", *TESTS]
    assert option(prepare.words, "--seq-length") == str(plan.seq_length)
    assert [(run.method, run.seed) for run in plan.runs] == [
        ("doge", 9), ("mine", 9), ("doge", 4), ("mine", 4),
    ]  # fmt: skip
    for run in plan.runs:
        find, sample, train = (stage.config and stage.config[1] for stage in run.stages[:3])
        assert find and train and sample is None
        assert find["train"]["seed"] == train["train"]["seed"] == run.seed
        assert find["train"]["train_iters"] == train["train"]["train_iters"] == 5
        assert find["optimizer"] == {"lr": 0.4 if run.method == "mine" else 0.2}
        assert train["optimizer"] == {"lr": 0.3, "clip_grad": 0.5}
        assert train["train"]["eval_interval"] == 2 and train["checkpoint"] == {"keep_last": 1}
        assert [entry["name"] for entry in find["data"]["sources"]] == list(SOURCES)
        assert [entry["name"] for entry in find["data"]["validation"]] == ["goal"]
        assert "test" not in find["data"]
        assert [entry["name"] for entry in train["data"]["test"]] == list(TESTS)
        words = run.stages[1].words
        wanted = {"--num-samples": "900", "--seed": str(run.seed), "--max-epochs": "3"}
        assert {name: option(words, name) for name in wanted} == wanted
        assert option(words, "--weights") == str(run.folder / "find")
        export, benchmarks = (stage.words for stage in run.stages[3:])
        assert option(export, "--load") == str(run.folder / "train" / "checkpoints")
        assert option(benchmarks, "--hf") == option(export, "--save")
        assert option(benchmarks, "--tasks") == "gsm8k"
        assert option(benchmarks, "--data") == f"gsm8k={plan.config.tasks['gsm8k']}"


def test_variants_and_methods_of_before_stay(plan: Plan) -> None:
    own = {"slow": {"baseline": {"method": "doge"}}}
    config = replace(plan.config, methods=["slow"], variants=own)
    leave(plan.output / "compare.yaml", yaml.safe_load(resolved_text(config)))
    joined = _joined_with_earlier(plan.config, plan)
    assert (joined.methods, joined.variants) == (["slow", *plan.config.methods], own)


def mean_and_sd(values: list[float]) -> dict[str, float]:
    """Of a sample: its squared deviations are divided by n − 1."""
    mean = sum(values) / len(values)
    return {
        "mean": mean,
        "sd": math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)),
    }


def worked_out(plan: Plan) -> dict[str, dict[str, Any]]:
    """What each method's line must say, from the table above."""
    kind = 1 if plan.config.train.get("data") else 0
    numbers = {m: {s: 10 * k + s for s in LOSSES[m]} for k, m in enumerate(LOSSES)}
    losses = {m: {s: LOSSES[m][s][kind] + 0.35 for s in LOSSES[m]} for m in LOSSES}
    every = [number for each in numbers.values() for number in each.values()]
    final = sum(50_000 + 100 * number for number in every) / len(every)
    best = losses["regmix"]
    result = {}
    for method, number_of in numbers.items():
        ns, seeds = list(number_of.values()), list(number_of)
        result[method] = {
            "test_loss": mean_and_sd(list(losses[method].values())),
            "behind": mean_and_sd([losses[method][seed] - best[seed] for seed in best]),
            "weights": {
                source: mean_and_sd([weights_of(method, seed)[k] for seed in seeds])
                for k, source in enumerate(SOURCES)
            },
            "rows": mean_and_sd([1200 + 7 * n * 3 for n in ns]),
            "cost": mean_and_sd(
                [(90_000 + 1000 * n + (30_000 + n) / 3) / final for n in ns]
            ),
            "search_seconds": mean_and_sd([100 + n for n in ns]),
            "training_seconds": mean_and_sd([70 + 2 * n for n in ns]),
            "search_peak_bytes": (max(ns) + 1) * 2**28,
            "scores": {"gsm8k": mean_and_sd([n / 64 for n in ns])},
        }  # fmt: skip
    return result


def approximately(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: approximately(each) for key, each in value.items()}
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def test_compare_json_is_what_the_runs_left(plan: Plan) -> None:
    found, want = collect(plan), worked_out(plan)
    order = sorted(want, key=lambda name: want[name]["test_loss"]["mean"])
    assert [method["name"] for method in found["methods"]] == order
    assert order[0] == "regmix" and order != list(LOSSES)
    for method in found["methods"]:
        got = {key: method[key] for key in want[method["name"]]}
        assert got == approximately(want[method["name"]]), method["name"]
        assert [run["seed"] for run in method["runs"]] == list(LOSSES[method["name"]])
    assert found["num_samples"] == 25 * 12 and found["max_epochs"] == 3
    assert (found["sources"], found["test"]) == (list(SOURCES), list(plan.config.test))
    assert found["seeds"] == list(SEEDS)
    kind = "token_mean" if plan.config.train.get("data") else "sample_mean"
    for method in found["methods"]:
        for run in method["runs"]:
            folder = plan.output / method["name"] / f"seed-{run['seed']}"
            sets = json.loads((folder / "train" / "evaluation.json").read_text())["sets"]
            losses = {entry["name"]: entry[kind] for entry in sets}
            assert run["test_losses"] == {name: losses[name] for name in TESTS}
            assert run["validation_losses"] == {"goal": losses["goal"]}
            number = run["training_peak_bytes"] - 5
            assert run["search_peak_bytes"] == (number + 1) * 2**28
            assert run["rows"] == sum(run["given"].values()) == 1200 + 21 * number


def shown(value: dict[str, float], digits: int) -> str:
    return f"{value['mean']:.{digits}f} ± {value['sd']:.{digits}f}"


def test_the_tables_show_these_numbers(plan: Plan) -> None:
    comparison, want = collect(plan), worked_out(plan)
    screen = io.StringIO()
    write(plan.output, comparison, Console(file=screen, width=200))
    lines = (plan.output / "compare.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    head = ["method", "test loss", "behind", "gsm8k", *SOURCES, "rows", "cost", "search", "memory"]
    assert cells[0] == head and cells[1] == ["---"] * len(head)
    for name, *row in cells[2:]:
        of = want[name]
        assert row == [
            shown(of["test_loss"], 4), shown(of["behind"], 4), shown(of["scores"]["gsm8k"], 3),
            *(shown(of["weights"][source], 2) for source in SOURCES),
            f"{of['rows']['mean']:,.0f}", f"{of['cost']['mean']:.2f}",
            duration(round(of["search_seconds"]["mean"])),
            f"{of['search_peak_bytes'] / 1024**3:.1f} GiB",
        ]  # fmt: skip
        on_screen = next(line for line in screen.getvalue().splitlines() if f" {name} " in line)
        assert on_screen.split() == [name, *" ".join(row).split()]
    said = " ".join(lines)
    assert "over 2 to 3 seeds" in said and "up to 300 rows" in said and "at most 3 times" in said
    assert json.loads((plan.output / "compare.json").read_text()) == comparison
    assert "# Comparison  **So far, 8 of 9 runs (method and seed) are done;" in said
    assert "8 of 9 runs" in screen.getvalue()


def test_other_programs_get_every_run_and_latex_the_table(plan: Plan) -> None:
    comparison = collect(plan)
    write(plan.output, comparison, Console(file=io.StringIO(), width=200))
    with open(plan.output / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    runs = [(method["name"], run) for method in comparison["methods"] for run in method["runs"]]
    assert len(rows) == len(runs) == 8
    for row, (method, run) in zip(rows, runs, strict=True):
        assert (row["method"], int(row["seed"])) == (method, run["seed"])
        for field in ("test_loss", "cost", "search_peak_bytes", "training_peak_bytes"):
            assert float(row[field]) == run[field]
        for prefix, values in (("test_loss", run["test_losses"]), ("weight", run["weights"]),
                               ("validation_loss", run["validation_losses"]),
                               ("rows", run["given"]), ("seconds", run["seconds"])):  # fmt: skip
            known = {name: value for name, value in values.items() if value is not None}
            assert {n: float(row[f"{prefix}:{n}"]) for n in known} == known
        assert float(row["score:gsm8k"]) == run["scores"]["gsm8k"]["value"]
    table = (plan.output / "compare.tex").read_text().splitlines()
    assert table[0] == r"% needs \usepackage{booktabs}"
    assert table[1] == "% " + progress(comparison) and "8 of " in table[1], "it is partial"
    assert table[2] == r"\begin{tabular}{l" + "r" * 10 + "}" and table[-1] == r"\end{tabular}"
    lines = [line for line in table if line.endswith(r" \\")]
    names = [method["name"] for method in comparison["methods"]]
    assert [line.split(" & ")[0] for line in lines] == ["method", *names]
    assert all(line.count(" & ") == 10 and "±" not in line for line in lines)
    assert latex(["a_b"], [["50% & ± \\"]]).count(r"50\% \& $\pm$ \textbackslash{} \\") == 1
    assert r"a\_b \\" in latex(["a_b"], [])
    with open(plan.output / "compare.pdf", "rb") as pdf:
        assert pdf.read(5) == b"%PDF-"


def test_the_page_says_who_is_best_and_what_comes_next(plan: Plan) -> None:
    comparison, want = collect(plan), worked_out(plan)
    write_page(plan.output, comparison)
    text = " ".join((plan.output / "compare.html").read_text().split())
    first, second = (method["name"] for method in comparison["methods"][:2])
    loss, behind = want[first]["test_loss"]["mean"], want[second]["behind"]["mean"]
    best = f"{first} has the lowest test loss, {loss:.4f}; {second} is {behind:.4f} behind"
    assert f'<p class="headline">So far, 8 of 9 runs: {best}' in text
    assert "8 of 9 runs done" in text and "<b>Start it again before you choose.</b>" in text
    assert "Use the mixture" not in text and "no result yet" not in text
    for method in comparison["methods"]:
        assert shown(want[method["name"]]["test_loss"], 4) in text
        for run in method["runs"]:
            assert f'title="seed {run["seed"]}: {run["test_loss"]:.4f}"' in text
        for source in SOURCES:
            weight = want[method["name"]]["weights"][source]["mean"]
            assert f'title="{source} {percent(weight)}"' in text


def test_the_page_has_the_sources_that_have_no_colour_together(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, want = collect(plan), worked_out(plan)
    monkeypatch.setattr(page, "SOURCES_SHOWN", len(SOURCES) - 1)
    write_page(plan.output, comparison)
    text = (plan.output / "compare.html").read_text()
    for method in comparison["methods"]:
        weights = want[method["name"]]["weights"]
        others = [s for s in SOURCES if f'title="{s} {percent(weights[s]["mean"])}"' not in text]
        assert len(others) == 1
        assert f'title="others {percent(weights[others[0]]["mean"])}"' in text


def test_the_page_tells_luck_from_a_difference() -> None:
    def method(name: str, losses: list[float]) -> dict[str, Any]:
        runs = [{"seed": seed, "test_loss": loss} for seed, loss in enumerate(losses)]
        behind = spread([loss - best for loss, best in zip(losses, BEST, strict=False)])
        return {"name": name, "runs": runs, "behind": behind, "test_loss": spread(losses)}

    def told(*methods: dict[str, Any], planned: int = 6) -> list[Advice]:
        seeds = [run["seed"] for run in methods[0]["runs"]]
        comparison = {"methods": list(methods), "runs_planned": planned, "seeds": seeds,
                      "methods_planned": ["best", "clear"], "seconds_left": None}  # fmt: skip
        return advice(Path("a folder"), comparison)

    def asked(*methods: dict[str, Any], planned: int = 6) -> list[str]:
        return [each.do for each in told(*methods, planned=planned)]

    best = method("best", BEST)
    clear, close = method("clear", [2.1, 2.12, 2.11]), method("close", [2.05, 1.99, 2.02])
    assert asked(best, clear) == ["Use the mixture of best"]
    assert asked(best, close) == ["Do not choose between best and close by this"]
    # Twice the standard error of three seeds whose differences spread by 0.015 is 0.0173.
    for behind, tied in ((0.016, True), (0.019, False)):
        ahead = [behind - 0.015, behind, behind + 0.015]
        near = method("near", [loss + more for loss, more in zip(BEST, ahead, strict=True)])
        assert asked(best, near)[0].startswith("Do not choose" if tied else "Use the mixture")
    assert headline([best, close]).endswith("close is 0.0200 behind, worse in 2 of 3 seeds.")
    even = method("even", [2.06, 2.0, 2.0])
    assert headline([best, even]).endswith("even is 0.0200 behind, worse in 1 of 3 seeds.")
    once = [method("best", BEST[:1]), method("clear", [2.1])]
    assert asked(*once, planned=2) == ["Add seeds", "Use the mixture of best"]
    assert headline(once).endswith("worse in 1 of 1 seed. With one seed, this may be luck.")
    assert asked(*once, planned=4) == ["Start it again before you choose"]
    again = shlex.split(told(*once, planned=4)[0].command)
    assert again == ["megatron-scalebio", "compare", "--config", "a folder/compare.yaml"]
    words = shlex.split(told(*once, planned=2)[0].command)
    assert words[2:] == ["--config", "a folder/compare.yaml", "--seeds", "0", "1", "2"]
    equal = [method("best", BEST), method("same", BEST)]
    assert asked(*equal) == ["Do not choose between best and same by this"]
    assert headline(equal).startswith("best and same end at the same test loss, ")
    equal = [method("best", BEST[:1]), method("same", BEST[:1])]
    assert asked(*equal, planned=2)[1:] == ["Do not choose between best and same by this"]
    once[0]["runs"][0]["seed"] = 1
    assert told(*once, planned=2)[0].command.endswith("--seeds 1 0 2")


def test_a_comparison_that_was_stopped_says_what_it_lacks(plan: Plan) -> None:
    """One method has no result, and one is there under one seed."""
    assert rest(collect(plan)) == "the same command does the rest", "no benchmarks were timed"
    for stage in plan.preparation:
        leave(stage.product, {})
    for run in plan.runs:
        if run.method == "doge" or (run.method == "natural" and run.seed != SEEDS[0]):
            (run.folder / "train" / "evaluation.json").unlink()
        leave(run.folder / "benchmarks.timing.json", {"seconds": 40.0})
    comparison = collect(plan)
    want = (
        "So far, 3 of 9 runs (method and seed) are done; there is no result yet of 1 of 3 methods "
        f"(doge); the same command does the rest, in about {duration(round(seconds_left([*plan])))}"
    )
    assert progress(comparison) == want and want.endswith(" min")
    write(plan.output, comparison, Console(file=io.StringIO(), width=200))
    lines = (plan.output / "compare.md").read_text().splitlines()
    assert lines[:3] == ["# Comparison", "", f"**{want}**"]
    text = " ".join((plan.output / "compare.html").read_text().split())
    assert '<p class="headline">So far, 3 of 9 runs: regmix has' in text
    assert "With one seed, this may be luck." in text and "Use the mixture" not in text
    assert "There is no result yet of 1 of 3 methods (doge); the same" in text
    assert "<span>Methods</span><b>2</b><small>of 3, the others have no result yet</small>" in text


def test_the_time_left_is_that_of_like_stages(plan: Plan) -> None:
    """What regmix's last run, the only one to come, lacks is its benchmarks."""
    stages = list(plan)
    assert [stage.title for stage in stages if not stage.done] == [
        stage.title for stage in plan.preparation
    ] + ["regmix, seed 11: benchmarks"]
    [last] = [stage for stage in plan.runs[-1].stages if stage.log.stem == "benchmarks"]
    ours = [stage for run in plan.runs for stage in run.stages]
    assert seconds_left(ours) is None, "no benchmarks were timed"
    leave(plan.runs[0].folder / "benchmarks.timing.json", {"seconds": 40.0})
    assert plan.runs[0].method == "natural" and seconds_left(ours) == 40, "of another method"
    leave(plan.runs[1].folder / "benchmarks.timing.json", {"seconds": 50.0})
    assert seconds_left(ours) == 45, "their mean"
    leave(plan.runs[2].folder / "benchmarks.timing.json", {"seconds": 7.0})
    assert plan.runs[2].method == last.kind[0] and seconds_left(ours) == 7, "of its own"
    last.product.touch()
    assert seconds_left(ours) == 0


def test_the_picture_shows_these_numbers(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plot.pyplot, "close", drawn.append)
    monkeypatch.setattr(plot, "SOURCES_SHOWN", 2)
    comparison, want = collect(plan), worked_out(plan)
    plot.draw(comparison, plan.output / "x.png", "png")
    [figure] = drawn
    losses, weights = figure.axes
    from_below = [label.get_text() for label in losses.get_yticklabels()]
    assert from_below == [method["name"] for method in comparison["methods"]][::-1]
    for row, (name, bar) in enumerate(zip(from_below, losses.containers, strict=True)):
        point, caps, _ = bar.lines
        mean, sd = (want[name]["test_loss"][key] for key in ("mean", "sd"))
        assert (point.get_xdata()[0], point.get_ydata()[0]) == (pytest.approx(mean), row)
        assert [cap.get_xdata()[0] for cap in caps] == pytest.approx([mean - sd, mean + sd])
        seeds = [line for line in losses.lines if row - 0.5 < line.get_ydata()[0] < row]
        runs = next(m["runs"] for m in comparison["methods"] if m["name"] == name)
        assert list(seeds[0].get_xdata()) == [run["test_loss"] for run in runs]
    widths = [[patch.get_width() for patch in bars] for bars in weights.containers]
    assert [bars.get_label() for bars in weights.containers] == ["code", "web", "others"]
    assert len({bars[0].get_hatch() for bars in weights.containers[:2]}) == 2, "without colours"
    assert len(set(plot.HATCHES)) == 10
    for row, name in enumerate(from_below):
        shares = [want[name]["weights"][source]["mean"] for source in SOURCES]
        assert [column[row] for column in widths] == pytest.approx(shares)
        starts = [bars[row].get_x() for bars in weights.containers]
        assert starts == pytest.approx([0.0, shares[0], shares[0] + shares[1]])
