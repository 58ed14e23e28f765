"""The arguments in a checkpoint describe the model that was trained, to those who read them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_scalebio.config import Config, DataConfig, ParallelConfig, TrainConfig
from megatron_scalebio.config.model import ModelConfig
from megatron_scalebio.config.rope import RopeScaling
from tests.distributed.harness import run_distributed

MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"activation": "gelu_tanh", "add_bias_linear": True},
    "llama": {"swiglu": True, "normalization": "RMSNorm", "num_query_groups": 2, "kv_channels": 24},
    "qwen": {
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-6,
        "add_qkv_bias": True,
    },
    "no width given": {"swiglu": True, "ffn_hidden_size": None},
    "window": {
        "window_size": [8, 0],
        "qk_layernorm": True,
        "untie_embeddings_and_output_weights": True,
    },
}
# Of the run, not of the model; or of how a device computes it.
ELSEWHERE = {
    "params_dtype", "bf16", "batch_p2p_comm", "overlap_p2p_comm", "bias_activation_fusion",
    "cp_comm_type", "num_query_groups", "transformer_impl",
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_built_from_them_is_the_models(name: str) -> None:
    run_distributed(rebuild, 1, name)


def rebuild(name: str) -> None:
    """As Megatron-Bridge builds one: by name, and some by rules of its own."""
    from megatron.core.transformer import TransformerConfig

    from megatron_scalebio.checkpoint.megatron_args import megatron_args
    from megatron_scalebio.compat import cpu
    from megatron_scalebio.model.settings import transformer_config

    small = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96}
    cpu.adapt()
    config = Config(model=ModelConfig(**{**small, **MODELS[name]}))
    args, ours = megatron_args(config, 100), transformer_config(config)
    told = {f.name for f in dataclasses.fields(TransformerConfig) if hasattr(args, f.name)}
    assert {"num_layers", "kv_channels", "layernorm_epsilon", "normalization"} <= told
    for field in sorted(told - ELSEWHERE):
        assert getattr(args, field) == getattr(ours, field), field
    assert args.norm_epsilon == ours.layernorm_epsilon
    assert args.apply_layernorm_1p == ours.layernorm_zero_centered_gamma
    assert args.swiglu == (ours.gated_linear_unit and ours.activation_func is F.silu)
    assert args.bias_gelu_fusion == (MODELS[name].get("activation") == "gelu_tanh")
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    assert groups == ours.num_query_groups


def test_the_tokenizer_is_found_from_anywhere(tmp_path: Path, monkeypatch: Any) -> None:
    from megatron_scalebio.checkpoint.megatron_args import megatron_args

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for model, where in (("model", str(tmp_path / "model")), ("org/on-a-hub", "org/on-a-hub")):
        args = megatron_args(Config(), 100, {"type": "HuggingFaceTokenizer", "model": model})
        assert (args.tokenizer_type, args.tokenizer_model) == ("HuggingFaceTokenizer", where)
    assert not hasattr(megatron_args(Config(), 100), "tokenizer_type")


# What no model here has, and what Megatron is to be told of it, by its own names.
ALWAYS: dict[str, Any] = {
    "config_logger_dir": "", "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None, "experimental_attention_variant": None,
    "fp16": False, "fp16_lm_cross_entropy": False, "heterogeneous_layers_config_path": None,
    "hybrid_override_pattern": None, "init_method_xavier_uniform": False,
    "init_model_with_meta_device": False, "is_hybrid_model": False,
    "moe_use_legacy_grouped_gemm": False, "mtp_num_layers": None, "multi_latent_attention": False,
    "no_persist_layer_norm": True, "spec": None, "squared_relu": False, "use_legacy_models": False,
    "cp_comm_type": ["p2p"], "dist_ckpt_format": "torch_dist", "use_dist_ckpt": True,
}  # fmt: skip


# Of a model without experts.
NO_EXPERTS: dict[str, Any] = {
    "num_experts": None, "moe_layer_freq": 1, "moe_grouped_gemm": False,
    "moe_ffn_hidden_size": None, "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False, "moe_router_topk": 2, "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False, "moe_router_num_groups": None, "moe_router_group_topk": None,
    "moe_router_topk_scaling_factor": None, "moe_router_dtype": None,
    "moe_router_enable_expert_bias": False, "moe_apply_probs_on_input": False,
    "moe_router_bias_update_rate": 1e-3,
    "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None, "moe_enable_routing_replay": False,
    "moe_token_dispatcher_type": "alltoall",
    "expert_model_parallel_size": 1,
}  # fmt: skip


def test_every_argument_is_the_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, each of another value than any other, as a GPU with FP8 would have them."""
    from megatron_scalebio.checkpoint import megatron_args as module

    monkeypatch.setattr(module, "uses_transformer_engine", lambda config: True)
    config = Config(
        model=ModelConfig(
            num_layers=12, hidden_size=96, num_attention_heads=8, num_query_groups=4,
            kv_channels=20, ffn_hidden_size=272, max_position_embeddings=501, rotary_base=9000,
            rotary_percent=0.7, rotary_interleaved=True, no_rope_freq=[2],
            normalization="LayerNorm", norm_epsilon=3e-6,
            swiglu=False, activation="gelu_tanh", add_bias_linear=True, add_qkv_bias=True,
            qk_layernorm=True, softmax_type="learnable",
            apply_layernorm_1p=True, window_size=[30, 0], window_attn_skip_freq=3,
            untie_embeddings_and_output_weights=True, make_vocab_size_divisible_by=7,
            hidden_dropout=0.15, attention_dropout=0.25,
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=4, pipeline_model_parallel_size=2, context_parallel_size=3,
            num_layers_per_virtual_pipeline_stage=2, bf16=True, use_distributed_optimizer=True,
            fp8_format="hybrid", fp8_recipe="delayed",
        ),
        data=DataConfig(seq_length=499),
        train=TrainConfig(micro_batch_size=5, global_batch_size=35, seed=77),
    )  # fmt: skip
    assert vars(module.megatron_args(config, 100, {"type": "Sort", "model": "a/hub"})) == {
        **ALWAYS, **NO_EXPERTS, "expert_tensor_parallel_size": 4,
        "num_layers": 12, "hidden_size": 96, "ffn_hidden_size": 272, "num_attention_heads": 8,
        "group_query_attention": True, "num_query_groups": 4, "kv_channels": 20, "seq_length": 499,
        "max_position_embeddings": 501, "rotary_base": 9000, "rotary_percent": 0.7,
        "rotary_interleaved": True, "qk_l2_norm": False,
        "position_embedding_type": "rope", "use_rope_scaling": False, "rope_scaling_factor": 1.0,
        "rotary_seq_len_interpolation_factor": None, "normalization": "LayerNorm",
        "no_rope_freq": [0, 1] * 6, "quick_geglu": False, "activation_func_clamp_value": None,
        "glu_linear_offset": 0.0, "softmax_type": "learnable", "q_lora_rank": None,
        "kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128,
        "norm_epsilon": 3e-6, "layernorm_epsilon": 3e-6, "swiglu": False, "add_bias_linear": True,
        "add_qkv_bias": True, "qk_layernorm": True, "apply_layernorm_1p": True,
        "layernorm_zero_centered_gamma": True, "hidden_dropout": 0.15, "attention_dropout": 0.25,
        "window_size": (30, 0), "window_attn_skip_freq": 3,
        "untie_embeddings_and_output_weights": True,
        "padded_vocab_size": 112,  # the next multiple of 4 · 7
        "make_vocab_size_divisible_by": 7, "tensor_model_parallel_size": 4,
        "pipeline_model_parallel_size": 2, "context_parallel_size": 3, "overlap_p2p_comm": True,
        "transformer_impl": "transformer_engine", "fp8_param_gather": False, "fp8": "hybrid",
        "fp8_recipe": "delayed", "fp4": None, "num_layers_per_virtual_pipeline_stage": 2,
        "bias_swiglu_fusion": False, "bias_gelu_fusion": True, "bf16": True,
        "params_dtype": torch.bfloat16, "use_distributed_optimizer": True, "micro_batch_size": 5,
        "global_batch_size": 35, "seed": 77, "tokenizer_type": "Sort", "tokenizer_model": "a/hub",
    }  # fmt: skip


