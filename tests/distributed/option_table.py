"""Options of model and layout, and what each has to be where Megatron or the model holds it."""

from __future__ import annotations

import math
from typing import Any

Sections = dict[str, dict[str, Any]]
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
FP8 = {"bf16": True, "fp8_format": "hybrid"}
LATENT = {"multi_latent_attention": True, "qk_layernorm": True}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48, "beta_fast": 16.0,
    "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.8,
}  # fmt: skip

# attribute of Megatron's TransformerConfig: the sections, and what they make of it
MEGATRON: dict[str, list[tuple[Sections, Any]]] = {
    "num_layers": [({"model": {"num_layers": n}}, n) for n in (3, 6)],
    "hidden_size": [({"model": {"hidden_size": n}}, n) for n in (64, 96)],
    "num_attention_heads": [({"model": {"num_attention_heads": n}}, n) for n in (2, 8)],
    "num_query_groups": [
        ({"model": {"num_attention_heads": 8}}, 8),
        *[({"model": {"num_query_groups": n}}, n) for n in (1, 2)],
    ],
    "kv_channels": [
        ({"model": {"hidden_size": 96}}, 24),
        *[({"model": {"kv_channels": n}}, n) for n in (20, 40)],
    ],
    "ffn_hidden_size": [
        *[({"model": {"ffn_hidden_size": n}}, n) for n in (48, 80)],
        # 8/3 · hidden rounded up to 64 where the MLP is gated, 4 · hidden elsewhere.
        ({"model": {"hidden_size": 104}}, 320),
        ({"model": {"hidden_size": 104, "swiglu": False}}, 416),
        ({"model": {"hidden_size": 104, "swiglu": False, "activation": "geglu_tanh"}}, 320),
    ],
    "normalization": [({"model": {"normalization": n}}, n) for n in ("LayerNorm", "RMSNorm")],
    "layernorm_epsilon": [({"model": {"norm_epsilon": x}}, x) for x in (1e-6, 1e-3)],
    "layernorm_zero_centered_gamma": [
        ({"model": {"apply_layernorm_1p": on}}, on) for on in (True, False)
    ],
    "qk_layernorm": [({"model": {"qk_layernorm": on}}, on) for on in (True, False)],
    "pre_norms": [({}, True), ({"model": {"pre_norms": False, "post_norms": True}}, False)],
    "qk_layernorm_whole": [
        ({"model": {"qk_layernorm": True, "qk_layernorm_whole": on}}, on) for on in (True, False)
    ],
    "qk_l2_norm": [({"model": {"qk_l2_norm": on}}, on) for on in (True, False)],
    "rotary_interleaved": [({"model": {"rotary_interleaved": on}}, on) for on in (True, False)],
    "no_rope_freq": [
        ({"model": {"num_layers": 4, "no_rope_freq": freq}}, want)
        for freq, want in (([1, 0, 0, 1], [1, 0, 0, 1]), ([2], [0, 1, 0, 1]))
    ],
    "post_norms": [({"model": {"post_norms": on}}, on) for on in (True, False)],
    "parallel_residual": [({"model": {"parallel_residual": on}}, on) for on in (True, False)],
    "gated_linear_unit": [
        ({"model": {"swiglu": True}}, True),
        ({"model": {"swiglu": False}}, False),
        ({"model": {"swiglu": False, "activation": "gelu_tanh"}}, False),
        ({"model": {"swiglu": False, "activation": "geglu_tanh"}}, True),
        ({"model": {"swiglu": False, "activation": "quick_geglu"}}, True),
    ],
    "activation_func_clamp_value": [
        ({}, None), ({"model": {"activation_func_clamp_value": 7.0}}, 7.0),
    ],
    "glu_linear_offset": [({"model": {"glu_linear_offset": x}}, x) for x in (0.0, 1.0)],
    "softmax_type": [({"model": {"softmax_type": n}}, n) for n in ("vanilla", "learnable")],
    "num_moe_experts": [({"model": {"num_experts": n}}, n) for n in (4, 8)],
    "moe_layer_freq": [
        ({"model": {"num_experts": 4}}, 1),
        *[({"model": {"num_experts": 4, "moe_layer_freq": freq}}, freq)
          for freq in ([0, 1, 1, 1], [1, 0, 1, 0])],
    ],
    "moe_ffn_hidden_size": [
        ({"model": {"num_experts": 4, "ffn_hidden_size": 56}}, 56),
        *[({"model": {"num_experts": 4, "moe_ffn_hidden_size": n}}, n) for n in (24, 40)],
    ],
    "moe_shared_expert_intermediate_size": [
        ({"model": {"num_experts": 4, "moe_shared_expert_intermediate_size": n}}, n)
        for n in (24, 40)
    ],
    "moe_shared_expert_gate": [
        ({"model": {"num_experts": 4, "moe_shared_expert_intermediate_size": 24,
                    "moe_shared_expert_gate": on}}, on)
        for on in (True, False)
    ],
    "moe_router_topk": [({"model": {"num_experts": 8, "moe_router_topk": n}}, n) for n in (3, 5)],
    "moe_router_score_function": [
        ({"model": {"num_experts": 4, "moe_router_score_function": name}}, name)
        for name in ("softmax", "sigmoid")
    ],
    "moe_router_pre_softmax": [
        ({"model": {"num_experts": 4, "moe_router_pre_softmax": on}}, on) for on in (True, False)
    ],
    "moe_router_num_groups": [
        ({"model": {"num_experts": 8, "moe_router_num_groups": n, "moe_router_group_topk": 2}}, n)
        for n in (2, 4)
    ],
    "moe_router_group_topk": [
        ({"model": {"num_experts": 8, "moe_router_num_groups": 4, "moe_router_group_topk": n}}, n)
        for n in (1, 2)
    ],
    "moe_router_topk_scaling_factor": [
        ({"model": {"num_experts": 4, "moe_router_topk_scaling_factor": x}}, x) for x in (1.5, 2.5)
    ],
    "moe_router_dtype": [
        ({"model": {"num_experts": 4, "moe_router_dtype": name}}, name) for name in ("fp32", "fp64")
    ],
    "moe_router_enable_expert_bias": [
        ({"model": {"num_experts": 4, "moe_router_score_function": "sigmoid",
                    "moe_router_enable_expert_bias": on}}, on)
        for on in (True, False)
    ],
    "moe_apply_probs_on_input": [
        ({"model": {"num_experts": 4, "moe_router_topk": 1, "moe_router_pre_softmax": True,
                    "moe_apply_probs_on_input": on}}, on)
        for on in (True, False)
    ],
    "moe_router_bias_update_rate": [
        ({"model": {"num_experts": 4, "moe_router_bias_update_rate": x}}, x) for x in (0.01, 0.1)
    ],
    "moe_router_load_balancing_type": [
        ({"model": {"num_experts": 4, "moe_router_load_balancing_type": name}}, name)
        for name in ("seq_aux_loss", "none")
    ],
    "moe_aux_loss_coeff": [
        ({"model": {"num_experts": 4, "moe_aux_loss_coeff": x}}, x) for x in (0.01, 0.1)
    ],
    "moe_z_loss_coeff": [
        ({"model": {"num_experts": 4, "moe_z_loss_coeff": x}}, x) for x in (1e-3, 1e-2)
    ],
    "moe_enable_routing_replay": [
        ({"model": {"num_experts": 4, "moe_enable_routing_replay": on}}, on) for on in (True, False)
    ],
    "moe_token_dispatcher_type": [({"model": {"num_experts": 4}}, "alltoall")],
    "expert_model_parallel_size": [
        ({"model": {"num_experts": 4}, "parallel": {"expert_model_parallel_size": n}}, n)
        for n in (2, 4)
    ],
    "expert_tensor_parallel_size": [
        ({"model": {"num_experts": 4},
          "parallel": {**TP2, "sequence_parallel": True, "expert_tensor_parallel_size": n}}, n)
        for n in (1, 2)
    ],
    "multi_latent_attention": [({}, False), ({"model": LATENT}, True)],
    "q_lora_rank": [({"model": {**LATENT, "q_lora_rank": n}}, n) for n in (24, 40)],
    "kv_lora_rank": [({"model": {**LATENT, "kv_lora_rank": n}}, n) for n in (24, 40)],
    "qk_head_dim": [({"model": {**LATENT, "qk_head_dim": n}}, n) for n in (24, 40)],
    "qk_pos_emb_head_dim": [({"model": {**LATENT, "qk_pos_emb_head_dim": n}}, n) for n in (8, 24)],
    "v_head_dim": [({"model": {**LATENT, "v_head_dim": n}}, n) for n in (24, 40)],
    "rope_type": [
        ({"model": LATENT}, "rope"), ({"model": {**LATENT, "rope_scaling": YARN}}, "yarn"),
    ],
    "rotary_scaling_factor": [({"model": {**LATENT, "rope_scaling": YARN}}, 4.0)],
    "original_max_position_embeddings": [({"model": {**LATENT, "rope_scaling": YARN}}, 48)],
    "beta_fast": [({"model": {**LATENT, "rope_scaling": YARN}}, 16.0)],
    "beta_slow": [({"model": {**LATENT, "rope_scaling": YARN}}, 2.0)],
    "mscale": [({"model": {**LATENT, "rope_scaling": YARN}}, 0.7)],
    "mscale_all_dim": [({"model": {**LATENT, "rope_scaling": YARN}}, 0.8)],
    "rotary_base": [({"model": {**LATENT, "rotary_base": n}}, n) for n in (500, 700)],
    "add_bias_linear": [({"model": {"add_bias_linear": on}}, on) for on in (True, False)],
    "add_qkv_bias": [({"model": {"add_qkv_bias": on}}, on) for on in (True, False)],
    "window_size": [({}, None), *[({"model": {"window_size": [n, 0]}}, [n, 0]) for n in (1, 7)]],
    "window_attn_skip_freq": [
        ({"model": {"window_size": [6, 0], "window_attn_skip_freq": n}}, n) for n in (2, 5)
    ],
    "softmax_scale": [({}, None), *[({"model": {"softmax_scale": x}}, x) for x in (0.25, 2.0)]],
    "attn_logit_softcapping": [
        ({"model": {"attn_logit_softcapping": x}}, x) for x in (30.0, 50.0)
    ],
    "hidden_dropout": [({"model": {"hidden_dropout": x}}, x) for x in (0.1, 0.3)],
    "attention_dropout": [({"model": {"attention_dropout": x}}, x) for x in (0.2, 0.4)],
    "tensor_model_parallel_size": [
        ({"parallel": {"tensor_model_parallel_size": n}}, n) for n in (2, 4)
    ],
    "pipeline_model_parallel_size": [
        ({"parallel": {"pipeline_model_parallel_size": n}}, n) for n in (2, 4)
    ],
    # 12 layers on two stages, n of them in a chunk.
    "virtual_pipeline_model_parallel_size": [
        (
            {
                "model": {"num_layers": 12},
                "parallel": {**PP2, "num_layers_per_virtual_pipeline_stage": n},
            },
            6 // n,
        )
        for n in (1, 3)
    ],
    "context_parallel_size": [({"parallel": {"context_parallel_size": n}}, n) for n in (2, 4)],
    "cp_comm_type": [({}, "p2p"), ({"model": {"window_size": [7, 0]}}, "all_gather")],
    "sequence_parallel": [
        ({"parallel": {**TP2, "sequence_parallel": on}}, on) for on in (True, False)
    ],
    "bf16": [({"parallel": {"bf16": on}}, on) for on in (True, False)],
    "params_dtype": [
        ({"parallel": {"bf16": True}}, "torch.bfloat16"), ({}, "torch.float32"),
    ],
    "pipeline_dtype": [
        ({"parallel": {"bf16": True, **PP2}}, "torch.bfloat16"),
        ({"parallel": PP2}, "torch.float32"),
    ],
    "fp8": [
        ({"parallel": {"bf16": True, "fp8_format": name}}, name) for name in ("hybrid", "e4m3")
    ],
    "fp8_recipe": [
        ({"parallel": {**FP8, "fp8_recipe": name}}, name)
        for name in ("delayed", "blockwise", "mxfp8")
    ],
    "fp4": [({"parallel": {"bf16": True, "fp4_format": "e2m1"}}, "e2m1")],
    "recompute_granularity": [
        ({"parallel": {"recompute_granularity": name}}, name) for name in ("full", "selective")
    ],
    "recompute_method": [
        ({"parallel": {"recompute_granularity": "full", "recompute_method": name}}, name)
        for name in ("uniform", "block")
    ],
    "recompute_num_layers": [
        ({"parallel": {"recompute_granularity": "full", "recompute_num_layers": n}}, n)
        for n in (2, 3)
    ],
    "calculate_per_token_loss": [({}, True)],
    "variable_seq_lengths": [
        ({}, True),
        ({"parallel": {**PP2, "num_layers_per_virtual_pipeline_stage": 1}}, False),
    ],
}  # fmt: skip

