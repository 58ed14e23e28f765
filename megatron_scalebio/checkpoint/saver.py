"""Saves and loads a run through Megatron's dist_checkpointing, under any layout.

w is saved as Megatron-LM saves a model (keys without `module.`; `args`, `checkpoint_version` and
`iteration` beside them). What the bilevel run adds lies beside it in `bilevel/`.
"""

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.safe_globals import register_safe_globals
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scalebio import runtime
from megatron_scalebio.checkpoint import folder as folders
from megatron_scalebio.checkpoint.folder import BILEVEL
from megatron_scalebio.checkpoint.helpers import helpers
from megatron_scalebio.checkpoint.integrity import changed_file, hash_written
from megatron_scalebio.checkpoint.run import Run
from megatron_scalebio.checkpoint.sharding import (
    bilevel_state,
    layout,
    optimizer_kind,
    random_state,
    w_state,
)
from megatron_scalebio.config import Config
from megatron_scalebio.core.lisa import period_of
from megatron_scalebio.core.state import (
    load_low_bits,
    load_models,
    load_optimizers,
    low_bits_to_load,
    model_state,
    model_state_to_load,
    optimizer_states,
    state_of_u_to_load,
)
from megatron_scalebio.data.scan import same_data
from megatron_scalebio.errors import UserError
from megatron_scalebio.formatting import told_apart

# What Megatron and torch raise where a disk or a file fails them.
_CHECKPOINT_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    dist_checkpointing.core.CheckpointingException,
    CheckpointException,  # of all ranks at once; not an Exception
)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def save(state: Run, folder: Path, keep_last: int | None = None) -> None:
    """Writes a checkpoint of the current step and commits it, before it returns.

    Args:
        keep_last: checkpoints that stay in the folder [checkpoint.keep_last].

    Raises:
        UserError: if the disk refuses; the previous checkpoint is untouched.
    """
    with helpers():
        temporary = runtime.on_main(lambda: folders.begin(folder, state.step))
        with writing(state.step, folder, temporary):
            dist_checkpointing.save(w_state(state), str(temporary))
            runtime.on_main(lambda: folders.make_empty(temporary / BILEVEL))
            dist_checkpointing.save(bilevel_state(state), str(temporary / BILEVEL))
            for part in (temporary, temporary / BILEVEL):
                hash_written(part, runtime.rank())
            runtime.barrier()  # rank 0 joins what the others have hashed
        keep_last = keep_last or state.config.checkpoint.keep_last
        runtime.on_main(lambda: folders.commit(temporary, folder, state.step, keep_last))


@contextmanager
def writing(step: int, folder: Path, temporary: Path) -> Iterator[None]:
    """Turns what is raised over a checkpoint that can't be written into a line, and drops it."""
    try:
        yield
    except _CHECKPOINT_ERRORS as error:
        # No collective from here on: where one rank alone failed, the others are still inside one
        # of Megatron's, and get an error of their own when this rank ends.
        if runtime.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        before = folders.steps_on_disk(folder)
        raise UserError(
            f"{folder}: could not save step {step}: {_last_line(error)} (free space, then start it "
            f"again: {f'it goes on from step {before[-1]}' if before else 'no step is saved yet'})"
        ) from None


def load_latest(state: Run, folder: Path, required: bool = False) -> tuple[bool, list[str]]:
    """Resumes from the newest whole checkpoint under `folder`, if there is one.

    Args:
        required: it is another run's folder: it has to hold one, and is left as it is.

    Returns:
        Whether there was one; a warning for each damaged checkpoint that was passed over, and for
        settings that have changed since.

    Raises:
        UserError: if all are damaged, or the checkpoint is of other sources or another model, or
            there is none although one is required, or it is the end of a run of other settings.
    """
    step, problems = _newest_whole(folder)
    if step is None and required and runtime.on_main(lambda: folders.is_plain(folder)):
        raise UserError(
            f"checkpoint.load: {folder}: is an ordinary Megatron checkpoint, of no run to go on "
            "with (start from its weights with --pretrained-checkpoint)"
        )
    if step is None and problems:
        raise UserError(
            f"{problems[0]}: no whole checkpoint (restore one, or start in a new folder)"
        )
    if step is None and required:
        raise UserError(f"checkpoint.load: {folder}: no checkpoint here (correct it)")
    warnings = [f"passed over a damaged checkpoint: {problem}" for problem in problems]
    if step is not None:
        changed = _load(state, folders.iteration_folder(folder, step))
        if changed:
            warnings.append(f"continues with other settings: {', '.join(changed)}")
        if problems and not required:
            runtime.on_main(lambda: folders.set_aside(folder, step))
    return step is not None, warnings


