"""What to do next: use the weights, run longer, merge sources, enlarge the validation set.

Follows the verdict of `mixture.confidence`, whose sentence is in weights.json.
"""

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_scalebio.formatting import percent
from megatron_scalebio.report.history import number_or_none
from megatron_scalebio.report.learning import stood_still
from megatron_scalebio.report.load import Run
from megatron_scalebio.report.summary import SourceRow, sentence

MANY_SOURCES = 20  # above, the tolerance shrinks as an equal weight does (mixture.confidence)
SKIPPED_SHARE = 0.05
LONGEST = 10  # times as many steps, above which more steps are no advice
NAMED = 5


@dataclass
class Advice:
    """One thing to do.

    Attributes:
        do: the headline.
        command: to copy, "" where there is none.
    """

    do: str
    why: str
    command: str = ""


def advice(run: Run, rows: list[SourceRow]) -> list[Advice]:
    """The most important first."""
    still = stood_still(run.history) if run.weights and run.weights.complete else ""
    found = [Advice("Raise lr, or make more steps", sentence(still))] if still else []
    if not (still and run.weights and run.weights.converged):
        found += _of_verdict(run, rows)
    found += _merging(run, rows)
    skipped, steps = len(run.history.skipped), len(run.history.steps)
    if steps and skipped > SKIPPED_SHARE * steps:
        found.append(
            Advice(
                "Lower the learning rate, or check the source that is named below",
                f"{skipped:,} of {steps:,} steps were not applied.",
            )
        )
    return found


def _of_verdict(run: Run, rows: list[SourceRow]) -> Iterator[Advice]:
    weights, folder = run.weights, shlex.quote(str(run.path))
    if weights is None or not weights.complete:
        yield Advice(
            "Wait, or start it again",
            "The same command goes on from the last checkpoint. How far it is:",
            f"megatron-scalebio status {folder}",
        )
        return
    reason = weights.reason
    sample = f"megatron-scalebio sample --weights {folder} --num-samples 10000 --out data/mixed"
    if weights.converged:
        yield Advice("Use the weights", "Draw a training set in these shares:", sample)
    elif "too small to tell" in reason:
        wanted = re.search(r"([\d,]+) examples would (?:be enough|do)", reason)
        size = f"{wanted[1]} examples" if wanted else "more examples"
        yield Advice(
            f"Enlarge the validation set: {size}",
            "With so few examples, a longer run does not make the weights more certain.",
        )
    elif "has been gone through" in reason:
        yield Advice(
            "Add data, or make fewer steps", "Models memorize data that they see too often."
        )
    elif "set a larger tolerance" in reason:
        yield Advice("Set a larger tolerance", "More steps can't reach so small a tolerance.")
    elif "decays" in reason:
        yield Advice(
            "Keep the rate of the mixture constant",
            "Only with lr_lambda_decay_style constant are weights that stand still settled.",
        )
    elif "no weight has moved" in reason:
        yield Advice(
            "Check that the sources differ",
            "Equal sources keep equal weights. If they differ, raise lr_lambda, or lower alpha.",
        )
    elif "gives no intervals" in reason:
        yield Advice(
            "Use the weights, with another seed beside them",
            "This method gives no uncertainty; a second seed shows it.",
            sample,
        )
    else:
        yield from _longer(run, rows, reason)


def _longer(run: Run, rows: list[SourceRow], reason: str) -> Iterator[Advice]:
    steps = run.last_step or (run.weights.step if run.weights else 0)
    told = re.search(r"set train_iters to (\d+)", reason)
    factor = _times(run, rows, drifting="drift" in reason)
    if "sees the validation loss fall" in reason:  # its intervals are narrow
        factor = max(factor, 2.0)
    wanted = int(told[1]) if told else 100 * math.ceil(steps * factor / 100)
    if told or factor <= LONGEST:
        output = shlex.quote(f"{run.path}-{wanted}")
        yield Advice(
            f"Run longer: about {wanted:,} steps", "Start a new run with this train_iters.",
            run.command and f"{run.command} --train-iters {wanted} --output {output}",
        )  # fmt: skip
    else:
        yield Advice(
            "Take larger batches, or fewer sources",
            f"It would take more than {LONGEST} times as many steps to know every weight to the "
            "tolerance.",
        )


def _times(run: Run, rows: list[SourceRow], drifting: bool) -> float:
    """How many times as many steps would narrow the widest interval to the tolerance: wandering
    falls with the root of the steps, drift in proportion."""
    tolerance = number_or_none(run.setting("bilevel", "tolerance")) or 0.05
    tolerance *= min(1.0, MANY_SOURCES / max(1, len(rows)))
    alike = {name for group in (run.weights.alike if run.weights else ()) for name in group}
    widest = max((_half(row) for row in rows if row.name not in alike), default=0.0)
    return max(1.0, widest / tolerance) ** (1 if drifting else 2)


def _half(row: SourceRow) -> float:
    """Half of an interval, by its longer side: it is cut off at 0 and 1."""
    if row.low is None or row.high is None:
        return 0.0
    return max(row.high - row.weight, row.weight - row.low)


def _merging(run: Run, rows: list[SourceRow]) -> Iterator[Advice]:
    """Near-duplicates; and of many sources, those whose weights are not told from their start."""
    weight = {row.name: row.weight for row in rows}
    too_short = "set train_iters to" in (run.weights.reason if run.weights else "")
    for group in run.weights.alike if run.weights else ():
        names = f"{', '.join(group[:-1])} and {group[-1]}"
        whole = percent(sum(weight.get(name, 0.0) for name in group))
        if too_short:
            yield Advice(
                f"Do not compare the weights of {names} yet",
                f"The run is too short to tell them apart: only the sum of their weights, {whole}, "
                "is known. If a longer run can't tell them apart either, they are alike.",
            )
            continue
        yield Advice(
            f"Merge {names}",
            f"They look alike: only the sum of their weights, {whole}, is known. Prepare them as "
            "one source, or split the sum among them as you like.",
        )
    if len(rows) <= MANY_SOURCES or (run.weights and run.weights.converged):
        return
    unsure = [
        row
        for row in rows
        if row.low is not None and row.initial is not None and _half(row) > row.weight
        and row.low <= row.initial <= (row.high or 0.0)
    ]  # fmt: skip
    if len(unsure) > 1:
        names = ", ".join(row.name for row in unsure[:NAMED])
        more = f" and {len(unsure) - NAMED:,} more" if len(unsure) > NAMED else ""
        yield Advice(
            f"Merge sources that are alike, among {len(unsure):,} that can't be told apart",
            f"{names}{more}: each alone is too small a part of a batch. If sources of one kind are "
            "prepared as one source, its weight is known sooner.",
        )
