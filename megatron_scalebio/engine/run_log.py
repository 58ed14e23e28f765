"""What rank 0 shows and writes during a run: run.json, console, metrics.jsonl, TensorBoard."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_scalebio.config import Config
from megatron_scalebio.engine import outputs
from megatron_scalebio.engine.state import RunState
from megatron_scalebio.errors import UserError
from megatron_scalebio.logs.console import RunConsole, SourceLine
from megatron_scalebio.logs.metrics import MetricsLog
from megatron_scalebio.logs.trackers import Trackers
from megatron_scalebio.progress import PROGRESS
from megatron_scalebio.whole_files import write_json


class RunLog:
    """Opens all of it, and takes the record of every step.

    Args:
        parameters: of the whole model.
        initial_S: the weights that the sources start with.
        warnings: of what the run resumed from.
        facts: lines of the banner besides the usual ones, or in their place.
        config, steps, resume_step: of the whole run, where the state is a part's [the state's].
    """

    def __init__(
        self,
        state: RunState,
        folder: Path,
        parameters: int,
        initial_S: Sequence[float],
        warnings: Sequence[str] = (),
        facts: Mapping[str, object] | None = None,
        config: Config | None = None,
        steps: int | None = None,
        resume_step: int | None = None,
    ) -> None:
        self.folder = folder
        config = config or state.config
        resume_step = state.step if resume_step is None else resume_step
        self.run = outputs.write_start(state, config, folder, parameters)
        self.metrics = MetricsLog(
            folder,
            self.run["sources"],
            self.run["validation"],
            global_batch_size=config.train.global_batch_size,
            resume_step=resume_step,
            tensorboard_dir=config.logging.tensorboard_dir,
            tensorboard_log_interval=config.logging.tensorboard_log_interval,
        )
        shares = zip(state.data.sources, self.run["natural"], initial_S, strict=True)
        lines = [SourceLine(s.name, len(s), s.tokens, natural, p) for s, natural, p in shares]
        self.console = RunConsole(
            lines, steps or config.train.train_iters, config.logging.log_interval
        )
        usual = outputs.run_facts(config, self.run, resume_step)
        self.console.banner({**usual, **(facts or {})})
        for warning in warnings:
            self.console.warn(warning)
        self.console.start(resume_step)

    def log(self, record: dict[str, Any], slow: str = "") -> UserError | None:
        """Logs a step. Gives a disk's refusal back: all ranks have to stop at it together.

        Args:
            slow: a line about the slowest rank, if there is one to warn of.
        """
        try:
            with PROGRESS.at("log"):
                self.metrics.log(record)
        except UserError as error:
            return error
        self.console.step(record)
        if slow:
            self.console.warn(slow)
        return None

    def track(self, record: dict[str, Any], trackers: Trackers) -> None:
        """Logs a step to W&B and MLflow."""
        if lost := trackers.log(record, self.run["sources"], self.run["validation"]):
            self.console.warn(lost)

    def close(self) -> None:
        """Leaves the terminal in order, whatever ended the run."""
        self.console.stop()

    def end(self) -> None:
        """For a run that came to its end."""
        self.metrics.close()
        self.run["ended"] = outputs.now()
        write_json(self.folder / "run.json", self.run)