def _newest_whole(folder: Path) -> tuple[int | None, list[str]]:
    """`folders.newest_whole`, with every byte compared. A collective."""
    problems: list[str] = []
    step: int | None = None
    while True:
        before = step
        step, more = runtime.on_main(partial(folders.newest_whole, folder, before))
        problems += more
        if step is None:
            return None, problems
        source = folders.iteration_folder(folder, step)
        changed = _changed_file(source) or _changed_file(source / BILEVEL)
        if not changed:
            return step, problems
        problems.append(changed)


def _changed_file(folder: Path) -> str:
    """A file of a checkpoint that is not what was saved, and how; "" if none. A collective.

    All ranks read: a shared file system gives them more together than to one.
    """
    ranks = runtime.world_size()
    found: list[Any] = [""] * ranks
    dist.all_gather_object(found, changed_file(folder, runtime.rank(), ranks))
    return next((problem for problem in found if problem), "")


def _damage(source: Path) -> str:
    """What is wrong with one folder of a checkpoint; "" if nothing. A collective."""
    return runtime.on_main(lambda: folders.damage(source)) or _changed_file(source)


def load_step(state: Run, folder: Path, step: int) -> None:
    """Goes back to the checkpoint of one step.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    source = folders.iteration_folder(folder, step)
    problem = _damage(source) or _damage(source / BILEVEL)
    if problem:
        raise UserError(f"{folder}: {problem} (remove the folder to train it again)")
    _load(state, source)


def load_pretrained(chunks: list[torch.nn.Module], path: Path, vocab_size: int) -> None:
    """Loads the weights of an ordinary Megatron checkpoint, whatever its layout, and no FP8 state.

    Args:
        vocab_size: of the model, without padding, of which a checkpoint may have any.

    Raises:
        UserError: if there is none, it is damaged, or its shapes are not the model's.
    """
    source = folders.find_checkpoint(path)
    problem = _damage(source)
    if problem:
        raise UserError(f"model.pretrained_checkpoint: {problem} (fetch it again)")
    _check_shapes(model_state(chunks), source, vocab_size)
    register_safe_globals()
    with _reading(source):
        load_models(chunks, _loaded(chunks, source), keep_fp8_state=False)


def _load(state: Run, source: Path) -> list[str]:
    """Returns the settings that have changed since, each with its old and its new value."""
    register_safe_globals()
    with _reading(source):
        return _load_whole(state, source)


def _load_whole(state: Run, source: Path) -> list[str]:
    common = dist_checkpointing.load_common_state_dict(str(source / BILEVEL))
    _check_sources(state, common, source)
    ours = state.data.vocab_size
    if (theirs := common.get("vocab_size", ours)) != ours:  # earlier versions did not save it
        raise UserError(
            f"{source}: was saved with a vocabulary of {theirs:,}, not of {ours:,} (set "
            f"model.vocab_size to {theirs}, or choose a new train.output)"
        )
    changed = _changed_settings(state, common["run"], source)
    training = state.training
    training.leave_period()  # left later, it would write into what is loaded
    _check_shapes(model_state(training.w), source, state.data.vocab_size)
    state.load_common_state(common["run"])
    if changed:
        state.changes.append(f"from step {state.step + 1} on: {', '.join(changed)}")
    load_models(training.w, _loaded(training.w, source))
    if training.u is not None:
        wanted = state_of_u_to_load(training.u, _keys(source / BILEVEL))
        loaded = dist_checkpointing.load(wanted, str(source / BILEVEL))
        load_models(training.u, loaded, strict=False)
    wanted = low_bits_to_load(training.models, _keys(source / BILEVEL))
    loaded = dist_checkpointing.load(wanted, str(source / BILEVEL))
    load_low_bits(training.models, loaded, training.sharing_group)
    if period_of(state.step, training.lisa) == common["period"]:
        _check_optimizer_kind(state.config, common["optimizer_kind"], source)
        period = training.enter_period(resuming=True)
        wanted = optimizer_states(training.models, period, is_loading=True)
        load_optimizers(period, dist_checkpointing.load(wanted, str(source / BILEVEL)))
    if common["layout"] == layout():
        _load_random_state(source / BILEVEL)
    return changed


def _loaded(chunks: list[torch.nn.Module], source: Path) -> dict[str, Any]:
    return dist_checkpointing.load(model_state_to_load(chunks, _keys(source)), str(source))


def _keys(source: Path) -> set[str]:
    return set(dist_checkpointing.serialization.load_sharded_metadata(str(source)))


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Loads data alone, and turns what is raised over a damaged checkpoint into a line."""
    try:
        with folders.data_alone():
            yield
    except _CHECKPOINT_ERRORS as error:
        raise UserError(
            f"{source}: could not load: {_last_line(error)} (if it is damaged, remove it to go on "
            "from the checkpoint before)"
        ) from None


