"""Two faults of Megatron-Core 0.19.2 fixed, and the private names that the package needs."""

import functools
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import gpt_dataset, helpers
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_scalebio.compat import require

_EXCHANGES = {"_batched_p2p_ops": list, "_p2p_ops": dict}
_BORROWED: list[tuple[Any, ...]] = [
    (
        DistributedOptimizer, "_set_main_param_and_optimizer_states",
        "_init_optimizer_states_with_dummy_values", "_get_model_param_range_map",
    ),
    (RotaryEmbedding, "_apply_scaling"),
    (rope_utils, "_apply_rotary_pos_emb_thd", "_apply_rotary_pos_emb_bshd"),
    (filesystem_async, "_results_queue", "get_write_results_queue"),
    (gpt_dataset, "_build_document_index", "_build_shuffle_index"),
    (helpers, "build_sample_idx"),
    (p2p_communication, *_EXCHANGES),
    (TopKRouter, "_apply_expert_bias"),
    (TransformerLayer, "_forward_attention", "_forward_pre_mlp_layernorm", "_forward_post_mlp"),
]  # fmt: skip


@functools.cache
def adapt() -> None:
    """Fixes Megatron once, and checks that it has what is borrowed here. Call as a run begins.

    Raises:
        UserError: if it has not.
    """
    for owner, *names in _BORROWED:
        require(owner, *names)
    _complete_adam_state()
    rope_utils._apply_rotary_pos_emb_thd = rotated_at_once


def _complete_adam_state() -> None:
    """Fixes a load of Megatron's DistributedOptimizer over torch's Adam.

    torch's Adam keeps `step` with every parameter, Transformer Engine's and Apex's with the group.
    `fully_reshardable` checkpoints follow the latter, and loading one into the former raises
    KeyError('step'). `load_state_dict` has already set the step by then: it stays as it is.
    """
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            # load_state_dict has given all parameters one tensor, which each would count up.
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"], **tensors}
        original(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step


def rotated_at_once(
    row_TND: torch.Tensor, ends: torch.Tensor, frequencies: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Rotary embedding of a packed row, each sequence from position 0 on.

    Megatron's own turns one sequence after the other, in every layer, and waits for the GPU to say
    where each begins (docs/gpu.md has what that cost).

    Args:
        ends: where the sequences begin, and the row's end, ascending, int32 [sequences + 1].
        frequencies: of each position, as many as the longest sequence has or more, [S, 1, 1, D].
    """
    assert options.pop("cp_group").size() == 1, "packed rows are not split over ranks"
    place_T = torch.arange(len(row_TND), dtype=ends.dtype, device=ends.device)
    position_T = place_T - ends[torch.searchsorted(ends, place_T, right=True) - 1]
    turned = rope_utils._apply_rotary_pos_emb_bshd(
        row_TND.unsqueeze(1), frequencies[position_T], **options
    )
    return turned.squeeze(1)


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Gives a fresh DistributedOptimizer the Adam state that loading writes into.

    It reads the step from that state before it loads, which torch's Adam has after a step only.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer:
            part._init_optimizer_states_with_dummy_values()


def make_fit(saved: Any, optimizer: MegatronOptimizer) -> None:
    """Gives a loaded state, which another optimizer may have saved, the form that this one takes.

    Megatron finds a saved parameter group by its `max_lr` and `min_lr` among others, and refuses a
    state whose rates differ. The rates of a step come from the schedule, not from there.

    Of Transformer Engine's, Apex's and torch's Adam, Megatron takes the first that is installed.
    They have different options in their groups, and their moments are the same.
    """
    adams = [p.optimizer for p in optimizer.chained_optimizers if not p.is_stub_optimizer]
    if adams and isinstance(saved, dict) and saved.get("param_groups"):
        for group in saved["param_groups"]:
            for name in ("max_lr", "min_lr"):
                group[name] = optimizer.param_groups[0][name]
            for name, value in adams[0].defaults.items():
                group.setdefault(name, value)
        _move_step(saved, isinstance(adams[0], torch.optim.Adam))
    if isinstance(saved, dict | list):
        for value in saved.values() if isinstance(saved, dict) else saved:
            make_fit(value, optimizer)


def _move_step(saved: dict[str, Any], into_state: bool) -> None:
    """Puts the count of steps where torch's Adam has it, or where the others do: in the groups.

    Megatron writes torch's as `common_step`; DistributedOptimizer has it in the groups always.
    """
    groups, state = saved["param_groups"], saved.get("state", {})
    in_groups = (group["step"] for group in groups if "step" in group)
    step = state.pop("common_step", None) or next(in_groups, None)
    if step is None:
        return
    if into_state and "state" in saved:
        state["common_step"] = torch.tensor(float(step))
    for group in groups:
        if into_state and "state" in saved:
            group.pop("step", None)
        else:
            group["step"] = int(step)


def start_of_shard(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> int:
    """The first element of a parameter that this rank's shard of the optimizer holds."""
    return optimizer._get_model_param_range_map(parameter)["param"].start


def scaled_as_llama3(rope: RotaryEmbedding, **options: float) -> torch.Tensor:
    """The frequencies of a rotary module, scaled by the options of llama3's rule."""
    return rope._apply_scaling(rope.inv_freq, **options)


def scale_cos_and_sin(attention: Attention, factor: float) -> None:
    """What an attention layer multiplies rope's cos and sin by."""
    require(attention, "_yarn_concentration_factor")
    attention._yarn_concentration_factor = factor


def start_manager_of_writers(initializer: Callable[..., None], *args: Any) -> None:
    """Starts the process through which checkpoint writers report, as Megatron's first save does.

    Args:
        initializer: called with `args` in that process, which Megatron's own start has no room for.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer, args)
        filesystem_async._results_queue = _AsBytes(manager.Queue())


class _AsBytes:
    """A manager's queue whose process sees bytes alone.

    To see the objects it would import what they are of, which is torch: 3 s of a core in each
    rank's first save, and 300 MB for as long as the run lasts. What is unpickled
    comes from this rank's own writer, by a channel that takes the manager's key alone.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, item: Any) -> None:
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())


def packing_order(
    lengths_D: np.ndarray, seq_length: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How Megatron's GPTDataset packs one epoch of documents: its three indices.

    Returns:
        The documents in their order; where each sample begins, (place in that order, token) [N + 1,
        2]; the samples in their order [N].
    """
    random = np.random.RandomState(seed)
    documents = np.arange(len(lengths_D), dtype=np.int32)
    order_D = gpt_dataset._build_document_index(documents, 1, random, False)
    tokens = int(lengths_D.sum(dtype=np.int64))
    starts = helpers.build_sample_idx(lengths_D, order_D, seq_length, 1, tokens, True, 1)
    samples = len(starts) - 1
    return order_D, starts, gpt_dataset._build_shuffle_index(samples, samples, random)


def exchanges() -> list[tuple[Any, str, type]]:
    """The functions by which pipeline stages send and receive: module, name, type of the result."""
    return [(p2p_communication, name, gives) for name, gives in _EXCHANGES.items()]


class PartedLayer(TransformerLayer):
    """Megatron's transformer layer with its parts under public names, to be joined otherwise."""

    def attend(self, *args: Any, **keywords: Any) -> Any:
        return self._forward_attention(*args, **keywords)

    def normalize_for_mlp(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._forward_pre_mlp_layernorm(hidden_states)

    def join_mlp(self, mlp_output: Any, residual: torch.Tensor) -> torch.Tensor:
        return self._forward_post_mlp(mlp_output, residual)
