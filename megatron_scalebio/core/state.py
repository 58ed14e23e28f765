"""The state of a training as Megatron's sharded state: each rank's part of every global tensor.

model (model0, model1, … with virtual stages)   w, under Megatron-LM's names
u                                               u, where it has storage apart from w's
low_bits_w, low_bits_u                          of their layers that have trained and rest, in bf16
optimizer_w, optimizer_u                        while a period lasts
scalebio                                        what is equal on all ranks
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.utils import unwrap_model

from megatron_scalebio.compat import fp8_state
from megatron_scalebio.compat.megatron import allocate_state, make_fit
from megatron_scalebio.compat.transformer_engine import fp8_state_allowed
from megatron_scalebio.core import low_bits
from megatron_scalebio.core.period import Period, take_configured_adam
from megatron_scalebio.core.twin import forget_weight_copies, named_parameters

Chunks = Sequence[torch.nn.Module]

# One key per layer: layers of u, and optimizer state under LISA, exist for some layers only.
PER_LAYER = {"non_homogeneous_layers": True}
_OPTIMIZER = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    **PER_LAYER,
}


def model_state(chunks: Chunks, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Sharded state of a model: `model`, or `model0`, `model1`, … with virtual chunks."""
    # Megatron adds process groups to the metadata it is given: hand it a copy.
    states: list[Any] = [
        unwrap_model(chunk).sharded_state_dict(metadata=dict(metadata or {})) for chunk in chunks
    ]
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{number}": part for number, part in enumerate(states)}


def model_state_to_load(chunks: Chunks, keys: Collection[str]) -> dict[str, Any]:
    """`model_state` of chunks, without the FP8 state that a checkpoint lacks.

    Each implementation of the layers has it for modules of its own, mostly empty.

    Args:
        keys: of the checkpoint.
    """
    return {
        chunk: {
            name: entry for name, entry in tensors.items()
            if not fp8_state.is_fp8_state(name) or _key(entry) in keys
        }
        for chunk, tensors in model_state(chunks).items()
    }  # fmt: skip


def load_models(
    chunks: Chunks,
    loaded: Mapping[str, Any],
    strict: bool = True,
    keep_fp8_state: bool = True,
) -> None:
    """Fills chunks with what was loaded for their `model_state_to_load`.

    Args:
        strict: all of a chunk has been loaded, except for FP8 state.

    Raises:
        UserError: if FP8 state names anything but tensors and recipes.
    """
    keys = sorted((key for key in loaded if key.startswith("model")), key=lambda k: (len(k), k))
    for chunk, key in zip(chunks, keys, strict=True):
        if keep_fp8_state:
            fp8_state.refuse_code(loaded[key])
        else:
            fp8_state.drop(loaded[key])
        with fp8_state_allowed():
            result = unwrap_model(chunk).load_state_dict(loaded[key], strict=False)
        lacking = [name for name in result.missing_keys if not fp8_state.is_fp8_state(name)]
        assert not (strict and lacking) and not result.unexpected_keys, (lacking, result)
    forget_weight_copies(chunks)


def state_of_u(w: Chunks, u: Chunks) -> dict[str, Any]:
    """Sharded state of the parameters in which u has storage of its own, and its FP8 state."""
    pairs = zip(named_parameters(w), named_parameters(u), strict=True)
    both = [(p_w.data_ptr(), p_u.data_ptr()) for (_, p_w), (_, p_u) in pairs]
    shared = {of_w for of_w, of_u in both if of_w == of_u}
    return _of_u(u, lambda entry: fp8_state.is_kept(entry) or _is_apart(entry, shared))


def state_of_u_to_load(u: Chunks, keys: Collection[str]) -> dict[str, Any]:
    """Sharded state of the parameters of u that a checkpoint has; they get their own storage.

    Args:
        keys: of the checkpoint, such as "u.decoder.layers.3.mlp.linear_fc1.weight".
    """
    wanted = _of_u(u, lambda entry: f"u.{_key(entry)}" in keys)
    own = {
        entry.data.data_ptr()
        for tensors in wanted.values()
        for entry in tensors.values()
        if isinstance(entry.data, torch.Tensor)
    }
    for _, parameter in named_parameters(u):
        if parameter.data_ptr() in own:
            parameter.data = parameter.data.clone()
    return _of_u(u, lambda entry: f"u.{_key(entry)}" in keys)