# what a chunk of the model has: the sections, and what they make of it
CHUNK: dict[str, list[tuple[Sections, Any]]] = {
    # Learned positions: as many as the model says, else the run's sequences need.
    "positions": [
        ({"model": {"position_embedding_type": "learned_absolute", **model},
          "data": {"seq_length": 40}}, rows)
        for model, rows in (({}, 40), ({"max_position_embeddings": 56}, 56))
    ],
    # base ** (−2 i / turned channels of a head of 32)
    "frequencies": [
        (
            {"model": {"rotary_base": base, "rotary_percent": share}},
            [base ** (-2 * i / (32 * share)) for i in range(int(16 * share))],
        )
        for base, share in ((100, 1.0), (5000, 0.5))
    ],
    # The vocabulary of 61 tokens in whole multiples of N · TP.
    "embedding": [
        ({"model": {"make_vocab_size_divisible_by": n}}, rows)
        for n, rows in ((1, 61), (16, 64), (48, 96))
    ],
    "output head": [
        ({"model": {"untie_embeddings_and_output_weights": on}}, on) for on in (True, False)
    ],
    # silu, erf GELU and its tanh approximation, at 1
    "activation": [
        ({}, 1 / (1 + math.exp(-1))),
        ({"model": {"swiglu": False}}, 0.5 * (1 + math.erf(1 / math.sqrt(2)))),
        *[
            ({"model": {"swiglu": False, "activation": name}},
             0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715)))
            for name in ("gelu_tanh", "geglu_tanh")
        ],
        ({"model": {"swiglu": False, "activation": "quick_geglu"}}, 1 / (1 + math.exp(-1.702))),
    ],
    "embedding scale": [
        ({"model": {"scale_embedding": True, "hidden_size": n}}, math.sqrt(n)) for n in (64, 144)
    ],
    "logits at most": [({"model": {"final_logit_softcapping": c}}, c) for c in (0.01, 0.02)],
}  # fmt: skip