# Model and data, and what they are told as.
TOLD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"hidden_size": 96, "num_attention_heads": 8},
        {
            "group_query_attention": False, "num_query_groups": 8, "kv_channels": 12,
            "max_position_embeddings": 499, "swiglu": True, "bias_swiglu_fusion": True,
            "bias_gelu_fusion": False, "window_size": None, "window_attn_skip_freq": None,
            "ffn_hidden_size": 256, "normalization": "RMSNorm", "params_dtype": torch.float32,
            "bf16": False, "use_distributed_optimizer": False, "overlap_p2p_comm": False,
            "fp8_param_gather": False, "transformer_impl": "local",
            "position_embedding_type": "rope",
        },
    ),
    (
        {"multi_latent_attention": True, "qk_layernorm": True, "q_lora_rank": 24,
         "rope_scaling": RopeScaling("yarn", 6.0, mscale=0.7, mscale_all_dim=0.8)},
        {"multi_latent_attention": True, "q_lora_rank": 24, "position_embedding_type": "rope",
         "rope_type": "yarn", "rotary_scaling_factor": 6.0, "mscale": 0.7, "mscale_all_dim": 0.8,
         "original_max_position_embeddings": 8192, "beta_fast": 32.0, "beta_slow": 1.0},
    ),
    ({"qk_l2_norm": True}, {"qk_l2_norm": True, "rotary_interleaved": False}),
    ({"hidden_size": 96, "swiglu": False}, {"ffn_hidden_size": 384, "bias_gelu_fusion": False}),
    (
        {"position_embedding_type": "learned_absolute"},
        {"position_embedding_type": "learned_absolute"},
    ),
    (
        {"rope_scaling": RopeScaling("llama3", 6.0)},
        {"use_rope_scaling": True, "rope_scaling_factor": 6.0, "position_embedding_type": "rope",
         "rotary_seq_len_interpolation_factor": None},
    ),
    (
        {"rope_scaling": RopeScaling("linear", 6.0)},
        {"use_rope_scaling": False, "rope_scaling_factor": 1.0, "position_embedding_type": "rope",
         "rotary_seq_len_interpolation_factor": 6.0},
    ),
    (
        {"rope_scaling": RopeScaling(
            "yarn", 6.0, original_max_position_embeddings=300, attention_factor=1.4, beta_fast=30.0,
            beta_slow=2.0, truncate=False,
        )},
        {"use_rope_scaling": False, "rope_scaling_factor": 1.0,
         "rotary_seq_len_interpolation_factor": None, "position_embedding_type": "yarn",
         "yarn_rotary_scaling_factor": 6.0, "yarn_original_max_position_embeddings": 300,
         "yarn_beta_fast": 30.0, "yarn_beta_slow": 2.0, "yarn_mscale_all_dim": 0.0,
         "yarn_correction_range_round_to_int": False,
         # Such that Megatron's 0.1 · ln 6 · m + 1 is the 1.4 above.
         "yarn_mscale": pytest.approx(0.4 / 0.17917594692280552)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "told"), TOLD)
def test_what_is_not_given_and_how_positions_are_stretched(
    model: dict[str, Any], told: dict[str, Any]
) -> None:
    from megatron_scalebio.checkpoint.megatron_args import megatron_args

    config = Config(model=ModelConfig(**model), data=DataConfig(seq_length=499))
    args = vars(megatron_args(config, 100))
    assert {name: args[name] for name in told} == told
    yarn = {name for name in args if name.startswith("yarn")}
    assert yarn == {name for name in told if name.startswith("yarn")}
