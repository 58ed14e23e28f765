"""Tiny models of every family, with awkward shapes, and the layouts that they are tried under."""

from __future__ import annotations

from typing import Any

BATCH, LENGTH = 3, 40
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
# Both were first trained on 16 tokens; a base of 100 puts a channel on yarn's ramp.
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 4.0],
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}
SHAPE = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
NEOX = {**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}, "hidden_size": 64}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
LATENT = {"kv_lora_rank": 18, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 7}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

# name: (transformers' class prefix, configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        {"vocab_size": 101, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 64},
    ),
    "gpt-neox": ("GPTNeoX", {**NEOX, "hidden_act": "gelu"}),
    "gpt-neox-sequential": ("GPTNeoX", {**NEOX, "use_parallel_residual": False, **TIED}),
    "llama-3-rope": ("Llama", {**SHAPE, **UNTIED, "rope_parameters": LLAMA3}),
    "llama-9-heads-3-groups": (
        "Llama",
        {**SHAPE, **TIED, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "llama-mqa-linear-rope": (
        "Llama",
        {**SHAPE, **UNTIED, "num_key_value_heads": 1, "rope_parameters": LINEAR, "head_dim": 16},
    ),
    "llama-longrope": ("Llama", {**SHAPE, **UNTIED, "rope_parameters": LONGROPE}),
    "qwen2-yarn": (
        "Qwen2", {**SHAPE, **UNTIED, "max_position_embeddings": 16, "rope_parameters": YARN},
    ),
    "mistral-window": ("Mistral", {**SHAPE, **UNTIED, "sliding_window": 7}),
    "qwen2-tied": ("Qwen2", {**SHAPE, **TIED}),
    "qwen2-window": (
        "Qwen2",
        {
            **SHAPE, **UNTIED, "use_sliding_window": True, "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "smollm3-yarn": (
        "SmolLM3",
        {**SHAPE, **TIED, "max_position_embeddings": 16, "rope_parameters": YARN,
         "no_rope_layers": [1, 0, 1, 0, 1], "pad_token_id": None},
    ),
    "phi3-partial-longrope": (
        "Phi3",
        {**SHAPE, **TIED, "original_max_position_embeddings": 16, "sliding_window": 35,
         "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5, "long_factor": [1.5, 3, 4],
                             "short_factor": [1.0, 1.1, 1.2]},
         "pad_token_id": None},
    ),
    "qwen3": ("Qwen3", {**SHAPE, **UNTIED, "head_dim": 16}),
    "qwen3-moe": (
        "Qwen3Moe",
        {**SHAPE, **EXPERTS, **UNTIED, "head_dim": 16, "norm_topk_prob": True,
         "mlp_only_layers": [1]},
    ),
    "qwen3-moe-all-scores": (
        "Qwen3Moe", {**SHAPE, **EXPERTS, **TIED, "head_dim": 16, "norm_topk_prob": False},
    ),
    "glm4-moe": (
        "Glm4Moe",
        {**SHAPE, **UNTIED, "head_dim": 16, "n_routed_experts": 6, "num_experts_per_tok": 3,
         "moe_intermediate_size": 20, "n_shared_experts": 2, "first_k_dense_replace": 1,
         "routed_scaling_factor": 1.7, "use_qk_norm": True, "attention_bias": True},
    ),
    "deepseek2-groups": (
        "DeepseekV2",
        {**SHAPE, **LATENT, **UNTIED, "num_key_value_heads": 4, "q_lora_rank": None,
         "moe_intermediate_size": 20, "first_k_dense_replace": 0, "n_routed_experts": 6,
         "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "n_shared_experts": 1,
         "topk_method": "group_limited_greedy", "norm_topk_prob": False,
         "routed_scaling_factor": 1.3, "rms_norm_eps": 1e-3},
    ),
    "deepseek3-yarn": (
        "DeepseekV3",
        {**SHAPE, **LATENT, **UNTIED, "num_key_value_heads": 4, "q_lora_rank": 14,
         "moe_intermediate_size": 20, "first_k_dense_replace": 1, "n_routed_experts": 12,
         "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
         "rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.3}},
    ),
    "llama4-some-layers": (
        "Llama4Text",
        {**SHAPE, **UNTIED, "head_dim": 10, "intermediate_size": 20, "intermediate_size_mlp": 44,
         "num_local_experts": 6, "moe_layers": [0, 2, 3], "no_rope_layers": [1, 0, 1, 0],
         "attention_chunk_size": LENGTH, "floor_scale": LENGTH + 1, "pad_token_id": None,
         "rms_norm_eps": 1e-3, "rope_parameters": LLAMA3},
    ),
    "llama4-all-experts": (
        "Llama4Text",
        {**SHAPE, **TIED, "head_dim": 16, "intermediate_size": 20, "num_local_experts": 4,
         "use_qk_norm": False, "pad_token_id": None},
    ),
    "mixtral": (
        "Mixtral",
        {**SHAPE, **UNTIED, "intermediate_size": 20, "num_local_experts": 4, "sliding_window": 7},
    ),
    "gpt-oss": (
        "GptOss",
        {**SHAPE, **UNTIED, "head_dim": 10, "intermediate_size": 20, "num_local_experts": 6,
         "num_experts_per_tok": 3, "sliding_window": 7, "swiglu_limit": 0.4,
         "rope_parameters": {**YARN, "truncate": False}},
    ),
    "olmo2": ("Olmo2", {**SHAPE, **UNTIED, "pad_token_id": None, "rms_norm_eps": 1e-2}),
    "olmo3-yarn": (
        "Olmo3",
        {
            **SHAPE, **UNTIED, "pad_token_id": None, "sliding_window": 7,
            "rope_parameters": {
                "full_attention": {**YARN, "attention_factor": 1.2},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **SHAPE, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 20,
            "num_hidden_layers": 4, "sliding_window_pattern": 2, "pad_token_id": None,
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            **SHAPE, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
            # transformers gives the padding token no gradient as an input.
            "pad_token_id": None,
        },
    ),
}  # fmt: skip
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp2-sequence-parallel": (2, {**TP2, "sequence_parallel": True}),
    "pp2": (2, PP2),
    "vpp": (2, {**PP2, "num_layers_per_virtual_pipeline_stage": 1}),
    "cp2": (2, {"context_parallel_size": 2}),
    "recompute": (1, {"recompute_granularity": "full"}),
    "tp2-pp2": (4, {**TP2, **PP2}),
    "ep2": (2, EP2),
    "ep2-tp2": (4, {**EP2, **TP2, "sequence_parallel": True}),
}
OF_EXPERTS = ("one", "tp2-sequence-parallel", "pp2", "vpp", "ep2", "ep2-tp2")
WITH_EXPERTS = (
    "qwen3-moe",
    "qwen3-moe-all-scores",
    "glm4-moe",
    "llama4-some-layers",
    "llama4-all-experts",
    "mixtral",
    "gpt-oss",
    "deepseek2-groups",
    "deepseek3-yarn",
)
# Its experts' biases are no part of an expert that ranks share.
WITH = {
    ("gpt-oss", layout): {"expert_tensor_parallel_size": 1}
    for layout in ("tp2-sequence-parallel", "ep2-tp2")
}
NOT_DIVISIBLE_BY_2 = ("llama-9-heads-3-groups", "llama-mqa-linear-rope")
# One of each way to know positions and to mask: learned, part of a head turned, windows, caps.
UNDER_CP = (
    "gpt2",
    "gpt-neox",
    "llama-mqa-linear-rope",
    "qwen2-window",
    "gemma2",
    "olmo3-yarn",
    "smollm3-yarn",
)
# Positions are what can differ between these, and the whole sequence's length.
OF_STRETCHED = ("one", "tp2-sequence-parallel", "cp2", "recompute")
STRETCHED = ("llama-longrope", "qwen2-yarn")


def cases(ranks: int | None = None) -> list[tuple[str, str]]:
    return [
        (model, layout)
        for layout, (world_size, _) in LAYOUTS.items()
        for model in MODELS
        if ranks in (None, world_size)
        and (layout in OF_EXPERTS if model in WITH_EXPERTS else "ep2" not in layout)
        and not (model in NOT_DIVISIBLE_BY_2 and "tp2" in layout)
        and (layout in OF_STRETCHED if model in STRETCHED else layout != "recompute")
        and (model in UNDER_CP + STRETCHED or layout != "cp2")
    ]