def _check_sources(state: Run, common: dict[str, Any], source: Path) -> None:
    stage = common["run"].get("stage", "reweight")
    if stage != state.stage:
        raise UserError(
            f"{source}: was saved by `{stage}`, which `{state.stage}` can't continue with (choose "
            "a new train.output, or start from it with --pretrained-checkpoint)"
        )
    ours = state.common_state()["sources"]
    theirs = common["run"]["sources"]
    names, saved_names = ([name for name, _ in each] for each in (ours, theirs))
    may_grow = stage == "train"  # new sources have numbers of their own, behind the others
    if saved_names != (names[: len(saved_names)] if may_grow else names):
        raise UserError(
            f"{source}: was made for sources {told_apart(saved_names, names)} (choose a new "
            "train.output, or the same data.sources in the same order"
            f"{', new ones after them' * may_grow})"
        )
    changed = [a[0] for a, b in zip(ours, theirs, strict=False) if not same_data(b[1], a[1])]
    if changed:
        raise UserError(
            f"{source}: the data of source {changed[0]!r} has changed since (restore it, or choose "
            "a new train.output)"
        )
    validation = state.common_state()["validation"]
    saved = common["run"].get("validation", validation)
    if len(saved) != len(validation) or not all(
        a[::2] == b[::2] and same_data(b[1], a[1]) for a, b in zip(validation, saved, strict=True)
    ):
        raise UserError(
            f"{source}: was made for other validation sets, other data in them, or other weights "
            "of them (choose a new train.output, or the same data.validation)"
        )


def _changed_settings(state: Run, saved: dict[str, Any], source: Path) -> list[str]:
    ours = state.settings()
    theirs = saved.get("settings", ours)
    changed = [
        f"{name} {_shown(theirs.get(name))} -> {_shown(value)}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if changed and saved["step"] >= state.config.train.train_iters:
        raise UserError(
            f"{source}: is the end of a run of other settings: {', '.join(changed)} (choose a new "
            "train.output, or raise train.train_iters to go on)"
        )
    return changed


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_optimizer_kind(config: Config, saved: list[bool], source: Path) -> None:
    """Megatron lays out the state of its optimizers differently, and masters exist in bf16 only."""
    for name, ours, theirs in zip(
        ("use_distributed_optimizer", "bf16"), optimizer_kind(config), saved, strict=True
    ):
        if ours != theirs:
            raise UserError(
                f"parallel.{name}: {ours} cannot resume a run saved with {theirs} (set it to "
                f"{theirs}, or start from {source} with --pretrained-checkpoint)"
            )


def _check_shapes(wanted: dict[str, Any], source: Path, vocab_size: int) -> None:
    on_disk = dist_checkpointing.load_tensors_metadata(str(source))
    for entry in nested_values(wanted):
        if not isinstance(entry, ShardedTensor):
            continue
        held = on_disk.get(entry.key)
        shape = tuple(entry.global_shape)
        if entry.allow_shape_mismatch and held is not None:  # padding depends on TP
            if held.global_shape[0] < vocab_size:
                raise UserError(
                    f"{source}: holds {held.global_shape[0]:,} rows of {entry.key}, the vocabulary "
                    f"has {vocab_size:,} (take the tokenizer, or the model.vocab_size, that the "
                    "checkpoint was made with)"
                )
            continue
        if held is None or tuple(held.global_shape) != shape:
            found = "nothing" if held is None else f"shape {tuple(held.global_shape)}"
            raise UserError(
                f"{source}: holds {found} for {entry.key}, the model needs {shape} (make the model "
                "section match the checkpoint)"
            )


def _load_random_state(source: Path) -> None:
    loaded = dist_checkpointing.load({"rng": random_state()}, str(source))["rng"]
    torch.set_rng_state(loaded["torch"])
    if loaded["device"].shape == torch.cuda.get_rng_state().shape:  # a GPU's is not a CPU's
        torch.cuda.set_rng_state(loaded["device"])
        get_cuda_rng_tracker().set_states(loaded["tracker"])
