"""Reads what the stages left and puts it side by side: compare.html, .md, .json, .csv and so on.

Cost is given in equivalents of the final training: tokens that went through a model of its size
while the mixture was searched, a forward pass counted as a third of forward and backward, over the
tokens of the final training (the mean of all runs: one unit for all). What LISA spares and
recomputation adds is left out of both.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_scalebio.compare.page import write_page
from megatron_scalebio.compare.plot import draw
from megatron_scalebio.compare.stages import WEIGHTS_FILE, Plan, Run, read, seconds_left
from megatron_scalebio.compare.tables import csv_text, largest, latex, progress
from megatron_scalebio.formatting import duration
from megatron_scalebio.whole_files import replaced, write_json, write_text

Content = dict[str, Any]

_ON_SCREEN = 5  # sources


def collect(plan: Plan) -> Content:
    """Everything that is there yet; a method appears once one of its runs is complete."""
    complete: dict[str, list[Content]] = {}
    for planned in plan.runs:
        content = _read_run(plan, planned)
        if content is not None:
            complete.setdefault(planned.method, []).append(content)
    unit = fmean([run["training_tokens"] for runs in complete.values() for run in runs] or [1])
    for run in (run for runs in complete.values() for run in runs):
        run["cost"] = run["search_tokens"] / unit
    methods = [{"name": name, "runs": runs, **_summary(runs)} for name, runs in complete.items()]
    methods.sort(key=lambda method: method["test_loss"]["mean"])
    for method in methods:
        method["behind"] = _behind(methods[0]["runs"], method["runs"])
    return {
        "sources": list(plan.config.sources),
        "seeds": plan.config.seeds,
        "test": list(plan.config.test),
        "runs_planned": len(plan.runs),
        "methods_planned": plan.config.methods,
        "seconds_left": seconds_left(list(plan)),
        "num_samples": plan.num_samples,
        "max_epochs": plan.config.max_epochs,
        "methods": methods,
    }


def _read_run(plan: Plan, run: Run) -> Content | None:
    if not all(stage.done for stage in run.stages):
        return None
    found = read(run.folder / "find" / WEIGHTS_FILE)
    drawn = read(run.folder / "sample" / "manifest.json")
    trained = read(run.folder / "train" / "evaluation.json")
    mean = plan.config.sections_of_training().get("data", {}).get("loss_mean", "sample")
    kind = f"{mean}_mean"
    losses = {entry["name"]: entry[kind] for entry in trained["sets"]}
    spent = found["cost"]
    scores = {}
    if plan.config.tasks:
        tasks = read(run.folder / "benchmarks" / "evaluation.json")["benchmarks"]
        scores = {task: next(iter(entry["scores"].values())) for task, entry in tasks.items()}
    return {
        "seed": run.seed,
        "test_loss": fmean(losses[name] for name in plan.config.test),
        "test_losses": {name: losses[name] for name in plan.config.test},
        "validation_losses": {name: losses[name] for name in plan.config.validation},
        "weights": {entry["name"]: entry["weight"] for entry in found["sources"]},
        "given": {entry["name"]: entry["given"] for entry in drawn["sources"]},
        "rows": sum(entry["given"] for entry in drawn["sources"]),
        "search_tokens": spent["trained_tokens"] + spent["scored_tokens"] / 3,
        "training_tokens": trained["cost"]["trained_tokens"],
        "search_peak_bytes": read(run.folder / "find" / "memory.json")["peak_bytes"],
        "training_peak_bytes": read(run.folder / "train" / "memory.json")["peak_bytes"],
        "seconds": {stage.log.stem: _seconds(stage.log) for stage in run.stages},
        "scores": scores,
    }


def _behind(best: Sequence[Content], runs: Sequence[Content]) -> Content | None:
    """How much more test loss than the best method's run of the same seed."""
    of_best = {run["seed"]: run["test_loss"] for run in best}
    both = [run["test_loss"] - of_best[run["seed"]] for run in runs if run["seed"] in of_best]
    return spread(both) if both else None


def _seconds(log: Path) -> float | None:
    """None if `compare` was killed while the stage ran on to its end."""
    path = log.with_suffix(".timing.json")
    return float(read(path)["seconds"]) if path.exists() else None


