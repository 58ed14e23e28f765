"""What the options of a mixture of experts must be for it to work, alone and with each other."""

from typing import Any

from megatron_scalebio.config.checks import by_name, pattern_of_layers, require_positive
from megatron_scalebio.errors import UserError


def check_experts(model: Any) -> None:
    """Refuses options of a `ModelConfig` with experts that do not go together."""
    require_positive(
        model, "moe_router_bias_update_rate", "moe_aux_loss_coeff", "moe_z_loss_coeff", or_zero=True
    )
    experts, topk = model.num_experts, model.moe_router_topk
    if topk > experts:
        raise UserError(f"moe_router_topk: {topk!r} is above num_experts {experts} (lower it)")
    over_chosen = model.moe_router_score_function == "softmax" and not model.moe_router_pre_softmax
    if topk == 1 and over_chosen:
        raise UserError(
            "moe_router_topk: 1 gives every token the weight 1, from which no router learns "
            "(set moe_router_pre_softmax)"
        )
    if model.moe_router_enable_expert_bias and model.moe_router_score_function != "sigmoid":
        raise UserError(
            "moe_router_enable_expert_bias: True needs moe_router_score_function sigmoid (set it)"
        )
    if model.moe_apply_probs_on_input and topk > 1:
        raise UserError(
            f"moe_apply_probs_on_input: True needs moe_router_topk 1, not {topk} (drop it, or set "
            "moe_router_topk)"
        )
    for name, why in (
        ("parallel_residual", "its blocks have a dense MLP"),
        ("post_norms", "its norm belongs to a dense MLP"),
    ):
        if getattr(model, name):
            raise UserError(f"{name}: True does not go with num_experts: {why} (drop one of them)")
    if model.add_bias_linear and model.moe_shared_expert_intermediate_size:
        raise UserError(
            "add_bias_linear: True does not go with moe_shared_expert_intermediate_size: "
            "Megatron-Core's shared expert has no biases (drop one of them)"
        )
    _check_groups(model)
    if model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None:
        raise UserError(
            "moe_shared_expert_gate: True needs moe_shared_expert_intermediate_size (set it)"
        )
    if model.moe_layer_freq is not None:
        pattern = pattern_of_layers("moe_layer_freq", model.moe_layer_freq, model.num_layers)
        model.moe_layer_freq = None if all(pattern) else pattern


def _check_groups(model: Any) -> None:
    groups, chosen = model.moe_router_num_groups, model.moe_router_group_topk
    if (groups is None) != (chosen is None):
        raise UserError(
            f"moe_router_num_groups: {groups!r} and moe_router_group_topk {chosen!r} go together "
            "(set both or neither)"
        )
    if groups is None:
        return
    if model.num_experts % groups or chosen > groups:
        raise UserError(
            f"moe_router_num_groups: {groups!r} groups, of which {chosen} are chosen, do not "
            f"divide {model.num_experts} experts (choose a divisor, and at most as many)"
        )
    if (
        model.moe_router_topk % chosen
        or model.moe_router_topk > model.num_experts // groups * chosen
    ):
        raise UserError(
            f"moe_router_topk: {model.moe_router_topk!r} experts cannot be chosen evenly from "
            f"{chosen} groups of {model.num_experts // groups} (choose a multiple that they hold)"
        )


def refuse_without_experts(model: Any) -> None:
    """Refuses options of experts where there are none."""
    for name, value in options_of_experts(model).items():
        if value != model.__dataclass_fields__[name].default:
            raise UserError(f"{name}: {value!r} needs num_experts (set it)")


def options_of_experts(model: Any) -> dict[str, Any]:
    """Megatron's options of experts by its names; their number, `num_experts`, apart."""
    return by_name(model, *(n for n in model.__dataclass_fields__ if n.startswith("moe_")))


def widths_of_experts(model: Any, parallel: Any) -> list[tuple[str, int | None, int]]:
    """Fields, their values, and a side of the matrices that they make on each TP rank."""
    shared = model.moe_shared_expert_intermediate_size
    return [
        ("moe_ffn_hidden_size", model.moe_ffn_hidden_size,
         (model.moe_ffn_hidden_size or 0) // parallel.expert_tp),
        ("moe_shared_expert_intermediate_size", shared,
         (shared or 0) // parallel.tensor_model_parallel_size),
    ]  # fmt: skip


def check_expert_layout(model: Any, parallel: Any, world_size: int) -> None:
    """Refuses a layout that the model's experts do not fit."""
    ep, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    etp = parallel.expert_tp
    if model.num_experts is None:
        if ep > 1 or parallel.expert_tensor_parallel_size is not None:
            raise UserError(
                f"parallel.expert_model_parallel_size: {ep!r} and expert_tensor_parallel_size "
                f"{parallel.expert_tensor_parallel_size!r} need model.num_experts (set it)"
            )
        return
    if model.num_experts % ep:
        raise UserError(
            f"parallel.expert_model_parallel_size: {ep!r} does not divide num_experts "
            f"{model.num_experts} (choose a divisor)"
        )
    if tp > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"parallel.tensor_model_parallel_size: {tp!r} needs sequence_parallel with experts "
            "(set it)"
        )
    if model.add_bias_linear and etp > 1:
        raise UserError(
            f"parallel.expert_tensor_parallel_size: {etp!r} does not go with add_bias_linear: "
            "Megatron-Core adds an expert's bias once for each of these ranks (set it to 1)"
        )
    width = model.moe_ffn_hidden_size or model.ffn_hidden_size
    shared = model.moe_shared_expert_intermediate_size
    for name, size, over in (
        ("moe_ffn_hidden_size", width, etp), ("moe_shared_expert_intermediate_size", shared, tp),
    ):  # fmt: skip
        if size is not None and size % over:
            raise UserError(
                f"model.{name}: {size!r} is not divisible by the {over} ranks that share an expert "
                "(choose a multiple)"
            )
    pp = parallel.pipeline_model_parallel_size
    if world_size % (etp * ep * pp):
        raise UserError(
            f"parallel.expert_model_parallel_size: {ep!r} x PP {pp} x expert TP {etp} does not "
            f"divide the {world_size} ranks (lower it, or start a multiple)"
        )
