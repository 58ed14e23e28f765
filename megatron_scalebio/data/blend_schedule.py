"""`blend_schedule.json`: mixtures that follow each other in a training, stage by stage.

    {"stages": [{"step": 0, "weights": {"web": 0.7, "math": 0.3}, "blend": "0.7 /web 0.3 /math"},
                {"step": 400, ...}]}

A stage goes from its step to the next one's; a source that it lacks weighs nothing there. `blend`
is what Megatron-LM's --data-path takes, for the stage.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_scalebio.data.weights_file import check_weights
from megatron_scalebio.errors import UserError
from megatron_scalebio.formatting import few

SCHEDULE_FILE = "blend_schedule.json"


@dataclass(frozen=True)
class BlendSchedule:
    """Attributes:
    steps: at which a mixture begins, from 0 on, ascending.
    weights: of each stage, one for each source, adding up to 1.
    """

    steps: list[int]
    weights: list[list[float]]

    def at(self, step: int) -> list[float]:
        """The mixture of a step, counted from 0."""
        return self.weights[bisect_right(self.steps, step) - 1]


def read_schedule(path: Path, names: Sequence[str]) -> BlendSchedule:
    """A schedule for the sources of a run, from a file or a run's folder.

    Raises:
        UserError: if it is no schedule, is out of order, or is of other sources.
    """
    path = path / SCHEDULE_FILE if path.is_dir() else path
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        given = [
            (stage["step"], {str(k): float(v) for k, v in stage["weights"].items()})
            for stage in stages
        ]
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror} (correct blend_schedule)") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: holds no schedule ({error!r}) (give a run's {SCHEDULE_FILE})"
        ) from None
    _check_order([step for step, _ in given], path)
    for number, (_, weights) in enumerate(given):
        check_weights(weights, f"{path}: stages[{number}]")
    named = {name for _, weights in given for name in weights}
    if unknown := sorted(named - set(names)):
        raise UserError(f"{path}: no source is named {few(unknown)} (use those of data.sources)")
    if lacking := [name for name in names if name not in named]:
        raise UserError(f"{path}: has no weight of {few(lacking)} in any stage (give one, or 0)")
    wholes = [sum(weights.values()) for _, weights in given]
    return BlendSchedule(
        [step for step, _ in given],
        [
            [weights.get(name, 0.0) / whole for name in names]
            for (_, weights), whole in zip(given, wholes, strict=True)
        ],
    )


def _check_order(steps: Sequence[object], path: Path) -> None:
    before = -1
    for number, step in enumerate(steps):
        where = f"{path}: stages[{number}].step"
        if type(step) is not int or step < 0:
            raise UserError(f"{where}: {step!r} is not a step (give a whole number from 0 on)")
        if number == 0 and step != 0:
            raise UserError(f"{where}: {step} leaves the steps before it no mixture (begin at 0)")
        if step <= before:
            raise UserError(
                f"{where}: {step} does not come after {before} (put the stages in order)"
            )
        before = step
    if before < 0:
        raise UserError(f"{path}: stages is empty (give one or more)")
