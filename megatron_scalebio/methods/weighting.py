"""What DoReMi, DoGE and FastMix have in common, which weight sources while one model trains.

All start from a uniform mixture. DoReMi and DoGE report the average of α over the steps, FastMix
its last, as published.
"""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.engine import outputs
from megatron_scalebio.engine.loop import logged_steps
from megatron_scalebio.engine.run_log import RunLog
from megatron_scalebio.engine.start import Job, resume_or_start
from megatron_scalebio.engine.state import Data, RunState, TokenCost
from megatron_scalebio.errors import UserError
from megatron_scalebio.methods.found import Found, normalised


class WeightingState(RunState):
    """A model in training, and the weights α that it trains under.

    Attributes:
        log_weight_S: log α, float64, on the CPU and equal on all ranks.
    """

    def __init__(self, config: Config, cache: Path) -> None:
        super().__init__(config, config.baseline.method, cache)
        sources = len(self.data.sources)
        self.log_weight_S = torch.zeros(sources, dtype=torch.float64).log_softmax(0)
        self._sum_S = torch.zeros(sources, dtype=torch.float64)
        self._count = 0

    @property
    def weight_S(self) -> torch.Tensor:
        return self.log_weight_S.exp()

    @property
    def moves(self) -> int:
        """Steps that were applied."""
        return self._count

    @property
    def mean_weight_S(self) -> torch.Tensor:
        """The average of α over the steps that were applied."""
        return self._sum_S / self._count if self._count else self.weight_S

    def move_to(self, log_weight_S: torch.Tensor) -> None:
        self.log_weight_S = log_weight_S
        self._sum_S = self._sum_S + self.weight_S
        self._count += 1

    def common_state(self) -> dict[str, Any]:
        learned = {"log_weight": self.log_weight_S, "sum": self._sum_S, "count": self._count}
        return {**super().common_state(), "learned": learned}

    def load_common_state(self, state: dict[str, Any]) -> None:
        super().load_common_state(state)
        learned = state["learned"]
        self.log_weight_S, self._sum_S = learned["log_weight"], learned["sum"]
        self._count = learned["count"]


def learn(state: WeightingState, job: Job, cost_before: TokenCost | None = None) -> Found | None:
    """Runs the method's steps to the end, from its newest checkpoint if it has one.

    Returns:
        The average weights of the whole training, or None at a signal.
    """
    initial_S = state.weight_S.tolist()
    warnings = resume_or_start(state, job.folder, job.save_to)
    log = start_log(state, job, initial_S, warnings=warnings)
    if not logged_steps(state, job, log, job.save_to):
        return None
    return Found(
        sources=state.data.sources,
        weight_S=state.mean_weight_S.tolist(),
        initial_S=initial_S,
        cost=(cost_before or TokenCost()) + state.cost,
        step=state.step,
        details={"last_weights": state.weight_S.tolist(), "settings_changed": state.changes},
    )


def require_whole_flush(state: RunState, name: str) -> None:
    """Refuses a batch size that an interleaved pipeline can't take in a flush of its own."""
    train, layout = state.config.train, state.data.layout
    sequences, unit = getattr(train, name), layout.micro_batch_size * layout.dp_size
    if not state.training.flush_takes(sequences // unit):
        unit *= state.config.parallel.pipeline_model_parallel_size
        raise UserError(
            f"train.{name}: {sequences} gives a number of micro-batches that the interleaved "
            f"pipeline needs divisible by its stages (use a multiple of {unit})"
        )


def refuse_run_of_another(folder: Path, method: str) -> None:
    """Refuses an output where another method has begun, before anything costs time."""

    def check() -> None:
        try:
            stage = json.loads((folder / "run.json").read_text())["stage"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if stage != method:
            raise UserError(
                f"{folder}: holds a run of `{stage}`, which {method} can't continue (choose a "
                "new train.output)"
            )

    runtime.on_main(check)


def prior_weights(config: Config, data: Data) -> list[float]:
    """The mixture that users would train on otherwise: the given one, else the natural one."""
    if config.data.weights or config.data.sources[0].initial_weight is not None:
        return normalised(data.initial_weights())
    return outputs.natural_shares(data.sources)


def start_log(state: RunState, job: Job, initial_S: list[float], **options: Any) -> RunLog | None:
    """Shows the banner on rank 0 and gives a RunLog there; None on others. A collective.

    Args:
        options: more arguments of `RunLog`.
    """
    parameters = outputs.parameter_count(state)
    facts = {"method": state.config.baseline.method, **options.pop("facts", {})}
    return runtime.only_on_main(
        lambda: RunLog(state, job.folder, parameters, initial_S, facts=facts, **options)
    )
