"""A swarm as two tables in olmix' published form (arXiv 2602.12237), a row a training.

    ratios.csv    run, and a column for each source: its share of the mixture
    metrics.csv   run, and a column for each loss, lower is better

They are joined by `run` (or `run_id`); `name`, `index` and columns without a name say nothing.
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_scalebio.errors import UserError
from megatron_scalebio.formatting import few
from megatron_scalebio.mixture.sampler import Floats
from megatron_scalebio.whole_files import write_text

RATIOS_FILE, METRICS_FILE = "ratios.csv", "metrics.csv"
WHOLE = 0.01  # how far from 1 a mixture may add up to, in tables that round


def write_tables(
    folder: Path, sources: Sequence[str], mixture_NS: Floats, sets: Sequence[str], loss_NV: Floats
) -> None:
    for file, names, value_NX in (
        (RATIOS_FILE, sources, mixture_NS),
        (METRICS_FILE, sets, loss_NV),
    ):
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["run", *names])
        table.writerows([f"{run:04}", *row] for run, row in enumerate(value_NX.tolist()))
        write_text(folder / file, text.getvalue())


def read_tables(folder: Path, sources: Sequence[str]) -> tuple[Floats, Floats]:
    """Mixtures of the sources, and losses, of every training that both tables have.

    Raises:
        UserError: if a table is missing or damaged, or is not one of these sources.
    """
    ratios_path, metrics_path = folder / RATIOS_FILE, folder / METRICS_FILE
    ratios, metrics = _read(ratios_path), _read(metrics_path)
    named = list(next(iter(ratios.values())))
    wrong = [f"lacks {few(lost)}" for lost in [sorted(set(sources) - set(named))] if lost]
    wrong += [f"has {few(more)} besides" for more in [sorted(set(named) - set(sources))] if more]
    if wrong:
        raise UserError(
            f"{ratios_path}: {' and '.join(wrong)} (its columns must be the run's sources)"
        )
    odd = sorted(set(ratios) ^ set(metrics))
    if odd:
        raise UserError(f"{folder}: only one of the two tables has the runs {few(odd)} (drop them)")
    if len(ratios) <= len(sources):
        raise UserError(
            f"{ratios_path}: {len(ratios)} runs can't tell {len(sources)} sources apart (give "
            f"{len(sources) + 1} or more)"
        )
    for run, row in ratios.items():
        if min(row.values()) < 0 or abs(sum(row.values()) - 1) > WHOLE:
            raise UserError(f"{ratios_path}: run {run}: {list(row.values())} is not a mixture")
        if min(metrics[run].values()) <= 0:
            raise UserError(
                f"{metrics_path}: run {run}: {min(metrics[run].values())} is not a loss (above 0)"
            )
    mixture_NS = np.array([[row[name] for name in sources] for row in ratios.values()])
    loss_NV = np.array([list(metrics[run].values()) for run in ratios])
    return mixture_NS / mixture_NS.sum(axis=1, keepdims=True), loss_NV


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Its numbers by run and column."""
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot read it: {said} (baseline.swarm: a folder of {RATIOS_FILE} and "
            f"{METRICS_FILE})"
        ) from None
    found: dict[str, dict[str, float]] = {}
    for line, row in enumerate(rows, 2):
        run = row.get("run") or row.get("run_id")
        if not run or run in found:
            raise UserError(f"{path}: line {line}: run is {run!r} (each row needs one of its own)")
        found[run] = {}
        for name, text in row.items():
            if name in ("run", "run_id", "name", "index", "", None) or name.startswith("Unnamed:"):
                continue
            try:
                found[run][name] = float(text)
            except (TypeError, ValueError):
                found[run][name] = math.nan
            if not math.isfinite(found[run][name]):
                raise UserError(f"{path}: line {line}: {name} is {text!r}, not a number")
    if not found or not next(iter(found.values())):
        raise UserError(f"{path}: holds no numbers of any run")
    return found
