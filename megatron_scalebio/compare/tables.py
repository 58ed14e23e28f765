"""What a comparison's tables hold; a CSV of every run, a LaTeX table of every method."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from megatron_scalebio.formatting import duration, few


def csv_text(comparison: dict[str, Any]) -> str:
    """A line for each method and seed, in full precision; times in seconds, memory in bytes."""
    text = io.StringIO()
    table: csv.DictWriter | None = None
    for method in comparison["methods"]:
        for run in method["runs"]:
            row = {
                "method": method["name"],
                "seed": run["seed"],
                "test_loss": run["test_loss"],
                **_prefixed("test_loss", run["test_losses"]),
                **_prefixed("validation_loss", run["validation_losses"]),
                **_prefixed("score", {task: s["value"] for task, s in run["scores"].items()}),
                **_prefixed("weight", run["weights"]),
                **_prefixed("rows", run["given"]),
                "cost": run["cost"],
                **_prefixed("seconds", run["seconds"]),
                "search_peak_bytes": run["search_peak_bytes"],
                "training_peak_bytes": run["training_peak_bytes"],
            }
            if table is None:
                table = csv.DictWriter(text, list(row), lineterminator="\n")
                table.writeheader()
            table.writerow(row)
    return text.getvalue()


def largest(comparison: dict[str, Any], count: int) -> list[str]:
    """The sources that some method gives the most, in the comparison's order."""

    def most(source: str) -> float:
        return max(method["weights"][source]["mean"] for method in comparison["methods"])

    chosen = sorted(comparison["sources"], key=most, reverse=True)[:count]
    return [source for source in comparison["sources"] if source in chosen]


def runs_done(comparison: dict[str, Any]) -> int:
    """Of a method and a seed each."""
    return sum(len(method["runs"]) for method in comparison["methods"])


def rest(comparison: dict[str, Any]) -> str:
    """What is still to come: methods without a result, and the time that it takes."""
    known = {method["name"] for method in comparison["methods"]}
    planned = comparison["methods_planned"]
    absent = [name for name in planned if name not in known]
    without = f"there is no result yet of {len(absent)} of {len(planned)} methods ({few(absent)}); "
    seconds = comparison["seconds_left"]
    time = f", in about {duration(round(seconds))}" if seconds else ""
    return f"{without if absent else ''}the same command does the rest{time}"


def progress(comparison: dict[str, Any]) -> str:
    """How far the comparison is, "" if it is complete."""
    done, planned = runs_done(comparison), comparison["runs_planned"]
    if done == planned:
        return ""
    return f"So far, {done} of {planned} runs (method and seed) are done; {rest(comparison)}"


def _prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}:{name}": value for name, value in values.items()}


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "±": "$\\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}  # fmt: skip


def latex(head: Sequence[str], rows: Sequence[Sequence[str]], remark: str = "") -> str:
    """The table of the screen, for LaTeX with the package booktabs; a remark is a comment in it."""

    def line(cells: Sequence[str]) -> str:
        escaped = ["".join(_LATEX.get(c, c) for c in cell) for cell in cells]
        return " & ".join(escaped) + r" \\"

    body = "\n".join(map(line, rows))
    columns = "l" + "r" * (len(head) - 1)
    told = "".join(f"% {text}\n" for text in (r"needs \usepackage{booktabs}", remark) if text)
    return (
        f"{told}\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(head)}\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n"
    )
