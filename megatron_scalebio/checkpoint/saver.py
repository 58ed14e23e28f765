"""Saves and loads a run through Megatron's dist_checkpointing, under any layout.

w is saved as Megatron-LM saves a model (keys without `module.`, `common.pt` with `args`,
`checkpoint_version`, `iteration`). What the bilevel run adds lies beside it in `bilevel/`.
"""

from __future__ import annotations

import argparse
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.safe_globals import register_safe_globals
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scalebio import runtime
from megatron_scalebio.checkpoint import folder as folders
from megatron_scalebio.checkpoint.folder import BILEVEL
from megatron_scalebio.config import Config
from megatron_scalebio.errors import UserError
from megatron_scalebio.model.provider import padded_vocab_size
from megatron_scalebio.model.twin import named_parameters
from megatron_scalebio.optim.builder import allocate_state
from megatron_scalebio.optim.lisa import period_of
from megatron_scalebio.train.state import TrainState

# One key per layer: layers of u, and optimizer state under LISA, exist for some layers only.
_PER_LAYER = {"non_homogeneous_layers": True}
_OPTIMIZER = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    **_PER_LAYER,
}


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


def save(state: TrainState, folder: Path) -> None:
    """Writes a checkpoint of the current step and commits it.

    Raises:
        UserError: if the disk refuses; the previous checkpoint is untouched.
    """
    temporary = folders.temporary_folder(folder, state.step)
    mend = "free space; the last checkpoint is intact and the run resumes from it"
    runtime.on_main(lambda: folders.make_empty(temporary))
    try:
        dist_checkpointing.save(_w_state(state), str(temporary))
        runtime.on_main(lambda: folders.make_empty(temporary / BILEVEL))
        dist_checkpointing.save(_bilevel_state(state), str(temporary / BILEVEL))
    except _CHECKPOINT_ERRORS as error:
        # No collective from here on: where one rank alone failed, the others are still inside one
        # of Megatron's, and get an error of their own when this rank ends.
        if runtime.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"could not save step {state.step}: {_last_line(error)}", where=str(folder), mend=mend
        ) from None
    keep_last = state.config.checkpoint.keep_last
    runtime.on_main(lambda: folders.commit(folder, state.step, keep_last))


def load_latest(state: TrainState, folder: Path, required: bool = False) -> list[str]:
    """Resumes from the newest whole checkpoint under `folder`, if there is one.

    Returns:
        One warning for each damaged checkpoint that was passed over.

    Raises:
        UserError: if all are damaged, or the checkpoint is of other sources or another model, or
            there is none although one is required.
    """
    step, problems = runtime.on_main(lambda: folders.newest_whole(folder))
    if step is None and problems:
        raise UserError(
            "no whole checkpoint", where=problems[0], mend="restore one, or start in a new folder"
        )
    if step is None and required:
        raise UserError("no checkpoint here", where=f"checkpoint.load: {folder}", mend="correct it")
    if step is not None:
        _load(state, folders.iteration_folder(folder, step))
    return problems


def load_pretrained(chunks: list[torch.nn.Module], path: Path) -> None:
    """Loads the weights of an ordinary Megatron checkpoint, whatever its layout.

    Raises:
        UserError: if there is none, it is damaged, or its shapes are not the model's.
    """
    source = _resolve(path)
    problem = runtime.on_main(lambda: folders.damage(source))
    if problem:
        raise UserError(problem, where="model.pretrained_checkpoint", mend="fetch it again")
    wanted = _model_state(chunks, None)
    _check_shapes(wanted, source)
    with _damage_named(source):
        _load_models(chunks, wanted, source)


def _resolve(path: Path) -> Path:
    tracker = path / folders.TRACKER
    if tracker.is_file():
        step = tracker.read_text(errors="replace").strip()
        if step == "release":
            return path / step
        if not step.isdecimal():
            raise UserError(f"{step[:40]!r} is no step", where=str(tracker), mend="write it again")
        return folders.iteration_folder(path, int(step))
    if (path / "metadata.json").is_file():
        return path
    raise UserError(
        "is no Megatron checkpoint",
        where=str(path),
        mend=f"point to a folder with {folders.TRACKER}",
    )


def _load(state: TrainState, source: Path) -> None:
    register_safe_globals()
    with _damage_named(source):
        _load_whole(state, source)


