"""Mixtures of experts on Llama's attention: Qwen 3 MoE, Mixtral, GLM 4.5."""

from dataclasses import replace
from typing import Any

from megatron_scalebio.families.base import (
    LAYER,
    Family,
    HfConfig,
    TensorMap,
    rows,
    sliding_window,
)
from megatron_scalebio.families.llama import TENSORS, common_fields, silu_fields

_DENSE = (f"{LAYER}mlp.linear_fc1.", f"{LAYER}mlp.linear_fc2.")
# Of Llama's tensors, which layers have them.
DENSE = tuple(
    replace(row, layers="dense") if row.megatron.startswith(_DENSE) else row for row in TENSORS
)


def experts(
    block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[TensorMap, ...]:
    """Router, experts and the norm before them.

    Args:
        block: where they are in a layer; the others, the names of an expert's matrices.
    """
    expert = f"{block}.experts.{{}}."
    return rows(
        {
            "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
            "mlp.router.weight": f"{block}.gate.weight",
            "mlp.experts.experts.linear_fc1.weight": (
                f"{expert}{gate}.weight", f"{expert}{up}.weight",
            ),
            "mlp.experts.experts.linear_fc2.weight": f"{expert}{down}.weight",
        },
        layers="experts",
    )  # fmt: skip


BIAS = rows({"mlp.router.expert_bias": "mlp.gate.e_score_correction_bias"}, layers="experts")
SHARED = rows(
    {
        "mlp.shared_experts.linear_fc1.weight": (
            "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight",
        ),
        "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
    },
    layers="experts",
)  # fmt: skip


def no_losses(config: HfConfig) -> None:
    """transformers adds a balance loss on request alone; here `moe_aux_loss_coeff` asks for one."""
    config.take("router_aux_loss_coef"), config.take("output_router_logits")


def _qwen3_moe(config: HfConfig) -> dict[str, Any]:
    config.require("attention_bias", False)
    config.require("use_sliding_window", False)
    config.take("sliding_window")
    no_losses(config)
    layers, every = config.take("num_hidden_layers"), config.take("decoder_sparse_step")
    dense = config.take("mlp_only_layers") or []
    experts = config.take("num_local_experts")
    return {
        **silu_fields(config),
        "qk_layernorm": True,
        "num_experts": experts,
        "moe_layer_freq": [
            int(layer not in dense and (layer + 1) % every == 0) for layer in range(layers)
        ],
        "moe_ffn_hidden_size": config.take("moe_intermediate_size"),
        "moe_router_topk": config.take("num_experts_per_tok"),
        "moe_router_pre_softmax": not config.take("norm_topk_prob"),
    }


def _mixtral(config: HfConfig) -> dict[str, Any]:
    config.require("router_jitter_noise", 0.0)
    no_losses(config)
    return {
        **silu_fields(config),
        "num_experts": config.take("num_local_experts"),
        "moe_ffn_hidden_size": config.take("intermediate_size"),
        "moe_router_topk": config.take("num_experts_per_tok"),
        **sliding_window(config),
    }


# Routers whose experts a bias balances.
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


def shared_experts(config: HfConfig) -> dict[str, Any]:
    """The fields of experts beside which one is shared, after dense first layers."""
    config.require("hidden_act", "silu")
    config.take("output_router_logits")
    config.take("num_nextn_predict_layers")  # see Family.more_layers
    layers, dense = config.take("num_hidden_layers"), config.take("first_k_dense_replace")
    width, factor = config.take("moe_intermediate_size"), config.take("routed_scaling_factor")
    return {
        "swiglu": True,
        "num_experts": config.take("n_routed_experts"),
        "moe_layer_freq": [int(layer >= dense) for layer in range(layers)],
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": width * config.take("n_shared_experts"),
        "moe_router_topk": config.take("num_experts_per_tok"),
        "moe_router_topk_scaling_factor": None if factor == 1 else factor,
        "moe_router_dtype": "fp32",
    }


def _glm4_moe(config: HfConfig) -> dict[str, Any]:
    config.require("norm_topk_prob", True)
    config.require("n_group", 1)
    config.require("topk_group", 1)
    return {
        **common_fields(config),
        **shared_experts(config),
        **SIGMOID,
        "add_qkv_bias": bool(config.take("attention_bias")),
        "qk_layernorm": config.take("use_qk_norm"),
    }


FAMILIES = (
    Family(
        ("Qwen3MoeForCausalLM",), _qwen3_moe,
        (*DENSE, *experts()),
    ),
    Family(
        ("Glm4MoeForCausalLM",), _glm4_moe,
        (*DENSE, *experts(), *BIAS, *SHARED),
        more_layers=True,
    ),
    Family(
        ("MixtralForCausalLM",), _mixtral,
        (*DENSE, *experts("block_sparse_moe", "w1", "w3", "w2")),
    ),
)  # fmt: skip
