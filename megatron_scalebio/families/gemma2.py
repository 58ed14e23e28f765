"""Gemma 2: norms before and after each block, soft-capped attention and logits, every other layer
with a sliding window, √hidden on the embeddings, norms that multiply by 1 + weight."""

from __future__ import annotations

from typing import Any

from megatron_scalebio.families.base import Family, HfConfig, TensorMap, sliding_window
from megatron_scalebio.families.llama import COMMON, common_fields

_NORMS = {
    "mlp.linear_fc1.layer_norm_weight": "pre_feedforward_layernorm.weight",
    # Megatron-Bridge's names of the norms after a block.
    "self_attention.linear_proj.post_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.post_layernorm.weight": "post_feedforward_layernorm.weight",
}
_TENSORS = COMMON + tuple(
    TensorMap(f"decoder.layers.{{}}.{megatron}", (f"model.layers.{{}}.{hf}",))
    for megatron, hf in _NORMS.items()
)


def _gemma2(config: HfConfig) -> dict[str, Any]:
    config.require("hidden_activation", "gelu_pytorch_tanh")
    config.require("attention_bias", False)
    config.require("use_bidirectional_attention", None, False)
    config.take("hidden_act")  # an alias that the model does not read
    return {
        **common_fields(config),
        "swiglu": False,
        "activation": "geglu_tanh",
        "apply_layernorm_1p": True,
        "post_norms": True,
        "scale_embedding": True,
        "softmax_scale": config.take("query_pre_attn_scalar") ** -0.5,
        "attn_logit_softcapping": config.take("attn_logit_softcapping"),
        "final_logit_softcapping": config.take("final_logit_softcapping"),
        **sliding_window(config),
    }


FAMILIES = (Family(("Gemma2ForCausalLM",), _gemma2, _TENSORS),)
