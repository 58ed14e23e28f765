"""The charts of a run's report: which series, in which colours."""

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from megatron_scalebio.report.load import Run
from megatron_scalebio.report.summary import SourceRow, smooth
from megatron_scalebio.report.svg import COLOURS, Chart, Line, render

GREY_LINES = 60  # above this, the range of the other sources is drawn instead of each
_HALF_WIDTH, _HALF_HEIGHT = 560, 250  # two charts side by side


def mixture_charts(run: Run, rows: list[SourceRow], colours: dict[str, int]) -> dict[str, Markup]:
    """The weights and the excess loss of each source; `colours` names those in colour."""
    history = run.history
    targets = [
        (colours[row.name], row.known)
        for row in rows
        if row.name in colours and row.known is not None
    ]
    weights, weights_band = _source_lines(run, history.per_source["weights"], colours)
    excess, excess_band = _source_lines(run, smooth(history.per_source["excess_loss"]), colours)
    return {
        "weights": render(
            Chart(
                history.source_steps, weights, "Weight of each source by step", kind="percent",
                zero=True, band=weights_band, targets=targets, height=380,
            )
        ),
        "excess": render(
            Chart(
                history.source_steps, excess, "Excess loss of each source by step", zero=True,
                band=excess_band, height=340,
            )
        ),
    }  # fmt: skip


def training_charts(run: Run) -> dict[str, Markup]:
    """Losses, gradient norms, rates and time: one value a step."""
    steps, scalars = run.history.steps, run.history.scalars

    def chart(title: str, lines: list[Line], *, log: bool = False, zero: bool = False) -> Markup:
        return render(
            Chart(
                steps, lines, title, log=log, zero=zero, labels=len(lines) > 1,
                width=_HALF_WIDTH, height=_HALF_HEIGHT,
            )
        )  # fmt: skip

    validation = [_line("L1", scalars["validation_loss"], 0)]
    if len(run.validation) > 1:
        sets = zip(run.validation[: COLOURS - 1], run.history.validation.T, strict=False)
        validation = [_line(name, values, i + 1) for i, (name, values) in enumerate(sets)]
        validation.append(_line("L1, all sets", scalars["validation_loss"], 0))
    w, u = scalars["train_loss_w"], scalars["train_loss_u"]
    roles = list(enumerate(("w", "u", "lambda")))
    norms = [_line(role, scalars[f"grad_norm_{role}"], i) for i, role in roles]
    rates = [Line(role, scalars[f"lr_{role}"], i) for i, role in roles]
    training = [_line("L2(w) model", w, 0), _line("L2(u) reference", u, 1)]
    return {
        "validation": chart("Validation loss", validation),
        "training": chart("Training loss of w and u", training),
        "gap": chart("Gap between w and u", [_line("L2(w) − L2(u)", w - u, 2)], zero=True),
        "norms": chart("Gradient norms", norms, log=True),
        "rates": chart("Learning rates", rates, log=True),
        "alpha": chart("Alpha", [Line("alpha", scalars["alpha"], 3)], zero=True),
        "step_time": chart("Step time", [_line("seconds", scalars["step_time_s"], 4)], zero=True),
    }


def _line(name: str, values: NDArray[np.float64], colour: int) -> Line:
    return Line(name, smooth(values), colour, raw=values)


def _source_lines(
    run: Run, values: NDArray[np.floating], colours: dict[str, int]
) -> tuple[list[Line], tuple[NDArray[np.float64], NDArray[np.float64]] | None]:
    """The heaviest sources in colour over the others in grey, or over their 5-95 % range."""
    named = [i for i, name in enumerate(run.sources) if name in colours]
    others = [i for i, name in enumerate(run.sources) if name not in colours]
    lines, band = [], None
    if len(others) <= GREY_LINES:
        lines = [Line(run.sources[i], values[:, i]) for i in others]
    else:
        # nanquantile warns of a step in which no other source has a value: leave it a gap.
        known = np.isfinite(values[:, others]).any(axis=1)
        band = np.full(len(values), np.nan), np.full(len(values), np.nan)
        if known.any():
            shown = values[known][:, others]
            band[0][known], band[1][known] = np.nanquantile(shown, [0.05, 0.95], axis=1)
    named.sort(key=lambda i: -colours[run.sources[i]])
    lines += [Line(run.sources[i], values[:, i], colours[run.sources[i]]) for i in named]
    return lines, band
