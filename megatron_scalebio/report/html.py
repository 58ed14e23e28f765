"""`megatron-scalebio report RUN`: one self-contained HTML page about a run."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scalebio.errors import EXIT_OK
from megatron_scalebio.formatting import percent
from megatron_scalebio.report import page, summary
from megatron_scalebio.report.advice import advice
from megatron_scalebio.report.charts import GREY_LINES, mixture_charts, training_charts
from megatron_scalebio.report.load import Run, load_run
from megatron_scalebio.report.sets import heat_map
from megatron_scalebio.report.svg import COLOURS
from megatron_scalebio.whole_files import write_text

ROWS_DRAWN = 20  # in the picture of the weights; the table holds all
SERVED_SHOWN = 40  # in the picture of what serves which set; interaction.npz holds all
SKIPS_SHOWN = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="output folder of `reweight`, finished or not")
    parser.add_argument("--output", metavar="FILE", help="page to write [RUN/report.html]")


def run(args: argparse.Namespace) -> int:
    print(write_report(args.run, args.output))
    return EXIT_OK


def write_report(run_dir: Path | str, output: Path | str | None = None) -> Path:
    """Writes the page, whole or not at all, and returns its path.

    Args:
        run_dir: a run folder, finished or not.
        output: the file to write [run_dir/report.html].

    Raises:
        UserError: for a folder that is no run, a malformed file in it, or an unwritable output.
    """
    output = Path(output or Path(run_dir) / "report.html")
    write_text(output, render_report(load_run(run_dir)))
    return output


def render_report(run: Run) -> str:
    """The page as text."""
    return page.render("template.html.j2", **_context(run))


def _context(run: Run) -> dict[str, Any]:
    rows = summary.source_rows(run)
    colours = {row.name: i for i, row in enumerate(rows[:COLOURS])}
    drawn = rows[:ROWS_DRAWN]
    shares = [
        v for row in drawn for v in (row.weight, row.high, row.initial, row.natural, row.known)
    ]
    return {
        "run": run,
        "verdict": summary.verdict(run),
        "advice": advice(run, rows),
        "counted": summary.counted_in(run),
        "rows": rows,
        "colours": colours,
        "drawn": drawn,
        "scale": _round_up(max((v for v in shares if v is not None), default=1.0)),
        "rest": sum(row.weight for row in rows[ROWS_DRAWN:]),
        "changes": summary.biggest_changes(rows),
        "groups": sorted(run.weights.groups, key=lambda g: -g.weight) if run.weights else [],
        "levels": run.weights.levels if run.weights else [],
        "served": heat_map(run.interaction, [row.name for row in rows[:SERVED_SHOWN]]),
        "repeats": any(row.epochs is not None for row in rows),
        "distance": summary.known_distance(rows),
        "left_out": [row for row in rows if row.in_blend is False],
        "validation": summary.start_and_end(run.history.scalars["validation_loss"]),
        "cost": summary.cost(run),
        "phases": summary.step_phases(run),
        "averaged": percent(run.setting("bilevel", "average_fraction") or 0.5),
        "skipped": run.history.skipped[:SKIPS_SHOWN],
        "skipped_count": len(run.history.skipped),
        "span": summary.smoothing_span(len(run.history.steps)),
        "band": len(rows) - len(colours) > GREY_LINES,
        "charts": mixture_charts(run, rows, colours) | training_charts(run),
    }


def _round_up(share: float) -> float:
    """The end of the weights' axis: the next twentieth."""
    return min(1.0, max(0.05, np.ceil(share * 20 - 1e-9) / 20))