def _summary(runs: Sequence[Content]) -> Content:
    return {
        "test_loss": spread(run["test_loss"] for run in runs),
        "weights": {
            name: spread(run["weights"][name] for run in runs) for name in runs[0]["weights"]
        },
        "rows": spread(run["rows"] for run in runs),
        "cost": spread(run["cost"] for run in runs),
        "search_seconds": spread(run["seconds"]["find"] for run in runs),
        "training_seconds": spread(run["seconds"]["train"] for run in runs),
        "search_peak_bytes": max(run["search_peak_bytes"] for run in runs),
        "scores": {
            task: spread(run["scores"][task]["value"] for run in runs) for task in runs[0]["scores"]
        },
    }


def spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds (null of one); null where a seed's is unknown."""
    given = list(values)
    known = [value for value in given if value is not None]
    if len(known) < len(given):
        return {"mean": None, "sd": None}
    return {"mean": fmean(known), "sd": stdev(known) if len(known) > 1 else None}


def write(folder: Path, comparison: Content, console: Console) -> None:
    """Writes the files and shows the table."""
    write_json(folder / "compare.json", comparison)
    write_text(
        folder / "compare.md", markdown(comparison, *table(comparison, comparison["sources"]))
    )
    write_text(folder / "compare.csv", csv_text(comparison))
    write_page(folder, comparison)
    for suffix in ("png", "pdf"):
        with replaced(folder / f"compare.{suffix}") as temporary:
            draw(comparison, temporary, suffix)
    shown_sources = largest(comparison, _ON_SCREEN)
    head, rows = table(comparison, shown_sources)
    write_text(folder / "compare.tex", latex(head, rows, progress(comparison)))
    screen = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in head:
        screen.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        screen.add_row(*row)
    console.print(screen)
    if len(shown_sources) < len(comparison["sources"]):
        console.print("weights of the other sources: compare.md")
    if remark := progress(comparison):
        console.print(remark)
    for suffix in ("html", "md", "png", "pdf", "csv", "tex", "json"):
        console.print(folder / f"compare.{suffix}", soft_wrap=True)


def table(comparison: Content, sources: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, the lowest test loss first, with the weights of some sources."""
    tasks = list(comparison["methods"][0]["scores"])
    head = [
        "method",
        "test loss",
        "behind",
        *tasks,
        *sources,
        "rows",
        "cost",
        "search",
        "memory",
    ]
    rows = []
    for method in comparison["methods"]:
        seconds = method["search_seconds"]["mean"]
        rows.append(
            [
                method["name"],
                shown(method["test_loss"], "{:.4f}".format),
                shown(method["behind"], "{:.4f}".format),
                *(shown(method["scores"][task], "{:.3f}".format) for task in tasks),
                *(shown(method["weights"][s], "{:.2f}".format) for s in sources),
                f"{method['rows']['mean']:,.0f}",
                f"{method['cost']['mean']:.2f}",
                "-" if seconds is None else duration(round(seconds)),
                f"{method['search_peak_bytes'] / 2**30:.1f} GiB",
            ]
        )
    return head, rows


def shown(value: dict[str, float | None] | None, form: Callable[[float], str]) -> str:
    if value is None or value["mean"] is None:
        return "-"
    if value["sd"] is None:
        return form(value["mean"])
    return f"{form(value['mean'])} ± {form(value['sd'])}"


def markdown(comparison: Content, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    complete = {len(method["runs"]) for method in comparison["methods"]}
    seeds = f"{min(complete)} to {max(complete)}" if len(complete) > 1 else f"{max(complete)}"
    spreads = f"Mean ± standard deviation over {seeds} seeds (no ± with one)."
    if complete == {1}:
        spreads = "One seed each: the spread between seeds is unknown."
    remark = progress(comparison)
    title = f"# Comparison\n\n**{remark}**\n" if remark else "# Comparison\n"
    return f"""{title}
{body}

![Test loss and weights](compare.png)

{spreads} Every method's training set has up to
{comparison["num_samples"]:,} rows and is trained on for the same number of steps, from the same
model. *test loss*: mean over {", ".join(comparison["test"])}, at the last step. *behind*: how much
more than the best method under the same seed. *rows*: of the training set; a method that chooses
few examples gets fewer, each at most {comparison["max_epochs"]} times. *cost*: tokens that went
through a model while the mixture was searched, in units of the mean final training (a forward pass
alone counts a third). *search*, *memory*: wall time and peak memory of rank 0 meanwhile.
"""
