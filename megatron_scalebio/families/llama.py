"""Llama 2 and 3, and what shares its layers: Yi, SmolLM, Mistral, Qwen 2 and 3, Phi-3 and 4."""

from collections.abc import Callable
from typing import Any

from megatron_scalebio.families.base import (
    HF_LAYER,
    LAYER,
    Family,
    HfConfig,
    TensorMap,
    head,
    rope,
    rows,
    sliding_window,
)


def _qkv(kind: str, **keywords: Any) -> TensorMap:
    parts = tuple(f"{HF_LAYER}self_attn.{p}_proj.{kind}" for p in "qkv")
    return TensorMap(f"{LAYER}self_attention.linear_qkv.{kind}", parts, "qkv", **keywords)


# The layer names that all families with Llama's MLP and RMSNorm share.
COMMON = (
    TensorMap("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocab=True),
    *rows({"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight"}),
    _qkv("weight"),
    *rows(
        {f"self_attention.{p}_layernorm.weight": f"self_attn.{p}_norm.weight" for p in "qk"},
        when="qk_layernorm",
    ),
    *rows(
        {
            "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
            "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        }
    ),
    TensorMap("decoder.final_layernorm.weight", ("model.norm.weight",)),
    head("lm_head.weight"),
)
TENSORS = (
    *COMMON,
    *rows({"mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight"}),
    _qkv("bias", when="add_qkv_bias"),
)
# Norms after a block, under Megatron-Bridge's names.
POST_NORMS = rows(
    {
        "self_attention.linear_proj.post_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.linear_fc2.post_layernorm.weight": "post_feedforward_layernorm.weight",
    }
)


def common_fields(
    config: HfConfig, positions: Callable[[HfConfig], dict[str, Any]] = rope
) -> dict[str, Any]:
    """The fields whose keys all these families share.

    Args:
        positions: gives rope's fields.
    """
    heads, hidden = config.take("num_attention_heads"), config.take("hidden_size")
    return {
        "num_layers": config.take("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": config.take("num_key_value_heads"),
        "kv_channels": config.take("head_dim") or hidden // heads,
        "ffn_hidden_size": config.take("intermediate_size"),
        "max_position_embeddings": config.take("max_position_embeddings"),
        "normalization": "RMSNorm",
        "norm_epsilon": config.take("rms_norm_eps"),
        "untie_embeddings_and_output_weights": not config.take("tie_word_embeddings"),
        "vocab_size": config.take("vocab_size"),
        **positions(config),
    }


def silu_fields(config: HfConfig, **common: Any) -> dict[str, Any]:
    """`common_fields` of those whose MLP is gated by SiLU."""
    config.require("hidden_act", "silu")
    return {**common_fields(config, **common), "swiglu": True}


def _llama(config: HfConfig) -> dict[str, Any]:
    config.require("attention_bias", False)
    config.require("mlp_bias", False)
    return silu_fields(config)


def _mistral(config: HfConfig) -> dict[str, Any]:
    return {**silu_fields(config), **sliding_window(config)}


def _qwen2(config: HfConfig) -> dict[str, Any]:
    config.take("use_sliding_window"), config.take("max_window_layers")  # both in layer_types
    return {
        **silu_fields(config),
        "add_qkv_bias": True,
        **sliding_window(config),
    }


def _qwen3(config: HfConfig) -> dict[str, Any]:
    config.require("attention_bias", False)
    return {**_qwen2(config), "add_qkv_bias": False, "qk_layernorm": True}


def no_rope(config: HfConfig) -> dict[str, Any]:
    """Which layers have no rope."""
    config.take("no_rope_layer_interval")  # in the list
    turned = config.take("no_rope_layers")[: config.take("num_hidden_layers")]
    without = [1 - bool(each) for each in turned]
    return {"no_rope_freq": without if any(without) else None}


def _smollm3(config: HfConfig) -> dict[str, Any]:
    config.take("use_sliding_window")  # in layer_types
    return {**_llama(config), **no_rope(config), **sliding_window(config)}


def _phi3(config: HfConfig) -> dict[str, Any]:
    config.take("original_max_position_embeddings")  # plain rope does not ask for it
    return _mistral(config)


# q, k and v are one tensor, gate and up another.
_FUSED = {
    f"{LAYER}self_attention.linear_qkv.weight": ("self_attn.qkv_proj.weight", "fused_qkv"),
    f"{LAYER}mlp.linear_fc1.weight": ("mlp.gate_up_proj.weight", "copy"),
}
_PHI3_TENSORS = (
    *(row for row in TENSORS if row.megatron not in _FUSED),
    *(TensorMap(name, (f"{HF_LAYER}{hf}",), rule) for name, (hf, rule) in _FUSED.items()),
)


FAMILIES = (
    Family(("LlamaForCausalLM",), _llama, TENSORS),
    Family(("MistralForCausalLM",), _mistral, TENSORS),
    Family(("Qwen2ForCausalLM",), _qwen2, TENSORS),
    Family(("Qwen3ForCausalLM",), _qwen3, TENSORS),
    Family(("SmolLM3ForCausalLM",), _smollm3, TENSORS),
    Family(("Phi3ForCausalLM",), _phi3, _PHI3_TENSORS),
)