def _load_whole(state: TrainState, source: Path) -> None:
    common = torch.load(source / BILEVEL / "common.pt", map_location="cpu", weights_only=True)
    _check_sources(state, common, source)
    _check_shapes(_model_state(state.w, None), source)
    state.load_common_state(common["run"])
    _load_models(state.w, _model_state(state.w, None), source)
    on_disk = dist_checkpointing.load_tensors_metadata(str(source / BILEVEL))
    _load_u(state, source / BILEVEL, set(on_disk))
    if period_of(state.step, state.config.lisa) == common["period"]:
        _check_optimizer_kind(state.config, common["optimizer_kind"], source)
        period = state.enter_period()
        for optimizer in (period.optimizer_w, period.optimizer_u):
            allocate_state(optimizer)
        wanted = _optimizer_states(state, is_loading=True)
        loaded = dist_checkpointing.load(wanted, str(source / BILEVEL))
        period.optimizer_w.load_state_dict(loaded["optimizer_w"])
        period.optimizer_u.load_state_dict(loaded["optimizer_u"])
    if common["layout"] == _layout():
        _load_random_state(source / BILEVEL)


@contextmanager
def _damage_named(source: Path) -> Iterator[None]:
    """Turns what Megatron and torch raise over a damaged checkpoint into one line."""
    try:
        yield
    except _CHECKPOINT_ERRORS as error:
        raise UserError(
            f"could not load: {_last_line(error)}",
            where=str(source),
            mend="if it is damaged, remove it to go on from the checkpoint before",
        ) from None


def _check_sources(state: TrainState, common: dict[str, Any], source: Path) -> None:
    ours = state.common_state()["sources"]
    theirs = common["run"]["sources"]
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        raise UserError(
            f"was made for sources {[name for name, _ in theirs]}, not {[n for n, _ in ours]}",
            where=str(source),
            mend="choose a new train.output, or the same data.sources in the same order",
        )
    changed = [a[0] for a, b in zip(ours, theirs, strict=True) if a[1] != b[1]]
    if changed:
        raise UserError(
            f"the data of source {changed[0]!r} has changed since",
            where=str(source),
            mend="restore it, or choose a new train.output",
        )


def _optimizer_kind(config: Config) -> list[bool]:
    return [config.parallel.use_distributed_optimizer, config.parallel.bf16]


def _check_optimizer_kind(config: Config, saved: list[bool], source: Path) -> None:
    """Megatron lays out the state of its optimizers differently, and masters exist in bf16 only."""
    for name, ours, theirs in zip(
        ("use_distributed_optimizer", "bf16"), _optimizer_kind(config), saved, strict=True
    ):
        if ours != theirs:
            raise UserError(
                f"{ours} cannot resume a run saved with {theirs}",
                where=f"parallel.{name}",
                mend=f"set it to {theirs}, or start from {source} with --pretrained-checkpoint",
            )


def _model_state(chunks: list[torch.nn.Module], metadata: dict[str, Any] | None) -> dict[str, Any]:
    """Sharded state of a model: `model`, or `model0`, `model1`, … with virtual chunks."""
    # Megatron adds process groups to the metadata it is given: hand it a copy.
    states = [
        unwrap_model(chunk).sharded_state_dict(metadata=dict(metadata or {})) for chunk in chunks
    ]
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{number}": part for number, part in enumerate(states)}


def _w_state(state: TrainState) -> dict[str, Any]:
    return {
        **_model_state(state.w, None),
        "args": megatron_args(state.config, state.data.vocab_size),
        "checkpoint_version": 3.0,
        "iteration": state.step,
        "content_metadata": {"singleton_local_shards": False},
    }


def _bilevel_state(state: TrainState) -> dict[str, Any]:
    whole = {
        "run": state.common_state(),
        "layout": _layout(),
        "optimizer_kind": _optimizer_kind(state.config),
        "period": None,
        "rng": _random_state(),
        "u": _own_state_of_u(state),
    }
    if state.period_number == period_of(state.step, state.config.lisa):
        whole["period"] = state.period_number
        whole.update(_optimizer_states(state))
    return whole


def _own_state_of_u(state: TrainState) -> dict[str, Any]:
    """Sharded state of the parameters in which u has storage of its own."""
    shared = {
        p_u.data_ptr()
        for (_, p_w), (_, p_u) in zip(
            named_parameters(state.w), named_parameters(state.u), strict=True
        )
        if p_w.data_ptr() == p_u.data_ptr()
    }
    whole = _model_state(state.u, _PER_LAYER)
    own = {
        chunk: {k: v for k, v in tensors.items() if not _is_among(v, shared)}
        for chunk, tensors in whole.items()
    }
    add_prefix_for_sharding(own, "u.")
    return own


