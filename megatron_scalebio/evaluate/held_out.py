"""The part of the `evaluate` command that needs Megatron: losses on the sets of a configuration."""

from __future__ import annotations

from pathlib import Path

from megatron_scalebio import runtime
from megatron_scalebio.checkpoint import saver
from megatron_scalebio.config import Config
from megatron_scalebio.engine.evaluate import HeldOutLoss, held_out_losses
from megatron_scalebio.engine.start import pretrained_checkpoint
from megatron_scalebio.engine.state import RunState
from megatron_scalebio.errors import UserError


def evaluate_config(config: Config) -> list[HeldOutLoss]:
    """Losses of a model on every validation and test set of its configuration. A collective.

    The model is `checkpoint.load` (any Megatron checkpoint: a run's `checkpoints` or `best`), else
    `model.hf`, else `model.pretrained_checkpoint`.

    Raises:
        UserError: if no set or no model is named, or one of them can't be read.
    """
    if not (config.data.validation or config.data.test):
        raise UserError("data.test: names no set (--test NAME=PATH ...)")
    config.validate_layout(runtime.world_size_from_environment())
    if config.parallel.fp8_recipe == "delayed":
        # Its scales follow what training steps have seen: without one they would all be 1.
        config.parallel.fp8_recipe = "tensorwise"
    runtime.start(config)
    folder = Path(config.train.output)
    runtime.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    state = RunState(config, "evaluate", folder / "cache")
    load = config.checkpoint.load
    path = Path(load) if load else pretrained_checkpoint(state, folder)
    if path is None:
        raise UserError("checkpoint.load: no model (--load CHECKPOINT or --hf DIR)")
    saver.load_pretrained(state.training.w, path)
    sets = [*state.data.validation, *state.data.test]
    return held_out_losses(state.training.w, sets, config, state.data.layout)
