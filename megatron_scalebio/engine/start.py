"""How a run begins: its ranks and folders, and the weights that it starts from.

Weights come from its newest checkpoint, else from a pretrained model, else from chance.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_scalebio import runtime
from megatron_scalebio.checkpoint import saver
from megatron_scalebio.checkpoint.background import Saves
from megatron_scalebio.config import Config
from megatron_scalebio.convert.importer import import_checkpoint
from megatron_scalebio.engine import outputs
from megatron_scalebio.engine.memory import out_of_memory_named
from megatron_scalebio.engine.state import RunState
from megatron_scalebio.errors import UserError
from megatron_scalebio.fingerprint import of_files
from megatron_scalebio.guard.board import Board
from megatron_scalebio.guard.lock import PATIENCE_S, held
from megatron_scalebio.guard.watchdog import Watchdog
from megatron_scalebio.logs.records import METRICS_FILE
from megatron_scalebio.logs.trackers import Trackers

# In the run's folder: a Hugging Face model as a Megatron checkpoint, and which.
IMPORTED = "hf_import-{}"
_SAMPLES = 256  # of a file of weights: training may have changed few of its tensors


@dataclass(frozen=True)
class Job:
    """A run whose ranks have met.

    Attributes:
        folder: the run's output.
        save_to: its checkpoints.
    """

    signals: runtime.StopSignals
    folder: Path
    save_to: Path
    saves: Saves
    trackers: Trackers | None = None  # on rank 0, where the run asks for them


@contextmanager
def start_job(config: Config) -> Iterator[Job]:
    """Joins the ranks, makes the folders and holds them, before anything costs time.

    Raises:
        UserError: if a folder can't be written, or another run writes there.
    """
    signals = runtime.StopSignals()
    runtime.start(config)
    folder = Path(config.train.output)
    save_to = Path(config.checkpoint.save or folder / "checkpoints")
    sources, validation = (
        [entry.name for entry in entries]
        for entries in (config.data.sources, config.data.validation)
    )
    runtime.on_main(lambda: outputs.prepare_folders(folder, save_to, sources, validation))
    # The other ranks wait in a collective meanwhile.
    patience_s = min(PATIENCE_S, 30.0 * config.parallel.distributed_timeout_minutes)
    locks = ExitStack()
    with ExitStack() as stack:
        if runtime.world_size() > 1:
            timeout_s = 60.0 * config.parallel.distributed_timeout_minutes
            watchdog = Watchdog(timeout_s, before_end=locks.close, board=Board(folder))
            stack.enter_context(watchdog)
        stack.enter_context(locks)
        runtime.on_main(lambda: locks.enter_context(held(folder, save_to, patience_s=patience_s)))
        stack.enter_context(out_of_memory_named(config, folder))
        saves = stack.enter_context(Saves(config.checkpoint.async_save))
        trackers = None
        if config.logging.wandb_project or config.logging.mlflow_experiment:
            trackers = runtime.only_on_main(
                lambda: Trackers(folder, config.logging, asdict(config))
            )
        with trackers or nullcontext():
            yield Job(signals, folder, save_to, saves, trackers)


def resume_or_start(state: RunState, folder: Path, save_to: Path) -> list[str]:
    """Resumes a run, or loads the pretrained weights that it starts from.

    Args:
        folder: the run's output.
        save_to: its checkpoints.

    Returns:
        Warnings of `load_latest`.
    """
    resumed, warnings = saver.load_latest(state, save_to)
    load_from = state.config.checkpoint.load
    if not resumed and load_from:
        resumed, more = saver.load_latest(state, Path(load_from), required=True)
        warnings += more
    if not resumed:
        load_start(state, folder)
    steps = state.config.train.train_iters
    if state.step > steps:
        raise UserError(
            f"train.train_iters: {steps} is below step {state.step}, which this run has reached "
            f"(set it to {state.step} or more, or choose another --output)"
        )
    return warnings


def load_start(state: RunState, folder: Path) -> None:
    """Loads the pretrained weights that w starts from, if there are any.

    Raises:
        UserError: if `hf` has changed since another part of the run has started from it.
    """
    model = state.config.model
    if model.hf and not model.pretrained_checkpoint:
        hf = Path(model.hf)
        runtime.on_main(lambda: _refuse_another_start(hf, folder))
    pretrained = pretrained_checkpoint(state, folder)
    if pretrained:
        saver.load_pretrained(state.training.w, pretrained, state.data.vocab_size)


def pretrained_checkpoint(state: RunState, folder: Path) -> Path | None:
    """The Megatron checkpoint that w starts from, imported once if it is Hugging Face's.

    Where both are named, `hf` gives the architecture and `pretrained_checkpoint` the weights.
    """
    model = state.config.model
    if model.pretrained_checkpoint:
        return Path(model.pretrained_checkpoint)
    if model.hf is None:
        return None
    hf = Path(model.hf)
    imported = runtime.on_main(lambda: _import_of(hf, folder))
    if not runtime.on_main(imported.exists):
        import_checkpoint(hf, imported)
    return imported


def _import_of(hf: Path, folder: Path) -> Path:
    """Where the import of a Hugging Face model as it is now belongs; a changed one has another."""
    names = ("config.json", "*.safetensors", "*.bin")
    files = [hf] if hf.is_file() else sorted(path for name in names for path in hf.glob(name))
    which = of_files((path for path in files if path.is_file()), _SAMPLES)
    return folder / IMPORTED.format(which[:12])


def _refuse_another_start(hf: Path, folder: Path) -> None:
    """Parts of one run, such as RegMix's proxies, start from the same model."""
    earlier = any(folder.glob(IMPORTED.format("*"))) and not _import_of(hf, folder).exists()
    if earlier and any(path.stat().st_size for path in folder.rglob(METRICS_FILE)):
        raise UserError(
            f"model.hf: {hf}: is not the model that {folder} was started from (choose a new "
            "train.output, or the same model)"
        )