def low_bits_state(models: Mapping[str, Chunks], group: low_bits.SharingGroup) -> dict[str, Any]:
    """Sharded state of the low bits of w, and of u's where they are not w's. A collective."""
    of_w = {id(low_bits.kept(p)) for _, p in named_parameters(models["w"])}

    def bits(name: str, entry: Any, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        held = low_bits.kept(parameter)
        is_ws = name == "u" and id(held) in of_w
        return None if held is None or is_ws else low_bits.whole(parameter, group(parameter))

    return _in_place_of_weights(models, bits)


def low_bits_to_load(models: Mapping[str, Chunks], keys: Collection[str]) -> dict[str, Any]:
    """`low_bits_state` of what a checkpoint has of it; older ones have nothing.

    Args:
        keys: of the checkpoint.
    """

    def bits(name: str, entry: Any, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        wanted = f"low_bits_{name}.{_key(entry)}" in keys
        return torch.empty(parameter.shape, dtype=torch.int16) if wanted else None

    return _in_place_of_weights(models, bits)


def load_low_bits(
    models: Mapping[str, Chunks], loaded: Mapping[str, Any], group: low_bits.SharingGroup
) -> None:
    """Keeps what was loaded for `low_bits_to_load`, and nothing else."""
    for name, chunks in models.items():
        parts = loaded.get(f"low_bits_{name}", {})
        for number, chunk in enumerate(chunks):
            tensors = parts.get("model" if len(chunks) == 1 else f"model{number}", {})
            for key, parameter in unwrap_model(chunk).named_parameters():
                low_bits.forget(parameter)
                if key in tensors:
                    low_bits.keep_part(parameter, tensors[key], group(parameter))


def _in_place_of_weights(
    models: Mapping[str, Chunks],
    bits: Callable[[str, Any, torch.nn.Parameter], torch.Tensor | None],
) -> dict[str, Any]:
    """Sharded states of models with bits in place of weights, by `low_bits_w` and `low_bits_u`.

    Args:
        bits: of a parameter; is given the model's name, too, and the weights' entry.
    """
    result = {}
    for name, chunks in models.items():
        parts = model_state(chunks, PER_LAYER)
        for chunk, tensors in zip(chunks, parts.values(), strict=True):
            parameters = dict(unwrap_model(chunk).named_parameters())
            for key, entry in list(tensors.items()):
                held = bits(name, entry, parameters[key]) if key in parameters else None
                if held is None:
                    del tensors[key]
                elif isinstance(entry, ShardedTensorFactory):
                    tensors[key] = replace(entry, data=held)
                else:
                    tensors[key] = replace(entry, data=held, dtype=held.dtype)
        add_prefix_for_sharding(parts, f"low_bits_{name}.")
        result[f"low_bits_{name}"] = parts
    return result


def keys_of(state: Mapping[str, Any]) -> list[str]:
    """The keys of the sharded tensors and objects in the states of chunks."""
    return sorted({_key(entry) for tensors in state.values() for entry in tensors.values()})


def _of_u(u: Chunks, wanted: Callable[[Any], bool]) -> dict[str, Any]:
    state = {
        chunk: {name: entry for name, entry in tensors.items() if wanted(entry)}
        for chunk, tensors in model_state(u, PER_LAYER).items()
    }
    add_prefix_for_sharding(state, "u.")
    return state


def _key(entry: Any) -> str:
    return entry.unique_key if isinstance(entry, ShardedObject) else getattr(entry, "key", "")


def _is_apart(entry: Any, shared: set[int]) -> bool:
    if isinstance(entry, ShardedObject):
        return False
    data = getattr(entry, "data", None)
    return isinstance(data, torch.Tensor) and data.data_ptr() not in shared


def optimizer_states(
    models: Mapping[str, Chunks], period: Period, is_loading: bool = False
) -> dict[str, Any]:
    """Sharded state of a period's optimizers, by `optimizer_w` and `optimizer_u`."""
    result = {}
    for name, optimizer in period.optimizers.items():
        if is_loading:
            allocate_state(optimizer)
        key = f"optimizer_{name}"
        result[key] = optimizer.sharded_state_dict(
            model_state(models[name], PER_LAYER), is_loading=is_loading, metadata=dict(_OPTIMIZER)
        )
        add_prefix_for_sharding(result[key], f"{key}.")
    return result


def load_optimizers(period: Period, loaded: Mapping[str, Any]) -> None:
    """Fills a period's optimizers; rates and Adam's options stay those that are configured."""
    for name, optimizer in period.optimizers.items():
        saved = loaded[f"optimizer_{name}"]
        make_fit(saved, optimizer)
        optimizer.load_state_dict(saved)
        take_configured_adam(optimizer)


def of_all_ranks(keys: Sequence[str]) -> list[str]:
    """The keys of all ranks together, sorted. A collective."""
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, list(keys))
    return sorted(set().union(*held))
