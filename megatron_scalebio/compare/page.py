"""compare.html: the comparison as a page of the same kind as a run's report."""

import math
import shlex
from pathlib import Path
from typing import Any

from megatron_scalebio.compare.tables import largest, rest, runs_done
from megatron_scalebio.report import page
from megatron_scalebio.report.advice import Advice
from megatron_scalebio.report.summary import sentence
from megatron_scalebio.whole_files import write_text

_SHOWN = 0.00005  # half of the last digit of a loss
SOURCES_SHOWN = 7  # in colour; the others together are the eighth


def write_page(folder: Path, comparison: dict[str, Any]) -> None:
    """Writes the page into the comparison's folder."""
    methods = comparison["methods"]
    losses = [run["test_loss"] for method in methods for run in method["runs"]]
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.05

    def place(loss: float) -> str:
        return f"{100 * (loss - low + margin) / (high - low + 2 * margin):.2f}%"

    coloured = largest(comparison, SOURCES_SHOWN)
    done, planned = runs_done(comparison), comparison["runs_planned"]
    so_far = f"So far, {done} of {planned} runs: " if done < planned else ""
    context = {
        "folder": folder.resolve().name,
        "comparison": comparison,
        "done": done,
        "headline": so_far + headline(methods),
        "advice": advice(folder, comparison),
        "place": place,
        "ends": (low, high),
        "largest": coloured,
        "rest": {
            method["name"]: max(0.0, 1 - sum(method["weights"][name]["mean"] for name in coloured))
            for method in methods
        },
    }
    write_text(folder / "compare.html", page.render("compare.html.j2", **context))


def headline(methods: list[dict[str, Any]]) -> str:
    """Which method is best, and whether the seeds agree."""
    best = methods[0]
    if len(methods) == 1:
        return f"{best['name']} alone is done: a test loss of {best['test_loss']['mean']:.4f}."
    once = min(len(method["runs"]) for method in methods[:2]) == 1
    return _between(best, methods[1]) + (" With one seed, this may be luck." if once else "")


def _between(best: dict[str, Any], second: dict[str, Any]) -> str:
    behind = second["behind"]
    said = f"{best['name']} has the lowest test loss, {best['test_loss']['mean']:.4f}"
    if behind is None:
        return f"{said}; {second['name']}, next, was run with other seeds."
    ahead = _seeds_ahead(best, second)
    if _equal(second):
        names = f"{best['name']} and {second['name']}"
        return f"{names} end at the same test loss, {best['test_loss']['mean']:.4f}."
    return (
        f"{said}; {second['name']} is {behind['mean']:.4f} behind, worse in {ahead[0]} of "
        f"{ahead[1]} seed{'s' if ahead[1] > 1 else ''}."
    )


def _seeds_ahead(best: dict[str, Any], other: dict[str, Any]) -> tuple[int, int]:
    theirs = {run["seed"]: run["test_loss"] for run in other["runs"]}
    both = [
        (run["test_loss"], theirs[run["seed"]]) for run in best["runs"] if run["seed"] in theirs
    ]
    return sum(mine < their for mine, their in both), len(both)


def advice(folder: Path, comparison: dict[str, Any]) -> list[Advice]:
    """What comes next, the most important first."""
    methods, config = comparison["methods"], shlex.quote(f"{folder}/compare.yaml")
    again = f"megatron-scalebio compare --config {config}"
    if runs_done(comparison) < comparison["runs_planned"]:
        why = f"{sentence(rest(comparison))} What is there is kept:"
        return [Advice("Start it again before you choose", why, again)]
    found = []
    if min(len(method["runs"]) for method in methods) < 3:
        found.append(
            Advice(
                "Add seeds",
                "With fewer than three of each, a difference may be luck. What is there is kept:",
                f"{again} --seeds {' '.join(map(str, _three(comparison['seeds'])))}",
            )
        )
    tied = [method["name"] for method in methods[1:] if _within_noise(methods[0], method)]
    if tied:
        found.append(
            Advice(
                f"Do not choose between {methods[0]['name']} and {', '.join(tied)} by this",
                "They end equal, or within twice the standard error of their difference over the "
                "seeds: take the cheaper, or compare longer trainings.",
            )
        )
    else:
        best = methods[0]["runs"][0]
        found.append(
            Advice(
                f"Use the mixture of {methods[0]['name']}",
                "Its weights, of one seed, and a model trained on them are in its folder:",
                f"{folder}/{methods[0]['name']}/seed-{best['seed']}",
            )
        )
    return found


def _three(seeds: list[int]) -> list[int]:
    """Those that there are, and the lowest others to make them three."""
    return [*seeds, *(seed for seed in range(3) if seed not in seeds)][:3]


def _equal(other: dict[str, Any]) -> bool:
    """To the digits that are shown: their training sets may have been the same."""
    behind = other["behind"]
    return behind is not None and abs(behind["mean"]) < _SHOWN and not behind["sd"]


def _within_noise(best: dict[str, Any], other: dict[str, Any]) -> bool:
    behind, seeds = other["behind"], _seeds_ahead(best, other)[1]
    if _equal(other):
        return True
    if behind is None or behind["sd"] is None:
        return False
    return behind["mean"] <= 2 * behind["sd"] / math.sqrt(seeds)
