"""What is refused before torch and Megatron are imported, which takes seconds: paths, above all."""

from pathlib import Path

from megatron_scalebio import launcher
from megatron_scalebio.checkpoint.folder import find_checkpoint, steps_on_disk
from megatron_scalebio.config import Config
from megatron_scalebio.data.blend_schedule import read_schedule
from megatron_scalebio.data.reuse import reused
from megatron_scalebio.data.scan import stamp_of
from megatron_scalebio.errors import UserError, not_a_folder

_LOOKED_AT = 100  # sources; of thousands, the others are looked at when the run opens them


@launcher.refuses_early
def refuse_wrong_paths(config: Config) -> None:
    """Refuses what a run reads and is not there, and an output that can't be a folder.

    What it reads of the model is `refuse_missing_start`'s.
    """
    data, output = config.data, Path(config.train.output)
    refuse_missing_sets(config)
    names = [source.name for source in data.sources]
    if data.weights:
        reused(Path(data.weights), names, data.new_share)
    if data.blend_schedule:
        read_schedule(Path(data.blend_schedule), names)
    if output.is_file():
        raise not_a_folder(output)
    load = config.checkpoint.load
    if load and not Path(load).is_dir() and not _goes_on(config):
        raise UserError(f"checkpoint.load: {load}: no checkpoint here (correct it)")


@launcher.refuses_early
def refuse_missing_start(config: Config) -> None:
    """Refuses a pretrained checkpoint that a run is to start from, if it is none."""
    start = config.model.pretrained_checkpoint
    if start and not _goes_on(config):
        find_checkpoint(Path(start))


def _goes_on(config: Config) -> bool:
    """Whether the run has a checkpoint of its own, so that it reads no other."""
    folder = config.checkpoint.save or Path(config.train.output) / "checkpoints"
    return bool(steps_on_disk(Path(folder)))


def refuse_missing_sets(config: Config) -> None:
    """Refuses a source, validation or test set that is not there."""
    data = config.data
    of_sources = [source.path for source in data.sources[:_LOOKED_AT]]
    for path in of_sources + [entry.path for entry in [*data.validation, *data.test]]:
        stamp_of(path)
