"""Gemma 2, and 3 without images: norms before and after each block, some layers with a sliding
window, √hidden on the embeddings, norms that multiply by 1 + weight.

Gemma 2 caps scores and logits. Gemma 3 normalizes queries and keys, and layers with a window have
another base of rope.
"""

from typing import Any

from megatron_scalebio.families.base import Family, HfConfig, layered_rope, rows, sliding_window
from megatron_scalebio.families.llama import COMMON, POST_NORMS, common_fields

_TENSORS = (
    *COMMON,
    *rows({"mlp.linear_fc1.layer_norm_weight": "pre_feedforward_layernorm.weight"}),
    *POST_NORMS,
)


def _gemma(config: HfConfig, **common: Any) -> dict[str, Any]:
    config.require("hidden_activation", "gelu_pytorch_tanh")
    config.require("attention_bias", False)
    config.require("use_bidirectional_attention", None, False)
    config.take("hidden_act")  # an alias that the model does not read
    return {
        **common_fields(config, **common),
        "swiglu": False,
        "activation": "geglu_tanh",
        "apply_layernorm_1p": True,
        "post_norms": True,
        "scale_embedding": True,
        "softmax_scale": config.take("query_pre_attn_scalar") ** -0.5,
        "attn_logit_softcapping": config.take("attn_logit_softcapping"),
        "final_logit_softcapping": config.take("final_logit_softcapping"),
    }


def _gemma2(config: HfConfig) -> dict[str, Any]:
    return {**_gemma(config), **sliding_window(config)}


def _gemma3(config: HfConfig) -> dict[str, Any]:
    config.take("sliding_window_pattern"), config.take("_sliding_window_pattern")  # in layer_types
    return {**_gemma(config, positions=layered_rope), "qk_layernorm": True}


FAMILIES = (
    Family(("Gemma2ForCausalLM",), _gemma2, _TENSORS),
    Family(("Gemma3ForCausalLM",), _gemma3, _TENSORS),
)
