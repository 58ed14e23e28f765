"""Several validation sets in a run: what they come to, and their losses at its start and its end.

Both are measured on whole sets, and not read off the noisy batches between. A set's loss at the
start is what it is compared with in the worst case, and what `max_loss_rise` counts from.
"""

from typing import Any

import torch

from megatron_scalebio.config import Config, ValidationConfig
from megatron_scalebio.engine.evaluate import held_out_losses
from megatron_scalebio.engine.state import RunState
from megatron_scalebio.formatting import few
from megatron_scalebio.mixture.confidence import TrajectoryBlocks
from megatron_scalebio.mixture.goals import Goals

MARGIN = 0.005  # of a bound: what keeps a loss at it goes a little to either side


def goals_of(config: Config) -> Goals:
    """As the core takes them; without what the sets' losses at the start will say."""
    sets = config.data.validation
    return Goals(
        [entry.weight for entry in sets],
        config.bilevel.objective == "worst_case",
        [entry.is_bounded for entry in sets],
        [entry.max_loss or entry.reference_loss or 0.0 for entry in sets],
    )


class SetRecord:
    """What is known of V validation sets.

    Attributes:
        start_V: their losses before the first step; None: one set, and nothing to compare.
        path: q of the applied steps.
    """

    def __init__(self, config: Config) -> None:
        sets = config.data.validation
        self.is_needed = len(sets) > 1
        self.start_V: list[float] | None = None
        self.path = TrajectoryBlocks(len(sets))

    def weights(self, goals: Goals, config: Config) -> torch.Tensor:
        """q over the averaged steps, [V]."""
        if not self.path.steps:
            return goals.shares_V
        return self.path.tail(config.bilevel.average_fraction).mean(0)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start_V, "path": self.path.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start_V = state["start"]
        self.path.load_state_dict(state["path"])


def goal_told(config: Config) -> dict[str, str]:
    """What several sets come to, as the banner says it; {} of a single one."""
    sets = config.data.validation
    if len(sets) == 1:
        return {}
    kind = "worst" if config.bilevel.objective == "worst_case" else "mean"
    told = [f"{kind} of {few([entry.name for entry in sets if not entry.is_bounded])}"]
    for entry in sets:
        if entry.max_loss is not None:
            told.append(f"{entry.name} at most {entry.max_loss:g}")
        elif entry.max_loss_rise is not None:
            told.append(f"{entry.name} at most {entry.max_loss_rise:g} above its start")
    return {"goal": "; ".join(told)}


def losses_of_sets(state: RunState) -> list[float]:
    """Of w, on all of each validation set. A collective."""
    found = held_out_losses(
        state.training.w, state.data.validation, state.config, state.data.layout
    )
    kind = f"{state.config.data.loss_mean}_mean"
    return [getattr(each, kind) for each in found]


def settle(goals: Goals, sets: list[ValidationConfig], start_V: list[float]) -> None:
    """Puts in what is counted from the losses at the start."""
    for number, (entry, start) in enumerate(zip(sets, start_V, strict=True)):
        if entry.max_loss is None and entry.reference_loss is None:
            goals.reference_V[number] = start + (entry.max_loss_rise or 0.0)


def described(
    goals: Goals,
    record: SetRecord,
    state: RunState,
    end_V: list[float] | None,
) -> dict[str, Any]:
    """The sets as weights.json lists them; {} of a single one.

    Args:
        end_V: their losses at the end; None where a signal stopped the run before.
    """
    if record.start_V is None:
        return {}
    share_V = record.weights(goals, state.config)
    nothing = [None] * len(record.start_V)
    rows = zip(
        state.config.data.validation, state.data.validation, share_V.tolist(), record.start_V,
        end_V or nothing, goals.reference_V.tolist(), strict=True,
    )  # fmt: skip
    return {
        "objective": state.config.bilevel.objective,
        "validation": [
            {
                "name": entry.name,
                "examples": len(source),
                "weight": share,
                "start_loss": start,
                "loss": end,
                **_compared(goals, entry, reference),
            }
            for entry, source, share, start, end, reference in rows
        ],
    }  # fmt: skip


def _compared(goals: Goals, entry: ValidationConfig, reference: float) -> dict[str, float]:
    if entry.is_bounded:
        return {"max_loss": reference}
    return {"reference_loss": reference} if goals.worst_case else {}


def broken_bound(sets: list[dict[str, Any]]) -> str:
    """Why the weights are not the answer: a bound that is not kept; "" if all are."""
    for entry in sets:
        most, loss = entry.get("max_loss"), entry["loss"]
        if most is not None and loss is not None and loss > most * (1 + MARGIN):
            return (
                f"the loss of {entry['name']} is {loss:.4f}, above its bound of {most:.4f} (run "
                "longer, or relax the bound: perhaps no mixture keeps it)"
            )
    return ""
