"""GPT-2 and GPT-NeoX: LayerNorm, biases everywhere, one tensor for Q, K and V."""

from typing import Any

from megatron_scalebio.families.base import LAYER, Family, HfConfig, TensorMap, head, pair, rope


def _gpt2(config: HfConfig) -> dict[str, Any]:
    config.require("activation_function", "gelu_new", "gelu_pytorch_tanh")
    config.require("scale_attn_weights", True)
    config.require("scale_attn_by_inverse_layer_idx", False)
    config.require("add_cross_attention", False)
    hidden = config.take("n_embd")
    return {
        "num_layers": config.take("n_layer"),
        "hidden_size": hidden,
        "num_attention_heads": config.take("n_head"),
        "ffn_hidden_size": config.take("n_inner") or 4 * hidden,
        "max_position_embeddings": config.take("n_positions"),
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "norm_epsilon": config.take("layer_norm_epsilon"),
        "swiglu": False,
        "activation": "gelu_tanh",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "untie_embeddings_and_output_weights": not config.take("tie_word_embeddings"),
        "vocab_size": config.take("vocab_size"),
    }


_H = "transformer.h.{}."


def _conv1d(
    megatron: str, hf: str, rule: str = "transposed", rule_of_bias: str = "copy"
) -> tuple[TensorMap, TensorMap]:
    """A linear layer of GPT-2, whose weight is stored transposed."""
    return (
        TensorMap(f"{LAYER}{megatron}.weight", (f"{_H}{hf}.weight",), rule),
        TensorMap(f"{LAYER}{megatron}.bias", (f"{_H}{hf}.bias",), rule_of_bias),
    )


_GPT2_TENSORS = (
    TensorMap("embedding.word_embeddings.weight", ("transformer.wte.weight",), vocab=True),
    TensorMap("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
    *pair(f"{LAYER}self_attention.linear_qkv.layer_norm_", f"{_H}ln_1."),
    *_conv1d("self_attention.linear_qkv", "attn.c_attn", "transposed_qkv", "fused_qkv"),
    *_conv1d("self_attention.linear_proj", "attn.c_proj"),
    *pair(f"{LAYER}mlp.linear_fc1.layer_norm_", f"{_H}ln_2."),
    *_conv1d("mlp.linear_fc1", "mlp.c_fc"),
    *_conv1d("mlp.linear_fc2", "mlp.c_proj"),
    *pair("decoder.final_layernorm.", "transformer.ln_f."),
    head("lm_head.weight"),
)


def _gpt_neox(config: HfConfig) -> dict[str, Any]:
    activation = config.require("hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    config.require("attention_bias", True)
    return {
        "num_layers": config.take("num_hidden_layers"),
        "hidden_size": config.take("hidden_size"),
        "num_attention_heads": config.take("num_attention_heads"),
        "ffn_hidden_size": config.take("intermediate_size"),
        "max_position_embeddings": config.take("max_position_embeddings"),
        "normalization": "LayerNorm",
        "norm_epsilon": config.take("layer_norm_eps"),
        "swiglu": False,
        "activation": "gelu" if activation == "gelu" else "gelu_tanh",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "parallel_residual": config.take("use_parallel_residual"),
        "untie_embeddings_and_output_weights": not config.take("tie_word_embeddings"),
        "vocab_size": config.take("vocab_size"),
        **rope(config),
    }


_NEOX = "gpt_neox.layers.{}."
_GPT_NEOX_TENSORS = (
    TensorMap("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",), vocab=True),
    *pair(f"{LAYER}self_attention.linear_qkv.layer_norm_", f"{_NEOX}input_layernorm."),
    # Q, K and V of a head lie together, as in Megatron-LM, where GPT-NeoX comes from.
    *pair(f"{LAYER}self_attention.linear_qkv.", f"{_NEOX}attention.query_key_value."),
    *pair(f"{LAYER}self_attention.linear_proj.", f"{_NEOX}attention.dense."),
    *pair(f"{LAYER}mlp.linear_fc1.layer_norm_", f"{_NEOX}post_attention_layernorm."),
    *pair(f"{LAYER}mlp.linear_fc1.", f"{_NEOX}mlp.dense_h_to_4h."),
    *pair(f"{LAYER}mlp.linear_fc2.", f"{_NEOX}mlp.dense_4h_to_h."),
    *pair("decoder.final_layernorm.", "gpt_neox.final_layer_norm."),
    head("embed_out.weight"),
)

FAMILIES = (
    Family(
        ("GPT2LMHeadModel",), _gpt2, _GPT2_TENSORS, "transformer.",
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    Family(
        ("GPTNeoXForCausalLM",), _gpt_neox, _GPT_NEOX_TENSORS, "gpt_neox.",
        ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
)  # fmt: skip
