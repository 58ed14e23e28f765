"""What a run says, in numbers and plain words: verdict, changes, cost. No markup here."""

import math
import os
import shlex
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_scalebio.formatting import percent
from megatron_scalebio.report.history import number_or_none
from megatron_scalebio.report.load import Run, SourceWeight

NOTABLE_CHANGE = 0.02  # of the mixture, or a uniform share if less: below, no manager's line
END_SHARE = 0.05  # share of the steps over which "at the start" and "at the end" are averaged


@dataclass
class SourceRow(SourceWeight):
    """One source of the mixture; shares are fractions of 1, None where the run doesn't say."""

    natural: float | None = None
    known: float | None = None
    excess: float | None = None
    loss: float | None = None
    in_blend: bool | None = None

    @property
    def change(self) -> float | None:
        """Factor against the initial weight."""
        return self.weight / self.initial if self.initial else None


@dataclass
class Verdict:
    status: str  # "converged", "provisional" or "running": the page's colour
    label: str
    headline: str
    reason: str


def source_rows(run: Run) -> list[SourceRow]:
    """The sources, greatest weight first; from the last step where there is no weights.json."""
    natural = run.info.get("natural")
    known = run.setting("data", "known_weights")
    excess, loss = latest(run, "excess_loss"), latest(run, "loss_w")
    blend_paths = _blend_paths(run.blend)
    rows = []
    for i, source in enumerate(_weights(run)):
        rows.append(
            SourceRow(
                **vars(source), natural=_share(natural, i, len(run.sources)),
                known=(
                    number_or_none(known.get(source.name, 0.0)) if isinstance(known, dict) else None
                ),
                excess=excess[i], loss=loss[i],
                in_blend=(
                    {source.path, os.path.abspath(source.path)} & blend_paths != set()
                    if blend_paths and source.path else None
                ),
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: -row.weight)


def _blend_paths(blend: str) -> set[str]:
    try:
        return set(shlex.split(blend)[1::2])
    except ValueError:  # edited by hand
        return set()


def _weights(run: Run) -> list[SourceWeight]:
    if run.weights:
        return run.weights.sources
    mixture = run.history.per_source["weights"]
    if not len(mixture):
        return []
    return [
        SourceWeight(name, "", _or_zero(last), initial=_or_zero(first))
        for name, first, last in zip(run.sources, mixture[0], mixture[-1], strict=True)
    ]


def _or_zero(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0


def _share(shares: Any, index: int, count: int) -> float | None:
    return (
        number_or_none(shares[index]) if isinstance(shares, list) and len(shares) == count else None
    )


def latest(run: Run, name: str) -> list[float | None]:
    """A per-source series' value at the end of the run, smoothed, by source (S)."""
    values = run.history.per_source[name]
    if not len(values):
        return [None] * len(run.sources)
    return [number_or_none(float(value)) for value in smooth(values)[-1]]


def smoothing_span(count: int) -> int:
    """Steps that a smoothed curve of `count` steps remembers."""
    return max(4, count // 40)


def smooth(values: NDArray[Any]) -> NDArray[np.float64]:
    """Mean over the first axis, weights falling by 1/e in `smoothing_span` steps to both sides.

    Two-sided, so that a falling curve isn't drawn late. NaN entries don't count; where nothing
    counts the result is NaN.
    """
    keep = 1.0 - 1.0 / smoothing_span(len(values))
    present = np.isfinite(values)
    filled = np.where(present, values, 0.0).astype(np.float64)
    both = _decaying_sum(filled, keep) + _decaying_sum(filled[::-1], keep)[::-1] - filled
    seen = _decaying_sum(present, keep) + _decaying_sum(present[::-1], keep)[::-1] - present
    return np.divide(both, seen, out=np.full(values.shape, math.nan), where=seen > 1e-6)


def _decaying_sum(values: NDArray[Any], keep: float) -> NDArray[np.float64]:
    sums = np.array(values, np.float64)
    for i in range(1, len(sums)):
        sums[i] += keep * sums[i - 1]
    return sums


def verdict(run: Run) -> Verdict:
    """Whether the weights can be used, in words for somebody who didn't run it."""
    weights = run.weights
    planned = number_or_none(run.setting("train", "train_iters"))
    progress = f"step {run.last_step:,}" + (f" of {planned:,.0f}" if planned else "")
    if not run.ended and not (weights and weights.converged):
        headline = f"The run is at {progress}: it is still going, or was interrupted."
        reason = "The weights below are those of its last step, and may still move."
        return Verdict("running", "In progress", headline, reason)
    if weights is None:
        return Verdict(
            "provisional", "No result", f"The run ended at {progress} without a result.",
            "weights.json is missing; the weights below are those of the last step.",
        )  # fmt: skip
    reason = sentence(weights.reason)
    if weights.converged:
        headline = f"The mixture has settled: the weights of step {weights.step:,} can be used."
        return Verdict("converged", "Converged", headline, reason)
    headline = f"The mixture has not settled by {progress}: treat the weights as provisional."
    return Verdict("provisional", "Not converged", headline, reason)


def sentence(text: str) -> str:
    text = text.strip()
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def counted_in(run: Run) -> str:
    """What shares are shares of: what a source's length counts."""
    length = number_or_none(run.setting("data", "seq_length"))
    sequences = "sequences" + (f" of {length:,.0f} tokens" if length else "")
    return {
        "sequences": f"by tokens: in {sequences}",
        "both": f"by examples; Megatron prefixes by {sequences}",
    }.get(str(run.info.get("counted_in")), "by examples")


@dataclass
class Change:
    """A source that moved, as the page words it."""

    name: str
    words: str
    sure: bool | None  # the interval excludes the initial weight; None without interval


def biggest_changes(rows: list[SourceRow], count: int = 3) -> list[Change]:
    """The sources whose weight moved furthest from the initial mixture, greatest move first."""
    least = min(NOTABLE_CHANGE, 1 / max(1, len(rows)))
    moved = [row for row in rows if row.initial is not None]
    moved = [row for row in moved if abs(row.weight - (row.initial or 0.0)) >= least]
    moved.sort(key=lambda row: -abs(row.weight - (row.initial or 0.0)))
    changes = []
    for row in moved[:count]:
        initial = row.initial or 0.0
        up = row.weight > initial
        times = row.weight / initial if initial else math.inf
        words = f"{'up' if up else 'down'} from {percent(initial)} to {percent(row.weight)}"
        if up and 1.15 <= times < math.inf:
            words += f", {times:,.0f}" if times >= 10 else f", {times:.2g}"
            words += " times its initial share"
        sure = None
        if row.low is not None and row.high is not None:
            sure = not row.low <= initial <= row.high
        changes.append(Change(row.name, words, sure))
    return changes


def start_and_end(values: NDArray[Any]) -> tuple[float, float] | None:
    """Means over the first and the last steps (`END_SHARE` of them each)."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    count = max(1, round(END_SHARE * len(values)))
    return float(values[:count].mean()), float(values[-count:].mean())


def known_distance(rows: list[SourceRow]) -> float | None:
    """L1 distance between the learned and the known mixture, from 0 to 2."""
    if not rows or any(row.known is None for row in rows):
        return None
    return sum(abs(row.weight - (row.known or 0.0)) for row in rows)


@dataclass
class Cost:
    tokens: int
    step_seconds: float  # sum of the steps' times
    wall_seconds: float | None  # from start to end, saving and start-up included
    tokens_per_second: float | None  # tokens over step_seconds
    ranks: int
    layout: str
    device: str
    peak_memory_bytes: float | None

    @property
    def unit(self) -> str:
        return "CPU hours" if self.device.lower().startswith("cpu") else "GPU hours"

    @property
    def device_hours(self) -> float:
        return self.ranks * (self.wall_seconds or self.step_seconds) / 3600


def cost(run: Run) -> Cost:
    """What the run took: world size x time is what a cluster charges."""
    scalars = run.history.scalars
    sizes = run.info.get("world") if isinstance(run.info.get("world"), dict) else {}
    layout = {
        name: int(number_or_none((sizes or {}).get(name)) or 1) for name in ("tp", "cp", "pp", "dp")
    }
    layout_words = " × ".join(
        f"{name.upper()} {size}" for name, size in layout.items() if name != "cp" or size > 1
    )
    chunks = int(number_or_none((sizes or {}).get("vpp")) or 1)
    if chunks > 1:
        layout_words += f" × VPP {chunks}"
    step_seconds = float(np.nansum(scalars["step_time_s"]))
    tokens = int(np.nansum(scalars["tokens"]))
    wall_seconds = _seconds_between(run.info.get("started"), run.info.get("ended"))
    if wall_seconds is not None and wall_seconds < step_seconds:
        wall_seconds = None  # the clock of the last start only, of a run that was resumed
    return Cost(
        tokens=tokens,
        step_seconds=step_seconds,
        wall_seconds=wall_seconds,
        tokens_per_second=tokens / step_seconds if step_seconds else None,
        ranks=math.prod(layout.values()),
        layout=layout_words,
        device=str(run.info.get("device") or "device"),
        peak_memory_bytes=_finite(np.nanmax, scalars["memory_bytes"]),
    )


def _finite(reduce: Any, values: NDArray[Any]) -> float | None:
    return float(reduce(values)) if np.isfinite(values).any() else None


def _seconds_between(started: Any, ended: Any) -> float | None:
    """None unless both are times, ISO 8601."""
    try:
        span = (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()
    except (TypeError, ValueError):
        return None
    return span if span > 0 else None


@dataclass
class Phase:
    name: str
    seconds: float  # median of a step
    share: float  # of the phases together


def step_phases(run: Run) -> list[Phase]:
    """Where a step's time goes; what no phase claims is "other"."""
    medians = {
        name: _finite(np.nanmedian, seconds) or 0.0 for name, seconds in run.history.phases.items()
    }
    step = _finite(np.nanmedian, run.history.scalars["step_time_s"]) or 0.0
    rest = step - sum(medians.values())
    if rest > 0.01 * step:
        medians["other"] = rest
    total = sum(medians.values())
    return [Phase(name, s, s / total) for name, s in medians.items()] if total > 0 else []