def _is_among(entry: Any, pointers: set[int]) -> bool:
    data = getattr(entry, "data", None)
    return not isinstance(data, torch.Tensor) or data.data_ptr() in pointers


def _load_u(state: TrainState, source: Path, on_disk: set[str]) -> None:
    """Gives u its own storage for what the checkpoint holds of it, and loads that."""
    wanted = _model_state(state.u, _PER_LAYER)
    held = {
        chunk: {k: v for k, v in tensors.items() if f"u.{getattr(v, 'key', '')}" in on_disk}
        for chunk, tensors in wanted.items()
    }
    own = {entry.data.data_ptr() for tensors in held.values() for entry in tensors.values()}
    for _, parameter in named_parameters(state.u):
        if parameter.data_ptr() in own:
            parameter.data = parameter.data.clone()
    wanted = _model_state(state.u, _PER_LAYER)
    held = {chunk: {k: tensors[k] for k in held[chunk]} for chunk, tensors in wanted.items()}
    add_prefix_for_sharding(held, "u.")
    _load_models(state.u, held, source, strict=False)


def _load_models(
    chunks: list[torch.nn.Module], wanted: dict[str, Any], source: Path, strict: bool = True
) -> None:
    register_safe_globals()
    loaded = dist_checkpointing.load(wanted, str(source))
    for chunk, key in zip(chunks, sorted(wanted, key=lambda k: (len(k), k)), strict=True):
        unwrap_model(chunk).load_state_dict(loaded.get(key, {}), strict=strict)


def _check_shapes(wanted: dict[str, Any], source: Path) -> None:
    on_disk = dist_checkpointing.load_tensors_metadata(str(source))
    for entry in nested_values(wanted):
        if not isinstance(entry, ShardedTensor) or entry.allow_shape_mismatch:
            continue
        held = on_disk.get(entry.key)
        shape = tuple(entry.global_shape)
        if held is None or tuple(held.global_shape) != shape:
            found = "nothing" if held is None else f"shape {tuple(held.global_shape)}"
            raise UserError(
                f"holds {found} for {entry.key}, the model needs {shape}",
                where=str(source),
                mend="make the model section match the checkpoint",
            )


def _optimizer_states(state: TrainState, is_loading: bool = False) -> dict[str, Any]:
    assert state.period is not None
    result = {}
    for name, chunks, optimizer in (
        ("optimizer_w", state.w, state.period.optimizer_w),
        ("optimizer_u", state.u, state.period.optimizer_u),
    ):
        model = _model_state(chunks, _PER_LAYER)
        result[name] = optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=dict(_OPTIMIZER)
        )
        add_prefix_for_sharding(result[name], f"{name}.")
    return result


def _layout() -> list[int]:
    return [
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    ]


def _random_state() -> ShardedObject:
    """Generator states of this rank; they matter to dropout only."""
    tp, pp, _ = _layout()
    states = {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        runtime.dp_rank(),
    )
    return ShardedObject("rng_state", states, (pp, tp, runtime.dp_size()), place)


def _load_random_state(source: Path) -> None:
    loaded = dist_checkpointing.load({"rng": _random_state()}, str(source))["rng"]
    torch.set_rng_state(loaded["torch"])
    torch.cuda.set_rng_state(loaded["device"])
    get_cuda_rng_tracker().set_states(loaded["tracker"])


def megatron_args(config: Config, vocab_size: int) -> argparse.Namespace:
    """The arguments that Megatron-LM and its converters look for in `common.pt`."""
    model, parallel = config.model, config.parallel
    return argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=model.num_query_groups is not None,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
        seq_length=config.data.seq_length,
        max_position_embeddings=model.max_position_embeddings or config.data.seq_length,
        position_embedding_type=model.position_embedding_type,
        rotary_base=model.rotary_base,
        rotary_percent=model.rotary_percent,
        normalization=model.normalization,
        norm_epsilon=model.norm_epsilon,
        swiglu=model.swiglu,
        add_bias_linear=model.add_bias_linear,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
        padded_vocab_size=padded_vocab_size(config, vocab_size),
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        bf16=parallel.bf16,
        params_dtype=torch.bfloat16 if parallel.bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        dist_ckpt_format="torch_dist",
        use_dist_ckpt=True,
    )
