"""gpt-oss: experts with a clamped gate, biases everywhere, heads that may attend to nothing."""

from typing import Any

from megatron_scalebio.families.base import (
    HF_LAYER,
    LAYER,
    Family,
    HfConfig,
    TensorMap,
    pair,
    rows,
    sliding_window,
)
from megatron_scalebio.families.experts import no_losses
from megatron_scalebio.families.llama import TENSORS, common_fields

_EXPERTS, _HF_EXPERTS = f"{LAYER}mlp.experts.experts.", f"{HF_LAYER}mlp.experts."
_TENSORS = (
    *(row for row in TENSORS if ".mlp." not in row.megatron),
    *rows(
        {
            "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
            "self_attention.core_attention.softmax_offset": "self_attn.sinks",
            "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        }
    ),
    *pair(f"{LAYER}mlp.router.", f"{HF_LAYER}mlp.router."),
    *(
        TensorMap(f"{_EXPERTS}{megatron}", (f"{_HF_EXPERTS}{hf}[{{}}]",), rule)
        for megatron, hf, rule in (
            ("linear_fc1.weight", "gate_up_proj", "transposed_alternate"),
            ("linear_fc1.bias", "gate_up_proj_bias", "alternate"),
            ("linear_fc2.weight", "down_proj", "transposed"),
            ("linear_fc2.bias", "down_proj_bias", "copy"),
        )
    ),
)


def _gpt_oss(config: HfConfig) -> dict[str, Any]:
    config.require("hidden_act", "silu")
    config.require("attention_bias", True)
    config.require("swiglu_alpha", 1.702, None)  # older transformers know no other, and no key
    no_losses(config)
    return {
        **common_fields(config),
        "swiglu": False,
        "activation": "quick_geglu",
        "activation_func_clamp_value": config.take("swiglu_limit"),
        "glu_linear_offset": 1.0,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "softmax_type": "learnable",
        "num_experts": config.take("num_local_experts"),
        "moe_ffn_hidden_size": config.take("intermediate_size"),
        "moe_router_topk": config.take("num_experts_per_tok"),
        **sliding_window(config),
    }


FAMILIES = (Family(("GptOssForCausalLM",), _gpt_oss, _TENSORS, packed=True),)
