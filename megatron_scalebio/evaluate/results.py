"""``evaluation.json``, a section for every kind of evaluation, and the tables that are printed."""

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from megatron_scalebio.errors import UserError
from megatron_scalebio.whole_files import write_json, write_text

RESULTS_FILE = "evaluation.json"


def write_section(folder: Path, section: str, content: Any) -> None:
    """Puts a section into the folder's ``evaluation.json`` and leaves the others as they are.

    Raises:
        UserError: the file is damaged or cannot be written.
    """
    path = folder / RESULTS_FILE
    try:
        whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        whole[section] = content
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}) (remove it)") from None
    write_json(path, whole)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Replaces a JSONL file."""
    write_text(path, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records))


def benchmark_table(results: dict[str, Any]) -> Table:
    """One row a task and metric: score, standard error, and how the task was prompted."""
    table = Table(title="benchmarks", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("task", "metric"):
        table.add_column(heading)
    for heading in ("score", "± s.e.", "problems", "shots", "prompt"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, found in results.items():
        for metric, score in found["scores"].items():
            table.add_row(
                task,
                metric,
                f"{score['value']:.4f}",
                _or_dash(score["stderr"], 4),
                f"{found['problems']:,}",
                str(found["num_fewshot"]),
                "chat template" if found["chat_template"] else "plain",
            )
    return table


def judge_table(summary: dict[str, Any]) -> Table:
    """MT-Bench's scores by category, by turn and overall."""
    table = Table(
        title=f"MT-Bench, judged by {summary['judge']}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("")
    for heading in ("score", "± s.e.", "graded"):
        table.add_column(heading, justify="right")
    rows = [*summary["by_category"].items()]
    rows += [(f"turn {turn}", score) for turn, score in summary["by_turn"].items()]
    for name, score in [*rows, ("all", summary["score"])]:
        if name == "all" or name == "turn 1":
            table.add_section()
        values = (f"{score['mean']:.2f}", _or_dash(score["stderr"], 2), str(score["graded"]))
        table.add_row(name, *values)
    return table


def _or_dash(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
