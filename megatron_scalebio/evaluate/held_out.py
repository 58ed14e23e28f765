"""The part of the `evaluate` command that needs Megatron: losses on the sets of a configuration."""

from pathlib import Path

from megatron_scalebio import runtime
from megatron_scalebio.checkpoint import saver
from megatron_scalebio.config import Config
from megatron_scalebio.engine.evaluate import HeldOutLoss, held_out_losses
from megatron_scalebio.engine.start import pretrained_checkpoint
from megatron_scalebio.engine.state import RunState


def evaluate_config(config: Config) -> list[HeldOutLoss]:
    """Losses of a model on every validation and test set of its configuration. A collective.

    It names a set and a model, and its layout is valid.

    The model is `checkpoint.load` (any Megatron checkpoint: a run's `checkpoints` or `best`), else
    `model.hf`, else `model.pretrained_checkpoint`.

    Raises:
        UserError: if a set or the model can't be read.
    """
    if config.parallel.fp8_recipe == "delayed":
        # Its scales follow what training steps have seen: without one they would all be 1.
        config.parallel.fp8_recipe = "tensorwise"
    runtime.start(config)
    folder = Path(config.train.output)
    runtime.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    state = RunState(config, "evaluate", folder / "cache")
    load = config.checkpoint.load
    path = Path(load) if load else pretrained_checkpoint(state, folder)
    assert path is not None, "the configuration names a model"
    saver.load_pretrained(state.training.w, path, state.data.vocab_size)
    sets = [*state.data.validation, *state.data.test]
    return held_out_losses(state.training.w, sets, config, state.data.layout)
